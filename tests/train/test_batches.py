"""Batches of several processes: the rows of one process's steps in its order, each once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler
from trl import SFTConfig

from hymba_align.data.packing import PLACES
from hymba_align.train.batches import SharedBatches
from hymba_align.train.common import load_start, load_start_tokenizer, quiet_libraries
from hymba_align.train.settings import trainer_arguments
from hymba_align.train.sft import HymbaSFTTrainer, training_rows

COUNTS = st.integers(1, 9)


def counted(batches: SharedBatches) -> list[list[int]]:
    """The batches without the one that repeats a row."""
    found = list(batches)
    return found[:-1] if batches.ends_with_repeat else found


@given(st.integers(1, 60), COUNTS, COUNTS)
def test_every_row_counts_once_in_the_step_in_which_one_process_takes_it(
    rows: int, batch_size: int, processes: int
) -> None:
    order = SequentialSampler(range(rows))
    shared = [SharedBatches(order, batch_size, processes, rank) for rank in range(processes)]
    whole = batch_size * processes
    assert {len(batches) for batches in shared} == {len(list(batches)) for batches in shared} == {-(-rows // whole)}
    assert all(1 <= len(batch) <= batch_size for batches in shared for batch in batches)
    for number in range(len(shared[0])):
        together = [row for batches in shared for row in dict(enumerate(counted(batches))).get(number, ())]
        assert together == list(range(rows))[number * whole : (number + 1) * whole]


@given(st.integers(1, 60), COUNTS, COUNTS)
def test_a_last_batch_that_is_not_full_is_left_out_on_request(rows: int, batch_size: int, processes: int) -> None:
    shared = [
        SharedBatches(SequentialSampler(range(rows)), batch_size, processes, rank, drop_last=True)
        for rank in range(processes)
    ]
    assert not any(batches.ends_with_repeat for batches in shared)
    assert all(len(batch) == batch_size for batches in shared for batch in batches)
    assert {len(batches) for batches in shared} == {rows // (batch_size * processes)}


@pytest.mark.parametrize("strategy", ["random", "sequential"])
@quiet_libraries()
def test_the_trainers_of_two_processes_take_the_rows_of_one_in_every_epoch(
    make_recipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """One process after the other; what is exchanged between them does not matter for rows."""
    from hymba_align.data.prepare import prepare_sft

    recipe = make_recipe(rows=9, packing=False, per_device_train_batch_size=2, train_sampling_strategy=strategy)
    tokenizer = load_start_tokenizer(recipe, None)
    rows = training_rows(prepare_sft(recipe.data, tokenizer, 256, seed=0).dataset, max_length=256, packing=False)

    def epochs(processes: int, rank: int) -> list[list[Any]]:
        arguments = trainer_arguments(recipe, "sft", SFTConfig, tmp_path / "run")
        trainer = HymbaSFTTrainer(
            model=load_start(recipe, None, tokenizer), args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        trainer.data_collator = lambda examples: {
            "labels": torch.tensor([[index_of(example)] for example in examples]),
            PLACES: ["x"] * len(examples),
        }
        monkeypatch.setattr(type(arguments), "world_size", processes)
        monkeypatch.setattr(type(arguments), "process_index", rank)
        loader: DataLoader[Any] = trainer.get_train_dataloader()
        monkeypatch.undo()
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)  # type: ignore[attr-defined]  # accelerate's
            batches, _ = trainer.get_batch_samples(iter(loader), 99, torch.device("cpu"))
            found.append([batch["labels"].flatten().tolist() for batch in batches])
            assert [bool(places) for places in trainer._step.rows] == [row != -100 for row, *_ in found[-1]]
        return found

    def index_of(example: dict[str, Any]) -> int:
        return next(number for number, ids in enumerate(rows["input_ids"]) if ids == example["input_ids"])

    one = epochs(1, 0)
    two = [epochs(2, rank) for rank in (0, 1)]
    for epoch in (0, 1):
        alone = [row for batch in one[epoch] for row in batch]
        assert sorted(alone) == list(range(9))
        shared = [row for number in range(3) for rank in (0, 1) for row in two[rank][epoch][number]]
        assert [row for row in shared if row != -100] == alone
        assert two[0][epoch][2] == [-100], "nine rows, four a step: one is left for the second process"
    assert (one[0] != one[1]) == (strategy == "random")
