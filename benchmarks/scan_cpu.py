"""Training step of the SSM branch on the CPU, beside transformers' Mamba mixer without CUDA kernels.

Both sides do the same work at the same sizes, with the same weights: input projection, causal convolution, step-size
and state projections, selective scan, gate, output projection; forward, backward to every weight and to the input.
They alternate in one process. This project's side uses the CPU's default backends; with HYMBA_ALIGN_KERNELS=scan=torch,conv=torch
those in plain torch.

    python benchmarks/scan_cpu.py [--output benchmarks/scan_cpu.md]

The reference takes about half a minute per step at 1,024 tokens. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measure import Table, add_options, alternate, finish, median_ratio
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from hymba_align.model.kernels.choice import choose_kernels

INNER, STATE, HIDDEN, TAPS = 512, 16, 256, 4
WANTED = {512: 40, 1024: 300}
CPU = torch.device("cpu")


def build_mixer() -> MambaMixer:
    """Transformers' mixer at I = 512, N = 16, random weights."""
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=HIDDEN, state_size=STATE, expand=INNER // HIDDEN, conv_kernel=TAPS, num_hidden_layers=1
    )
    mixer = MambaMixer(config, layer_idx=0)
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log", "D"):
            nn.init.normal_(parameter, std=0.05)
    return mixer.train()


def our_branch(mixer: MambaMixer, x_TD: Tensor) -> Tensor:
    """The same branch through this project's kernels, reading the mixer's own weights."""
    kernels = choose_kernels(CPU, x_TD.dtype)
    row = [len(x_TD)], [-1], [-1]  # one sequence from nothing
    u, z = mixer.in_proj(x_TD).chunk(2, dim=-1)
    conv = kernels.conv_row.build(*row, TAPS, CPU)
    u, _ = conv.run(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, silu=True)
    dt, B, C = mixer.x_proj(u).split([mixer.time_step_rank, STATE, STATE], dim=-1)
    scan = kernels.scan_row.build(*row, CPU)
    y, _ = scan.gated(u, mixer.dt_proj(dt), -torch.exp(mixer.A_log), B, C, mixer.D, z)
    return mixer.out_proj(y)


def step(forward: Callable[[Tensor], Tensor], mixer: MambaMixer, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and all gradients of one forward and backward pass."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    output = forward(x)
    output.square().mean().backward()
    return output.detach(), [x.grad, *(parameter.grad for parameter in mixer.parameters())]


def compare(tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step of theirs and ours.

    Raises:
        AssertionError: the two do not compute the same.
    """
    mixer = build_mixer()
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))

    def theirs() -> tuple[Tensor, list[Tensor]]:
        return step(lambda x: mixer(x[None])[0], mixer, x)

    def ours() -> tuple[Tensor, list[Tensor]]:
        return step(lambda x: our_branch(mixer, x), mixer, x)

    (expected, expected_gradients), (found, gradients) = theirs(), ours()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-2)
    seconds = alternate({"theirs": theirs, "ours": ours}, rounds=rounds, warmup=0)
    return seconds["theirs"], seconds["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels = choose_kernels(CPU, torch.float32)
    table = Table(
        "SSM branch, forward and backward, CPU",
        "python benchmarks/scan_cpu.py",
        ("tokens", "transformers' Mamba mixer, s", "hymba-align, s", "times faster", "wanted"),
        f"I = {INNER}, N = {STATE}, float32; scan: {kernels.scan}, convolution: {kernels.conv}. Medians of {arguments.rounds} rounds; "
        "the two sides alternate in one process and agree in output and in every gradient.",
    )
    missed = []
    for tokens, wanted in WANTED.items():
        slow, fast = compare(tokens, arguments.rounds)
        ratio = median_ratio(slow, fast)
        if ratio < wanted:
            missed.append(f"{ratio:.0f}x at {tokens} tokens, wanted {wanted}x")
        table.add(
            f"{tokens:,}", f"{statistics.median(slow):.2f}", f"{statistics.median(fast):.4f}", f"{ratio:.0f}", wanted
        )
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
