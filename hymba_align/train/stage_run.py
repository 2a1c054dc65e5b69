"""A stage's training from its last checkpoint to `final`, and a summary of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.recipe import Recipe, TrainingStage
from hymba_align.train.callbacks import DivergenceGuard, MetricsFile, Progress
from hymba_align.train.common import SHARED_DATASET
from hymba_align.train.settings import stage_section

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

FINAL = "final"


def stage_callbacks(stage: TrainingStage, stage_dir: Path) -> list[TrainerCallback]:
    """Record first, so that metrics.jsonl holds the step at which the guard stopped."""
    return [MetricsFile(stage_dir), Progress(stage), DivergenceGuard(stage)]


def last_complete_checkpoint(stage_dir: Path) -> Path | None:
    """The newest checkpoint-N that a run can resume from: its trainer_state.json, which is written last, can be read.

    One that ended within an epoch does not count: transformers 5.23 trains a step too many when it resumes there. Delete
    when it looks at `max_steps` before a step. A stage that has its `final` needs no resuming (`finished_state`).
    """
    for path in _checkpoints(stage_dir):
        state = _read_state(path)
        if state is not None and (state["global_step"] < state["max_steps"] or float(state["epoch"]).is_integer()):
            return path
    return None


def finished_state(stage_dir: Path) -> Path | None:
    """The trainer_state.json of the last step, where `final` exists too: everything is trained and saved."""
    for path in _checkpoints(stage_dir):
        state = _read_state(path)
        if state is not None and state["global_step"] >= state["max_steps"] and (stage_dir / FINAL).is_dir():
            return path / "trainer_state.json"
    return None


def _checkpoints(stage_dir: Path) -> list[Path]:
    """The folders checkpoint-N, newest first."""
    found = [path for path in stage_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What trainer_state.json holds; None where writing the checkpoint was interrupted."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return state


def run_stage(trainer: Trainer, stage_dir: Path) -> dict[str, float]:
    """Trains, resuming where an earlier run stopped, and writes `final`; what comes back are summary metrics.

    Checkpoints stay: until the caller has recorded that the stage is complete, they tell the next run what is done.
    """
    from transformers import PrinterCallback, TrainerState

    trainer.remove_callback(PrinterCallback)
    metrics = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MetricsFile))
    finished = finished_state(stage_dir)
    if finished is not None:
        trainer.state = TrainerState.load_from_json(str(finished))
        metrics.count_earlier_tokens(trainer.state)
        runtime_s = 0.0
    else:
        checkpoint = last_complete_checkpoint(stage_dir)
        if checkpoint is not None and trainer.is_world_process_zero():
            print(f"resuming from {checkpoint.name}", flush=True)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        save_final(trainer, stage_dir)
        runtime_s = float(result.metrics["train_runtime"])
    if trainer.is_world_process_zero():
        shutil.rmtree(stage_dir / SHARED_DATASET, ignore_errors=True)
        (stage_dir / "README.md").unlink(missing_ok=True)  # TRL's model card of a checkpoint
    return summarise(trainer, metrics, runtime_s)


def remove_checkpoints(recipe: Recipe, stage: TrainingStage, stage_dir: Path) -> None:
    """Removes a complete stage's checkpoints, unless the recipe says how many to keep (`save_total_limit`)."""
    if "save_total_limit" not in stage_section(recipe, stage).trainer:
        for folder in stage_dir.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)


def save_final(trainer: Trainer, stage_dir: Path) -> None:
    """Writes weights, tokenizer and generation configuration to `final` under a temporary name, then renames it."""
    temporary, final = stage_dir / f".{FINAL}.tmp", stage_dir / FINAL
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))  # every process takes part: ZeRO-3 and FSDP gather the weights here
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    trainer.accelerator.wait_for_everyone()


def summarise(trainer: Trainer, metrics: MetricsFile, runtime_s: float) -> dict[str, float]:
    """Summary of a finished stage: losses and tokens over all its steps, those of earlier sessions included.

    `runtime_s` and `tokens_per_second` are of this session alone; tokens are those of all processes.
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
        "tokens_per_second": (metrics.tokens - metrics.tokens_before) / runtime_s if runtime_s > 0 else 0.0,
    }
    for key in ("mean_token_accuracy", "rewards/accuracies", "rewards/margins"):
        if history and key in history[-1]:
            summary[key] = float(history[-1][key])
    validated = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    return {**summary, **({"eval_loss": float(validated[-1])} if validated else {})}
