"""Attention weights of a packed row, in blocks: the model itself never forms them.

The queries of a block stand side by side in one segment, and its keys are all that any of them may see, so that cost
and memory follow what is seen: of a row of L tokens, no L x L matrix ever exists, not even for one head.

Legend: T text tokens of the row, L tokens with the meta tokens in front of them, M meta tokens, H query heads, G key
heads, d query/key head size, Q queries, K keys, n heads of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_align.model.attention import Block, TreeAttention
from hymba_align.model.segments import SegmentTree

WEIGHTS_AT_ONCE = 2**23
"""Weights of a block, if it has more than one head: 34 MB in float32. One head has at most 512 queries."""


class WeightBlock(NamedTuple):
    """What some heads do with some consecutive text tokens. Indices count the row's tokens, meta tokens first."""

    segment: int
    """of the row's tree, which the queries belong to"""
    heads: range
    """(n,) query heads"""
    queries: Tensor
    """(Q,) index of each query, M or above"""
    keys: Tensor
    """(K,) index of each key: the M meta tokens in order, then text in path order"""
    sees: Tensor
    """(Q, K) whether a query may see a key"""
    weights: Tensor
    """(n, Q, K) float32 at least; 0 where a query may not see a key; rows add up to 1"""


@dataclass(frozen=True)
class AttentionBlocks:
    """Which tokens of a row see which: its text in blocks of consecutive queries."""

    row: TreeAttention
    """Plan of the row; the meta tokens ask nothing in it"""
    segments: tuple[int, ...]
    """Segment of each block"""
    pieces: tuple[Tensor, ...]
    """Indices of the tokens of each piece of the row, meta tokens' pieces included"""

    @classmethod
    def build(cls, tree: SegmentTree, meta_tokens: int, window: int, device: torch.device) -> AttentionBlocks:
        """The blocks of a row, whichever backend computes its attention in the model.

        Args:
            tree: segments of the row's text, which starts right behind the meta tokens.
            meta_tokens: M.
            window: largest distance to a key that is not a meta token, in local layers.
            device: of queries and keys.
        """
        lengths = [meta_tokens, *tree.lengths.tolist()]
        parents = [-1, *(parent + 1 for parent in tree.parents.tolist())]
        row = TreeAttention.build(lengths, parents, window, device).without_queries(meta_tokens)
        last = torch.tensor(list(accumulate(row.sizes)))[row.keys_only :] - 1
        segments = torch.searchsorted(tree.offsets + meta_tokens, last, right=True) - 1
        pieces = torch.arange(sum(lengths), device=device).split(row.sizes)
        return cls(row, tuple(segments.tolist()), pieces)

    def weights(self, q_LHd: Tensor, k_LGd: Tensor, *, is_global: bool) -> Iterator[WeightBlock]:
        """Every weight of the text's queries once: block after block in row order, heads of a block in order.

        Args:
            q_LHd: queries of the whole row, after RoPE.
            k_LGd: keys of the whole row, after RoPE.
            is_global: whether the layer has no window.
        """
        blocks = self.row.full if is_global else self.row.windowed
        for piece, (segment, block) in enumerate(zip(self.segments, blocks, strict=True), start=self.row.keys_only):
            queries = self.pieces[piece]
            keys = torch.cat([self.pieces[seen] for seen in block.pieces])
            for heads in _heads_at_once(q_LHd.shape[1], block):
                q_QHd, k_KGd = q_LHd[queries], k_LGd[keys]
                yield WeightBlock(segment, heads, queries, keys, block.mask, _weights(q_QHd, k_KGd, heads, block.mask))


def _heads_at_once(heads: int, block: Block) -> Iterator[range]:
    most = max(1, WEIGHTS_AT_ONCE // block.mask.numel())
    for first in range(0, heads, most):
        yield range(first, min(heads, first + most))


def _weights(q_QHd: Tensor, k_KGd: Tensor, heads: range, sees_QK: Tensor) -> Tensor:
    """(n, Q, K) softmax of the scaled products, in float32 at least whatever the model computes in."""
    dtype = torch.promote_types(q_QHd.dtype, torch.float32)
    _, query_heads, size = q_QHd.shape
    groups = torch.arange(heads.start, heads.stop, device=k_KGd.device) // (query_heads // k_KGd.shape[1])
    q_nQd = q_QHd[:, heads.start : heads.stop].transpose(0, 1).to(dtype)
    k_ndK = k_KGd[:, groups].permute(1, 2, 0).to(dtype)
    scores = (q_nQd @ k_ndK).mul_(size**-0.5).masked_fill_(~sees_QK, -torch.inf)
    return scores.softmax(-1)
