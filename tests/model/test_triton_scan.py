"""The Triton scan against the textbook recurrence in float64, its kernels run by Triton's interpreter or on a GPU.

The interpreter is chosen when triton is first imported, by TRITON_INTERPRET=1, and then for the whole process. So these
tests run where that is set or a GPU is; in any other process the first test runs the others in a process of their own,
which leaves this one as it was, whatever ran before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model.kernels import triton_scan
from hymba_align.model.kernels.triton_scan import TritonScan, chunk_steps, unavailable
from hymba_align.model.reference import selective_scan_reference

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS_HERE = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not RUNS_HERE, reason="run by the first test, in a process that interprets Triton")

Tree = tuple[list[int], list[int], list[int]]
CHAIN: Tree = ([1, 2, 3, 4, 5] * 4, list(range(-1, 19)), [1] + [-1] * 19)
WIDE: Tree = ([17, *[1, 2, 3, 5, 1, 2] * 5], [-1] + [0] * 30, [-1] * 31)
MIXED: Tree = ([18, 1, 33, 2, 1, 16, 3], [-1, 0, 0, 1, -1, -1, 3], [0, -1, -1, -1, -1, 0, -1])


@pytest.mark.skipif(RUNS_HERE, reason="this process runs the kernels itself")
@pytest.mark.timeout(1200)
def test_the_scan_is_exact_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "passed, 1 skipped" in ran.stdout, ran.stdout[-4000:]  # that one is this test


def make_inputs(tokens: int, channels: int, state: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `gated` in float64, and two given states."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (tokens, channels),
        "dt": (tokens, channels),
        "A": (channels, state),
        "B": (tokens, state),
        "C": (tokens, state),
        "D": (channels,),
        "z": (tokens, channels),
        "initial": (2, channels, state),
    }
    inputs = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["A"] = -torch.exp(inputs["A"])
    return inputs


def scan_tree(tree: Tree, inputs: dict[str, Tensor], gated: bool) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, segment by segment."""
    u, dt, A, B, C, D, z, initial = inputs.values()
    if gated:
        dt = F.softplus(dt)
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    start = 0
    for length, parent, state in zip(*tree, strict=True):
        span = slice(start, start + length)
        before = finals[parent] if parent >= 0 else initial[state] if state >= 0 else torch.zeros_like(A)
        output, final = selective_scan_reference(u[span], dt[span], A, B[span], C[span], before)
        outputs.append(output)
        finals.append(final)
        start += length
    y = torch.cat(outputs)
    return (y + D * u) * F.silu(z) if gated else y, torch.stack(finals)


def run_kernels(tree: Tree, inputs: dict[str, Tensor], gated: bool) -> tuple[Tensor, Tensor]:
    plan = TritonScan.build(*tree, DEVICE)
    u, dt, A, B, C, D, z, initial = inputs.values()
    return plan.gated(u, dt, A, B, C, D, z, initial) if gated else plan.run(u, dt, A, B, C, initial)


