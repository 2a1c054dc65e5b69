"""Mamba-1's selective scan over a tree of segments: chunked, vectorised over all chunks, backward by hand.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = C_t h_t

A segment starts from its parent's final state. Segments are cut into chunks of at most K tokens, so the tree of
segments becomes a tree of chunks, and each chunk starts from its parent chunk's final state. All chunks run their
K steps side by side from a zero state; final states then travel down the tree, level by level; last, every chunk
adds what its true initial state contributes. The backward pass is the same walk in reverse.

Legend: T tokens, I inner channels, N state size, S segments, R given initial states, C chunks, K steps per chunk.
Source: Mamba (arXiv 2312.00752), section 3.2 and algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels.interface import ScanRow

CHUNK_STEPS = 16
"""Steps per chunk. Fewer pad short segments less; more mean fewer levels for long ones."""

BLOCK_ELEMENTS = 2**20
"""State elements (tokens x channels x N) worked on at once, so that a block stays in the processor's cache."""


@dataclass(frozen=True)
class ChunkedScan(ScanRow):
    """How the segments of one packed row are cut into chunks.

    Chunks are ordered by level: a chunk's parent is always on an earlier level.
    """

    tokens_KC: Tensor
    """Token of each step of each chunk; the index T where a chunk is shorter than K."""
    slots_T: Tensor
    """Where each token lies in the flattened (K, C)."""
    levels: tuple[tuple[int, int], ...]
    """First and last-plus-one chunk of each level."""
    parents_C: Tensor
    """Parent chunk; on the first level the index of the given initial state, or -1 for zeros."""
    last_chunk_S: Tensor
    """The chunk that holds each segment's last token."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> ChunkedScan:
        steps = min(CHUNK_STEPS, max(lengths))
        chunks: list[tuple[int, int, int, int]] = []  # level, parent (index in this list, or state), start, length
        last: list[int] = []
        start = 0
        for length, parent, state in zip(lengths, parents, initial, strict=True):
            level, previous = (0, state) if parent < 0 else (chunks[last[parent]][0] + 1, last[parent])
            for first in range(0, length, steps):
                chunks.append((level, previous, start + first, min(steps, length - first)))
                level, previous = level + 1, len(chunks) - 1
            last.append(len(chunks) - 1)
            start += length

        order = sorted(range(len(chunks)), key=lambda chunk: chunks[chunk][0])
        rank = torch.empty(len(chunks), dtype=torch.int64)
        rank[torch.tensor(order)] = torch.arange(len(chunks))
        ordered = [chunks[chunk] for chunk in order]
        level_sizes = torch.bincount(torch.tensor([chunk[0] for chunk in ordered]))
        ends = level_sizes.cumsum(0).tolist()
        parents_C = torch.tensor([int(rank[parent]) if level else parent for level, parent, _, _ in ordered])

        starts = torch.tensor([chunk[2] for chunk in ordered])
        sizes = torch.tensor([chunk[3] for chunk in ordered])
        step = torch.arange(steps)[:, None]
        tokens_KC = torch.where(step < sizes, starts + step, start)
        slots_T = torch.empty(start + 1, dtype=torch.int64)
        slots_T[tokens_KC.flatten()] = torch.arange(tokens_KC.numel())
        return cls(
            tokens_KC=tokens_KC.to(device),
            slots_T=slots_T[:start].to(device),
            levels=tuple(zip([0, *ends[:-1]], ends, strict=True)),
            parents_C=parents_C.to(device),
            last_chunk_S=rank[torch.tensor(last)].to(device),
        )

    def to_chunks(self, x: Tensor) -> Tensor:
        """(T, F) -> (K, C, F), zeros where a chunk is shorter than K. A zero dt leaves the state as it is."""
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return padded[self.tokens_KC]

    def from_chunks(self, x: Tensor) -> Tensor:
        """(K, C, F) -> (T, F)"""
        return x.flatten(0, 1)[self.slots_T]

    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
        if initial_states is not None:
            initial_states = initial_states.to(dtype)
        return _SelectiveScan.apply(u, dt, A, B, C, initial_states, self)


def _channel_blocks(tokens: int, channels: int, state: int) -> list[slice]:
    size = min(channels, max(32, BLOCK_ELEMENTS // (tokens * state)))
    return [slice(start, min(start + size, channels)) for start in range(0, channels, size)]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, plan: ChunkedScan
    ) -> tuple[Tensor, Tensor]:
        u_KCI, dt_KCI, B_KCN, C_KCN = (plan.to_chunks(x) for x in (u, dt, B, C))
        steps, chunks, channels = u_KCI.shape
        y_KCI = torch.empty_like(u_KCI)
        start_CIN = u.new_zeros(chunks, channels, A.shape[1])  # the state that each chunk starts from
        final_SIN = u.new_empty(len(plan.last_chunk_S), channels, A.shape[1])
        _load_initial_states(start_CIN, initial, plan)
        for block in _channel_blocks(steps * chunks, channels, A.shape[1]):
            decay, h = _run_from_zero(u_KCI[:, :, block], dt_KCI[:, :, block], A[block], B_KCN)
            start = start_CIN[:, block].contiguous()
            end = _hand_down(start, h[-1], _total_decay(dt_KCI[:, :, block], A[block]), plan)
            start_CIN[:, block] = start
            final_SIN[:, block] = end[plan.last_chunk_S]
            for step in range(steps):
                start = decay[step] * start
                h[step] += start
            y_KCI[:, :, block] = h.mul_(C_KCN.unsqueeze(2)).sum(-1)
        ctx.save_for_backward(u, dt, A, B, C, start_CIN)
        ctx.plan = plan
        ctx.initial_shape = None if initial is None else initial.shape
        return plan.from_chunks(y_KCI), final_SIN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        # Autocast, if the caller's backward pass runs inside it, would take the sums below to bfloat16.
        with torch.autocast(dy.device.type, enabled=False):
            u, dt, A, B, C, start_CIN = ctx.saved_tensors
            plan: ChunkedScan = ctx.plan
            u_KCI, dt_KCI, B_KCN, C_KCN, dy_KCI = (plan.to_chunks(x) for x in (u, dt, B, C, dy))
            steps, chunks, channels = u_KCI.shape
            du_KCI, ddt_KCI = torch.empty_like(u_KCI), torch.empty_like(u_KCI)
            dA, dB_KCN, dC_KCN = torch.empty_like(A), torch.zeros_like(B_KCN), torch.zeros_like(C_KCN)
            dstart_CIN = torch.empty_like(start_CIN)
            for block in _channel_blocks(steps * chunks, channels, A.shape[1]):
                u_block, dt_block, A_block = u_KCI[:, :, block], dt_KCI[:, :, block], A[block]
                dy_block, start = dy_KCI[:, :, block], start_CIN[:, block].contiguous()
                # States again, from the saved starts: cheaper than keeping T x I x N of them.
                decay, h = _run_from_zero(u_block, dt_block, A_block, B_KCN, start)
                g, dstart_CIN[:, block] = _state_gradients(
                    dy_block, C_KCN, decay, _total_decay(dt_block, A_block), dfinal[:, block], plan
                )
                x = dt_block * u_block
                dC_KCN += torch.matmul(dy_block.unsqueeze(2), h).squeeze(2)
                dB_KCN += torch.matmul(x.unsqueeze(2), g).squeeze(2)
                dx = (g * B_KCN.unsqueeze(2)).sum(-1)
                du_KCI[:, :, block] = dt_block * dx
                decay[0] *= start
                decay[1:] *= h[:-1]
                g *= decay  # gradient of dt A, the exponent
                dA[block] = (g * dt_block.unsqueeze(-1)).sum((0, 1))
                ddt_KCI[:, :, block] = torch.addcmul((g.mul_(A_block)).sum(-1), u_block, dx)
            dinitial = _initial_gradients(dstart_CIN, ctx.initial_shape, plan)
            gradients = (plan.from_chunks(x) for x in (du_KCI, ddt_KCI, dB_KCN, dC_KCN))
            du, ddt, dB, dC = gradients
            return du, ddt, dA, dB, dC, dinitial, None


def _run_from_zero(
    u_KCi: Tensor, dt_KCi: Tensor, A_iN: Tensor, B_KCN: Tensor, start_CiN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decays and states (K, C, i, N) of a block of channels, every chunk from `start_CiN`, or from zero."""
    decay = torch.exp(dt_KCi.unsqueeze(-1) * A_iN)
    h = (dt_KCi * u_KCi).unsqueeze(-1) * B_KCN.unsqueeze(2)
    if start_CiN is not None:
        h[0].addcmul_(decay[0], start_CiN)
    for step in range(1, len(h)):
        h[step].addcmul_(decay[step], h[step - 1])
    return decay, h


