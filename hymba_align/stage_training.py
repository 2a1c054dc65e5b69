"""A training stage in its processes: in this one, in those that it starts (launch.py), or as one of them.

Inside Slurm or torchrun the processes are there already: rank 0 keeps the run folder, the others wait for it. Whoever
keeps the folder records that the stage is complete, and only then removes its checkpoints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hymba_align.adapter_config import ADAPTER_CONFIG
from hymba_align.errors import HymbaAlignError, ProcessesError, RunFolderError
from hymba_align.plan import Step
from hymba_align.processes.launch import free_gpu_memory, launch, needs_launch, rank
from hymba_align.recipe import Recipe, TrainingStage
from hymba_align.recipe_eval import Stage
from hymba_align.run.folder import RunFolder, run_root
from hymba_align.terminal import print_text, print_words

if TYPE_CHECKING:
    from rich.console import Console

WAIT_FOR_RANK_0_S = 6 * 3600.0
"""Rank 0 prepares the data of all meanwhile; a launcher ends those who wait for one that failed."""
NOTICE_S = 60.0
"""After this long they say what they wait for."""


def train_step(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    """Trains the step's stage to its end.

    Raises: UsageError for what training refuses; RunFolderError where rank 0 does not start the stage.
    """
    if not _is_started(folder, step, console):
        return
    if needs_launch(recipe):
        _train_in_others(recipe, folder, step)
    else:
        _train_here(recipe, folder, step)


def train_as_worker(recipe: Recipe, stage: TrainingStage) -> None:
    """Trains as one of the processes that `launch` started; the process that launched has checked and planned."""
    folder, started = RunFolder(run_root(recipe)), int(os.environ.get("WORLD_SIZE", "1"))
    if started != recipe.launch.num_processes:
        raise ProcessesError(
            f"launch.num_processes is {recipe.launch.num_processes}, but {started} were started; "
            f"run 'hymba-align {stage}' itself, which starts as many as the recipe asks for"
        )
    before = recipe.training_stages[: recipe.training_stages.index(stage)]
    start = str(folder.root / before[-1] / "final") if before else None
    metrics = _call_trainer(recipe, folder, stage, start)
    if rank() == 0:
        _finish(recipe, folder, stage, folder.read_manifest(stage)["started"], metrics)


def remove_leftover_checkpoints(recipe: Recipe, folder: RunFolder, stage: Stage) -> None:
    """Finishes what `_finish` had begun when the process was killed; there is mostly nothing to do."""
    stage_dir = folder.stage_dir(stage)
    if stage == "base" or not any([*stage_dir.glob("checkpoint-*"), *stage_dir.glob(".saving")]):
        return
    from hymba_align.train.saving import remove_leftovers
    from hymba_align.train.stage_run import remove_checkpoints

    remove_checkpoints(recipe, stage, stage_dir)
    remove_leftovers(stage_dir)


def _is_started(folder: RunFolder, step: Step, console: Console) -> bool:
    """Marks a stage as started, or waits until rank 0 has; whether there is anything to train."""
    if rank() != 0:
        _wait_for_rank_0(folder, step)
        return not folder.is_complete(step.name, step.fingerprint)  # rank 0 had it aside
    moved_to = folder.mark_started(step.name, step.fingerprint, step.contents)
    if moved_to is not None:
        print_text(console, f"What entered {step.name} has changed; its earlier result is now in {moved_to}")
    return True


def _wait_for_rank_0(folder: RunFolder, step: Step) -> None:
    began, is_told = time.monotonic(), False
    while not folder.is_started(step.name, step.fingerprint):
        waited = time.monotonic() - began
        if waited > WAIT_FOR_RANK_0_S:
            raise RunFolderError(
                f"rank {rank()} waited {waited:.0f} s for rank 0 to start {step.name} in {folder.root}; "
                "set output_dir to a folder that all machines share"
            )
        if waited > NOTICE_S and not is_told:
            is_told = True
            print_words(
                f"rank {rank()} waits for rank 0 to start {step.name} in {folder.root}, which all machines have to share",
                stderr=True,
            )
        time.sleep(0.2)


def _train_in_others(recipe: Recipe, folder: RunFolder, step: Step) -> None:
    """Trains in processes that this one starts."""
    free_gpu_memory()
    launch(recipe, step.name)
    if rank() == 0 and not folder.is_complete(step.name, step.fingerprint):
        raise HymbaAlignError(f"{step.name} ended without a complete checkpoint; did its inputs change meanwhile?")


def _train_here(recipe: Recipe, folder: RunFolder, step: Step) -> None:
    """Trains in this process, one of several when a launcher started it."""
    assert step.stage != "base", "nothing trains the base"
    metrics = _call_trainer(recipe, folder, step.stage, step.start)
    if rank() == 0:
        _finish(recipe, folder, step.stage, step.fingerprint, metrics)


def _call_trainer(recipe: Recipe, folder: RunFolder, stage: TrainingStage, start: str | None) -> dict[str, float]:
    """Trains, and tells the trainer which answers are right: it knows no grader."""
    answers = getattr(recipe, stage).answers
    judging: Any = None
    if answers is not None:
        from hymba_align.eval.matching import matcher

        judging = matcher(answers.match)
    if stage == "sft":
        from hymba_align.train.sft import train_sft

        return train_sft(recipe, start, folder.stage_dir(stage), judging)
    from hymba_align.train.dpo import train_dpo

    return train_dpo(recipe, start, folder.stage_dir(stage), judging)


def _finish(recipe: Recipe, folder: RunFolder, stage: TrainingStage, inputs: str, metrics: Mapping[str, float]) -> None:
    """Records that a training stage is complete; only then may its checkpoints go."""
    from hymba_align.train.common import check_planned
    from hymba_align.train.stage_run import remove_checkpoints

    if recipe.data_for(stage).streaming:  # the last row was read only now
        check_planned(recipe.data_for(stage), folder.stage_dir(stage))
    outputs = (f"final/{ADAPTER_CONFIG if recipe.lora_for(stage) else 'config.json'}",)
    folder.mark_complete(stage, inputs, {"metrics": metrics}, outputs)
    remove_checkpoints(recipe, stage, folder.stage_dir(stage))
