"""The segment tree validates itself and describes the row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba_align.model import SegmentTree
from hymba_align.model.segments import share_prefixes


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


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)  # much in common


@given(sequences=SEQUENCES)
def test_every_path_spells_its_sequence_and_every_prefix_is_there_once(sequences: list[list[int]]) -> None:
    shared = share_prefixes(sequences)
    for number, sequence in enumerate(sequences):
        places = shared.tokens_of(number)
        assert shared.token_ids[places].tolist() == sequence
        before = shared.tree.predecessors()[places].tolist()
        assert before == [-1, *places.tolist()[:-1]]
        end = int(shared.ends[number])
        assert int(places[-1]) == int(shared.tree.offsets[end] + shared.tree.lengths[end]) - 1
    prefixes = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert shared.tree.num_tokens == len(shared.token_ids) == len(prefixes)


@given(sequences=SEQUENCES)
def test_segments_are_cut_only_where_something_ends_or_parts(sequences: list[list[int]]) -> None:
    tree = (shared := share_prefixes(sequences)).tree
    children = torch.bincount(tree.parents + 1, minlength=tree.num_segments + 1)[1:]
    for segment in range(tree.num_segments):
        assert children[segment] != 1 or segment in shared.ends
        assert children[segment] > 0 or segment in shared.ends


def test_shots_questions_and_choices_become_three_levels() -> None:
    shots, questions = [900, 901, 902], [[70000, 5], [6, 7]]
    sequences = [[*shots, *question, choice] for question in questions for choice in (1, 300)]
    shared = share_prefixes([torch.tensor(sequence, dtype=torch.int32) for sequence in sequences])
    assert shared.token_ids.tolist() == [900, 901, 902, 6, 7, 1, 300, 70000, 5, 1, 300]
    assert repr(shared.tree) == "SegmentTree(lengths=[3, 2, 1, 1, 2, 1, 1], parents=[-1, 0, 1, 1, 0, 4, 4])"
    assert shared.ends.tolist() == [5, 6, 2, 3]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "no sequences; a row has at least one"),
        ([[1], []], r"sequences\[1\] is empty; it needs at least 1 token"),
        ([[1, -100]], r"sequences\[0\] holds -100; token ids are not negative"),
        ([[1], [0.5]], r"sequences\[1\] has dtype torch.float32; it must hold integers"),
    ],
)
def test_sequences_that_no_tree_can_hold_are_refused(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_prefixes(sequences)
