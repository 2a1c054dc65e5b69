"""The golden checkpoint and what NVIDIA's released code computes from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_align.model import HymbaForCausalLM

TINY = Path(__file__).parent.parent / "golden" / "tiny"


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture
def golden_model() -> HymbaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="session")
def golden_documents(golden: dict[str, Tensor]) -> list[Tensor]:
    return [golden[f"docs.{i}.input_ids"] for i in range(6)]


@pytest.fixture
def pad() -> Callable[[list[Tensor], str], tuple[Tensor, Tensor]]:
    """Batches sequences of different lengths; side is left, right or mixed. Padding ids are random on purpose."""

    def pad_batch(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences)) + 2
        ids = torch.randint(0, 50, (len(sequences), width), generator=torch.Generator().manual_seed(1))
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            room = width - len(sequence)
            start = {"left": room, "right": 0, "mixed": row % (room + 1)}[side]
            ids[row, start : start + len(sequence)] = sequence
            mask[row, start : start + len(sequence)] = 1
        return ids, mask

    return pad_batch
