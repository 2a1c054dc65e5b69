"""A plan as people read it before a run, and as plain values for --json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.plan import Step
from hymba_align.plan_inspection import tasks_of
from hymba_align.processes.engines import requested_engine
from hymba_align.processes.launch import launch_command, needs_launch
from hymba_align.recipe import Recipe, resolved_eval
from hymba_align.run.folder import RunFolder
from hymba_align.terminal import print_table, print_text

if TYPE_CHECKING:
    from rich.console import Console


def planned(recipe: Recipe, folder: RunFolder, steps: Sequence[Step], before: Sequence[Step] = ()) -> dict[str, Any]:
    """The run's name and folder, its steps with what they read, where they write and how far they are, its guards.

    Args:
        before: steps that have to be complete and are not run.
    """
    missing = [step.name for step in before if not folder.is_complete(step.name, step.fingerprint)]
    return {
        "name": recipe.name,
        "folder": str(folder.root),
        "steps": [_planned_step(recipe, folder, step, missing) for step in steps],
        "guards": {stage: getattr(recipe, stage).guard.model_dump(mode="json") for stage in recipe.training_stages},
    }


def _planned_step(recipe: Recipe, folder: RunFolder, step: Step, missing: Sequence[str]) -> dict[str, Any]:
    launched = step.trains and needs_launch(recipe)
    return {
        "step": step.title,
        "data": step.data,
        "starts_from": str(Path(step.start).relative_to(folder.root)) if step.start else _base_name(recipe),
        "writes_to": f"{step.name}/final" if step.trains else step.name,
        "state": _state(folder, step, missing),
        "engine": requested_engine(recipe.launch) if launched else None,
        "command": shlex.join(launch_command(recipe, step.name)) if launched else None,
    }


def needed_first(recipe: Recipe, waiting: Sequence[Step]) -> list[str]:
    """What has to be installed for steps that wait, without which the run does not begin: a line for each."""
    from hymba_align.eval.bfcl.environment import missing_grader

    asking = [step.name for step in waiting if "bfcl" in _tasks(recipe, step)]
    missing = missing_grader() if asking else None
    return [f"Needed first, for {', '.join(asking)}: {missing}"] if missing is not None else []


def _tasks(recipe: Recipe, step: Step) -> Sequence[str]:
    """What a step scores."""
    if step.kind == "score":
        return resolved_eval(recipe).tasks
    section = tasks_of(recipe) if step.kind == "inspect" else None
    return section.tasks if section is not None else ()


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """The steps as a table, and the command of each that trains in processes of its own."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Plan of {plan['name']}, in {plan['folder']}"), title_justify="left")
    for column in ("step", "data", "starts from", "writes to", "state"):
        table.add_column(column, overflow="fold")
    for step in plan["steps"]:
        table.add_row(*(Text(step[key]) for key in ("step", "data", "starts_from", "writes_to", "state")))
    print_table(console, table)
    for step in plan["steps"]:
        if step["command"] is not None:
            told = f"{step['step']} trains with {step['engine']}: {step['command']}"
            console.print(told, markup=False, soft_wrap=True)


def print_guards(plan: Mapping[str, Any], console: Console) -> None:
    """What each stage does when training goes wrong."""
    from rich.text import Text

    for stage, guard in plan["guards"].items():
        told = f"{stage}.guard: {', '.join(f'{key} {value}' for key, value in guard.items())}"
        print_text(console, Text(told))


def _state(folder: RunFolder, step: Step, missing: Sequence[str]) -> str:
    """How far a step is, in words.

    Args:
        missing: names of steps that have to be complete before, and are not.
    """
    if folder.is_complete(step.name, step.fingerprint):
        return "done"
    if missing:
        return f"needs {missing[0]} first"
    if step.trains and folder.is_started(step.name, step.fingerprint):
        return "resumes"
    aside = folder.find_aside(step.name, step.fingerprint) if step.trains else None
    return f"back from {aside.name}" if aside is not None else "to do"


def _base_name(recipe: Recipe) -> str:
    base: Any = recipe.base
    if base.model is None:
        return "random weights"
    return f"{base.model} ({base.revision})" if base.revision else str(base.model)
