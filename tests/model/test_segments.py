"""The segment tree validates itself and describes the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_align.model import SegmentTree


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([], [], "no segments"),
        ([3, 2], [-1], "2 lengths but 1 parents"),
        ([3, 0], [-1, 0], r"lengths\[1\] is 0"),
        ([3, -2], [-1, 0], r"lengths\[1\] is -2"),
        ([3, 2], [0, 0], r"parents\[0\] is 0; the first segment has no earlier one"),
        ([3, 2], [-1, 1], r"parents\[1\] is 1; it must be -1 or an earlier segment \(0 to 0\)"),
        ([3, 2, 1], [-1, -2, 0], r"parents\[1\] is -2"),
        ([3.0, 2.0], [-1, 0], "lengths has dtype torch.float32"),
        (torch.ones(2, 2, dtype=torch.int64), [-1, 0], r"lengths has shape \(2, 2\)"),
    ],
)
def test_a_malformed_tree_is_a_value_error_that_names_the_entry(
    lengths: list[int] | Tensor, parents: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentTree(lengths, parents)


def test_offsets_ancestors_paths_and_predecessors_follow_the_tree() -> None:
    tree = SegmentTree([3, 2, 4, 1], [-1, 0, -1, 1])
    assert tree.offsets.tolist() == [0, 3, 5, 9]
    assert tree.ancestor_tokens.tolist() == [0, 3, 0, 5]
    assert tree.path(3) == [0, 1, 3]
    assert tree.predecessors().tolist() == [-1, 0, 1, 2, 3, -1, 5, 6, 7, 4]
    assert tree.num_tokens == 10
    assert repr(tree) == "SegmentTree(lengths=[3, 2, 4, 1], parents=[-1, 0, -1, 1])"


@pytest.mark.parametrize(
    "tree",
    [
        SegmentTree.from_lengths([2, 3]),
        SegmentTree.from_attention_mask(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])),
        SegmentTree.from_position_ids(torch.tensor([[0, 1, 0, 1, 2]])),
        SegmentTree.from_cu_seq_lens(torch.tensor([0, 2, 5], dtype=torch.int32)),
    ],
    ids=["lengths", "attention_mask", "position_ids", "cu_seq_lens"],
)
def test_constructors_of_independent_documents_agree(tree: SegmentTree) -> None:
    assert tree.lengths.tolist() == [2, 3]
    assert tree.parents.tolist() == [-1, -1]


def test_preferences_hang_both_answers_on_their_prompt() -> None:
    tree = SegmentTree.from_preferences([4, 0], [2, 3], [1, 5])
    assert tree.lengths.tolist() == [4, 2, 1, 3, 5]
    assert tree.parents.tolist() == [-1, 0, 0, -1, -1]


def test_positions_that_neither_continue_nor_restart_are_refused() -> None:
    with pytest.raises(ValueError, match="go from 1 to 5 at token 2; within a document they must count up by one"):
        SegmentTree.from_position_ids(torch.tensor([0, 1, 5]))


@pytest.mark.parametrize("cu_seq_lens", [[0], [1, 3], [0, 3, 3]])
def test_impossible_cumulative_lengths_are_refused(cu_seq_lens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seq_lens|lengths\[1\] is 0"):
        SegmentTree.from_cu_seq_lens(torch.tensor(cu_seq_lens))
