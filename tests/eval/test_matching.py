"""Which answers count as right while training: the harness's GSM8K decides about numbers, parsed JSON about calls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.eval.matching import matcher, tool_calls

CALLS = (
    '<toolcall> {"name": "add", "arguments": {"a": 1, "b": [2.0]}} </toolcall>\n<toolcall> {"name": "now"} </toolcall>'
)


@pytest.mark.parametrize(
    ("answer", "reference", "flexible", "strict"),
    [
        ("She has 5 left.\n#### 72", "<<70+2=72>>\n#### 72", True, True),
        ("It is 72.", "#### 72", True, False),
        ("#### 1,072", "so 1072", True, True),
        ("$72.", "#### 72", True, False),
        ("#### 72, or 71", "#### 72", False, True),
        ("none", "#### 72", False, False),
        ("#### -3", "#### -3", True, True),
        ("#### 7", "#### 72", False, False),
    ],
)
def test_numbers_are_found_and_compared_as_the_gsm8k_task_does(
    answer: str, reference: str, flexible: bool, strict: bool
) -> None:
    assert matcher("number").is_right(answer, reference) is flexible
    assert matcher("strict_number").is_right(answer, reference) is strict


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("Tom has 3.\n#### 3", "Tom has <<1+2=3>>3.\n#### 3"), ("#### 12.50", "#### 12.5"), ("the 4", "x\n#### 4")],
)
def test_the_harness_gives_the_same_verdicts_from_its_own_task(answer: str, reference: str) -> None:
    from lm_eval.tasks import TaskManager

    from hymba_align.eval.matching import _task

    rows = [{"question": "?", "answer": reference}]
    from datasets import Dataset

    splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}
    config = {**_task(), "custom_dataset": lambda **_: splits}
    task = TaskManager(include_defaults=False).load([config])["tasks"]["gsm8k"]
    for name, match in (("flexible-extract", "number"), ("strict-match", "strict_number")):
        (ensemble,) = [one for one in task._filters if one.name == name]
        (found,) = _applied(ensemble, answer, rows[0])
        verdict = task.process_results(rows[0], [found])["exact_match"]
        assert matcher(match).is_right(answer, reference) == bool(verdict), name  # type: ignore[arg-type]


def _applied(ensemble: object, answer: str, row: dict[str, str]) -> list[str]:
    """What the task's filters make of an answer."""
    texts = [[answer]]
    for step in ensemble.filters:  # type: ignore[attr-defined]
        texts = list(step().apply(texts, [row]))
    return list(texts)  # type: ignore[arg-type]


def test_texts_are_the_same_but_for_white_space() -> None:
    assert matcher("text").is_right(" Good\n  day. ", "Good day.")
    assert not matcher("text").is_right("good day.", "Good day.")
    assert not matcher("text").is_right("Good day. Bye.", "Good day.")


def test_calls_are_the_same_in_any_order_and_spelling_and_whatever_text_is_around_them() -> None:
    calls = matcher("calls")
    assert calls.is_right(
        'First:<toolcall>{"arguments":{},"name":"now"}</toolcall> then\n'
        '<toolcall>{"name":"add","arguments":{"b":[2],"a":1.0}}</toolcall>',
        CALLS,
    )
    for wrong in (
        "",
        "add(1, [2])",
        CALLS.replace('"a": 1', '"a": 2'),
        CALLS.replace('"a": 1', '"a": "1"'),
        CALLS.replace('"a": 1', '"a": true'),
        CALLS.replace("now", "later"),
        f"{CALLS}<toolcall>{{}}</toolcall>",
        f'{CALLS}<toolcall> {{"name": "now"}} </toolcall>',
        CALLS.replace("}} </toolcall>", "} </toolcall>"),
        f"<toolcall>{'[' * 100_000}</toolcall>",
    ):
        assert not calls.is_right(wrong, CALLS), wrong[:80]


@given(st.text(alphabet='<>/toolca "{}[]:,name1.eE-', max_size=60))
def test_no_text_makes_parsing_calls_fail(text: str) -> None:
    found = tool_calls(f"<toolcall>{text}</toolcall>")
    assert found is None or all("name" in json.loads(call) for call in found)


def test_a_reference_is_judged_where_it_holds_what_is_compared() -> None:
    assert matcher("calls").can_judge(CALLS)
    assert not matcher("calls").can_judge("No call is needed.")
    assert matcher("number").can_judge("about 7")
    assert not matcher("number").can_judge("several")
    assert not matcher("text").can_judge(" \n")
