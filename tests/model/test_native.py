"""What the kernels in C++ compute."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba_align.model.attention import TreeAttention
from hymba_align.model.kernels import ChunkedScan, GatherConv, choice, native, native_norm, native_scan, norm
from hymba_align.model.kernels.native_attention import NativeAttention
from hymba_align.model.kernels.native_conv import NativeConv
from hymba_align.model.kernels.native_scan import NativeScan
from hymba_align.model.reference import causal_conv_reference, selective_scan_reference

CPU = torch.device("cpu")
CLOSE = 1e-5  # float32 against float64, in norm, relative to the norm or to values of size 1; observed 2.2e-6
Tree = tuple[list[int], list[int], list[int]]

MISSING = next(filter(None, map(native.why_not, ("scan", "conv", "attention", "norm"))), None)
if MISSING is not None and os.environ.get("CI"):
    pytest.fail(f"the environment variable CI is set, so the native kernels must be tested: {MISSING}", pytrace=False)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Lengths around chunk borders, parents, and given states for some of the roots."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 16, 31, 32, 33, 65]), min_size=1, max_size=7))
    parents = [draw(st.integers(-1, index - 1)) for index in range(len(lengths))]
    initial = [draw(st.integers(-1, 1)) if parent < 0 else -1 for parent in parents]
    return lengths, parents, initial


def random_inputs(tokens: int, channels: int, state: int, seed: int = 0) -> list[Tensor]:
    """u, dt_raw, A_log, B, C, D, z and two initial states, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, channels)] * 2 + [(channels, state)] + [(tokens, state)] * 2
    shapes += [(channels,), (tokens, channels), (2, channels, state)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def reference(tree: Tree, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, given_states: Tensor) -> list[Tensor]:
    """Output and final states of the recurrence, segment by segment."""
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    start = 0
    for length, parent, state in zip(*tree, strict=True):
        before = finals[parent] if parent >= 0 else given_states[state] if state >= 0 else torch.zeros_like(A)
        span = slice(start, start + length)
        output, after = selective_scan_reference(u[span], dt[span], A, B[span], C[span], before)
        outputs.append(output)
        finals.append(after)
        start += length
    return [torch.cat(outputs), torch.stack(finals)]


def results(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a fixed random sum of them; zeros for inputs that do not matter."""
    generator = torch.Generator().manual_seed(1)
    value = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)).sum()
        for output in outputs
    )
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return [
        *(output.detach() for output in outputs),
        *(torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs, strict=True)),
    ]


def run_row(row: NativeScan | ChunkedScan, inputs: list[Tensor], *, gated: bool) -> list[Tensor]:
    u, dt_raw, a_log, B, C, D, z, given_states = inputs = [x.detach().requires_grad_() for x in inputs]
    if gated:
        return results(list(row.gated(u, dt_raw, -a_log.exp(), B, C, D, z, given_states)), inputs)
    return results(list(row.run(u, F.softplus(dt_raw), -a_log.exp(), B, C, given_states)), inputs)


def run_reference(tree: Tree, inputs: list[Tensor], *, gated: bool) -> list[Tensor]:
    u, dt_raw, a_log, B, C, D, z, given_states = inputs = [x.detach().requires_grad_() for x in inputs]
    y, final = reference(tree, u, F.softplus(dt_raw), -a_log.exp(), B, C, given_states)
    if gated:
        y = (y + D * u) * F.silu(z)
    return results([y, final], inputs)


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - wanted).norm() <= CLOSE * max(wanted.norm(), wanted.numel() ** 0.5)


@settings(max_examples=40, deadline=None)
@given(
    tree=trees(),
    channels=st.sampled_from([1, 5, 16, 40, 130]),
    state=st.sampled_from([1, 3, 16]),
    gated=st.booleans(),
    seed=st.integers(0, 9),
)
@example(tree=([1] * 40, list(range(-1, 39)), [1] + [-1] * 39), channels=5, state=3, gated=True, seed=0)  # deep
@example(tree=([3] + [1] * 60, [-1] + [0] * 60, [0] + [-1] * 60), channels=5, state=16, gated=True, seed=0)  # wide
def test_outputs_and_all_gradients_equal_the_recurrence_on_any_tree(
    tree: Tree, channels: int, state: int, gated: bool, seed: int
) -> None:
    inputs = random_inputs(sum(tree[0]), channels, state, seed)
    found = run_row(NativeScan.build(*tree, CPU), [x.float() for x in inputs], gated=gated)
    assert_near(found, run_reference(tree, inputs, gated=gated))


@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129, 4097])
def test_any_length_equals_the_chunked_scan_in_float64(length: int) -> None:
    tree = [2, length, length], [-1, 0, 0], [-1, -1, -1]
    inputs = random_inputs(sum(tree[0]), 20, 16)
    found = run_row(NativeScan.build(*tree, CPU), [x.float() for x in inputs], gated=True)
    assert_near(found, run_row(ChunkedScan.build(*tree, CPU), inputs, gated=True))


def test_extreme_step_sizes_and_gates_equal_the_recurrence() -> None:
    tree = [64], [-1], [0]
    inputs = random_inputs(64, 20, 16)
    inputs[1] *= 60  # softplus from 1e-60 to 150, so that states survive untouched or vanish at once
    inputs[6] *= 60
    found = run_row(NativeScan.build(*tree, CPU), [x.float() for x in inputs], gated=True)
    assert_near(found, run_reference(tree, inputs, gated=True))


@pytest.mark.parametrize("which", [0, 1, 3, 6])
def test_nan_is_not_hidden(which: int) -> None:
    inputs = [x.float() for x in random_inputs(40, 20, 16)]
    inputs[which][7, 2] = torch.nan
    y, *_ = run_row(NativeScan.build([40], [-1], [0], CPU), inputs, gated=True)
    assert not y[:7].isnan().any()
    assert y[7].isnan().any()


@pytest.mark.parametrize("state", [4, 16])
def test_all_bits_are_the_same_with_one_two_and_three_threads(state: int, threads: Callable[[int], None]) -> None:
    tree = [20, 50, 40, 7], [-1, 0, 0, 2], [1, -1, -1, -1]
    inputs = [x.float() for x in random_inputs(117, 300, state)]
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run_row(NativeScan.build(*tree, CPU), inputs, gated=True))
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_no_bit_of_a_document_depends_on_its_neighbours_or_its_place() -> None:
    inputs = [x.float() for x in random_inputs(10 + 70 + 45, 37, 16)]
    tree = [10, 70, 45], [-1, 0, 0], [-1, -1, -1]
    whole = run_row(NativeScan.build(*tree, CPU), inputs, gated=True)
    # the same without the document in the middle, so that the last one starts elsewhere
    kept = torch.cat([torch.arange(10), torch.arange(80, 125)])
    per_token = (0, 1, 3, 4, 6)
    fewer = [x[kept] if index in per_token else x for index, x in enumerate(inputs)]
    part = run_row(NativeScan.build([10, 45], [-1, 0], [-1, -1], CPU), fewer, gated=True)
    assert torch.equal(whole[0][kept], part[0])
    assert torch.equal(whole[1][[0, 2]], part[1])

    y, final = (outputs[:2] for outputs in (whole, part))  # gradients of the last document alone
    assert len(y) == len(final) == 2
    gradients = []
    for row, xs, start in (
        (NativeScan.build(*tree, CPU), inputs, 80),
        (NativeScan.build([10, 45], [-1, 0], [-1, -1], CPU), fewer, 10),
    ):
        u, dt, a_log, B, C, D, z, _ = xs = [x.detach().requires_grad_() for x in xs]
        output, _ = row.gated(u, dt, -a_log.exp(), B, C, D, z)
        gradients.append([x[-45:] for x in torch.autograd.grad(output[start:].square().sum(), [u, dt, B, C, z])])
    for ours, others in zip(*gradients, strict=True):
        assert torch.equal(ours, others)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = [x.bfloat16() for x in random_inputs(50, 20, 16)]
    row = NativeScan.build([30, 20], [-1, 0], [1, -1], CPU)
    y, final, *gradients = run_row(row, inputs, gated=True)
    expected, expected_final, *_ = run_row(row, [x.float() for x in inputs], gated=True)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    # A = -exp(A_log) is rounded to bfloat16 in one and not in the other
    assert (y.float() - expected).norm() <= 2e-2 * expected.norm()  # observed 4e-3
    assert (final - expected_final).norm() <= 2e-2 * expected_final.norm()


def test_inputs_need_not_lie_beside_each_other_in_memory() -> None:
    inputs = [x.float() for x in random_inputs(50, 20, 16)]
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
    sliced = [torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., x.shape[-1] :] for x in inputs]
    row = NativeScan.build([30, 20], [-1, 0], [1, -1], CPU)
    expected = run_row(row, inputs, gated=True)
    for other in (strided, sliced):
        assert not any(x.is_contiguous() for x in other if x.ndim > 1)
        for found, wanted in zip(run_row(row, other, gated=True), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_segment_of_no_tokens_hands_its_state_on() -> None:
    inputs = random_inputs(5, 4, 3)
    row = NativeScan.build([0, 5], [-1, 0], [1, -1], CPU)
    found = run_row(row, [x.float() for x in inputs], gated=False)
    assert_near([found[0]], [run_reference(([5], [-1], [1]), inputs, gated=False)[0]])


def test_what_the_kernel_cannot_do_is_an_error() -> None:
    u, dt, A, B, C, *_ = random_inputs(2, 3, 4)
    with pytest.raises(ValueError) as error:
        NativeScan.build([2], [-1], [-1], CPU).run(u, dt, A, B, C)
    assert (
        str(error.value) == "native scan: u is torch.float64 on cpu; it computes in float32 on the CPU, use scan=torch"
    )
    with pytest.raises(ValueError, match=r"^initial_states: the plan refers to 1 of them, but none were given$"):
        NativeScan.build([2], [-1], [0], CPU).run(u.float(), dt.float(), A.float(), B.float(), C.float())
    assert native_scan.unavailable(CPU, torch.float32) is None
    assert native_scan.unavailable(CPU, torch.bfloat16) is None
    assert native_scan.unavailable(CPU, torch.float64) == (
        "the native scan computes in float32: use scan=torch for float64"
    )
    assert native_scan.unavailable(torch.device("cuda"), torch.float32) == (
        "the native scan runs on the CPU, not on cuda: use scan=triton there"
    )


@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "D", "z", "initial_states"])
def test_an_input_of_another_shape_is_refused_and_never_read_beyond_its_end(name: str) -> None:
    names = ["u", "dt", "A", "B", "C", "D", "z", "initial_states"]
    inputs = {key: x.float() for key, x in zip(names, random_inputs(6, 3, 4), strict=True)}
    wanted = tuple(inputs[name].shape)
    inputs[name] = inputs[name][:1]
    row = NativeScan.build([2, 4], [-1, -1], [0, 1], CPU)
    with pytest.raises(ValueError) as error:
        row.gated(*inputs.values())
    found = (1, *wanted[1:])
    assert str(error.value) == f"native scan: {name} has the shape {found}, not {wanted}"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("conv", r"^native conv: u has the shape \(5, 3\), not \(6, 3\)$"),
        ("taps", r"^native conv: weight has the shape \(3, 5\), not \(3, 4\)$"),
        ("tails", r"^native conv: initial_tails has the shape \(1, 3, 3\), not \(2, 3, 3\)$"),
        ("attention", r"^native attention: k has the shape \(5, 1, 8\), not \(6, 1, 8\)$"),
        ("queries", r"^native attention: q has the shape \(6, 2, 8\), not \(4, 2, 8\)$"),
        ("norm", r"^native norm: x has the shape \(6, 3\), not \(6, 4\)$"),
    ],
)
def test_no_kernel_reads_beyond_the_end_of_an_input(part: str, message: str) -> None:
    conv, attention = NativeConv.build([2, 4], [-1, -1], [0, 1], 4, CPU), NativeAttention.build([2, 4], [-1, 0], 9, CPU)
    q, k, v = torch.zeros(6, 2, 8), torch.zeros(6, 1, 8), torch.zeros(6, 1, 16)
    u, tails, bias = torch.zeros(6, 3), torch.zeros(2, 3, 3), torch.zeros(3)
    calls: dict[str, Callable[[], object]] = {
        "conv": lambda: conv.run(u[:5], torch.zeros(3, 4), bias, tails),
        "taps": lambda: conv.run(u, torch.zeros(3, 5), bias, tails),
        "tails": lambda: conv.run(u, torch.zeros(3, 4), bias, tails[:1]),
        "attention": lambda: attention.attend(q, k[:5], v, is_global=True, stored=None),
        "queries": lambda: attention.without_queries(2).attend(q, k, v, is_global=True, stored=None),
        "norm": lambda: native_norm.rms_norm(u, torch.zeros(4), 1e-6),
    }
    with pytest.raises(ValueError, match=message):
        calls[part]()


@pytest.mark.parametrize("part", ["scan", "conv", "attention", "norm"])
def test_the_reason_names_a_backend_that_there_is(part: str) -> None:
    for device, dtype in ((CPU, torch.float64), (torch.device("cuda"), torch.float32), (torch.device("mps"), None)):
        reason = native.unavailable(part, device, dtype or torch.float32)
        assert reason is not None
        asked = reason.partition(": use ")[2].split()[0]
        assert asked.partition("=")[2] in choice.BACKENDS[part]
        assert asked.partition("=")[0] == part


def test_a_forked_process_computes_the_same_to_the_bit(threads: Callable[[int], None]) -> None:
    threads(2)
    inputs = [x.float() for x in random_inputs(50, 300, 16)]
    row = NativeScan.build([30, 20], [-1, 0], [1, -1], CPU)
    expected, _ = row.gated(*inputs)  # threads have run before the fork
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
        child = context.Process(target=lambda: sender.send_bytes(row.gated(*inputs)[0].numpy().tobytes()))
        child.start()
    assert receiver.poll(60)
    assert receiver.recv_bytes() == expected.numpy().tobytes()
    child.join(60)
    assert child.exitcode == 0


# The convolution


def run_conv(row: NativeConv | GatherConv, inputs: list[Tensor], *, silu: bool) -> list[Tensor]:
    u, weight, bias, given_tails = inputs = [x.detach().requires_grad_() for x in inputs]
    return results(list(row.run(u, weight, bias, given_tails, silu=silu)), inputs)


def conv_inputs(tokens: int, channels: int, taps: int, seed: int = 0) -> list[Tensor]:
    """u, weight, bias and two given tails, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, channels), (channels, taps), (channels,), (2, taps - 1, channels)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    tree=trees(),
    channels=st.sampled_from([1, 5, 16, 40, 130]),
    taps=st.integers(1, 6),
    silu=st.booleans(),
    seed=st.integers(0, 9),
)
@example(tree=([1] * 40, list(range(-1, 39)), [1] + [-1] * 39), channels=5, taps=4, silu=True, seed=0)  # deep
@example(tree=([3] + [1] * 60, [-1] + [0] * 60, [0] + [-1] * 60), channels=5, taps=4, silu=True, seed=0)  # wide
def test_the_convolution_and_all_its_gradients_equal_the_definition_on_any_tree(
    tree: Tree, channels: int, taps: int, silu: bool, seed: int
) -> None:
    inputs = conv_inputs(sum(tree[0]), channels, taps, seed)
    found = run_conv(NativeConv.build(*tree, taps, CPU), [x.float() for x in inputs], silu=silu)

    u, weight, bias, given_tails = inputs = [x.requires_grad_() for x in inputs]
    outputs: list[Tensor] = []
    tails: list[Tensor] = []
    for own, parent, tail in zip(u.split(tree[0]), *tree[1:], strict=True):
        nothing = u.new_zeros(taps - 1, channels)
        before = tails[parent] if parent >= 0 else given_tails[tail] if tail >= 0 else nothing
        outputs.append(causal_conv_reference(own, weight, bias, before))
        tails.append(torch.cat([before, own])[len(own) :])
    y = torch.cat(outputs)
    assert_near(found, results([F.silu(y) if silu else y, torch.stack(tails)], inputs))


