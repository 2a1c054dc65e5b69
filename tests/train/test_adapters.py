"""LoRA under stock TRL: adapters on every linear layer train, the model below stays as it is and is DPO's reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.train.common import load_start, load_start_tokenizer, quiet_libraries
from hymba_align.train.dpo_trainer import HymbaDPOTrainer
from hymba_align.train.preference_rows import PairCollator
from hymba_align.train.settings import trainer_arguments
from hymba_align.train.sft import training_rows

LINEAR = {"in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj"}
# TRL 1.16 calls transformers' old names; delete when it calls `activation_checkpointing_disable`.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(dis|en)able. is deprecated:FutureWarning")
SETTINGS = {"learning_rate": 1e-2, "warmup_steps": 0, "activation_checkpointing": True, "num_train_epochs": 2}
STAGES: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig, prepare_sft),
    "dpo": (DPOTrainer, DPOConfig, prepare_preferences),
}


@quiet_libraries()
def build_trainer(stage: Any, recipe: Any, folder: Path) -> Any:
    trainer, config, prepare = STAGES[stage]
    tokenizer = load_start_tokenizer(recipe, None)
    prepared = prepare(recipe.data, tokenizer, 256, seed=0).dataset
    return trainer(
        model=load_start(recipe, None, tokenizer),
        args=trainer_arguments(recipe, stage, config, folder),
        train_dataset=training_rows(prepared, max_length=256, packing=True) if stage == "sft" else prepared,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def split(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies of the adapter's parameters, and of the model's below it."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter = {name: parameter for name, parameter in parameters.items() if "lora_" in name}
    return adapter, {name: parameter for name, parameter in parameters.items() if name not in adapter}


@pytest.mark.parametrize("stage", STAGES)
def test_stock_trl_trains_an_adapter_on_every_linear_layer_and_nothing_else(
    make_recipe: Any, tmp_path: Path, stage: str
) -> None:
    trainer = build_trainer(stage, make_recipe(rows=8, **SETTINGS), tmp_path / "run")
    assert isinstance(trainer.model, PeftModel)
    adapter, base = split(trainer.model)
    for layer in (0, 1):
        names = [name for name in adapter if f"layers.{layer}." in name]
        assert {linear for linear in LINEAR if any(f"{linear}.lora_A" in name for name in names)} == LINEAR
    largest = dict.fromkeys(adapter, 0.0)
    for name, parameter in trainer.model.named_parameters():
        if name in adapter:
            parameter.register_hook(
                lambda gradient, name=name: largest.update({name: max(largest[name], gradient.abs().max().item())})
            )
        assert parameter.requires_grad == (name in adapter), name

    checkpointed: list[bool] = []
    hymba = trainer.model.get_base_model().model
    hymba.register_forward_pre_hook(lambda *_: checkpointed.append(hymba.training and hymba.gradient_checkpointing))
    trainer.train()

    assert any(checkpointed)
    assert [name for name, size in largest.items() if size == 0] == []
    after_adapter, after_base = split(trainer.model)
    assert [name for name in adapter if torch.equal(adapter[name], after_adapter[name])] == []
    assert [name for name in base if not torch.equal(base[name], after_base[name])] == []


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_takes_the_model_without_its_adapter_as_reference(
    make_recipe: Any, tmp_path: Path, precompute: bool
) -> None:
    recipe = make_recipe(rows=8, **SETTINGS, precompute_ref_log_probs=precompute)
    trainer = build_trainer("dpo", recipe, tmp_path)
    trainer.train()
    logged = [record for record in trainer.state.log_history if "loss" in record]
    assert logged[0]["rewards/chosen"] == logged[0]["rewards/rejected"] == 0  # an adapter starts as no change
    assert logged[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)
    assert max(abs(record["rewards/margins"]) for record in logged) > 0.1  # it has moved, its reference has not


@pytest.mark.parametrize("precompute", [False, True])
def test_this_projects_trainer_trains_an_adapter_as_trls_does(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precompute: bool
) -> None:
    recipe = make_recipe(rows=8, **SETTINGS, precompute_ref_log_probs=precompute)
    losses = []
    for trainer_class in (DPOTrainer, HymbaDPOTrainer):
        collator = PairCollator(pad_token_id=load_start_tokenizer(recipe, None).pad_token_id, max_length=256)
        built = partial(trainer_class, data_collator=collator)
        monkeypatch.setitem(STAGES, "dpo", (built, DPOConfig, prepare_preferences))
        torch.manual_seed(0)  # the adapter's start
        trainer = build_trainer("dpo", recipe, tmp_path / trainer_class.__name__)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6, rel=0)  # float32 on the CPU; observed 0
    assert len(set(losses[0])) == len(losses[0]) == 8


def test_a_saved_adapter_gives_the_logits_that_it_was_saved_with(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=8, **SETTINGS)
    trainer = build_trainer("sft", recipe, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    tokenizer = load_start_tokenizer(recipe, None)
    base = load_start(recipe, None, tokenizer)
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"][:40]])
    with torch.no_grad():
        plain = base.eval()(ids, use_cache=False).logits
        trained = trainer.model.eval()(input_ids=ids, use_cache=False).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(loaded, trained)
    assert (trained - plain).abs().max() > 1e-2
