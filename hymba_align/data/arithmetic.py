"""The shipped data set: generated arithmetic word problems in GSM8K's format, with wrong answers for DPO.

Everything about it is chosen so that a model of a few million random weights learns it from half a million tokens: eight
families of problems, one or two calculations, small numbers. A number fact such as 7+5 occurs in several families, so the
held-out problems ask for facts that training has shown in other problems, never for a problem that training has shown.

    python -m hymba_align.data.arithmetic            writes data/arithmetic/train.jsonl and test.jsonl
    python -m hymba_align.data.arithmetic --check    compares the files on disk with what would be written
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Operator = Literal["+", "-", "*"]
Numbers = tuple[int, ...]

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "arithmetic"
SEED = 20261121
TRAIN_PER_FAMILY = 600
TEST_PER_FAMILY = 25
LARGEST = 99
NAMES = ("Ana", "Ben", "Dan", "Eva", "Ida", "Leo", "Mia", "Max", "Sam", "Tom", "Una", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "plums", "rings", "seeds", "shells", "stamps")


@dataclass(frozen=True)
class Family:
    """A way of asking: texts with {x}, {y} for names, {things}, {a}, {b}, {c} for numbers, one operator per sentence.

    `sentences` hold {calc}, the annotated calculation; the first takes a and b, the second the first's result and c.
    """

    name: str
    question: str
    sentences: tuple[str, ...]
    operators: tuple[Operator, ...]
    ranges: tuple[range, ...]
    largest_intermediate: int = LARGEST


@dataclass(frozen=True)
class Problem:
    """One row, and what identifies the problem: its family and its numbers."""

    family: str
    numbers: Numbers
    question: str
    answer: str
    wrong_answer: str

    def row(self) -> dict[str, str]:
        """The columns that ship."""
        return {"question": self.question, "answer": self.answer, "wrong_answer": self.wrong_answer}


FAMILIES = (
    Family(
        "gain",
        "{x} has {a} {things}. {y} gives {x} {b} more. How many {things} does {x} have now?",
        ("{x} has {calc} {things}.",),
        ("+",),
        (range(2, 11), range(2, 10)),
    ),
    Family(
        "lose",
        "{x} has {a} {things} and loses {b}. How many {things} does {x} still have?",
        ("{x} has {calc} {things}.",),
        ("-",),
        (range(4, 15), range(2, 10)),
    ),
    Family(
        "together",
        "{x} has {a} {things} and {y} has {b}. How many {things} do they have together?",
        ("They have {calc} {things}.",),
        ("+",),
        (range(2, 11), range(2, 10)),
    ),
    Family(
        "difference",
        "{x} has {a} {things} and {y} has {b}. How many more {things} does {x} have?",
        ("{x} has {calc} more {things}.",),
        ("-",),
        (range(4, 15), range(2, 10)),
    ),
    Family(
        "groups",
        "{x} buys {a} boxes with {b} {things} in each. How many {things} does {x} buy?",
        ("{x} buys {calc} {things}.",),
        ("*",),
        (range(2, 7), range(2, 10)),
    ),
    Family(
        "price",
        "{x} buys {a} {things} for {b} dollars each. How many dollars does {x} pay?",
        ("{x} pays {calc} dollars.",),
        ("*",),
        (range(2, 7), range(2, 10)),
    ),
    Family(
        "gain_lose",
        "{x} has {a} {things}, finds {b} more and then loses {c}. How many {things} does {x} have left?",
        ("{x} first has {calc} {things}.", "Then {x} has {calc} {things} left."),
        ("+", "-"),
        (range(2, 11), range(2, 10), range(2, 10)),
        largest_intermediate=14,
    ),
    Family(
        "groups_gain",
        "{x} has {a} bags with {b} {things} in each and finds {c} more. How many {things} does {x} have?",
        ("{x} first has {calc} {things}.", "Then {x} has {calc} {things}."),
        ("*", "+"),
        (range(2, 6), range(2, 6), range(2, 10)),
        largest_intermediate=10,
    ),
)


def calculate(left: int, operator: Operator, right: int) -> int:
    """The result of one calculation."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def facts(family: Family, numbers: Numbers) -> list[tuple[int, Operator, int]]:
    """The calculations that solve a problem, in order."""
    steps = []
    left = numbers[0]
    for operator, right in zip(family.operators, numbers[1:], strict=True):
        steps.append((left, operator, right))
        left = calculate(left, operator, right)
    return steps


def number_choices(family: Family) -> list[Numbers]:
    """All number tuples of a family whose results stay within 1 to 99 and within the family's own bound."""
    tuples: list[Numbers] = [()]
    for values in family.ranges:
        tuples = [(*head, value) for head in tuples for value in values]
    return [numbers for numbers in tuples if _results_fit(family, numbers)]


def _results_fit(family: Family, numbers: Numbers) -> bool:
    results = [calculate(*fact) for fact in facts(family, numbers)]
    return min(results) >= 1 and max(results) <= LARGEST and all(r <= family.largest_intermediate for r in results[:-1])


