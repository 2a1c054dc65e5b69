"""GSM8K through lm-evaluation-harness: the official scoring, our prompts, local files."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.data.rendering import render
from hymba_align.errors import DataError, RecipeError
from hymba_align.eval import TaskResult, evaluate, read_result
from hymba_align.eval.gsm8k import data_files, load_task, score_gsm8k, score_gsm8k_nvidia
from hymba_align.recipe_eval import EvalSection, GSM8KSection


def shown(section: EvalSection, **changes: Any) -> EvalSection:
    return section.model_copy(update=changes)


def test_right_answers_score_one_and_wrong_answers_zero(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, solutions: dict[str, str]
) -> None:
    right = score_gsm8k(run_of(look_up(lambda question: solutions[question] + "</s>"), section))
    assert {name: score.value for name, score in right.scores.items()} == {"strict_match": 1.0, "flexible_match": 1.0}
    assert (right.n, right.total, right.partial, right.cut_off) == (7, 7, False, 0)
    wrong = score_gsm8k(run_of(look_up(lambda question: solutions[question] + "7</s>"), section))
    assert {name: score.value for name, score in wrong.scores.items()} == {"strict_match": 0.0, "flexible_match": 0.0}
    assert [sample.question for sample in wrong.samples] == list(solutions)
    assert all(sample.response == solutions[sample.question] + "7" for sample in wrong.samples)


def test_flexible_match_needs_no_marker_and_the_error_is_that_of_a_mean(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, solutions: dict[str, str]
) -> None:
    known = list(solutions)[:3]

    def answer(question: str) -> str:
        number = solutions[question].split("#### ")[1]
        return f"The answer is {number}.</s>" if question in known else "I cannot say.</s>"

    result = score_gsm8k(run_of(look_up(answer), section))
    assert result.scores["strict_match"].value == 0.0
    share = 3 / 7
    assert result.scores["flexible_match"].value == pytest.approx(share)
    assert result.scores["flexible_match"].stderr == pytest.approx((share * (1 - share) / 6) ** 0.5)
    first = result.samples[0]
    assert first.correct == {"strict_match": False, "flexible_match": True}
    assert first.extracted["strict_match"] == "[invalid]"


def test_an_answer_ends_where_the_next_turn_would_begin(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, solutions: dict[str, str]
) -> None:
    model = look_up(lambda question: solutions[question] + "\n<extra_id_1>User\nAnd 5?\n#### 5")
    babble = score_gsm8k(run_of(model, shown(section, max_new_tokens=200)))
    assert babble.scores["flexible_match"].value == 1.0
    assert babble.cut_off == 0
    assert babble.samples[0].response == next(iter(solutions.values())) + "\n"


def test_an_answer_that_restates_the_question_is_not_cut_off_there(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, solutions: dict[str, str]
) -> None:
    model = look_up(lambda question: f"Question: {question}\nAnswer: {solutions[question]}</s>")
    result = score_gsm8k(run_of(model, shown(section, max_new_tokens=400)))
    assert result.scores["strict_match"].value == 1.0
    assert all(sample.response == f"Question: {sample.question}\nAnswer: {sample.target}" for sample in result.samples)


def test_answers_that_run_into_the_limit_are_counted_and_marked(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, solutions: dict[str, str]
) -> None:
    endless = list(solutions)[:2]
    model = look_up(lambda question: "and so on " * 40 if question in endless else solutions[question] + "</s>")
    result = score_gsm8k(run_of(model, section))
    assert result.cut_off == 2
    assert [sample.cut_off for sample in result.samples] == [sample.question in endless for sample in result.samples]
    assert [sample.tokens for sample in result.samples[:2]] == [48, 48]
    assert result.generation["max_new_tokens"] == 48


def questions_and_answers(path: str | None) -> list[dict[str, str]]:
    assert path is not None
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def rendered(tokenizer: Any, shots: list[dict[str, str]], question: str, asked: str) -> list[int]:
    """The prompt as training renders it; `asked` is the turn with {} for the question."""
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": asked.format(shot["question"])})
        messages.append({"role": "assistant", "content": shot["answer"]})
    messages.append({"role": "user", "content": asked.format(question)})
    ids: list[int] = render(tokenizer, messages, add_generation_prompt=True).input_ids
    return ids


@pytest.mark.parametrize(
    ("score", "asked"),
    [(score_gsm8k, "Question: {}\nAnswer:"), (score_gsm8k_nvidia, "Question: {}")],
    ids=["gsm8k", "gsm8k_nvidia"],
)
def test_prompts_are_token_for_token_what_training_renders(
    look_up: Callable[..., Any],
    tokenizer: Any,
    run_of: Callable[..., Any],
    section: EvalSection,
    score: Callable[..., TaskResult],
    asked: str,
) -> None:
    model = look_up(lambda question: "none</s>")
    result = score(run_of(model, section))
    [(given, _)] = model.given
    shots = questions_and_answers(section.gsm8k.train_path)
    draw = random.Random(1234)  # as documented: afresh for each problem, in the order of the test file
    expected = [
        rendered(tokenizer, draw.sample(shots, 5), row["question"], asked)
        for row in questions_and_answers(section.gsm8k.test_path)
    ]
    assert sorted(given) == sorted(expected)
    assert all(tokenizer.bos_token_id not in ids for ids in given)
    assert tokenizer.encode(result.first_prompt, add_special_tokens=False) == expected[0]
    assert result.seed == 1234


def test_first_shots_are_the_first_training_rows_for_every_problem(
    look_up: Callable[..., Any], tokenizer: Any, run_of: Callable[..., Any], section: EvalSection
) -> None:
    files = section.gsm8k.model_copy(update={"shots": "first", "num_fewshot": 3})
    model = look_up(lambda question: "none</s>")
    result = score_gsm8k(run_of(model, shown(section, gsm8k=files)))
    [(given, _)] = model.given
    first = questions_and_answers(section.gsm8k.train_path)[:3]
    rows = questions_and_answers(section.gsm8k.test_path)
    assert sorted(given) == sorted(rendered(tokenizer, first, row["question"], "Question: {}\nAnswer:") for row in rows)
    assert (result.seed, result.settings["shots"]) == (None, "first")


@pytest.mark.parametrize("score", [score_gsm8k, score_gsm8k_nvidia], ids=["gsm8k", "gsm8k_nvidia"])
def test_a_result_names_how_it_was_asked(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection, score: Callable[..., TaskResult]
) -> None:
    result = score(run_of(look_up(lambda question: "none</s>"), shown(section, limit=1)))
    question = "Question: {{question}}" + ("" if result.task == "gsm8k_nvidia" else "\nAnswer:")
    assert result.task == score.__name__.removeprefix("score_")
    assert result.settings["question"] == question
    assert result.settings["harness_task_version"] == 3.0
    assert result.settings["apply_chat_template"] is result.settings["fewshot_as_multiturn"] is True
    assert result.settings["num_fewshot"] == 5
    assert result.generation == {
        "greedy": True,
        "max_new_tokens": 48,
        "until": ["</s>", "<|im_end|>", "<extra_id_1>"],
        "end_token": "</s>",
    }
    assert result.first_prompt is not None
    assert result.first_prompt.count("Question: ") == 6
    assert ("Answer:" in result.first_prompt) is (result.task == "gsm8k")


def test_generation_is_greedy_and_bounded(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection
) -> None:
    model = look_up(lambda question: "none</s>")
    score_gsm8k(run_of(model, section))
    [(_, settings)] = model.given
    assert settings == {"max_new_tokens": 48, "batch_size": 3, "prefill_tokens": 8192}  # no temperature, no top_p


def test_scores_depend_neither_on_random_state_nor_on_the_batch_size(
    model: Any, run_of: Callable[..., Any], section: EvalSection
) -> None:
    section = shown(section, max_new_tokens=6)
    one = score_gsm8k(run_of(model, section))
    torch.manual_seed(99)
    random.seed(99)
    other = score_gsm8k(run_of(model, shown(section, batch_size=1)))
    assert [sample.response for sample in one.samples] == [sample.response for sample in other.samples]
    assert any(sample.response for sample in one.samples)


def test_a_limit_scores_the_first_problems_as_the_full_test_does_and_says_partial(
    model: Any, run_of: Callable[..., Any], section: EvalSection
) -> None:
    section = shown(section, max_new_tokens=6)
    whole = score_gsm8k(run_of(model, section))
    part = score_gsm8k(run_of(model, shown(section, limit=2)))
    assert (part.n, part.total, part.limit, part.partial) == (2, 7, 2, True)
    assert part.samples == whole.samples[:2]


def test_prompts_beyond_the_context_are_counted_aloud(
    look_up: Callable[..., Any], run_of: Callable[..., Any], section: EvalSection
) -> None:
    model = look_up(lambda question: "none</s>")
    model.config.max_position_embeddings = 100
    result = score_gsm8k(run_of(model, section))
    assert result.truncated_prompts == 7
    assert {len(prompt) for prompt in model.given[0][0]} == {52}
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("7 prompts lost their beginning: the longest has ")
    assert "the model's context of 100 leaves 52 beside eval.max_new_tokens" in result.warnings[0]
    model.config.max_position_embeddings = 48
    with pytest.raises(
        RecipeError, match=r"eval.max_new_tokens is 48, which leaves no room for a prompt in the model's"
    ):
        score_gsm8k(run_of(model, section))


def test_without_files_the_task_asks_the_hub_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(**arguments: Any) -> Any:
        asked.append(arguments)
        row = datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}])
        return datasets.DatasetDict(train=row, test=row)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_task(EvalSection())
    assert asked == [{"path": "openai/gsm8k", "name": "main"}]


def test_a_hub_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(DataError) as raised:
        load_task(EvalSection())
    assert str(raised.value) == (
        "openai/gsm8k is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; set gsm8k.train_path and gsm8k.test_path "
        "(in a recipe under eval) to local files"
    )


def test_only_the_harness_is_silenced_and_other_libraries_still_reach_the_terminal(
    look_up: Callable[..., Any],
    run_of: Callable[..., Any],
    section: EvalSection,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(question: str) -> str:
        logging.getLogger("another.library").warning("a logged warning")
        print("a library's warning", file=sys.stderr)
        sys.stderr.write("half a line, ")
        print("\nand a last one", file=sys.stderr)
        return "none</s>"

    score_gsm8k(run_of(look_up(answer), section))
    printed = capfd.readouterr().err
    assert printed.count("a library's warning\n") == 7
    assert printed.count("half a line, \nand a last one\n") == 7
    assert {(record.name, record.msg) for record in caplog.records} == {("another.library", "a logged warning")}
    assert "score gsm8k  7/7 answers (100 %)" in printed
    assert "\r" not in printed


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            None,
            '{"question": "1?", "answer": "#### 1"}',
            "eval.gsm8k.train_path is missing; the 5 few-shot examples come",
        ),
        (
            '{"question": "1?", "answer": "#### 1"}',
            None,
            "eval.gsm8k.test_path is missing: training data is also",
        ),
        ("ok", '{"question": "1?", "answer": "#### 1"}\n{"question": ', "test.jsonl:2"),
        (
            "ok",
            '{"question": "1?", "answer": "one"}',
            "test.jsonl:1: the answer has no line '#### <number>' to compare",
        ),
        ("ok", "", "test.jsonl: holds no rows; it needs at least one"),
        (
            "ok",
            '{"question": "1?", "solution": "1"}',
            "test.jsonl:1: GSM8K rows have a question and an answer; this one",
        ),
        ("ok", '\n{"question": "1?", "answer": 1}', "test.jsonl:2: the column 'answer' must be text, not 1"),
        (
            '{"question": "1?", "answer": "#### 1"}',
            "ok",
            "train.jsonl: the file has 1 rows; eval.gsm8k.train_path needs at",
        ),
    ],
)
def test_files_that_cannot_be_scored_are_one_sentence(
    tmp_path: Path, train: str | None, test: str | None, message: str
) -> None:
    paths: dict[str, str | None] = {}
    for name, text in (("train", train), ("test", test)):
        path = tmp_path / f"{name}.jsonl"
        if text is not None:
            path.write_text('{"question": "1?", "answer": "#### 1"}\n' * 5 if text == "ok" else text, encoding="utf-8")
        paths[f"{name}_path"] = str(path) if text is not None else None
    with pytest.raises((DataError, RecipeError)) as raised:
        load_task(EvalSection(gsm8k=GSM8KSection(**paths)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_names_the_key_and_zero_shots_need_no_training_file(
    tmp_path: Path, section: EvalSection, solutions: dict[str, str]
) -> None:
    missing = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file; correct eval.gsm8k.test_path"):
        load_task(EvalSection(gsm8k=GSM8KSection(train_path=missing, test_path=missing)))
    files = GSM8KSection(test_path=section.gsm8k.test_path, num_fewshot=0)
    task = load_task(EvalSection(gsm8k=files))
    assert len(task.eval_docs) == len(solutions)


def test_scoring_a_checkpoint_writes_every_sample_and_shows_how_far_it_is(
    model: Any, tokenizer: Any, section: EvalSection, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    capfd.readouterr()
    results = evaluate(tmp_path / "checkpoint", shown(section, max_new_tokens=4), tmp_path / "eval")
    printed = capfd.readouterr()
    assert read_result(tmp_path / "eval" / "gsm8k.json") == results["gsm8k"]
    assert len(results["gsm8k"].samples) == 7
    assert printed.out == ""
    assert "score gsm8k  7/7 answers (100 %)" in printed.err
    assert "\r" not in printed.err.partition("score gsm8k")[2]
    assert "Running generate_until" not in printed.err
    assert "WARNING" not in printed.err


def test_the_files_that_a_score_depends_on_are_those_of_the_section(section: EvalSection) -> None:
    assert data_files(EvalSection()) == []
    assert data_files(section) == [Path(str(section.gsm8k.train_path)), Path(str(section.gsm8k.test_path))]
