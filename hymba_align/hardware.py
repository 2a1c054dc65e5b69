"""The machine: its GPUs, processors, memory and disk, and how much of a device's memory training may plan with."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.errors import UsageError

if TYPE_CHECKING:
    import torch

ROOM = 0.9  # of a device's memory: the rest is for the libraries, and for blocks that are free but too small
TIMED_SIZE, TIMED_S = 768, 0.2  # rows of the matrices whose product is timed, and for how long


@dataclass(frozen=True)
class GPU:
    """One graphics card."""

    name: str
    memory_bytes: int
    bf16: bool
    """Whether it computes in bfloat16"""


@dataclass(frozen=True)
class Hardware:
    """What there is to train with."""

    gpus: tuple[GPU, ...]
    cpus: int
    """Cores that this process may use"""
    memory_bytes: int
    """Of the machine, or what a limit of this process or its container leaves of it"""
    disk_free_bytes: int
    """Where runs are written"""
    cpu_flops: float | None = None
    """Of float32 matrix products per second, timed here; None where nobody asked"""
    assumed: str | None = None
    """How the GPUs were described, where they are not those of this machine"""

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU."""
        return not self.gpus

    @property
    def devices(self) -> int:
        """How many devices can train: GPUs, or this CPU."""
        return max(1, len(self.gpus))

    @property
    def device_bytes(self) -> int:
        """Memory of the smallest GPU, or the machine's."""
        return min((gpu.memory_bytes for gpu in self.gpus), default=self.memory_bytes)

    @property
    def bf16(self) -> bool:
        """Whether training computes in bfloat16: on GPUs that all can."""
        return bool(self.gpus) and all(gpu.bf16 for gpu in self.gpus)


def detect(folder: Path, *, timed: bool = False) -> Hardware:
    """This machine, with the room that is left in `folder`, or above it where that is not there yet.

    Args:
        timed: whether the speed of matrix products is measured too, which takes `TIMED_S` without a GPU.
    """
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            with torch.cuda.device(index):
                gpus.append(GPU(found.name, int(found.total_memory), torch.cuda.is_bf16_supported()))
    return Hardware(
        gpus=tuple(gpus),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=machine_bytes(),
        disk_free_bytes=disk_free(folder),
        cpu_flops=_time_products() if timed and not gpus else None,
    )


def with_gpus(machine: Hardware, described: str) -> Hardware:
    """This machine with other GPUs, which compute in bfloat16.

    Args:
        described: how many and of how many GiB each, such as `8x80`.
    Raises: UsageError.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4}(?:\.\d+)?)", described)
    if found is None:
        raise UsageError(
            f"--gpus is '{described:.40}'; write how many and the GiB of each, such as 8x80 for eight of 80 GiB"
        )
    count, gib = int(found[1]), float(found[2])
    gpu = GPU("assumed GPU", int(gib * 2**30), bf16=True)
    return replace(machine, gpus=(gpu,) * count, cpu_flops=None, assumed=described)


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU; of a CPU the machine's, or what a limit of this process or its container leaves of it."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def machine_bytes() -> int:
    """The machine's memory, or what a limit of this process or its container leaves of it."""
    import resource

    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    container = Path("/sys/fs/cgroup/memory.max")
    text = container.read_text().strip() if container.is_file() else "max"
    return min([*limits, *([int(text)] if text.isdigit() else [])])


def disk_free(folder: Path) -> int:
    """Bytes that can be written in a folder, or in the first above it that is there."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    return shutil.disk_usage(there).free


def _time_products() -> float:
    """Operations per second of float32 matrix products, a multiplication and an addition being two."""
    import torch

    a = torch.randn(TIMED_SIZE, TIMED_SIZE)
    products, start = -1, time.perf_counter()
    while (passed := time.perf_counter() - start) < TIMED_S:
        a @ a
        products += 1
        if not products:
            start = time.perf_counter()  # the first one only wakes the library
    return 2 * TIMED_SIZE**3 * products / passed
