"""Float64 results for a row of segments, from the textbook recurrences and from a dense mask. Never fast.

Legend: T tokens, S segments, I inner channels, N state size, W convolution taps, H query heads, G key/value heads,
d query/key head size, e value head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model.reference import causal_conv_reference, selective_scan_reference


def gated_scan(
    lengths: list[int],
    parents: list[int],
    u: Tensor,
    dt_raw: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """(T, I) and final states (S, I, N): every segment starts from its parent's final state, roots from zeros."""
    dt = F.softplus(dt_raw)
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    start = 0
    for length, parent in zip(lengths, parents, strict=True):
        own = slice(start, start + length)
        before = finals[parent] if parent >= 0 else torch.zeros_like(A)
        y, final = selective_scan_reference(u[own], dt[own], A, B[own], C[own], before)
        outputs.append(y)
        finals.append(final)
        start += length
    return (torch.cat(outputs) + D * u) * F.silu(z), torch.stack(finals)


def conv_silu(lengths: list[int], parents: list[int], u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of the convolution (T, I) and tails (S, W - 1, I): every segment continues its parent's last inputs."""
    reach = weight.shape[1] - 1
    outputs: list[Tensor] = []
    tails: list[Tensor] = []
    start = 0
    for length, parent in zip(lengths, parents, strict=True):
        own = u[start : start + length]
        before = tails[parent] if parent >= 0 else u.new_zeros(reach, u.shape[1])
        outputs.append(causal_conv_reference(own, weight, bias, before))
        tails.append(torch.cat([before, own])[-reach:])
        start += length
    return F.silu(torch.cat(outputs)), torch.stack(tails)


def attention(
    lengths: list[int], parents: list[int], window: int | None, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor
) -> Tensor:
    """(L, H * e), with all scores formed; the first segment is the meta tokens."""
    seen = visible(lengths, parents, window).to(q_LHd.device)
    repeats = q_LHd.shape[1] // k_LGd.shape[1]
    k, v = k_LGd.repeat_interleave(repeats, 1), v_LGe.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q_LHd, k) * q_LHd.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v).flatten(1)


def visible(lengths: list[int], parents: list[int], window: int | None) -> Tensor:
    """(L, L) True where a query (row) may see a key, by DESIGN.md, section 2."""
    starts = [sum(lengths[:segment]) for segment in range(len(lengths))]
    positions: list[int] = []  # of each segment's first token, on its path
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        positions.append(0 if parent < 0 else positions[parent] + lengths[parent])
        queries = positions[segment] + torch.arange(length)[:, None]
        ancestor = segment
        while ancestor >= 0:
            keys = positions[ancestor] + torch.arange(lengths[ancestor])
            near = keys <= queries
            if window is not None and ancestor != 0:  # segment 0 holds the meta tokens
                near &= queries - keys <= window
            at, where = starts[segment], starts[ancestor]
            seen[at : at + length, where : where + lengths[ancestor]] = near
            ancestor = parents[ancestor]
    return seen
