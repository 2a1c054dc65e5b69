from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.data.convert import conversation, final_number, preference, wrong_answer
from hymba_align.data.reading.examples import Preference, QuestionAnswer
from hymba_align.errors import DataError


def wrong(answer: str, seed: int = 0) -> str:
    return wrong_answer(answer, random.Random(seed))


def test_rows_become_turns_with_their_texts_untouched() -> None:
    examples = [QuestionAnswer(" q {a}", "x<<1+1=2>>2\n#### 2"), QuestionAnswer("r", "y ")]
    assert conversation(examples, "Question: {question}\nAnswer:") == [
        {"role": "user", "content": "Question:  q {a}\nAnswer:"},
        {"role": "assistant", "content": "x<<1+1=2>>2\n#### 2"},
        {"role": "user", "content": "Question: r\nAnswer:"},
        {"role": "assistant", "content": "y "},
    ]


def test_a_rows_own_wrong_answer_is_the_rejected_one_after_solved_examples() -> None:
    pair = preference(QuestionAnswer("q", "#### 1", "#### 2"), [QuestionAnswer("p", "#### 9")], random.Random(0))
    assert pair == Preference(
        prompt=[
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "#### 9"},
            {"role": "user", "content": "q"},
        ],
        chosen=[{"role": "assistant", "content": "#### 1"}],
        rejected=[{"role": "assistant", "content": "#### 2"}],
    )


def test_a_wrong_answer_is_made_where_the_row_has_none() -> None:
    pair = preference(QuestionAnswer("q", "#### 1"), [], random.Random(0))
    assert pair.rejected == [{"role": "assistant", "content": wrong("#### 1")}]


def test_a_made_wrong_answer_slips_in_one_calculation_and_in_the_final_number() -> None:
    answer = "Buys 2*3 = $<<2*3=6>>6 first.\nThen 6+1,000 = <<6+1000=1006>>1,006 in all.\n#### 1,006"
    slipped = wrong(answer)
    number = final_number(slipped)
    plain = number.replace(",", "")
    assert number != "1,006"
    assert slipped == (
        f"Buys 2*3 = $<<2*3=6>>6 first.\nThen 6+1,000 = <<6+1000={plain}>>{number} in all.\n#### {number}"
    )


def test_a_calculation_that_does_not_give_the_final_number_slips_by_as_much() -> None:
    slipped = wrong("It is <<10/4=2.5>>2.5, so 3.\n#### 3")
    by = Decimal(final_number(slipped)) - 3
    assert slipped == f"It is <<10/4={Decimal('2.5') + by}>>{Decimal('2.5') + by}, so 3.\n#### {3 + by}"


def test_an_answer_without_calculations_changes_where_it_names_the_number() -> None:
    slipped = wrong("He has 4 dogs, so 4 bowls.\n#### 4")
    number = final_number(slipped)
    assert number != "4"
    assert slipped == f"He has 4 dogs, so {number} bowls.\n#### {number}"


def test_made_wrong_answers_are_equal_for_equal_seeds() -> None:
    answers = {wrong("<<20+20=40>>40\n#### 40", seed) for seed in range(50)}
    assert wrong("<<20+20=40>>40\n#### 40", 3) == wrong("<<20+20=40>>40\n#### 40", 3)
    assert len(answers) == 6


@given(value=st.integers(-(10**6), 10**6), seed=st.integers())
def test_a_wrong_number_differs_and_keeps_its_sign_and_form(value: int, seed: int) -> None:
    number = final_number(wrong(f"<<{value}+0={value}>>{value:,}\n#### {value:,}", seed))
    assert Decimal(number.replace(",", "")) != value
    assert ("," in number) == (abs(value) >= 1000 and abs(Decimal(number.replace(",", ""))) >= 1000)
    assert value <= 0 or not number.startswith("-")


@pytest.mark.parametrize("answer", ["7", "#### seven", "so\n#### ", "#### 7 or 8"])
def test_an_answer_without_a_final_number_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match="does not end in a line '#### <number>'; add one, or a column wrong_answer"):
        wrong(answer)


def test_all_of_gsm8k_gets_wrong_answers(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7473
    for place, line in enumerate(lines):
        answer = json.loads(line)["answer"]
        slipped = wrong(answer, place)
        assert final_number(slipped) != final_number(answer)
        assert len(slipped.split("\n")) == len(answer.split("\n"))
        # At most the annotation's result, the number after it and the final number differ.
        pieces = [re.split(r"([-\d.,]+)", text) for text in (answer, slipped)]
        assert sum(a != b for a, b in zip(*pieces, strict=True)) <= 3
