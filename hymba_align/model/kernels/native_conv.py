"""The causal convolution on the CPU in C++ (`native/conv.cpp`), float32, SiLU fused.

Legend: T tokens, I inner channels, S segments, R given tails, W taps (the kernel width).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels import native
from hymba_align.model.kernels.interface import ConvRow
from hymba_align.model.kernels.native import Rows, pointer, token_rows


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native convolution cannot run there, as half a sentence with the fix; None if it can."""
    return native.unavailable("conv", device, dtype)


@dataclass(frozen=True)
class NativeConv(ConvRow):
    """The segments of one packed row."""

    segments_3S: Tensor
    """int64 lengths, parents and given tails of the segments."""
    tokens: int
    """T"""
    taps: int
    """W"""
    needed_tails: int
    """Given tails that the segments refer to: R is at least this many."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device) -> Self:
        return cls(
            segments_3S=torch.tensor([lengths, parents, initial]),
            tokens=sum(lengths),
            taps=taps,
            needed_tails=native.needed(parents, initial),
        )

    @torch.compiler.disable  # C++ reads addresses, of which a graph knows nothing
    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        channels = len(bias)
        inputs = {
            "u": (u, (self.tokens, channels)),
            "weight": (weight, (channels, self.taps)),
            "bias": (bias, (channels,)),
            "initial_tails": native.given("initial_tails", initial_tails, self.needed_tails, (self.taps - 1, channels)),
        }
        native.check("conv", inputs)
        y, tails = _NativeConv.apply(self, silu, *(None if x is None else x.float() for x, _ in inputs.values()))
        return y.to(u.dtype), tails.to(u.dtype)


class Arguments(ctypes.Structure):
    """What `native/conv.cpp` calls by the same name, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "taps", "segments", "threads", "silu")),
        *((name, ctypes.c_void_p) for name in ("lengths", "parents", "initial")),
        *((name, Rows) for name in ("u", "dy")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "given", "y", "tails")),
        *((name, ctypes.c_void_p) for name in ("du", "dweight", "dbias", "dgiven", "dtails", "zeros")),
    )


def _arguments(
    row: NativeConv, silu: bool, weight_WI: Tensor, rows: dict[str, Tensor], **others: Tensor | None
) -> Arguments:
    lengths, parents, initial = row.segments_3S
    return Arguments(
        tokens=row.tokens,
        channels=weight_WI.shape[1],
        taps=weight_WI.shape[0],
        segments=row.segments_3S.shape[1],
        threads=torch.get_num_threads(),
        silu=silu,
        lengths=pointer(lengths),
        parents=pointer(parents),
        initial=pointer(initial),
        weight=pointer(weight_WI),
        **{name: Rows(pointer(x), x.stride(0)) for name, x in rows.items()},
        **{name: pointer(x) for name, x in others.items()},
    )


class _NativeConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row: NativeConv, silu: bool, u: Tensor, weight: Tensor, bias: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u, weight_WI, bias = token_rows(u), weight.t().contiguous(), bias.contiguous()
        given = None if given is None else given.contiguous()
        zeros = torch.zeros(u.shape[1])
        y, tails = torch.empty(u.shape), torch.empty(row.segments_3S.shape[1], len(weight_WI) - 1, u.shape[1])
        arguments = _arguments(row, silu, weight_WI, {"u": u}, bias=bias, given=given, zeros=zeros, y=y, tails=tails)
        native.call("conv", "conv_forward", arguments)
        ctx.save_for_backward(u, weight_WI, bias, given)
        ctx.row, ctx.silu = row, silu
        return y, tails

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtails: Tensor) -> tuple[Tensor | None, ...]:
        u, weight_WI, bias, given = ctx.saved_tensors
        zeros = torch.zeros(u.shape[1])
        du, dweight_WI, dbias = torch.zeros(u.shape), torch.zeros_like(weight_WI), torch.zeros_like(bias)
        dgiven = None if given is None else torch.zeros_like(given)
        rows, dtails = {"u": u, "dy": token_rows(dy)}, dtails.contiguous()
        found = {"du": du, "dweight": dweight_WI, "dbias": dbias, "dgiven": dgiven}
        arguments = _arguments(
            ctx.row, ctx.silu, weight_WI, rows, bias=bias, given=given, zeros=zeros, dtails=dtails, **found
        )
        native.call("conv", "conv_backward", arguments)
        return None, None, du, dweight_WI.t(), dbias, dgiven