@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129, 4097])
def test_a_convolution_of_any_length_equals_the_plain_one_in_float64(length: int) -> None:
    tree = [2, length, length], [-1, 0, 0], [-1, -1, -1]
    inputs = conv_inputs(sum(tree[0]), 20, 4)
    found = run_conv(NativeConv.build(*tree, 4, CPU), [x.float() for x in inputs], silu=True)
    assert_near(found, run_conv(GatherConv.build(*tree, 4, CPU), inputs, silu=True))


def test_all_bits_of_the_convolution_are_the_same_with_one_two_and_three_threads(
    threads: Callable[[int], None],
) -> None:
    inputs = [x.float() for x in conv_inputs(117, 300, 4)]
    row = NativeConv.build([20, 50, 40, 7], [-1, 0, 0, 2], [1, -1, -1, -1], 4, CPU)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run_conv(row, inputs, silu=True))
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_the_convolution_of_a_document_does_not_depend_on_its_neighbours() -> None:
    u, weight, bias, _ = (x.float() for x in conv_inputs(125, 37, 4))
    kept = torch.cat([torch.arange(10), torch.arange(80, 125)])
    y, tails = NativeConv.build([10, 70, 45], [-1, 0, 0], [-1] * 3, 4, CPU).run(u, weight, bias, silu=True)
    alone, own_tails = NativeConv.build([10, 45], [-1, 0], [-1] * 2, 4, CPU).run(u[kept], weight, bias, silu=True)
    assert torch.equal(y[kept], alone)
    assert torch.equal(tails[[0, 2]], own_tails)