def _total_decay(dt_KCi: Tensor, A_iN: Tensor) -> Tensor:
    """Decay (C, i, N) over a whole chunk."""
    return torch.exp(dt_KCi.sum(0).unsqueeze(-1) * A_iN)


def _hand_down(start_CiN: Tensor, last_CiN: Tensor, total_CiN: Tensor, plan: ChunkedScan) -> Tensor:
    """Final state (C, i, N) of every chunk; fills `start_CiN`, which holds the first level's states, level by level.

    Args:
        last_CiN: last states of the chunks run from zero.
        total_CiN: decay over each chunk.
    """
    end = last_CiN.clone()
    for level, (first, last) in enumerate(plan.levels):
        if level:
            start_CiN[first:last] = end[plan.parents_C[first:last]]
        end[first:last].addcmul_(total_CiN[first:last], start_CiN[first:last])
    return end


def _state_gradients(
    dy_KCi: Tensor, C_KCN: Tensor, decay: Tensor, total_CiN: Tensor, dfinal_SiN: Tensor, plan: ChunkedScan
) -> tuple[Tensor, Tensor]:
    """Gradients of all states (K, C, i, N) and of the chunks' starts (C, i, N): the walk of the forward pass, reversed.

    First what flows back inside each chunk, then from chunk to parent chunk, level by level, then both added up.
    """
    g = dy_KCi.unsqueeze(-1) * C_KCN.unsqueeze(2)
    for step in range(len(g) - 2, -1, -1):
        g[step].addcmul_(decay[step + 1], g[step + 1])
    end = torch.zeros_like(total_CiN)
    end.index_add_(0, plan.last_chunk_S, dfinal_SiN)
    dstart = decay[0] * g[0]
    for level, (first, last) in reversed(list(enumerate(plan.levels))):
        dstart[first:last].addcmul_(total_CiN[first:last], end[first:last])
        if level:
            end.index_add_(0, plan.parents_C[first:last], dstart[first:last])
    for step in range(len(g) - 1, -1, -1):
        g[step] += end
        end = decay[step] * end
    return g, dstart


def _initial_gradients(dstart_CIN: Tensor, shape: torch.Size | None, plan: ChunkedScan) -> Tensor | None:
    """Gradient of the given initial states (R, I, N), if there were any."""
    if shape is None:
        return None
    first, last = plan.levels[0]
    given = plan.parents_C[first:last] >= 0
    return dstart_CIN.new_zeros(shape).index_add_(0, plan.parents_C[first:last][given], dstart_CIN[first:last][given])


def _load_initial_states(start_CIN: Tensor, initial: Tensor | None, plan: ChunkedScan) -> None:
    first, last = plan.levels[0]
    given = plan.parents_C[first:last] >= 0
    if initial is not None:
        start_CIN[first:last][given] = initial[plan.parents_C[first:last][given]]
    elif given.any():
        raise ValueError("selective_scan: the plan refers to initial states, but none were given")
