"""The causal depthwise convolution in Triton, for CUDA, with SiLU inside; forward and backward.

    y_t = silu(bias + sum_k weight_k u_{t-k})

Segments are cut into runs of tokens; a program slides along a run and reads every row once. Taps of a segment's first
tokens reach through its ancestors, however short, to the given tails: `build` writes down where. Backwards, a second
small kernel adds what later segments send back to the last W - 1 tokens of the segments they continue.
No sum uses atomics, so that a run repeats bit by bit.

Legend: T tokens, I inner channels, S segments, R given tails, W taps (the kernel width).
Source: Mamba (arXiv 2312.00752), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels.interface import ConvRow
from hymba_align.model.kernels.triton_support import rows, to_device, unavailable

__all__ = ["TritonConv", "unavailable"]

CHANNELS = 128
"""Channels per program, four per lane of a warp."""
RUN = 64
"""Tokens per program. Longer runs leave fewer partial sums, shorter ones fill the device with less."""
STEPS = 4
"""Tokens whose loads are under way together."""
LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
ZEROS = -1


@dataclass(frozen=True)
class Joints:
    """Rows that later segments use, and where they are used; see `join_segments`."""

    targets: Tensor
    bases: Tensor
    first_use: Tensor
    uses: Tensor


@dataclass(frozen=True)
class TritonConv(ConvRow):
    """The runs of one packed row, on the device. Tables are int32; see `triton_conv_kernels.py` for codes and rows."""

    taps: int
    runs: Tensor
    """(runs, 5)"""
    history: Tensor
    """(runs, W - 1) codes of the rows before each run."""
    tails: Tensor
    """(S, W - 1) codes of each segment's tail."""
    ends: Joints
    """The last tokens of every segment."""
    given: Joints
    """The rows of the given tails."""
    refers: bool
    """Whether any segment continues a given tail."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device) -> Self:
        """Cuts segments into runs; see `ConvRow.build`."""
        reach = taps - 1
        runs: list[int] = []
        history: list[int] = []
        tails: list[list[int]] = []
        uses: dict[int, list[int]] = {}  # by code of a row
        bases: dict[int, int] = {}
        start = 0
        for segment, (length, parent, state) in enumerate(zip(lengths, parents, initial, strict=True)):
            if parent >= 0:
                before = tails[parent]
            else:
                before = [-2 - state * reach - entry for entry in range(reach)] if state >= 0 else [ZEROS] * reach
            for token in range(min(length, reach)):
                for tap in range(reach - token):  # what this token takes from before its segment
                    uses.setdefault(before[token + tap], []).append(taps * (segment * reach + token) + tap)
            for first in range(0, length, RUN):
                runs += [start + first, min(RUN, length - first), first, length - first, segment]
                history += (before + list(range(start + max(first - reach, 0), start + first)))[-reach:]
            tails.append((before + list(range(start + max(length - reach, 0), start + length)))[-reach:])
            for entry, code in enumerate(tails[-1]):
                uses.setdefault(code, []).append(-1 - segment * reach - entry)
            for left in range(min(length, reach)):
                bases[start + length - 1 - left] = segment * reach + left
            start += length
        tables = to_device(
            [
                runs,
                history,
                [code for tail in tails for code in tail],
                *_joints(list(bases), list(bases), list(bases.values()), uses),
                *_joints([code for code in uses if code < ZEROS], None, None, uses),
            ],
            device,
        )
        return cls(
            taps=taps,
            runs=tables[0].view(-1, 5),
            history=tables[1],
            tails=tables[2].view(-1, reach),
            ends=Joints(*tables[3:7]),
            given=Joints(*tables[7:11]),
            refers=any(parent < 0 <= state for parent, state in zip(parents, initial, strict=True)),
        )

    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolved row (T, I) and tails (S, W - 1, I) in u's dtype; see `ConvRow.run`. Sums are float32."""
        if u.dtype == torch.float64:
            raise ValueError("the Triton convolution computes in float32; use the backend conv=torch for float64")
        if initial_tails is None and self.refers:
            raise ValueError("causal_conv: the plan refers to initial tails, but none were given")
        y, tails = _Conv.apply(u, weight, bias, initial_tails, self, silu)
        return y, tails


