"""Results that lie in an output folder already: taken over where nothing changed, else moved aside, never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hymba_align.errors import ResultError
from hymba_align.eval.inputs import grader, protocol, suite_words
from hymba_align.eval.result import TaskResult, read_result
from hymba_align.files import sync_folder

if TYPE_CHECKING:
    from hymba_align.recipe_eval import EvalSection, Task

PREVIOUS = ".previous.json"
"""End of the name of a result that another one of its task takes the place of"""


@dataclass(frozen=True)
class Earlier:
    """What was found of the tasks of a section."""

    done: dict[Task, TaskResult]
    """Results that are there with the same inputs"""
    reasons: dict[Task, str]
    """Files that have to make room: the beginning of a line about each"""

    def make_room(self, out_dir: Path, say: Callable[[str], None]) -> None:
        """Moves the files that are in the way beside themselves, and says of each in one line why and where to."""
        for task, reason in self.reasons.items():
            say(f"{task}: {reason} and is now {set_aside(out_dir / f'{task}.json').name}")


def set_aside(path: Path) -> Path:
    """Where a result file is now: beside itself, in the place of an older one."""
    aside = path.with_name(f"{path.name.removesuffix('.json')}{PREVIOUS}")
    path.replace(aside)
    sync_folder(path.parent)
    return aside


def find_earlier(
    section: EvalSection, out_dir: Path, inputs: Mapping[Task, str], *, checkpoint: str, template: Mapping[str, str]
) -> Earlier:
    """What lies in the folder; nothing moves.

    Args:
        inputs: fingerprints of what the scores that are asked for depend on, by task.
        checkpoint: and template as `TaskResult` has them, to say what changed.
    """
    done, reasons = {}, {}
    for task in section.tasks:
        path = out_dir / f"{task}.json"
        if not path.is_file():
            continue
        try:
            result = read_result(path)
        except ResultError as error:  # damaged, or of another version
            reasons[task] = str(error).removesuffix("; score again")
            continue
        if result.inputs != inputs[task]:
            changed = list(_changed(result, section, task, checkpoint, template))
            what = ", ".join(changed) or "bytes of the checkpoint or the data, or the task's definition"
            reasons[task] = f"{path} was made with other inputs ({what})"
            continue
        suite = suite_words(section, task)
        if result.suite != suite:  # the same protocol under another name
            result = replace(result, suite=suite)
            result.write(path)
        done[task] = result
    return Earlier(done, reasons)


def _changed(
    result: TaskResult, section: EvalSection, task: Task, checkpoint: str, template: Mapping[str, str]
) -> Iterator[str]:
    """What of the inputs is known to be another, with what it was."""
    if result.checkpoint != checkpoint:
        yield f"checkpoint {result.checkpoint}"
    if result.chat_template.get("sha256") != template["sha256"]:
        yield f"chat template {result.chat_template.get('name')}"
    try:
        before = type(section).model_validate({**result.section, "suite": None})
    except ValidationError:
        yield "a section eval of another version"
    else:
        asked = dict(_flat(protocol(section, task)))
        for key, value in _flat(protocol(before, task)):
            if value != asked.get(key):
                yield f"{key} {'unset' if value is None else value}"
    for name, version in grader(task)["versions"].items():
        if result.versions.get(name) != version:
            yield f"{name} {result.versions.get(name)}"


def _flat(asked: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the section with their values, of a protocol."""
    name = str(asked["task"]).split("_")[0]
    for key, value in asked.items():
        if key == "settings":
            yield from ((f"{name}.{inner}", setting) for inner, setting in value.items())
        elif key != "task":
            yield key, value
