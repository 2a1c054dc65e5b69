"""Scan and convolution of a decoding step: one new token for each cached sequence, so no plan of chunks is needed.

Legend: T tokens = sequences, I inner channels, N state size, W convolution taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model.kernels.interface import ConvRow, ScanRow


@dataclass(frozen=True)
class ScanStep(ScanRow):
    """One step of the recurrence for every sequence at once. Source: Mamba (arXiv 2312.00752), equation 2."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> Self:
        """As `ScanRow.build`; segment s is one token that continues the given initial state s."""
        _check_step("ScanStep", lengths, parents, initial)
        return cls()

    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `ScanRow.run`; the final states are (T, I, N)."""
        if initial_states is None:
            raise ValueError("ScanStep: a step continues states, but none were given")
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
        decay = torch.exp(dt.unsqueeze(-1) * A)
        h = torch.addcmul((dt * u).unsqueeze(-1) * B.unsqueeze(1), decay, initial_states.to(dtype))
        return (h * C.unsqueeze(1)).sum(-1), h  # on CPUs faster than a product of matrices


@dataclass(frozen=True)
class ConvStep(ConvRow):
    """One output of the convolution for every sequence at once."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device) -> Self:
        """As `ConvRow.build`; segment s is one token that continues the given tail s."""
        _check_step("ConvStep", lengths, parents, initial)
        return cls()

    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `ConvRow.run`; sums in float32, or in float64 for such inputs."""
        if initial_tails is None:
            raise ValueError("ConvStep: a step continues tails, but none were given")
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        inputs_TWI = torch.cat([initial_tails.to(u.dtype), u.unsqueeze(1)], dim=1)
        y = bias.to(dtype) + (inputs_TWI.to(dtype) * weight.T.to(dtype)).sum(1)
        # A copy, since a cache keeps it; `contiguous` would give a view of all W inputs where there is one sequence.
        return (F.silu(y) if silu else y).to(u.dtype), inputs_TWI[:, 1:].clone(memory_format=torch.contiguous_format)


def _check_step(name: str, lengths: list[int], parents: list[int], initial: list[int]) -> None:
    if any(length != 1 for length in lengths) or any(parent >= 0 for parent in parents):
        raise ValueError(f"{name}: a step has one token per sequence, but the segments have {lengths} tokens")
    if initial != list(range(len(lengths))):
        raise ValueError(f"{name}: sequence s continues state s, but the segments continue {initial}")
