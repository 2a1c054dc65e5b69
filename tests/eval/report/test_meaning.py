"""What the report says of scores and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hymba_align.eval.report.meaning import meaning
from hymba_align.eval.report.samples import is_right
from hymba_align.eval.report.words import moment
from hymba_align.eval.result import Sample, Score, TaskResult

Make = Callable[..., TaskResult]


def test_choices_that_are_compared_have_their_own_words(result_of: Make) -> None:
    said = "Acc: the choice that the model finds likeliest is right. An answer counts as right by acc."
    assert meaning([result_of("gpqa", [True])]) == said


def test_generated_letters_are_not_described_as_numbers(result_of: Make) -> None:
    made = {task: replace(result_of("gsm8k", [True]), task=task) for task in ("gpqa_generative", "gsm8k_nvidia")}
    assert meaning([made["gpqa_generative"]]).startswith("Strict match: the letter in 'The answer is (X).' is right; ")
    assert meaning([made["gsm8k_nvidia"]]).startswith("Strict match: the number after #### is right; ")


def test_bfcl_is_a_share_of_right_calls_judged_by_category(result_of: Make) -> None:
    samples = [
        Sample("a_1", "", "", "", {}, {"live_simple": True, "live": True}, group="live_simple"),
        Sample("b_1", "", "", "", {}, {"multiple": False}, group="multiple"),
    ]
    scores = {"live": Score(1.0, None, 1), "live_simple": Score(1.0, None, 1), "multiple": Score(0.0, None, 1)}
    made = replace(result_of("bfcl", [True, False]), scores=scores, samples=samples)
    said = meaning([made])
    assert said.startswith("A score is the share of answers whose calls are right by BFCL's own checker")
    assert "; live: of all problems of the categories live simple" in said
    assert "multi turn" not in said
    assert said.endswith(" An answer counts as right by the checker of its category.")
    assert [is_right(made, sample) for sample in samples] == [True, False]


def test_a_score_that_is_not_known_is_not_described(result_of: Make) -> None:
    made = result_of("other", [True])
    assert meaning([replace(made, task="other", samples=[])]) == ""


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("2026-11-21T23:02:20+00:00", "2026-11-21 23:02 UTC"),
        ("2026-11-22T00:02:20+01:00", "2026-11-21 23:02 UTC"),
        ("2026-11-21T23:02:20", "2026-11-21T23:02:20"),  # of no known zone
        ("yesterday", "yesterday"),
    ],
)
def test_times_are_told_to_the_minute_in_utc(written: str, told: str) -> None:
    assert moment(written) == told
