"""What a task's scores mean, and by which of them a single answer is called right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hymba_align.eval.report.words import first_upper, spaced
from hymba_align.eval.result import TaskResult

LAST = "the last number of the answer is right"
MEANINGS = {
    "gsm8k": {"strict_match": "the number after #### is right", "flexible_match": LAST},
    "gpqa_generative": {
        "strict_match": "the letter in 'The answer is (X).' is right",
        "flexible_match": "the last (X) of the answer is right, else its choice in words, else its letter after a colon",
    },
    "gpqa": {
        "acc": "the choice that the model finds likeliest is right",
        "acc_norm": "the same with each choice's log-likelihood divided by its length",
    },
    "bfcl": {
        "live": "of all problems of the categories live simple, multiple, parallel, parallel multiple and relevance",
        "non_live": "the mean of simple (the mean of Python, Java and JavaScript), multiple, parallel and parallel multiple",
        "multi_turn": "the mean of the four multi-turn categories",
    },
}
"""By task and score; a task that is not here has those of its first word"""
BFCL = "a score is the share of answers whose calls are right by BFCL's own checker (irrelevance: of answers without a call)"


def meaning(results: Sequence[TaskResult]) -> str:
    """What the scores of one task's results are, and by which one answers count as right, in sentences."""
    last = results[-1]
    known = MEANINGS.get(last.task) or MEANINGS.get(last.task.partition("_")[0], {})
    names = dict.fromkeys(name for result in results for name in result.scores)
    said = [BFCL] if last.task == "bfcl" else []
    said += [f"{spaced(name)}: {known[name]}" for name in names if name in known]
    return " ".join(_sentences([*(["; ".join(said)] if said else []), _judged(last)]))


def _judged(result: TaskResult) -> str:
    """By which score `samples.is_right` calls an answer right; empty without a sample."""
    if not result.samples:
        return ""
    if all(result.headline in sample.correct for sample in result.samples):
        return f"an answer counts as right by {spaced(result.headline)}"
    if all(sample.group for sample in result.samples):
        return "an answer counts as right by the checker of its category"
    return "an answer counts as right by all of its scores together"


def _sentences(parts: Iterable[str]) -> list[str]:
    return [f"{first_upper(part)}." for part in parts if part]
