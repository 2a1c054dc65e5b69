"""The golden checkpoint and what NVIDIA's released code computes from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_align.model import HymbaConfig, HymbaForCausalLM

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
def small_config() -> HymbaConfig:
    """Two local layers that share keys between two global ones; a window that short texts already leave."""
    return HymbaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=1,
        v_head_dim=16,
        num_memory_tokens=5,
        sliding_window=6,
        global_attn_idx=[0, 4],
        kv_reuse_group=[[1, 2, 3]],
        mamba_d_state=4,
        mamba_dt_rank=3,
        max_position_embeddings=128,
        orig_max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture
def small_model(small_config: HymbaConfig) -> HymbaForCausalLM:
    torch.manual_seed(0)
    return HymbaForCausalLM(small_config).eval()


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
