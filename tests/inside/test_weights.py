"""Attention weights in blocks, beside dense ones that are written from DESIGN.md, section 2, and not from our masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hymba_align.inside import weights
from hymba_align.inside.weights import AttentionBlocks
from hymba_align.model import SegmentTree

META, WINDOW = 5, 6
TREES = {
    "one document": ([20], [-1]),
    "documents around the window's edge": ([1, 6, 7, 8, 13], [-1] * 5),
    "a prompt with two answers": ([9, 4, 12], [-1, 0, 0]),
    "a deep tree": ([3, 10, 2, 5, 1, 9], [-1, 0, 1, 1, -1, 4]),
}


def dense_weights(q_LHd: Tensor, k_LGd: Tensor, tree: SegmentTree, window: int | None, meta: int = META) -> Tensor:
    """(H, L, L) in float64: every text token's path on its own, one softmax over what it sees."""
    tokens, heads, size = q_LHd.shape
    found = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    offsets, lengths = tree.offsets.tolist(), tree.lengths.tolist()
    for segment in range(tree.num_segments):
        path = [meta + offsets[one] + i for one in tree.path(segment) for i in range(lengths[one])]
        before = len(path) - lengths[segment]
        for place in range(before, len(path)):
            seen = [key for at, key in enumerate(path[: place + 1]) if window is None or place - at <= window]
            keys = torch.tensor([*range(meta), *seen])
            for head in range(heads):
                group = head * k_LGd.shape[1] // heads
                scores = k_LGd[keys, group].double() @ q_LHd[path[place], head].double() / math.sqrt(size)
                found[head, path[place], keys] = scores.softmax(0)
    return found


def joined(blocks: AttentionBlocks, q: Tensor, k: Tensor, *, is_global: bool, meta: int = META) -> Tensor:
    """(H, L, L) from the blocks; NaN where no block has been."""
    found = torch.full((q.shape[1], len(q), len(q)), torch.nan)
    found[:, meta:] = 0
    visited = torch.zeros(q.shape[1], len(q))
    for block in blocks.weights(q, k, is_global=is_global):
        assert block.weights.dtype == torch.float32
        assert not block.weights[:, ~block.sees].any()
        assert torch.equal(block.keys[:meta], torch.arange(meta))
        assert torch.equal(block.keys[-len(block.queries) :], block.queries)
        rows = torch.tensor(list(block.heads))[:, None, None]
        found[rows, block.queries[:, None], block.keys] = block.weights
        visited[rows[:, 0], block.queries] += 1
    assert visited[:, meta:].eq(1).all()
    assert not visited[:, :meta].any()
    return found[:, meta:]


def queries_and_keys(
    tokens: int, heads: int = 6, groups: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(META + tokens, many, 4, generator=generator) for many in (heads, groups))
    return (2 * q).to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_global", [True, False])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_blocks_hold_every_weight_of_every_text_token_once(
    tree: tuple[list[int], list[int]], is_global: bool, dtype: torch.dtype
) -> None:
    segments = SegmentTree(torch.tensor(tree[0]), torch.tensor(tree[1]))
    q, k = queries_and_keys(segments.num_tokens, dtype=dtype)
    blocks = AttentionBlocks.build(segments, META, WINDOW, q.device)

    found = joined(blocks, q, k, is_global=is_global)
    wanted = dense_weights(q, k, segments, None if is_global else WINDOW)[:, META:]

    assert (found - wanted).abs().max() <= 1e-6  # float32 softmax of given queries and keys, observed 2e-7
    assert (found.sum(-1) - 1).abs().max() <= 1e-6  # observed 2e-7


def test_a_model_in_float64_has_weights_in_float64() -> None:
    q, k = queries_and_keys(20, dtype=torch.float64)
    blocks = AttentionBlocks.build(SegmentTree.from_lengths([20]), META, WINDOW, q.device)
    for block in blocks.weights(q, k, is_global=False):
        assert block.weights.dtype == torch.float64
        assert (block.weights.sum(-1) - 1).abs().max() <= 1e-14  # float64, observed 4e-16


@pytest.mark.parametrize("is_global", [True, False])
def test_segments_of_several_pieces_are_joined_where_a_window_spans_them(is_global: bool) -> None:
    tree = SegmentTree(torch.tensor([700, 1100, 40]), torch.tensor([-1, 0, 0]))
    q, k = queries_and_keys(tree.num_tokens, heads=2, groups=1)
    blocks = AttentionBlocks.build(tree, META, 600, q.device)
    position = torch.cat([torch.arange(700), 700 + torch.arange(1100), 700 + torch.arange(40)])
    segment = torch.arange(3).repeat_interleave(tree.lengths)
    sees = (position[:, None] >= position) & ((segment[:, None] == segment) | (segment == 0))
    if not is_global:
        sees &= position[:, None] - position <= 600
    sees = torch.cat([torch.ones(len(sees), META, dtype=torch.bool), sees], dim=1)
    scores = torch.einsum("qhd,kd->hqk", q[META:].double(), k[:, 0].double()) / 2
    wanted = scores.masked_fill(~sees, -torch.inf).softmax(-1)

    found = joined(blocks, q, k, is_global=is_global)

    assert (found - wanted).abs().max() <= 2e-6  # float32, observed 5e-7
    assert [block.segment for block in blocks.weights(q, k, is_global=is_global)] == [0, 0, 1, 1, 1, 2]


def test_heads_come_a_few_at_a_time_where_a_block_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = SegmentTree.from_lengths([12, 3])
    q, k = queries_and_keys(15)
    blocks = AttentionBlocks.build(tree, META, WINDOW, q.device)
    whole = joined(blocks, q, k, is_global=True)

    monkeypatch.setattr(weights, "WEIGHTS_AT_ONCE", 2 * 12 * (META + 12))
    parts = list(blocks.weights(q, k, is_global=True))

    assert [(part.segment, part.heads) for part in parts] == [
        (0, range(2)),
        (0, range(2, 4)),
        (0, range(4, 6)),
        (1, range(6)),
    ]
    assert torch.equal(joined(blocks, q, k, is_global=True), whole)


def test_a_row_of_8k_tokens_has_no_block_beyond_the_limit() -> None:
    tree = SegmentTree.from_lengths([8192])
    blocks = AttentionBlocks.build(tree, 128, 1024, torch.device("cpu"))

    largest = max(block.mask.numel() for block in blocks.row.full)

    assert largest == 512 * (128 + 8192) <= weights.WEIGHTS_AT_ONCE
    assert max(block.mask.numel() for block in blocks.row.windowed) <= 512 * (128 + 1024 + 2 * 512)
