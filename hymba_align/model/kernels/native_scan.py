"""The selective scan on the CPU in C++ (`native/scan.cpp`), float32: states stay in registers, softplus and gate are fused.

Legend: T tokens, I inner channels, N state size, S segments, R given initial states, K tokens per chunk.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_align.model.kernels import native
from hymba_align.model.kernels.interface import ScanRow
from hymba_align.model.kernels.native import Rows, pointer, token_rows

CHUNK_TOKENS = 32
"""K: the backward pass starts from states saved this often. Fewer fit the processor's cache better and save more states."""

MULTIPLE = 16
"""Saved states are rounded up to this many channels, a multiple of any processor's vectors."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native scan cannot run there, as half a sentence with the fix; None if it can."""
    return native.unavailable("scan", device, dtype)


@dataclass(frozen=True)
class NativeScan(ScanRow):
    """The segments of one packed row."""

    segments_3S: Tensor
    """int64 lengths, parents and given initial states of the segments."""
    tokens: int
    """T"""
    chunks: int
    """Chunks of at most K tokens of all segments."""
    needed_states: int
    """Given states that the segments refer to: R is at least this many."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> Self:
        return cls(
            segments_3S=torch.tensor([lengths, parents, initial]),
            tokens=sum(lengths),
            chunks=sum(-(-length // CHUNK_TOKENS) for length in lengths),
            needed_states=native.needed(parents, initial),
        )

    def run(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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
        y, final = self._apply(u, dt_raw, A, B, C, D, z, initial_states)
        return y.to(u.dtype), final

    @torch.compiler.disable  # C++ reads addresses, of which a graph knows nothing
    def _apply(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial_states: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        channels, state = A.shape
        per_channel, per_state = (self.tokens, channels), (self.tokens, state)
        inputs = {
            "u": (u, per_channel),
            "dt": (dt, per_channel),
            "A": (A, (channels, state)),
            "B": (B, per_state),
            "C": (C, per_state),
            "D": (D, (channels,)),
            "z": (z, per_channel),
            "initial_states": native.given("initial_states", initial_states, self.needed_states, (channels, state)),
        }
        native.check("scan", inputs)
        y, final = _NativeScan.apply(self, *(None if x is None else x.float() for x, _ in inputs.values()))
        return y, final


class Arguments(ctypes.Structure):
    """What `native/scan.cpp` calls by the same name, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "state", "segments", "chunk_tokens", "chunks")),
        *((name, ctypes.c_int64) for name in ("threads", "gated")),
        *((name, ctypes.c_void_p) for name in ("lengths", "parents", "initial")),
        *((name, Rows) for name in ("u", "dt", "z", "dy")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "C", "D", "given", "y", "final", "starts")),
        *((name, ctypes.c_void_p) for name in ("du", "ddt", "dz", "dA", "dB", "dC", "dD", "dfinal", "dgiven", "sums")),
    )


def _arguments(
    row: NativeScan, u: Tensor, A: Tensor, rows: dict[str, Tensor | None], **others: Tensor | None
) -> Arguments:
    lengths, parents, initial = row.segments_3S
    return Arguments(
        tokens=row.tokens,
        channels=A.shape[0],
        state=A.shape[1],
        segments=row.segments_3S.shape[1],
        chunk_tokens=CHUNK_TOKENS,
        chunks=row.chunks,
        threads=torch.get_num_threads(),
        gated=rows.get("z") is not None,
        lengths=pointer(lengths),
        parents=pointer(parents),
        initial=pointer(initial),
        A=pointer(A),
        **{name: Rows(pointer(x), x.stride(0)) for name, x in rows.items() if x is not None},
        **{name: pointer(x) for name, x in others.items()},
    )


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row: NativeScan,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, dt, A, B, C = token_rows(u), token_rows(dt), A.contiguous(), B.contiguous(), C.contiguous()
        z = None if z is None else token_rows(z)
        D, given = (None if x is None else x.contiguous() for x in (D, given))
        channels, state = A.shape
        y, final = u.new_empty(row.tokens, channels), u.new_empty(row.segments_3S.shape[1], channels, state)
        starts = None
        if any(ctx.needs_input_grad):
            starts = u.new_empty(row.chunks, -(-channels // MULTIPLE) * MULTIPLE, state)
        rows = {"u": u, "dt": dt, "z": z}
        arguments = _arguments(row, u, A, rows, B=B, C=C, D=D, given=given, y=y, final=final, starts=starts)
        native.call("scan", "scan_forward", arguments)
        ctx.save_for_backward(u, dt, A, B, C, D, z, given, starts)
        ctx.row = row
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, given, starts = ctx.saved_tensors
        row: NativeScan = ctx.row
        groups = -(-A.shape[0] // native.load("scan").scan_group())
        found = {
            "du": torch.empty(u.shape),
            "ddt": torch.empty(dt.shape),
            "dA": torch.empty_like(A),
            "dB": torch.empty_like(B),
            "dC": torch.empty_like(C),
            "dD": None if D is None else torch.empty_like(D),
            "dz": None if z is None else torch.empty(z.shape),
            "dgiven": None if given is None else torch.zeros_like(given),
        }
        scratch = {
            "dfinal": dfinal.clone(memory_format=torch.contiguous_format),
            "sums": torch.empty(groups, row.tokens, 2 * A.shape[1]),
        }
        rows = {"u": u, "dt": dt, "z": z, "dy": token_rows(dy)}
        arguments = _arguments(row, u, A, rows, B=B, C=C, D=D, starts=starts, **found, **scratch)
        native.call("scan", "scan_backward", arguments)
        return None, *found.values()
