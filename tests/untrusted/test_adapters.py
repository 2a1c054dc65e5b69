"""Adapters of strangers: a damaged or hostile one is one clear sentence before its base is in memory, or it works."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.adapter_fit import check_fits
from hymba_align.adapter_folder import read_adapter
from hymba_align.checkpoint import check_is_hymba, load_model
from hymba_align.checkpoint_checks import expected_shapes
from hymba_align.errors import CheckpointError
from tests.adapters_of_others import change_config, change_tensors, write_adapter, write_base

PREFIX = "base_model.model.model.layers.0.mamba."
END = "use a whole adapter, over its own base (--base)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="module")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "original"
    write_adapter(folder, base, target_modules=["in_proj", "out_proj"])
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def refusal(folder: Path) -> str:
    """The sentence with which an adapter is refused, without its folder; the cheap check says the same where it can see it."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "HERE")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "HERE: peft_type in adapter_config.json is 'IA3'; hymba-align takes LoRA, rsLoRA and DoRA (LORA) only"),
        ({"init_lora_weights": "pissa"}, "HERE: init_lora_weights in adapter_config.json is 'pissa', which changes the base model's weights; save the adapter as plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"),
        ({"bias": "all"}, "HERE: bias in adapter_config.json is 'all'; hymba-align takes adapters with bias 'none' only"),
        ({"layer_replication": [[0, 2]]}, "HERE: adapter_config.json sets layer_replication, which hymba-align does not merge; train the adapter without it"),
        ({"megatron_config": {"a": 1}}, "HERE: adapter_config.json sets megatron_config, which hymba-align does not merge; train the adapter without it"),
        ({"something_new": 3}, "HERE: adapter_config.json sets something_new, which hymba-align does not merge; train the adapter without it"),
        ({"r": 0}, "HERE/adapter_config.json: r is 0; it must be a whole number above 0, and at most 65536"),
        ({"r": True}, "HERE/adapter_config.json: r is True; it must be a whole number above 0, and at most 65536"),
        ({"lora_alpha": float("nan")}, "HERE/adapter_config.json: lora_alpha is nan; it must be a number above 0, and at most 1e+06"),
        ({"use_dora": "yes"}, "HERE/adapter_config.json: use_dora is 'yes'; it must be true or false"),
        ({"alpha_pattern": {"(a|a)*$": 3}}, "HERE/adapter_config.json: alpha_pattern holds the pattern '(a|a)*$'; hymba-align takes modules' names only"),
        ({"base_model_name_or_path": None}, "HERE: adapter_config.json does not say over which model the adapter was trained (base_model_name_or_path is None); name it (--base)"),
        ({"r": 5}, f"HERE: the adapter has tensors of a shape that does not fit its base or its rank: {PREFIX}in_proj.lora_A.weight, {PREFIX}in_proj.lora_B.weight, {PREFIX}out_proj.lora_A.weight and 9 more; {END}"),
        ({"use_dora": True}, f"HERE: the adapter has tensors of a shape that does not fit its base or its rank: model.layers.0.mamba.in_proj.lora_magnitude_vector (missing), model.layers.0.mamba.out_proj.lora_magnitude_vector (missing), model.layers.1.mamba.in_proj.lora_magnitude_vector (missing) and 3 more; {END}"),
        ({"target_modules": ["in_proj", "down_proj"]}, f"HERE: the adapter lacks tensors of layers that its target_modules name: model.layers.0.moe.experts.0.down_proj, model.layers.1.moe.experts.0.down_proj, model.layers.2.moe.experts.0.down_proj; {END}"),
        ({"base_model_name_or_path": "."}, "HERE: the adapter HERE is, over 1 steps, its own base; name a base model"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_merged_is_refused_by_its_key(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(adapter, **changes)

    assert refusal(adapter) == message
    with pytest.raises(CheckpointError):
        check_is_hymba(adapter, None)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}in_proj.lora_A.weight"), f"HERE: the adapter has tensors of a shape that does not fit its base or its rank: model.layers.0.mamba.in_proj.lora_A (missing); {END}"),
        (lambda t: rename(t, f"{PREFIX}in_proj.lora_A.weight", "in_proj.lora_A.weight"), f"HERE: the adapter has tensors that LoRA or DoRA does not have: in_proj.lora_A.weight; {END}"),
        (lambda t: t.update({"base_model.model.extra": torch.zeros(1)}), f"HERE: the adapter has tensors that LoRA or DoRA does not have: base_model.model.extra; {END}"),
        (lambda t: t.update({f"{PREFIX}q_proj.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}), f"HERE: the adapter changes linear layers that its base does not have: model.layers.0.mamba.q_proj; {END}"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32), "base_model.model.lm_head.lora_B.weight": torch.zeros(596, 4)}), "HERE: the adapter changes lm_head, and Hymba's embeddings and head are one tensor, which cannot take the change of one of them; train it without that target"),
        (lambda t: t[f"{PREFIX}in_proj.lora_A.weight"].fill_(float("nan")), f"HERE: the tensor {PREFIX}in_proj.lora_A.weight holds NaN or infinity; the adapter is damaged, or comes from a run that diverged; name another"),
        (lambda t: [tensor.fill_(1e30) for tensor in t.values()], "HERE: the adapter cannot be merged: NaNs detected in the merged weights. The adapter default seems to be broken"),
        (lambda t: t.update({name: tensor.to(torch.int32) for name, tensor in t.items()}), f"HERE: the adapter has tensors of a type other than F16, BF16, F32, F64: {PREFIX}in_proj.lora_A.weight (I32), {PREFIX}in_proj.lora_B.weight (I32), {PREFIX}out_proj.lora_A.weight (I32) and 9 more; {END}"),
        (lambda t: t.clear(), "HERE: adapter_model.safetensors holds no tensor, so the adapter changes nothing; copy it again"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(596, 32)}), "HERE: the adapter holds another model.embed_tokens.weight than its base, and Hymba's embeddings and head are one tensor, which cannot take the change of one of them; train it without embeddings in modules_to_save"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(598, 32)}), f"HERE: the adapter has tensors of a shape that does not fit its base or its rank: base_model.model.model.embed_tokens.weight; {END}"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(adapter: Path, change: Callable[[Any], Any], message: str) -> None:
    change_tensors(adapter, change)

    assert refusal(adapter) == message


def test_a_pickle_in_place_of_tensors_is_never_opened(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")

    assert refusal(adapter) == (
        "HERE: the adapter's weights are missing: adapter_model.bin is a pickle, which can run code when it is opened, and "
        "hymba-align never opens one; save the adapter as adapter_model.safetensors (safe_serialization of peft)"
    )


def test_a_folder_that_is_an_adapter_and_a_model_is_refused(adapter: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", adapter)

    assert refusal(adapter) == (
        "HERE: the folder holds adapter_config.json and model.safetensors, so it is two models; remove one"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "quantization.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (adapter / name).unlink(missing_ok=True)
    os.symlink(tmp_path / "secret", adapter / name)

    assert refusal(adapter) == (
        f"HERE: {name} is a link that leads out of the folder, to {tmp_path}/secret; put the file itself there"
    )


def test_two_adapters_that_are_each_others_base_are_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "other")
    change_config(adapter, base_model_name_or_path="../other")
    change_config(tmp_path / "other", base_model_name_or_path="../adapter")

    assert "is, over 2 steps, its own base; name a base model" in refusal(adapter)


def test_a_pile_of_adapters_that_is_too_high_is_refused(adapter: Path, tmp_path: Path) -> None:
    for number in range(9):
        shutil.copytree(adapter, tmp_path / f"a{number}")
        change_config(tmp_path / f"a{number}", base_model_name_or_path=f"../a{number + 1}")
    shutil.copytree(adapter, tmp_path / "a9")

    assert refusal(tmp_path / "a0") == "HERE: more than 8 adapters lie on top of each other; merge some of them first"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "int8"}, "HERE/quantization.json: quant_type is 'int8'; it must be nf4 or fp4"),
        ({"dtype": "load"}, "HERE/quantization.json: dtype is 'load'; it must be float32 or bfloat16 or float16"),
        ({"code": "x"}, "HERE/quantization.json: code is not a key of it; update hymba-align"),
        ({"modules": ["model.layers.9.x"]}, f"HERE: the adapter names layers in quantization.json that its base does not have: model.layers.9.x; {END}"),
    ],
)  # fmt: skip
def test_a_quantisation_that_is_not_known_is_refused(adapter: Path, changes: dict[str, Any], message: str) -> None:
    good = {"format": 1, "method": "bitsandbytes_4bit", "quant_type": "nf4", "double_quant": True, "block_size": 64, "dtype": "float32"}  # fmt: skip
    (adapter / "quantization.json").write_text(
        json.dumps({**good, "modules": ["model.layers.0.mamba.in_proj"], **changes})
    )

    assert refusal(adapter) == message


