"""BFCL's scores of a model: prompts from our chat template, verdicts from bfcl-eval.

The package's own overall score is not used: it counts every category that was not run as 0, and everybody who never
calls a function gets all of irrelevance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hymba_align.eval.bfcl.categories import (
    IRRELEVANCE,
    LIVE_SCORE,
    MULTI_TURN,
    SIMPLE,
    chosen_categories,
    not_run,
    shares,
)
from hymba_align.eval.bfcl.client import BFCLClient, Grade
from hymba_align.eval.bfcl.environment import BFCL_VERSION, bfcl_python, missing_grader
from hymba_align.eval.bfcl.prompts import Entry, prompts_of, question_of
from hymba_align.eval.lm_tasks import check_context, length_warnings
from hymba_align.eval.result import Sample, Score, TaskResult

if TYPE_CHECKING:
    from hymba_align.eval.answers import Answer, Answers
    from hymba_align.eval.run import TaskRun
    from hymba_align.recipe_eval import EvalSection, Task

__all__ = ["check_context", "check_data", "data_files", "score_bfcl"]

TURN_MARKER = "<extra_id_1>"
NEVER_CALLS = "I cannot help with that."
"""The answer of the baseline; it is graded like any other"""
DEFINITIONS = {
    "live": "all problems of live simple, multiple, parallel, parallel_multiple and relevance, each counting the same",
    "non_live": "mean of simple (itself the mean of Python, Java and JavaScript), multiple, parallel, parallel_multiple",
    "multi_turn": "mean of the four multi-turn categories",
    "*_never_call": "what a model that never calls a function gets there",
}


@dataclass(frozen=True)
class Marked:
    """A sample, and what its verdict says about the grader's limits."""

    sample: Sample
    notes: frozenset[str] = frozenset()


def score_bfcl(run: TaskRun) -> TaskResult:
    """Scores by category and their means, with every sample.

    Raises:
        GraderError: BFCL's environment is missing, or its grader fails.
        RecipeError: a category that there is not; answers that leave no room for prompts.
    """
    chosen = chosen_categories(run.section.bfcl.categories)
    check_context(run.context, run.section, "bfcl")
    answers = run.answers_for("bfcl")
    with BFCLClient() as client:
        everything = {category: client.entries(category) for category in chosen}
        sizes = {category: len(entries) for category, entries in everything.items()}
        counts = shares(sizes, run.section.limit)
        problems = {category: entries[: counts[category]] for category, entries in everything.items()}
        single = {category: entries for category, entries in problems.items() if category not in MULTI_TURN}
        several = [entry for category in MULTI_TURN for entry in problems.get(category, ())]
        first = [*single.values(), several][0][0]
        first_prompt = str(run.tokenizer.decode(prompts_of(run.tokenizer, [first])[0]))
        marked = _single_turn(run, client, answers, single)
        conversations = _multi_turn(run, client, answers, several)
        baselines = _never_calling(client, problems)
    samples = [_with_live(one.sample, chosen) for one in marked] + conversations.samples
    return run.result(
        "bfcl",
        total=sum(sizes.values()),
        scores=scores_of(samples, chosen, baselines),
        samples=samples,
        settings=_settings(sizes, counts),
        generation={
            "greedy": True,
            "max_new_tokens": run.section.new_tokens("bfcl"),
            "until": [TURN_MARKER],
            "end_token": run.tokenizer.eos_token,
        },
        first_prompt=first_prompt,
        seed=None,
        versions={"bfcl-eval": BFCL_VERSION},
        not_run=not_run(chosen),
        warnings=[*_warnings(run, answers, marked), *conversations.warnings],
    )


def data_files(section: EvalSection) -> list[Path]:
    """Local files that the scores depend on: none, the problems are bfcl-eval's own."""
    return []


