"""Attention over a tree of segments by FlexAttention: one kernel call per layer, cost by visible blocks of the row.

Two numbers per key say who sees it. The tokens of a row form a tree, in which each continues the one before it on its
path; numbered in depth-first order, a token's descendants are the interval from itself to `end`. A query sees a key if
its own number lies there: that is ancestry and causality in one test. In local layers the query's position must also
be at most the key's `last`, its position plus the window; meta tokens have no last.

The kernel is compiled once for all rows: the tree enters as tensors, and all sizes but those of heads are symbolic.

Run so far: the forward pass on the CPU, in float32 and under autocast. The kernels that torch generates for CUDA, and
with them the backward pass, have not been run for this project yet; torch has no backward pass on the CPU.

Legend: L tokens of the packed row (meta tokens included), H query heads, G key/value heads, d query/key head size,
e value head size, S segments, P pieces (of a segment, within one block), N blocks.
Source: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hymba_align.model.key_values import KeyValues
from hymba_align.model.segments import ROOT

BLOCK = 128
"""Queries and keys per block of the mask; what torch's kernels for CUDA are tuned for."""

SMALLEST_HEAD = 16
"""The smallest head size that the kernels for CUDA multiply; smaller heads are padded with zeros."""

PIECE_PAIRS = 2**22
"""Pairs of pieces compared at once, so that a row of very many segments needs no square of its length."""

RECOMPILE_LIMIT = 64
"""Graphs that one process may need: shapes of heads, dtypes and gradient modes, of all the models it runs."""

FOREVER = 2**31 - 1
"""The last position that sees a key without a window."""

Tensors: TypeAlias = tuple[Tensor, ...]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlexAttention cannot train there, with what to do about it; None if it can."""
    if device.type != "cuda":
        return f"FlexAttention has no backward pass on {device.type}: choose attention=sdpa"
    if dtype == torch.float64:
        return "FlexAttention does not compute in float64: choose attention=sdpa"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed: pip install triton"
    return None


@dataclass(frozen=True)
class Visibility:
    """Which keys the queries of a row see in one kind of layer: by token, and in blocks."""

    tokens: Tensors
    """(L,) each: depth-first number, end of the descendants' numbers, position, last position that sees the token."""
    blocks: Tensors
    """Counts (1, 1, N) and indices (1, 1, N, N): of the key blocks that each query block sees in part, of those that
    it sees whole, and the same two by key block. A block that is seen whole is not masked by token."""

    def block_mask(self) -> BlockMask:
        """The mask as `flex_attention` takes it."""
        return _block_mask(self.tokens, self.blocks)


@dataclass(frozen=True)
class FlexTreeAttention:
    """Attention of one packed row. Made once per forward pass, used by every layer."""

    full: Visibility
    """For global layers."""
    windowed: Visibility
    """For local layers."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> FlexTreeAttention:
        """Plans the attention of a row whose first segment is the meta tokens.

        Args:
            lengths: tokens per segment, meta tokens first.
            parents: the segment that each one continues; -1 for the meta tokens alone.
            window: largest distance to a key that is not a meta token, in local layers.
            device: of the computation.
        """
        segments = torch.tensor(_walk(lengths, parents))  # S x (depth-first number, end, position)
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes

        def visibility(reach: int | None) -> Visibility:
            firsts = torch.cat([starts, torch.arange(0, int(sizes.sum()), BLOCK)]).unique()
            pieces = _spans(segments, starts, firsts, reach)
            counts = torch.cat([firsts[1:], sizes.sum()[None]]) - firsts
            blocks = _ordered_blocks(*_seen_blocks(pieces, counts, firsts))
            tokens = _spans(segments, starts, torch.arange(int(sizes.sum())), reach)
            return Visibility(
                tuple(_of_any_length(column.to(device, torch.int32)) for column in tokens),
                tuple(_of_any_length(block.to(device)) for block in blocks),
            )

        full = visibility(None)
        longest = max(position + length for (_, _, position), length in zip(segments.tolist(), lengths, strict=True))
        return cls(full, full if longest - lengths[0] <= window + 1 else visibility(window))

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is None, "a tree holds all its tokens itself"
        dtype = compute_dtype(q_LHd)
        value_size = v_LGe.shape[-1]
        if (head_size := q_LHd.shape[-1]) < SMALLEST_HEAD:  # the kernel divides by the root of the padded size
            q_LHd = q_LHd * math.sqrt(SMALLEST_HEAD / head_size)
        q, k, v = (_heads_first(x.to(dtype)) for x in (q_LHd, k_LGd, v_LGe))
        seen = self.full if is_global else self.windowed
        for x in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        out = _compiled()(q, k, v, seen.tokens, seen.blocks)
        return out[0].transpose(0, 1)[..., :value_size].flatten(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast computes products in on the device of `x`, for kernels that it does not know; else x's dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _of_any_length(x: Tensor) -> Tensor:
    """`x`, for whose sizes above 1 torch compiles nothing anew. Unmarked, a size that equals that of heads is fixed."""
    for dim, size in enumerate(x.shape):
        if size > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def _heads_first(x_LHd: Tensor) -> Tensor:
    """(1, H, L, d), heads padded to the smallest size."""
    if (missing := SMALLEST_HEAD - x_LHd.shape[-1]) > 0:
        x_LHd = F.pad(x_LHd, (0, missing))
    return x_LHd.transpose(0, 1)[None]


@lru_cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Tensors, Tensors], Tensor]:
    # fullgraph: uncompiled, FlexAttention holds all L x L scores; running out of graphs must be an error instead.
    compiled: Callable[[Tensor, Tensor, Tensor, Tensors, Tensors], Tensor] = torch.compile(  # type: ignore[call-overload]
        _attend, dynamic=True, fullgraph=True, recompile_limit=RECOMPILE_LIMIT
    )  # torch 2.13's annotated overloads leave recompile_limit out
    return compiled


def _attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tensors, blocks: Tensors) -> Tensor:
    out = flex_attention(
        q,
        k,
        v,
        block_mask=_block_mask(tokens, blocks),
        enable_gqa=True,
        kernel_options={"BACKEND": "TRITON"},  # never the one for decoding, which short rows would pick
    )
    assert isinstance(out, Tensor)
    return out


def _block_mask(tokens: Tensors, blocks: Tensors) -> BlockMask:
    number, end, position, last = tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = number[query]
        return (number[key] <= own) & (own < end[key]) & (position[query] <= last[key])

    (
        some_keys,
        some_keys_at,
        whole_keys,
        whole_keys_at,
        some_queries,
        some_queries_at,
        whole_queries,
        whole_queries_at,
    ) = blocks
    return BlockMask(
        seq_lengths=(number.shape[0], number.shape[0]),
        kv_num_blocks=some_keys,
        kv_indices=some_keys_at,
        full_kv_num_blocks=whole_keys,
        full_kv_indices=whole_keys_at,
        q_num_blocks=some_queries,
        q_indices=some_queries_at,
        full_q_num_blocks=whole_queries,
        full_q_indices=whole_queries_at,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


def _walk(lengths: list[int], parents: list[int]) -> list[tuple[int, int, int]]:
    """Per segment: its first token's number, the end of its descendants' numbers, its first token's position."""
    below = list(lengths)  # tokens of the segment and of all that continue it
    for segment in reversed(range(len(lengths))):
        if parents[segment] != ROOT:
            below[parents[segment]] += below[segment]
    free = {ROOT: 0}  # the next number to give away below each segment
    walked: list[tuple[int, int, int]] = []
    for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        number = free[parent]
        free[parent] += below[segment]
        free[segment] = number + length
        position = 0 if parent == ROOT else walked[parent][2] + lengths[parent]
        walked.append((number, number + below[segment], position))
    return walked


