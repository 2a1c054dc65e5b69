"""Trainer settings of a recipe: TRL's own fields, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from hymba_align.errors import RecipeError
from hymba_align.train.settings import trainer_arguments, trainer_settings


def test_the_defaults_are_the_published_rates_one_cosine_epoch(make_recipe: Any) -> None:
    sft, dpo = (trainer_settings(make_recipe(), stage) for stage in ("sft", "dpo"))  # type: ignore[arg-type]
    assert (sft["learning_rate"], dpo["learning_rate"]) == (5e-5, 3e-6)
    for settings in (sft, dpo):
        assert settings["lr_scheduler_type"] == "cosine"
        assert settings["num_train_epochs"] == 1
        assert settings["max_length"] == 256
        assert settings["seed"] == 7
        assert settings["logging_nan_inf_filter"] is False
    assert sft["packing"]
    assert sft["packing"]
    assert dpo["precompute_ref_log_probs"] is True


def test_yaml_reads_5e_5_as_text_and_the_trainer_gets_a_number(make_recipe: Any) -> None:
    assert trainer_settings(make_recipe(learning_rate="5e-5"), "sft")["learning_rate"] == 5e-5


def test_the_old_name_of_activation_checkpointing_still_works(make_recipe: Any) -> None:
    settings = trainer_settings(make_recipe(gradient_checkpointing=True), "sft")
    assert settings["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in settings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learing_rate", 1e-4, "sft.trainer.learing_rate is not a field of SFTConfig; did you mean 'learning_rate'?"),
        (
            "output_dir",
            "x",
            "sft.trainer.output_dir cannot be set: stages write into the run folder; set the recipe's output_dir",
        ),
        ("max_length", 9, "sft.trainer.max_length cannot be set: set sft.max_length"),
        (
            "assistant_only_loss",
            False,
            "sft.trainer.assistant_only_loss cannot be set: set data.loss_on, which says which turns of the assistant are "
            "trained on",
        ),
        (
            "learning_rate",
            "fast",
            "sft.trainer.learning_rate is 'fast': input should be a valid number, unable to parse string as a number",
        ),
        ("learning_rate", -1.0, "sft.trainer.learning_rate is -1.0; it must be above 0"),
        ("per_device_train_batch_size", 0, "sft.trainer.per_device_train_batch_size is 0; it must be 1 or more"),
        (
            "packing_strategy",
            "wrapped",
            "sft.trainer.packing_strategy cannot be set: rows are packed by best-fit decreasing ('bfd') before training",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(make_recipe: Any, key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        trainer_settings(make_recipe(**{key: value}), "sft")
    assert str(raised.value) == message


def test_dispatching_batches_would_separate_chosen_from_rejected(make_recipe: Any) -> None:
    recipe = make_recipe(accelerator_config={"dispatch_batches": True})
    with pytest.raises(RecipeError, match="dispatch_batches is true, which would separate chosen from rejected"):
        trainer_settings(recipe, "dpo")


def test_what_transformers_refuses_is_a_recipe_error(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^sft.trainer is refused by SFTConfig: foo is not a valid SchedulerType"):
        trainer_arguments(make_recipe(lr_scheduler_type="foo"), "sft", SFTConfig, tmp_path)


def test_a_stage_that_the_recipe_does_not_have_says_what_to_add(make_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="the recipe has no sft section; add one to run this stage"):
        trainer_settings(make_recipe(sft=False), "sft")
