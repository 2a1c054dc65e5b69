"""Training step of the SSM branch on the CPU, beside transformers' Mamba mixer without CUDA kernels.

Both sides do the same work at the same sizes, with the same weights: input projection, causal convolution, step-size
and state projections, selective scan, gate, output projection; forward, backward to every weight and to the input.
They alternate in one process and the medians are compared.

    python benchmarks/scan_cpu.py [--output benchmarks/scan_cpu.md]

The reference takes about half a minute per step at 1,024 tokens. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from hymba_align.model.kernels import ChunkedScan, GatherConv, causal_conv, selective_scan

INNER, STATE, HIDDEN, TAPS = 512, 16, 256, 4
TARGETS = {512: 40, 1024: 300}


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
    tokens = len(x_TD)
    cpu = torch.device("cpu")
    u, z = mixer.in_proj(x_TD).chunk(2, dim=-1)
    conv = GatherConv.build([tokens], [-1], [-1], TAPS, cpu)
    u, _ = causal_conv(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, conv)
    u = nn.functional.silu(u)
    dt, B, C = mixer.x_proj(u).split([mixer.time_step_rank, STATE, STATE], dim=-1)
    dt = nn.functional.softplus(mixer.dt_proj(dt))
    y, _ = selective_scan(u, dt, -torch.exp(mixer.A_log), B, C, ChunkedScan.build([tokens], [-1], [-1], cpu))
    return mixer.out_proj((y + mixer.D * u) * nn.functional.silu(z))


def time_step(forward: Callable[[Tensor], Tensor], mixer: MambaMixer, x: Tensor) -> tuple[float, Tensor, list[Tensor]]:
    """Seconds of one forward and backward pass, its output and its gradients."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    start = time.perf_counter()
    output = forward(x)
    output.square().mean().backward()
    seconds = time.perf_counter() - start
    return seconds, output.detach(), [x.grad, *(parameter.grad.clone() for parameter in mixer.parameters())]


def compare(tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step of theirs and ours, in turn; stops if the two do not compute the same."""
    mixer = build_mixer()
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))

    def theirs(x: Tensor) -> Tensor:
        return mixer(x[None])[0]

    def ours(x: Tensor) -> Tensor:
        return our_branch(mixer, x)

    time_step(ours, mixer, x)
    slow, fast = [], []
    for _ in range(rounds):
        seconds, expected, expected_gradients = time_step(theirs, mixer, x)
        slow.append(seconds)
        for _ in range(5):
            seconds, found, gradients = time_step(ours, mixer, x)
            fast.append(seconds)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-2)
    return slow, fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of one reference step and five of ours")
    arguments = parser.parse_args()
    lines = [
        "# SSM branch, forward and backward, CPU",
        "",
        f"`python benchmarks/scan_cpu.py`, {datetime.date.today()}, {torch.get_num_threads()} threads of a shared {platform.machine()} machine, "
        f"torch {torch.__version__}, transformers {transformers.__version__}. I = {INNER}, N = {STATE}, float32. "
        "Medians; the two sides alternate in one process and agree in output and in every gradient.",
        "",
        "| tokens | transformers' Mamba mixer, s | hymba-align, s | times faster | wanted |",
        "|---|---|---|---|---|",
    ]
    missed = []
    for tokens, target in TARGETS.items():
        slow, fast = (statistics.median(seconds) for seconds in compare(tokens, arguments.rounds))
        if slow / fast < target:
            missed.append(tokens)
        lines.append(f"| {tokens:,} | {slow:.2f} | {fast:.4f} | {slow / fast:.0f} | {target} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        arguments.output.write_text(table)
    if missed:
        raise SystemExit(f"slower than wanted at {missed} tokens")


if __name__ == "__main__":
    main()
