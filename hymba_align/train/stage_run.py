"""A stage's training from its last checkpoint to `final`, and a summary of it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from hymba_align.files import read_json
from hymba_align.recipe import Recipe, TrainingStage
from hymba_align.run.curves import draw_curves
from hymba_align.run.manifest import find_damage, read_manifest
from hymba_align.run.storage import writing
from hymba_align.terminal import print_words
from hymba_align.train.adapting import peft_model
from hymba_align.train.answers import EXACT, AnswersProblems, final_step
from hymba_align.train.callbacks import MetricsFile, Progress, closed_after
from hymba_align.train.common import SHARED_DATASET
from hymba_align.train.preemption import Preemption, preemptible
from hymba_align.train.saving import (
    STATE_FILE,
    SavesState,
    checkpoints,
    discard,
    last_good_checkpoint,
    remove_leftovers,
    stage_inputs,
)
from hymba_align.train.settings import stage_section
from hymba_align.train.trackers import trackers, tracking

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

FINAL = "final"


def stage_callbacks(
    recipe: Recipe, stage: TrainingStage, stage_dir: Path, arguments: TrainingArguments
) -> list[TrainerCallback]:
    """SIGTERM first, which has a step logged and saved; then the record, so that it holds the step at which a later one stops.

    Trackers come last: they get what the record adds to a log event.
    """
    ours = [Preemption(stage, stage_dir), MetricsFile(stage_dir), Progress(stage)]
    return [*ours, *trackers(recipe, stage, stage_dir, is_main=arguments.process_index == 0)]


def finished_state(stage_dir: Path) -> Path | None:
    """The trainer_state.json of the last step, where a whole `final` exists too: everything is trained and saved."""
    final = read_manifest(stage_dir / FINAL)
    if final is None or final.get("inputs") != stage_inputs(stage_dir) or find_damage(stage_dir / FINAL) is not None:
        return None
    for path in checkpoints(stage_dir):
        if find_damage(path) is None:
            state = read_json(path / STATE_FILE)
            return path / STATE_FILE if state["global_step"] >= state["max_steps"] else None
    return None


def _where_to_resume(trainer: Trainer, stage_dir: Path) -> tuple[Path | None, Path | None]:
    """`finished_state` and the last good checkpoint, as the main process finds them, on every process.

    Whatever an interrupted save left is removed first.
    """
    found: list[Any] = [None]
    if trainer.is_world_process_zero():
        remove_leftovers(stage_dir)
        finished = finished_state(stage_dir)
        checkpoint = last_good_checkpoint(stage_dir) if finished is None else None
        if checkpoint is not None:
            print_words(f"resuming from {checkpoint.name}")
        elif finished is None and checkpoints(stage_dir):
            print_words(f"no checkpoint in {stage_dir} can be used, so training starts afresh", stderr=True)
        found = [(finished, checkpoint)]
    broadcast_object_list(found)
    places: tuple[Path | None, Path | None] = found[0]
    return places


def resolve_steps(arguments: TrainingArguments, checkpoint: Path) -> None:
    """Puts steps in the place of shares of all steps (`save_steps` 0.2), where they are those that the checkpoint has.

    transformers 5.23 compares its arguments with the checkpoint as they are written, and warns that 0.2 is not 4; delete
    this when it compares what they come to. What did change it still tells.
    """
    state = read_json(checkpoint / STATE_FILE)
    for key in ("logging_steps", "eval_steps", "save_steps"):
        asked, saved = getattr(arguments, key), state[key]
        if asked is not None and asked < 1 and saved == math.ceil(state["max_steps"] * asked):
            setattr(arguments, key, saved)


def run_stage(trainer: Trainer, stage_dir: Path) -> dict[str, float]:
    """Trains, resuming where an earlier run stopped, and writes `final`; what comes back are summary metrics.

    Checkpoints stay: until the caller has recorded that the stage is complete, they tell the next run what is done.

    Raises:
        Preempted: SIGTERM came, and a checkpoint is written.
        StorageError: a checkpoint or `final` could not be written.
    """
    from transformers import PrinterCallback, TrainerState

    trainer.remove_callback(PrinterCallback)
    metrics = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MetricsFile))
    finished, checkpoint = _where_to_resume(trainer, stage_dir)
    if finished is not None:
        trainer.state = TrainerState.load_from_json(str(finished))
        metrics.count_earlier(trainer.state)
        runtime_s = 0.0
    else:
        with (
            writing(stage_dir, needed_bytes=lambda: checkpoint_bytes(trainer)),
            tracking(trainer.callback_handler.callbacks),
            closed_after(trainer.callback_handler.callbacks),
            preemptible(trainer),
        ):
            if checkpoint is not None:
                resolve_steps(trainer.args, checkpoint)
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            _answering(trainer).take_best()
            save_final(trainer, stage_dir)
        runtime_s = float(result.metrics["train_runtime"])
    if trainer.is_world_process_zero():
        shutil.rmtree(stage_dir / SHARED_DATASET, ignore_errors=True)
        print_words(f"curves: {draw_curves(stage_dir)}")
        (stage_dir / "README.md").unlink(missing_ok=True)  # TRL's model card of a checkpoint
    return summarise(trainer, metrics, runtime_s)


def checkpoint_bytes(trainer: Trainer) -> int:
    """About the size of a checkpoint: weights, float32 master weights beside smaller ones, and Adam's two float32 states.

    Where adapters are trained, it holds these alone.
    """
    total = 0
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = peft_model(model) is not None
    for parameter in model.parameters():
        if adapter and not parameter.requires_grad:
            continue
        count = int(getattr(parameter, "ds_numel", parameter.numel()))  # of ZeRO-3's whole parameter, not of this part
        total += count * (parameter.element_size() + (4 if parameter.element_size() < 4 else 0) + 2 * 4)
    return total


def remove_checkpoints(recipe: Recipe, stage: TrainingStage, stage_dir: Path) -> None:
    """Removes a complete stage's checkpoints, unless the recipe says how many to keep (`save_total_limit`)."""
    if "save_total_limit" not in stage_section(recipe, stage).trainer:
        for folder in checkpoints(stage_dir):
            discard(folder)


