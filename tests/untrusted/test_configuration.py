"""config.json of strangers: a key or value that is not Hymba's is one clear sentence before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hymba_align.checkpoint import base_config, build_base, load_model
from hymba_align.checkpoint_checks import parse_config
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError, RecipeError
from hymba_align.model.configuration import LIMITS
from hymba_align.recipe import BaseSection
from tests.untrusted.checkpoints import TOKENIZER, read_config, refusal, works, write_config


def test_the_unspoiled_checkpoint_loads_and_works(checkpoint: Path) -> None:
    assert works(load_model(checkpoint))
    assert works(load_model(checkpoint, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": -16}, "HymbaConfig: hidden_size is -16; it must be at least 1"),
        ({"num_memory_tokens": 10**15}, "HymbaConfig: num_memory_tokens is 1000000000000000; it must be at most 65536"),
        ({"num_hidden_layers": 10**9}, "HymbaConfig: num_hidden_layers is 1000000000; it must be at most 512"),
        ({"vocab_size": 10**18}, "HymbaConfig: vocab_size is 1000000000000000000; it must be at most 4194304"),
        ({"sliding_window": 0}, "HymbaConfig: sliding_window is 0; it must be at least 1"),
        ({"sliding_window": -4}, "HymbaConfig: sliding_window is -4; it must be at least 1"),
        ({"mamba_d_conv": 1}, "HymbaConfig: mamba_d_conv is 1; it must be at least 2"),
        ({"mamba_d_conv": 10**6}, "HymbaConfig: mamba_d_conv is 1000000; it must be at most 64"),
        ({"rope_theta": float("nan")}, "HymbaConfig: rope_theta is nan; it must be a number"),
        ({"rope_theta": float("inf")}, "HymbaConfig: rope_theta is inf; it must be at most 1000000000000.0"),
        ({"rope_theta": -1.0}, "HymbaConfig: rope_theta is -1.0; it must be at least 1.0"),
        ({"rms_norm_eps": 0.0}, "HymbaConfig: rms_norm_eps is 0.0; it must be at least 1e-30"),
        ({"initializer_range": float("nan")}, "HymbaConfig: initializer_range is nan; it must be a number"),
        ({"num_attention_heads": 3}, "HymbaConfig: hidden_size 16 over num_attention_heads 3 must give an even head size of at least 4"),
        ({"pad_token_id": 61}, "HymbaConfig: pad_token_id is 61; it must lie between 0 and 60 (vocab_size - 1)"),
        ({"eos_token_id": [1, -2]}, "HymbaConfig: eos_token_id is -2; it must lie between 0 and 60 (vocab_size - 1)"),
        ({"bos_token_id": 10**30}, f"HymbaConfig: bos_token_id is {10**30}; it must lie between 0 and 60 (vocab_size - 1)"),
        ({"global_attn_idx": [0, 0]}, "HymbaConfig: global_attn_idx names a layer twice"),
        ({"global_attn_idx": [-1]}, "HymbaConfig: global_attn_idx names layer -1; there are 3 layers"),
        ({"kv_reuse_group": [[1, 1]]}, "HymbaConfig: kv_reuse_group [1, 1] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[2, 1]]}, "HymbaConfig: kv_reuse_group [2, 1] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[1]]}, "HymbaConfig: kv_reuse_group [1] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[]]}, "HymbaConfig: kv_reuse_group [] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[1, 2], [1, 2]]}, "HymbaConfig: layer 1 is in two groups of kv_reuse_group"),
        ({"kv_reuse_group": [[0, 1]]}, "HymbaConfig: kv_reuse_group [0, 1] mixes global and local layers"),
        ({"kv_reuse_group": [[1, 99]]}, "HymbaConfig: kv_reuse_group [1, 99] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[-2, -1]]}, "HymbaConfig: kv_reuse_group [-2, -1] must list two or more layers between 0 and 2, in order"),
        ({"layer_type": 7}, "HymbaConfig: layer_type holds a kind other than 'h'; only hybrid layers are supported"),
        ({"num_experts": True}, "HymbaConfig: num_experts is True, which no released checkpoint uses; only 1 is supported"),
        ({"torch_dtype": "load"}, "HymbaConfig: dtype is 'load'; it must be one of float32, bfloat16, float16, float64"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_key(checkpoint: Path, changes: dict[str, Any], reason: str) -> None:
    write_config(checkpoint, **changes)

    assert refusal(checkpoint) == f"HERE/config.json is not a Hymba's: {reason}"


@pytest.mark.parametrize("value", ["16", 16.0, None, True, [16], {"a": 1}])
def test_a_size_that_is_no_integer_is_refused(checkpoint: Path, value: object) -> None:
    write_config(checkpoint, hidden_size=value)

    message = refusal(checkpoint)
    assert message.startswith(
        "HERE/config.json is not a Hymba's: Validation error for field 'hidden_size': TypeError: "
    )


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_every_size_has_a_smallest_and_a_largest_value(original: Path, key: str) -> None:
    for value in (LIMITS[key][0] - 1, LIMITS[key][1] + 1):
        with pytest.raises(CheckpointError, match=rf"HymbaConfig: {key} is {value}; it must be at (least|most)"):
            parse_config(read_config(original) | {key: value}, "HERE")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers_weights", "adapter_model.bin"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("per_layer_config", {"0": {"hidden_size": 5}}),
        ("num_labels", 10**12),
        ("fusion_config", {"a": True}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("configuration_files", ["config.5.0.0.json"]),
        ("is_encoder_decoder", True),
        ("_attn_implementation_internal", "someone/kernel"),
        ("experts_implementation", "someone/kernel"),
        ("save_pretrained", "shadowed"),
        ("to_dict", 5),
        ("__class__", "x"),
    ],
)
def test_a_key_by_which_transformers_would_do_something_else_is_refused(checkpoint: Path, key: str, value: Any) -> None:
    write_config(checkpoint, **{key: value})

    assert refusal(checkpoint).startswith(f"HERE/config.json: {key} is not a key of HymbaConfig; ")


def test_attention_that_is_a_kernel_of_the_hub_is_refused(checkpoint: Path) -> None:
    write_config(checkpoint, attn_implementation="someone/kernel")

    assert refusal(checkpoint) == (
        "HERE/config.json: attn_implementation is 'someone/kernel', which Hymba does not have"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "it holds something else"),
        ('{"hidden_size": 16, "hidden_size": 17}', "'hidden_size' stands twice"),
        ('{"a": ' * 100_000, "maximum recursion depth exceeded"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(checkpoint: Path, text: str, reason: str) -> None:
    (checkpoint / "config.json").write_text(text)

    assert refusal(checkpoint).startswith(f"HERE/config.json is not a JSON object: {reason}")


def test_a_config_of_other_bytes_than_text_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"\xff\xfe{}")

    assert refusal(checkpoint).startswith("HERE/config.json is not a JSON object: 'utf-8' codec can't decode")


def test_an_endless_config_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room on the disk and would take a terabyte of memory

    assert refusal(checkpoint) == "HERE/config.json has 1,099,511,627,776 bytes, above 16,777,216; it is damaged"


# ---- the base section of a recipe ------------------------------------------------------------------------------------


def test_a_base_that_asks_for_more_memory_than_there_is_is_refused_before_it_is_made(
    small_base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    small_base["config"] |= {"intermediate_size": 1 << 18, "hidden_size": 1 << 15, "v_head_dim": 1 << 15}

    with pytest.raises(RecipeError) as caught:
        build_base(BaseSection(**small_base), tokenizer, 0)

    assert str(caught.value).startswith("base.config: the model has ")
    assert "GB in float32, and this machine has" in str(caught.value)


def test_a_base_with_a_key_that_only_transformers_knows_is_refused(small_base: dict[str, Any]) -> None:
    small_base["config"] |= {"num_labels": 10**12}

    with pytest.raises(RecipeError, match=r"base\.config\.num_labels is not a key of HymbaConfig"):
        base_config(BaseSection(**small_base), load_tokenizer(TOKENIZER))
