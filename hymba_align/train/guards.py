"""What happens when a loss or a gradient is not finite: the optimizer never applies it, and the rows are named.

A batch is judged once per optimizer step, by the norm of its gradient: it is one number for all processes and all
micro-batches, every engine computes it anyway, and a loss that is not finite is made to spoil it. So no process decides
alone, and the device is waited for once per step. DeepSpeed has judged by then: it drops such a step by itself, without
a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hymba_align import progress
from hymba_align.data.packing import PLACE, PLACES
from hymba_align.errors import DivergedError, OutOfMemoryError
from hymba_align.recipe import GuardSection, TrainingStage
from hymba_align.run.metrics import append_metrics
from hymba_align.train.bad_batches import (
    BAD_BATCH,
    BadBatches,
    count,
    first_of,
    number_or_word,
    rows_of,
    what_is_wrong,
)
from hymba_align.train.out_of_memory import describe, is_out_of_memory
from hymba_align.train.random_states import random_states, set_random_states
from hymba_align.train.spikes import SpikeWatch

if TYPE_CHECKING:
    from transformers import Trainer

    Base = Trainer
else:
    Base = object


@dataclass
class Step:
    """An optimizer step in the making: what its batches are, and what to go back to if it must not count."""

    rows: list[list[str]]
    """Places of the rows of each of this process's micro-batches."""
    losses: list[Tensor] = field(default_factory=list)
    """Scalars on the device: each micro-batch's loss as it was computed."""
    shares: list[Tensor] = field(default_factory=list)
    """The same as training counts them, in parts of the step's mean times the number of processes."""
    random_states: dict[str, Any] = field(default_factory=dict)
    loss_before: Tensor | None = None
    metrics_before: dict[str, int] = field(default_factory=dict)


