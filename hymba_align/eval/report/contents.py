"""What a run folder holds that a report tells: scores, training records, data, recipe, machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hymba_align.errors import HymbaAlignError, ResultError
from hymba_align.eval.earlier import PREVIOUS
from hymba_align.eval.report import training
from hymba_align.eval.report.inspected import Inspected, inspected
from hymba_align.eval.result import TaskResult, read_result
from hymba_align.files import read_json
from hymba_align.recipe_eval import TASKS
from hymba_align.run.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics
from hymba_align.secrets import redact, without_secrets

STAGES = ("base", "sft", "dpo")
TRAINING_STAGES = ("sft", "dpo")
STAGE_NAMES = {"base": "base", "sft": "after SFT", "dpo": "after DPO"}


@dataclass(frozen=True)
class Scored:
    """A stage's result on a task."""

    stage: str
    task: str
    result: TaskResult


@dataclass(frozen=True)
class Run:
    """A run folder as it is now. Parts that are not there yet are empty; files that cannot be used are in `notices`."""

    root: Path
    scored: tuple[Scored, ...]
    notices: tuple[str, ...]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    data: dict[str, dict[str, Any]]
    continued: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Samples of each training stage, as samples.jsonl has them"""
    inspected: tuple[Inspected, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run, which is that of its folder."""
        return self.root.name

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that any stage was scored on, in the order of `TASKS`."""
        found = {scored.task for scored in self.scored}
        return (*(task for task in TASKS if task in found), *sorted(found - set(TASKS)))

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe; empty where there is none."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def asks_for_scores(self) -> bool:
        """Whether there are scores, or may be: unless the recipe is known and scores nothing."""
        return bool(self.scored) or not self.recipe or isinstance(self.recipe.get("eval"), dict)

    def of_task(self, task: str) -> list[Scored]:
        """The results of a task, in the order of the stages."""
        return [scored for scored in self.scored if scored.task == task]

    @property
    def partial(self) -> list[Scored]:
        """Results on less than their whole test set."""
        return [scored for scored in self.scored if scored.result.partial]


def read_run(root: Path) -> Run:
    """What the run folder holds so far; what cannot be read is named in `notices` and left out."""
    notices: list[str] = []
    scored = tuple(_results(root, notices))
    recipe, environment = without_secrets(_recipe(root, notices)), _json(root, "environment.json", notices)
    metrics = {stage: _metrics(root / stage, notices) for stage in TRAINING_STAGES}
    data = {stage: _data(root, stage, notices) for stage in TRAINING_STAGES}
    inside = tuple(_inspected(root, notices))
    told = tuple(redact(notice.replace(f"{root}/", "")) for notice in notices)
    continued = {stage: _metrics(root / stage, notices, SAMPLES_FILE) for stage in TRAINING_STAGES}
    return Run(root, scored, told, recipe, environment, metrics, data, continued, inside)


def _inspected(root: Path, notices: list[str]) -> Iterator[Inspected]:
    """Every inspection in the order of the stages, but for those of weights that are gone."""
    for stage in STAGES:
        manifest = _json(root, f"inspect/{stage}.manifest.json", notices)
        try:
            found = inspected(root, stage, manifest)
        except ValueError as error:
            notices.append(f"inspect/{stage}.manifest.json: {error}")
            continue
        if found is not None and _are_of_earlier_weights(root, "inspect", stage, notices):
            notices.append(
                f"The look inside {STAGE_NAMES[stage]} is of weights that were trained anew since; run it again"
            )
        elif found is not None:
            yield found


def _results(root: Path, notices: list[str]) -> Iterator[Scored]:
    """Every result file in the order of the stages, but for those of weights that are gone."""
    for stage in STAGES:
        found = sorted((root / "eval" / stage).glob("*.json"))
        paths = [path for path in found if not path.name.endswith(PREVIOUS)]
        if paths and _are_of_earlier_weights(root, "eval", stage, notices):
            notices.append(f"Scores {STAGE_NAMES[stage]} are of weights that were trained anew since; score again")
            continue
        for path in paths:
            try:
                yield Scored(stage, path.stem, read_result(path))
            except ResultError as error:
                notices.append(str(error))


def _are_of_earlier_weights(root: Path, looked: str, stage: str, notices: list[str]) -> bool:
    """Whether the stage was trained anew, on other inputs, after it was looked at; folders without manifests count as whole.

    Args:
        looked: eval or inspect.
    """
    names = (f"{looked}/{stage}.manifest.json", f"{stage}/manifest.json")
    seen, trained = (_json(root, name, notices) for name in names)
    details = seen.get("details")
    inputs = details.get("inputs") if isinstance(details, dict) else None
    return bool(trained) and inputs is not None and inputs != trained.get("completed")


def _metrics(stage_dir: Path, notices: list[str], name: str = METRICS_FILE) -> list[dict[str, Any]]:
    try:
        records = read_metrics(stage_dir, name)
    except HymbaAlignError as error:
        notices.append(str(error))
        return []
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def _data(root: Path, stage: str, notices: list[str]) -> dict[str, Any]:
    """The record of a stage's data, of which all that a report says can be said; otherwise it is named and left out."""
    record = _json(root, f"{stage}/data.json", notices)
    try:
        training.source_rows(stage, record)
        training.data_words(stage, record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        notices.append(f"{stage}/data.json lacks what this version writes there ({type(error).__name__}: {error})")
        return {}
    return record


def _json(root: Path, name: str, notices: list[str]) -> dict[str, Any]:
    if not (root / name).is_file():
        return {}
    try:
        return read_json(root / name)
    except (OSError, ValueError) as error:
        notices.append(f"{name} cannot be read: {error}")
        return {}


def _recipe(root: Path, notices: list[str]) -> dict[str, Any]:
    path = root / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notices.append(f"recipe.yaml cannot be read: {' '.join(str(error).split())}")
        return {}
    return values if isinstance(values, dict) else {}
