"""TRL's DPOTrainer for batches of unequal numbers of pairs, with the reference's log-probabilities from a cache.

Tensor legend: B rows of a batch, chosen then rejected, so B/2 pairs; T tokens; n positions with a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from hymba_align.progress import Display
from hymba_align.terminal import print_words
from hymba_align.train.preference_rows import (
    IDS,
    LENGTH,
    PairCollator,
    PreferenceRows,
    RowsReport,
    TokenBalance,
    best_fit_rows,
    pair_tokens,
)
from hymba_align.train.reference import Logps, model_code_digest, pairs_digest, reference_logps, weights_digest
from hymba_align.train.trainer import StageTrainer
from hymba_align.train.validation import ValidatesEveryRow

NOT_SCORED = -100  # the label that TRL gives to prompts and padding
OF_PAIRS = ("rewards/", "logps/")
"""Beginnings of the metrics that TRL averages over pairs; the others it averages over tokens."""


class HymbaDPOTrainer(ValidatesEveryRow, StageTrainer, DPOTrainer):
    """TRL's trainer, except for what weight decay spares and the following.

    - The loss of an optimizer step is the mean over its pairs, however many each process has and each batch holds. TRL
      takes the mean of the batches' means, and gathers metrics in a way that needs equal numbers. (Losses that are
      not per pair, `IN_BATCH_LOSSES`, are means of the batches' losses weighted by pairs.)
    - `train_sampling_strategy: batch_rebalance` balances the tokens that are computed, not those of padded rows.
    - Reference log-probabilities come from a cache that is keyed by content (reference.py).
    - The language-model head runs where there is a label, on every device (the reference's beside training too, where
      the trainer is given a `ScoresLabels` as its `ref_model`).
    """

    loss_is_scaled_for_ga = True  # by `compute_loss`

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Pairs of an optimizer step, over all its batches and all processes."""
        pairs = sum(map(counted_pairs, batch_samples))
        total: Tensor = self.accelerator.gather(torch.tensor([pairs], device=device)).sum()
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean over pairs; without `num_items_in_batch` the batch's own mean.

        Times the number of processes, because gradients are averaged over them.
        """
        loss = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None:
            return loss
        assert not return_outputs, "training asks for the loss alone"
        share = counted_pairs(inputs) * self.accelerator.num_processes / num_items_in_batch
        return loss * share

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self._policy.training else "eval"
        own = counted_pairs(inputs)
        counts = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).tolist()
        self._metrics[mode]["pairs"].append(sum(counts))  # weights for `log`, which takes them out again
        with self._gathering(counts):
            loss = super()._compute_loss(ScoresLabels(model), inputs, return_outputs)
        # Some losses are no number where nothing is scored.
        return loss if own else torch.nan_to_num(loss)

    def leave_out(self, batch: dict[str, Any]) -> None:
        """Takes the completions out, so that nothing is scored and no pair is left to count."""
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])

    @contextlib.contextmanager
    def _gathering(self, counts: list[int]) -> Iterator[None]:
        """While TRL computes a loss with so many pairs in each process; nothing differs where all have as many.

        `_compute_loss` gathers in the middle of its 300 lines, so what it gathers with is all that can be exchanged.
        """
        if len(set(counts)) == 1:
            yield
            return
        accelerator = self.accelerator
        self.accelerator = UnequalGather(accelerator, counts)
        try:
            yield
        finally:
            self.accelerator = accelerator

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the means over pairs weighted by how many pairs a batch has."""
        metrics = self._metrics["train" if self._policy.training else "eval"]
        pairs = metrics.pop("pairs", [])
        for key, values in metrics.items():
            if key.startswith(OF_PAIRS):
                weighted = sum(value * weight for value, weight in zip(values, pairs, strict=True))
                metrics[key] = [weighted / sum(pairs)]
        super().log(logs, start_time)

    def validation_weight(self, inputs: dict[str, Any]) -> float:
        """Pairs of a batch."""
        return float(len(inputs["input_ids"]) // 2)

    # ---- rows and batches --------------------------------------------------------------------------------------------

    def pack_rows(self, row_tokens: int) -> RowsReport:
        """Puts several pairs into each row of the training data; `per_device_train_batch_size` then counts rows."""
        lengths = pair_tokens(self.train_dataset, share_prefix=self._collator.share_prefix)
        rows = best_fit_rows(lengths, row_tokens)
        self.train_dataset = PreferenceRows(self.train_dataset, rows)
        return RowsReport.of(rows, lengths, row_tokens)

    def add_lengths(self) -> None:
        """Gives the pairs the column by which transformers' samplers balance batches, and processes."""
        self.train_dataset = self._with_lengths(self.train_dataset)
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_lengths(self.eval_dataset)

    def _with_lengths(self, pairs: Any) -> Dataset:
        assert isinstance(pairs, Dataset), "pairs are read before training"
        return pairs.add_column(LENGTH, np.array(pair_tokens(pairs, share_prefix=self._collator.share_prefix)))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Transformers', but `batch_rebalance` balances tokens."""
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.train_sampling_strategy != "batch_rebalance":
            return sampler
        assert isinstance(sampler, BatchRebalanceSampler), "pairs have a length"
        return TokenBalance.like(sampler, self.args.seed)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps that column: transformers removes those that the collator does not need before it samples."""
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        self._signature_columns = [*kept, *({LENGTH} - set(kept))]  # type: ignore[assignment]  # declared None

    # ---- the reference -----------------------------------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The pairs with the columns that TRL's loss reads, `ref_chosen_logps` and `ref_rejected_logps`."""
        is_main = self.accelerator.is_main_process
        weights = weights_digest(self.ref_model or self._policy)  # by every process; see there
        key = self._reference_key(dataset, weights) if is_main else {}
        logps, told = reference_logps(
            key, len(dataset), lambda: self._reference_logps(dataset, name, batch_size), is_main=is_main
        )
        if is_main:
            print_words(f"reference log-probabilities: {told}")
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), logps.T, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _reference_key(self, dataset: Dataset, weights: str) -> dict[str, Any]:
        """Everything that the reference's log-probabilities depend on."""
        model = self.accelerator.unwrap_model(self.ref_model or self._policy)
        config = {name: value for name, value in model.config.to_dict().items() if name not in CONFIG_NAMES}
        return {
            "what": "reference log-probabilities",
            "pairs": pairs_digest(dataset),
            "chat_template": str(getattr(self.processing_class, "chat_template", None)),
            "weights": weights,
            "config": repr(sorted(config.items())),
            "code": model_code_digest(),
            "truncation": [self._collator.max_length, self._collator.truncation_mode],
            "ld_alpha": self.ld_alpha,
            "arithmetic": [str(self.accelerator.mixed_precision), self.accelerator.device.type],
        }

    def _reference_logps(self, dataset: Dataset, name: str, batch_size: int) -> Logps:
        """(N, 2) sums of log-probabilities of chosen and rejected; all processes take part, and all get them."""
        batches = self._reference_batches(dataset, batch_size)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = batches[rank::processes]
        passes = -(-len(batches) // processes)  # as many in every process, because divided weights take all of them
        model, pairs = self._reference_model(), dataset.select_columns(list(IDS))
        found: list[tuple[list[int], Logps]] = []
        display = Display(f"DPO reference of {name}", passes, unit="batches", shown=rank == 0, is_part=True)
        with display:
            for number in range(passes):
                batch = mine[number] if number < len(mine) else batches[0]
                columns = pairs[batch]
                examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                inputs = self._prepare_inputs(self._collator(examples))
                logps = torch.stack(self.compute_ref_log_probs(ScoresLabels(model), inputs), dim=1)
                if number < len(mine):
                    found.append((batch, logps.float().cpu().numpy()))
                display.advance(number + 1)
                display.tell()
        together = np.full((len(dataset), 2), np.nan, dtype=np.float32)
        for batch, values in gather_object(found):
            together[batch] = values
        return together

    def _reference_batches(self, dataset: Dataset, batch_size: int) -> list[list[int]]:
        """Indices of the pairs of each batch, similar lengths together; neighbours take about as long as each other."""
        lengths = pair_tokens(dataset, share_prefix=self._collator.share_prefix)
        if self._collator.row_tokens is not None:
            # As many rows at a time as training takes. TRL counts pairs here for validation, which has no rows.
            assert isinstance(self.args, DPOConfig)
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
            rows = best_fit_rows(lengths, self._collator.row_tokens)
            return [list(chain(*rows[first : first + batch_size])) for first in range(0, len(rows), batch_size)]
        longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return [longest_first[first : first + batch_size] for first in range(0, len(lengths), batch_size)]

    def _reference_model(self) -> nn.Module:
        """The reference as it can run before training, as TRL 1.16's `_precompute_ref_logps` finds it."""
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self.ref_model or self._policy
        # Not prepared before `train`: an inference engine puts parameters in place and ZeRO-3's parts together.
        engine: nn.Module = self._precompute_engine or prepare_deepspeed(self._policy, self.accelerator)
        self._precompute_engine = engine  # type: ignore[assignment]  # TRL declares None
        return engine

    @property
    def _policy(self) -> nn.Module:
        assert isinstance(self.model, nn.Module), "transformers' Trainer was given a model"
        return self.model

    @property
    def _collator(self) -> PairCollator:
        assert isinstance(self.data_collator, PairCollator), "this trainer takes its batches from a PairCollator"
        return self.data_collator


def counted_pairs(batch: Mapping[str, Any]) -> int:
    """Pairs of a batch; 0 where nothing of it is scored (`leave_out`)."""
    return len(batch["input_ids"]) // 2 if bool(batch["completion_mask"].any()) else 0


CONFIG_NAMES = frozenset({"_name_or_path", "transformers_version", "architectures", "auto_map", "use_cache"})
"""Keys of a configuration that say what it is called, or how it is saved and decoded, and change no log-probability."""


class ScoresLabels:
    """A model as TRL's loss calls it, which computes logits for labelled positions alone.

    TRL does so by itself on devices that Triton runs on, and scores every position elsewhere. The outputs per token keep
    TRL's shape (B, T - 1), with zeros where there is no label.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return self.model(**inputs)
        labelled = labels[:, 1:] != NOT_SCORED
        positions = F.pad(labelled, (0, 1)).flatten().nonzero().flatten()  # (n,) of the flattened (B, T) batch
        outputs = self.model(**inputs, positions_to_keep=positions, shift_labels=labels[:, 1:][labelled][None])
        assert isinstance(outputs, Mapping), "TRL's fused head returns a ModelOutput"
        in_place = {
            name: _in_place(value, labelled) if value is not None and value.shape == (1, len(positions)) else value
            for name, value in outputs.items()
        }
        return type(outputs)(**in_place)


def _in_place(values: Tensor, labelled: Tensor) -> Tensor:
    """(1, n) values of labelled positions as (B, T - 1), zero elsewhere."""
    return values.new_zeros(labelled.shape).masked_scatter(labelled, values)


class UnequalGather:
    """An accelerator whose `gather` takes as many values from each process as it has pairs; the rest is accelerate's.

    TRL 1.16 gathers rewards and log-probabilities of a batch's pairs with it, and everything else, which is one number
    per process, with `gather_for_metrics`. Accelerate's own `gather` needs equal numbers everywhere.
    """

    def __init__(self, accelerator: Accelerator, counts: list[int]) -> None:
        self._accelerator, self._counts = accelerator, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, values: Tensor) -> Tensor:
        """Values (own pairs,) of all processes in order."""
        own, most = self._counts[self._accelerator.process_index], max(self._counts)
        assert own == 0 or values.shape == (own,), (
            f"TRL gathers {tuple(values.shape)} where this process has {own} pairs"
        )
        padded = F.pad(values[:own], (0, most - own))
        parts = self._accelerator.gather(padded).split(most)
        return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])
