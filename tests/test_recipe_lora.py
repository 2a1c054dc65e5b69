"""The section `lora`: what it comes to, and what it refuses, each before anything is trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hymba_align.adapters import check_adapters, check_targets, linear_names, peft_config
from hymba_align.cli import main
from hymba_align.errors import AdapterError, RecipeError
from hymba_align.model import HymbaConfig
from hymba_align.plan import plan
from hymba_align.recipe import Recipe, load_recipe
from hymba_align.recipe_lora import LoraSection

ALL = ("in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def make(small_base: dict[str, Any], tmp_path: Path) -> Any:
    """A recipe of both stages with a section lora."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1+1?", "answer": "#### 2", "wrong_answer": "#### 3"}) + "\n")

    def make(lora: dict[str, Any] | None, **sections: Any) -> Recipe:
        stage = {"max_length": 64, "trainer": {}}
        base = {"name": "r", "base": small_base, "data": {"path": str(rows)}, "sft": stage, "dpo": stage}
        return Recipe.model_validate({**base, "output_dir": str(tmp_path / "run"), "lora": lora, **sections})

    return make


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("linear", ALL),
        (["mixer"], ("in_proj", "out_proj")),
        (["mlp", "x_proj"], ("gate_proj", "up_proj", "down_proj", "x_proj.0")),
        (["ssm", "ssm"], ("x_proj.0", "dt_proj.0")),
        (["layers.0.mamba.in_proj"], ("layers.0.mamba.in_proj",)),
    ],
)
def test_words_and_names_of_layers_become_the_endings_that_peft_looks_for(targets: Any, modules: Any) -> None:
    assert LoraSection.model_validate({"targets": targets}).target_modules == modules


def test_pefts_configuration_is_the_sections() -> None:
    section = LoraSection(r=4, alpha=6.0, dropout=0.1, targets=("mixer",), dora=True, rslora=True)
    config = peft_config(section)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.use_rslora) == (
        4,
        6,
        0.1,
        True,
        True,
    )
    assert config.target_modules == {"in_proj", "out_proj"}
    assert (str(config.task_type), config.modules_to_save, config.bias) == ("CAUSAL_LM", None, "none")
    assert peft_config(LoraSection(r=4)).lora_alpha == 8  # twice the rank


