"""Attention of new tokens over a filled cache.

A token sees what all rows share (meta tokens, and in global layers a folded prefix), the cached tokens of its sequence,
and new tokens that it continues; in local layers those that are not meta tokens must lie within the window.

Legend: L new tokens of the packed row, H query heads, G key/value heads, R query heads per group, d query/key head size,
e value head size, M shared keys, B sequences, Q new tokens per sequence, K cached keys per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.model.attention import SkipsQueries, TreeAttentionRow
from hymba_align.model.cache import HymbaCache
from hymba_align.model.key_values import KeyValues
from hymba_align.model.segments import ROOT, SegmentTree

SCORES_AT_ONCE = 2**24
"""Attention scores of one layer that exist at a time, about: bounds the memory of long prompts."""


@dataclass(frozen=True)
class StepAttention:
    """One new token of every sequence."""

    longest: int
    """Tokens of the longest sequence, the new one not counted."""
    seen: dict[bool, Tensor | None]
    """By whether a layer is global: (B, 1, K) True where a slot holds a token; None where all do."""

    @classmethod
    def build(cls, cache: HymbaCache, device: torch.device) -> StepAttention:
        """Plans a step of all sequences of a cache."""
        longest = int(cache.lengths.max())
        shortest = int(cache.lengths.min())
        lengths_B = cache.lengths.to(device, non_blocking=True)
        seen: dict[bool, Tensor | None] = {}
        for stored in _kinds(cache):
            used = stored.used(longest)
            if shortest - stored.folded >= used:
                seen[stored.window is None] = None
            else:
                slot = torch.arange(used, device=device)
                seen[stored.window is None] = (slot < (lengths_B - stored.folded)[:, None])[:, None]
        return cls(longest, seen)

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e); L is B."""
        assert stored is not None, "a filled cache has keys for every layer"
        used = stored.used(self.longest)
        cached = stored.keys[:, :, :used], stored.values[:, :, :used]
        own = k_LGd[:, :, None], v_LGe[:, :, None]
        return attend_cached(q_LHd[:, None], own, stored.shared, cached, None, self.seen[is_global]).flatten(0, 1)


