"""Runs beside each other: settings that differ, curves over the same axes, scores with paired differences, costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_align.eval.report import cost
from hymba_align.eval.report.charts import Point
from hymba_align.eval.report.contents import STAGE_NAMES, STAGES, TRAINING_STAGES, Run
from hymba_align.eval.report.differences import Difference, difference
from hymba_align.eval.result import TaskResult
from hymba_align.run_view.view import CURVES, RunView, view_run

OF_THE_RUN_ALONE = ("name", "output_dir")
"""Keys of a recipe in which two runs differ in any case"""
ABSENT = "–"


@dataclass(frozen=True)
class Differing:
    """A dotted key and its value in each run; `ABSENT` where a run has none."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Curves:
    """One metric of one stage: its name, and the points of each run that has it, by the run's label."""

    stage: str
    name: str
    points: dict[str, list[Point]]


@dataclass(frozen=True)
class ScoreRow:
    """A score after a stage in each run, and how far each later run's is from the first run's."""

    task: str
    stage: str
    score: str
    results: tuple[TaskResult | None, ...]
    differences: tuple[Difference | str, ...]
    """Of the second run and those after it; in words why there is none"""


@dataclass(frozen=True)
class CostRow:
    """What each run took for a step; None where it has not done it."""

    what: str
    costs: tuple[cost.Cost | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown of several runs, in their order."""

    views: tuple[RunView, ...]
    labels: tuple[str, ...]
    settings: tuple[Differing, ...]
    environment: tuple[Differing, ...]
    curves: tuple[Curves, ...]
    scores: tuple[ScoreRow, ...]
    costs: tuple[CostRow, ...]

    @property
    def settings_in_short(self) -> list[Differing]:
        """The settings, with one line for a section that a run does not have."""
        return list(_folded(self.settings, [_without_own(view.run.recipe) for view in self.views]))

    @property
    def environment_in_short(self) -> list[Differing]:
        """The same of the environment."""
        return list(_folded(self.environment, [view.run.environment for view in self.views]))


def compare_runs(roots: Sequence[Path]) -> Comparison:
    """The comparison of these run folders, as they are now."""
    views = tuple(view_run(root) for root in roots)
    labels = _labels(roots)
    return Comparison(
        views=views,
        labels=labels,
        settings=tuple(_differing([_without_own(view.run.recipe) for view in views])),
        environment=tuple(_differing([view.run.environment for view in views])),
        curves=tuple(_curves(views, labels)),
        scores=tuple(_scores([view.run for view in views])),
        costs=tuple(_costs([view.run for view in views])),
    )


def _labels(roots: Sequence[Path]) -> tuple[str, ...]:
    """The folders' names; their whole paths, and then numbers, where these are the same."""
    names = [root.resolve().name for root in roots]
    if len(set(names)) < len(names):
        names = [str(root) for root in roots]
    return tuple(f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1))


def _without_own(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in OF_THE_RUN_ALONE}


def _differing(several: Sequence[Mapping[str, Any]]) -> Iterator[Differing]:
    """Every key whose value is not the same in all; what a folder does not hold at all differs in nothing."""
    flat = [dict(_flat(values, "")) for values in several]
    for key in dict.fromkeys(key for values in flat for key in values):
        values = tuple(_told(each.get(key, ABSENT)) if each else ABSENT for each in flat)
        if len(set(values)) > 1:
            yield Differing(key, values)


def _folded(rows: Sequence[Differing], several: Sequence[Mapping[str, Any]]) -> Iterator[Differing]:
    """The rows, with one for each section that a run has nothing of and on which the others agree: how many keys they have.

    Args:
        several: what the rows are of, one for each run.
    """
    all_keys = [[key for key, _ in _flat(values, "")] for values in several]
    apart: dict[str, list[Differing]] = {}
    for row in rows:
        apart.setdefault(_lacking_section(row.key, rows, all_keys) or row.key, []).append(row)
    for key, found in apart.items():
        counts = [sum(row.values[run] != ABSENT for row in found) for run in range(len(several))]
        yield Differing(key, tuple(f"{n} keys" if n else ABSENT for n in counts)) if len(found) > 1 else found[0]