def _spans(segments: Tensor, starts: Tensor, firsts: Tensor, window: int | None) -> Tensors:
    """For the tokens `firsts` of the row: number, end, position and last position that sees them, int64."""
    segment = torch.searchsorted(starts, firsts, right=True) - 1
    index = firsts - starts[segment]
    number, end, position = segments[segment].unbind(1)
    position = position + index
    last = torch.full_like(position, FOREVER) if window is None else position + window
    return number + index, end, position, last.masked_fill(segment == 0, FOREVER)


def _seen_blocks(pieces: Tensors, counts: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) which key blocks each query block sees at all, and which ones it sees whole.

    Args:
        pieces: (P,) the four numbers of each piece's first token.
        counts: (P,) tokens of each piece.
        firsts: (P,) first token of each piece.
    """
    number, end, position, last = pieces
    beyond = counts - 1
    block = firsts // BLOCK
    blocks = max(2, int(block[-1]) + 1)  # never 1: torch compiles tensors of size 1 apart
    some = torch.zeros(blocks, blocks, dtype=torch.int32)
    hidden = torch.zeros(blocks, blocks, dtype=torch.int32)
    for rows in torch.arange(len(firsts)).split(max(1, PIECE_PAIRS // len(firsts))):
        q_number, q_position, q_beyond = (x[rows, None] for x in (number, position, beyond))
        below = q_number < end
        # The last query and the first key decide whether any pair is causal, the first query and the last key
        # whether any is near enough; for all pairs it is the other way round.
        sees = below & (number <= q_number + q_beyond) & (q_position <= last + beyond)
        sees_all = below & (number + beyond <= q_number) & (q_position + q_beyond <= last)
        some.index_add_(0, block[rows], _by_block(sees, block, blocks))
        hidden.index_add_(0, block[rows], _by_block(~sees_all, block, blocks))
    complete = torch.zeros(blocks, dtype=torch.int64).index_add_(0, block, counts) == BLOCK
    whole = (hidden == 0) & complete[:, None] & complete
    return some > 0, whole


def _by_block(pairs_QP: Tensor, block: Tensor, blocks: int) -> Tensor:
    """(Q, N) how many of each block's pieces are set."""
    return torch.zeros(len(pairs_QP), blocks, dtype=torch.int32).index_add_(1, block, pairs_QP.int())


def _ordered_blocks(some: Tensor, whole: Tensor) -> Tensors:
    """The lists of `Visibility.blocks`."""
    lists: list[Tensor] = []
    for blocks in (some & ~whole, whole, (some & ~whole).T, whole.T):
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        lists += [blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]]
    return tuple(lists)
