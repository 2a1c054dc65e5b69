"""Global layers through flash-attn, which is not installed here: a stand-in follows its documentation."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hymba_align.errors import KernelError
from hymba_align.model import flash
from hymba_align.model.attention import TreeAttention
from hymba_align.model.flash import FlashTreeAttention
from hymba_align.model.flex import FlexTreeAttention

CPU = torch.device("cpu")
CLOSE = {"atol": 2e-6, "rtol": 0}  # float32, observed 6e-7
GRADIENTS = {"atol": 2e-5, "rtol": 0}  # float32, observed 3e-6
Tree = tuple[list[int], list[int]]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Stand-in for flash-attn 2.8's function of that name, by its docstring, in the dtype it is given.

    (total, heads, size) tensors, int32 (batch + 1,) cumulative lengths, each key head serving as many consecutive query
    heads, the causal mask aligned to the bottom right corner. As the kernel, it takes one head size.
    """
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(q)
    assert int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    shared = q.shape[1] // k.shape[1]
    outputs = []
    q_spans, k_spans = (
        list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)) for ends in (cu_seqlens_q, cu_seqlens_k)
    )
    for (q_start, q_end), (k_start, k_end) in zip(q_spans, k_spans, strict=True):
        keys, values = (x[k_start:k_end].repeat_interleave(shared, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], keys) * scale
        if causal:
            queries, count = q_end - q_start, k_end - k_start
            seen = torch.ones(queries, count, dtype=torch.bool).tril(count - queries)
            scores = scores.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 8, 17, 40]), min_size=2, max_size=7))
    return lengths, [-1] + [draw(st.integers(0, index - 1)) for index in range(1, len(lengths))]


def heads(tokens: int, seed: int, d: int = 8, e: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 6, d), (tokens, 2, d), (tokens, 2, e))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(tree=trees(), seed=st.integers(0, 99), width=st.sampled_from([8, 16, 24]))
def test_global_layers_equal_attention_per_segment_in_output_and_gradients(tree: Tree, seed: int, width: int) -> None:
    plain = TreeAttention.build(*tree, 7, CPU)
    row = FlashTreeAttention.build(*tree, 7, CPU, local=plain)
    inputs = heads(sum(tree[0]), seed, e=width)
    found, expected = (x.attend(*inputs, is_global=True, stored=None) for x in (row, plain))
    assert_close(found, expected, **CLOSE)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1))
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert_close(ours, theirs, **GRADIENTS)


def test_local_layers_go_to_the_backend_given_for_them() -> None:
    tree = [3, 20, 30], [-1, 0, 0]
    plain = TreeAttention.build(*tree, 7, CPU)
    row = FlashTreeAttention.build(*tree, 7, CPU, local=plain)
    inputs = heads(53, 0)
    found, expected = (x.attend(*inputs, is_global=False, stored=None) for x in (row, plain))
    assert torch.equal(found, expected)
    assert (found - row.attend(*inputs, is_global=True, stored=None)).abs().max() > 0.1


def test_local_layers_run_on_flex_attention_unless_another_backend_is_given() -> None:
    assert isinstance(FlashTreeAttention.build([3, 20], [-1, 0], 7, CPU).local, FlexTreeAttention)


def test_a_changed_document_leaves_every_other_output_as_it_was_bit_by_bit() -> None:
    tree = [3, 20, 30, 4], [-1, 0, 0, 1]
    row = FlashTreeAttention.build(*tree, 7, CPU, local=TreeAttention.build(*tree, 7, CPU))
    before = [x.detach() for x in heads(57, 0)]
    after = [x.clone() for x in before]
    for x in after:
        x[3:23] += 1
    old, new = (row.attend(*x, is_global=True, stored=None) for x in (before, after))
    assert torch.equal(old[:3], new[:3])
    assert torch.equal(old[23:53], new[23:53])
    assert not torch.equal(old[53:], new[53:])


def test_under_autocast_the_kernel_gets_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return flash_attn_varlen_func(q, k, v, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", recording)
    row = FlashTreeAttention.build([3, 5], [-1, 0], 7, CPU, local=TreeAttention.build([3, 5], [-1, 0], 7, CPU))
    q, k, v = heads(8, 0)
    with torch.autocast("cpu", torch.bfloat16):
        row.attend(q, k, v.bfloat16(), is_global=True, stored=None)
    assert set(seen) == {torch.bfloat16}


def test_values_that_cannot_be_cut_into_parts_are_an_error() -> None:
    row = FlashTreeAttention.build([3, 5], [-1, 0], 7, CPU, local=TreeAttention.build([3, 5], [-1, 0], 7, CPU))
    with pytest.raises(KernelError) as caught:
        row.attend(*heads(8, 0, d=8, e=12), is_global=True, stored=None)
    assert str(caught.value) == (
        "flash-attn: value heads of 12 cannot be cut into parts of the query heads' 8; choose attention=flex"
    )


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "flash-attn runs on CUDA only, not on cpu: choose attention=sdpa"),
        (
            "cuda",
            torch.float32,
            "flash-attn computes in float16 and bfloat16 only, not in torch.float32: choose attention=flex",
        ),
    ],
)
def test_it_says_where_it_cannot_run(device: str, dtype: torch.dtype, reason: str) -> None:
    assert flash.unavailable(torch.device(device), dtype) == reason


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    reason = flash.unavailable(torch.device("cuda"), torch.bfloat16)
    assert reason is not None
    assert reason.startswith("flash-attn does not load (")
    assert reason.endswith("); in the clone: pip install --no-build-isolation -e '.[cuda]'")


def test_a_gpu_that_is_too_old_is_sent_to_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert flash.unavailable(torch.device("cuda"), torch.float16) == (
        "flash-attn needs a GPU of compute capability 8.0 or above: choose attention=flex"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "capability" not in (flash.unavailable(torch.device("cuda"), torch.float16) or "")
