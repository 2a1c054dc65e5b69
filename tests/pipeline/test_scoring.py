"""Scoring as a step of a run: what it reads, what it keeps and removes, and the processes it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hymba_align.eval
import hymba_align.eval.inputs
import hymba_align.pipeline as pipeline
from hymba_align.cli.scoring import eval_section
from hymba_align.errors import DataError, HymbaAlignError, UsageError
from hymba_align.evaluation import overrides_for
from hymba_align.processes.launch import scoring_processes
from hymba_align.recipe import load_recipe, resolved_eval

LAUNCH = ["launch.launcher=zero2", "launch.num_processes=2"]


def test_a_task_that_is_no_longer_asked_for_leaves_no_answers_and_its_score_aside(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "run" / "eval" / "base"
    pipeline.run_recipe(load_recipe(recipe_file, ["eval.tasks=[gsm8k, gsm8k_nvidia]"]))
    (scores / "gsm8k_nvidia.answers-1.jsonl").write_text("")
    (scores / "gsm8k.answers-0.jsonl").write_text("")
    score = (scores / "gsm8k_nvidia.json").read_bytes()
    work.clear()
    capsys.readouterr()

    pipeline.run_recipe(load_recipe(recipe_file))

    assert work.names == ["score base", "score sft", "score dpo"]
    kept = "gsm8k_nvidia.previous.json"
    assert sorted(path.name for path in scores.iterdir()) == ["gsm8k.answers-0.jsonl", "gsm8k.json", kept]
    assert (scores / kept).read_bytes() == score
    told = f"gsm8k_nvidia: no task of this recipe; {scores}/gsm8k_nvidia.json is now {kept}\n"
    assert told in capsys.readouterr().out


def test_every_local_file_of_every_task_is_watched(recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "gpqa.zip").write_bytes(b"one")
    overrides = ["eval.tasks=[gsm8k, gpqa]", f"eval.gpqa.path={tmp_path}/gpqa.zip", "eval.stages=[base]"]

    before = pipeline.plan(load_recipe(recipe_file, overrides))[0]
    (tmp_path / "gpqa.zip").write_bytes(b"two")
    after = pipeline.plan(load_recipe(recipe_file, overrides))[0]

    assert {Path(name).name for name, _ in before.contents} == {"train.jsonl", "test.jsonl", "gpqa.zip"}
    assert before.fingerprint != after.fingerprint
    assert before.data == (f"gsm8k: {tmp_path}/test.jsonl, gpqa: {tmp_path}/gpqa.zip (limit 2)")


def test_another_grader_scores_a_stage_again(recipe_file: str, work, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()
    monkeypatch.setattr(hymba_align.eval.inputs, "grader", lambda task: {"versions": {"lm-eval": "0.4.14"}})

    pipeline.run_recipe(load_recipe(recipe_file))

    assert work.names == ["score base", "score sft", "score dpo"]


def test_a_file_that_changes_while_it_is_scored_leaves_the_step_undone(
    recipe_file: str, work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hymba_align.eval.evaluate

    def evaluate(*given, **named):
        (tmp_path / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "#### 1"}) + "\n")
        return fake(*given, **named)

    monkeypatch.setattr(hymba_align.eval, "evaluate", evaluate)

    with pytest.raises(DataError, match=r"test\.jsonl"):
        pipeline.run_recipe(load_recipe(recipe_file))
    assert not pipeline.RunFolder(tmp_path / "run").read_manifest("eval/base").get("completed")


def test_with_gpus_as_many_processes_score_as_train_and_find_a_gpu(
    recipe_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(gpus: int, *overrides: str) -> int:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return scoring_processes(load_recipe(recipe_file, overrides))

    eight = ["launch.launcher=zero2", "launch.num_processes=8"]
    assert [count(0, *eight), count(1, *eight), count(4, *eight), count(8, *LAUNCH), count(8)] == [1, 1, 4, 2, 1]
    assert count(8, *LAUNCH, "eval.num_processes=3") == 3


def test_scoring_processes_are_started_with_all_that_the_section_says(
    recipe_file: str, work, launcher, tmp_path: Path
) -> None:
    launcher.code, launcher.report = 137, "process 1 (pid 12) was killed by SIGKILL"
    recipe = load_recipe(recipe_file, ["eval.num_processes=2", "eval.gsm8k.shots=first"])

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_recipe(recipe)

    assert str(caught.value) == "scoring failed: process 1 (pid 12) was killed by SIGKILL"
    assert caught.value.exit_code == 137
    command = launcher.commands[0]
    assert command[7:11] == [
        "--processes",
        "2",
        "--continues",
        "the same command continues from the answers already given",
    ]
    run = tmp_path / "run"
    words = command[command.index("--") + 1 :]
    assert words[:6] == ["eval", f"{run}/base/final", "--output", f"{run}/eval/base", "--chat-template", "hymba"]
    assert eval_section({}, words[6:]) == resolved_eval(recipe)


def test_a_section_arrives_whole_where_a_command_hands_it_on(recipe_file: str) -> None:
    section = eval_section(
        {"suite": None, "tasks": "gpqa, bfcl", "limit": 7, "num_processes": 3},
        ['gpqa.path="a b/ü: [1].zip"', "bfcl.categories=[simple_python]", "eval.max_new_tokens=9"],
    )

    assert eval_section({}, overrides_for(section)) == section


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.tasks=[gpqa]", "eval.gpqa.path={tmp}/absent.zip"], "eval.gpqa.path is {tmp}/absent.zip, which does not exist"),
        (["eval.tasks=[gpqa_generative]", "eval.gpqa.path={tmp}/train.jsonl"], "{tmp}/train.jsonl"),
        (["eval.tasks=[bfcl]", "eval.bfcl.categories=[simple_pyton]"], "eval.bfcl.categories"),
        (["eval.num_processes=3"], "eval.num_processes is 3, and this machine has 2 GPUs; set it to 2"),
        (["eval.suite=publisht"], "override 'eval.suite=publisht': eval.suite: there is no suite 'publisht', nor a file of that name; the nearest is 'published'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_scoring_is_said_before_the_first_stage(
    recipe_file: str, work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file, [text.replace("{tmp}", str(tmp_path)) for text in overrides]))

    assert str(caught.value).startswith(message.format(tmp=tmp_path, file=recipe_file)), str(caught.value)
    assert work == []
    assert not (tmp_path / "run").exists()


def test_a_missing_grader_is_said_before_the_first_stage_with_the_one_command(
    recipe_file: str, work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "absent"))

    with pytest.raises(HymbaAlignError, match="hymba-align install-bfcl"):
        pipeline.run_recipe(load_recipe(recipe_file, ["eval.tasks=[bfcl]"]))
    assert work == []
    assert not (tmp_path / "run").exists()
