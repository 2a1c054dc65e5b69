"""Direct preference optimisation, with and without computing each prompt once."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer

from hymba_align.checkpoint import load_model
from hymba_align.data.prepare import prepare_preferences
from hymba_align.data.rendering import render
from hymba_align.recipe import Recipe
from hymba_align.run.metrics import read_metrics
from hymba_align.train import dpo as dpo_module
from hymba_align.train.common import load_start, load_start_tokenizer, quiet_libraries
from hymba_align.train.dpo import train_dpo
from hymba_align.train.dpo_trainer import HymbaDPOTrainer, ScoresLabels
from hymba_align.train.preference_rows import PairCollator
from hymba_align.train.settings import trainer_arguments
from hymba_align.train.trainer import StageTrainer
from hymba_align.train.validation import ValidatesEveryRow

PAIR = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]}


@quiet_libraries()
def build_trainer(recipe: Recipe, folder: Path, *, share_prefix: bool) -> DPOTrainer:
    """A stock trainer with and without the collator that names the shared prompt."""
    assert recipe.data is not None
    assert recipe.dpo is not None
    tokenizer = load_start_tokenizer(recipe, None)
    prepared = prepare_preferences(recipe.data, tokenizer, recipe.dpo.max_length, seed=recipe.seed)
    collator = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=recipe.dpo.max_length)
    return DPOTrainer(
        model=load_start(recipe, None, tokenizer),
        args=trainer_arguments(recipe, "dpo", DPOConfig, folder),
        data_collator=collator if share_prefix else None,
        train_dataset=prepared.dataset.remove_columns("place"),
        processing_class=tokenizer,
    )


def test_what_differs_from_trls_trainer_is_this_and_nothing_else() -> None:
    before_trl = HymbaDPOTrainer.__mro__[: HymbaDPOTrainer.__mro__.index(DPOTrainer)]
    assert before_trl[:3] == (HymbaDPOTrainer, ValidatesEveryRow, StageTrainer)
    assert all(one.__module__.startswith("hymba_align.train.") for one in before_trl)
    overridden = {name for name in vars(HymbaDPOTrainer) if hasattr(DPOTrainer, name) and not name.startswith("__")}
    assert overridden == {
        "loss_is_scaled_for_ga",  # the mean over the pairs of a step
        "_get_num_items_in_batch",
        "compute_loss",
        "_compute_loss",  # logits for labels only; metrics of unequal numbers of pairs
        "log",
        "_precompute_ref_logps",  # the cache
        "_get_train_sampler",  # batches of equal tokens
        "_set_signature_columns_if_needed",  # lengths for samplers
    }


def test_logits_are_computed_for_labelled_positions_only_and_the_outputs_are_trls_own(
    make_recipe: Any, tmp_path: Path
) -> None:
    trainer = build_trainer(make_recipe(rows=3, per_device_train_batch_size=3), tmp_path, share_prefix=True)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "shared_prefix_lengths")}
    scored: list[int] = []
    trainer.model.model.register_forward_hook(lambda *given: scored.append(given[2].last_hidden_state.shape[1]))
    whole = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    labelled = ScoresLabels(trainer.model)(**inputs, labels=labels, fused_lm_head=True)
    assert scored == [labels.shape[1], int((labels[:, 1:] != -100).sum())]
    assert labelled.keys() == whole.keys() >= {"log_probs", "entropy", "mean_logits", "is_top1"}
    for name, expected in whole.items():
        # float32 on the CPU, log-probabilities up to 7
        assert_close(labelled[name], expected, atol=2e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precompute", [True, False])
def test_a_stage_scores_labelled_positions_only(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precompute: bool
) -> None:
    scored: list[int] = []

    def load_watching(*given: Any) -> Any:
        model = load_start(*given)
        model.model.register_forward_hook(lambda *made: scored.append(made[2].last_hidden_state.shape[1]))
        return model

    monkeypatch.setattr(dpo_module, "load_start", load_watching)
    recipe = make_recipe(rows=4, per_device_train_batch_size=4, precompute_ref_log_probs=precompute)
    train_dpo(recipe, None, tmp_path / "dpo")
    (trained,) = {
        source["trained_tokens"] for source in json.loads((tmp_path / "dpo" / "data.json").read_text())["sources"]
    }
    assert scored == [trained] * 2  # the reference's pass, before training or beside it, and the policy's


def test_padded_embeddings_are_free_before_the_layers_start(make_recipe: Any, tmp_path: Path) -> None:
    trainer = build_trainer(make_recipe(rows=3, per_device_train_batch_size=3), tmp_path, share_prefix=True)
    batch = next(iter(trainer.get_train_dataloader()))
    embeddings: list[Any] = []
    alive: list[bool] = []
    hymba = trainer.model.model
    hymba.embed_tokens.register_forward_hook(lambda *made: embeddings.append(weakref.ref(made[2])))
    hymba.layers[0].register_forward_pre_hook(lambda *_: alive.append(embeddings[-1]() is not None))
    trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "shared_prefix_lengths")})
    assert alive == [False]


@pytest.mark.parametrize(
    ("max_length", "truncation_mode", "shared"),
    [
        (None, "keep_start", 4),
        (16, "keep_start", 4),
        (3, "keep_start", 3),
        (7, "keep_end", 4),  # nothing is cut
        (6, "keep_end", 0),  # chosen loses its first token, rejected does not
    ],
)
def test_the_shared_length_is_the_prompt_that_truncation_leaves_to_both(
    max_length: int | None, truncation_mode: str, shared: int
) -> None:
    collator = PairCollator(pad_token_id=0, max_length=max_length, truncation_mode=truncation_mode)
    batch = collator([PAIR])
    assert batch["shared_prefix_lengths"].tolist() == [shared]
    assert batch["shared_prefix_lengths"].dtype == torch.int64
    chosen, rejected = batch["input_ids"]
    assert torch.equal(chosen[:shared], rejected[:shared])


def test_equal_cuts_at_the_start_leave_the_rest_of_the_prompt_shared() -> None:
    pair = {**PAIR, "rejected_ids": [8, 9, 10]}
    batch = PairCollator(pad_token_id=0, max_length=5, truncation_mode="keep_end")([pair, pair])
    assert batch["shared_prefix_lengths"].tolist() == [2, 2]
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7]] * 2 + [[3, 4, 8, 9, 10]] * 2


def test_trl_tokenizes_a_pair_as_the_prompt_of_a_generation_and_its_replies(
    data_rows: Any, make_recipe: Any, tmp_path: Path
) -> None:
    recipe = make_recipe(rows=3)
    trainer = build_trainer(recipe, tmp_path, share_prefix=True)
    tokenizer = load_start_tokenizer(recipe, None)
    for row, pair in zip(data_rows(recipe), trainer.train_dataset, strict=True):
        question = [{"role": "user", "content": row["question"]}]
        assert pair["prompt_ids"] == render(tokenizer, question, add_generation_prompt=True).input_ids
        whole = render(tokenizer, [*question, {"role": "assistant", "content": row["answer"]}])
        assert pair["prompt_ids"] + pair["chosen_ids"] == whole.input_ids
        assert tokenizer.eos_token_id in pair["chosen_ids"]
        assert tokenizer.eos_token_id in pair["rejected_ids"]


def test_sharing_the_prompt_changes_neither_losses_nor_rewards_nor_gradients(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=4, per_device_train_batch_size=4)
    losses, gradients, metrics, references = [], [], [], []
    for share_prefix in (True, False):
        trainer = build_trainer(recipe, tmp_path / str(share_prefix), share_prefix=share_prefix)
        references.append(torch.tensor(trainer.train_dataset["ref_chosen_logps"][:]))
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("shared_prefix_lengths" in batch) == share_prefix
        with torch.no_grad():  # away from the reference, so that rewards are not all zero
            for number, parameter in enumerate(trainer.model.parameters()):
                noise = torch.Generator().manual_seed(number)
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
        metrics.append({key: values[0] for key, values in trainer._metrics["train"].items()})
    # float32 on the CPU. Sums of log-probabilities are about 200, where neighbouring numbers are 1.5e-5 apart.
    assert_close(references[0], references[1], atol=3e-5, rtol=0)  # observed 0
    assert_close(losses[0], losses[1], atol=5e-7, rtol=0)  # observed 6e-8
    assert metrics[0].keys() == metrics[1].keys()
    assert abs(metrics[1]["rewards/margins"]) > 1e-4
    for key, value in metrics[1].items():
        within = 3e-5 if key.startswith("logps") else 1e-6  # observed 0 and 2e-7
        assert metrics[0][key] == pytest.approx(value, abs=within, rel=0), key
    for name, gradient in gradients[1].items():
        assert gradient is not None, name
        # observed 1.6e-7 of gradients up to 0.3
        assert_close(gradients[0][name], gradient, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_stage_computes_each_pairs_prompt_once_unless_told_otherwise(
    data_rows: Any, make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    seen: list[int] = []

    def load_counting(*given: Any) -> Any:
        model = load_start(*given)
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
        return model

    monkeypatch.setattr(dpo_module, "load_start", load_counting)
    tokens = []
    for share_prefix in (True, False):
        seen.clear()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache {share_prefix}")
        recipe = make_recipe(rows=6, share_prefix=share_prefix, activation_checkpointing=False)
        train_dpo(recipe, None, tmp_path / str(share_prefix))
        tokens.append(sum(seen))
    assert recipe.data is not None
    tokenizer = load_start_tokenizer(recipe, None)
    prompts = [[{"role": "user", "content": row["question"]}] for row in data_rows(recipe)]
    once = sum(len(render(tokenizer, prompt, add_generation_prompt=True).input_ids) for prompt in prompts)
    assert tokens[1] - tokens[0] == 2 * once  # in the pass for the reference, and in training


def test_a_stage_trains_from_a_checkpoint_and_starts_at_its_own_reference(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=8, per_device_train_batch_size=4, learning_rate=1e-2, num_train_epochs=5)
    tokenizer = load_start_tokenizer(recipe, None)
    load_start(recipe, None, tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    summary = train_dpo(recipe, tmp_path / "start", tmp_path / "dpo")
    records = [record for record in read_metrics(tmp_path / "dpo") if "loss" in record]
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: policy equals reference; observed 2e-7
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=3e-6)  # observed 4e-7
    assert summary["last_loss"] < 0.5
    assert summary["rewards/margins"] > 0.5
    load_model(tmp_path / "dpo" / "final")


def test_without_precomputed_references_training_is_the_same(make_recipe: Any, tmp_path: Path) -> None:
    losses = []
    for precompute in (True, False):
        recipe = make_recipe(rows=8, learning_rate=1e-2, warmup_steps=0, precompute_ref_log_probs=precompute)
        train_dpo(recipe, None, tmp_path / str(precompute))
        losses.append([record["loss"] for record in read_metrics(tmp_path / str(precompute)) if "loss" in record])
    assert len(losses[0]) == 4
    assert losses[0][1:] != pytest.approx([losses[0][0]] * 3, abs=1e-2), "no step left the reference"
    assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=0)  # float32 on the CPU; observed 0
