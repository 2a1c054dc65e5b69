"""Small checkpoints of random weights with their tokenizer, as a training leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hymba_align.inside.settings import InspectSettings

TOKENIZER = "data/arithmetic/tokenizer"
SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "v_head_dim": 32, "mamba_d_state": 4, "mamba_dt_rank": 2, "num_memory_tokens": 4, "sliding_window": 16,
    "global_attn_idx": [0], "kv_reuse_group": [], "max_position_embeddings": 1024, "orig_max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Writes a checkpoint of random weights; keys of its configuration may be changed."""

    def write(folder: Path, seed: int, **changed: Any) -> Path:
        from hymba_align.checkpoint import build_base
        from hymba_align.data.template import load_tokenizer
        from hymba_align.recipe import BaseSection

        tokenizer = load_tokenizer(TOKENIZER)
        base = BaseSection(config={**SMALL, **changed}, tokenizer=TOKENIZER)
        build_base(base, tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """What is looked into; no test changes it."""
    return write_checkpoint(tmp_path_factory.mktemp("inspected") / "after", 1)


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """What it is compared with; no test changes it."""
    return write_checkpoint(tmp_path_factory.mktemp("inspected") / "before", 2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[InspectSettings]:
    """What the command would look at; it is interrupted then."""
    found: list[InspectSettings] = []

    def note(settings: InspectSettings, say: Callable[[str], None]) -> None:
        found.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("hymba_align.inside.inspecting.inspect_checkpoint", note)
    return found
