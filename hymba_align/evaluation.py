"""Evaluations as commands run them: in this process, in several that it starts, or in those that a launcher has started.

The process that a user starts looks first at what there is to do and at all that could be at fault; only then are
processes started, for the tasks that are left. They write the results, which it reads.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import Preempted
from hymba_align.processes import signals
from hymba_align.processes.agent import STARTED_BY_US, die_with
from hymba_align.processes.launch import (
    check_gpus,
    free_gpu_memory,
    inside_launcher,
    launch_here,
    rank,
    started_by_us,
)
from hymba_align.processes.slurm import slurm_step
from hymba_align.run.lock import held
from hymba_align.run.storage import writing

if TYPE_CHECKING:
    from hymba_align.eval import TaskResult
    from hymba_align.recipe_eval import EvalSection

CONTINUES = "the same command continues from the answers already given"


def run_evaluation(
    checkpoint: str, section: EvalSection, out_dir: Path, *, chat_template: str, say: Callable[[str], None]
) -> dict[str, TaskResult] | None:
    """What the command `eval` does: the results, or None in processes that leave speaking to another one.

    Raises: UsageError for a checkpoint, a file or settings that cannot be used.
    """
    if started_by_us():
        die_with(int(os.environ[STARTED_BY_US]))
        _answer_for_command(checkpoint, section, out_dir, chat_template, say)
        return None
    step = slurm_step() if not inside_launcher() else None
    if step is not None:
        os.environ.update(step.environment())
    if not inside_launcher():
        with held(out_dir), writing(out_dir):
            return score(checkpoint, section, out_dir, chat_template=chat_template, say=say)
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if section.num_processes not in (None, there) and rank() == 0:
        say(f"num_processes is {section.num_processes}; {there} were started, and {there} answer")
    with held(out_dir) if rank() == 0 else contextlib.nullcontext(), writing(out_dir):
        results = _answer(checkpoint, section, out_dir, chat_template, say)
    return results if rank() == 0 else None


def score(
    checkpoint: str, section: EvalSection, out_dir: Path, *, chat_template: str, say: Callable[[str], None]
) -> dict[str, TaskResult]:
    """Results by task, of this process or of `section.num_processes` that it starts.

    Raises: UsageError for a checkpoint, a file or settings that cannot be used.
    """
    from hymba_align.eval import evaluate, read_result
    from hymba_align.eval.run import prepare, unchanged

    count = section.num_processes or 1
    if count == 1:
        return evaluate(checkpoint, section, out_dir, chat_template=chat_template, say=say)
    check_gpus(count)
    prepared = prepare(checkpoint, section, out_dir, chat_template=chat_template, say=say)
    for task in prepared.done:
        say(unchanged(task, out_dir))
    if prepared.waiting:
        left = section.model_copy(update={"tasks": tuple(prepared.waiting)})
        words = ["eval", checkpoint, "--output", str(out_dir), "--chat-template", chat_template, *overrides_for(left)]
        free_gpu_memory()
        launch_here("scoring", words, count, continues=CONTINUES)
    return {task: read_result(out_dir / f"{task}.json") for task in section.tasks}


def overrides_for(section: EvalSection) -> list[str]:
    """The section as KEY=VALUE words for the command `eval`, in which all that it says arrives."""
    return list(_words(section.model_dump(mode="json"), ""))


def _words(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def _answer_for_command(
    checkpoint: str, section: EvalSection, out_dir: Path, chat_template: str, say: Callable[[str], None]
) -> None:
    """As one of the processes that a command started, which speaks for them when they are stopped."""
    try:
        with writing(out_dir):
            _answer(checkpoint, section, out_dir, chat_template, say)
    except signals.Terminated:
        signals.end_soon()
        raise SystemExit(Preempted.exit_code) from None


def _answer(
    checkpoint: str, section: EvalSection, out_dir: Path, chat_template: str, say: Callable[[str], None]
) -> dict[str, TaskResult]:
    """As one of the processes that are there."""
    from hymba_align.eval import evaluate
    from hymba_align.eval.processes import joined

    with joined() as processes:
        return evaluate(checkpoint, section, out_dir, chat_template=chat_template, processes=processes, say=say)