def test_a_convolution_in_bfloat16_or_of_strided_inputs_computes_the_same() -> None:
    inputs = [x.float() for x in conv_inputs(50, 20, 4)]
    row = NativeConv.build([30, 20], [-1, 0], [1, -1], 4, CPU)
    expected = run_conv(row, inputs, silu=True)
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
    for found, wanted in zip(run_conv(row, strided, silu=True), expected, strict=True):
        assert torch.equal(found, wanted)
    rounded = [x.bfloat16() for x in inputs]
    expected = run_conv(row, [x.float() for x in rounded], silu=True)
    for index, (found, wanted) in enumerate(zip(run_conv(row, rounded, silu=True), expected, strict=True)):
        assert found.dtype == torch.bfloat16
        if index < 2:  # the gradients start from another random sum, rounded
            assert torch.equal(found, wanted.bfloat16())


def test_a_plan_with_given_tails_needs_them() -> None:
    u, weight, bias, _ = (x.float() for x in conv_inputs(2, 3, 4))
    with pytest.raises(ValueError, match=r"^initial_tails: the plan refers to 1 of them, but none were given$"):
        NativeConv.build([2], [-1], [0], 4, CPU).run(u, weight, bias)


# Attention


@st.composite
def attention_trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Meta tokens and segments below them."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 35]), min_size=1, max_size=7))
    return [5, *lengths], [-1, *(draw(st.integers(0, index)) for index in range(len(lengths)))]


