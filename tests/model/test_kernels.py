"""The chunked kernels against the textbook recurrences, float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model.kernels import ChunkedScan, GatherConv, causal_conv, scan, selective_scan
from hymba_align.model.reference import causal_conv_reference, selective_scan_reference

CPU = torch.device("cpu")
EXACT = {"atol": 1e-11, "rtol": 0}  # float64, observed 3e-14


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Lengths around chunk borders and the convolution's reach, parents, and given states for some of the roots."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 4, 15, 16, 17, 33]), min_size=1, max_size=7))
    parents = [draw(st.integers(-1, index - 1)) for index in range(len(lengths))]
    initial = [draw(st.integers(-1, 1)) if parent < 0 else -1 for parent in parents]
    return lengths, parents, initial


def random_inputs(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(tree=trees(), channels=st.sampled_from([1, 5, 40]), seed=st.integers(0, 9))
def test_selective_scan_and_its_gradients_equal_the_recurrence_on_any_tree(
    tree: tuple[list[int], list[int], list[int]], channels: int, seed: int
) -> None:
    lengths, parents, initial = tree
    total, state = sum(lengths), 3
    inputs = random_inputs(
        seed,
        (total, channels),
        (total, channels),
        (channels, state),
        (total, state),
        (total, state),
        (2, channels, state),
    )
    u, dt_raw, a_raw, B, C, given_states = inputs
    dt, A = torch.nn.functional.softplus(dt_raw), -torch.exp(a_raw)

    y, final = selective_scan(u, dt, A, B, C, ChunkedScan.build(lengths, parents, initial, CPU), given_states)

    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for start, length, parent, given_state in zip(
        torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist(), lengths, parents, initial, strict=True
    ):
        span = slice(start, start + length)
        before = (
            finals[parent] if parent >= 0 else given_states[given_state] if given_state >= 0 else torch.zeros_like(A)
        )
        output, after = selective_scan_reference(u[span], dt[span], A, B[span], C[span], before)
        outputs.append(output)
        finals.append(after)
    expected, expected_final = torch.cat(outputs), torch.stack(finals)
    assert_close(y, expected, **EXACT)
    assert_close(final, expected_final, **EXACT)

    weight_y, weight_final = random_inputs(seed + 100, tuple(y.shape), tuple(final.shape))
    found = torch.autograd.grad(
        (y * weight_y).sum() + (final * weight_final).sum(), inputs, retain_graph=True, allow_unused=True
    )
    wanted = torch.autograd.grad(
        (expected * weight_y).sum() + (expected_final * weight_final).sum(), inputs, allow_unused=True
    )
    for ours, reference in zip(found, wanted, strict=True):
        assert_close(ours, torch.zeros_like(ours) if reference is None else reference, **EXACT)


@settings(max_examples=40, deadline=None)
@given(tree=trees(), seed=st.integers(0, 9), taps=st.integers(2, 5))
def test_causal_conv_reaches_back_through_the_tree(
    tree: tuple[list[int], list[int], list[int]], seed: int, taps: int
) -> None:
    lengths, parents, initial = tree
    u, weight, bias, given_tails = random_inputs(seed, (sum(lengths), 4), (4, taps), (4,), (2, taps - 1, 4))
    y, tails = causal_conv(u, weight, bias, GatherConv.build(lengths, parents, initial, taps, CPU), given_tails)
    expected_tails: list[Tensor] = []
    outputs = u.split(lengths)
    for index, (own, parent, given_tail) in enumerate(zip(outputs, parents, initial, strict=True)):
        before = (
            expected_tails[parent]
            if parent >= 0
            else given_tails[given_tail]
            if given_tail >= 0
            else u.new_zeros(taps - 1, 4)
        )
        assert_close(y.split(lengths)[index], causal_conv_reference(own, weight, bias, before), **EXACT)
        expected_tails.append(torch.cat([before, own])[-(taps - 1) :])
    assert_close(tails, torch.stack(expected_tails), **EXACT)


def test_channel_blocks_do_not_change_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    u, dt, B, C = random_inputs(0, (50, 70), (50, 70), (50, 4), (50, 4))
    A = -torch.rand(70, 4, dtype=torch.float64)
    plan = ChunkedScan.build([20, 30], [-1, 0], [-1, -1], CPU)
    whole, _ = selective_scan(u, dt.abs(), A, B, C, plan)
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", 1)
    blocked, _ = selective_scan(u, dt.abs(), A, B, C, plan)
    assert_close(blocked, whole, **EXACT)


def test_a_plan_with_initial_states_needs_them() -> None:
    u, B = random_inputs(0, (2, 3), (2, 4))
    plan = ChunkedScan.build([2], [-1], [0], CPU)
    with pytest.raises(ValueError, match="refers to initial states, but none were given"):
        selective_scan(u, u, torch.zeros(3, 4), B, B, plan)


def test_a_backward_pass_inside_autocast_stays_in_float32() -> None:
    inputs = [x.float().detach().requires_grad_() for x in random_inputs(0, (40, 6), (40, 6), (6, 4), (40, 4), (40, 4))]
    plan = ChunkedScan.build([40], [-1], [-1], CPU)
    gradients = []
    for enabled in (False, True):
        u, dt, A, B, C = inputs
        y, final = selective_scan(u, dt.abs(), -A.abs(), B, C, plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(y.sum() + final.sum(), inputs))
    for plain, inside in zip(*gradients, strict=True):
        assert torch.equal(plain, inside)
