"""The kernels of a decoding step against the textbook recurrences and against the kernels of whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model.kernels import ChunkedScan, GatherConv
from hymba_align.model.kernels.step import ConvStep, ScanStep
from hymba_align.model.reference import causal_conv_reference, selective_scan_reference

CPU = torch.device("cpu")
EXACT = {"atol": 1e-12, "rtol": 0}  # float64, observed 4e-15
ROWS, INNER, STATE, TAPS = 5, 7, 3, 4
STEP = ([1] * ROWS, [-1] * ROWS, list(range(ROWS)))


def random_inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def scan_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    u, dt, A, B, C, start = random_inputs(
        (ROWS, INNER), (ROWS, INNER), (INNER, STATE), (ROWS, STATE), (ROWS, STATE), (ROWS, INNER, STATE), dtype=dtype
    )
    return u, dt.abs(), -A.abs(), B, C, start


def test_a_scan_step_and_its_gradients_equal_the_recurrence_of_every_sequence() -> None:
    u, dt, A, B, C, start = inputs = scan_inputs()
    y, final = ScanStep.build(*STEP, CPU).run(*inputs)
    wanted = [
        selective_scan_reference(u[r : r + 1], dt[r : r + 1], A, B[r : r + 1], C[r : r + 1], start[r])
        for r in range(ROWS)
    ]
    assert_close(y, torch.cat([one for one, _ in wanted]), **EXACT)
    assert_close(final, torch.stack([state for _, state in wanted]), **EXACT)
    leaves = [u, B, C, start]
    found = torch.autograd.grad((y * u.detach()).sum() + final.square().sum(), leaves)
    expected = torch.autograd.grad(
        sum((one * u[r].detach()).sum() + state.square().sum() for r, (one, state) in enumerate(wanted)), leaves
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **EXACT)


@pytest.mark.parametrize("silu", [False, True])
def test_a_convolution_step_equals_the_recurrence_of_every_sequence(silu: bool) -> None:
    u, weight, bias, tails = random_inputs((ROWS, INNER), (INNER, TAPS), (INNER,), (ROWS, TAPS - 1, INNER))
    y, new_tails = ConvStep.build(*STEP[:2], STEP[2], TAPS, CPU).run(u, weight, bias, tails, silu=silu)
    wanted = torch.cat([causal_conv_reference(u[r : r + 1], weight, bias, tails[r]) for r in range(ROWS)])
    assert_close(y, torch.nn.functional.silu(wanted) if silu else wanted, **EXACT)
    assert torch.equal(new_tails, torch.cat([tails[:, 1:], u[:, None]], dim=1))
    alone = ConvStep.build([1], [-1], [0], TAPS, CPU).run(u[:1], weight, bias, tails[:1])[1]
    for kept in (new_tails, alone):  # a cache keeps it: a view would keep the oldest input too
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 0.05)])  # observed 2e-7, 0.02
def test_steps_in_lower_precision_are_those_of_the_kernels_for_rows(dtype: torch.dtype, error: float) -> None:
    u, dt, A, B, C, start = scan_inputs(dtype)
    start = start.float()
    arguments = (u, dt.float(), A.float(), B, C, torch.ones(INNER, dtype=dtype), u)
    y, final = ScanStep.build(*STEP, CPU).gated(*arguments, start)
    expected, expected_final = ChunkedScan.build(*STEP, CPU).gated(*arguments, start)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert_close(y, expected, atol=error, rtol=0)
    assert_close(final, expected_final, atol=2e-6, rtol=0)
    u, weight, bias, tails = random_inputs((ROWS, INNER), (INNER, TAPS), (INNER,), (ROWS, TAPS - 1, INNER), dtype=dtype)
    y, new_tails = ConvStep.build(*STEP, TAPS, CPU).run(u, weight, bias, tails, silu=True)
    expected, expected_tails = GatherConv.build(*STEP, TAPS, CPU).run(u, weight, bias, tails, silu=True)
    assert y.dtype == dtype
    assert_close(y, expected, atol=error, rtol=0)
    assert torch.equal(new_tails, expected_tails)


def test_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ScanStep: a step has one token per sequence, but the segments have \[1, 2\]"
    ):
        ScanStep.build([1, 2], [-1, -1], [0, 1], CPU)
    with pytest.raises(ValueError, match=r"ConvStep: a step has one token per sequence"):
        ConvStep.build([1, 1], [-1, 0], [0, -1], TAPS, CPU)
    with pytest.raises(ValueError, match=r"ConvStep: sequence s continues state s, but the segments continue \[1, 0\]"):
        ConvStep.build([1, 1], [-1, -1], [1, 0], TAPS, CPU)
    u, dt, A, B, C, _ = scan_inputs()
    with pytest.raises(ValueError, match="ScanStep: a step continues states, but none were given"):
        ScanStep.build(*STEP, CPU).run(u, dt, A, B, C)
    with pytest.raises(ValueError, match="ConvStep: a step continues tails, but none were given"):
        ConvStep.build(*STEP, TAPS, CPU).run(u, u.new_zeros(INNER, TAPS), u.new_zeros(INNER))