def both(tree: Tree, channels: int, state: int, *, gated: bool, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Name and error of outputs and gradients, relative to the largest element of the float64 result."""
    exact = make_inputs(sum(tree[0]), channels, state)
    if not gated:
        exact["dt"] = F.softplus(exact["dt"])
    for name in ("u", "B", "C", "z"):
        exact[name] = exact[name].to(dtype).double()
    ours = {}
    for name, value in exact.items():
        ours[name] = value.to(DEVICE, dtype if name in ("u", "B", "C", "z") else torch.float32).requires_grad_()
        value.requires_grad_()
    y, final = run_kernels(tree, ours, gated)
    wanted_y, wanted_final = scan_tree(tree, exact, gated)
    assert y.dtype == (dtype if gated else torch.float32)
    assert final.dtype == torch.float32
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in (y, final)]
    weights[0] = weights[0].to(y.dtype).float()
    names = [name for name in exact if gated or name not in ("D", "z")]
    found = torch.autograd.grad(
        [y, final], [ours[name] for name in names], [weights[0].to(y), weights[1].to(final)], allow_unused=False
    )
    wanted = torch.autograd.grad(
        [wanted_y, wanted_final],
        [exact[name] for name in names],
        [weight.double() for weight in weights],
        materialize_grads=True,
    )
    for name, a, b in zip(["y", "final", *names], [y, final, *found], [wanted_y, wanted_final, *wanted], strict=True):
        if name in ours:
            assert a.dtype == ours[name].dtype, name
        scale = b.detach().abs().max().clamp_min(1e-30)
        yield name, float((a.detach().double().cpu() - b.detach()).abs().max() / scale)


FLOAT32 = 2e-6  # of the largest element; observed 4e-7
BFLOAT16 = 1.6e-2  # two units in the last place of bfloat16, which the interpreter rounds badly; observed 4e-3


@needs_kernels
@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129])
def test_documents_of_odd_lengths_equal_the_recurrence(length: int) -> None:
    for name, error in both(([length], [-1], [-1]), 5, 3, gated=False, dtype=torch.float32):
        assert error < FLOAT32, name


@needs_kernels
@pytest.mark.timeout(1200)
def test_a_long_document_equals_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = chunk_steps(4097)
    # In chunks of 64 tokens, as a row of 4,097 has, of which the interpreter would take minutes.
    monkeypatch.setattr(triton_scan, "CHUNKS", 9)
    assert chunk_steps(513) == steps == 64
    for name, error in both(([513], [-1], [-1]), 4, 2, gated=False, dtype=torch.float32):
        assert error < 3 * FLOAT32, name  # dA sums 513 tokens


@needs_kernels
@pytest.mark.parametrize("tree", [CHAIN, WIDE, MIXED], ids=["chain", "wide", "mixed"])
def test_trees_equal_the_recurrence(tree: Tree) -> None:
    for name, error in both(tree, 5, 3, gated=False, dtype=torch.float32):
        assert error < FLOAT32, name


@needs_kernels
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_the_gated_branch_equals_its_parts_with_channels_beyond_a_block(dtype: torch.dtype, bound: float) -> None:
    for name, error in both(([19, 2, 17], [-1, 0, 0], [1, -1, -1]), 37, 5, gated=True, dtype=dtype):
        assert error < bound, name


@needs_kernels
def test_bfloat16_inputs_give_float32_outputs_and_states() -> None:
    errors = dict(both(([20, 3], [-1, 0], [-1, -1]), 4, 2, gated=False, dtype=torch.bfloat16))
    for name in ("y", "final", "dt", "A"):
        assert errors[name] < FLOAT32, name
    for name in ("u", "B", "C"):
        assert errors[name] < BFLOAT16, name


@needs_kernels
@pytest.mark.parametrize("output", [0, 1], ids=["y", "final"])
def test_gradients_flow_from_one_output_alone(output: int) -> None:
    tree: Tree = ([5, 18, 1], [-1, 0, 0], [0, -1, -1])
    exact = make_inputs(24, 3, 2)
    exact["dt"] = F.softplus(exact["dt"])
    ours = {name: value.to(DEVICE, torch.float32).requires_grad_() for name, value in exact.items()}
    for value in exact.values():
        value.requires_grad_()
    names = ["u", "dt", "A", "B", "initial"]
    found = torch.autograd.grad(run_kernels(tree, ours, False)[output].sum(), [ours[name] for name in names])
    wanted = torch.autograd.grad(scan_tree(tree, exact, False)[output].sum(), [exact[name] for name in names])
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.cpu().double(), b, atol=2e-5, rtol=2e-5)  # float32, observed 2e-6


@needs_kernels
def test_the_halves_of_a_projection_need_no_copy_and_give_the_same() -> None:
    inputs = {name: value.to(DEVICE, torch.float32) for name, value in make_inputs(20, 6, 2).items()}
    tree: Tree = ([20], [-1], [-1])
    wanted, _ = run_kernels(tree, inputs, True)
    u, z = torch.cat([inputs["u"], inputs["z"]], dim=1).split(6, dim=1)
    found, _ = run_kernels(tree, {**inputs, "u": u, "z": z}, True)
    assert torch.equal(found, wanted)


@needs_kernels
def test_a_repeated_run_gives_the_same_bits() -> None:
    def gradients() -> tuple[Tensor, ...]:
        inputs = {name: x.to(DEVICE, torch.float32).requires_grad_() for name, x in make_inputs(20, 6, 2).items()}
        y, final = run_kernels(([3, 17], [-1, 0], [-1, -1]), inputs, True)
        return torch.autograd.grad(y.sum() + final.sum(), [inputs[name] for name in ("u", "A", "B", "C", "D")])

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_a_plan_with_given_states_needs_them() -> None:
    x = torch.zeros(2, 3)
    plan = TritonScan.build([2], [-1], [0], CPU)
    with pytest.raises(ValueError, match="refers to initial states, but none were given"):
        plan.run(x, x, torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 4))


def test_float64_is_refused() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in float32; use the backend scan=torch for float64"):
        TritonScan.build([2], [-1], [-1], CPU).run(x, x, x.T, x, x)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable(CPU, torch.float32) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert unavailable(torch.device("cuda"), torch.bfloat16) is None
    assert unavailable(torch.device("cuda"), torch.float16) == (
        "the Triton kernels take float32 and bfloat16, not float16"
    )
    assert unavailable(CPU, torch.float32) == (
        "the Triton kernels need a GPU; to try them on the CPU, set TRITON_INTERPRET=1 before Python starts"
    )
    assert unavailable(torch.device("mps"), torch.float32) == "the Triton kernels run on CUDA, not on mps"


def test_without_triton_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unavailable(torch.device("cuda"), torch.float32) == "triton is not installed: pip install triton"


def test_a_long_row_has_about_as_many_chunks_as_a_shorter_one() -> None:
    assert [chunk_steps(total) for total in (1, 2048, 2049, 8192, 32768, 10**6)] == [16, 16, 32, 64, 256, 256]


def test_a_plan_hands_states_down_only_where_another_chunk_continues() -> None:
    plan = TritonScan.build([20, 3, 16], [-1, 0, 0], [-1, -1, -1], CPU)
    assert plan.continued.tolist() == [0, 1]  # both of the root's; the children's are last
    assert plan.continuing.tolist() == [1, 2, 3]
    assert plan.chunks[:, 2].tolist() == [-1, 0, 1, 1]
    assert [level.tolist() for level in plan.levels] == [[0]]
    assert [level.tolist() for level in plan.levels_back] == [[0], [1, 2]]
