"""Which parameter decays: the whole list, by name. Engines keep these groups; see test_engines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, SFTConfig

from hymba_align.recipe import Recipe, TrainingStage
from hymba_align.train.common import load_start, load_start_tokenizer
from hymba_align.train.dpo_trainer import HymbaDPOTrainer
from hymba_align.train.preference_rows import PairCollator
from hymba_align.train.settings import trainer_arguments
from hymba_align.train.sft import HymbaSFTTrainer

DECAYED = {
    "model.embed_tokens.weight",  # also lm_head.weight, which is the same parameter and has no entry of its own
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            "mamba.in_proj",
            "mamba.conv1d",
            "mamba.x_proj.0",
            "mamba.dt_proj.0",
            "mamba.out_proj",
            "moe.experts.0.gate_proj",
            "moe.experts.0.up_proj",
            "moe.experts.0.down_proj",
        )
    ),
}
SPARED = {
    "model.memory_tokens",
    "model.final_layernorm.weight",
    *(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in (
            "input_layernorm.weight",
            "pre_moe_layernorm.weight",
            "mamba.conv1d.bias",
            "mamba.dt_proj.0.bias",
            "mamba.A_log.0",
            "mamba.D.0",
            "mamba.dt_layernorm.weight",
            "mamba.B_layernorm.weight",
            "mamba.C_layernorm.weight",
            "mamba.pre_avg_layernorm1.weight",
            "mamba.pre_avg_layernorm2.weight",
        )
    ),
}


def build_trainer(stage: TrainingStage, recipe: Recipe, folder: Path) -> Any:
    """A stage's trainer that has not trained; its rows are never read."""
    tokenizer = load_start_tokenizer(recipe, None)
    model = load_start(recipe, None, tokenizer)
    if stage == "sft":
        rows = Dataset.from_dict({"input_ids": [[1, 5, 6]], "labels": [[-100, 5, 6]], "seq_lengths": [[3]]})
        arguments = trainer_arguments(recipe, "sft", SFTConfig, folder)
        return HymbaSFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return HymbaDPOTrainer(
        model=model,
        ref_model=load_start(recipe, None, tokenizer),
        args=trainer_arguments(recipe, "dpo", DPOConfig, folder),
        data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=Dataset.from_dict({"prompt": ["1"], "chosen": ["2"], "rejected": ["3"]}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weights_of_matrices_and_convolutions_decay_and_nothing_else(
    make_recipe: Any, tmp_path: Path, stage: TrainingStage
) -> None:
    recipe = (
        make_recipe(weight_decay=0.1, precompute_ref_log_probs=False)
        if stage == "dpo"
        else make_recipe(weight_decay=0.1)
    )
    trainer = build_trainer(stage, recipe, tmp_path)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    listed = [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]
    assert listed == [sorted(DECAYED), sorted(SPARED)]
    assert set(names.values()) == DECAYED | SPARED, "a parameter is in no group"


def test_tied_embeddings_are_one_parameter(make_recipe: Any, tmp_path: Path) -> None:
    trainer = build_trainer("sft", make_recipe(), tmp_path)
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    held = [id(parameter) for group in trainer.create_optimizer().param_groups for parameter in group["params"]]
    assert held.count(id(trainer.model.lm_head.weight)) == 1
    assert len(held) == len(set(held))
