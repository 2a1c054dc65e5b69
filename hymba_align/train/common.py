"""What both training stages share: starting point, data across processes, the run and its output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hymba_align.errors import RecipeError
from hymba_align.recipe import Recipe, TrainingStage
from hymba_align.train.callbacks import DivergenceGuard, MetricsFile, Progress
from hymba_align.train.settings import stage_section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    from hymba_align.data.packing import PackingReport
    from hymba_align.data.prepare import Prepared
    from hymba_align.train.preference_rows import RowsReport

FINAL = "final"
DATA_RECORD = "data.json"
SHARED_DATASET = "dataset"

# Parameters that weight decay must spare besides norms and biases, which transformers spares by itself:
# decaying A_log or D pulls the recurrence towards one fixed time scale, and meta tokens are learned activations.
NO_DECAY = re.compile(r"(^|\.)(A_log|D)\.\d+$|(^|\.)memory_tokens$")


class SparesRecurrence:
    """Mixin for a trainer: the SSM's A_log and D and the meta tokens get no weight decay.

    A subclass of the trainer and not an optimizer of our own, because transformers refuses ready-made optimizers under
    DeepSpeed and FSDP, and `DPOTrainer` takes no `optimizer_cls_and_kwargs`.
    """

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that decay."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not NO_DECAY.search(name)]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the terminal for what matters: no bar per file that is read or written, no warning meant for TRL."""
    import datasets
    from transformers.utils import logging as transformers_logging

    terminal = sys.stderr.isatty()
    bars, maps = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not terminal:
        datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    try:
        with warnings.catch_warnings():
            # TRL 1.16 reads the old name; delete when it reads `is_activation_checkpointing`.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # DeepSpeed 0.19 calls torch's collectives by their old names, at every step.
            warnings.filterwarnings(
                "ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning
            )
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if maps and not terminal:
            datasets.enable_progress_bars()


# ---- starting point and data ----------------------------------------------------------------------------------------


def load_start(recipe: Recipe, start: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that a stage starts from, with the tokenizer's special tokens in its configurations."""
    from hymba_align.checkpoint import build_base, load_model

    if start is None:
        model = build_base(recipe.base, tokenizer, recipe.seed)
    else:
        model = load_model(str(start), dtype=recipe.base.dtype)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.use_cache = True  # the released file says false, which makes decoding quadratic
    return model


def load_start_tokenizer(recipe: Recipe, start: str | Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the starting checkpoint, or the base section's."""
    from hymba_align.data.template import load_tokenizer

    if start is not None:
        return load_tokenizer(str(start), chat_template=recipe.base.chat_template)
    path = recipe.base.tokenizer or recipe.base.model
    if path is None:
        raise RecipeError("base.tokenizer is missing; give the folder or hub id of a tokenizer beside base.config")
    revision = recipe.base.revision if path == recipe.base.model else None
    return load_tokenizer(path, revision=revision, chat_template=recipe.base.chat_template)


def prepare_once(
    prepare: Callable[[], Prepared], stage_dir: Path, arguments: SFTConfig | DPOConfig, *, streaming: bool = False
) -> Prepared:
    """The prepared data, made by one process and read from `stage_dir` by the others; a stream is each process's own.

    Read from disk, so that every process sees one fingerprint: TRL's and our own `map` calls keep their results in files
    beside the data, and data in memory would send each process to a temporary folder of its own.
    """
    from accelerate.utils import broadcast_object_list
    from datasets import load_from_disk

    from hymba_align.data.prepare import Prepared

    if arguments.world_size == 1 or streaming:
        prepared = prepare()
        if arguments.process_index == 0:
            print(prepared.summary(), flush=True)
        return prepared
    folder = stage_dir / SHARED_DATASET
    shared: list[Any] = [None]
    if arguments.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        prepared = prepare()
        print(prepared.summary(), flush=True)
        sides = {"dataset": prepared.dataset, "validation": prepared.validation}
        for name, side in sides.items():
            if side is not None:
                side.save_to_disk(folder / name)
        shared = [(prepared.sources, [name for name, side in sides.items() if side is not None])]
    broadcast_object_list(shared)
    sources, written = shared[0]
    read = {name: load_from_disk(folder / name) for name in written}
    return Prepared(read["dataset"], read.get("validation"), sources)


def record_data(
    stage_dir: Path, prepared: Prepared, packing: PackingReport | None = None, *, rows: RowsReport | None = None
) -> None:
    """Writes data.json, which says what became of every source's rows and how full packed rows are; prints the latter.

    `packing` is about rows of documents, `rows` about rows of pairs.

    Of a stream it says, and prints, what became of the rows that were read by now.
    """
    from hymba_align.checkpoint import write_json
    from hymba_align.data.counts import losses_by_reason

    sources = []
    for source in prepared.counted():
        counted = {key: value for key, value in vars(source).items() if key not in ("lost", "cut")}
        reasons = {reason: len(lost) for reason, lost in losses_by_reason(source.lost)}
        sources.append({**counted, "lost": reasons, "shortened": len(source.cut)})
    validation = len(prepared.validation) if prepared.validation is not None else 0
    report = {**vars(packing), "fill_rate": packing.fill_rate} if packing is not None else None
    record = {"sources": sources, "validation": validation, "packing": report}
    write_json(stage_dir / DATA_RECORD, {**record, "rows": vars(rows)} if rows is not None else record)
    for source in prepared.counted() if prepared.streams else ():
        print(f"{source.name}: {source.summary()}", flush=True)
    if packing is not None:
        print("packing: " + "; ".join(packing.lines()[:2]), flush=True)
    if rows is not None:
        print(rows.line(), flush=True)


# ---- the run --------------------------------------------------------------------------------------------------------


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


__all__ = [
    "SparesRecurrence",
    "last_complete_checkpoint",
    "load_start",
    "load_start_tokenizer",
    "prepare_once",
    "quiet_libraries",
    "record_data",
    "remove_checkpoints",
    "run_stage",
    "stage_callbacks",
]
