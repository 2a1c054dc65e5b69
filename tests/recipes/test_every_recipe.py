"""Every shipped recipe parses, validates and plans; so does every accelerate configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hymba_align.cli import main
from hymba_align.recipe import TRAINING_STAGES, is_local_path, load_recipe
from hymba_align.run.folder import run_root
from hymba_align.train.settings import trainer_settings

RECIPES = sorted(str(path) for path in Path("recipes").rglob("*.yaml"))
ACCELERATE = sorted(Path("accelerate_configs").glob("*.yaml"))
# accelerate refuses these beside deepspeed_config_file, once training starts.
IGNORED_BESIDE_A_FILE = {"zero_stage", "gradient_clipping", "gradient_accumulation_steps", "offload_optimizer_device"}


def test_there_are_recipes() -> None:
    assert {"recipes/tiny/arithmetic.yaml", "recipes/hymba-1.5b/instruct.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_says_how_it_is_run_on_what_and_what_to_expect(path: str) -> None:
    head = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith("#")]

    for word in (f"command    hymba-align run {path}", "hardware   ", "expect     "):
        assert any(word in line for line in head), word


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_dry_runs_and_writes_nothing(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(path)
    existed = run_root(recipe).exists()

    assert main(["run", path, "--dry-run"]) == 0, capsys.readouterr().err

    out = capsys.readouterr().out
    assert f"Plan of {recipe.name}" in out
    assert "Dry run: nothing was run and nothing was written." in out
    for stage in recipe.training_stages:
        assert f"{stage}/final" in out
    assert run_root(recipe).exists() == existed


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipes_own_files_are_in_the_repository(path: str) -> None:
    recipe = load_recipe(path)

    named = [recipe.base.tokenizer, recipe.launch.accelerate_config]
    named += [recipe.data_for(stage).path for stage in recipe.training_stages]
    for name in named:
        if name is not None and is_local_path(name):
            assert Path(name).exists(), name
            assert not Path(name).is_absolute(), name


def test_the_real_recipe_has_the_published_settings() -> None:
    recipe = load_recipe("recipes/hymba-1.5b/instruct.yaml")

    assert recipe.base.model == "nvidia/Hymba-1.5B-Base"
    assert recipe.training_stages == TRAINING_STAGES
    for stage, learning_rate in (("sft", 5e-5), ("dpo", 3e-6)):
        settings = trainer_settings(recipe, stage)
        assert settings["learning_rate"] == learning_rate
        assert settings["num_train_epochs"] == 1
        assert settings["lr_scheduler_type"] == "cosine"
        assert settings["bf16"]
        assert settings["max_length"] == 8192
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        assert batch * recipe.launch.num_processes == 1024
    assert trainer_settings(recipe, "sft")["packing"]


# --- accelerate_configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))

    assert config.mixed_precision in (None, "no"), "the recipe's trainer.bf16 decides"
    assert config.num_machines == (2 if path.stem.startswith("multi_node") else 1)
    assert not IGNORED_BESIDE_A_FILE & set(config.deepspeed_config)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_the_readme_says_when_to_take_a_configuration(path: Path) -> None:
    assert f"`{path.name}`" in Path("accelerate_configs/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [path for path in ACCELERATE if "zero" in path.stem], ids=lambda path: path.stem)
def test_a_deepspeed_configuration_leaves_to_the_recipe_what_is_its(path: Path) -> None:
    deepspeed = yaml.safe_load(path.read_text(encoding="utf-8"))["deepspeed_config"]
    settings = json.loads(Path(deepspeed["deepspeed_config_file"]).read_text(encoding="utf-8"))

    assert "optimizer" not in settings
    assert "scheduler" not in settings
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["zero_force_ds_cpu_optimizer"] is False
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert settings[key] == "auto", key
    assert settings["bf16"] == {"enabled": "auto"}
    stage = int(path.stem.split("zero")[1][0])
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)


def test_deepspeed_itself_accepts_its_settings() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for path in sorted(Path("accelerate_configs/deepspeed").glob("*.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        numbers = {key: value for key, value in settings.items() if value != "auto"}
        assert DeepSpeedZeroConfig(**numbers).stage == settings["stage"]
