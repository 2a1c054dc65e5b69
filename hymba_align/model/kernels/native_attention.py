"""Attention over a tree of segments on the CPU in C++ (`native/attention.cpp`), float32; memory is linear in the row.

Legend: L tokens of the packed row (meta tokens included), H query heads, G key/value heads, d query/key head size,
e value head size, S segments.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.attention import SkipsQueries
from hymba_align.model.kernels import native
from hymba_align.model.kernels.native import Rows, pointer, token_rows
from hymba_align.model.key_values import KeyValues


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native attention cannot run there, as half a sentence with the fix; None if it can."""
    return native.unavailable("attention", device, dtype)


@dataclass(frozen=True)
class NativeAttention(SkipsQueries):
    """The segments of one packed row, meta tokens first."""

    segments_2S: Tensor
    """int64 lengths and parents of the segments."""
    tokens: int
    """L"""
    window: int
    known: int = 0
    """Segments at the start of the row that bring keys but no queries."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> Self:
        return cls(torch.tensor([lengths, parents]), sum(lengths), window)

    def without_queries(self, tokens: int) -> Self:
        ends = self.segments_2S[0].cumsum(0)
        return replace(self, known=int((ends <= tokens).sum()))

    @torch.compiler.disable  # C++ reads addresses, of which a graph knows nothing
    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e), in the dtype of the values."""
        assert stored is None, "a tree holds all its tokens itself"
        before = int(self.segments_2S[0, : self.known].sum())  # rows that the kernel leaves as they are
        (_, heads, size), groups = q_LHd.shape, v_LGe.shape[1]
        shapes = {
            "q": (q_LHd, (self.tokens - before, heads // groups * groups, size)),
            "k": (k_LGd, (self.tokens, groups, size)),
            "v": (v_LGe, (self.tokens, *v_LGe.shape[1:])),
        }
        native.check("attention", shapes)
        window = -1 if is_global else self.window
        q_LHd = F.pad(q_LHd, (0, 0, 0, 0, before, 0)) if before else q_LHd
        out = _NativeAttention.apply(self, window, q_LHd.float(), k_LGd.float(), v_LGe.float())
        return out[before:].to(v_LGe.dtype)


class Arguments(ctypes.Structure):
    """What `native/attention.cpp` calls by the same name, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "groups", "key_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("segments", "known", "window", "threads")),
        *((name, ctypes.c_void_p) for name in ("lengths", "parents")),
        *((name, Rows) for name in ("q", "k", "v", "dout")),
        *((name, ctypes.c_void_p) for name in ("out", "stats", "dq", "dk", "dv")),
    )


def _arguments(
    row: NativeAttention, window: int, shape: tuple[int, ...], rows: dict[str, Tensor], **others: Tensor
) -> Arguments:
    lengths, parents = row.segments_2S
    tokens, heads, groups, key_size, value_size = shape
    return Arguments(
        tokens=tokens,
        heads=heads,
        groups=groups,
        key_size=key_size,
        value_size=value_size,
        segments=row.segments_2S.shape[1],
        known=row.known,
        window=window,
        threads=torch.get_num_threads(),
        lengths=pointer(lengths),
        parents=pointer(parents),
        **{name: Rows(pointer(x), x.stride(0)) for name, x in rows.items()},
        **{name: pointer(x) for name, x in others.items()},
    )


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: NativeAttention, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (*q.shape[:2], *k.shape[1:], v.shape[2])
        q, k, v = (token_rows(x.flatten(1)) for x in (q, k, v))
        out, stats = torch.empty(shape[0], shape[1] * shape[4]), torch.empty(shape[0], shape[1], 2)
        arguments = _arguments(row, window, shape, {"q": q, "k": k, "v": v}, out=out, stats=stats)
        native.call("attention", "attention_forward", arguments)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.row, ctx.window, ctx.shape = row, window, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        tokens, heads, groups, key_size, value_size = ctx.shape
        dq, dk = torch.empty(tokens, heads, key_size), torch.empty(tokens, groups, key_size)
        dv = torch.empty(tokens, groups, value_size)
        rows = {"q": q, "k": k, "v": v, "dout": token_rows(dout)}
        arguments = _arguments(ctx.row, ctx.window, ctx.shape, rows, out=out, stats=stats, dq=dq, dk=dk, dv=dv)
        native.call("attention", "attention_backward", arguments)
        return None, None, dq, dk, dv
