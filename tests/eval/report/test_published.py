"""Whether a result may stand beside the published score: every reason, read off the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hymba_align.eval.report.published as published
from hymba_align.eval.report.contents import Run
from hymba_align.eval.report.published import Beside, beside, digest_of
from hymba_align.eval.result import Score, TaskResult

Make = Callable[..., TaskResult]
GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"


def run_of(root: Path, model: str | None = "nvidia/Hymba-1.5B-Base") -> Run:
    return Run(root, (), (), {"base": {"model": model}}, {}, {}, {})


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, result_of: Make) -> Callable[[str], TaskResult]:
    """Results on all of an invented test set that counts as the official one."""

    def make(task: str) -> TaskResult:
        made = result_of(task, [True, False, True])
        monkeypatch.setitem(published.TOTALS, task, 3)
        monkeypatch.setattr(published, "GSM8K_QUESTIONS", digest_of([sample.question or "" for sample in made.samples]))
        monkeypatch.setattr(published, "GPQA_IDS", digest_of([sample.id for sample in made.samples]))
        return made

    return make


@pytest.mark.parametrize(("task", "percent"), [("gsm8k", 58.76), ("gsm8k_nvidia", 58.76), ("gpqa", 31.03)])
def test_the_full_test_by_the_published_protocol_compares(
    tmp_path: Path, official: Callable[[str], TaskResult], task: str, percent: float
) -> None:
    found = beside(run_of(tmp_path), official(task))
    assert found == Beside(percent, "yes", (published.NOTES[task],))


@pytest.mark.parametrize("model", ["nvidia/Hymba-1.5B-Base", "nvidia/Hymba-1.5B-Instruct", "/models/Hymba-1.5B-Base"])
def test_runs_that_start_from_the_released_model_show_it(
    tmp_path: Path, official: Callable[[str], TaskResult], model: str
) -> None:
    assert beside(run_of(tmp_path, model), official("gsm8k")) is not None


@pytest.mark.parametrize("model", [None, "me/my-tiny", "nvidia/Hymba-125M"])
def test_runs_that_start_from_anything_else_do_not(
    tmp_path: Path, official: Callable[[str], TaskResult], model: str | None
) -> None:
    assert beside(run_of(tmp_path, model), official("gsm8k")) is None


def test_another_shape_under_the_released_name_does_not(tmp_path: Path, official: Callable[[str], TaskResult]) -> None:
    (tmp_path / "sft" / "final").mkdir(parents=True)
    config = tmp_path / "sft" / "final" / "config.json"
    config.write_text(json.dumps({"hidden_size": 1600, "num_hidden_layers": 32, "vocab_size": 32001}))
    assert beside(run_of(tmp_path), official("gsm8k")) is not None
    config.write_text(json.dumps({"hidden_size": 192, "num_hidden_layers": 4, "vocab_size": 32001}))
    assert beside(run_of(tmp_path), official("gsm8k")) is None


REASONS: list[tuple[str, dict[str, Any], str]] = [
    ("gsm8k", {"partial": True, "total": 3, "n": 2}, "only 2 of 3 problems were scored"),
    ("gsm8k", {"total": 200, "n": 200}, "its test set has 200 problems, the official one 3"),
    ("gsm8k", {"truncated_prompts": 7}, "7 prompts lost their beginning"),
    ("gsm8k", {"num_fewshot": 4}, "num_fewshot is 4, and the published score is 5-shot"),
    ("gsm8k", {"shots": "first"}, "shots is first, and the harness draws other examples for every problem"),
    ("gsm8k", {"shots": None}, "shots is not recorded, and the harness draws other examples for every problem"),
    (
        "gsm8k",
        {"apply_chat_template": False},
        "apply_chat_template is False, and the published score uses the chat template",
    ),
    (
        "gsm8k",
        {"fewshot_as_multiturn": False},
        "fewshot_as_multiturn is False, and the published score has the examples as turns",
    ),
    (
        "gsm8k",
        {"generation": {"max_new_tokens": 80}, "cut_off": 2},
        "2 answers were cut off at 80 new tokens, where the harness allows 256",
    ),
    ("gpqa", {"subset": "diamond"}, "subset is diamond, and 31.03 % is 139 of the 448 problems of main"),
    ("gpqa", {"num_fewshot": 5}, "num_fewshot is 5, and the published score is 0-shot"),
    (
        "gpqa_generative",
        {},
        "its answers were generated, and the published score is taken for the harness's multiple choice",
    ),
]


@pytest.mark.parametrize(("task", "changed", "reason"), REASONS)
def test_each_departure_from_the_published_protocol_is_a_reason(
    tmp_path: Path, official: Callable[[str], TaskResult], task: str, changed: dict[str, Any], reason: str
) -> None:
    made = official(task)
    fields = {key: value for key, value in changed.items() if hasattr(made, key)}
    settings = {key: value for key, value in changed.items() if not hasattr(made, key)}
    found = beside(run_of(tmp_path), replace(made, settings={**made.settings, **settings}, **fields))
    assert found is not None
    assert (found.verdict, found.reasons) == ("no", (reason,))
    assert found.words == f"no: {reason}"


@pytest.mark.parametrize("task", ["gsm8k", "gpqa"])
def test_other_problems_in_the_same_number_are_a_reason(
    tmp_path: Path, official: Callable[[str], TaskResult], task: str
) -> None:
    made = official(task)
    samples = [replace(made.samples[0], question="Another?", id="another"), *made.samples[1:]]
    found = beside(run_of(tmp_path), replace(made, samples=samples))
    assert found == Beside(published.PUBLISHED[task], "no", ("its problems are not those of the official test set",))


def test_bfcl_compares_approximately_at_best(tmp_path: Path, result_of: Make) -> None:
    made = result_of("bfcl", [True])
    whole = replace(made, scores=dict.fromkeys(("live", *published.BFCL_CATEGORIES), Score(0.5, None, 1)))
    found = beside(run_of(tmp_path), whole)
    assert found == Beside(46.40, "approximately", (published.NOTES["bfcl"],))


def test_bfcl_without_its_live_score_has_nothing_beside_it(tmp_path: Path, result_of: Make) -> None:
    made = result_of("bfcl", [True])
    assert beside(run_of(tmp_path), replace(made, scores={"simple_python": Score(0.5, None, 1)})) is None


def test_the_official_questions_are_known_by_their_digest() -> None:
    if not GSM8K.is_file():
        pytest.skip("the official test.jsonl is not here")
    questions = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == published.TOTALS["gsm8k"]
    assert digest_of(questions) == published.GSM8K_QUESTIONS
    assert digest_of(questions[:-1]) != published.GSM8K_QUESTIONS


def test_the_records_of_gpqa_main_are_known_by_their_digest() -> None:
    archive = GSM8K.parents[1] / "gpqa" / "dataset.zip"
    if not archive.is_file():
        pytest.skip("GPQA's archive is not here")
    from hymba_align.eval.gpqa import read_rows
    from hymba_align.recipe_eval import EvalSection

    ids = [row["id"] for row in read_rows(EvalSection.model_validate({"gpqa": {"path": str(archive)}}))]
    assert len(ids) == published.TOTALS["gpqa"]
    assert digest_of(ids) == published.GPQA_IDS