class GuardsBatches(Base):
    """Mixin for a trainer: no batch whose loss or gradient is not finite reaches the weights.

    It stops training, after naming the rows in bad_batch.json and saving the weights from before, or leaves the batch
    out. Then weights and the optimizer's state stay as they are, the learning rate goes on as a function of the step's
    number, and neither losses nor metrics count the batch. Does nothing before `guard_against` was called.
    """

    _guard: GuardSection | None = None
    _stage: TrainingStage
    _bad: BadBatches
    _step: Step
    _judging = False  # whether a micro-batch is being trained on, rather than validated

    def guard_against(self, section: GuardSection, stage: TrainingStage, stage_dir: Path) -> None:
        """Guards the stage's training as its recipe says."""
        self._guard, self._stage = section, stage
        self._bad, self._step = BadBatches(stage_dir / BAD_BATCH), Step([])
        self.add_callback(SpikeWatch(section, stage, stage_dir))

    def train(self, *given: Any, **named: Any) -> Any:
        """Trains. Raises: HymbaAlignError with settings that would fit, when memory runs out."""
        try:
            return super().train(*given, **named)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if self._guard is None or not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(describe(self, self._stage, error)) from error

    # ---- what a step consists of -------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the rows' places, which transformers would remove because no model takes them."""
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        self._signature_columns = [*kept, *(name for name in (PLACE, PLACES) if name not in kept)]  # type: ignore[assignment]  # declared None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._guard is not None:
            self._bad = BadBatches.until(self._bad.path, self.state.global_step)
            if self.is_world_process_zero():
                self._bad.write()
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Transformers', with the rows' places taken out: the model takes none."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = Step([list(batch.pop(PLACES, ())) for batch in batches])
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The micro-batch's loss, after its backward pass."""
        if self._guard is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._step.losses:  # here and not earlier: a resumed run sets its random state after it has read a batch
            self._step.random_states = random_states()
            self._step.loss_before = self._tr_loss.clone()
            self._step.metrics_before = {key: len(values) for key, values in self._train_metrics.items()}
        self._judging = True
        try:
            share = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._judging = False
        self._step.shares.append(share)
        return share

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss; while training, one that is not finite becomes one whose gradients are not finite either."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._judging:
            return loss
        assert isinstance(loss, Tensor), "training asks for the loss alone"
        self._step.losses.append(loss.detach())
        one = torch.ones_like(loss)
        return loss * torch.where(torch.isfinite(loss.detach()), one, one * math.nan)

    @property
    def _train_metrics(self) -> dict[str, list[float]]:
        """TRL's metrics of the batches since the last log event."""
        return self._metrics["train"]  # type: ignore[attr-defined]

    # ---- judging it --------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; None for a step that is left out. Raises: HymbaAlignError when training must stop.

        Transformers calls this right before the optimizer's step, once the gradients of all micro-batches and processes
        are together.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._guard is None or norm is None:
            return norm
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if self.args.fp16:  # its loss scaler expects overflowing gradients, so the losses are asked
            if not self._anywhere(not all(torch.isfinite(torch.stack(self._step.losses)).tolist())):
                return norm
        elif math.isfinite(size) and size >= 0:
            return norm
        self._refuse_step(model, size)
        return None

    def _anywhere(self, here: bool) -> bool:
        """Whether it holds in any process."""
        flag = torch.tensor([float(here)], device=self.accelerator.device)
        total: Tensor = self.accelerator.reduce(flag, reduction="sum")
        return bool(total.item())

    def _refuse_step(self, model: nn.Module, norm: float) -> None:
        """Leaves the step out, or raises after saving what came before it."""
        assert self._guard is not None
        record = self._describe(norm)
        # DeepSpeed has dropped the step already, and float16's loss scaler is about to.
        dropped_by_engine = self.is_deepspeed_enabled or self.args.fp16
        applied = self.is_deepspeed_enabled and not self.accelerator.optimizer_step_was_skipped
        if not dropped_by_engine:
            model.zero_grad()  # to None: optimizers pass over parameters that have no gradient
        self._forget_step()
        if self._guard.on_nonfinite == "skip" and not applied and len(self._bad.skipped) < self._guard.max_skipped:
            if dropped_by_engine:  # for then transformers leaves the schedule where it is
                schedule: Any = self.lr_scheduler
                getattr(schedule, "scheduler", schedule).step()
            self._record_skip(record)
            return
        record["checkpoint"] = None if applied else self._save_before(model)
        if record["checkpoint"] is None:
            record["checkpoint"] = self._last_checkpoint()
        self._bad.stopped = record
        if self.is_world_process_zero():
            self._bad.write()
        raise DivergedError(self._message(record))

    def _describe(self, norm: float) -> dict[str, Any]:
        """The record of the step: losses and rows of all its micro-batches, in all processes."""
        from accelerate.utils import gather_object

        losses, shares = torch.stack(self._step.losses), torch.stack(self._step.shares)
        values = torch.where(torch.isfinite(losses), shares / self.accelerator.num_processes, losses).float().tolist()
        batches = gather_object(
            [
                {
                    "process": self.accelerator.process_index,
                    "micro_batch": number,
                    "finite": math.isfinite(value),
                    "loss": number_or_word(value),
                    "rows": rows,
                }
                for number, (value, rows) in enumerate(zip(values, self._step.rows, strict=True))
            ]
        )
        return {
            "step": self.state.global_step + 1,
            "loss": number_or_word(sum(float(batch["loss"]) for batch in batches)),
            "gradient_norm": number_or_word(norm),
            "learning_rate": self._get_learning_rate(),
            "batches": batches,
        }

    def _forget_step(self) -> None:
        """Takes the step's losses and metrics out of what is averaged until the next log event."""
        assert self._step.loss_before is not None
        self._tr_loss.copy_(self._step.loss_before)
        metrics = self._train_metrics
        for key in list(metrics):
            before = self._step.metrics_before.get(key, 0)
            if before:
                del metrics[key][before:]
            else:
                del metrics[key]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves, unless weights or moments are not finite, as after a failure of the hardware."""
        if self._guard is not None and self._anywhere(not state_is_finite(model, self.optimizer)):
            kept = self._last_checkpoint()
            raise DivergedError(
                f"{self._stage} stopped at step {self.state.global_step}: weights or optimizer state are no longer finite, "
                f"although every loss and gradient was, so nothing was saved; run again to continue from {kept or 'the start'}, "
                f"and if it happens again lower {self._stage}.trainer.learning_rate, which is {self.args.learning_rate:g}, "
                "or suspect the machine's memory"
            )
        super()._save_checkpoint(model, trial)

    # ---- leaving it out ----------------------------------------------------------------------------------------------

    def _record_skip(self, record: dict[str, Any]) -> None:
        assert self._guard is not None
        self._globalstep_last_logged += 1  # the mean that is logged next is over one step less
        self._bad.skipped.append(record)
        if not self.is_world_process_zero():
            return
        self._bad.write()
        rows = rows_of(record)
        told = (
            f"{self._stage}: left out the batch of step {record['step']}, {what_is_wrong(record)}; its {count(rows)} "
            f"({first_of(rows)}) are in {BAD_BATCH}, {len(self._bad.skipped)} of at most {self._guard.max_skipped} batches"
        )
        progress.say(told)
        append_metrics(self._bad.path.parent, {"step": record["step"], "skipped_rows": rows, "warning": told})

    # ---- stopping ----------------------------------------------------------------------------------------------------

    def _save_before(self, model: nn.Module) -> str | None:
        """The name of a checkpoint of the weights before the step, saved now if need be; None if they are not finite.

        As `control.should_save` does it, with the random state that a run which resumes there must have.
        """
        step = self.state.global_step
        if step == 0 or self._anywhere(not state_is_finite(model, self.optimizer)):
            return None
        name = f"checkpoint-{step}"
        last = self._last_checkpoint()
        if last == name:
            return name
        set_random_states(self._step.random_states)
        self.control.should_log = self.control.should_save = True
        self.control.should_evaluate = False
        self._maybe_log_save_evaluate(self._tr_loss, None, model, None, float(self.state.epoch or 0), None, None)  # type: ignore[arg-type]  # no start, no speed
        return name

    def _last_checkpoint(self) -> str | None:
        """The newest whole checkpoint's name, as the main process sees it."""
        from accelerate.utils import broadcast_object_list

        from hymba_align.train.saving import last_good_checkpoint

        found = last_good_checkpoint(self._bad.path.parent) if self.is_world_process_zero() else None
        name: list[str | None] = [found.name if found is not None else None]
        broadcast_object_list(name)
        return name[0]

    def _message(self, record: dict[str, Any]) -> str:
        """What went wrong, where, and what to do."""
        assert self._guard is not None
        rows, stage, step = rows_of(record, only_bad=True), self._stage, record["step"]
        what = f"{stage} stopped before step {step}, {what_is_wrong(record)}"
        exhausted = self._guard.on_nonfinite == "skip" and len(self._bad.skipped) >= self._guard.max_skipped
        if exhausted:
            what += f", after {len(self._bad.skipped)} batches were left out ({stage}.guard.max_skipped)"
        where = (
            f"the batch has {first_of(rows)}; {self._bad.path} names all its rows" if rows else f"see {self._bad.path}"
        )
        if step == 1:
            return (
                f"{what}; {where}; no update came before it, so the starting weights or these rows are at fault: check "
                f"base, or the stage before, and the rows"
            )
        kept = record["checkpoint"]
        saved = f"the weights before it are in {kept}" if kept else "no checkpoint has finite weights"
        leave_out = ""
        if exhausted:
            leave_out = f", or set {stage}.guard.max_skipped higher to leave more batches out"
        elif self._guard.on_nonfinite == "stop":
            leave_out = f", or set {stage}.guard.on_nonfinite=skip to leave such batches out"
        return (
            f"{what}; {where}; {saved}; correct or remove the rows, or lower {stage}.trainer.learning_rate, which is "
            f"{self.args.learning_rate:g}{leave_out}, and run again"
        )


def state_is_finite(model: nn.Module, optimizer: Any) -> bool:
    """Whether this process's part of weights and optimizer state holds no NaN and no infinity."""
    tensors: list[Tensor] = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    for values in getattr(optimizer, "state", {}).values():
        tensors += [value for value in values.values() if isinstance(value, Tensor)]
    return all(
        bool(torch.isfinite(local).all())
        for tensor in tensors
        for local in (tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach(),)
        if local.is_floating_point()
    )
