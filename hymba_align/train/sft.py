"""Supervised fine-tuning: TRL's SFTTrainer over packed rows, with loss on assistant tokens only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hymba_align.adapters import AdapterBase
from hymba_align.data.packing import NOT_TRAINED, add_labels, pack, packing_report
from hymba_align.recipe import Recipe
from hymba_align.train import adapting
from hymba_align.train.answers import generate_at_validation
from hymba_align.train.common import (
    check_planned,
    load_start,
    load_start_tokenizer,
    prepare_once,
    quiet_libraries,
    record_data,
)
from hymba_align.train.problems import Matcher
from hymba_align.train.row_places import NamesRows
from hymba_align.train.settings import settings_refused_by_trl, stage_section, trainer_arguments
from hymba_align.train.stage_run import run_stage, stage_callbacks
from hymba_align.train.trainer import StageTrainer
from hymba_align.train.validation import ValidatesEveryRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HymbaSFTTrainer(ValidatesEveryRow, StageTrainer, SFTTrainer):
    """TRL's trainer, except for which parameters weight decay spares, that only labelled positions get logits, and that
    validation's loss is a mean over labels.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's loss and metrics. The model hands its loss the hidden states of labelled positions alone.

        TRL leaves the others out by itself on devices that Triton runs on, and scores every position elsewhere.
        """
        if not return_outputs and self.label_smoother is None and self.compute_loss_func is None:
            inputs = {**inputs, **labelled_positions(inputs["labels"])}
        loss: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss

    def leave_out(self, batch: dict[str, Any]) -> None:
        """Takes the labels out."""
        batch["labels"] = torch.full_like(batch["labels"], NOT_TRAINED)

    def validation_weight(self, inputs: dict[str, Any]) -> float:
        """Labels that are predicted in a batch."""
        return float((inputs["labels"][:, 1:] != NOT_TRAINED).sum())


def labelled_positions(labels: Tensor) -> dict[str, Tensor]:
    """Which positions predict a label and what: `positions_to_keep` (n,) of the flattened batch, `shift_labels` (1, n).

    Args:
        labels: (B, T), -100 where nothing is trained on and at the start of every document.
    """
    labelled = labels[:, 1:] != NOT_TRAINED
    positions = F.pad(labelled, (0, 1)).flatten().nonzero().flatten()
    return {"positions_to_keep": positions, "shift_labels": labels[:, 1:][labelled][None]}


@quiet_libraries()
def train_sft(
    recipe: Recipe, start: str | Path | None, stage_dir: Path, matcher: Matcher | None = None
) -> dict[str, float]:
    """Summary metrics of the stage; weights and tokenizer are in `stage_dir/final`, checkpoints beside it.

    Args:
        start: checkpoint to start from; None for the recipe's base section.
        matcher: says which answers are right, where `sft.answers` asks for some.
    Raises:
        UsageError: settings, data or a checkpoint that cannot be used.
        HymbaAlignError: the loss is no longer finite.
    """
    from hymba_align.data.prepare import prepare_sft

    section = stage_section(recipe, "sft")
    data = recipe.data_for("sft")
    stage_dir.mkdir(parents=True, exist_ok=True)
    arguments = trainer_arguments(recipe, "sft", SFTConfig, stage_dir)
    tokenizer = load_start_tokenizer(recipe, start)
    prepared = prepare_once(
        lambda: prepare_sft(data, tokenizer, section.max_length, seed=recipe.seed),
        stage_dir,
        arguments,
        streaming=data.streaming,
    )
    if arguments.process_index == 0 and not data.streaming:
        check_planned(data, stage_dir)
    to_rows = partial(training_rows, max_length=section.max_length, packing=bool(arguments.packing))
    with arguments.main_process_first(desc="packing"):  # the others find its result in the cache
        rows = to_rows(prepared.dataset)
        validation = prepared.validation.remove_columns("place") if prepared.validation is not None else None
        validation_rows = to_rows(validation) if validation is not None else None
    trainer = _build_trainer(recipe, start, stage_dir, arguments, tokenizer, rows, validation_rows)
    generate_at_validation(trainer, recipe, "sft", stage_dir, prepared, matcher)
    if not data.streaming:
        check_nothing_lost(prepared.dataset, rows)
    if arguments.process_index == 0 and not data.streaming:
        model = trainer.accelerator.unwrap_model(trainer.model)
        meta_tokens = model.config.num_memory_tokens
        report = packing_report(rows["seq_lengths"], section.max_length, meta_tokens) if arguments.packing else None
        record_data(stage_dir, prepared, report)
    metrics = run_stage(trainer, stage_dir)
    if data.streaming and arguments.process_index == 0:
        record_data(stage_dir, prepared, None)
    return metrics


def _build_trainer(
    recipe: Recipe,
    start: str | Path | None,
    stage_dir: Path,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    validation_rows: Dataset | None,
) -> HymbaSFTTrainer:
    """The trainer over the rows, guarded, whose batches say where their rows were read."""
    model = load_start(recipe, start, tokenizer)
    adapters, quantisation = adapting.begin(recipe, "sft", model)
    with settings_refused_by_trl("sft"):
        trainer = HymbaSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            callbacks=stage_callbacks(recipe, "sft", stage_dir, arguments),
            peft_config=adapters,
        )
    if adapters is not None:
        trainer.adapts(AdapterBase.of(recipe, start, stage_dir), quantisation)
    trainer.data_collator = NamesRows(trainer.data_collator)
    trainer.guard_against(stage_section(recipe, "sft").guard, "sft", stage_dir)
    trainer.trains_as(recipe, stage_dir)
    return trainer


def training_rows(dataset: Dataset, *, max_length: int, packing: bool) -> Dataset:
    """The rows that TRL's collator takes: `input_ids`, `labels` and, where conversations are packed, `seq_lengths`.

    Beside these, where each conversation was read: `place`, or the `places` of those that a row holds.

    They are packed here and not by TRL, which packs 1,000 at a time and leaves more room empty.
    """
    return pack(dataset, max_length) if packing else add_labels(dataset)


def check_nothing_lost(conversations: Dataset, rows: Dataset) -> None:
    """Asserts that the trainer's rows hold every token and train exactly those that the mask marks."""
    (tokens, trained), (left, labelled) = _count(conversations, "assistant_masks", 0), _count(rows, "labels", -100)
    assert left == tokens, f"{left} of {tokens} tokens are left"
    assert labelled == trained, f"{labelled} tokens are trained on where the template marks {trained}"


def _count(dataset: Dataset, column: str, untrained: int) -> tuple[int, int]:
    """Tokens of all rows, and how many of them have another value than `untrained` in `column`."""
    tokens = trained = 0
    for batch in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        values = pc.list_flatten(batch[column])
        tokens += len(values)
        trained += pc.sum(pc.not_equal(values, untrained)).as_py() or 0
    return tokens, trained
