"""How far training moved weights: each parameter in its part, exactly, and every meta token."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hymba_align.errors import CheckpointError
from hymba_align.inside.movement import check_comparable, meta_movement, weight_movement
from hymba_align.inside.result import WeightMovement
from hymba_align.model import HymbaConfig, HymbaForCausalLM

EXACT: dict[str, Any] = {"rel": 1e-12}  # sums in float64 against numpy's in float64, observed 4e-16
PART_OF = {  # written down from DESIGN, section 2, not from the code
    r"mamba\.(conv1d\.(weight|bias)|x_proj\.0\.weight|dt_proj\.0\.(weight|bias)|A_log\.0|D\.0)": "ssm",
    r"mamba\.(dt|B|C)_layernorm\.weight": "ssm",
    r"mamba\.(pre_avg_layernorm[12]|out_proj)\.weight": "fusion",
    r"moe\.experts\.0\.(gate|up|down)_proj\.weight": "mlp",
    r"(input|pre_moe)_layernorm\.weight": "norms",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embeddings",
    "model.memory_tokens": "meta tokens",
    "model.final_layernorm.weight": "final norm",
}


def moved(model: HymbaForCausalLM, name: str, rows: slice = slice(None)) -> HymbaForCausalLM:
    """A copy in which these rows of one parameter are others."""
    after = copy.deepcopy(model)
    with torch.no_grad():
        weight = after.get_parameter(name)
        weight[rows] += torch.rand(weight[rows].shape, generator=torch.Generator().manual_seed(0))
    return after


def changed_parts(before: Any, after: Any) -> dict[tuple[int | None, str], WeightMovement]:
    parts, _ = weight_movement(before, after)
    return {(one.layer, one.part): one for one in parts if one.distance}


def distance(before: Tensor, after: Tensor) -> float:
    return float(np.linalg.norm((after.detach().double() - before.detach().double()).numpy().ravel()))


def test_every_parameter_counts_for_its_part_and_for_no_other(small_model: HymbaForCausalLM) -> None:
    after = copy.deepcopy(small_model)
    for name, weight in after.named_parameters():
        layer_and_rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if "in_proj" in name or (layer_and_rest and layer_and_rest[1] not in "02"):
            continue
        if layer_and_rest is None:
            place = (None, OUTSIDE[name])
        else:
            (part,) = (part for pattern, part in PART_OF.items() if re.fullmatch(pattern, layer_and_rest[2]))
            place = (int(layer_and_rest[1]), part)
        whole = weight.detach().clone()
        weight.data += torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
        found = changed_parts(small_model, after)
        assert list(found) == [place], name
        assert found[place].distance == pytest.approx(distance(whole, weight), **EXACT)
        weight.data.copy_(whole)


@pytest.mark.parametrize("layer", [0, 1, 2])  # global; local; one that reads the keys and values of layer 1
def test_rows_of_the_input_projection_count_for_the_branch_that_reads_them(
    small_model: HymbaForCausalLM, layer: int
) -> None:
    config = small_model.config
    q, k = config.hidden_size, config.num_key_value_heads * config.head_dim
    v, inner = config.num_key_value_heads * config.v_head_dim, config.inner_size
    kv = [] if layer == 2 else ["attention"] * (k + v)
    branches = ["attention"] * q + kv + ["ssm"] * 2 * inner
    name = f"model.layers.{layer}.mamba.in_proj.weight"
    assert len(small_model.get_parameter(name)) == len(branches)
    for row in (0, q - 1, q, len(branches) - 2 * inner - 1, len(branches) - 2 * inner, len(branches) - 1):
        assert list(changed_parts(small_model, moved(small_model, name, slice(row, row + 1)))) == [
            (layer, branches[row])
        ]


def test_the_parts_add_up_to_the_whole(small_model: HymbaForCausalLM) -> None:
    after = copy.deepcopy(small_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in after.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    parts, whole = weight_movement(small_model, after)
    flat = [
        torch.cat([weight.detach().flatten() for weight in model.parameters()]).double().numpy()
        for model in (small_model, after)
    ]
    assert whole.distance == pytest.approx(np.linalg.norm(flat[1] - flat[0]), **EXACT)
    assert whole.relative == pytest.approx(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]), **EXACT)
    assert whole.parameters == sum(one.parameters for one in parts) == small_model.num_parameters()
    assert sum(one.share for one in parts) == pytest.approx(1, **EXACT)
    for one in parts:
        assert one.share == pytest.approx(one.distance**2 / whole.distance**2, **EXACT)
    assert [(one.layer, one.part) for one in parts[:6]] == [
        *((0, part) for part in ("attention", "ssm", "fusion", "mlp", "norms")),
        (1, "attention"),
    ]
    assert [one.part for one in parts[-3:]] == ["embeddings", "meta tokens", "final norm"]


def test_nothing_moved_is_zero_everywhere(small_model: HymbaForCausalLM) -> None:
    parts, whole = weight_movement(small_model, copy.deepcopy(small_model))
    assert {(one.distance, one.relative, one.share) for one in parts} == {(0, 0, 0)}
    assert (whole.distance, whole.relative, whole.share) == (0, 0, 0)


def test_what_was_zero_is_relative_to_what_it_became(small_model: HymbaForCausalLM) -> None:
    with torch.no_grad():
        small_model.model.final_layernorm.weight.zero_()
    found = changed_parts(small_model, moved(small_model, "model.final_layernorm.weight"))
    assert found[None, "final norm"].relative == pytest.approx(1, **EXACT)


def test_tiles_change_nothing(small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    after = moved(small_model, "model.layers.0.mamba.in_proj.weight")
    whole = weight_movement(small_model, after)
    monkeypatch.setattr("hymba_align.inside.movement.AT_ONCE", 7)
    for one, other in zip(whole[0], weight_movement(small_model, after)[0], strict=True):
        assert other.distance == pytest.approx(one.distance, **EXACT)
        assert other.parameters == one.parameters


def test_bfloat16_is_compared_as_the_numbers_that_it_holds(small_model: HymbaForCausalLM) -> None:
    after = copy.deepcopy(small_model).to(torch.bfloat16)
    _, whole = weight_movement(small_model, after)
    rounded = [distance(old, new) for old, new in zip(small_model.parameters(), after.parameters(), strict=True)]
    assert whole.distance == pytest.approx(np.linalg.norm(rounded), **EXACT)
    assert 0 < whole.relative < 2**-8


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_beside_the_weights_move_them_as_merged_ones_do(small_model: HymbaForCausalLM, dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["in_proj", "x_proj.0"], init_lora_weights=False, use_dora=dora)
    adapted = get_peft_model(copy.deepcopy(small_model), config)
    found = weight_movement(small_model, adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = weight_movement(small_model, merged)
    assert {(one.part, one.layer is None) for one in found[0] if one.distance} == {("attention", False), ("ssm", False)}
    for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-6)  # the same merge in float32, observed 0
    assert any("lora_A" in name for name, _ in adapted.named_parameters()), "the model itself keeps its adapters"


def test_each_meta_token_has_its_own_movement(small_model: HymbaForCausalLM) -> None:
    before = small_model.model.memory_tokens
    with torch.no_grad():
        before[3].zero_()
    after = copy.deepcopy(small_model)
    with torch.no_grad():
        after.model.memory_tokens[1] *= -2
        after.model.memory_tokens[2, 0] += 1
        after.model.memory_tokens[3] += 1
    old, new = (tokens.detach().double().numpy() for tokens in (before, after.model.memory_tokens))
    found = meta_movement(small_model, after)
    assert [one.token for one in found] == [0, 1, 2, 3, 4]
    for one, row, other in zip(found, old, new, strict=True):
        assert one.distance == pytest.approx(np.linalg.norm(other - row), **EXACT)
    assert (found[0].distance, found[0].relative) == (0, 0)
    assert (found[1].relative, found[1].cosine) == (pytest.approx(3, **EXACT), pytest.approx(-1, **EXACT))
    cosine = old[2] @ new[2] / np.linalg.norm(old[2]) / np.linalg.norm(new[2])
    assert found[2].cosine == pytest.approx(cosine, **EXACT)
    assert (found[3].relative, found[3].cosine) == (pytest.approx(1, **EXACT), 0)


def test_checkpoints_of_other_shapes_are_refused_by_the_first_key_that_differs(small_config: HymbaConfig) -> None:
    other = HymbaConfig(**{**small_config.to_dict(), "kv_reuse_group": [[1, 2]], "sliding_window": 9})
    with pytest.raises(CheckpointError) as error:
        check_comparable(small_config, other, "runs/a/sft/final", "runs/b/sft/final")
    assert str(error.value) == (
        "runs/b/sft/final and runs/a/sft/final cannot be compared: kv_reuse_group is [[1, 2]] in the one and [[1, 2, 3]] in "
        "the other; compare checkpoints of one shape, such as the stages of one run"
    )
    check_comparable(small_config, HymbaConfig(**{**small_config.to_dict(), "sliding_window": 9}))
