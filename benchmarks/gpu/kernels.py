"""Each kernel against its roof at the 1.5B configuration, and beside the libraries that compute the same.

The roof of a kernel is the longer of two times: its bytes (every input read once, every output written once) at the
card's measured copy rate, and its floating-point operations on matrix units (attention only) at the card's measured
matrix rate. Its time is that of the device alone, without what the host takes to start it. What a kernel reads or writes besides, such as states between chunks, is its own doing and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import alternate, median_ratio
from torch import Tensor

from gpu.backends import all_of, load, why_not
from gpu.device import kernel_seconds, measure_rates, moved_bytes, waited
from gpu.findings import Finding, failed, judged
from gpu.flops import visible_pairs
from gpu.sizes import Sizes
from hymba_align.model import SegmentTree
from hymba_align.model.kernels.choice import choose_kernels

ROOF, BESIDE = "roofline", "libraries"
WANTED_SHARE = 0.7


@dataclass(frozen=True)
class Timed:
    """A kernel at the sizes of one layer."""

    name: str
    call: Callable[[Any], tuple[Tensor, ...]]
    """What a built row does with the inputs."""
    inputs: tuple[Tensor, ...]
    build: Callable[[Any], Any]
    """A row from a backend's class."""
    part: str
    flops: int = 0
    trains: bool = True

    def run(self, row: Any) -> tuple[Tensor, ...]:
        return self.call(row)


def run(sizes: Sizes) -> Iterator[Finding]:
    """Share of the roof of each chosen kernel, forward and backward."""
    rates = measure_rates(sizes)
    chosen = choose_kernels(sizes.device, sizes.dtype)
    for kernel in kernels(sizes):
        name = getattr(chosen, kernel.part)
        row = kernel.build(load(kernel.part, name))
        for direction, call, moved, flops in passes(kernel, row):
            spent = kernel_seconds(call, sizes.device, rounds=sizes.rounds)
            roof = max(moved / rates.copied, flops / rates.multiplied)
            yield judged(
                ROOF,
                f"{kernel.name}, {direction} ({name})",
                roof / spent,
                f"{roof / spent:.0%}: {1e3 * spent:.3f} ms, {moved / spent / 1e9:,.0f} GB/s, {flops / spent / 1e12:.0f} TFLOP/s",
                least=WANTED_SHARE,
                smoke=sizes.smoke,
                numbers={"seconds": spent, "bytes": moved, "flops": flops},
            )


def beside_libraries(sizes: Sizes) -> Iterator[Finding]:
    """Other backends of the same part beside the chosen one, in turns; ours and mamba-ssm's own scan of one document."""
    chosen = choose_kernels(sizes.device, sizes.dtype)
    for kernel in kernels(sizes):
        ours = getattr(chosen, kernel.part)
        for other in all_of(kernel.part):
            if other == ours:
                continue
            what = f"{kernel.name}: {ours} beside {other}"
            reason = why_not(kernel.part, other, sizes.device, sizes.dtype)
            if reason is None and sizes.smoke and other == "triton":
                reason = "Triton's interpreter takes seconds per call"
            if reason is not None:
                yield Finding(BESIDE, what, f"not run: {reason}")
                continue
            try:
                rows = {name: kernel.build(load(kernel.part, name)) for name in (ours, other)}
                yield compare(what, {name: whole(kernel, row) for name, row in rows.items()}, sizes)
            except Exception as error:  # the others are compared all the same; the table and the exit show this one
                yield failed(BESIDE, what, error)
    yield mamba_scan(sizes)


def compare(what: str, sides: dict[str, Callable[[], tuple[Tensor, ...]]], sizes: Sizes) -> Finding:
    """How many times faster the first side is than the second; stops if their outputs differ."""
    (ours, first), (_, second) = sides.items()
    for found, expected in zip(first(), second(), strict=False):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        if not error < 0.05:
            return Finding(BESIDE, what, f"outputs differ by {error:.1%}", met=False)
    found = alternate({name: waited(side, sizes.device) for name, side in sides.items()}, rounds=sizes.rounds, warmup=3)
    mine, theirs = found.values()
    ratio = median_ratio(theirs, mine)
    return Finding(BESIDE, what, f"{ours} is {ratio:.2f} times as fast", numbers={"ratio": ratio})


