"""Which samples a report shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hymba_align.eval.report.samples import LONGEST, chosen
from hymba_align.eval.result import TaskResult

Make = Callable[..., TaskResult]


@pytest.mark.parametrize(
    ("right", "wrong", "shown"),
    [
        (50, 50, (5, 5)),
        (98, 2, (8, 2)),
        (1, 99, (1, 9)),
        (0, 40, (0, 10)),
        (40, 0, (10, 0)),
        (2, 3, (2, 3)),
        (0, 0, (0, 0)),
    ],
)
def test_both_verdicts_are_among_the_ten_where_both_exist(
    result_of: Make, right: int, wrong: int, shown: tuple[int, int]
) -> None:
    if right + wrong:
        made = result_of("gsm8k", [True] * right + [False] * wrong)
    else:
        made = replace(result_of("gsm8k", [True]), samples=[])
    verdicts = [sample.verdict for sample in chosen(made)]
    assert (verdicts.count("right"), verdicts.count("wrong")) == shown


def test_they_are_spread_evenly_in_the_order_of_the_test(result_of: Make) -> None:
    numbers = [int(sample.id.removeprefix("gsm8k-")) for sample in chosen(result_of("gsm8k", [True, False] * 50))]
    assert numbers == [0, 1, 20, 21, 40, 41, 60, 61, 80, 81]


def test_the_same_result_shows_the_same_samples(result_of: Make) -> None:
    made = result_of("gsm8k", [number % 3 == 0 for number in range(77)])
    assert chosen(made) == chosen(made)


def test_a_long_answer_is_cut_and_says_by_how_much(result_of: Make) -> None:
    made = result_of("gsm8k", [True])
    [shown] = chosen(replace(made, samples=[replace(made.samples[0], response="a" * (LONGEST + 5))]))
    assert (shown.response, shown.more) == ("a" * LONGEST, 5)


def test_a_row_of_a_file_is_called_a_problem_and_an_id_stays(result_of: Make) -> None:
    made = result_of("gsm8k", [True, True])
    samples = [replace(sample, id=name) for sample, name in zip(made.samples, ("20", "live_simple_3-2"), strict=True)]
    assert [sample.label for sample in chosen(replace(made, samples=samples))] == ["problem 20", "live_simple_3-2"]


def test_where_the_harness_found_nothing_the_report_says_so(result_of: Make) -> None:
    made = result_of("gsm8k", [False])
    [shown] = chosen(replace(made, samples=[replace(made.samples[0], extracted={"strict_match": "[invalid]"})]))
    assert shown.extracted == (("strict_match", "nothing found", "wrong"),)


@pytest.mark.parametrize(
    ("text", "letter"), [("(B)", "B"), ("C", "C"), (" (A) ", "A"), ("[invalid]", "no letter"), ("Because", "no letter")]
)
def test_of_gpqa_only_letters_are_shown(result_of: Make, text: str, letter: str) -> None:
    made = result_of("gpqa", [True])
    [shown] = chosen(replace(made, samples=[replace(made.samples[0], extracted={"acc": text}, target=text)]))
    assert (shown.extracted, shown.target) == ((("acc", letter, "right"),), letter)


def test_of_gpqa_an_id_that_could_be_a_text_is_not_shown(result_of: Make) -> None:
    made = result_of("gpqa", [True])
    [shown] = chosen(replace(made, samples=[replace(made.samples[0], id="What is it?", group="A question")]))
    assert (shown.id, shown.group, shown.question, shown.response, shown.grader) == ("(no id)", "", None, None, "")