def attention_inputs(tokens: int, heads: int, groups: int, sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """q, k and v in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, sizes[0]), (tokens, groups, sizes[0]), (tokens, groups, sizes[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run_attention(row: NativeAttention | TreeAttention, inputs: list[Tensor], *, is_global: bool) -> list[Tensor]:
    q, k, v = inputs = [x.detach().requires_grad_() for x in inputs]
    return results([row.attend(q, k, v, is_global=is_global, stored=None)], inputs)


def visible(lengths: list[int], parents: list[int], window: int | None) -> Tensor:
    """(L, L) by the definition: True where a token (row) sees a key (column)."""
    segment = [index for index, length in enumerate(lengths) for _ in range(length)]
    paths: list[list[int]] = []
    starts: list[int] = []
    for index, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), index])
        starts.append(starts[parent] + lengths[parent] if parent >= 0 else 0)
    offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    place = [starts[s] + token - offsets[s] for token, s in enumerate(segment)]
    seen = torch.zeros(len(segment), len(segment), dtype=torch.bool)
    for query, own in enumerate(segment):
        for key, other in enumerate(segment):
            near = window is None or other == 0 or place[query] - place[key] <= window
            seen[query, key] = other in paths[own] and place[key] <= place[query] and near
    return seen


@settings(max_examples=40, deadline=None)
@given(
    tree=attention_trees(),
    window=st.sampled_from([None, 1, 6, 20]),
    heads=st.sampled_from([(1, 1), (4, 2), (10, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 16), (32, 64), (5, 3), (20, 40)]),
    seed=st.integers(0, 9),
)
def test_attention_and_its_gradients_equal_the_definition_on_any_tree(
    tree: tuple[list[int], list[int]], window: int | None, heads: tuple[int, int], sizes: tuple[int, int], seed: int
) -> None:
    inputs = attention_inputs(sum(tree[0]), *heads, sizes, seed)
    row = NativeAttention.build(*tree, window or 1, CPU)
    found = run_attention(row, [x.float() for x in inputs], is_global=window is None)

    q, k, v = inputs = [x.requires_grad_() for x in inputs]
    repeat = heads[0] // heads[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) / sizes[0] ** 0.5
    weights = scores.masked_fill(~visible(*tree, window), -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khe->qhe", weights, v.repeat_interleave(repeat, 1)).flatten(1)
    assert_near(found, results([out], inputs))


@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129, 1025])
@pytest.mark.parametrize("is_global", [True, False])
def test_attention_of_any_length_equals_the_plain_one_in_float64(length: int, is_global: bool) -> None:
    tree = [7, length, length], [-1, 0, 0]
    inputs = attention_inputs(sum(tree[0]), 5, 1, (8, 16))
    found = run_attention(NativeAttention.build(*tree, 100, CPU), [x.float() for x in inputs], is_global=is_global)
    assert_near(found, run_attention(TreeAttention.build(*tree, 100, CPU), inputs, is_global=is_global))


def test_the_plain_attention_of_a_long_document_holds_few_masks() -> None:
    row = TreeAttention.build([7, 20_000], [-1, 0], 1000, CPU)
    masks = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in (b.mask for b in (*row.full, *row.windowed))}
    assert len(row.windowed) == 41
    assert sum(storage.nbytes() for storage in masks.values()) < 20 * 2**20  # a mask per piece: 220 MB


def test_scores_of_any_size_make_no_nan() -> None:
    tree = [7, 60], [-1, 0]
    q, k, v = attention_inputs(67, 2, 1, (8, 16))
    inputs = [q * 40, k * 40, v]
    found = run_attention(NativeAttention.build(*tree, 9, CPU), [x.float() for x in inputs], is_global=False)
    expected = run_attention(TreeAttention.build(*tree, 9, CPU), inputs, is_global=False)
    assert (found[0].double() - expected[0]).abs().max() <= 2e-3  # scores near 1e4 have steps of 1e-3; observed 3e-4
    assert all(x.isfinite().all() for x in found)


def test_all_bits_of_attention_are_the_same_with_one_two_and_three_threads(threads: Callable[[int], None]) -> None:
    row = NativeAttention.build([20, 150, 40, 7], [-1, 0, 0, 2], 30, CPU)
    inputs = [x.float() for x in attention_inputs(217, 6, 3, (8, 16))]
    for is_global in (True, False):
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(run_attention(row, inputs, is_global=is_global))
        for one, two, three in zip(*found, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)


def test_attention_of_a_document_does_not_depend_on_its_neighbours_or_on_later_tokens() -> None:
    inputs = [x.float() for x in attention_inputs(125, 4, 2, (8, 16))]
    kept = torch.cat([torch.arange(10), torch.arange(80, 125)])
    row = NativeAttention.build([10, 70, 45], [-1, 0, 0], 20, CPU)
    alone = NativeAttention.build([10, 45], [-1, 0], 20, CPU)
    for is_global in (True, False):
        y = row.attend(*inputs, is_global=is_global, stored=None)
        assert torch.equal(y[kept], alone.attend(*(x[kept] for x in inputs), is_global=is_global, stored=None))
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[100:] = 7.0
        assert torch.equal(y[:100], row.attend(*changed, is_global=is_global, stored=None)[:100])


def test_attention_in_bfloat16_or_of_strided_inputs_computes_the_same() -> None:
    row = NativeAttention.build([10, 40], [-1, 0], 20, CPU)
    inputs = [x.float() for x in attention_inputs(50, 4, 2, (8, 16))]
    expected = run_attention(row, inputs, is_global=True)
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
    sliced = [torch.cat([torch.full_like(x, torch.nan), x], dim=1)[:, x.shape[1] :] for x in inputs]
    for other in (strided, sliced):
        for found, wanted in zip(run_attention(row, other, is_global=True), expected, strict=True):
            assert torch.equal(found, wanted)
    rounded = [x.bfloat16() for x in inputs]
    found, *gradients = run_attention(row, rounded, is_global=True)
    assert torch.equal(found, run_attention(row, [x.float() for x in rounded], is_global=True)[0].bfloat16())
    assert {x.dtype for x in gradients} == {torch.bfloat16}


def test_attention_keeps_no_scores_for_the_backward_pass() -> None:
    inputs = [x.float().requires_grad_() for x in attention_inputs(1010, 4, 2, (8, 16))]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        NativeAttention.build([10, 1000], [-1, 0], 20, CPU).attend(*inputs, is_global=True, stored=None)
    assert sum(kept) < 1010 * (4 * 8 + 2 * 8 + 2 * 16 + 4 * 16 + 4 * 2) + 1  # q, k, v, output, two numbers per row


# The norm


@pytest.mark.parametrize("size", [1, 5, 16, 40, 512, 513])
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
def test_the_norm_and_its_gradients_equal_the_definition(size: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, size), (size,)))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    wanted = results([weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()], inputs)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    assert_near(results([native_norm.rms_norm(*inputs, 1e-3)], inputs), wanted)


def test_all_bits_of_the_norm_are_the_same_with_one_two_and_three_threads(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(300, 100, generator=generator)
    inputs = [whole[:, 30:].requires_grad_(), torch.randn(70, generator=generator, requires_grad=True)]
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results([native_norm.rms_norm(*inputs, 1e-6)], inputs))
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_norm_in_bfloat16_rounds_where_the_plain_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 70, generator=generator).bfloat16()
    for weight in (torch.randn(70, generator=generator), torch.randn(70, generator=generator).bfloat16()):
        found, wanted = native_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6)
        assert found.dtype == wanted.dtype
        step = torch.finfo(torch.bfloat16).eps  # float32 sums in another order may round to the neighbour
        assert ((found - wanted).abs() <= step * wanted.abs()).all()
        assert (found == wanted).float().mean() > 0.99
