"""BFCL from end to end: prompts, a model that looks its answers up, the official verdicts, and what becomes of them."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.errors import RecipeError
from hymba_align.eval.bfcl.categories import (
    IRRELEVANCE,
    LIVE,
    LIVE_SCORE,
    MULTI_TURN,
    NON_LIVE,
    NOT_RUN,
    RUN,
    SINGLE_TURN,
    chosen_categories,
    shares,
)
from hymba_align.eval.bfcl.client import BFCLClient
from hymba_align.eval.bfcl.environment import bfcl_python
from hymba_align.eval.bfcl.prompts import prompts_of
from hymba_align.eval.bfcl.score import check_data, data_files, mean, score_bfcl, scores_of, share
from hymba_align.eval.result import Sample, Score, TaskResult, read_result
from hymba_align.eval.run import TaskRun
from hymba_align.eval.sharing import Processes
from hymba_align.model import HymbaConfig
from hymba_align.recipe_eval import BFCLSection, EvalSection

CONTEXT = 32768
CALL = '<toolcall> {"name": "made_up", "arguments": {}} </toolcall>'
IN_CONVERSATION = "That is done.</s>"
Answers = Callable[[dict[str, Any]], str]


@pytest.fixture(scope="module")
def problems_of(client: BFCLClient) -> Callable[[str], list[dict[str, Any]]]:
    return functools.cache(client.entries)


@pytest.fixture
def score(
    problems_of: Callable[[str], list[dict[str, Any]]],
    config: HymbaConfig,
    tokenizer: Any,
    look_up: Any,
    tmp_path: Path,
) -> Callable[..., TaskResult]:
    """The result of a model that gives `answer(entry)`, over categories and a limit."""

    def run(answer: Answers, categories: tuple[str, ...], limit: int | None) -> TaskResult:
        config.max_position_embeddings = CONTEXT
        said: dict[str, str] = {}
        problems = {category: problems_of(category) for category in categories}
        for category, count in shares({name: len(entries) for name, entries in problems.items()}, limit).items():
            entries = problems[category][: count if category in SINGLE_TURN else 0]
            for entry, ids in zip(entries, prompts_of(tokenizer, entries), strict=True):
                said[tokenizer.decode(ids)] = answer(entry) + tokenizer.eos_token
        bfcl = BFCLSection(categories=categories, max_new_tokens=2048)  # the small tokenizer makes many of a call
        section = EvalSection(tasks=("bfcl",), limit=limit, batch_size=4, bfcl=bfcl)
        task_run = TaskRun(
            model=look_up(
                lambda asked: next((text for prompt, text in said.items() if asked in prompt), IN_CONVERSATION)
            ),
            tokenizer=tokenizer,
            section=section,
            out_dir=tmp_path,
            checkpoint="my_tiny_model",  # with underscores, which the package would turn into slashes
            chat_template={"name": "hymba", "sha256": "0"},
            processes=Processes.alone(),
            identity="a model",
        )
        result = score_bfcl(task_run)
        task_run.answers_for("bfcl").finish()
        return result

    return run


def perfect(oracle: ModuleType) -> Answers:
    def answer(entry: dict[str, Any]) -> str:
        if entry["target"] == "no call":
            return "None of these functions can help."
        return CALL if entry["target"] == "any call" else str(oracle.as_toolcalls(oracle.right_calls(entry)))

    return answer


def test_a_perfect_model_gets_everything_and_the_result_says_how(
    score: Callable[..., TaskResult], oracle: ModuleType, tmp_path: Path
) -> None:
    result = score(perfect(oracle), SINGLE_TURN, 20)
    assert {name: one.value for name, one in result.scores.items()} == {
        **dict.fromkeys(("live", "non_live", *SINGLE_TURN), 1.0),
        "irrelevance_never_call": 1.0,
        "live_irrelevance_never_call": 1.0,
    }
    assert next(iter(result.scores)) == "live"
    assert (result.n, result.total, result.partial, result.limit) == (20, 3641, True, 20)
    assert result.checkpoint == "my_tiny_model"
    assert result.versions["bfcl-eval"] == "2026.3.23"
    assert result.first_prompt is not None
    assert result.first_prompt.startswith('<extra_id_0>System\n<tool> {"name": "calculate_triangle_area"')
    assert result.generation == {
        "greedy": True,
        "max_new_tokens": 2048,
        "until": ["<extra_id_1>"],
        "end_token": "</s>",
    }
    assert set(result.not_run) == {*MULTI_TURN, *NOT_RUN}
    assert result.warnings == ("only the first problems of each category were scored, 20 of 3,641",)
    assert result.settings["problems"]["live_multiple"] == "3 of 1053"
    result.write(tmp_path / "bfcl.json")  # which refuses scores that are not the means of their samples
    assert read_result(tmp_path / "bfcl.json") == result
    assert result.problems("live") == {one.id: True for one in result.samples if one.group in LIVE_SCORE}


def test_samples_hold_question_target_calls_and_verdict(score: Callable[..., TaskResult], oracle: ModuleType) -> None:
    wrong = '<toolcall> {"name": "calculate_triangle_area", "arguments": {"base": 10}} </toolcall>'
    result = score(lambda entry: wrong, ("simple_python",), 1)
    (sample,) = result.samples
    assert (sample.id, sample.group, sample.correct) == ("simple_python_0", "simple_python", {"simple_python": False})
    assert sample.question == "Find the area of a triangle with a base of 10 units and height of 5 units."
    assert json.loads(sample.target) == [
        {"calculate_triangle_area": {"base": [10], "height": [5], "unit": ["units", ""]}}
    ]
    assert sample.response == wrong
    assert sample.extracted == {"calls": "[{'calculate_triangle_area': {'base': 10}}]"}
    assert sample.verdict == "simple_function_checker:missing_required: Missing required parameter: 'height'."
    assert sample.tokens is not None
    assert sample.tokens > 5
    assert not sample.cut_off


def test_categories_that_were_not_run_count_for_nothing(score: Callable[..., TaskResult], oracle: ModuleType) -> None:
    result = score(perfect(oracle), ("live_simple", "simple_python"), 6)
    assert list(result.scores) == ["simple_python", "live_simple"]  # no mean over what is not there
    assert all(one.value == 1.0 for one in result.scores.values())
    assert result.not_run["live_multiple"] == "not among eval.bfcl.categories"
    assert result.not_run["web_search_base"].startswith("agentic: needs the internet")


@pytest.mark.parametrize(("answer", "value"), [("I cannot help with that.", 1.0), (CALL, 0.0)])
def test_irrelevance_stands_beside_a_model_that_never_calls(
    score: Callable[..., TaskResult], answer: str, value: float
) -> None:
    result = score(lambda entry: answer, (*IRRELEVANCE, "live_relevance"), 9)
    assert list(result.scores) == [
        "irrelevance",
        "irrelevance_never_call",
        "live_irrelevance",
        "live_irrelevance_never_call",
        "live_relevance",
    ]
    for category in IRRELEVANCE:
        assert result.scores[category].value == value
        assert result.scores[f"{category}_never_call"].value == 1.0
        assert result.scores[category].n == result.scores[f"{category}_never_call"].n
    assert result.scores["live_relevance"].value == 1.0 - value


def test_the_baseline_is_graded_like_any_answer(
    score: Callable[..., TaskResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_align.eval.bfcl.score.NEVER_CALLS", CALL)
    result = score(lambda entry: "No.", ("irrelevance",), 3)
    assert result.scores == {"irrelevance": Score(1.0, 0.0, 3), "irrelevance_never_call": Score(0.0, 0.0, 3)}


def test_live_counts_every_problem_the_same_and_leaves_irrelevance_out(
    score: Callable[..., TaskResult], oracle: ModuleType
) -> None:
    right = perfect(oracle)
    result = score(lambda entry: right(entry) if "simple" in entry["id"] else "No.", LIVE, 24)
    parts = [result.scores[category] for category in LIVE_SCORE]
    assert result.scores["live"].n == sum(one.n for one in parts)
    assert result.scores["live"].value == pytest.approx(result.scores["live_simple"].n / result.scores["live"].n)
    assert "live" not in next(one for one in result.samples if one.group == "live_irrelevance").correct


def test_answers_that_the_official_decoder_shortens_or_would_execute_are_counted(
    score: Callable[..., TaskResult],
) -> None:
    answers = ["[calculate_triangle_area(10, 5)]", "[math.factorial(number=x + 5)]", "[math.hypot(4, y=5)]"]
    result = score(lambda entry: answers[int(entry["id"].rpartition("_")[2])], ("simple_python",), 3)
    assert result.warnings == (
        "only the first problems of each category were scored, 3 of 400",
        "2 answers have positional arguments, which the official decoder leaves out",
        "1 answers have arguments that would have to be executed to know their values; they count as no call",
    )
    assert result.scores["simple_python"] == Score(0.0, 0.0, 3)


def test_conversations_are_scored_beside_single_questions(score: Callable[..., TaskResult], oracle: ModuleType) -> None:
    result = score(perfect(oracle), ("simple_python", "multi_turn_base"), 2)
    assert result.scores == {"simple_python": Score(1.0, None, 1), "multi_turn_base": Score(0.0, None, 1)}
    assert (result.n, result.total, result.partial) == (2, 600, True)
    sample = next(one for one in result.samples if one.group == "multi_turn_base")
    assert sample.id == "multi_turn_base_0"
    assert sample.correct == {"multi_turn_base": False}
    assert sample.verdict.startswith("multi_turn:")
    assert sample.response is not None
    assert sample.response.count("That is done.") == len(json.loads(sample.target))
    assert result.warnings == ("only the first problems of each category were scored, 2 of 600",)


# ---- categories and limits ------------------------------------------------------------------------------------------


def test_the_categories_are_the_packages_own(tmp_path: Path) -> None:
    code = "import bfcl_eval.constants.category_mapping as c, json; print(json.dumps([c.NON_LIVE_CATEGORY, c.LIVE_CATEGORY, c.MULTI_TURN_CATEGORY, c.ALL_CATEGORIES]))"
    done = subprocess.run([str(bfcl_python()), "-I", "-B", "-c", code], capture_output=True, text=True, check=True)
    non_live, live, multi_turn, everything = json.loads(done.stdout)
    assert (tuple(non_live), tuple(live), tuple(multi_turn)) == (NON_LIVE, LIVE, MULTI_TURN)
    assert {*RUN, *NOT_RUN} == set(everything)


def test_categories_are_chosen_by_name_in_the_packages_order() -> None:
    assert chosen_categories(()) == RUN
    assert chosen_categories(("live_simple", "multiple")) == ("multiple", "live_simple")


def test_a_category_that_there_is_not_is_refused_before_anything_runs() -> None:
    with pytest.raises(RecipeError) as raised:
        check_data(EvalSection(bfcl=BFCLSection(categories=("simple",))), "bfcl", ask_hub=False)
    assert str(raised.value) == (f"eval.bfcl.categories has simple, which is no category; categories: {', '.join(RUN)}")


def test_a_category_that_is_not_run_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError) as raised:
        chosen_categories(("web_search_base",))
    assert str(raised.value) == (
        "eval.bfcl.categories has web_search_base, which is not run (agentic: needs the internet and a paid search "
        "service; hymba-align does not run it); remove it"
    )


def test_no_local_file_enters_the_scores() -> None:
    assert data_files(EvalSection()) == []


@given(
    st.lists(st.integers(1, 1100), min_size=1, max_size=17).map(
        lambda sizes: {str(n): one for n, one in enumerate(sizes)}
    ),
    st.integers(1, 5000),
)
def test_a_limit_leaves_one_of_each_and_the_rest_in_proportion(sizes: dict[str, int], limit: int) -> None:
    counts = shares(sizes, limit)
    total = sum(sizes.values())
    assert list(counts) == list(sizes)
    assert all(1 <= counts[name] <= size for name, size in sizes.items())
    assert sum(counts.values()) == min(total, max(limit, len(sizes)))
    if len(sizes) <= limit < total:
        left, rest = limit - len(sizes), total - len(sizes)
        assert all(abs(counts[name] - 1 - left * (size - 1) / rest) < 1 for name, size in sizes.items())


def test_without_a_limit_all_are_scored() -> None:
    assert shares({"a": 3, "b": 5}, None) == {"a": 3, "b": 5}


# ---- means ----------------------------------------------------------------------------------------------------------


def test_means_weigh_categories_as_the_package_does() -> None:
    def samples(category: str, right: int, n: int) -> list[Sample]:
        return [
            Sample(f"{category}_{number}", "", None, None, {}, {category: number < right}, category)
            for number in range(n)
        ]

    right = {"simple_python": 4, "simple_java": 1, "multiple": 2, "multi_turn_base": 3, "multi_turn_miss_func": 1}
    everything = [
        one for category in RUN for one in samples(category, right.get(category, 0), 4 if category in right else 2)
    ]
    scores = scores_of(everything, RUN, {})
    assert scores["non_live"].value == pytest.approx(((1 + 1 / 4 + 0) / 3 + 2 / 4 + 0 + 0) / 4)
    assert scores["multi_turn"].value == pytest.approx((3 / 4 + 1 / 4) / 4)
    assert scores_of(everything, MULTI_TURN[:3], {}).keys() == set(MULTI_TURN[:3])


def test_a_share_has_the_standard_error_of_a_sample_mean() -> None:
    verdicts = [True] * 3 + [False] * 7
    found = share(verdicts)
    variance = sum((one - 0.3) ** 2 for one in verdicts) / 9
    assert (found.value, found.n) == (0.3, 10)
    assert found.stderr == pytest.approx(math.sqrt(variance / 10), rel=1e-12)  # float64
    assert share([True]) == Score(1.0, None, 1)


def test_a_mean_of_scores_weighs_them_equally_and_adds_their_errors_in_squares() -> None:
    assert mean([Score(1.0, 0.3, 10), Score(0.0, 0.4, 1000)]) == Score(0.5, 0.25, 1010)
    assert mean([Score(1.0, None, 1), Score(0.5, 0.1, 10)]) == Score(0.75, None, 11)
