"""Rows of a tensor by index, with a gradient that is the same in every run."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for x (N, D) and an index of any shape: rows (*index.shape, D).

    Where rows are taken several times, the gradient of `x[index]` on a CPU is added up atomically by torch's threads, in
    whatever order they come (torch 2.13, aten/src/ATen/native/cpu/IndexKernel.cpp): the last bits differ from run to run.
    That of an embedding is added up in the order of the index.
    """
    return F.embedding(index, x)
