"""What is kept of a generated GPQA answer: a text with the same letters for the harness's filters, and nothing else."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.filters import extraction

from hymba_align.eval.gpqa import load_task
from hymba_align.eval.redaction import WRAPS, Redaction
from hymba_align.recipe_eval import EvalSection, GPQASection

invented = runpy.run_path(str(Path(__file__).with_name("invented_gpqa.py")))
KEPT = re.compile(r"|\([A-D]\)|The answer is \([A-D]\)\.(\n\([A-D]\))?|The answer is [$<=^~]?[A-D][$>=^~]?\.")
PROBLEM = {"choices": ["42 red turnips", "a barrow, (spotted)", "none of these", "is B"]}
# Pieces that mean something to a filter, and some that mean nothing.
WORDS = [
    "The answer is ", "the answer is ", "The answer is", "(A)", "(B)", "(D)", "(E)", "(a)", "A", "B", "d", ".", "\n", " ", ": C",
    ":B", "**B**", "$C$", "( A )", "42 red turnips", "A barrow spotted", "is B", "Question:", "therefore", "é", "\u2028", "\x00", "(",
    ")", "İ", "K", "[invalid]",
]  # fmt: skip
HIGHEST = 0x3000
"""Of the characters that are tried: the filter's table of punctuation, made anew for each answer, then ends there too"""
TEXT = st.text(st.characters(max_codepoint=HIGHEST - 1), max_size=6)
ANSWERS = st.lists(st.one_of(st.sampled_from(WORDS), TEXT), max_size=9).map("".join)
CHOICES = st.lists(
    st.one_of(st.sampled_from(["b", "- b", "is b", "$a$", "<a>", "=a=", "answer", "", " ", "(A)", "c."]), TEXT),
    min_size=4,
    max_size=4,
)


@pytest.fixture(scope="module")
def redaction(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redaction]:
    archive = invented["write_archive"](tmp_path_factory.mktemp("gpqa") / "dataset.zip")
    task = load_task(EvalSection(gpqa=GPQASection(path=str(archive))), "gpqa_generative")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "sys", SimpleNamespace(maxunicode=HIGHEST))
        yield Redaction(task.config)


def letters(redaction: Redaction, problems: list[dict[str, Any]], answers: list[str]) -> list[tuple[Any, ...]]:
    """What the harness's two filters and its metric make of each answer."""
    return [tuple(map(redaction.letter, found)) for found in redaction.extracted(problems, answers)]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("", ""),
        ("I cannot say.", ""),
        ("It is (C), clearly", "(C)"),
        ("The answer is (C).", "The answer is (C)."),
        ("so\nThe answer is (C).\nNo: (A)", "The answer is (C).\n(A)"),
        ("The answer is C.", "The answer is C."),
        ("The answer is **c**.", "The answer is C."),
        ("The answer is (C)", "The answer is (C)."),
        ("The answer is 42 red turnips.", "(A)"),
        ("The answer is the last of them, (D), I think.", "(D)"),
        ("The answer is C", ""),  # the strict pattern gives up the last character, here the letter itself
        ("Answer: D", "(D)"),
        ("(E)", ""),
        ("I take A barrow spotted", "(B)"),
    ],
)
def test_these_answers_leave_these_texts(redaction: Redaction, answer: str, kept: str) -> None:
    assert redaction(PROBLEM, answer) == kept


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CHOICES, ANSWERS), min_size=1, max_size=8))
def test_filters_extract_the_same_letters_from_what_is_kept_and_nothing_else_is_kept(
    redaction: Redaction, cases: list[tuple[list[str], str]]
) -> None:
    problems = [{"choices": choices} for choices, _ in cases]
    answers = [answer for _, answer in cases]
    kept = [redaction(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
    assert letters(redaction, problems, kept) == letters(redaction, problems, answers)
    assert all(KEPT.fullmatch(text) for text in kept)


def test_the_letter_is_wrapped_where_choices_say_the_same(redaction: Redaction) -> None:
    # A choice that is cleaned to " b" is found in "The answer is B." and not in "The answer is\tB.", whose filters then differ.
    answer = "The answer is \tB."
    problem = {"choices": ["s - b", "- b", "turnips", "soup"]}
    [(strict, flexible)] = letters(redaction, [problem], [answer])
    kept = redaction(problem, answer)
    assert letters(redaction, [problem], [kept]) == [(strict, flexible)]
    spoiling = {"choices": ["x", "is b", "y", "z"]}
    assert redaction(spoiling, "The answer is \tB.") == "The answer is $B$."
    worst = {"choices": ["is b", "$b", "<b", "=b"]}
    assert redaction(worst, "The answer is \tB.") == "The answer is ^B^."
    assert len(WRAPS) > 4


def test_an_answer_is_redacted_again_to_itself(redaction: Redaction) -> None:
    """So that answers taken over from an interrupted run may pass through once more."""
    for text in ("", "(A)", "The answer is (A).", "The answer is (A).\n(B)", "The answer is A."):
        assert redaction(PROBLEM, text) == text
