"""causal-conv1d and mamba-ssm behind the kernels' interface, by stand-ins: neither library runs without a GPU.

The stand-ins refuse what the libraries refuse (causal-conv1d 1.6, csrc/causal_conv1d.cpp; mamba-ssm 2.3,
ops/triton/selective_state_update.py), except that they run on the CPU.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hymba_align.errors import KernelError
from hymba_align.model.kernels import causal_conv1d, cuda_step
from hymba_align.model.kernels.causal_conv1d import LibraryConv, LibraryConvStep
from hymba_align.model.kernels.conv import GatherConv
from hymba_align.model.kernels.cuda_step import LibraryScanStep
from hymba_align.model.kernels.step import ConvStep, ScanStep
from hymba_align.model.reference import causal_conv_reference

CPU = torch.device("cpu")
CLOSE = {"atol": 3e-6, "rtol": 0}  # float32, observed 1e-6
GRADIENTS = {"atol": 2e-5, "rtol": 0}  # float32, observed 1e-6
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Tree = tuple[list[int], list[int], list[int]]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Stand-in: (batch, dim, seqlen), each token reading earlier ones of its own sequence number; sums in float32."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    assert weight.shape == (dim, width)
    assert 2 <= width <= 4
    assert bias is not None
    assert bias.dtype == weight.dtype
    assert initial_states is None, "not together with seq_idx"
    assert not return_final_states, "not together with seq_idx"
    assert seq_idx is not None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert seq_idx.shape == (batch, length)
    assert x.stride(1) == 1 < x.stride(2), "seq_idx is only supported for channel last layout"
    assert dim % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert x.data_ptr() % 16 == 0, "vectorised loads"
    y = bias.float()[:, None].expand(batch, dim, length)
    for back in range(width):
        earlier = F.pad(x, (back, 0))[..., :length].float()
        same = F.pad(seq_idx, (back, 0), value=-1)[..., :length] == seq_idx
        y = y + torch.where(same[:, None], earlier * weight[:, width - 1 - back, None].float(), 0.0)
    return (y if activation is None else F.silu(y)).to(x.dtype)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Stand-in: (batch, dim) after conv_state (batch, dim, width - 1), which it moves on in place; sums in float32."""
    assert x.dtype in FLOATS
    assert conv_state.dtype == x.dtype
    assert conv_state.shape == (*x.shape, weight.shape[1] - 1)
    assert 2 <= weight.shape[1] <= 4
    assert bias is not None
    assert bias.dtype == weight.dtype
    inputs = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(inputs[..., 1:])
    y = (inputs.float() * weight.float()).sum(-1) + bias.float()
    return (y if activation is None else F.silu(y)).to(x.dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Stand-in: one step, in float32, writing into state (batch, dim, dstate); output in x's dtype."""
    if D is None or dt_bias is None:
        raise TypeError("Value after * must be an iterable, not int")  # as the library, which unpacks 0 for them
    assert x.dtype in FLOATS
    assert state.shape == (*x.shape, A.shape[1])
    assert dt.shape == x.shape
    assert B.shape == C.shape == (len(x), A.shape[1])
    dt = dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    state.copy_(state * torch.exp(dt[..., None] * A) + (dt * x.float())[..., None] * B.float()[:, None])
    y = (state.float() * C.float()[:, None]).sum(-1) + D.float() * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = types.ModuleType("causal_conv1d")
    conv.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    conv.causal_conv1d_update = causal_conv1d_update  # type: ignore[attr-defined]
    update = types.ModuleType("mamba_ssm.ops.triton.selective_state_update")
    update.selective_state_update = selective_state_update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", update)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Segments around the reach of the convolution, any parents, given tails for some of the roots."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 4, 9]), min_size=1, max_size=8))
    parents = [draw(st.integers(-1, index - 1)) for index in range(len(lengths))]
    initial = [draw(st.integers(-1, 1)) if parent < 0 else -1 for parent in parents]
    return lengths, parents, initial


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(tree=trees(), taps=st.integers(2, 4), seed=st.integers(0, 99), silu=st.booleans())
def test_the_library_convolution_equals_the_reference_on_any_tree(tree: Tree, taps: int, seed: int, silu: bool) -> None:
    lengths, parents, initial = tree
    u, weight, bias, given_tails = numbers(seed, (sum(lengths), 8), (8, taps), (8,), (2, taps - 1, 8))
    y, tails = LibraryConv.build(*tree, taps, CPU).run(u, weight, bias, given_tails, silu=silu)
    expected_tails: list[Tensor] = []
    for index, (own, parent, given_tail) in enumerate(zip(u.split(lengths), parents, initial, strict=True)):
        before = u.new_zeros(taps - 1, 8)
        if parent >= 0 or given_tail >= 0:
            before = expected_tails[parent] if parent >= 0 else given_tails[given_tail]
        expected = causal_conv_reference(own, weight, bias, before)
        assert_close(y.split(lengths)[index], F.silu(expected) if silu else expected, **CLOSE)
        expected_tails.append(torch.cat([before, own])[-(taps - 1) :])
    assert torch.equal(tails, torch.stack(expected_tails))


