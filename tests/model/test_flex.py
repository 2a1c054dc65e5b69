"""FlexAttention over the segment tree: the mask, the forward pass, and what may not happen between batches.

torch has no backward pass for it on the CPU and generates other kernels for CUDA; neither is run here. Gradients are
those of torch's dense form of the same operator, under this project's mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch._higher_order_ops.flex_attention import flex_attention as dense_flex_attention
from torch.nn.attention.flex_attention import create_mask
from torch.testing import assert_close

from hymba_align.model import HymbaForCausalLM, SegmentTree, flex
from hymba_align.model.attention import TreeAttention
from hymba_align.model.flex import FlexTreeAttention, Visibility
from hymba_align.model.kernels import choice
from hymba_align.model.key_values import KeyValues

CPU = torch.device("cpu")
CLOSE = {"atol": 3e-6, "rtol": 0}  # float32, observed 1.2e-6
NO_SHRINK = tuple(phase for phase in Phase if phase is not Phase.shrink)
Tree = tuple[list[int], list[int]]

# torch's compiler calls it itself when it first loads; delete when it no longer does.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Meta tokens and segments around the borders of blocks of 16, in any order of the tree."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 5, 15, 16, 17, 33, 70]), min_size=2, max_size=8))
    return lengths, [-1] + [draw(st.integers(0, index - 1)) for index in range(1, len(lengths))]


@contextmanager
def block_size(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", size)
        yield


def visible(tree: Tree, window: int | None) -> Tensor:
    """(L, L) what each token sees, token by token from the definition."""
    lengths, parents = tree
    segment_of = [segment for segment, length in enumerate(lengths) for _ in range(length)]
    paths: list[list[int]] = []
    for segment, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), segment])
    position = [
        sum(lengths[ancestor] for ancestor in paths[segment][:-1]) + index
        for segment, length in enumerate(lengths)
        for index in range(length)
    ]
    return torch.tensor(
        [
            [
                key_segment in paths[segment]
                and position[key] <= position[query]
                and (window is None or key_segment == 0 or position[query] - position[key] <= window)
                for key, key_segment in enumerate(segment_of)
            ]
            for query, segment in enumerate(segment_of)
        ]
    )


def heads(tokens: int, seed: int, heads: int = 6, groups: int = 2, d: int = 16, e: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, d), (tokens, groups, d), (tokens, groups, e))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_token(seen: Visibility, length: int) -> Tensor:
    return create_mask(seen.block_mask().mask_mod, 1, 1, length, length, device="cpu")[0, 0]


@settings(max_examples=40, deadline=None)
@given(tree=trees(), window=st.sampled_from([1, 7, 16, 40]), block=st.sampled_from([8, 16, 128]))
def test_every_token_sees_what_the_tree_says_and_blocks_agree(tree: Tree, window: int, block: int) -> None:
    length = sum(tree[0])
    with block_size(block):
        row = FlexTreeAttention.build(*tree, window, CPU)
        for seen, reach in ((row.full, None), (row.windowed, window)):
            expected = visible(tree, reach)
            assert torch.equal(by_token(seen, length), expected)

            mask = seen.block_mask()
            blocks = len(mask.kv_num_blocks[0, 0])
            padded = F.pad(expected, (0, blocks * block - length, 0, blocks * block - length))
            pairs = padded.unflatten(0, (blocks, block)).unflatten(2, (blocks, block)).transpose(1, 2)
            assert torch.equal(mask.to_dense()[0, 0].bool(), pairs.any((2, 3)))
            whole = torch.zeros(blocks, blocks, dtype=torch.bool)
            for query, (count, keys) in enumerate(
                zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
            ):
                whole[query, keys[:count].long()] = True
            assert torch.equal(whole, pairs.all((2, 3)))


@settings(max_examples=15, deadline=None, phases=NO_SHRINK)
@given(tree=trees(), window=st.sampled_from([7, 40]))
def test_the_lists_by_key_are_those_by_query_turned_around(tree: Tree, window: int) -> None:
    with block_size(16):
        row = FlexTreeAttention.build(*tree, window, CPU)
    for seen in (row.full, row.windowed):
        mask = seen.block_mask()
        turned = type(mask).from_kv_blocks(*seen.blocks[:4], BLOCK_SIZE=16)
        for ours, torchs in (
            (mask.q_num_blocks, turned.q_num_blocks),
            (mask.q_indices, turned.q_indices),
            (mask.full_q_num_blocks, turned.full_q_num_blocks),
            (mask.full_q_indices, turned.full_q_indices),
        ):
            assert torch.equal(ours, torchs)


def test_many_segments_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = [3] * 60, [-1, *(index // 2 for index in range(59))]
    whole = FlexTreeAttention.build(*tree, 5, CPU)
    monkeypatch.setattr(flex, "PIECE_PAIRS", 200)
    parts = FlexTreeAttention.build(*tree, 5, CPU)
    for a, b in zip(whole.windowed.blocks, parts.windowed.blocks, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=25, deadline=None, phases=NO_SHRINK)
@given(tree=trees(), window=st.sampled_from([7, 40, 1000]), seed=st.integers(0, 99))
def test_the_output_is_that_of_attention_per_segment(tree: Tree, window: int, seed: int) -> None:
    q, k, v = heads(sum(tree[0]), seed)
    plain = TreeAttention.build(*tree, window, CPU)
    row = FlexTreeAttention.build(*tree, window, CPU)
    for is_global in (True, False):
        expected = plain.attend(q, k, v, is_global=is_global, stored=None)
        assert_close(row.attend(q, k, v, is_global=is_global, stored=None), expected, **CLOSE)


def test_rows_of_several_blocks_skip_what_nobody_sees_and_stay_exact() -> None:
    tree = [128, 300, 500, 40, 200], [-1, 0, 0, 2, 2]
    q, k, v = heads(sum(tree[0]), 0)
    row = FlexTreeAttention.build(*tree, 100, CPU)
    by_kind = [int(seen.blocks[0].sum() + seen.blocks[2].sum()) for seen in (row.full, row.windowed)]
    assert by_kind == [43, 28]  # of the 55 that a causal mask sees
    plain = TreeAttention.build(*tree, 100, CPU)
    for is_global in (True, False):
        expected = plain.attend(q, k, v, is_global=is_global, stored=None)
        assert_close(row.attend(q, k, v, is_global=is_global, stored=None), expected, **CLOSE)


@pytest.mark.parametrize(("query_heads", "groups", "d", "e"), [(25, 5, 64, 128), (3, 1, 8, 16)])
def test_any_shape_of_heads_is_computed(query_heads: int, groups: int, d: int, e: int) -> None:
    tree = [5, 20, 140], [-1, 0, 0]
    q, k, v = heads(165, 1, query_heads, groups, d, e)
    expected = TreeAttention.build(*tree, 30, CPU).attend(q, k, v, is_global=False, stored=None)
    found = FlexTreeAttention.build(*tree, 30, CPU).attend(q, k, v, is_global=False, stored=None)
    assert_close(found, expected, **CLOSE)


def test_a_new_tree_and_a_new_length_compile_nothing() -> None:
    generator = torch.Generator().manual_seed(0)

    def run(tree: Tree) -> None:
        # As in the model: keys come from the rotation, values are a slice of the projection.
        q, k, _ = heads(sum(tree[0]), 0)
        v = torch.randn(sum(tree[0]), 100, generator=generator)[:, 10:74].unflatten(1, (2, 32))
        row = FlexTreeAttention.build(*tree, 20, CPU)
        for is_global in (True, False):
            row.attend(q, k, v, is_global=is_global, stored=None)

    run(([128, 50], [-1, 0]))
    graphs = counters["stats"]["unique_graphs"]
    for tree in (([128, 51], [-1, 0]), ([5, 3], [-1, 0]), ([128, 256], [-1, 0]), ([9, 400, 3, 30], [-1, 0, 0, 2])):
        run(tree)
    assert counters["stats"]["unique_graphs"] == graphs


@settings(max_examples=15, deadline=None, phases=NO_SHRINK)
@given(tree=trees(), seed=st.integers(0, 99))
def test_a_changed_document_leaves_every_other_output_as_it_was_bit_by_bit(tree: Tree, seed: int) -> None:
    lengths, _ = tree
    generator = torch.Generator().manual_seed(seed)
    segment = int(torch.randint(0, len(lengths), (), generator=generator))
    span = slice(sum(lengths[:segment]), sum(lengths[: segment + 1]))
    before = heads(sum(lengths), seed)
    after = [x.clone() for x in before]
    for x in after:
        x[span] += 1
    row = FlexTreeAttention.build(*tree, 16, CPU)
    untouched = ~visible(tree, None)[:, span].any(1)
    for is_global in (True, False):
        old, new = (row.attend(*x, is_global=is_global, stored=None) for x in (before, after))
        assert torch.equal(old[untouched], new[untouched])


def test_under_autocast_products_are_in_its_dtype() -> None:
    tree = [5, 40], [-1, 0]
    q, k, v = heads(45, 2)
    row = FlexTreeAttention.build(*tree, 100, CPU)
    exact = row.attend(q, k, v, is_global=True, stored=None)
    with torch.autocast("cpu", torch.bfloat16):
        found = row.attend(q, k, v.bfloat16(), is_global=True, stored=None)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), exact, atol=3e-2, rtol=0)  # bfloat16, observed 1.0e-2


@settings(max_examples=15, deadline=None, phases=NO_SHRINK)
@given(tree=trees(), window=st.sampled_from([7, 40]), seed=st.integers(0, 99))
def test_gradients_of_the_dense_operator_under_the_mask_are_those_of_attention_per_segment(
    tree: Tree, window: int, seed: int
) -> None:
    inputs = [x.requires_grad_() for x in heads(sum(tree[0]), seed)]
    plain = TreeAttention.build(*tree, window, CPU)
    row = FlexTreeAttention.build(*tree, window, CPU)
    weight = heads(sum(tree[0]), seed + 1, e=6 * 32, groups=1)[2].flatten(1)
    for is_global in (True, False):
        seen = row.full if is_global else row.windowed
        out, _, _ = dense_flex_attention(
            *(x.transpose(0, 1)[None] for x in inputs),
            lambda score, *_: score,
            seen.block_mask().as_tuple(),
            inputs[0].shape[-1] ** -0.5,
            {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False},
        )
        found = torch.autograd.grad((out[0].transpose(0, 1).flatten(1) * weight).sum(), inputs)
        expected = torch.autograd.grad((plain.attend(*inputs, is_global=is_global, stored=None) * weight).sum(), inputs)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, atol=2e-5, rtol=0)  # float32, observed 6e-6


def test_a_whole_model_computes_the_same_with_it(
    small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = SegmentTree([9, 20, 3, 12], [-1, 0, 0, 2])
    ids = torch.randint(0, 61, (1, 44), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = small_model(ids, segments=tree).logits
        monkeypatch.setattr(flex, "unavailable", lambda device, dtype: None)  # it is refused on CPUs for its gradients
        monkeypatch.setenv("HYMBA_ALIGN_KERNELS", "attention=flex")
        choice._choose.cache_clear()
        layers: list[bool] = []

        class Recorded(FlexTreeAttention):
            def attend(self, *tensors: Tensor, is_global: bool, stored: KeyValues | None) -> Tensor:
                layers.append(is_global)
                return super().attend(*tensors, is_global=is_global, stored=stored)

        monkeypatch.setattr(flex, "FlexTreeAttention", Recorded)
        found = small_model(ids, segments=tree).logits
    assert layers == [True, False, False, False, True]
    assert_close(found, expected, atol=2e-5, rtol=0)  # float32, observed 4e-6


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.float32, "FlexAttention has no backward pass on cpu: choose attention=sdpa"),
        ("cuda", torch.float64, "FlexAttention does not compute in float64: choose attention=sdpa"),
    ],
)
def test_it_says_where_it_cannot_train(device: str, dtype: torch.dtype, reason: str) -> None:
    assert flex.unavailable(torch.device(device), dtype) == reason


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = flex.unavailable(torch.device("cuda"), torch.bfloat16)
    assert reason == "triton is not installed: pip install triton"
