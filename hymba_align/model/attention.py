"""Grouped-query attention over a tree of segments; `cached_attention.py` has that over cached keys.

A token sees all meta tokens, its ancestors' tokens and the earlier tokens of its own segment; in local layers the
keys that are not meta tokens must also lie within the window. DESIGN.md, section 2.

Legend: L tokens of the packed row (meta tokens included), H query heads, G key/value heads, d query/key head size,
e value head size, Q queries, K keys.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model.key_values import KeyValues
from hymba_align.model.segments import ROOT

QUERY_BLOCK = 512
"""Queries per call of the attention kernel: bounds the score matrix, and lets local layers skip keys past the window."""


class AttentionRow(Protocol):
    """The attention of one forward pass, whatever computes it."""

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e).

        Args:
            q_LHd: queries after RoPE.
            k_LGd: keys after RoPE.
            v_LGe: values.
            is_global: whether the layer has no window.
            stored: cached keys and values of the layer, where the row continues a cache.
        """
        ...


class TreeAttentionRow(AttentionRow, Protocol):
    """The attention of a row that starts with the meta tokens. Made once per forward pass, used by every layer."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> Self:
        """The plan of a row whose first segment is the meta tokens.

        Args:
            lengths: tokens per segment, meta tokens first.
            parents: the segment that each one continues; -1 for the meta tokens alone.
            window: largest distance to a key that is not a meta token, in local layers.
            device: of the computation.
        """
        ...


@runtime_checkable
class SkipsQueries(TreeAttentionRow, Protocol):
    """A backend that can leave out the queries of tokens whose output is known, as those of a cached prefix."""

    def without_queries(self, tokens: int) -> Self:
        """The same row, given only the queries after its first segments, which hold so many tokens."""
        ...


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one segment with the pieces of the row whose keys they may see."""

    pieces: tuple[int, ...]
    """Pieces of the row that hold the keys, in path order."""
    mask: Tensor
    """(Q, K) True where a query may see a key."""


@dataclass(frozen=True)
class TreeAttention(SkipsQueries):
    """Attention of one packed row, cut into pieces of at most `QUERY_BLOCK` tokens: SDPA on every piece."""

    sizes: tuple[int, ...]
    """Tokens of each piece; pieces cover the row in order and none spans two segments."""
    full: tuple[Block, ...]
    """One block per piece, for global layers."""
    windowed: tuple[Block, ...]
    """One block per piece, for local layers."""
    keys_only: int = 0
    """Pieces at the start of the row that bring keys but no queries, and have no block."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> TreeAttention:
        sizes: list[int] = []
        starts: list[int] = []  # position of each piece's first token on its path
        paths: list[list[int]] = []  # pieces up to the end of each segment
        full: list[Block] = []
        windowed: list[Block] = []
        meta = lengths[0]
        causal = _Causal.build(lengths, parents, device)
        masks: dict[tuple[tuple[int, int], ...], Tensor] = {}
        for length, parent in zip(lengths, parents, strict=True):
            path = [] if parent == ROOT else list(paths[parent])
            position = starts[path[-1]] + sizes[path[-1]] if path else 0
            for first in range(0, length, QUERY_BLOCK):
                sizes.append(min(QUERY_BLOCK, length - first))
                starts.append(position + first)
                path.append(len(sizes) - 1)
                full.append(Block(tuple(path), causal.mask(starts[-1], sizes[-1])))
                if starts[-1] + sizes[-1] - meta <= window + 1:  # everything is within the window
                    windowed.append(full[-1])
                    continue
                near = [
                    piece
                    for piece in path
                    if starts[piece] < meta or starts[piece] + sizes[piece] > starts[-1] - window
                ]
                # Only distances matter: what lies far into a document has the masks of what lies near its start.
                shift = max(0, starts[-1] - meta - window - QUERY_BLOCK)
                spans = tuple(
                    (starts[piece] if starts[piece] < meta else starts[piece] - shift, sizes[piece]) for piece in near
                )
                if spans not in masks:
                    masks[spans] = _within(spans, meta, window, device)
                windowed.append(Block(tuple(near), masks[spans]))
            paths.append(path)
        return cls(tuple(sizes), tuple(full), tuple(windowed))

    def without_queries(self, tokens: int) -> Self:
        pieces = bisect_left(list(accumulate(self.sizes)), tokens) + 1
        return replace(self, full=self.full[pieces:], windowed=self.windowed[pieces:], keys_only=pieces)

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is None, "a tree holds all its tokens itself"
        # One split per tensor: the gradient of a split is one concatenation, that of many slices is one full row each.
        q_pieces = q_LHd.split(self.sizes[self.keys_only :])
        k_pieces, v_pieces = (x.split(self.sizes) for x in (k_LGd, v_LGe))
        outputs = []
        for q, block in zip(q_pieces, self.full if is_global else self.windowed, strict=True):
            k = torch.cat([k_pieces[piece] for piece in block.pieces])
            v = torch.cat([v_pieces[piece] for piece in block.pieces])
            outputs.append(_attend_block(q, k, v, block.mask))
        return torch.cat(outputs)


@dataclass(frozen=True)
class _Causal:
    """The masks of global layers: each is a part of one, so that a long document needs no square of its length."""

    whole: Tensor
    """(most queries, longest path + most queries) where query i sees the keys up to `longest` + i."""
    longest: int
    """Tokens of the longest path."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], device: torch.device) -> _Causal:
        ends: list[int] = []
        for length, parent in zip(lengths, parents, strict=True):
            ends.append(length + (0 if parent == ROOT else ends[parent]))
        queries, longest = min(QUERY_BLOCK, max(lengths)), max(ends)
        return cls(torch.ones(queries, longest + queries, dtype=torch.bool, device=device).tril(longest), longest)

    def mask(self, position: int, queries: int) -> Tensor:
        """(Q, K) of so many queries, the first of them at a position on its path, over all keys up to the last one."""
        return self.whole[:queries, self.longest - position : self.longest + queries]


def _within(spans: tuple[tuple[int, int], ...], meta: int, window: int, device: torch.device) -> Tensor:
    """(Q, K) mask of the last span's tokens over all spans, each given as (first position, tokens), with a window."""
    keys = torch.cat([torch.arange(first, first + size, device=device) for first, size in spans])
    queries = keys[-spans[-1][1] :, None]
    return (keys <= queries) & ((keys < meta) | (queries - keys <= window))


def _attend_block(q_QHd: Tensor, k_KGd: Tensor, v_KGe: Tensor, mask_QK: Tensor) -> Tensor:
    """(Q, H * e). Query heads that share a key head are folded into its queries, so keys are never repeated."""
    queries, heads, _ = q_QHd.shape
    groups = k_KGd.shape[1]
    folded = q_QHd.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    out = F.scaled_dot_product_attention(
        folded[None],
        k_KGd.transpose(0, 1)[None],
        v_KGe.transpose(0, 1)[None],
        attn_mask=mask_QK.repeat(heads // groups, 1),
    )[0]
    return out.unflatten(1, (heads // groups, queries)).permute(2, 0, 1, 3).reshape(queries, -1)
