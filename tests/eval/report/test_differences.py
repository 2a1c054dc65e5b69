"""Differences between stages, with paired standard errors."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hymba_align.eval.report.differences import Difference, difference
from hymba_align.eval.result import TaskResult

Make = Callable[..., TaskResult]
GAINED, LOST, BOTH, NEITHER = (False, True), (True, False), (True, True), (False, False)


def made(result_of: Make, pairs: list[tuple[bool, bool]]) -> tuple[TaskResult, TaskResult]:
    before, after = (result_of("gsm8k", [pair[place] for pair in pairs]) for place in (0, 1))
    return before, after


def test_the_paired_error_is_that_of_the_mean_of_the_differences(result_of: Make) -> None:
    draw = random.Random(0)
    for n in (2, 3, 7, 60):
        pairs = [(draw.random() < 0.4, draw.random() < 0.6) for _ in range(n)]
        found = difference(*made(result_of, pairs), "strict_match")
        assert isinstance(found, Difference)
        differences = [now - was for was, now in pairs]
        assert found.value == pytest.approx(statistics.fmean(differences), abs=1e-12)
        assert found.stderr == pytest.approx(statistics.stdev(differences) / n**0.5, abs=1e-12)


def test_the_paired_error_is_what_a_bootstrap_over_problems_finds(result_of: Make) -> None:
    pairs = [GAINED] * 30 + [LOST] * 10 + [BOTH] * 100 + [NEITHER] * 60
    found = difference(*made(result_of, pairs), "strict_match")
    assert isinstance(found, Difference)
    draw = random.Random(0)
    means = [statistics.fmean(now - was for was, now in draw.choices(pairs, k=len(pairs))) for _ in range(2000)]
    assert (found.gained, found.lost, found.n) == (30, 10, 200)
    assert found.stderr == pytest.approx(statistics.stdev(means), rel=0.06)  # of 2,000 draws, observed 0.022


def test_problems_that_did_not_change_make_the_error_smaller_than_independent_scores_would(result_of: Make) -> None:
    before, after = made(result_of, [GAINED] * 5 + [BOTH] * 95 + [NEITHER] * 100)
    found = difference(before, after, "strict_match")
    assert isinstance(found, Difference)
    errors = [result.scores["strict_match"].stderr or 0.0 for result in (before, after)]
    assert found.stderr == pytest.approx(0.01107, abs=1e-5)
    assert sum(error**2 for error in errors) ** 0.5 > 4 * (found.stderr or 0.0)


def test_a_single_problem_has_a_difference_and_no_error(result_of: Make) -> None:
    assert difference(*made(result_of, [GAINED]), "strict_match") == Difference(1.0, None, 1, 0, 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settings": {"num_fewshot": 4}}, "other settings: apply_chat_template"),
        ({"generation": {"greedy": True, "max_new_tokens": 9, "until": ["</s>"]}}, "other settings: max_new_tokens"),
        ({"chat_template": {"name": "released", "sha256": "1"}}, "another chat template"),
        ({"scores": {}}, "not scored in both"),
    ],
)
def test_results_of_another_protocol_are_not_compared(result_of: Make, changed: dict[str, Any], reason: str) -> None:
    before, after = made(result_of, [BOTH, LOST])
    assert difference(before, replace(after, **changed), "strict_match") == reason


def test_a_setting_that_changes_rounding_alone_keeps_results_comparable(result_of: Make) -> None:
    before, after = made(result_of, [BOTH, LOST])
    after = replace(after, settings={**after.settings, "batch_size": 1, "device": "cuda"})
    assert isinstance(difference(before, after, "strict_match"), Difference)


def test_results_over_other_problems_are_not_compared(result_of: Make) -> None:
    before, after = made(result_of, [BOTH, LOST])
    more = result_of("gsm8k", [True, False, True])
    other = replace(after, samples=[replace(after.samples[0], question="Another?"), after.samples[1]])
    assert difference(before, more, "strict_match") == "other problems"
    assert difference(before, other, "strict_match") == "other problems"


def test_a_mean_of_categories_has_no_paired_error(result_of: Make) -> None:
    before, after = made(result_of, [BOTH, LOST])
    results = [replace(one, scores={"overall": one.scores["strict_match"]}) for one in (before, after)]
    assert difference(results[0], results[1], "overall") == "not a mean over single problems"
