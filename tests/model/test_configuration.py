"""The configuration reads, checks and writes the released keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.configuration import FIXED

TINY = Path(__file__).parent.parent / "golden" / "tiny"
RELEASED = Path(__file__).parents[3] / "shared" / "hymba_1_5b"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released configuration is not at hand")


def small(**changes: Any) -> HymbaConfig:
    fields = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "v_head_dim": 16,
        "num_memory_tokens": 5,
        "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]],
    }
    return HymbaConfig(**(fields | changes))


@pytest.mark.parametrize("source", [TINY, pytest.param(RELEASED, marks=needs_released)], ids=["tiny", "1.5B"])
def test_a_released_config_is_written_back_with_its_keys_and_values(source: Path, tmp_path: Path) -> None:
    released = json.loads((source / "config.json").read_text())
    config = AutoConfig.from_pretrained(source)
    assert isinstance(config, HymbaConfig)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())

    assert set(written) == set(released)
    for key in set(released) - {"auto_map", "transformers_version"}:
        assert written[key] == released[key], key
    assert written["auto_map"] == {
        "AutoConfig": "nvidia/Hymba-1.5B-Base--configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "nvidia/Hymba-1.5B-Base--modeling_hymba.HymbaForCausalLM",
    }
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()


@needs_released
def test_the_model_at_the_released_config_has_exactly_the_612_released_tensors() -> None:
    expected = json.loads((RELEASED / "state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = HymbaForCausalLM(AutoConfig.from_pretrained(RELEASED))
    assert len(expected) == 612
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_522_797_824


def test_the_defaults_are_the_1_5b_model() -> None:
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig())
    assert len(model.state_dict()) == 612
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_522_797_824


@pytest.mark.parametrize("key", sorted(FIXED))
def test_a_value_that_no_released_checkpoint_uses_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} is 'other', which no released checkpoint uses; only .* is supported"):
        small(**{key: "other"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "yarn"}, "rope_type is 'yarn'; only 'ntk' and None are supported"),
        ({"layer_type": ["h", "a", "h"]}, "layer_type holds a kind other than 'h'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; released checkpoints tie the head"),
        ({"num_memory_tokens": 0}, "num_memory_tokens is 0; it must be at least 1"),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1; it must be at least 2"),
        ({"num_attention_heads": 7}, "must give an even head size of at least 4"),
        ({"num_key_value_heads": 2}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"v_head_dim": 8}, "v_head_dim is 8; with mamba_expand 2 and hidden_size 24 it must be 16"),
        ({"global_attn_idx": [3]}, "global_attn_idx names layer 3; there are 3 layers"),
        ({"kv_reuse_group": [[1]]}, r"kv_reuse_group \[1\] must list two or more layers between 0 and 2, in order"),
        ({"kv_reuse_group": [[2, 1]]}, r"kv_reuse_group \[2, 1\] must list two or more layers"),
        ({"kv_reuse_group": [[1, 3]]}, r"kv_reuse_group \[1, 3\] must list two or more layers"),
        ({"kv_reuse_group": [[0, 1]]}, r"kv_reuse_group \[0, 1\] mixes global and local layers"),
        ({"kv_reuse_group": [[1, 2], [1, 2]]}, "layer 1 is in two groups of kv_reuse_group"),
    ],
)
def test_a_contradictory_config_is_a_value_error_that_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_new_config_is_written_with_every_key_that_a_released_one_has(tmp_path: Path) -> None:
    config = small()
    config.dtype = torch.float32
    config.architectures = ["HymbaForCausalLM"]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written) == set(json.loads((TINY / "config.json").read_text()))
    assert written["attn_implementation"] == "flex"
    assert config._attn_implementation is None
    assert small(attn_implementation="sdpa")._attn_implementation == "sdpa"


def test_the_router_settings_stay_out_of_trls_sight() -> None:
    config = small(router_aux_loss_coef=0.001, output_router_logits=False)
    assert not hasattr(config, "output_router_logits")
    assert config.to_dict()["router_aux_loss_coef"] == 0.001


def test_a_context_that_ntk_angles_cannot_be_made_for_is_refused_instead_of_turning_complex() -> None:
    with pytest.raises(
        ValueError, match=r"'ntk' cannot shrink a context of 128 \(orig_max_position_embeddings\) to 64"
    ):
        small(max_position_embeddings=64, orig_max_position_embeddings=128)