@settings(max_examples=30, deadline=None)
@given(tree=trees(), taps=st.integers(2, 4), seed=st.integers(0, 99))
def test_its_gradients_are_those_of_the_convolution_in_torch(tree: Tree, taps: int, seed: int) -> None:
    inputs = numbers(seed, (sum(tree[0]), 8), (8, taps), (8,), (2, taps - 1, 8))
    results = [row.build(*tree, taps, CPU).run(*inputs, silu=True) for row in (LibraryConv, GatherConv)]
    weights = [x.detach() for x in numbers(seed + 1, *(tuple(x.shape) for x in results[0]))]
    found, expected = (
        torch.autograd.grad(
            sum((x * weight).sum() for x, weight in zip(result, weights, strict=True)), inputs, allow_unused=True
        )
        for result in results
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, **GRADIENTS)


def test_a_slice_of_a_wider_projection_is_convolved_whatever_its_layout() -> None:
    projected = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    weight, bias = numbers(1, (8, 4), (8,))
    row = LibraryConv.build([20], [-1], [-1], 4, CPU)
    odd = torch.randn(20, 33)[:, 16:24]  # rows that do not start on 8 entries
    for slice_ in (projected[:, 16:24], projected[:, 3:11], odd):
        assert_close(row.run(slice_, weight, bias)[0], row.run(slice_.contiguous(), weight, bias)[0], **CLOSE)


def test_a_changed_document_leaves_every_other_convolution_as_it_was_bit_by_bit() -> None:
    tree = [5, 2, 9, 1], [-1, 0, 0, 1], [-1] * 4
    before, weight, bias = numbers(0, (17, 8), (8, 4), (8,))
    after = before.detach().clone()
    after[5:7] = float("nan")
    row = LibraryConv.build(*tree, 4, CPU)
    old, new = (row.run(u, weight, bias)[0] for u in (before, after))
    assert torch.equal(old[:5], new[:5])
    assert torch.equal(old[7:16], new[7:16])
    assert new[16].isnan().all()


def test_activations_in_bfloat16_are_summed_in_float32_with_weights_of_either_dtype() -> None:
    u, weight, bias = (x.detach() for x in numbers(0, (30, 8), (8, 4), (8,)))
    row = LibraryConv.build([5, 25], [-1, 0], [-1, -1], 4, CPU)
    exact, _ = row.run(u.bfloat16().float(), weight, bias)
    y, tails = row.run(u.bfloat16(), weight, bias.bfloat16())
    assert y.dtype == tails.dtype == torch.bfloat16
    assert_close(y.float(), exact, atol=2e-2, rtol=1e-2)  # bfloat16, observed 1.4e-2


@pytest.mark.parametrize("row", [LibraryConv, LibraryConvStep])
def test_other_numbers_of_taps_are_an_error(row: type[LibraryConv] | type[LibraryConvStep]) -> None:
    with pytest.raises(KernelError) as caught:
        row.build([1], [-1], [0], 5, CPU)
    assert str(caught.value) == "causal-conv1d has 2 to 4 taps, not 5 (mamba_d_conv); choose torch"


def test_channels_that_the_library_does_not_take_are_an_error() -> None:
    row = LibraryConv.build([2], [-1], [-1], 4, CPU)
    with pytest.raises(KernelError) as caught:
        row.run(*numbers(0, (2, 12), (12, 4), (12,)))
    assert str(caught.value) == (
        "causal-conv1d takes channels in multiples of 8, not 12 (mamba_expand x hidden_size); choose torch"
    )


def test_float64_is_an_error_and_is_not_rounded() -> None:
    u, weight, bias = (x.double() for x in numbers(0, (2, 8), (8, 4), (8,)))
    with pytest.raises(KernelError, match=r"^causal-conv1d does not compute in torch\.float64; choose torch$"):
        LibraryConv.build([2], [-1], [-1], 4, CPU).run(u, weight, bias)
    with (
        torch.no_grad(),
        pytest.raises(KernelError, match=r"^mamba-ssm does not compute in torch\.float64; choose torch$"),
    ):
        LibraryScanStep.build([1], [-1], [0], CPU).run(u[:1], u[:1], weight, u[:1, :4], u[:1, :4], u.new_zeros(1, 8, 4))


def test_a_plan_with_given_tails_needs_them() -> None:
    row = LibraryConv.build([2], [-1], [0], 4, CPU)
    with pytest.raises(ValueError, match="the plan refers to given tails, but none were given"):
        row.run(*numbers(0, (2, 8), (8, 4), (8,)))