def save_final(trainer: Trainer, stage_dir: Path) -> None:
    """Writes weights, tokenizer and generation configuration to `final`, with a manifest, whole or not at all."""
    saver: Any = trainer
    assert isinstance(saver, SavesState), "a stage's trainer writes its folders"
    details = {"step": final_step(_answering(trainer)), **saver.description()}
    # Every process takes part: ZeRO-3 and FSDP gather the weights here.
    saver.save_whole(stage_dir / FINAL, lambda inside: trainer.save_model(str(inside / FINAL)), details)


def _answering(trainer: Any) -> AnswersProblems:
    assert isinstance(trainer, AnswersProblems), "a stage's trainer answers problems where it is asked to"
    return trainer


def summarise(trainer: Trainer, metrics: MetricsFile, runtime_s: float) -> dict[str, float]:
    """Summary of a finished stage: losses and tokens over all its steps, those of earlier sessions included.

    `answers/exact` is that of the weights in `final`, and `best_step` their step where it was chosen.

    `runtime_s` and `tokens_per_second` are of this session alone, `total_runtime_s` of all; tokens are those of all
    processes, and `peak_memory_bytes` of the one that writes this.
    """
    history = [record for record in trainer.state.log_history if "loss" in record]
    total = previous = 0.0
    for record in history:  # `loss` is the mean since the record before
        total += record["loss"] * (record["step"] - previous)
        previous = record["step"]
    summary = {
        "steps": float(trainer.state.global_step),
        "epochs": float(trainer.state.epoch or 0.0),
        "train_loss": total / max(previous, 1.0),
        "first_loss": history[0]["loss"] if history else float("nan"),
        "last_loss": history[-1]["loss"] if history else float("nan"),
        "tokens": float(metrics.tokens),
        "runtime_s": runtime_s,
        "total_runtime_s": metrics.seconds,
        "peak_memory_bytes": float(metrics.peak_memory_bytes),
        "tokens_per_second": (metrics.tokens - metrics.tokens_before) / runtime_s if runtime_s > 0 else 0.0,
    }
    for key in ("mean_token_accuracy", "rewards/accuracies", "rewards/margins"):
        if history and key in history[-1]:
            summary[key] = float(history[-1][key])
    validated = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    summary |= {"eval_loss": float(validated[-1])} if validated else {}
    step = final_step(_answering(trainer))
    answered = [record for record in trainer.state.log_history if EXACT in record and record["step"] == step]
    summary |= {"answers/exact": float(answered[-1][EXACT])} if answered else {}
    return {**summary, **({"best_step": step} if _answering(trainer).keeps_best else {})}
