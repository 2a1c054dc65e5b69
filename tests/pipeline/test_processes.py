"""Stages in several processes: those that the command starts, or those that are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import hymba_align.pipeline as pipeline
import hymba_align.processes.launch
from hymba_align import stage_training
from hymba_align.errors import HymbaAlignError, Preempted, UsageError
from hymba_align.processes.agent import STARTED_BY_US
from hymba_align.recipe import load_recipe
from hymba_align.run.folder import RunFolder

ALL = ["score base", "sft", "score sft", "dpo", "score dpo"]
LAUNCH = ["launch.launcher=zero2", "launch.num_processes=2"]


def test_training_stages_are_launched_with_the_resolved_recipe(
    recipe_file: str, work, launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    pipeline.run_recipe(load_recipe(recipe_file, LAUNCH))

    assert [command[:3] for command in launcher.commands] == [[sys.executable, "-m", "hymba_align.processes.agent"]] * 2
    assert launcher.commands[0][3:5] == ["--parent", str(os.getpid())]
    assert launcher.commands[0][5] == "--report"
    assert launcher.commands[0][7:] == ["--processes", "2", "sft", f"{run}/recipe.yaml"]
    assert work[1] == ("sft", None)
    assert work[3] == ("dpo", f"{run}/sft/final")
    assert work.names == ALL


def test_a_dry_run_prints_the_launch_command(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file, LAUNCH), dry_run=True)

    assert (
        f"sft trains with zero2: torchrun --nproc_per_node 2 -m hymba_align sft {tmp_path}/run/recipe.yaml\n"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "passed_on", "how"),
    [
        (1, 1, "ended with exit code 1; its message is above"),
        (137, 137, "ended with exit code 137; its message is above"),
        (
            -9,
            137,
            "was killed by SIGKILL, which the system also sends when memory is full; the same command continues from the "
            "last checkpoint",
        ),
    ],
)
def test_the_exit_code_of_launched_processes_is_passed_on(
    recipe_file: str, work, launcher, code: int, passed_on: int, how: str
) -> None:
    launcher.code = code

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert caught.value.exit_code == passed_on
    assert str(caught.value) == f"sft failed: its launcher {how}"
    assert not RunFolder(Path(load_recipe(recipe_file).output_dir or "")).read_manifest("sft").get("completed")


def test_what_the_launcher_saw_is_said(recipe_file: str, work, launcher) -> None:
    launcher.code, launcher.report = 137, "process 1 (pid 12) was killed by SIGKILL"

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == "sft failed: process 1 (pid 12) was killed by SIGKILL"


def test_preemption_of_the_processes_is_preemption_of_the_command(recipe_file: str, work, launcher) -> None:
    launcher.code, launcher.report = 75, "it was preempted"

    with pytest.raises(Preempted) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == "sft: it was preempted; the same command continues it"
    assert caught.value.exit_code == 75


def test_fewer_processes_than_asked_for_is_an_error(recipe_file: str, work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_BY_US, "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(hymba_align.processes.launch, "die_with", lambda parent: None)

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == (
        "launch.num_processes is 2, but 1 were started; "
        "run 'hymba-align sft' itself, which starts as many as the recipe asks for"
    )
    assert work == []


def test_inside_torchrun_a_stage_uses_the_processes_that_are_there(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file, LAUNCH)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    pipeline.run_training_stage(recipe, "sft")
    assert work == [("sft", None)]
    assert RunFolder(tmp_path / "run").read_manifest("sft")["completed"]

    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    pipeline.run_training_stage(recipe, "sft")
    assert capsys.readouterr().out == ""
    assert work == [("sft", None)]


def test_other_ranks_wait_until_rank_0_has_prepared_the_folder(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage_training, "WAIT_FOR_RANK_0_S", 0.3)
    monkeypatch.setattr(stage_training, "NOTICE_S", 0.1)

    with pytest.raises(UsageError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file), "sft")

    assert str(caught.value) == (
        f"rank 1 waited 0 s for rank 0 to start sft in {tmp_path}/run; set output_dir to a folder that all machines share"
    )
    assert capsys.readouterr().err == (
        f"rank 1 waits for rank 0 to start sft in {tmp_path}/run, which all machines have to share\n"
    )
    assert work == []


def test_only_rank_0_judges_the_run_folder_which_others_may_see_half_made(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run" / "sft").mkdir(parents=True)
    recipe = load_recipe(recipe_file)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(stage_training, "WAIT_FOR_RANK_0_S", 0.1)

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="rank 1 waited"):
        pipeline.run_training_stage(recipe, "sft")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        pipeline.run_training_stage(recipe, "sft")


def test_another_rank_trains_nothing_where_rank_0_brought_the_result_back(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file)
    pipeline.run_training_stage(recipe, "sft")
    pipeline.run_training_stage(load_recipe(recipe_file, ["seed=7"]), "sft")
    work.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    inputs = next(step.fingerprint for step in pipeline.plan(recipe) if step.name == "sft")

    def rank_0(seconds: float) -> None:
        RunFolder(tmp_path / "run").restore("sft", inputs)

    monkeypatch.setattr(stage_training.time, "sleep", rank_0)
    pipeline.run_training_stage(recipe, "sft")

    assert work == []


def fake_gpus(monkeypatch: pytest.MonkeyPatch, calls: list[str], work) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "score base" in work.names)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(f"freed after {work.names[-1]}"))


def test_one_process_takes_one_gpu_before_anything_touches_it(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, [], work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")

    pipeline.run_recipe(load_recipe(recipe_file))

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_processes_to_come_get_all_gpus_and_the_memory_that_scoring_used(
    recipe_file: str, work, launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fake_gpus(monkeypatch, calls, work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")

    pipeline.run_recipe(load_recipe(recipe_file, [*LAUNCH, "eval.num_processes=1"]))

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert calls == ["freed after score base", "freed after score sft"]


def test_run_refuses_to_be_one_of_many(recipe_file: str, work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file))

    assert str(caught.value) == (
        "'run' starts its processes itself (launch.num_processes), and is one process; start it without torchrun, "
        "accelerate or srun, or start 'sft' and 'dpo' with them, and 'run' afterwards, which scores what they made"
    )
    assert work == []
