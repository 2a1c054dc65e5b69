from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from hymba_align.data import arithmetic
from hymba_align.data.arithmetic import FAMILIES, LARGEST, SHIPPED, Problem, facts, files, generate

BY_NAME = {family.name: family for family in FAMILIES}
ANNOTATION = re.compile(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def problems() -> tuple[list[Problem], list[Problem]]:
    return generate()


def final(answer: str) -> int:
    return int(answer.split("\n#### ")[1])


def test_the_shipped_files_are_what_the_generator_writes() -> None:
    for name, content in files():
        assert (SHIPPED / name).read_bytes() == content


def test_the_command_compares_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arithmetic.main(["--check"]) == 0
    assert arithmetic.main(["--check", "--out", str(tmp_path)]) == 1
    assert "differs from what the generator writes" in capsys.readouterr().err
    assert arithmetic.main(["--out", str(tmp_path)]) == 0
    assert arithmetic.main(["--check", "--out", str(tmp_path)]) == 0


def test_every_answer_is_right_and_every_wrong_answer_is_wrong(problems: tuple[list[Problem], list[Problem]]) -> None:
    for problem in [*problems[0], *problems[1]]:
        family = BY_NAME[problem.family]
        shown = [tuple(match) for match in ANNOTATION.findall(problem.answer)]
        results = [eval(f"{left}{operator}{right}") for left, operator, right, _, _ in shown]
        assert [(int(left), operator, int(right)) for left, operator, right, _, _ in shown] == facts(
            family, problem.numbers
        )
        assert [[int(result), int(repeated)] for *_, result, repeated in shown] == [[r, r] for r in results]
        assert final(problem.answer) == results[-1]
        assert final(problem.wrong_answer) != results[-1]
        assert final(problem.wrong_answer) == int(ANNOTATION.findall(problem.wrong_answer)[-1][4])
        assert all(0 < int(number) <= LARGEST for number in re.findall(r"\d+", problem.wrong_answer))


def test_training_and_test_share_no_problem(problems: tuple[list[Problem], list[Problem]]) -> None:
    train, test = problems
    assert not {p.question for p in train} & {p.question for p in test}
    assert not {(p.family, p.numbers) for p in train} & {(p.family, p.numbers) for p in test}
    assert len({p.question for p in train}) == len(train) == 4800
    assert len({p.question for p in test}) == len(test) == 200


def test_the_card_says_how_many_different_problems_the_test_questions_are(
    problems: tuple[list[Problem], list[Problem]],
) -> None:
    asked = Counter((p.family, p.numbers) for p in problems[1])
    assert (sum(asked.values()), len(asked)) == (200, 164)
    assert max(asked.values()) == 2
    card = " ".join((SHIPPED / "README.md").read_text(encoding="utf-8").split())
    assert "The 200 test questions are 164 different problems, some of them asked twice" in card


def test_questions_state_their_numbers_so_that_the_split_can_be_checked_on_the_files(
    problems: tuple[list[Problem], list[Problem]],
) -> None:
    for problem in [*problems[0], *problems[1]]:
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.numbers


def test_training_shows_every_calculation_that_the_test_asks_for(
    problems: tuple[list[Problem], list[Problem]],
) -> None:
    train, test = problems
    shown = Counter(fact for p in train for fact in facts(BY_NAME[p.family], p.numbers))
    assert min(shown[fact] for p in test for fact in facts(BY_NAME[p.family], p.numbers)) >= 5


def test_problems_are_short_and_spread_over_the_families(problems: tuple[list[Problem], list[Problem]]) -> None:
    for part in problems:
        assert set(Counter(p.family for p in part).values()) == {len(part) // len(FAMILIES)}
        assert max(len(p.question.split()) for p in part) <= 30
    assert sum((SHIPPED / name).stat().st_size for name, _ in files()) < 2_000_000


def test_rows_have_gsm8ks_columns_and_a_wrong_answer() -> None:
    for name, _ in files():
        for line in (SHIPPED / name).read_text().splitlines():
            assert list(json.loads(line)) == ["question", "answer", "wrong_answer"]


def test_another_seed_gives_another_set() -> None:
    assert generate(1)[1] == generate(1)[1] != generate(2)[1]
