"""What holds for every tree: a segment computes what its path, run alone, would compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree, attention
from hymba_align.model.kernels.choice import VARIABLE

LOGITS = {"atol": 5e-5, "rtol": 0}  # float32, observed 1.4e-5
GRADIENTS = 1e-4  # relative in norm, each parameter; observed 2e-5


def build_model(window: int) -> HymbaForCausalLM:
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        v_head_dim=16,
        num_memory_tokens=5,
        sliding_window=window,
        global_attn_idx=[3],
        kv_reuse_group=[[0, 1]],
        mamba_d_state=4,
        mamba_dt_rank=3,
        max_position_embeddings=128,
        orig_max_position_embeddings=64,
        initializer_range=0.2,
    )
    return HymbaForCausalLM(config)


MODELS = {window: build_model(window) for window in (1, 6, 100)}


@st.composite
def trees(draw: st.DrawFn) -> SegmentTree:
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 35]), min_size=1, max_size=7))
    return SegmentTree(lengths, [draw(st.integers(-1, index - 1)) for index in range(len(lengths))])


TORCH = "scan=torch,conv=torch,attention=sdpa,norm=torch"
BACKENDS = {"default": ("", 512), "torch": (TORCH, 512), "torch, in blocks of 4 queries": (TORCH, 4)}
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Chooses the kernels, and how many queries of a segment torch attends at a time."""
    wanted, block = BACKENDS[backend]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, wanted)
        patch.setattr(attention, "QUERY_BLOCK", block)
        yield


@on_every_backend
@settings(max_examples=12, deadline=None)
@given(tree=trees(), window=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 99))
def test_every_segment_equals_its_path_run_alone(backend: str, tree: SegmentTree, window: int, seed: int) -> None:
    model = MODELS[window].eval()
    ids = torch.randint(0, 61, (tree.num_tokens,), generator=torch.Generator().manual_seed(seed))
    weights = torch.randn(tree.num_tokens, 61, generator=torch.Generator().manual_seed(seed + 1))
    spans = [
        slice(start, start + length) for start, length in zip(tree.offsets.tolist(), tree.lengths.tolist(), strict=True)
    ]

    with running_on(backend):
        logits = model(ids[None], segments=tree).logits[0]
    found = gradients(model, (logits * weights).sum())

    total = torch.zeros(())
    for segment, span in enumerate(spans):
        path = torch.cat([ids[spans[ancestor]] for ancestor in tree.path(segment)])
        alone = model(path[None]).logits[0, -int(tree.lengths[segment]) :]
        assert_close(logits[span], alone, **LOGITS)
        total = total + (alone * weights[span]).sum()
    for name, expected in gradients(model, total).items():
        assert (found[name] - expected).norm() <= GRADIENTS * expected.norm(), name


@on_every_backend
@settings(max_examples=8, deadline=None)
@given(tree=trees(), window=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 99))
def test_a_token_changes_nothing_outside_its_own_subtree(
    backend: str, tree: SegmentTree, window: int, seed: int
) -> None:
    model = MODELS[window].eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (tree.num_tokens,), generator=generator)
    segment = int(torch.randint(0, tree.num_segments, (), generator=generator))
    token = int(tree.offsets[segment] + torch.randint(0, int(tree.lengths[segment]), (), generator=generator))
    changed = ids.clone()
    changed[token] = (ids[token] + 1) % 61
    with torch.no_grad(), running_on(backend):
        before, after = (model(x[None], segments=tree).logits[0] for x in (ids, changed))
    for other in range(tree.num_segments):
        span = slice(int(tree.offsets[other]), int(tree.offsets[other] + tree.lengths[other]))
        if other == segment:
            span = slice(span.start, token)
        elif segment in tree.path(other):
            continue
        assert torch.equal(before[span], after[span])


@on_every_backend
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_padding_gives_the_logits_of_each_row_alone(backend: str, lengths: list[int], seed: int) -> None:
    model = MODELS[6].eval()
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 3
    ids = torch.randint(0, 61, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):  # holes in the middle too: padding is wherever the mask is 0
        mask[row, torch.randperm(width, generator=generator)[:length]] = 1
    with torch.no_grad(), running_on(backend):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        for row in range(len(lengths)):
            real = mask[row].bool()
            assert_close(logits[row, real], model(ids[row, real][None], use_cache=False).logits[0], **LOGITS)


def gradients(model: HymbaForCausalLM, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))
