"""A checkpoint to be spoiled, and what becomes of it: a model that works, or the sentence with which it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymba_align.checkpoint import load_model
from hymba_align.errors import CheckpointError
from hymba_align.model import HymbaForCausalLM

TOKENIZER = "data/arithmetic/tokenizer"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.moe.experts.0.gate_proj.weight"


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    """The sentence with which a checkpoint is refused, without its folder; the cheap check says the same."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "HERE")


def try_to_load(folder: Path) -> tuple[HymbaForCausalLM | None, str]:
    """The model, or the sentence with which the checkpoint is refused; any other error is the test's."""
    try:
        return load_model(folder), ""
    except CheckpointError as error:
        return None, str(error)


def works(model: HymbaForCausalLM) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(model(torch.tensor([[1, 2, 3, 1, 2, 0, 3]])).logits).all())
