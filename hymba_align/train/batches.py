"""Every row of an epoch counts once, whatever number of processes shares its batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hymba_align.data.packing import PLACES

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class SharedBatches(BatchRebalanceSampler):
    """One process's batches of a sampler's rows: as many in every process, and no row in two of them.

    Each `batch_size * processes` rows in order are divided evenly. Fewer rows than processes may be left at the end; then
    a process without one repeats the first of them (`ends_with_repeat`), and that must not count.

    transformers' class, because its `_get_dataloader` leaves the batches of that class to the process they are made for.
    `sampler` has the name under which accelerate puts a seeded one in its place, so the order is that of one process.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, processes: int, rank: int, *, drop_last: bool = False
    ) -> None:
        rows = len(sampler)  # type: ignore[arg-type]  # torch's samplers in use have a length
        super().__init__(
            [1] * rows,
            batch_size * processes,
            dp_size=processes,
            grad_accum=1,
            shuffle=False,
            rank=rank,
            drop_last=drop_last,
        )
        self.sampler = sampler

    @property
    def ends_with_repeat(self) -> bool:
        """Whether this process's last batch repeats a row of another process."""
        first, last = self._share(self.remainder)
        return bool(self.has_tail) and first == last

    def _share(self, rows: int) -> tuple[int, int]:
        """Which of so many rows are this process's."""
        return rows * self.rank // self.dp_size, rows * (self.rank + 1) // self.dp_size

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for number in range(self.num_global_batches):
            rows = order[number * self.effective_batch_size : (number + 1) * self.effective_batch_size]
            first, last = self._share(len(rows))
            yield rows[first:last] or rows[:1]


class CountsRowsOnce(Base):
    """Mixin for a trainer: the last step of an epoch trains on the rows that are left, and on none of them twice.

    accelerate repeats rows from the beginning of the epoch until every process has as many full batches as the others;
    they would count twice, and another number of processes would compute another step. (So it is still where this class
    has no say: in a stream, and with a `train_sampling_strategy` by length. The metric `tokens` counts what was computed,
    and so a repeated row too.)
    """

    _shared: SharedBatches | None = None

    @abstractmethod
    def leave_out(self, batch: dict[str, Any]) -> None:
        """Takes out of a batch what training would count of it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Transformers' for one process; for several, batches of the rows in the same order."""
        sampler = super()._get_train_sampler(train_dataset)
        arguments, self._shared = self.args, None
        dealt: Any = arguments.accelerator_config
        by_accelerate = bool(dealt.split_batches or dealt.dispatch_batches)
        if arguments.world_size == 1 or by_accelerate or not isinstance(sampler, RandomSampler | SequentialSampler):
            return sampler
        self._shared = SharedBatches(
            sampler,
            arguments.train_batch_size,
            arguments.world_size,
            arguments.process_index,
            drop_last=arguments.dataloader_drop_last,
        )
        return self._shared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Transformers' batches of a step, and what their losses are divided by."""
        return super().get_batch_samples(self._counted(epoch_iterator), num_batches, device)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; of one that repeats a row, nothing counts."""
        for batch in batches:
            ends = self.accelerator.gradient_state.end_of_dataloader
            if ends and self._shared is not None and self._shared.ends_with_repeat:
                self.leave_out(batch)
                if PLACES in batch:
                    batch[PLACES] = []
            yield batch