def _lacking_section(key: str, rows: Sequence[Differing], all_keys: Sequence[Sequence[str]]) -> str | None:
    """The largest section around a key that folds; None where none does."""
    names = key.split(".")
    for section in (".".join(names[:depth]) for depth in range(1, len(names))):
        lacks = [not any(each.startswith(f"{section}.") for each in keys) for keys in all_keys]
        inside = [row.values for row in rows if row.key.startswith(f"{section}.")]
        others = ({value for value, no in zip(values, lacks, strict=True) if not no} for values in inside)
        if any(lacks) and all(len(told) == 1 for told in others):
            return section
    return None


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            for number, each in enumerate(value, start=1):
                yield from _flat(each, f"{prefix}{key}[{number}].")
        elif value is not None:
            yield f"{prefix}{key}", value


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _curves(views: Sequence[RunView], labels: Sequence[str]) -> Iterator[Curves]:
    for stage in TRAINING_STAGES:
        for key, name in CURVES:
            found = {
                label: view.curves[stage][key]
                for label, view in zip(labels, views, strict=True)
                if key in view.curves.get(stage, {})
            }
            if found:
                yield Curves(stage, name, found)


def _scores(runs: Sequence[Run]) -> Iterator[ScoreRow]:
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        for stage in STAGES:
            results = tuple(_result(run, stage, task) for run in runs)
            names = dict.fromkeys(name for result in results if result is not None for name in result.scores)
            for name in names:
                changes = tuple(_change(results[0], result, name) for result in results[1:])
                yield ScoreRow(task, stage, name, results, changes)


def _result(run: Run, stage: str, task: str) -> TaskResult | None:
    return next((scored.result for scored in run.of_task(task) if scored.stage == stage), None)


def _change(first: TaskResult | None, other: TaskResult | None, score: str) -> Difference | str:
    if first is None or other is None:
        return "not scored in both"
    return difference(first, other, score)


def _costs(runs: Sequence[Run]) -> Iterator[CostRow]:
    """Every training, scoring and inspection that a run has done."""
    for stage in TRAINING_STAGES:
        costs = tuple(cost.of_training(run.metrics[stage]) if run.metrics[stage] else None for run in runs)
        if any(costs):
            yield CostRow(f"train {stage.upper()}", costs)
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        for stage in STAGES:
            found = [next((s for s in run.of_task(task) if s.stage == stage), None) for run in runs]
            if any(found):
                scoring = tuple(cost.of_scoring(scored) if scored is not None else None for scored in found)
                yield CostRow(f"score {STAGE_NAMES[stage]}, {task}", scoring)
    for stage in STAGES:
        looks = [next((one for one in run.inspected if one.stage == stage), None) for run in runs]
        if any(looks):
            inspecting = tuple(cost.of_inspecting(one) if one is not None else None for one in looks)
            yield CostRow(f"inspect {STAGE_NAMES[stage]}", inspecting)


def plain_comparison(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for --json; the keys are what docs/commands/compare.md says."""
    return {
        "runs": [
            {"name": label, "folder": str(view.run.root), "problems": view.problems}
            for label, view in zip(comparison.labels, comparison.views, strict=True)
        ],
        "settings": {row.key: list(row.values) for row in comparison.settings},
        "environment": {row.key: list(row.values) for row in comparison.environment},
        "curves": [{"stage": each.stage, "name": each.name, "points": each.points} for each in comparison.curves],
        "scores": [_plain_score(row) for row in comparison.scores],
        "costs": [{"what": row.what, "costs": list(row.costs)} for row in comparison.costs],
    }


def _plain_score(row: ScoreRow) -> dict[str, Any]:
    """Differences are of each later run to the first, in [-1, 1]; where there is none, `why` says so."""
    return {
        "task": row.task,
        "stage": row.stage,
        "score": row.score,
        "values": [result.scores.get(row.score) if result is not None else None for result in row.results],
        "differences": [{"why": found} if isinstance(found, str) else found for found in row.differences],
    }
