"""Supervised fine-tuning: TRL's SFTTrainer over packed rows, with loss on assistant tokens only."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hymba_align.recipe import Recipe
from hymba_align.train.common import (
    SparesRecurrence,
    load_start,
    load_start_tokenizer,
    prepare_once,
    quiet_libraries,
    run_stage,
    stage_callbacks,
)
from hymba_align.train.settings import settings_refused_by_trl, stage_section, trainer_arguments


class HymbaSFTTrainer(SparesRecurrence, SFTTrainer):
    """TRL's trainer as it is, except for which parameters weight decay spares."""


@quiet_libraries()
def train_sft(recipe: Recipe, start: str | Path | None, stage_dir: Path) -> dict[str, float]:
    """Summary metrics of the stage; weights and tokenizer are in `stage_dir/final`, checkpoints beside it.

    Args:
        start: checkpoint to start from; None for the recipe's base section.
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
        lambda: prepare_sft(data, tokenizer, section.max_length, seed=recipe.seed), stage_dir, arguments
    )
    with settings_refused_by_trl("sft"):
        # `assistant_only_loss` stays False: TRL demands messages for it, while for tokenized rows it always turns
        # the column `assistant_masks` into labels.
        trainer = HymbaSFTTrainer(
            model=load_start(recipe, start, tokenizer),
            args=arguments,
            train_dataset=prepared.dataset,
            processing_class=tokenizer,
            callbacks=stage_callbacks("sft", stage_dir),
        )
    check_nothing_lost(prepared.dataset, trainer.train_dataset)
    return run_stage(trainer, stage_dir)


def check_nothing_lost(conversations: Dataset, rows: Dataset) -> None:
    """Asserts that TRL's rows hold every token and train exactly those of the assistant.

    Packing by `bfd` truncates longer conversations without a word; preparation has dropped those, and counted them.
    """
    tokens, trained = _flat(conversations, "input_ids"), pc.sum(_flat(conversations, "assistant_masks")).as_py()
    labels = _flat(rows, "labels")
    labelled = pc.sum(pc.not_equal(labels, -100)).as_py()
    assert len(labels) == len(tokens), f"TRL kept {len(labels)} of {len(tokens)} tokens"
    assert labelled == trained, f"TRL trains {labelled} tokens where the template marks {trained}"


def _flat(dataset: Dataset, column: str) -> pa.ChunkedArray:
    return pc.list_flatten(dataset.with_format("arrow")[:][column])
