"""Which processes train: those that the command starts by name, or those that are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hymba_align.cli import main
from hymba_align.errors import RecipeError
from hymba_align.processes import engines, launch
from hymba_align.recipe import LaunchSection, load_recipe

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")


def test_a_launcher_is_found_by_name_from_any_directory(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["sft", str(recipe_file), "--launcher", "zero2", "--num-processes", "2", "--dry-run"]) == 0

    out = capsys.readouterr().out
    assert f"sft trains with zero2: torchrun --nproc_per_node 2 -m hymba_align sft {tmp_path}/run/recipe.yaml" in out
    for name in ENGINES:
        file = engines.engine_file(LaunchSection(launcher=name))
        assert file is not None
        assert file.is_file()
        deepspeed = engines.deepspeed_file(engines.read_engine_file(file), file)
        assert (deepspeed is not None and deepspeed.is_file()) == name.startswith("zero"), name


@pytest.mark.parametrize("command", ["run", "sft", "dpo"])
def test_the_options_are_overrides_of_the_recipe(
    recipe_file: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    monkeypatch.setattr("hymba_align.pipeline.run_recipe", lambda recipe, dry_run: loaded.append(recipe))
    monkeypatch.setattr("hymba_align.pipeline.run_training_stage", lambda recipe, stage, dry_run: loaded.append(recipe))

    assert main([command, str(recipe_file), "seed=3", "--launcher", "zero3", "--num-processes", "4"]) == 0
    assert main([command, str(recipe_file), "seed=3", "launch.launcher=zero3", "launch.num_processes=4"]) == 0
    assert loaded[0] == loaded[1]
    assert (loaded[0].launch.launcher, loaded[0].launch.num_processes, loaded[0].seed) == ("zero3", 4, 3)

    assert main([command, str(recipe_file), "--launcher", "zero_2"]) == 2
    error = capsys.readouterr().err
    assert "launch.launcher is 'zero_2'; it must be 'single', 'ddp', 'zero1', 'zero2'" in error
    assert "the nearest is 'zero2'" in error
    assert main([command, str(recipe_file), "launch.accelerate_config=my.yaml", "--launcher", "zero2"]) == 2
    assert "it holds both launcher and accelerate_config; remove one of them" in capsys.readouterr().err


def test_the_recipe_in_the_run_folder_asks_for_the_same(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["launch.launcher=zero2", "launch.num_processes=2"])
    (tmp_path / "again.yaml").write_text(recipe.dump_yaml())

    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_an_engine_of_the_recipe_replaces_the_one_that_accelerate_launch_set(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true", "FSDP": "a word"}
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "RANK": "1", **theirs})

    engines.use_engine(LaunchSection(launcher="zero3"))

    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(engines.FOLDER / "deepspeed" / "zero3.json")
    assert {name: os.environ.get(name) for name in ("RANK", *theirs)} == {
        "RANK": "1",
        "ACCELERATE_USE_FSDP": None,
        "FSDP_VERSION": None,
        "ACCELERATE_USE_CPU": "true",
        "FSDP": "a word",
    }
    engines.use_engine(LaunchSection(launcher="ddp"))
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_the_number_of_processes_that_are_there_goes_before_the_recipes(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"PATH": os.environ["PATH"], "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4"}
    monkeypatch.setattr(os, "environ", dict(there))

    used = launch.use_what_is_there(load_recipe(recipe_file)).launch
    assert (used.launcher, used.num_processes) == ("ddp", 4)
    assert capsys.readouterr().out == "launch.num_processes is 1 in the recipe; 4 were started, and 4 train\n"

    asked = load_recipe(recipe_file, ["launch.launcher=zero1", "launch.num_processes=4"])
    assert launch.use_what_is_there(asked) == asked
    assert capsys.readouterr().out == ""

    with pytest.raises(RecipeError) as caught:
        launch.use_what_is_there(load_recipe(recipe_file, ["launch.launcher=single"]))
    assert str(caught.value) == (
        "launch.launcher is single, and this is one of 4 processes; start it alone, or choose another launcher"
    )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    with pytest.raises(RecipeError) as caught:
        launch.use_what_is_there(load_recipe(recipe_file))
    assert str(caught.value) == (
        "accelerate started this process for DEEPSPEED, and the recipe names no engine; add --launcher NAME, "
        "so that the run's recipe says what trained it"
    )


def test_fewer_gpus_than_processes_are_said_before_anything_starts(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    recipe = load_recipe(recipe_file, ["sft.trainer.use_cpu=false", "launch.launcher=ddp", "launch.num_processes=8"])

    with pytest.raises(RecipeError) as caught:
        launch.check_devices(recipe)

    assert str(caught.value) == (
        "launch.num_processes is 8, which is 8 on this machine with its 4 GPUs; set it to 4 and "
        "gradient_accumulation_steps for the same global batch, or take more machines"
    )
    launch.check_devices(load_recipe(recipe_file, ["launch.launcher=ddp", "launch.num_processes=8"]))  # on the CPU
