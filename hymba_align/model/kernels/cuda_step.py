"""The scan of a decoding step by the library mamba-ssm: one new token for each cached sequence. Inference only.

Not run on a GPU for this project yet: tested on the CPU with a stand-in that follows the library's interface.
causal-conv1d's part of a step is in `causal_conv1d.py`.

Legend: T tokens = sequences, I inner channels, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hymba_align.errors import KernelError
from hymba_align.model.kernels.causal_conv1d import refuse_gradients
from hymba_align.model.kernels.step import ScanStep

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why mamba-ssm cannot run there, with what to do about it; None if it can."""
    if device.type != "cuda":
        return f"mamba-ssm runs on CUDA only, not on {device.type}: choose torch"
    if dtype not in DTYPES:
        return f"mamba-ssm does not compute in {dtype}: choose torch"
    try:
        # Importing any of mamba-ssm loads all of it, its text generation with transformers too.
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: F401
    except ImportError as error:
        return f"mamba-ssm does not load ({error}); in the clone: pip install --no-build-isolation -e '.[cuda]'"
    return None


@dataclass(frozen=True)
class LibraryScanStep(ScanStep):
    """One step of the recurrence for every sequence at once. Source: Mamba (arXiv 2312.00752), equation 2."""

    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `ScanRow.run`; the final states are (T, I, N).

        Raises:
            KernelError: gradients are wanted, or a dtype that the library does not take.
            ValueError: no states are given.
        """
        return _update(u, torch.float32, dt, A, B, C, A.new_zeros(len(A)), None, initial_states, softplus=False)

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
        """As `ScanRow.gated`, in one kernel; the final states are (T, I, N).

        Raises:
            KernelError: gradients are wanted, or a dtype that the library does not take.
            ValueError: no states are given.
        """
        return _update(u, u.dtype, dt_raw, A, B, C, D, z, initial_states, softplus=True)


def _update(
    u: Tensor,
    dtype: torch.dtype,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_states: Tensor | None,
    *,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Output (T, I) in `dtype` and new states (T, I, N)."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    if initial_states is None:
        raise ValueError("ScanStep: a step continues states, but none were given")
    refuse_gradients("mamba-ssm", u, dt, A, B, C, D, z, initial_states)
    if u.dtype not in DTYPES:
        raise KernelError(f"mamba-ssm does not compute in {u.dtype}; choose torch")
    states = initial_states.to(torch.float32, copy=True)  # the library writes into them
    # mamba-ssm 2.3 raises a TypeError where a bias or D is missing, since it unpacks 0 in their place: both are given.
    no_bias = torch.zeros(len(A), dtype=torch.float32, device=A.device)
    y = selective_state_update(states, u.to(dtype), dt, A, B, C, D=D, z=z, dt_bias=no_bias, dt_softplus=softplus)
    return cast(Tensor, y), states
