"""Scoring a checkpoint: what is run again, what an interrupted evaluation takes over, and what is said before it begins."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import hymba_align.checkpoint
from hymba_align import evaluation
from hymba_align.cli import main
from hymba_align.errors import CheckpointError, DataError, SeveralErrors
from hymba_align.eval import TaskResult, evaluate, lm_tasks, read_result
from hymba_align.eval.answer_store import AnswerStore
from hymba_align.eval.bfcl import environment
from hymba_align.eval.inputs import SCORERS, check_tasks, data_files, grader, suite_words, task_inputs
from hymba_align.eval.run import summary
from hymba_align.model import HymbaForCausalLM
from hymba_align.recipe_eval import TASKS, EvalSection

OF_THE_MOMENT = ("wall_s", "tokens_per_second", "reused_answers", "new_tokens", "finished", "peak_memory_bytes")
Evaluate = Callable[..., TaskResult]


@pytest.fixture
def checkpoint(model: HymbaForCausalLM, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def short(section: EvalSection) -> EvalSection:
    """Seven problems with one shot, and answers of at most 6 tokens."""
    gsm8k = section.gsm8k.model_copy(update={"num_fewshot": 1})
    return section.model_copy(update={"max_new_tokens": 6, "gsm8k": gsm8k})


def without_the_moment(result: TaskResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name not in OF_THE_MOMENT}


def interrupt_after(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process were stopped once so many answers are stored."""
    add, stored = AnswerStore.add, []

    def counting(self: AnswerStore, key: str, record: dict[str, Any]) -> None:
        add(self, key, record)
        stored.append(key)
        if len(stored) == answers:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStore, "add", counting)


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(hymba_align.checkpoint, "load_model", load_model)


def test_a_result_is_written_with_all_that_its_number_came_from(
    checkpoint: Path, short: EvalSection, tmp_path: Path
) -> None:
    said: list[str] = []

    result = evaluate(checkpoint, short, tmp_path / "out", say=said.append)["gsm8k"]

    assert read_result(tmp_path / "out" / "gsm8k.json") == result
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gsm8k.json"], "stored answers are gone"
    assert (result.checkpoint, result.n, result.total, result.partial) == (str(checkpoint), 7, 7, False)
    assert (result.processes, result.reused_answers) == (1, 0)
    assert result.new_tokens == sum(sample.tokens or 0 for sample in result.samples) > 0
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0
    assert result.wall_s > 0
    assert result.earlier_s == 0
    assert result.peak_memory_bytes is not None
    assert result.peak_memory_bytes > 100 * 2**20, "torch alone takes more"
    assert (result.settings["dtype"], result.settings["device"]) == ("float32", "cpu")
    assert result.chat_template["name"] == "hymba"
    assert len(result.chat_template["sha256"]) == len(result.inputs or "") == 64
    assert result.first_prompt is not None
    assert result.first_prompt.startswith("<extra_id_")
    assert {"hymba-align", "lm-eval", "torch", "transformers", "datasets"} <= set(result.versions)
    assert result.hardware["cores"] >= 1
    assert result.section["gsm8k"]["num_fewshot"] == 1
    assert said == [summary(result)]