def whole(kernel: Timed, row: Any) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and, where it trains, backward pass of a kernel."""

    def step() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(kernel.trains):
            outputs = kernel.run(row)
        if kernel.trains:
            torch.autograd.grad(outputs[0], leaves(kernel), torch.ones_like(outputs[0]))
        return tuple(output.detach() for output in outputs)

    return step


def leaves(kernel: Timed) -> list[Tensor]:
    return [x for x in kernel.inputs if x.requires_grad]


def passes(kernel: Timed, row: Any) -> Iterator[tuple[str, Callable[[], object], int, int]]:
    """Direction, call, bytes and floating-point operations of the forward and, where it trains, the backward pass."""
    with torch.no_grad():
        outputs = kernel.run(row)
    forward = torch.no_grad()(lambda: kernel.run(row))
    yield "forward", forward, moved_bytes(*kernel.inputs, *outputs), kernel.flops
    if kernel.trains:
        outputs = kernel.run(row)
        gradient = torch.ones_like(outputs[0])

        def backward() -> object:
            return torch.autograd.grad(outputs[0], leaves(kernel), gradient, retain_graph=True)

        read = moved_bytes(*kernel.inputs, gradient)
        # Scores again, and two products for each of the forward pass's.
        yield "backward", backward, read + moved_bytes(*leaves(kernel)), kernel.flops * 5 // 2


def kernels(sizes: Sizes) -> Iterator[Timed]:
    """The kernels of one layer on a packed row, and the steps of a decoding batch."""
    config, device = sizes.config, sizes.device
    inner, state, taps, meta = config.inner_size, config.mamba_d_state, config.mamba_d_conv, config.num_memory_tokens
    lengths = [meta, *sizes.documents]
    for name, row_lengths in (("documents", lengths), ("one document", [sum(lengths)])):
        parents = [-1, *[0] * (len(row_lengths) - 1)]
        tokens, initial = sum(row_lengths), [-1] * len(row_lengths)
        xs = scan_inputs(sizes, tokens)
        yield Timed(
            f"gated scan, {name}",
            lambda row, xs=xs: row.gated(*xs),
            xs,
            lambda backend, a=(row_lengths, parents, initial): backend.build(*a, device),
            "scan",
        )
        u, weight, bias = (make(sizes, *shape) for shape in ((tokens, inner), (inner, taps), (inner,)))
        yield Timed(
            f"convolution, {name}",
            lambda row, xs=(u, weight, bias): row.run(*xs, silu=True),
            (u, weight, bias),
            lambda backend, a=(row_lengths, parents, initial, taps): backend.build(*a, device),
            "conv",
        )
    heads, groups, size, wide = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.v_head_dim,
    )
    tree = SegmentTree.from_lengths(sizes.documents)
    qkv = tuple(make(sizes, sum(lengths), *shape) for shape in ((heads, size), (groups, size), (groups, wide)))
    for is_global in (True, False):
        pairs = visible_pairs(tree, meta, None if is_global else config.sliding_window)
        yield Timed(
            f"{'global' if is_global else 'local'} attention, documents",
            lambda row, g=is_global: (row.attend(*qkv, is_global=g, stored=None),),
            qkv,
            lambda backend: backend.build(lengths, [-1, *[0] * len(sizes.documents)], config.sliding_window, device),
            "attention",
            flops=2 * pairs * heads * (size + wide),
        )
    rows = sizes.batches[-1]
    step = ([1] * rows, [-1] * rows, list(range(rows)))
    *scanned, gate = scan_inputs(sizes, rows)
    states = torch.randn(rows, inner, state, device=device)
    yield Timed(
        f"scan step, batch {rows}",
        lambda row: row.gated(*scanned, gate, states),
        (*scanned, gate, states),
        lambda backend: backend.build(*step, device),
        "scan_step",
        trains=False,
    )
    shapes = ((rows, inner), (inner, taps), (inner,), (rows, taps - 1, inner))
    stepped = tuple(make(sizes, *shape) for shape in shapes)
    yield Timed(
        f"convolution step, batch {rows}",
        lambda row: row.run(*stepped, silu=True),
        stepped,
        lambda backend: backend.build(*step, taps, device),
        "conv_step",
        trains=False,
    )


def make(sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(*shape, device=sizes.device, dtype=sizes.dtype, requires_grad=True)


def scan_inputs(sizes: Sizes, tokens: int) -> tuple[Tensor, ...]:
    """u, dt before the softplus, A, B, C, D, z as a layer makes them; step sizes, A and D are float32."""
    inner, state = sizes.config.inner_size, sizes.config.mamba_d_state

    def full(*shape: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, device=sizes.device) + shift).requires_grad_()

    A = -torch.arange(1.0, state + 1, device=sizes.device).repeat(inner, 1)
    u, B, C, z = (make(sizes, tokens, width) for width in (inner, state, state, inner))
    return u, full(tokens, inner, shift=-4.0), A.requires_grad_(), B, C, full(inner), z


def mamba_scan(sizes: Sizes) -> Finding:
    """Our scan of one document beside mamba-ssm's selective_scan_fn, which takes one sequence per batch row."""
    tokens = sizes.row_tokens
    what = f"gated scan, one document of {tokens:,}: ours beside mamba-ssm's selective_scan_fn"
    if sizes.device.type != "cuda":
        return Finding(BESIDE, what, "not run: mamba-ssm's kernels run on CUDA only")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        return Finding(BESIDE, what, f"not run: {error}")
    xs = scan_inputs(sizes, tokens)
    u, dt, A, B, C, D, z = xs
    row = load("scan", choose_kernels(sizes.device, sizes.dtype).scan).build([tokens], [-1], [-1], sizes.device)

    def ours() -> tuple[Tensor, ...]:
        return finished(row.gated(*xs)[0])

    def theirs() -> tuple[Tensor, ...]:
        across = [x.T[None].contiguous() for x in (u, dt.to(u.dtype), B, C, z)]
        y = selective_scan_fn(across[0], across[1], A, across[2], across[3], D, across[4], delta_softplus=True)
        return finished(y[0].T)

    def finished(y: Tensor) -> tuple[Tensor, ...]:
        torch.autograd.grad(y, xs, torch.ones_like(y))
        return (y.detach(),)

    return compare(what, {"ours": ours, "mamba-ssm": theirs}, sizes)
