"""Time on the device, and the card's own rates: what it copies and multiplies when nothing is in the way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.findings import Finding
from gpu.sizes import Sizes

SECTION = "card"


@dataclass(frozen=True)
class Rates:
    """What the roofs are made of."""

    copied: float
    """bytes per second read and written by a copy on the device"""
    multiplied: float
    """floating-point operations per second of a product of dense matrices in the sizes' dtype"""


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waited(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`call`, ending when the device has done it: a side for `measure.alternate`."""

    def run() -> None:
        call()
        synchronise(device)

    return run


def seconds(call: Callable[[], object], device: torch.device, *, rounds: int = 5, calls: int = 10) -> float:
    """Median over rounds of the mean seconds of `calls` calls in a row, after a warm-up."""
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    calls = calls if device.type == "cuda" else 1
    found = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def kernel_seconds(call: Callable[[], object], device: torch.device, *, rounds: int = 5, calls: int = 10) -> float:
    """Median over rounds of the seconds per call in which the device works, launches by the host left out.

    A kernel of some tens of microseconds takes the host longer to start than the device to run. On a CPU, where the
    two are one, this is `seconds`.
    """
    if device.type != "cuda":
        return seconds(call, device, rounds=rounds, calls=calls)
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        synchronise(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                call()
            synchronise(device)
        found.append(sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / calls)
    if not min(found):
        raise RuntimeError("torch's profiler saw no kernels on the device, so their time is not known")
    return statistics.median(found)


def measure_rates(sizes: Sizes) -> Rates:
    """The card's rates; random matrices, because a card multiplies zeros faster than it multiplies data."""
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=sizes.device).random_()
    target = torch.empty_like(source)
    copied = 2 * sizes.copied_bytes / seconds(lambda: target.copy_(source), sizes.device, rounds=sizes.rounds)
    a, b = (torch.randn(sizes.matmul, sizes.matmul, dtype=sizes.dtype, device=sizes.device) for _ in range(2))
    multiplied = 2 * sizes.matmul**3 / seconds(lambda: a @ b, sizes.device, rounds=sizes.rounds)
    return Rates(copied, multiplied)


def run(sizes: Sizes) -> Iterator[Finding]:
    """The two rates that all others stand beside."""
    rates = measure_rates(sizes)
    name = str(sizes.dtype).removeprefix("torch.")
    yield Finding(
        SECTION,
        "copy on the device, read and written",
        f"{rates.copied / 1e12:.2f} TB/s",
        numbers={"bytes_per_second": rates.copied},
    )
    yield Finding(
        SECTION,
        f"product of dense {name} matrices of {sizes.matmul:,}",
        f"{rates.multiplied / 1e12:.0f} TFLOP/s",
        numbers={"flops_per_second": rates.multiplied},
    )


def moved_bytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors that are read or written once each."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
