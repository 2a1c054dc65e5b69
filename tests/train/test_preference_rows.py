"""Several pairs in a row: which share one, what a batch of rows is, and that the loss stays the mean over pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hymba_align.checkpoint import load_model
from hymba_align.errors import RecipeError
from hymba_align.recipe import Recipe
from hymba_align.run.metrics import read_metrics
from hymba_align.train import dpo as dpo_module
from hymba_align.train.dpo import train_dpo
from hymba_align.train.dpo_trainer import HymbaDPOTrainer, UnequalGather
from hymba_align.train.preference_rows import (
    PairCollator,
    PreferenceRows,
    RowsReport,
    TokenBalance,
    best_fit_rows,
    pair_tokens,
)
from hymba_align.train.saving import last_good_checkpoint
from hymba_align.train.settings import trainer_settings

# Plain gradient descent: at a rate of 1 the weights move by the gradients themselves.
DESCENT = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "train_sampling_strategy": "sequential",
}


def with_rows(recipe: Recipe, row_tokens: int | None) -> Recipe:
    assert recipe.dpo is not None
    return recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"row_tokens": row_tokens})})


def record(stage_dir: Path) -> dict[str, Any]:
    return dict(json.loads((stage_dir / "data.json").read_text()))


def logged(stage_dir: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(stage_dir) if "loss" in entry]


# ---- which pairs share a row -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(8, 50))
def test_every_pair_is_in_one_row_and_no_row_but_that_of_a_longer_pair_exceeds_the_budget(
    lengths: list[int], row_tokens: int
) -> None:
    rows = best_fit_rows(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[index] for index in row) <= row_tokens or len(row) == 1
    half_full = [sum(lengths[index] for index in row) * 2 <= row_tokens for row in rows]
    assert sum(half_full) <= 1, "two rows that would fit into one"


def test_a_pair_goes_into_the_fullest_row_that_has_room() -> None:
    assert best_fit_rows([60, 50, 40, 30, 20, 7], 100) == [[0, 2], [1, 3, 4], [5]]
    assert best_fit_rows([70, 60, 25], 100) == [[0, 2], [1]]
    assert best_fit_rows([60, 70, 25], 100) == [[1, 2], [0]]


def test_a_longer_pair_has_a_row_of_its_own_and_is_counted() -> None:
    rows = best_fit_rows([300, 40, 50], 100)
    assert rows == [[0], [2, 1]]
    report = RowsReport.of(rows, [300, 40, 50], 100)
    assert (report.longer, report.fewest_pairs, report.most_pairs, report.fill_rate) == (1, 1, 2, 390 / 400)
    assert report.line() == (
        "rows: 3 pairs in 2 rows of up to 100 tokens, 1.5 per row (1 to 2), fill 97.50 %; "
        "1 longer, each in a row of its own"
    )


def test_rows_of_mixed_lengths_are_nearly_full() -> None:
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    lengths = (5.5 + 0.7 * drawn).exp().clamp(16, 4096).int().tolist()
    report = RowsReport.of(best_fit_rows(lengths, 4096), lengths, 4096)
    assert report.fill_rate > 0.99  # observed 0.997


def test_the_tokens_of_a_pair_count_its_prompt_once_only_where_it_is_shared() -> None:
    pairs = Dataset.from_dict({"prompt_ids": [[1, 2, 3]], "chosen_ids": [[4, 5]], "rejected_ids": [[6]]})
    assert pair_tokens(pairs, share_prefix=True) == [6]
    assert pair_tokens(pairs, share_prefix=False) == [9]


def test_a_batch_of_rows_is_the_preference_batch_of_all_their_pairs() -> None:
    parts = {
        "prompt_ids": [[1, 2], [3], [4, 5, 6]],
        "chosen_ids": [[7], [8, 9], [10]],
        "rejected_ids": [[11], [12], [13, 14]],
        "ref_chosen_logps": [-1.0, -2.0, -3.0],
        "ref_rejected_logps": [-4.0, -5.0, -6.0],
    }
    pairs = Dataset.from_dict({**parts, "note": ["not for training"] * 3})
    rows = PreferenceRows(pairs, [[2, 0], [1]])
    assert len(rows) == 2
    collator = PairCollator(pad_token_id=0)
    of_rows = collator([rows[0], rows[1]])
    of_pairs = collator([{name: values[index] for name, values in parts.items()} for index in (2, 0, 1)])
    assert of_rows.keys() == of_pairs.keys()
    for name, expected in of_pairs.items():
        assert torch.equal(of_rows[name], expected), name
    assert of_rows["shared_prefix_lengths"].tolist() == [3, 2, 1]


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row_tokens", "batch", "accumulation", "per_row"),
    [(10_000, 1, 1, (6, 6)), (8, 1, 6, (1, 1)), (230, 1, 3, (1, 3)), (230, 2, 2, (1, 3)), (None, 4, 2, None)],
    ids=["one row", "a pair per row", "unequal rows", "unequal batches of rows", "no rows, unequal batches"],
)
def test_loss_and_gradients_are_those_of_the_mean_over_pairs_however_they_are_put_into_rows_and_batches(
    make_recipe: Any,
    tmp_path: Path,
    row_tokens: int | None,
    batch: int,
    accumulation: int,
    per_row: tuple[int, int] | None,
) -> None:
    fixed = {"rows": 6, "num_train_epochs": 2, **DESCENT}  # an epoch is a step over all six pairs
    train_dpo(make_recipe(per_device_train_batch_size=6, **fixed), None, tmp_path / "pairs")
    recipe = make_recipe(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **fixed)
    train_dpo(with_rows(recipe, row_tokens), None, tmp_path / "rows")

    if per_row is not None:
        report = record(tmp_path / "rows")["rows"]
        assert (report["fewest_pairs"], report["most_pairs"]) == per_row
        assert report["pairs"] == 6
    expected, found = logged(tmp_path / "pairs"), logged(tmp_path / "rows")
    assert len(expected) == len(found) == 2
    assert abs(expected[1]["loss"] - expected[0]["loss"]) > 1e-3, "the step did not move"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6, rel=0)  # float32; observed 2e-7
        for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert ours[key] == pytest.approx(theirs[key], abs=5e-6, rel=0), key  # observed 1e-6
        assert ours["rewards/accuracies"] == pytest.approx(theirs["rewards/accuracies"]) or theirs is expected[0]
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=1e-6)
    start = load_file(tmp_path / "pairs" / "final" / "model.safetensors")
    for name, weight in load_file(tmp_path / "rows" / "final" / "model.safetensors").items():
        assert_close(weight, start[name], atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("share_prefix", "precompute"), [(False, True), (True, False)], ids=["prompts twice", "a reference beside it"]
)
def test_rows_train_the_same_with_prompts_computed_twice_and_with_a_reference_that_runs_beside_the_policy(
    make_recipe: Any, tmp_path: Path, share_prefix: bool, precompute: bool
) -> None:
    fixed = {"rows": 6, "num_train_epochs": 2, **DESCENT}
    train_dpo(make_recipe(per_device_train_batch_size=6, **fixed), None, tmp_path / "pairs")
    fixed |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    recipe = make_recipe(share_prefix=share_prefix, precompute_ref_log_probs=precompute, **fixed)
    train_dpo(with_rows(recipe, 230), None, tmp_path / "rows")
    assert record(tmp_path / "rows")["rows"]["most_pairs"] > 1
    for ours, theirs in zip(logged(tmp_path / "rows"), logged(tmp_path / "pairs"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6, rel=0)  # float32; observed 2e-7
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=5e-6, rel=0)


def test_the_last_step_of_an_epoch_is_the_mean_over_its_fewer_pairs(make_recipe: Any, tmp_path: Path) -> None:
    """Ten pairs: a step over six, in three batches, and one over four, in two."""
    fixed = {"rows": 10, "num_train_epochs": 1, **DESCENT}
    train_dpo(make_recipe(per_device_train_batch_size=6, **fixed), None, tmp_path / "whole")
    fixed |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    train_dpo(make_recipe(**fixed), None, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert [entry["step"] for entry in logged(tmp_path / "parts")] == [1, 2]
    for name, weight in whole.items():
        assert_close(parts[name], weight, atol=2e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_without_the_count_of_pairs_the_loss_of_a_step_would_depend_on_the_rows(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test of unequal rows would see from a mean over rows of the rows' means."""

    def mean_of_means(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return super(HymbaDPOTrainer, self).compute_loss(model, inputs) / self.current_gradient_accumulation_steps

    losses = []
    for row_tokens, accumulation in ((10_000, 1), (230, 3)):
        recipe = make_recipe(
            rows=6,
            num_train_epochs=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            **DESCENT,
        )
        with monkeypatch.context() as patch:
            patch.setattr(HymbaDPOTrainer, "compute_loss", mean_of_means)
            train_dpo(with_rows(recipe, row_tokens), None, tmp_path / str(row_tokens))
        losses.append(logged(tmp_path / str(row_tokens))[1]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-4  # observed 8e-3


def test_values_of_unequal_numbers_of_pairs_are_gathered_in_the_order_of_the_processes() -> None:
    class TwoProcesses:
        """accelerate's gather where the other process has the values 7, 8, 9."""

        device = "cpu"
        process_index = 0

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            assert len(values) == 3, "accelerate needs equal shapes"
            return torch.cat([values, torch.tensor([7.0, 8.0, 9.0])])

    gathering = UnequalGather(TwoProcesses(), [1, 3])  # type: ignore[arg-type]
    assert gathering.gather(torch.tensor([5.0])).tolist() == [5.0, 7.0, 8.0, 9.0]
    assert gathering.device == "cpu"
    with pytest.raises(AssertionError, match=r"TRL gathers \(2,\) where this process has 1 pairs"):
        gathering.gather(torch.tensor([5.0, 6.0]))


# ---- in a stage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced_by", ["rows", "the sampler"])
def test_an_interrupted_epoch_resumes_to_the_same_weights(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balanced_by: str
) -> None:
    training = {"rows": 20, "learning_rate": 1e-2, "warmup_steps": 0, "save_steps": 2}
    if balanced_by == "rows":
        recipe = with_rows(make_recipe(per_device_train_batch_size=1, **training), 260)
    else:
        training |= {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}
        recipe = make_recipe(per_device_train_batch_size=1, **training)
    train_dpo(recipe, None, tmp_path / "whole")
    steps = [entry["step"] for entry in logged(tmp_path / "whole")]
    assert len(steps) >= 6

    class Interrupted(Exception):
        """A kill in the middle of the epoch."""

    original = HymbaDPOTrainer.training_step

    def stops(self: Any, *given: Any) -> Any:
        if self.state.global_step == 3:
            raise Interrupted
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(HymbaDPOTrainer, "training_step", stops)
        with pytest.raises(Interrupted):
            train_dpo(recipe, None, tmp_path / "cut")
    checkpoint = last_good_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    train_dpo(recipe, None, tmp_path / "cut")
    whole, cut = (
        {entry["step"]: (entry["loss"], entry["tokens"]) for entry in logged(tmp_path / run)}
        for run in ("whole", "cut")
    )
    assert cut == whole
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "cut")]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