def check_data(section: EvalSection, task: Task, *, ask_hub: bool) -> None:
    """Raises GraderError without BFCL's environment, or where multi-turn calls cannot be confined; RecipeError for a
    category that is not run. A plan (without `ask_hub`) goes on without that environment, and says so by itself."""
    chosen = chosen_categories(section.bfcl.categories)
    if not ask_hub and missing_grader() is not None:
        return
    python = bfcl_python()
    if set(MULTI_TURN) & set(chosen):
        from hymba_align.eval.bfcl.sandbox import Sandbox

        with Sandbox(python) as sandbox:
            sandbox.prove()


# ---- answers --------------------------------------------------------------------------------------------------------


def _single_turn(
    run: TaskRun, client: BFCLClient, answers: Answers, problems: Mapping[str, Sequence[Entry]]
) -> list[Marked]:
    """Graded answers to all problems, generated in one go so that batches stay full."""
    entries = [entry for group in problems.values() for entry in group]
    if not entries:
        return []
    given = answers.generate(
        prompts_of(run.tokenizer, entries),
        max_new_tokens=run.section.new_tokens("bfcl"),
        until=(TURN_MARKER,),
        name="bfcl",
    )
    by_id = {entry["id"]: answer for entry, answer in zip(entries, given, strict=True)}

    def grade_all() -> list[Grade]:
        texts = {
            category: {entry["id"]: by_id[entry["id"]].text for entry in group} for category, group in problems.items()
        }
        return [grade for category, group in texts.items() for grade in client.grade(category, group)]

    # By rank 0 for all: what a limit of time ends in one process might not end in another.
    grades = cast("list[Grade]", run.processes.gather(grade_all() if run.processes.rank == 0 else None)[0])
    groups = [category for category, group in problems.items() for _ in group]
    return [
        Marked(_sample(category, entry, by_id[entry["id"]], grade), _notes(grade))
        for category, entry, grade in zip(groups, entries, grades, strict=True)
    ]


def _sample(category: str, entry: Entry, answer: Answer, grade: Grade) -> Sample:
    return Sample(
        id=entry["id"],
        target=json.dumps(entry["target"], ensure_ascii=False),
        question=question_of(entry),
        response=answer.text,
        extracted={"calls": grade.calls or "no calls"},
        correct={category: grade.correct},
        group=category,
        tokens=answer.tokens,
        cut_off=answer.cut_off,
        verdict=": ".join(filter(None, (grade.error_type, grade.error))),
    )


@dataclass(frozen=True)
class Conversations:
    """Samples of the multi-turn categories, and what is to be said of them."""

    samples: list[Sample]
    warnings: list[str]


def _multi_turn(run: TaskRun, client: BFCLClient, answers: Answers, entries: Sequence[Entry]) -> Conversations:
    """Graded conversations; their calls run in the sandbox."""
    if not entries:
        return Conversations([], [])
    from hymba_align.eval.bfcl.multi_turn import conversation_warnings, grade_multi_turn, run_conversations
    from hymba_align.eval.bfcl.sandbox import Sandbox

    max_steps = run.section.bfcl.max_steps
    with Sandbox(bfcl_python()) as sandbox:
        held = run_conversations(
            answers,
            run.tokenizer,
            client,
            sandbox,
            entries,
            max_steps=max_steps,
            max_new_tokens=run.section.new_tokens("bfcl"),
            until=(TURN_MARKER,),
        )
        verdicts = grade_multi_turn(run.processes, sandbox, held)
    samples = []
    for identifier, one in held.items():
        verdict, category = verdicts[identifier], identifier.rpartition("_")[0]
        samples.append(
            Sample(
                id=identifier,
                target=json.dumps(one.entry["target"], ensure_ascii=False),
                question=question_of(one.entry),
                response=one.transcript,
                extracted={"calls": json.dumps(one.turns, ensure_ascii=False)},
                correct={category: verdict.valid},
                group=category,
                tokens=one.tokens,
                cut_off=one.cut_off,
                verdict="" if verdict.valid else f"{verdict.error_type}: {verdict.error}",
            )
        )
    return Conversations(samples, conversation_warnings(held.values(), context=run.context, max_steps=max_steps))


