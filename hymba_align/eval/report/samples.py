"""Which answers a report shows, and what of them.

Of GPQA it shows ids and letters, whatever a result file holds: its questions, and what a model writes about them, must
not be published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hymba_align.eval.result import Sample, TaskResult

PER_TASK = 10
RULE = (
    "Ten answers per task and stage: five right and five wrong ones where there are as many, evenly spread over the test "
    "set, in its order. Problems whose data set has no ids go by their row in its file, from 0."
)
LONGEST = 2_000  # characters of a text that are shown
NOTHING_FOUND = "nothing found"
INVALID = "[invalid]"
"""What the harness's filters give where they find nothing"""
_LETTER = re.compile(r"\(?([A-D])\)?")
_ID = re.compile(r"[\w.\-]{1,64}", re.ASCII)

Verdict = Literal["right", "wrong"]


@dataclass(frozen=True)
class Shown:
    """A sample as a report shows it. `more` is how many characters of the answer are left out."""

    id: str
    group: str
    verdict: Verdict
    question: str | None
    response: str | None
    target: str
    extracted: tuple[tuple[str, str, Verdict], ...]
    """Name of a match, what it found, whether that is right"""
    grader: str
    cut_off: bool
    tokens: int | None
    more: int = 0

    @property
    def label(self) -> str:
        """The data set's id, or `problem 20` where that is the number of a row."""
        return f"problem {self.id}" if self.id.isdecimal() else self.id


def is_secret(result: TaskResult) -> bool:
    """Whether the texts of a result must not be published."""
    return result.task.startswith("gpqa")


def chosen(result: TaskResult, count: int = PER_TASK) -> list[Shown]:
    """The samples that a report shows of a result, by `RULE`."""
    right = [number for number, sample in enumerate(result.samples) if is_right(result, sample)]
    wrong = [number for number, sample in enumerate(result.samples) if not is_right(result, sample)]
    of_right = min(len(right), max(count // 2, count - len(wrong)))
    of_wrong = min(len(wrong), count - of_right)
    numbers = sorted((*_spread(right, of_right), *_spread(wrong, of_wrong)))
    return [_shown(result, result.samples[number]) for number in numbers]


def is_right(result: TaskResult, sample: Sample) -> bool:
    """Whether the grader found an answer right, by the task's headline where that is a verdict on single answers."""
    headline = sample.correct.get(result.headline)
    return headline if headline is not None else bool(sample.correct) and all(sample.correct.values())


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers, evenly spread, the first among them."""
    return [numbers[place * len(numbers) // count] for place in range(count)]


def _shown(result: TaskResult, sample: Sample) -> Shown:
    verdict: Verdict = "right" if is_right(result, sample) else "wrong"
    if is_secret(result):
        extracted = tuple(
            (name, _letter(text), _verdict(sample, name))
            for name, text in sample.extracted.items()
            if _ID.fullmatch(name)
        )
        name = sample.id if _ID.fullmatch(sample.id) else "(no id)"
        target = _letter(sample.target)
        return Shown(name, "", verdict, None, None, target, extracted, "", sample.cut_off, sample.tokens)
    response = sample.response
    extracted = tuple((name, _found(text), _verdict(sample, name)) for name, text in sample.extracted.items())
    return Shown(
        id=_short(sample.id),
        group=sample.group,
        verdict=verdict,
        question=None if sample.question is None else _short(sample.question),
        response=None if response is None else response[:LONGEST],
        target=_short(sample.target),
        extracted=extracted,
        grader=_short(sample.verdict),
        cut_off=sample.cut_off,
        tokens=sample.tokens,
        more=max(len(response or "") - LONGEST, 0),
    )


def _verdict(sample: Sample, name: str) -> Verdict:
    return "right" if sample.correct.get(name) else "wrong"


def _found(text: str) -> str:
    return NOTHING_FOUND if text == INVALID else _short(text)


def _letter(text: str) -> str:
    found = _LETTER.fullmatch(text.strip())
    return found[1] if found else "no letter"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
