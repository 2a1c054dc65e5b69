"""The most memory that this process had at one moment: on its GPU, or of the machine where nothing was put on a GPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"
"""What Linux wants written to `clear_refs`. Source: proc(5)"""


def forget_peak() -> None:
    """Begins anew with what the process has now. Of the machine's memory only Linux can do that."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)


def peak_bytes() -> int:
    """The most bytes since `forget_peak`, in tensors on the GPU that this process works on, or else resident."""
    import torch

    if torch.cuda.is_initialized() and (on_gpu := torch.cuda.max_memory_allocated()):
        return int(on_gpu)
    with contextlib.suppress(OSError, StopIteration):
        status = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    # Elsewhere; on Linux it would also count what the process was before it became this program.
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
