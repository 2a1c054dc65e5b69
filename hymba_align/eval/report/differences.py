"""What a stage changed: the difference between two scores over the same problems, and its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hymba_align.eval.result import AGREE, TaskResult

MAY_DIFFER = ("batch_size", "device")
"""Settings that two scores may differ in and still be compared: they change rounding alone"""


@dataclass(frozen=True)
class Difference:
    """Of two means over the same n problems, with its paired standard error; None for a single problem."""

    value: float
    stderr: float | None
    gained: int
    """Problems that were wrong before and are right after"""
    lost: int
    n: int


def difference(before: TaskResult, after: TaskResult, score: str) -> Difference | str:
    """How much a score rose from one stage to a later one; or, in words, why the two cannot be compared.

    Per problem the difference is 1, 0 or -1, and the standard error is that of their mean, as the harness has it for a
    score (n - 1 degrees of freedom). With g gained and l lost: sqrt((g + l - (g - l)²/n) / (n (n - 1))). Two scores of
    the same problems are not independent, so the errors of the two do not add up.
    Source: McNemar, Psychometrika 12 (1947), for the discordant pairs that alone count.
    """
    reason = _what_differs(before, after, score)
    if reason is not None:
        return reason
    was, now = before.problems(score), after.problems(score)
    if was is None or now is None:
        return "not a mean over single problems"
    if was.keys() != now.keys():
        return "other problems"
    gained = sum(now[name] and not was[name] for name in was)
    lost = sum(was[name] and not now[name] for name in was)
    n = len(was)
    value = (gained - lost) / n
    assert abs(value - (after.scores[score].value - before.scores[score].value)) <= 2 * AGREE
    stderr = math.sqrt(max(gained + lost - n * value * value, 0.0) / (n * (n - 1))) if n > 1 else None
    return Difference(value, stderr, gained, lost, n)


def _what_differs(before: TaskResult, after: TaskResult, score: str) -> str | None:
    if score not in before.scores or score not in after.scores:
        return "not scored in both"
    for key in sorted(before.settings.keys() | after.settings.keys()):
        if key not in MAY_DIFFER and before.settings.get(key) != after.settings.get(key):
            return f"other settings: {key}"
    for key in sorted(before.generation.keys() | after.generation.keys()):
        if before.generation.get(key) != after.generation.get(key):
            return f"other settings: {key}"
    if before.chat_template != after.chat_template:
        return "another chat template"
    asked = {sample.id: (sample.question, sample.target) for sample in before.samples}
    same = all(asked.get(sample.id) == (sample.question, sample.target) for sample in after.samples)
    return None if same and len(asked) == len(after.samples) else "other problems"
