"""Result files: what is written is what is read, what was tampered with is refused, and every score can be repeated."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.errors import ResultError
from hymba_align.eval.result import FORMAT, Sample, Score, TaskResult, read_result
from hymba_align.files import fingerprint
from hymba_align.model import HymbaForCausalLM
from hymba_align.recipe_eval import EvalSection


def sample(number: int, right: bool, **changed: Any) -> Sample:
    given: dict[str, Any] = {"question": "1+1?", "response": "2", "extracted": {"strict_match": "2"}, **changed}
    return Sample(id=str(number), target="#### 2", correct={"strict_match": right}, **given)


@pytest.fixture
def result() -> TaskResult:
    return TaskResult(
        task="gsm8k",
        checkpoint="runs/x/sft/final",
        suite="quick",
        n=4,
        total=9,
        limit=4,
        partial=True,
        scores={"strict_match": Score(0.75, 0.25, 4)},
        settings={"num_fewshot": 5},
        generation={"greedy": True, "until": ["</s>"]},
        chat_template={"name": "hymba", "sha256": "0" * 64},
        first_prompt="<extra_id_1>User\n1+1?\n",
        seed=1234,
        versions={"lm-eval": "0.4.13"},
        hardware={"cores": 1},
        processes=1,
        wall_s=1.5,
        new_tokens=8,
        tokens_per_second=5.25,
        warnings=("3 prompts lost their beginning",),
        samples=[sample(number, number != 2) for number in range(4)],
    )


@pytest.fixture
def path(result: TaskResult, tmp_path: Path) -> Path:
    result.write(tmp_path / "gsm8k.json")
    return tmp_path / "gsm8k.json"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a file as somebody would who also corrects its digest."""
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": fingerprint(content)}), encoding="utf-8")


def error_of(path: Path) -> str:
    with pytest.raises(ResultError) as caught:
        read_result(path)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_what_is_written_is_what_is_read(result: TaskResult, path: Path) -> None:
    assert read_result(path) == result


def test_a_file_without_the_command_can_be_read(result: TaskResult, path: Path) -> None:
    rewrite(path, lambda content: content.pop("command"))
    assert read_result(path) == result


def test_a_command_that_was_edited_is_refused(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"command": "hymba-align eval', '"command": "rm', 1), encoding="utf-8")
    assert error_of(path) == "gsm8k.json was changed or damaged since it was written (SHA-256); score again"


def test_half_a_surrogate_pair_from_a_models_call_does_not_lose_the_result(result: TaskResult, tmp_path: Path) -> None:
    odd = replace(result, samples=[sample(number, number != 2, verdict="\ud800 é") for number in range(4)])
    odd.write(tmp_path / "x.json")
    assert {one.verdict for one in read_result(tmp_path / "x.json").samples} == {"\\ud800 é"}


@pytest.mark.parametrize("old", ['"value": 0.75', '"n": 4', '"response": "2"', '"seed": 1234', '"lm-eval": "0.4.13"'])
def test_a_file_that_was_edited_is_refused(path: Path, old: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, old[:-1] + ("9" if old[-1] != '"' else '9"'), 1), encoding="utf-8")
    assert error_of(path) == "gsm8k.json was changed or damaged since it was written (SHA-256); score again"


def test_a_file_of_an_earlier_version_asks_to_score_again(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["format"], content["sha256"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert error_of(path) == f"gsm8k.json has the format 1 of another version of hymba-align, not {FORMAT}; score again"


def test_a_file_that_is_cut_off_says_what_is_wrong(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    assert error_of(path).startswith("gsm8k.json cannot be read as JSON (")
    assert error_of(path).endswith("); score again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(partial=False), "partial is False, with 4 of 9 problems scored"),
        (lambda content: content.update(scores={}), "it holds no score"),
        (
            lambda content: content["scores"]["strict_match"].update(value=1.0),
            "the score strict_match is 1.0, and its samples make 0.75",
        ),
        (
            lambda content: content["scores"]["strict_match"].update(value=1.5, n=3),
            "the score strict_match is 1.5 over 3 problems",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    rewrite(path, change)
    assert error_of(path) == f"gsm8k.json contradicts itself: {said}; score again"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("samples"),
        lambda content: content.update(extra=1),
        lambda content: content.update(scores={"strict_match": 0.5}),
        lambda content: content.update(samples=[{"id": "1"}]),
    ],
)
def test_a_file_that_lacks_or_adds_a_part_is_refused(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(path, change)
    assert error_of(path).startswith("gsm8k.json lacks what a result has, or has more (")


def test_verdicts_of_a_score_are_those_of_its_name_or_of_its_group(result: TaskResult) -> None:
    assert result.problems("strict_match") == {"0": True, "1": True, "2": False, "3": True}
    grouped = replace(
        result,
        scores={"live": Score(0.75, None, 4), "overall": Score(0.5, None, 8)},
        samples=[sample(number, number != 2, group="live") for number in range(4)],
    )
    assert grouped.problems("live") == result.problems("strict_match")
    assert grouped.problems("overall") is None


def test_the_command_names_what_is_not_at_its_default_and_enters_the_score(result: TaskResult) -> None:
    section = EvalSection(
        suite="quick", tasks=("gsm8k", "gpqa"), stages=("sft",), num_processes=4,
        gsm8k={"train_path": "a b.jsonl", "num_fewshot": 3}, bfcl={"categories": ("live_simple", "multiple")},
    )  # fmt: skip
    made = replace(
        result, section=section.model_dump(mode="json"), chat_template={"name": "released", "sha256": "0" * 64}
    )
    words = shlex.split(made.command)
    assert words[:7] == ["hymba-align", "eval", "runs/x/sft/final", "--tasks", "gsm8k", "--chat-template", "released"]
    assert {"gsm8k.train_path=a b.jsonl", "gsm8k.num_fewshot=3", 'bfcl.categories=["live_simple", "multiple"]'} <= {
        *words
    }
    assert "limit=100" in words  # of the suite
    assert not any(word.startswith(("suite", "stages", "num_processes")) for word in words)


def test_the_command_in_a_file_gives_the_same_scores_and_answers_again(
    model: HymbaForCausalLM, tokenizer: Any, section: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    keys = [f"gsm8k.train_path={section.gsm8k.train_path}", f"gsm8k.test_path={section.gsm8k.test_path}"]
    keys += ["gsm8k.num_fewshot=2", "gsm8k.shots=first", "limit=5", "max_new_tokens=6", "batch_size=2"]
    assert main(["eval", "checkpoint", "--tasks", "gsm8k_nvidia", "--output", "first", *keys]) == 0
    first = read_result(tmp_path / "first" / "gsm8k_nvidia.json")

    written = json.loads((tmp_path / "first" / "gsm8k_nvidia.json").read_text(encoding="utf-8"))["command"]
    assert main([*shlex.split(written)[1:], "--output", "again"]) == 0

    again = read_result(tmp_path / "again" / "gsm8k_nvidia.json")
    moment = ("wall_s", "tokens_per_second", "finished", "peak_memory_bytes")
    assert {**asdict(first), **dict.fromkeys(moment)} == {**asdict(again), **dict.fromkeys(moment)}
    assert first.n == 5
    assert any(one.response for one in first.samples)
