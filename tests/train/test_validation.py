"""Validation's loss counts every label and every pair once, whatever batches and processes share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hymba_align.recipe import TrainingStage
from hymba_align.run.metrics import read_metrics
from hymba_align.train.dpo import train_dpo
from hymba_align.train.sft import train_sft


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_loss_does_not_depend_on_the_size_of_batches(
    make_recipe: Any, tmp_path: Path, stage: TrainingStage
) -> None:
    losses = []
    for size in (1, 3, 8):
        recipe = (
            make_recipe(rows=30, max_steps=1, per_device_eval_batch_size=size, packing=False)
            if stage == "sft"
            else (make_recipe(rows=30, sft=False, max_steps=1, per_device_eval_batch_size=size))
        )
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_fraction": 0.2})})
        (train_sft if stage == "sft" else train_dpo)(recipe, None, tmp_path / str(size))
        losses += [record["eval_loss"] for record in read_metrics(tmp_path / str(size)) if "eval_loss" in record]
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-6, rel=0)  # float32 on the CPU
