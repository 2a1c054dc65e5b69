"""The selective scan in Triton, for CUDA: chunks of every segment run side by side, forward and backward.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = C_t h_t

Forward: every chunk that another continues runs from a zero state (`run_chunks`); true last states travel down the
tree, one launch per level of segments (`hand_down`); every chunk runs again from its true start and gives its outputs
(`finish_chunks`). So a chunk that nothing continues runs once, and one long document still fills the device.
Backward is the same in reverse: `run_chunks_back`, `hand_up`, `gradients`. States are not kept, but one in every SPACING
tokens is, and the rest is run again from there.
No sum uses atomics: programs write partial sums, torch adds them up, so that a run repeats bit by bit.

Legend: T tokens, I inner channels, N state size, S segments, R given initial states, C chunks.
Source: Mamba (arXiv 2312.00752), section 3.2 and algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels.interface import ScanRow
from hymba_align.model.kernels.triton_support import rows, to_device, unavailable

__all__ = ["TritonScan", "unavailable"]

CHANNELS = 32
"""Channels per program: one per lane of a warp."""
SPACING = 12
"""Tokens from one kept state to the next; for N = 16 those states take the room of 1.4 float32 (T, I)."""
GRADIENT_STEPS = 3
"""Tokens whose states the backward pass holds in registers. With 4 it spills some to memory on sm_80."""
SHORTEST = 16
"""Tokens per chunk of a short row."""
STATE_BLOCK = 128
"""State elements per program where states travel along the tree."""
LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
CHUNKS = 128
"""Chunks of a row that is one document: with 100 blocks of channels, 97 warps for each of 132 multiprocessors."""
ZEROS = -1


def chunk_steps(total: int) -> int:
    """Tokens per chunk of a row of `total`: a power of two from 16 to 256. Shorter ones move more states per token."""
    steps = SHORTEST
    while steps < 256 and steps * CHUNKS < total:
        steps *= 2
    return steps


@dataclass(frozen=True)
class TritonScan(ScanRow):
    """The chunks of one packed row, on the device. Tables are int32; see `triton_scan_kernels.py` for their rows."""

    chunks: Tensor
    """(C, 5)"""
    segments: Tensor
    """(S, 3)"""
    first_child: Tensor
    """(S + 1,) where each segment's children start in `children`."""
    children: Tensor
    """Segments that continue another, grouped by it."""
    continued: Tensor
    """Chunks that others continue."""
    continuing: Tensor
    """Chunks that do not start from zeros."""
    levels: tuple[Tensor, ...]
    """Segments by depth in the tree; on a level only those that have a chunk to hand down from."""
    levels_back: tuple[Tensor, ...]
    """All segments by depth."""
    given: tuple[tuple[int, int], ...]
    """Segments that start from a given state, and which."""
    num_tokens: int
    num_checkpoints: int

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> Self:
        """Cuts segments into chunks; see `ScanRow.build`."""
        steps = chunk_steps(sum(lengths))
        children: list[list[int]] = [[] for _ in lengths]
        depths: list[int] = []
        for segment, parent in enumerate(parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                children[parent].append(segment)
        chunks: list[list[int]] = []
        segments: list[list[int]] = []
        token = checkpoint = 0
        for segment, (length, parent, state) in enumerate(zip(lengths, parents, initial, strict=True)):
            first, stop = len(chunks), token + length
            count = -(-length // steps)
            segments.append([first, count, count if children[segment] else count - 1])
            start = sum(segments[parent][:2]) - 1 if parent >= 0 else -2 - state if state >= 0 else ZEROS
            for index in range(count):
                size = min(steps, stop - token)
                chunks.append([token, size, start, checkpoint, segment if index == count - 1 else -1])
                start, token, checkpoint = len(chunks) - 1, token + size, checkpoint + -(-size // SPACING)
        by_depth: list[list[int]] = [[] for _ in range(max(depths) + 1)]
        for segment, depth in enumerate(depths):
            by_depth[depth].append(segment)
        down = [kept for level in by_depth if (kept := [s for s in level if segments[s][2]])]
        firsts = [0, *torch.tensor([len(own) for own in children]).cumsum(0).tolist()]
        given = [
            (s, state) for s, (parent, state) in enumerate(zip(parents, initial, strict=True)) if parent < 0 <= state
        ]
        tables = to_device(
            [
                [value for row in chunks for value in row],
                [value for row in segments for value in row],
                firsts,
                [child for own in children for child in own],
                [first + index for first, _, inner in segments for index in range(inner)],
                [index for index, row in enumerate(chunks) if row[2] != ZEROS],
                *down,
                *by_depth,
            ],
            device,
        )
        return cls(
            chunks=tables[0].view(-1, 5),
            segments=tables[1].view(-1, 3),
            first_child=tables[2],
            children=tables[3],
            continued=tables[4],
            continuing=tables[5],
            levels=tuple(tables[6 : 6 + len(down)]),
            levels_back=tuple(tables[6 + len(down) :]),
            given=tuple(given),
            num_tokens=token,
            num_checkpoints=checkpoint,
        )

    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output (T, I) and final states (S, I, N), float32; see `ScanRow.run`. Inputs may be bfloat16."""
        return self._apply(u, dt, A, B, C, None, None, initial_states)

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
        """Output (T, I) of the whole branch, in u's dtype; see `ScanRow.gated`. One pass over memory for all of it."""
        return self._apply(u, dt_raw, A, B, C, D, z, initial_states)

    def _apply(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        tensors = [x for x in inputs if x is not None]
        if any(x.dtype == torch.float64 for x in tensors):
            raise ValueError("the Triton scan computes in float32; use the backend scan=torch for float64")
        if inputs[-1] is None and self.given:
            raise ValueError("selective_scan: the plan refers to initial states, but none were given")
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        y, final = _Scan.apply(*inputs, self, keep)
        return y, final


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        plan: TritonScan,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (A, B, C, D, initial)]
        ctx.initial_shape = None if initial is None else initial.shape
        u, dt = rows(u), rows(dt)
        z = None if z is None else rows(z)
        A, B, C = A.float().T.contiguous(), B.contiguous(), C.contiguous()
        given = None if initial is None else initial.float().transpose(1, 2).contiguous()
        with torch.cuda.device_of(u):
            y, final, checkpoints = _forward(u, dt, A, B, C, D, z, given, plan, keep)
        if keep:
            ctx.save_for_backward(u, dt, A, B, C, D, z, checkpoints)
        ctx.plan = plan
        return y, final.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, checkpoints = ctx.saved_tensors
        plan: TritonScan = ctx.plan
        dy = torch.zeros_like(u) if dy is None else rows(dy)
        dfinal = None if dfinal is None else dfinal.float().transpose(1, 2).contiguous()
        with torch.cuda.device_of(u):
            dends, dstarts = _backward_states(dt, A, C, z, dy, dfinal, plan)
            du, ddt, dA, dB, dC, dD, dz = _gradients(u, dt, A, B, C, D, z, dy, checkpoints, dends, plan)
        A_dtype, B_dtype, C_dtype, D_dtype, initial_dtype = ctx.dtypes
        dinitial = None
        if ctx.initial_shape is not None:
            dinitial = _initial_gradient(dstarts, ctx.initial_shape, plan).to(initial_dtype)
        if dD is not None:
            dD = dD.to(D_dtype)
        return du, ddt, dA.T.to(A_dtype), dB.to(B_dtype), dC.to(C_dtype), dD, dz, dinitial, None, None


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    plan: TritonScan,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (T, I), final states (S, N, I) and, to keep, a state (N, I) every SPACING tokens of a chunk."""
    from hymba_align.model.kernels import triton_scan_kernels as kernels

    state, channels = A.shape
    sizes = {"N": state, "NP": _power_of_two(state), "BI": CHANNELS}
    blocks = -(-channels // CHANNELS)
    gated = z is not None
    ends = A.new_empty(len(plan.chunks), state, channels)
    given = ends if initial is None else initial  # never read where no start refers to it
    if len(plan.continued):
        totals = A.new_empty(len(plan.chunks), channels)
        kernels.run_chunks[(len(plan.continued) * blocks,)](
            u, dt, A, B, ends, totals, plan.chunks, plan.continued, u.stride(0), dt.stride(0), channels,
            **sizes, SOFTPLUS=gated, STEPS=4, **LAUNCH,
        )  # fmt: skip
        state_blocks = -(-state * channels // STATE_BLOCK)
        for level in plan.levels:
            kernels.hand_down[(len(level) * state_blocks,)](
                A, given, ends, totals, plan.chunks, plan.segments, level, channels,
                N=state, BLOCK=STATE_BLOCK, STEPS=4, **LAUNCH,
            )  # fmt: skip
    y = torch.empty(u.shape, dtype=u.dtype if gated else torch.float32, device=u.device)
    finals = A.new_empty(len(plan.segments), state, channels)
    checkpoints = A.new_empty(plan.num_checkpoints, state, channels) if keep else None
    kernels.finish_chunks[(len(plan.chunks) * blocks,)](
        u, dt, A, B, C, D if gated else u, z if gated else u, given, ends, y, finals, checkpoints if keep else y,
        plan.chunks, u.stride(0), dt.stride(0), z.stride(0) if z is not None else 0, channels,
        **sizes, GATED=gated, KEEP=keep, SPACING=SPACING, STEPS=2, **LAUNCH,
    )  # fmt: skip
    return y, finals, checkpoints


def _backward_states(
    dt: Tensor, A: Tensor, C: Tensor, z: Tensor | None, dout: Tensor, dfinals: Tensor | None, plan: TritonScan
) -> tuple[Tensor, Tensor]:
    """Gradients of the chunks' ends (C, N, I) and of the segments' starts (S, N, I)."""
    from hymba_align.model.kernels import triton_scan_kernels as kernels

    state, channels = A.shape
    blocks = -(-channels // CHANNELS)
    gated = z is not None
    dends = A.new_empty(len(plan.chunks), state, channels)
    dstarts = A.new_empty(len(plan.segments), state, channels)
    totals = A.new_empty(len(plan.chunks), channels)
    if len(plan.continuing):
        kernels.run_chunks_back[(len(plan.continuing) * blocks,)](
            dt, A, C, z if gated else dt, dout, dends, totals, plan.chunks, plan.continuing,
            dt.stride(0), z.stride(0) if z is not None else 0, dout.stride(0), channels,
            N=state, NP=_power_of_two(state), BI=CHANNELS, GATED=gated, STEPS=4, **LAUNCH,
        )  # fmt: skip
    state_blocks = -(-state * channels // STATE_BLOCK)
    for level in reversed(plan.levels_back):
        kernels.hand_up[(len(level) * state_blocks,)](
            A, dends if dfinals is None else dfinals, dends, dstarts, totals, plan.chunks, plan.segments,
            plan.first_child, plan.children, level, channels,
            N=state, BLOCK=STATE_BLOCK, HAS_DFINALS=dfinals is not None, STEPS=4, **LAUNCH,
        )  # fmt: skip
    return dends, dstarts


def _gradients(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dout: Tensor,
    checkpoints: Tensor,
    dends: Tensor,
    plan: TritonScan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """du, ddt, dA (N, I), dB, dC, dD, dz."""
    from hymba_align.model.kernels import triton_scan_kernels as kernels

    state, channels = A.shape
    blocks = -(-channels // CHANNELS)
    gated = z is not None
    du, ddt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, dt))
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if z is not None else None
    dA = A.new_empty(len(plan.chunks), state, channels)
    dB, dC = (A.new_empty(blocks, len(u), state) for _ in range(2))
    dD = A.new_empty(len(plan.chunks), channels) if gated else None
    kernels.gradients[(len(plan.chunks) * blocks,)](
        u, dt, A, B, C, D if gated else u, z if gated else u, dout, checkpoints, dends,
        du, ddt, dz if gated else du, dA, dB, dC, dD if gated else dA, plan.chunks, len(u),
        u.stride(0), dt.stride(0), z.stride(0) if z is not None else 0, dout.stride(0), channels,
        N=state, NP=_power_of_two(state), CI=2, LANES=CHANNELS // 2, GATED=gated, SPACING=SPACING, STEPS=GRADIENT_STEPS, **LAUNCH,
    )  # fmt: skip
    return du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), None if dD is None else dD.sum(0), dz


def _initial_gradient(dstarts: Tensor, shape: torch.Size, plan: TritonScan) -> Tensor:
    """Gradient (R, I, N) of the given states: the sum over the segments that start from each, in a fixed order."""
    total = dstarts.new_zeros(shape[0], *dstarts.shape[1:])
    for segment, state in plan.given:
        total[state] += dstarts[segment]
    return total.transpose(1, 2)
