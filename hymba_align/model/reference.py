"""Textbook recurrences, one token at a time: what the fast kernels are tested against. Float64-capable, never fast.

Legend: T tokens, I inner channels, N state size, W convolution taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (T, I) and final state (I, N) of one sequence. Source: Mamba (arXiv 2312.00752), equation 2.

    Args:
        u: (T, I) input.
        dt: (T, I) step sizes.
        A: (I, N) state matrix.
        B: (T, N) input projection.
        C: (T, N) output projection.
        initial_state: (I, N).
    """
    h = initial_state
    outputs = []
    for t in range(len(u)):
        h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
        outputs.append(h @ C[t])
    return torch.stack(outputs), h


def causal_conv_reference(u: Tensor, weight: Tensor, bias: Tensor, initial_tail: Tensor) -> Tensor:
    """Convolved sequence (T, I). Source: Mamba (arXiv 2312.00752), section 3.4.

    Args:
        u: (T, I) input.
        weight: (I, W) taps, the last one for the current token.
        bias: (I,).
        initial_tail: (W - 1, I) inputs before the first, oldest first.
    """
    taps = weight.shape[1]
    padded = torch.cat([initial_tail, u])
    return torch.stack([(padded[t : t + taps] * weight.T).sum(0) + bias for t in range(len(u))])
