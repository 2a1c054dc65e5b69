"""A tiny checkpoint, and copies of it to be spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hymba_align.model import HymbaConfig, HymbaForCausalLM


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of three layers, whole and good; not to be written to."""
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        v_head_dim=16,
        num_memory_tokens=3,
        sliding_window=4,
        global_attn_idx=[0],
        kv_reuse_group=[[1, 2]],
        mamba_d_state=2,
        mamba_dt_rank=2,
        max_position_embeddings=64,
        orig_max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("original")
    HymbaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))