@torch.no_grad()
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_the_library_step_of_the_convolution_equals_that_in_torch(taps: int, silu: bool) -> None:
    u, weight, bias, tails = numbers(taps, (3, 8), (8, taps), (8,), (3, taps - 1, 8))
    step = [1] * 3, [-1] * 3, [0, 1, 2], taps, CPU
    before = tails.clone()
    found = LibraryConvStep.build(*step).run(u, weight, bias, tails, silu=silu)
    expected = ConvStep.build(*step).run(u, weight, bias, tails, silu=silu)
    assert_close(found[0], expected[0], **CLOSE)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(tails, before), "the cache's own tails are not written to"


def scan_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, dt_raw, A, B, C, D, z, states of three sequences."""
    u, dt, a, B, C, D, z, states = (
        x.detach() for x in numbers(0, (3, 8), (3, 8), (8, 4), (3, 4), (3, 4), (8,), (3, 8), (3, 8, 4))
    )
    return [u.to(dtype), dt, -torch.exp(a), B.to(dtype), C.to(dtype), D, z.to(dtype), states]


def test_the_library_step_of_the_scan_equals_that_in_torch() -> None:
    u, dt, A, B, C, D, z, states = scan_inputs()
    step = [1] * 3, [-1] * 3, [0, 1, 2], CPU
    before = states.clone()
    ours, torchs = LibraryScanStep.build(*step), ScanStep.build(*step)
    for found, expected in (
        (ours.run(u, F.softplus(dt), A, B, C, states), torchs.run(u, F.softplus(dt), A, B, C, states)),
        (ours.gated(u, dt, A, B, C, D, z, states), torchs.gated(u, dt, A, B, C, D, z, states)),
    ):
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y, **CLOSE)
    assert torch.equal(states, before), "the cache's own states are not written to"


def test_in_bfloat16_the_state_stays_in_float32() -> None:
    u, dt, A, B, C, D, z, states = scan_inputs(torch.bfloat16)
    step = [1] * 3, [-1] * 3, [0, 1, 2], CPU
    ours, torchs = LibraryScanStep.build(*step), ScanStep.build(*step)
    y, final = ours.gated(u, dt, A, B, C, D, z, states)
    expected_y, expected_final = torchs.gated(u, dt, A, B, C, D, z, states)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert_close(final, expected_final, **CLOSE)
    assert_close(y, expected_y, atol=1e-2, rtol=1e-2)  # bfloat16, observed 0
    assert ours.run(u, F.softplus(dt), A, B, C, states)[0].dtype == torch.float32


def test_single_token_updates_refuse_gradients() -> None:
    u, dt, A, B, C, D, z, states = scan_inputs()
    u.requires_grad_()
    scan = LibraryScanStep.build([1] * 3, [-1] * 3, [0, 1, 2], CPU)
    conv = LibraryConvStep.build([1] * 3, [-1] * 3, [0, 1, 2], 4, CPU)
    with pytest.raises(KernelError) as caught:
        scan.gated(u, dt, A, B, C, D, z, states)
    assert str(caught.value) == "mamba-ssm: its single-token update has no gradient; run it in torch.no_grad()"
    with pytest.raises(KernelError) as caught:
        conv.run(u, torch.zeros(8, 4), torch.zeros(8), torch.zeros(3, 3, 8))
    assert str(caught.value) == "causal-conv1d: its single-token update has no gradient; run it in torch.no_grad()"


def test_a_step_without_states_is_an_error() -> None:
    u, dt, A, B, C, D, z, _ = scan_inputs()
    with pytest.raises(ValueError, match="ScanStep: a step continues states, but none were given"):
        LibraryScanStep.build([1] * 3, [-1] * 3, [0, 1, 2], CPU).gated(u, dt, A, B, C, D, z)
    with pytest.raises(ValueError, match="ConvStep: a step continues tails, but none were given"):
        LibraryConvStep.build([1] * 3, [-1] * 3, [0, 1, 2], 4, CPU).run(u, torch.zeros(8, 4), torch.zeros(8))


@pytest.mark.parametrize(("module", "name"), [(causal_conv1d, "causal-conv1d"), (cuda_step, "mamba-ssm")])
def test_a_library_says_where_it_cannot_run(
    module: types.ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    assert module.unavailable(CPU, torch.float32) == f"{name} runs on CUDA only, not on cpu: choose torch"
    assert module.unavailable(cuda, torch.float64) == f"{name} does not compute in torch.float64: choose torch"
    assert module.unavailable(cuda, torch.bfloat16) is None  # the stand-in loads
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", None)
    reason = module.unavailable(cuda, torch.bfloat16)
    assert reason.startswith(f"{name} does not load (")
    assert reason.endswith("); in the clone: pip install --no-build-isolation -e '.[cuda]'")
