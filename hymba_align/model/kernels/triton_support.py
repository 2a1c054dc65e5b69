"""What the Triton backends share. Imports triton only to ask whether it is there."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run there, with what to do about it; None if they can.

    On the CPU they can where Triton's interpreter is on, which is for tests: it takes seconds for a hundred tokens.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the Triton kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if device.type == "cpu":
        return "the Triton kernels need a GPU; to try them on the CPU, set TRITON_INTERPRET=1 before Python starts"
    return f"the Triton kernels run on CUDA, not on {device.type}"


def rows(x: Tensor) -> Tensor:
    """`x` (T, I) such that channels lie side by side. Rows may be apart: half of a projection's output is not copied."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def to_device(tables: list[list[int]], device: torch.device) -> list[Tensor]:
    """Tables of int32 on the device, by one copy.

    Each starts at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not.
    """
    sizes = [len(table) for table in tables]
    padded = [table + [0] * (-len(table) % 4) for table in tables]
    joined = torch.tensor([value for table in padded for value in table], dtype=torch.int32).to(device)
    parts = joined.split([len(table) for table in padded])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
