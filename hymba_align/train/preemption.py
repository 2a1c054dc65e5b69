"""SIGTERM during training: a checkpoint of the last whole step, then exit code 75.

All processes agree, through a few bytes per forward and backward pass, so that a signal that reached one of them stops
all. Where a step takes long (many batches make one), the state after the last whole step is saved from within the next
one, whose gradients so far are thrown away.

transformers has `enable_jit_checkpoint`, which is not used: a signal counts after a timer of 3 s in each process by
itself, so processes may save at different steps, or one alone, which hangs in a collective; an evaluation that is due
at the end of an epoch runs before the process ends; training then ends as if it were complete, with exit code 0; and it
has no answer to a step that does not end in time. Delete this module when it has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_align.errors import Preempted
from hymba_align.processes import signals
from hymba_align.train.random_states import set_random_states


class Preemption(TrainerCallback):
    """Stops training after a checkpoint when any process received SIGTERM; comes first of the callbacks.

    `on_save` raises, so that nothing else runs once the checkpoint is complete.
    """

    trainer: Any  # a TRL trainer that is a GuardsBatches too, which no class of ours is both

    def __init__(self, stage: str, stage_dir: Path) -> None:
        self.stage, self.stage_dir = stage, stage_dir
        self.saved_step = 0
        self.is_stopping = False
        self.group: dist.ProcessGroup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved_step = state.global_step  # that of the checkpoint it resumes from
        if args.world_size > 1:
            # Of its own, over the CPU: on a GPU's group, asking would wait for the GPU at every step.
            self.group = dist.new_group(backend="gloo")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._agreed():
            return
        self._stop(control)
        if self.saved_step != state.global_step:
            trainer, step = self.trainer, self.trainer._step
            trainer._forget_step()
            set_random_states(step.random_states)
            control.should_log, control.should_evaluate = True, False
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, None, trainer.model_wrapped, None, float(state.epoch or 0), None, None
            )
        raise Preempted(self._told())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends_epoch = args.eval_strategy == "epoch" and float(state.epoch or 0).is_integer()
        # Training that is over is saved as a whole; and what comes at the end of an epoch would not come after a resume.
        if state.global_step < state.max_steps and not ends_epoch and self._agreed():
            self._stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and args.eval_strategy == "epoch" and self._agreed():
            self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        self.is_stopping = control.should_save = control.should_log = True
        signals.saving()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step
        if self.is_stopping:
            raise Preempted(self._told())

    def _agreed(self) -> bool:
        """Whether SIGTERM reached any process; the same answer on all."""
        if self.group is None:
            return signals.requested()
        asked = torch.tensor([signals.requested()], dtype=torch.uint8)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        return bool(asked.item())

    def _told(self) -> str:
        if not self.saved_step:
            return f"{self.stage} was stopped by SIGTERM before its first step; the same command begins it"
        return (
            f"{self.stage} was stopped by SIGTERM at step {self.saved_step}, and {self.stage_dir}/checkpoint-{self.saved_step} "
            "is saved; the same command continues"
        )

    def late(self) -> str:
        """What is said when the time runs out first."""
        kept = f"checkpoint-{self.saved_step}" if self.saved_step else "its beginning"
        return f"{self.stage} was stopped by SIGTERM, and its step or checkpoint did not end in time; it continues from {kept}"


@contextlib.contextmanager
def preemptible(trainer: Any) -> Iterator[None]:
    """Within, SIGTERM waits for the end of a step; for one whose trainer has the callback `Preemption`."""
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Preemption))
    callback.trainer = trainer
    with signals.deferred(callback.late):
        yield