def _never_calling(client: BFCLClient, problems: Mapping[str, Sequence[Entry]]) -> dict[str, list[Grade]]:
    """Verdicts on a model that never calls a function, where that is right."""
    return {
        category: client.grade(category, {entry["id"]: NEVER_CALLS for entry in problems[category]})
        for category in IRRELEVANCE
        if category in problems
    }


def _notes(grade: Grade) -> frozenset[str]:
    found = {
        "dropped": grade.dropped_arguments,
        "refused": grade.refused_code,
        "raised": grade.error_type.startswith("checker_raised"),
    }
    return frozenset(name for name, holds in found.items() if holds)


def _with_live(sample: Sample, chosen: Sequence[str]) -> Sample:
    """The sample with a verdict for the score `live` too, where that is made and it belongs to it."""
    if sample.group not in LIVE_SCORE or not set(LIVE_SCORE) <= set(chosen):
        return sample
    return replace(sample, correct={**sample.correct, "live": sample.correct[sample.group]})


# ---- scores ---------------------------------------------------------------------------------------------------------


def scores_of(
    samples: Sequence[Sample], chosen: Sequence[str], baselines: Mapping[str, Sequence[Grade]]
) -> dict[str, Score]:
    """The means of which all parts were run, then every category; the first is the headline."""
    by_category = {
        category: share([sample.correct[category] for sample in samples if sample.group == category])
        for category in chosen
    }
    scores = {}
    live = [sample.correct["live"] for sample in samples if "live" in sample.correct]
    if live:
        scores["live"] = share(live)
    if {*SIMPLE, "multiple", "parallel", "parallel_multiple"} <= set(chosen):
        simple = mean([by_category[name] for name in SIMPLE])
        scores["non_live"] = mean(
            [simple, *(by_category[name] for name in ("multiple", "parallel", "parallel_multiple"))]
        )
    if set(MULTI_TURN) <= set(chosen):
        scores["multi_turn"] = mean([by_category[name] for name in MULTI_TURN])
    for category, score in by_category.items():
        scores[category] = score
        if category in baselines:
            scores[f"{category}_never_call"] = share([grade.correct for grade in baselines[category]])
    return scores


def share(verdicts: Sequence[bool]) -> Score:
    """The share of right ones, with the standard error of a sample mean."""
    n = len(verdicts)
    value = sum(verdicts) / n
    return Score(value, math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None, n)


def mean(scores: Sequence[Score]) -> Score:
    """The mean of independent scores, each counting the same whatever its number of problems."""
    errors = [score.stderr for score in scores]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(scores) if len(known) == len(errors) else None
    return Score(sum(score.value for score in scores) / len(scores), stderr, sum(score.n for score in scores))


def _settings(sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "benchmark": "BFCL V4, data of bfcl-eval",
        "problems": {category: f"{counts[category]} of {size}" for category, size in sizes.items()},
        "tools": "the chat template's tools block, one JSON object of name, description and parameters each",
        "formats": ["<toolcall> JSON", "[name(argument=value), ...]"],
        "scores": DEFINITIONS,
    }


def _warnings(run: TaskRun, answers: Answers, marked: Sequence[Marked]) -> list[str]:
    def count(note: str) -> int:
        return sum(note in one.notes for one in marked)

    texts: dict[str, Callable[[int], str]] = {
        "dropped": lambda n: f"{n} answers have positional arguments, which the official decoder leaves out",
        "refused": lambda n: (
            f"{n} answers have arguments that would have to be executed to know their values; they count as no call"
        ),
        "raised": lambda n: f"the official checker raised an error over {n} answers; they count as wrong",
    }
    what_to_do = "their functions may be missing; a model with a longer context would see them"
    found = [text(count(note)) for note, text in texts.items() if count(note)]
    return [*length_warnings(run, "bfcl", answers, what_to_do), *found]
