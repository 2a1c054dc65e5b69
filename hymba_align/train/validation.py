"""Validation's loss as a mean over everything that is scored, whatever batches and processes share it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from hymba_align.train.batches import SharedBatches


class ValidatesEveryRow:
    """Mixin for a trainer: validation's loss is the mean over its labels or pairs, and no row counts twice.

    transformers takes the mean of the batches' means, and accelerate repeats rows until every process has as many full
    batches as the others. (Metrics other than the loss are TRL's: means over batches.)
    """

    _scored: list[tuple[float, float]]
    _repeated: int | None = None
    """Number of this process's batch that repeats a row"""

    @abstractmethod
    def validation_weight(self, inputs: dict[str, Any]) -> float:
        """How many labels or pairs the loss of a batch is the mean of."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """transformers' for one process; for several, batches that repeat no row."""
        trainer: Any = self
        if trainer.args.world_size == 1:
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        in_order = SequentialSampler(eval_dataset)
        batches = SharedBatches(
            in_order, trainer.args.eval_batch_size, trainer.args.world_size, trainer.args.process_index
        )
        self._repeated = len(batches) - 1 if batches.ends_with_repeat else None
        return batches

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL's, with the loss over all processes' labels or pairs."""
        trainer: Any = self
        self._scored = []
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        own = torch.tensor(self._scored, dtype=torch.float64).reshape(-1, 2).sum(0)
        summed, weight = trainer.accelerator.gather(own.to(trainer.args.device)[None]).sum(0).tolist()
        if f"{metric_key_prefix}_loss" in output.metrics and weight > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = summed / weight
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """TRL's, after which the batch's loss and weight are remembered."""
        weight = 0.0 if len(self._scored) == self._repeated else self.validation_weight(inputs)
        found: tuple[Tensor | None, Any, Any] = super().prediction_step(  # type: ignore[misc]
            model, inputs, prediction_loss_only, ignore_keys
        )
        # A batch without a label has a loss that is no number in some of TRL's losses.
        loss = float(found[0]) if found[0] is not None and weight > 0 else 0.0
        self._scored.append((loss * weight, weight))
        return found