def _joints(
    codes: list[int], targets: list[int] | None, bases: list[int] | None, uses: dict[int, list[int]]
) -> list[list[int]]:
    """Tables of `Joints`. Without targets the codes are of given tails' rows."""
    firsts = [0]
    for code in codes:
        firsts.append(firsts[-1] + len(uses.get(code, [])))
    flat = [use for code in codes for use in uses.get(code, [])]
    return [targets if targets is not None else [-2 - code for code in codes], bases or [-1] * len(codes), firsts, flat]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, plan: TritonConv, silu: bool
    ) -> tuple[Tensor, Tensor]:
        from hymba_align.model.kernels import triton_conv_kernels as kernels

        ctx.set_materialize_grads(False)
        ctx.plan, ctx.silu = plan, silu
        ctx.dtypes = (weight.dtype, bias.dtype)
        u = rows(u)
        weight, bias = weight.float().T.contiguous(), bias.float().contiguous()
        given = u if initial is None else initial.contiguous()  # never read where no code refers to it
        channels = u.shape[1]
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        tails = u.new_empty(len(plan.tails), plan.taps - 1, channels)
        blocks = -(-channels // CHANNELS)
        with torch.cuda.device_of(u):
            kernels.convolve[(len(plan.runs) * blocks,)](
                u, weight, bias, given, y, plan.runs, plan.history, u.stride(0), channels,
                W=plan.taps, BI=CHANNELS, SILU=silu, STEPS=STEPS, **LAUNCH,
            )  # fmt: skip
            kernels.copy_tails[(plan.tails.numel() * blocks,)](
                u, given, tails, plan.tails, u.stride(0), channels, BI=CHANNELS, **LAUNCH
            )
        ctx.save_for_backward(u, weight, bias, initial)
        return y, tails

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtails: Tensor | None) -> tuple[Tensor | None, ...]:
        from hymba_align.model.kernels import triton_conv_kernels as kernels

        u, weight, bias, initial = ctx.saved_tensors
        plan: TritonConv = ctx.plan
        dy = torch.zeros_like(u) if dy is None else rows(dy)
        channels = u.shape[1]
        blocks = -(-channels // CHANNELS)
        given = u if initial is None else initial.contiguous()
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        heads, ends = (weight.new_empty(plan.tails.numel(), channels) for _ in range(2))
        sums = weight.new_empty(len(plan.runs), plan.taps + 1, channels)
        dinitial = None if initial is None else torch.zeros_like(initial, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(u):
            kernels.convolve_back[(len(plan.runs) * blocks,)](
                u, weight, bias, given, dy, du, heads, ends, sums, plan.runs, plan.history,
                u.stride(0), dy.stride(0), channels, W=plan.taps, BI=CHANNELS, SILU=ctx.silu, STEPS=STEPS, **LAUNCH,
            )  # fmt: skip
            for joints, out in ((plan.ends, du), (plan.given, dinitial)):
                if out is not None and len(joints.targets):
                    kernels.join_segments[(len(joints.targets) * blocks,)](
                        weight, heads, ends, heads if dtails is None else dtails.contiguous(), out,
                        joints.targets, joints.bases, joints.first_use, joints.uses, channels,
                        W=plan.taps, BI=CHANNELS, HAS_DTAILS=dtails is not None, **LAUNCH,
                    )  # fmt: skip
        total = sums.sum(0)
        weight_dtype, bias_dtype = ctx.dtypes
        return du, total[:-1].T.to(weight_dtype), total[-1].to(bias_dtype), dinitial, None, None
