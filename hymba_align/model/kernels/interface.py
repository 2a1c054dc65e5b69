"""What every backend of the SSM branch offers, whatever computes it.

A backend is a plan of one packed row: made once per forward pass from the row's segments, used by every layer.

Legend: T tokens, I inner channels, N state size, S segments, R given initial states, W convolution taps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


class ScanRow(ABC):
    """The selective scan over the segments of one packed row. Source: Mamba (arXiv 2312.00752), section 3.2."""

    @classmethod
    @abstractmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> Self:
        """The plan of a row.

        Args:
            lengths: (S,) tokens per segment, in row order.
            parents: (S,) earlier segment that each continues, or -1.
            initial: (S,) for segments without a parent, the given initial state they start from, or -1 for zeros.
            device: of the computation.
        """

    @abstractmethod
    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output (T, I) and every segment's final state (S, I, N), in float32 (float64 if the inputs are).

        Args:
            u: (T, I) input after the convolution.
            dt: (T, I) step sizes, positive.
            A: (I, N) state matrix, negative.
            B: (T, N) input projection.
            C: (T, N) output projection.
            initial_states: (R, I, N) that the plan refers to.
        """

    def gated(
        self,
        u: Tensor,
        dt_raw: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        initial_states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output (T, I) of the whole branch, in u's dtype, and final states: (scan + D u) silu(z).

        Source: Mamba, section 3.4, figure 3.

        Args:
            u: (T, I) input after the convolution.
            dt_raw: (T, I) float32 step sizes before the softplus, bias included.
            A: (I, N) state matrix, negative.
            B: (T, N) input projection.
            C: (T, N) output projection.
            D: (I,) direct path.
            z: (T, I) gate before its SiLU.
            initial_states: (R, I, N) that the plan refers to.
        """
        y, final = self.run(u, F.softplus(dt_raw), A, B, C, initial_states)
        return ((y + D.to(y.dtype) * u) * F.silu(z.to(y.dtype))).to(u.dtype), final


class ConvRow(ABC):
    """The causal depthwise convolution over the segments of one packed row."""

    @classmethod
    @abstractmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device) -> Self:
        """The plan of a row.

        Args:
            lengths: (S,) tokens per segment, in row order.
            parents: (S,) earlier segment that each continues, or -1.
            initial: (S,) for segments without a parent, the given tail they continue, or -1 for zeros.
            taps: W.
            device: of the computation.
        """

    @abstractmethod
    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolved row (T, I) and every segment's tail (S, W - 1, I): its path's last inputs, oldest first.

        Args:
            u: (T, I) input.
            weight: (I, W) taps, the last one for the current token.
            bias: (I,).
            initial_tails: (R, W - 1, I) that the plan refers to.
            silu: apply SiLU to the output.
        """


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, plan: ScanRow, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `plan.run` gives: output (T, I) and every segment's final state (S, I, N)."""
    return plan.run(u, dt, A, B, C, initial_states)


def causal_conv(
    u: Tensor, weight: Tensor, bias: Tensor, plan: ConvRow, initial_tails: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """What `plan.run` gives: convolved row (T, I) and every segment's tail (S, W - 1, I)."""
    return plan.run(u, weight, bias, initial_tails, silu=silu)
