"""Grouped-query attention over a tree of segments, and over cached keys.

A token sees all meta tokens, its ancestors' tokens and the earlier tokens of its own segment; in local layers the
keys that are not meta tokens must also lie within the window. DESIGN.md, section 2.

Legend: L tokens of the packed row (meta tokens included), H query heads, G key/value heads, d query/key head size,
e value head size, M meta tokens, B sequences, Q new tokens per sequence, K cached keys per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model.cache import KeyValues
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


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one segment with the pieces of the row whose keys they may see."""

    pieces: tuple[int, ...]
    """Pieces of the row that hold the keys, in path order."""
    mask: Tensor
    """(Q, K) True where a query may see a key."""


@dataclass(frozen=True)
class TreeAttention(TreeAttentionRow):
    """Attention of one packed row, cut into pieces of at most `QUERY_BLOCK` tokens: SDPA on every piece."""

    sizes: tuple[int, ...]
    """Tokens of each piece; pieces cover the row in order and none spans two segments."""
    full: tuple[Block, ...]
    """One block per piece, for global layers."""
    windowed: tuple[Block, ...]
    """One block per piece, for local layers."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> TreeAttention:
        sizes: list[int] = []
        starts: list[int] = []  # position of each piece's first token on its path
        paths: list[list[int]] = []  # pieces up to the end of each segment
        full: list[Block] = []
        windowed: list[Block] = []
        masks: dict[tuple[object, ...], Tensor] = {}
        for length, parent in zip(lengths, parents, strict=True):
            path = [] if parent == ROOT else list(paths[parent])
            position = starts[path[-1]] + sizes[path[-1]] if path else 0
            for first in range(0, length, QUERY_BLOCK):
                sizes.append(min(QUERY_BLOCK, length - first))
                starts.append(position + first)
                path.append(len(sizes) - 1)
                near = [
                    piece
                    for piece in path
                    if starts[piece] < lengths[0] or starts[piece] + sizes[piece] > starts[-1] - window
                ]
                for blocks, pieces, reach in ((full, path, None), (windowed, near, window)):
                    spans = tuple((starts[piece], sizes[piece]) for piece in pieces)
                    if reach is not None and starts[-1] + sizes[-1] - lengths[0] <= reach + 1:
                        reach = None  # everything is within the window
                    if (spans, reach) not in masks:
                        masks[spans, reach] = _visible(spans, lengths[0], reach, device)
                    blocks.append(Block(tuple(pieces), masks[spans, reach]))
            paths.append(path)
        return cls(tuple(sizes), tuple(full), tuple(windowed))

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is None, "a tree holds all its tokens itself"
        # One split per tensor: the gradient of a split is one concatenation, that of many slices is one full row each.
        q_pieces, k_pieces, v_pieces = (x.split(self.sizes) for x in (q_LHd, k_LGd, v_LGe))
        outputs = []
        for q, block in zip(q_pieces, self.full if is_global else self.windowed, strict=True):
            k = torch.cat([k_pieces[piece] for piece in block.pieces])
            v = torch.cat([v_pieces[piece] for piece in block.pieces])
            outputs.append(_attend_block(q, k, v, block.mask))
        return torch.cat(outputs)


def _visible(spans: tuple[tuple[int, int], ...], meta: int, window: int | None, device: torch.device) -> Tensor:
    """(Q, K) mask of the last span's tokens over all spans, each given as (first position, tokens)."""
    keys = torch.cat([torch.arange(first, first + size, device=device) for first, size in spans])
    queries = keys[-spans[-1][1] :, None]
    seen = keys <= queries
    if window is not None:
        seen &= (keys < meta) | (queries - keys <= window)
    return seen


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


def attend_cached(
    q_BQHd: Tensor,
    own: tuple[Tensor, Tensor],
    meta: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    own_mask_BQQ: Tensor,
    cached_mask_BQK: Tensor,
) -> Tensor:
    """Attention output (B, Q, H * e) of new tokens over meta tokens, cached tokens and themselves.

    The three groups of keys are scored apart and share one softmax, so the meta keys are stored once for the batch
    and the cached ones are not copied.

    Args:
        q_BQHd: queries after RoPE.
        own: keys (B, Q, G, d) and values (B, Q, G, e) of the new tokens.
        meta: keys (G, M, d) and values (G, M, e) of the meta tokens.
        cached: keys (B, G, K, d) and values (B, G, K, e).
        own_mask_BQQ: True where a new token may see a new token.
        cached_mask_BQK: True where a new token may see a cached one.
    """
    batch, queries, _, head_dim = q_BQHd.shape
    groups = meta[0].shape[0]
    q = q_BQHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4) / math.sqrt(head_dim)  # B G R Q d, R heads per group
    own_k, own_v = (x.permute(0, 2, 1, 3) for x in own)
    flat = q.flatten(2, 3)
    scores = [
        torch.matmul(flat, meta[0].transpose(-1, -2)),
        _masked(torch.matmul(flat, cached[0].transpose(-1, -2)), cached_mask_BQK),
        _masked(torch.matmul(flat, own_k.transpose(-1, -2)), own_mask_BQQ),
    ]
    weights = torch.softmax(torch.cat(scores, dim=-1).float(), dim=-1).to(q.dtype)
    to_meta, to_cached, to_own = weights.split([score.shape[-1] for score in scores], dim=-1)
    out = torch.matmul(to_meta, meta[1]) + torch.matmul(to_cached, cached[1]) + torch.matmul(to_own, own_v)
    return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).reshape(batch, queries, -1)


def _masked(scores: Tensor, mask_BQK: Tensor) -> Tensor:
    """Scores (B, G, R * Q, K) with what may not be seen set to minus infinity."""
    _, queries, keys = mask_BQK.shape
    by_query = scores.unflatten(2, (-1, queries))
    return by_query.masked_fill(~mask_BQK[:, None, None], float("-inf")).view(*scores.shape[:3], keys)