@dataclass(frozen=True)
class CachedAttention:
    """At most one segment of new tokens per sequence."""

    slots_L: Tensor
    """Where each new token lies in the flattened (B, Q)."""
    shape: tuple[int, int]
    """B, Q"""
    lengths_B: Tensor
    """Cached tokens of each sequence."""
    longest: int
    """Cached tokens of the longest sequence."""

    @classmethod
    def build(cls, tree: SegmentTree, rows_S: Tensor, cache: HymbaCache, device: torch.device) -> CachedAttention:
        """Plans the attention of one segment per sequence.

        Args:
            tree: the new tokens of each sequence that has any.
            rows_S: the sequence of each segment.
            cache: what came before.
            device: of the computation.
        """
        shape = (len(cache.lengths), int(tree.lengths.max()))
        index_L = torch.arange(tree.num_tokens) - tree.offsets.repeat_interleave(tree.lengths)
        slots_L = rows_S.repeat_interleave(tree.lengths) * shape[1] + index_L
        return cls(slots_L.to(device), shape, cache.lengths.to(device), int(cache.lengths.max()))

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is not None, "a filled cache has keys for every layer"
        q, k, v = (self._pad(x) for x in (q_LHd, k_LGd, v_LGe))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        used = stored.used(self.longest)
        cached = stored.keys[:, :, :used], stored.values[:, :, :used]
        positions = stored.slot_positions(self.lengths_B, used)
        batch, queries = self.shape
        keys_per_query = stored.shared[0].shape[1] + used + queries
        block = max(1, SCORES_AT_ONCE // (batch * q.shape[2] * keys_per_query))
        outputs = []
        for first in range(0, queries, block):
            last = min(first + block, queries)
            oldest = 0 if stored.window is None else max(0, first - stored.window)
            own_seen, cached_seen = self._seen(first, last, oldest, positions, stored)
            own = k[:, :, oldest:last], v[:, :, oldest:last]
            outputs.append(attend_cached(q[:, first:last], own, stored.shared, cached, own_seen, cached_seen))
        return torch.cat(outputs, dim=1).flatten(0, 1)[self.slots_L]

    def _seen(
        self, first: int, last: int, oldest: int, positions_BK: Tensor, stored: KeyValues
    ) -> tuple[Tensor, Tensor]:
        """What the new tokens from `first` to `last` see of new ones from `oldest` on, and of cached ones."""
        query = torch.arange(first, last, device=positions_BK.device)[:, None]
        distance = query - torch.arange(oldest, last, device=positions_BK.device)
        own = distance >= 0
        cached = (positions_BK >= stored.folded)[:, None]
        if stored.window is not None:
            own = own & (distance <= stored.window)
            cached = cached & (self.lengths_B[:, None, None] + query - positions_BK[:, None] <= stored.window)
        return own[None], cached

    def _pad(self, x_L: Tensor) -> Tensor:
        """(L, ...) -> (B, Q, ...)"""
        if len(x_L) == self.shape[0] * self.shape[1]:
            return x_L.unflatten(0, self.shape)
        padded = x_L.new_zeros(self.shape[0] * self.shape[1], *x_L.shape[1:])
        return padded.index_copy(0, self.slots_L, x_L).unflatten(0, self.shape)


@dataclass(frozen=True)
class PrefixAttention:
    """A tree of segments that continues the only sequence of a cache.

    The cached tokens go in front of the row as one more segment and the whole is left to the attention of trees. Local
    layers hold the last `window` tokens only: for them the text starts there, since distances alone matter.
    """

    rows: dict[bool, TreeAttentionRow]
    """By whether a layer is global: the tree with the cached segment."""
    length: int
    """Cached tokens."""

    @classmethod
    def build(
        cls, row_class: type[TreeAttentionRow], tree: SegmentTree, cache: HymbaCache, device: torch.device
    ) -> PrefixAttention:
        """Plans the attention of a tree behind a cache of one row.

        Args:
            row_class: the backend.
            tree: the new tokens.
            cache: one row.
            device: of the computation.
        """
        length, meta, window = int(cache.lengths[0]), cache.config.num_memory_tokens, cache.config.sliding_window
        rows: dict[bool, TreeAttentionRow] = {}
        by_held: dict[int, TreeAttentionRow] = {}
        for stored in _kinds(cache):
            held = stored.folded + stored.used(length)
            if held not in by_held:
                before = [meta, held] if held else [meta]
                parents = [ROOT, 0][: len(before)]
                parents += [len(before) + parent for parent in tree.parents.tolist()]  # a root's is -1: the last before
                row = row_class.build([*before, *tree.lengths.tolist()], parents, window, device)
                by_held[held] = row.without_queries(sum(before)) if isinstance(row, SkipsQueries) else row
            rows[stored.window is None] = by_held[held]
        return cls(rows, length)

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is not None, "a filled cache has keys for every layer"
        cached_k, cached_v = stored.in_order(self.length)
        k = torch.cat([stored.shared[0].transpose(0, 1), cached_k, k_LGd])
        v = torch.cat([stored.shared[1].transpose(0, 1), cached_v, v_LGe])
        before = len(k) - len(k_LGd)
        row = self.rows[is_global]
        if isinstance(row, SkipsQueries):
            return row.attend(q_LHd, k, v, is_global=is_global, stored=None)
        # Other backends take a query for every key; those of the cached tokens are nobody's.
        q = torch.cat([q_LHd.new_zeros(before, *q_LHd.shape[1:]), q_LHd])
        return row.attend(q, k, v, is_global=is_global, stored=None)[before:]


def _kinds(cache: HymbaCache) -> list[KeyValues]:
    """One layer's keys of each kind that the model has, global and local: all of a kind have the same slots."""
    stored = [state.key_values for state in cache.states if state.key_values is not None]
    return list({one.window is None: one for one in stored}.values())


def attend_cached(
    q_BQHd: Tensor,
    own: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    own_seen: Tensor | None,
    cached_seen: Tensor | None,
) -> Tensor:
    """Attention output (B, Q, H * e) of new tokens over shared tokens, cached tokens and themselves.

    The three groups of keys are scored apart and share one softmax, so that shared keys exist once for the batch and
    no key is copied.

    Args:
        q_BQHd: queries after RoPE.
        own: keys (B, G, Q', d) and values (B, G, Q', e) of new tokens.
        shared: keys (G, M, d) and values (G, M, e) that every query sees.
        cached: keys (B, G, K, d) and values (B, G, K, e).
        own_seen: (B or 1, Q, Q') True where a new token may see a new one; None for everywhere.
        cached_seen: (B, Q or 1, K) True where a new token may see a cached one; None for everywhere.
    """
    batch, queries, _, head_dim = q_BQHd.shape
    groups, meta, _ = shared[0].shape
    # B G RQ d: query heads that share a key head are folded into its queries, so that keys are never repeated
    q = (q_BQHd * head_dim**-0.5).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    by_group = q.transpose(0, 1).flatten(1, 2)  # G BRQ d
    to_shared = torch.bmm(by_group, shared[0].transpose(1, 2)).unflatten(1, (batch, -1)).transpose(0, 1)
    to_cached = _hide(torch.matmul(q, cached[0].transpose(-1, -2)), cached_seen, queries)
    to_own = _hide(torch.matmul(q, own[0].transpose(-1, -2)), own_seen, queries)
    scores = torch.cat([to_shared, to_cached, to_own], dim=-1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=dtype).to(q.dtype)
    of_shared, of_cached, of_own = weights.split([meta, cached[0].shape[2], own[0].shape[2]], dim=-1)
    out = torch.matmul(of_cached, cached[1]) + torch.matmul(of_own, own[1])
    out = out + torch.bmm(of_shared.transpose(0, 1).flatten(1, 2), shared[1]).unflatten(1, (batch, -1)).transpose(0, 1)
    return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2)


def _hide(scores: Tensor, seen: Tensor | None, queries: int) -> Tensor:
    """Scores (B, G, R * Q, K) with those of what may not be seen set to minus infinity, in place."""
    if seen is not None:
        scores.unflatten(2, (-1, queries)).masked_fill_(~seen[:, None, None], float("-inf"))
    return scores