def test_the_words_name_every_linear_layer_of_the_model_but_the_head(small_config: HymbaConfig) -> None:
    names = linear_names(small_config)
    assert {name.split(".", 3)[3].split(".", 1)[1].removeprefix("experts.0.") for name in names} == set(ALL)
    assert len(names) == len(ALL) * small_config.num_hidden_layers
    check_targets(LoraSection(), names)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            "lora.targets=lm_head",
            "lora.targets: 'lm_head' cannot have an adapter: the head and the embeddings are one matrix, which an adapter on "
            "one of them would part; remove it",
        ),
        (
            "lora.targets=[in_proj, mamba.conv1d]",
            "lora.targets: 'mamba.conv1d' cannot have an adapter: it is no linear layer, so it has no low-rank update that "
            "could be merged; remove it",
        ),
        (
            "lora.targets=A_log",
            "lora.targets: 'A_log' cannot have an adapter: it is no linear layer, so it has no low-rank update that could be "
            "merged; remove it",
        ),
        ("lora.targets=[]", "lora.targets: it is an empty list; name at least one, or leave the key out"),
        (
            "lora.quantize=8bit",
            "lora.quantize: '8bit' is not offered: its product rounds the activations too, so no merged model gives what was "
            "trained; write nf4",
        ),
        ("lora.quantize=nf3", "lora.quantize is 'nf3'; it must be 'nf4'"),
        ("lora.rank=4", "lora.rank is not a key of a recipe; the nearest is lora.r"),
        ("lora.r=0", "lora.r is 0; it must be greater than or equal to 1"),
        ("lora.stages=[base]", "lora.stages.0 is 'base'; it must be 'sft' or 'dpo'"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(lora: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("recipes/tiny/arithmetic.yaml", [lora])
    assert str(error.value) == f"override '{lora}': {message}"


def test_adapters_of_a_stage_that_the_recipe_lacks_are_refused(make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"lora\.stages names dpo, and there is no section dpo; add it or remove the name"
    ):
        make({"stages": ["dpo"]}, dpo=None)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_proj", "in_proj holds queries, keys, values, SSM input and gate together; name in_proj"),
        ("gate_pro", "the nearest is 'gate_proj'"),
        (
            "wte",
            "every layer has in_proj, out_proj, x_proj, dt_proj, gate_proj, up_proj, down_proj, in groups mixer: in_proj, "
            "out_proj; ssm: x_proj, dt_proj; mlp: gate_proj, up_proj, down_proj; linear: all of them",
        ),
    ],
)
def test_a_dry_run_refuses_a_target_that_matches_nothing(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, hint: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(make({"targets": ["in_proj", target]}).dump_yaml())
    assert main(["run", str(path), "--dry-run"]) == 2
    assert f"lora.targets names {target!r}, which matches nothing in the model; {hint}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_base_does_not_have_matches_nothing(make: Any, small_config: HymbaConfig) -> None:
    recipe = make({"targets": ["layers.4.mamba.in_proj"]})
    check_adapters(recipe, small_config, "single")
    shallow = HymbaConfig(
        **{**small_config.to_dict(), "num_hidden_layers": 2, "global_attn_idx": [0], "kv_reuse_group": []}
    )
    with pytest.raises(AdapterError, match="matches nothing in the model"):
        check_adapters(recipe, shallow, "single")


def test_a_base_on_the_hub_is_checked_by_the_names_of_every_hymba(make: Any) -> None:
    check_adapters(make({}), None, "single")
    with pytest.raises(AdapterError, match="matches nothing"):
        check_adapters(make({"targets": ["k_proj"]}), None, "single")


def test_engines_that_adapters_were_not_tried_with_are_refused(make: Any) -> None:
    for engine in ("single", "ddp", "zero1", "zero2", "zero3"):
        check_adapters(make({}), None, engine)
    with pytest.raises(AdapterError) as error:
        check_adapters(make({}), None, "fsdp2")
    assert str(error.value) == (
        "lora trains with the engines single, ddp, zero1, zero2, zero3, and this run has fsdp2; adapters have next to no "
        "optimizer state to divide, so take launch.launcher=ddp, or zero3 where the frozen weights are too large"
    )
    with pytest.raises(AdapterError) as error:
        check_adapters(make({"quantize": "nf4"}), None, "zero2")
    assert str(error.value) == "lora.quantize is nf4, and zero2 cannot divide 4-bit weights; take launch.launcher=ddp"


def test_without_bitsandbytes_the_message_says_what_installs_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    check_adapters(make({}), None, "single")
    with pytest.raises(AdapterError) as error:
        check_adapters(make({"quantize": "nf4"}), None, "single")
    assert str(error.value) == (
        "lora.quantize is nf4, and bitsandbytes is missing; in the clone of hymba-align: pip install -e '.[quantized]'"
    )


def test_float16_beside_4_bits_is_refused(make: Any) -> None:
    recipe = make({"quantize": "nf4"}, sft={"max_length": 64, "trainer": {"fp16": True}})
    with pytest.raises(AdapterError) as error:
        check_adapters(recipe, None, "single")
    assert str(error.value) == (
        "sft.trainer.fp16 is true, and with lora.quantize the small matrices stay in float32; use bf16"
    )


def test_adapters_enter_the_fingerprints_of_the_stages_that_train_them(make: Any) -> None:
    def fingerprints(lora: dict[str, Any] | None) -> list[str]:
        return [step.fingerprint for step in plan(make(lora))]

    without, both, dpo_alone = fingerprints(None), fingerprints({}), fingerprints({"stages": ["dpo"]})
    assert both[0] != without[0]
    assert dpo_alone[0] == without[0]
    assert dpo_alone[1] != without[1]
    assert fingerprints({"r": 8})[0] != both[0]
    assert fingerprints({"stages": ["sft", "dpo"]}) == both