def test_a_task_that_is_complete_and_unchanged_is_not_scored_again(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(checkpoint, short, tmp_path / "out")
    refuse_to_load(monkeypatch)
    said: list[str] = []

    assert evaluate(checkpoint, short, tmp_path / "out", say=said.append) == first
    assert said == [f"gsm8k: complete and unchanged, not scored again ({tmp_path}/out/gsm8k.json)"]
    # What changes no score.
    assert (
        evaluate(checkpoint, short.model_copy(update={"batch_size": 1, "num_processes": 1}), tmp_path / "out") == first
    )
    (checkpoint / "README.md").write_text("# Mine")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert evaluate(checkpoint, short, tmp_path / "out") == first
    # The same protocol by another name.
    named = evaluate(checkpoint, short.model_copy(update={"suite": "full"}), tmp_path / "out")
    suite = "full, but for max_new_tokens, gsm8k.train_path, gsm8k.test_path, gsm8k.num_fewshot"
    assert named["gsm8k"] == replace(first["gsm8k"], suite=suite) == read_result(tmp_path / "out" / "gsm8k.json")


CHANGES = (
    "limit",
    "max_new_tokens",
    "shots",
    "weights",
    "config",
    "tokenizer",
    "data",
    "template",
    "definition",
    "grader",
    "damaged",
)


@pytest.mark.parametrize("what", CHANGES)
def test_a_task_is_scored_again_when_anything_that_its_score_depends_on_changed(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    evaluate(checkpoint, short, tmp_path / "out")
    section, template = short, "hymba"
    if what in ("limit", "max_new_tokens"):
        section = short.model_copy(update={what: 5})
    elif what == "shots":
        section = short.model_copy(update={"gsm8k": short.gsm8k.model_copy(update={"num_fewshot": 2})})
    elif what == "weights":
        weights = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif what in ("config", "tokenizer"):
        with (checkpoint / f"{what}.json").open("a") as file:
            file.write("\n")
    elif what == "data":
        with Path(str(short.gsm8k.test_path)).open("a") as file:
            file.write(json.dumps({"question": "What is 1+1?", "answer": "#### 2"}) + "\n")
    elif what == "template":
        template = str(tmp_path / "own.jinja")
        shutil.copy(Path(hymba_align.__file__).parent / "data" / "hymba.jinja", template)
        with Path(template).open("a") as file:
            file.write("{# mine #}")
    elif what == "definition":
        shutil.copytree(lm_tasks.TASKS_FOLDER, tmp_path / "tasks")
        monkeypatch.setattr(lm_tasks, "TASKS_FOLDER", tmp_path / "tasks")
        with (tmp_path / "tasks" / "gsm8k.yaml").open("a") as file:
            file.write("target_delimiter: ''\n")
    elif what == "grader":
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0.4.14" if name == "lm-eval" else version(name)
        )
    else:
        path = tmp_path / "out" / "gsm8k.json"
        path.write_text(path.read_text().replace('"n": 7', '"n": 8', 1))
    refuse_to_load(monkeypatch)
    path = tmp_path / "out" / "gsm8k.json"
    before, said = path.read_bytes(), list[str]()

    with pytest.raises(AssertionError, match="the model is loaded"):
        evaluate(checkpoint, section, tmp_path / "out", chat_template=template, say=said.append)
    assert not path.exists(), "a stale score stands beside new ones"
    assert path.with_name("gsm8k.previous.json").read_bytes() == before
    was = {
        "limit": "limit unset",
        "max_new_tokens": "max_new_tokens 6",
        "shots": "gsm8k.num_fewshot 1",
        "template": "chat template hymba",
        "grader": f"lm-eval {importlib.metadata.metadata('lm-eval')['version']}",
    }.get(what, "bytes of the checkpoint or the data, or the task's definition")
    reason = "was made with other inputs (" + was + ")"
    if what == "damaged":
        reason = "was changed or damaged since it was written (SHA-256)"
    assert said == [f"gsm8k: {path} {reason} and is now gsm8k.previous.json"]


def test_a_result_of_another_checkpoint_makes_room_over_an_older_one_but_only_after_all_is_checked(
    checkpoint: Path, short: EvalSection, tmp_path: Path
) -> None:
    first = evaluate(checkpoint, short, tmp_path / "out")["gsm8k"]
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    with (other / "config.json").open("a") as file:
        file.write("\n")
    aside = tmp_path / "out" / "gsm8k.previous.json"
    aside.write_text("an older one")
    said: list[str] = []
    bad = short.model_copy(update={"gsm8k": short.gsm8k.model_copy(update={"test_path": str(tmp_path / "absent")})})
    with pytest.raises(DataError):
        evaluate(other, bad, tmp_path / "out", say=said.append)
    assert (said, aside.read_text()) == ([], "an older one")

    second = evaluate(other, short, tmp_path / "out", say=said.append)["gsm8k"]

    assert said[0] == (
        f"gsm8k: {tmp_path}/out/gsm8k.json was made with other inputs (checkpoint {checkpoint}) and is now gsm8k.previous.json"
    )
    assert read_result(aside) == first
    assert read_result(tmp_path / "out" / "gsm8k.json") == second


def test_the_command_that_starts_several_processes_says_that_a_result_makes_room(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", list[str]()
    first = evaluate(checkpoint, short, out)["gsm8k"]

    def launch_here(*_: Any, **__: Any) -> None:
        raise AssertionError("processes are started")

    monkeypatch.setattr(evaluation, "launch_here", launch_here)
    two = short.model_copy(update={"num_processes": 2, "limit": 3})
    with pytest.raises(AssertionError, match="processes are started"):
        evaluation.score(str(checkpoint), two, out, chat_template="hymba", say=said.append)

    reason = "was made with other inputs (limit unset)"
    assert said == [f"gsm8k: {out}/gsm8k.json {reason} and is now gsm8k.previous.json"]
    assert read_result(out / "gsm8k.previous.json") == first


def test_an_interrupted_evaluation_continues_from_the_answers_already_given(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(checkpoint, short, tmp_path / "whole")["gsm8k"]
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate(checkpoint, short, tmp_path / "out")
    assert not (tmp_path / "out" / "gsm8k.json").exists()
    said: list[str] = []

    result = evaluate(checkpoint, short.model_copy(update={"batch_size": 2}), tmp_path / "out", say=said.append)[
        "gsm8k"
    ]

    assert said[0] == "gsm8k: continues with the 4 answers that an interrupted run left"
    assert ", 4 answers taken over, " in said[1]
    assert result.reused_answers == 4
    assert result.reused_tokens + result.new_tokens == whole.new_tokens
    assert 0 < result.earlier_s < 60
    assert result.new_tokens < whole.new_tokens
    assert [asdict(sample) for sample in result.samples] == [asdict(sample) for sample in whole.samples]
    assert (result.scores, result.inputs, result.first_prompt) == (whole.scores, whole.inputs, whole.first_prompt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gsm8k.json"]


def test_answers_of_other_weights_are_not_taken_over(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate(checkpoint, short, tmp_path / "out")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))

    assert evaluate(checkpoint, short, tmp_path / "out")["gsm8k"].reused_answers == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gsm8k.json"]


def test_a_task_that_is_added_is_scored_alone_and_a_task_that_fails_leaves_the_others(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = short.model_copy(update={"tasks": ("gsm8k", "gsm8k_nvidia")})
    with monkeypatch.context() as patch:
        interrupt_after(7 + 3, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate(checkpoint, both, tmp_path / "out")
    first = read_result(tmp_path / "out" / "gsm8k.json")
    said: list[str] = []

    results = evaluate(checkpoint, both, tmp_path / "out", say=said.append)

    assert list(results) == ["gsm8k", "gsm8k_nvidia"]
    assert results["gsm8k"] == first
    assert [line.split(" (")[0] for line in said[:2]] == [
        "gsm8k: complete and unchanged, not scored again",
        "gsm8k_nvidia: continues with the 3 answers that an interrupted run left",
    ]


@pytest.mark.parametrize("what", ["data", "checkpoint"])
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    checkpoint: Path, short: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    refuse_to_load(monkeypatch)
    if what == "data":
        (tmp_path / "test.jsonl").write_text("{\n")
        with pytest.raises(DataError, match=r"test\.jsonl:1: "):
            evaluate(checkpoint, short, tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match="there is no such checkpoint folder"):
            evaluate(tmp_path / "absent", short, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_limit_marks_the_result_partial_unless_it_is_all_there_is(
    checkpoint: Path, short: EvalSection, tmp_path: Path
) -> None:
    part, whole = (
        evaluate(checkpoint, short.model_copy(update={"limit": limit}), tmp_path / str(limit))["gsm8k"]
        for limit in (3, 7)
    )

    assert (part.n, part.total, part.partial) == (3, 7, True)
    assert "(3 of 7 problems: partial, " in summary(part)
    assert part.warnings == ("only the first problems were scored, 3 of 7",)
    assert whole.warnings == ()
    assert (whole.n, whole.total, whole.partial) == (7, 7, False)
    assert "(7 problems, " in summary(whole)


def test_a_result_names_its_suite_and_what_differs_from_it() -> None:
    def words(task: str, **keys: Any) -> str | None:
        return suite_words(EvalSection.model_validate({"suite": "published", **keys}), task)  # type: ignore[arg-type]

    assert words("gsm8k") == "published"
    assert words("gsm8k", batch_size=2, tasks=("gsm8k",), gpqa={"subset": "diamond"}) == "published"
    assert words("gpqa", gpqa={"subset": "diamond"}) == "published, but for gpqa.subset"
    assert words("gsm8k", limit=20, gsm8k={"num_fewshot": 0}) == "published, but for limit, gsm8k.num_fewshot"
    assert suite_words(EvalSection(), "gsm8k") is None


@pytest.mark.parametrize("changed", [{"max_new_tokens": 9}, {"gpqa": {"max_new_tokens": 9}}])
def test_how_long_answers_may_be_is_no_input_of_a_task_without_answers(changed: dict[str, Any]) -> None:
    def inputs(**keys: Any) -> list[str]:
        section = EvalSection.model_validate(keys)
        return [task_inputs(section, task, "weights", "template") for task in ("gpqa", "gpqa_generative")]

    before, after = inputs(), inputs(**changed)
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert suite_words(EvalSection.model_validate({"suite": "published", **changed}), "gpqa") == "published"
    assert inputs(limit=3)[0] != before[0] != inputs(gpqa={"subset": "diamond"})[0]


def test_all_that_keeps_tasks_from_being_scored_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "no-grader"))
    section = EvalSection.model_validate(
        {"gsm8k": {"test_path": str(tmp_path)}, "gpqa": {"path": str(tmp_path / "absent.zip")}}
    )

    with pytest.raises(SeveralErrors) as raised:
        check_tasks(section, TASKS, ask_hub=True)
    lines = str(raised.value).split("\n")
    assert lines[:3] == [
        "5 tasks cannot be scored:",
        f"  gsm8k, gsm8k_nvidia: {tmp_path} is a folder; eval.gsm8k.test_path names a file",
        f"  gpqa, gpqa_generative: {tmp_path}/absent.zip: no such file; set eval.gpqa.path to dataset.zip from "
        "github.com/idavidrein/gpqa",
    ]
    assert lines[3].startswith("  bfcl: ")
    assert "hymba-align install-bfcl" in lines[3]
    assert len(lines) == 4

    def fail(*_: Any, **__: Any) -> None:
        raise raised.value

    monkeypatch.setattr(evaluation, "run_evaluation", fail)
    assert main(["eval", "owner/hymba"]) == 2
    assert capsys.readouterr().err == f"Error: {raised.value}\nMore: hymba-align explain several\n"


def test_another_version_of_bfcls_grader_scores_bfcl_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {task: grader(task) for task in TASKS}
    monkeypatch.setattr(environment, "BFCL_VERSION", "2099.1.1")

    assert [task for task in TASKS if grader(task) != before[task]] == ["bfcl"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_names_its_files_and_checks_them(task: Any, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    section = EvalSection.model_validate(
        {"tasks": (task,), "gsm8k": {"train_path": absent, "test_path": absent}, "gpqa": {"path": absent}}
    )

    assert task in SCORERS
    files = data_files(section, task)
    if task != "bfcl":
        assert {str(path) for path in files} == {absent}
        with pytest.raises(DataError, match="absent"):
            check_tasks(section, [task], ask_hub=False)