def test_embeddings_that_peft_saved_unchanged_do_no_harm(adapter: Path, base: Path) -> None:
    embeddings = load_model(base).get_input_embeddings().weight.data.clone()
    change_tensors(adapter, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": embeddings}))

    assert torch.equal(load_model(adapter).get_input_embeddings().weight.data, embeddings)


NASTY: list[Any] = [None, True, False, 0, -1, 1, 7, 2**63, 10**30, 0.5, float("nan"), "", "x", "\x00", "../..", "(a+)+$", [], ["x"], [None], {}, {"a": 1}, {"(a+)+$": 2}, {"in_proj": -1}]  # fmt: skip


def refused_for(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """The sentence with which an adapter is refused, empty where it fits; any other error is the test's."""
    try:
        check_fits(read_adapter(folder, "it"), shapes)
    except CheckpointError as error:
        return str(error)
    return ""


def test_five_hundred_spoiled_configurations_are_refused_in_a_sentence_or_fit(adapter: Path, base: Path) -> None:
    from hymba_align.checkpoint import checkpoint_config

    rng, outcomes = random.Random(3), Counter[str]()
    good, shapes = json.loads((adapter / "adapter_config.json").read_text()), expected_shapes(checkpoint_config(base))
    for number in range(500):
        values = dict(good)
        for _ in range(rng.choice((1, 1, 2))):
            values[rng.choice([*good, "new_key"])] = rng.choice(NASTY)
        (adapter / "adapter_config.json").write_text(json.dumps(values))
        message = refused_for(adapter, shapes)
        assert "\n" not in message, number
        assert len(message) < 1000, number
        outcomes["refused" if message else "fits"] += 1
    assert outcomes["refused"] > 200, outcomes
    assert outcomes["fits"] > 50, outcomes
