"""What holds in every test: no network, no colours, wide tables, and the repository as the current directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Before any test module imports transformers, datasets or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "160"

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their files from here."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def small_base() -> dict[str, Any]:
    """A base section of random weights, small enough to train in seconds."""
    return {
        "tokenizer": "data/arithmetic/tokenizer",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "v_head_dim": 32,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "num_memory_tokens": 4,
            "sliding_window": 16,
            "global_attn_idx": [0],
            "kv_reuse_group": [],
        },
    }