def test_the_stage_says_how_full_its_rows_are(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_dpo(with_rows(make_recipe(rows=12, per_device_train_batch_size=1), 400), None, tmp_path / "dpo")
    report = record(tmp_path / "dpo")["rows"]
    assert report["pairs"] == 12
    assert report["fill_rate"] > 0.7
    line = (
        f"rows: 12 pairs in {report['rows']} rows of up to 400 tokens, {12 / report['rows']:.1f} per row "
        f"({report['fewest_pairs']} to {report['most_pairs']}), fill {100 * report['fill_rate']:.2f} %"
    )
    assert line in capsys.readouterr().out.splitlines()
    load_model(tmp_path / "dpo" / "final")


def test_validation_counts_pairs_whatever_a_row_of_training_holds(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=24, per_device_train_batch_size=1, learning_rate=1e-2, warmup_steps=0)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_fraction": 0.3})})
    assert trainer_settings(recipe, "dpo")["per_device_eval_batch_size"] == 1
    assert trainer_settings(with_rows(recipe, 400), "dpo")["per_device_eval_batch_size"] == 8
    summary = train_dpo(with_rows(recipe, 400), None, tmp_path / "dpo")
    assert 0 < summary["eval_loss"] < 2


def test_transformers_sampler_that_balances_processes_reads_the_lengths_of_pairs(
    make_recipe: Any, tmp_path: Path
) -> None:
    """Its batches differ in their number of pairs, and the loss of a step is the mean over all of them even so."""
    fixed = {"rows": 6, "num_train_epochs": 2, **DESCENT}
    train_dpo(make_recipe(per_device_train_batch_size=6, **fixed), None, tmp_path / "pairs")
    sampled = {**fixed, "train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}
    train_dpo(make_recipe(per_device_train_batch_size=3, **sampled), None, tmp_path / "balanced")
    for ours, theirs in zip(logged(tmp_path / "balanced"), logged(tmp_path / "pairs"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6, rel=0)


def test_balanced_batches_have_equal_tokens_in_every_process_and_all_pairs_of_a_step() -> None:
    drawn = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    lengths = (6.4 + 0.7 * drawn).exp().clamp(16, 16_000).int().tolist()
    plan = {"lengths": lengths, "effective_batch_size": 1024, "dp_size": 8, "grad_accum": 16, "drop_last": False}
    uneven = {}
    for sampler in (BatchRebalanceSampler, TokenBalance):
        batches = [list(sampler(rank=rank, **plan)) for rank in range(8)]
        first = sorted(index for process in batches for batch in process[:16] for index in batch)
        assert len(set(first)) == len(first) == 1024
        tokens = torch.tensor([[sum(lengths[index] for index in batch) for batch in process] for process in batches])
        uneven[sampler] = (tokens.amax(0) / tokens.float().mean(0)).mean()  # what processes wait for at every batch
    assert uneven[TokenBalance] < 1.05  # observed 1.03
    assert uneven[BatchRebalanceSampler] > 1.1  # observed 1.22


def test_a_stage_that_rebalances_takes_tokens_as_the_cost_and_the_recipes_seed(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_module, "run_stage", lambda trainer, _: trainer)
    trainer: Any = train_dpo(make_recipe(rows=8, train_sampling_strategy="batch_rebalance"), None, tmp_path / "dpo")
    theirs = super(HymbaDPOTrainer, trainer)._get_train_sampler()
    ours = trainer._get_train_sampler()
    assert isinstance(ours, TokenBalance)
    assert ours.lengths == pair_tokens(trainer.train_dataset, share_prefix=True)
    assert vars(ours) == {**vars(theirs), "seed": 7}


def test_sampling_by_length_validates_too(make_recipe: Any, tmp_path: Path) -> None:
    """Transformers groups the validation pairs as well, and finds their lengths in the same column."""
    training = {"rows": 24, "max_steps": 1, "per_device_train_batch_size": 24, "per_device_eval_batch_size": 3}
    losses = []
    for strategy in ("group_by_length", "random"):
        recipe = make_recipe(learning_rate=1e-2, warmup_steps=0, train_sampling_strategy=strategy, **training)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_fraction": 0.3})})
        losses.append(train_dpo(recipe, None, tmp_path / strategy)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # observed 0
    assert abs(losses[0] - 0.6931472) > 1e-3, "the step did not move"


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sft"])
def test_a_loss_over_a_whole_batch_is_refused_with_rows(make_recipe: Any, loss_type: str) -> None:
    recipe = make_recipe(loss_type=["sigmoid", loss_type])
    trainer_settings(recipe, "dpo")
    with pytest.raises(RecipeError) as error:
        trainer_settings(with_rows(recipe, 400), "dpo")
    assert str(error.value) == (
        f"dpo.trainer.loss_type is {loss_type}, which is computed over a whole batch, and with dpo.row_tokens batches "
        "differ in their number of pairs; remove dpo.row_tokens, or choose another loss"
    )


def test_sampling_by_length_is_refused_with_rows(make_recipe: Any) -> None:
    with pytest.raises(RecipeError) as error:
        trainer_settings(with_rows(make_recipe(train_sampling_strategy="group_by_length"), 400), "dpo")
    assert str(error.value) == (
        "dpo.trainer.train_sampling_strategy is group_by_length, and dpo.row_tokens makes rows of equal length already; "
        "remove one of the two"
    )
