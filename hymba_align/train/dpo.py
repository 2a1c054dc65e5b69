"""Direct preference optimisation: TRL's DPOTrainer, with each pair's prompt computed once.

Tensor legend: B rows, chosen then rejected, so B/2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from hymba_align.recipe import DPOSection, Recipe
from hymba_align.train.common import (
    SparesRecurrence,
    load_start,
    load_start_tokenizer,
    prepare_once,
    quiet_libraries,
    record_data,
    run_stage,
    stage_callbacks,
)
from hymba_align.train.settings import settings_refused_by_trl, stage_section, trainer_arguments

if TYPE_CHECKING:
    from hymba_align.data.prepare import Prepared


class HymbaDPOTrainer(SparesRecurrence, DPOTrainer):
    """TRL's trainer as it is, except for which parameters weight decay spares."""


@dataclass
class SharedPrefixCollator(DataCollatorForPreference):
    """TRL's preference batch plus `shared_prefix_lengths` (B/2,) int64.

    Rows i and i + B/2 begin with that many equal tokens, the pair's prompt. The model reads the key and computes them
    once; TRL passes it on to the model, also for the reference log-probabilities. The tensor has half as many rows as
    the rest of the batch: processes build their own batches, so accelerate never slices it (`dispatch_batches`, which
    would, is refused because it separates chosen from rejected in the first place).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        lengths = [self.shared_length(example) for example in examples]
        batch["shared_prefix_lengths"] = torch.tensor(lengths, dtype=torch.long)
        return batch

    def shared_length(self, example: dict[str, Any]) -> int:
        """Prompt tokens that both rows still start with after truncation."""
        prompt = len(example["prompt_ids"])
        if self.max_length is None:
            return prompt
        if self.truncation_mode == "keep_start":
            return min(prompt, self.max_length)
        cut_chosen, cut_rejected = (
            max(0, prompt + len(example[key]) - self.max_length) for key in ("chosen_ids", "rejected_ids")
        )
        return max(0, prompt - cut_chosen) if cut_chosen == cut_rejected else 0


@quiet_libraries()
def train_dpo(recipe: Recipe, start: str | Path | None, stage_dir: Path) -> dict[str, float]:
    """Summary metrics of the stage; weights and tokenizer are in `stage_dir/final`, checkpoints beside it.

    The reference model is the starting point itself, so its log-probabilities are computed once, before training.

    Args:
        start: checkpoint to start from; None for the recipe's base section.
    Raises:
        UsageError: settings, data or a checkpoint that cannot be used.
        HymbaAlignError: the loss is no longer finite.
    """
    from hymba_align.data.prepare import prepare_preferences

    section = stage_section(recipe, "dpo")
    assert isinstance(section, DPOSection)
    data = recipe.data_for("dpo")
    stage_dir.mkdir(parents=True, exist_ok=True)
    arguments = trainer_arguments(recipe, "dpo", DPOConfig, stage_dir)
    tokenizer = load_start_tokenizer(recipe, start)
    prepared = prepare_once(
        lambda: prepare_preferences(data, tokenizer, section.max_length, seed=recipe.seed), stage_dir, arguments
    )
    assert not isinstance(arguments.pad_to_multiple_of, str), "DPOConfig resolves 'auto'"
    collator = SharedPrefixCollator(
        pad_token_id=tokenizer.pad_token_id,
        max_length=arguments.max_length,
        truncation_mode=arguments.truncation_mode,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
    )
    with settings_refused_by_trl("dpo"):
        trainer = HymbaDPOTrainer(
            model=load_start(recipe, start, tokenizer),
            ref_model=None if arguments.precompute_ref_log_probs else load_start(recipe, start, tokenizer),
            args=arguments,
            data_collator=collator if section.share_prefix else None,
            train_dataset=prepared.dataset.remove_columns("place"),
            eval_dataset=prepared.validation.remove_columns("place") if prepared.validation is not None else None,
            processing_class=tokenizer,
            callbacks=stage_callbacks("dpo", stage_dir),
        )
    check_nothing_lost(prepared, trainer.train_dataset, section.max_length)
    if arguments.process_index == 0:
        record_data(stage_dir, prepared, None)
    return run_stage(trainer, stage_dir)


def check_nothing_lost(prepared: Prepared, rows: Dataset, max_length: int) -> None:
    """Asserts that TRL tokenized the pairs as preparation counted them, and that it will truncate none."""
    prompts, chosen, rejected = (
        pc.list_value_length(rows.with_format("arrow")[:][f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")
    )
    longest = pc.max(pc.add(prompts, pc.max_element_wise(chosen, rejected))).as_py()
    trained = pc.sum(chosen).as_py() + pc.sum(rejected).as_py()
    assert len(rows) == len(prepared.dataset), f"TRL kept {len(rows)} of {len(prepared.dataset)} pairs"
    assert longest <= max_length, f"a pair has {longest} tokens, above {max_length}"
    assert trained == prepared.trained_tokens, (
        f"TRL trains {trained} tokens where preparation counted {prepared.trained_tokens}"
    )
