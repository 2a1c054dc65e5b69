"""Root mean square norm on the CPU in C++ (`native/norm.cpp`), float32: one pass each way where torch makes a dozen.

Legend: L rows, D values per row.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels import native
from hymba_align.model.kernels.native import Rows, pointer, token_rows


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native norm cannot run there, as half a sentence with the fix; None if it can."""
    return native.unavailable("norm", device, dtype)


@torch.compiler.disable  # C++ reads addresses, of which a graph knows nothing
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` (L, D) in float32 with a root mean square of 1 per row, cast back, then scaled. Source: arXiv 1910.07467, equation 4."""
    native.check("norm", {"x": (x, (len(x), len(weight))), "weight": (weight, weight.shape)})
    y: Tensor
    if x.dtype == weight.dtype == torch.float32:
        y = _NativeNorm.apply(x, weight, eps)
        return y
    y = _NativeNorm.apply(x.float(), torch.ones(x.shape[1]), eps)
    return weight * y.to(x.dtype)


class Arguments(ctypes.Structure):
    """What `native/norm.cpp` calls by the same name, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "size", "threads")),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        *((name, Rows) for name in ("x", "dy")),
        *((name, ctypes.c_void_p) for name in ("y", "inverse", "dx", "sums", "dweight")),
    )


def _arguments(x: Tensor, weight: Tensor, eps: float, **others: Tensor) -> Arguments:
    return Arguments(
        rows=x.shape[0],
        size=x.shape[1],
        threads=torch.get_num_threads(),
        eps=eps,
        weight=pointer(weight),
        x=Rows(pointer(x), x.stride(0)),
        **{name: pointer(x) for name, x in others.items()},
    )


class _NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = token_rows(x), weight.contiguous()
        y, inverse = torch.empty(x.shape), torch.empty(len(x))
        arguments = _arguments(x, weight, eps, y=y, inverse=inverse)
        native.call("norm", "norm_forward", arguments)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dy, dx, dweight = token_rows(dy), torch.empty(x.shape), torch.empty_like(weight)
        sums = torch.zeros(-(-len(x) // native.load("norm").norm_rows()), x.shape[1])
        arguments = _arguments(x, weight, ctx.eps, inverse=inverse, dx=dx, sums=sums, dweight=dweight)
        arguments.dy = Rows(pointer(dy), dy.stride(0))
        native.call("norm", "norm_backward", arguments)
        return dx, dweight, None
