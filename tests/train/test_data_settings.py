"""What a recipe's data section means for training: validation, streams, which turns the loss is on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_align.errors import DataError, RecipeError
from hymba_align.recipe import DataSection, Recipe
from hymba_align.run.metrics import read_metrics
from hymba_align.train.dpo import train_dpo
from hymba_align.train.settings import trainer_settings
from hymba_align.train.sft import train_sft


def with_data(recipe: Recipe, **settings: Any) -> Recipe:
    assert recipe.data is not None
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=settings)})


def test_validation_rows_are_scored_after_every_epoch_and_never_trained_on(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, train in (("sft", train_sft), ("dpo", train_dpo)):
        recipe = make_recipe(rows=40, num_train_epochs=2, learning_rate=1e-3)
        whole = train(recipe, None, tmp_path / "whole" / stage)
        summary = train(with_data(recipe, validation_fraction=0.3), None, tmp_path / "part" / stage)
        losses = [record for record in read_metrics(tmp_path / "part" / stage) if "eval_loss" in record]
        assert [record["epoch"] for record in losses] == [1.0, 2.0]
        assert summary["eval_loss"] == losses[-1]["eval_loss"] > 0
        assert summary["tokens"] < 0.9 * whole["tokens"]
        assert "eval_loss" not in whole
        assert f"validation loss {losses[-1]['eval_loss']:.4f}" in capsys.readouterr().err


def test_a_stream_trains_on_the_packed_rows_of_the_set_read_before(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_steps": 3, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    recipe = make_recipe(rows=40, learning_rate=1e-3, **options)
    read = train_sft(recipe, None, tmp_path / "read")
    streamed = train_sft(with_data(recipe, streaming=True), None, tmp_path / "streamed")
    assert streamed["steps"] == 3
    assert [record["loss"] for record in read_metrics(tmp_path / "streamed") if "loss" in record] == pytest.approx(
        [record["loss"] for record in read_metrics(tmp_path / "read") if "loss" in record], abs=1e-6
    )
    assert streamed["tokens"] == read["tokens"]
    record = json.loads((tmp_path / "streamed" / "data.json").read_text())
    (source,) = record["sources"]
    assert source["rows_read"] == source["rows_kept"] == 40
    assert "40 of 40 rows kept in 40 conversations" in capsys.readouterr().out


def test_a_stream_of_which_nothing_can_be_used_is_told_before_training(make_recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"question": "q", "answer": ""}\n' * 3)
    data = DataSection(path=str(path), streaming=True, bad_rows="drop")
    with pytest.raises(
        DataError, match=r"m\.jsonl: none of the 3 rows is left for training: 3 lost \(the column 'answer'"
    ):
        train_sft(make_recipe(max_steps=1).model_copy(update={"data": data}), None, tmp_path / "sft")


def test_a_stream_needs_a_number_of_steps(make_recipe: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"sft.trainer.max_steps is missing, and with data.streaming nobody knows how"
    ):
        trainer_settings(with_data(make_recipe(), streaming=True), "sft")
    settings = trainer_settings(with_data(make_recipe(max_steps=2), streaming=True), "sft")
    assert settings["accelerator_config"] == {"dispatch_batches": False}


def test_the_loss_is_on_the_turns_that_the_data_section_names(make_recipe: Any, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says"} for _ in range(2) for role in ("user", "assistant")]
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    steps = {}
    for loss_on in ("assistant", "last", "all"):
        recipe = make_recipe(max_steps=1, max_grad_norm=0)
        data = DataSection(path=str(path), loss_on=loss_on)  # type: ignore[arg-type]
        train_sft(recipe.model_copy(update={"data": data}), None, tmp_path / loss_on)
        steps[loss_on] = [record["loss"] for record in read_metrics(tmp_path / loss_on) if "loss" in record]
    assert len({losses[0] for losses in steps.values()}) == 3


def test_a_row_that_would_be_lost_stops_a_stage_before_it_trains(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=4)
    assert recipe.sft is not None
    short = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"max_length": 20})})
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: longer than max_length=20: it has \d+ tokens; raise max_length, or set"
    ):
        train_sft(short, None, tmp_path / "sft")
    assert not (tmp_path / "sft" / "final").exists()