def solution(family: Family, words: dict[str, str], steps: Sequence[tuple[int, Operator, int, int]]) -> str:
    """A worked answer: one annotated sentence per (left, operator, right, result), then the `####` line."""
    lines = []
    for sentence, (left, operator, right, result) in zip(family.sentences, steps, strict=False):
        lines.append(sentence.format(calc=f"<<{left}{operator}{right}={result}>>{result}", **words))
    return "\n".join([*lines, f"#### {steps[-1][3]}"])


def mistaken_steps(family: Family, numbers: Numbers, rng: random.Random) -> list[tuple[int, Operator, int, int]]:
    """Steps of a worked answer with one realistic mistake, carried through, that ends in another number.

    The mistake is a wrong operation (correctly calculated), a slip by 1, 2 or 10, or stopping after the first step.
    """
    right_steps = [(*fact, calculate(*fact)) for fact in facts(family, numbers)]
    while True:
        place = rng.randrange(len(right_steps))
        kind = rng.choice(("operation", "slip", "stop") if len(right_steps) > 1 else ("operation", "slip"))
        if kind == "stop":
            return right_steps[:1]
        steps = right_steps[:place]
        for position in range(place, len(right_steps)):
            left, operator, right, _ = right_steps[position]
            left = steps[-1][3] if steps else left
            if position == place and kind == "operation":
                operator = rng.choice([other for other in ("+", "-", "*") if other != operator])
            result = calculate(left, operator, right)
            if position == place and kind == "slip":
                result += rng.choice((-10, -2, -1, 1, 2, 10))
            steps.append((left, operator, right, result))
        if all(1 <= step[3] <= LARGEST for step in steps) and steps[-1][3] != right_steps[-1][3]:
            return steps


def make_problem(family: Family, numbers: Numbers, rng: random.Random) -> Problem:
    """A problem with random names and things, its worked answer and a mistaken one."""
    first, second = rng.sample(NAMES, 2)
    words = {"x": first, "y": second, "things": rng.choice(THINGS)}
    asked = family.question.format(**words, **dict(zip("abc", map(str, numbers), strict=False)))
    steps = [(*fact, calculate(*fact)) for fact in facts(family, numbers)]
    wrong = solution(family, words, mistaken_steps(family, numbers, rng))
    return Problem(family.name, numbers, asked, solution(family, words, steps), wrong)


def hold_out(rng: random.Random) -> dict[str, tuple[list[Numbers], list[Numbers]]]:
    """Per family, the number tuples of training and of the test set, disjoint; at most a third is held out.

    A tuple is held out only while each of its calculations stays in the training tuples of some one-step family.
    """
    choices = {family.name: number_choices(family) for family in FAMILIES}
    seen = Counter(
        fact for family in FAMILIES for numbers in choices[family.name] for fact in _one_step_facts(family, numbers)
    )
    split = {}
    for family in FAMILIES:
        candidates = rng.sample(choices[family.name], len(choices[family.name]))
        most = min(TEST_PER_FAMILY, len(candidates) // 3)
        test: list[Numbers] = []
        for numbers in candidates:
            own = _one_step_facts(family, numbers)
            if len(test) < most and all(seen[f] - own.count(f) > 0 for f in facts(family, numbers)):
                seen.subtract(own)
                test.append(numbers)
        held_out = set(test)
        split[family.name] = ([numbers for numbers in candidates if numbers not in held_out], test)
    return split


def _one_step_facts(family: Family, numbers: Numbers) -> list[tuple[int, Operator, int]]:
    return facts(family, numbers) if len(family.operators) == 1 else []


def generate(seed: int = SEED) -> tuple[list[Problem], list[Problem]]:
    """The training and the test problems, each shuffled; equal for equal seeds on every machine."""
    rng = random.Random(seed)
    split = hold_out(rng)
    train: list[Problem] = []
    test: list[Problem] = []
    for family in FAMILIES:
        train_numbers, test_numbers = split[family.name]
        train += _distinct(family, train_numbers, TRAIN_PER_FAMILY, rng)
        test += _distinct(family, test_numbers, TEST_PER_FAMILY, rng)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _distinct(family: Family, numbers: Sequence[Numbers], count: int, rng: random.Random) -> list[Problem]:
    """`count` problems with different texts that go through `numbers` in turn, so that every tuple is used."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(family, numbers[len(problems) % len(numbers)], rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def files(seed: int = SEED) -> Iterator[tuple[str, bytes]]:
    """Name and content of every generated file."""
    for name, problems in zip(("train.jsonl", "test.jsonl"), generate(seed), strict=True):
        yield name, "".join(json.dumps(problem.row()) + "\n" for problem in problems).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check compares them; 0 when all is as generated."""
    parser = argparse.ArgumentParser(
        prog="python -m hymba_align.data.arithmetic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the files on disk, write nothing")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the files")
    options = parser.parse_args(arguments)
    different = []
    for name, content in files():
        path = options.out / name
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            different.append(str(path))
    if different:
        print(f"differs from what the generator writes: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
