"""The fusion's numbers beside a dense model in float64, and beside models whose scales are known."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hymba_align.inside import fusion
from hymba_align.inside.fusion import measure_fusion
from hymba_align.inside.observing import ObservedFusion, observe
from hymba_align.inside.result import Fusion
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.model import HymbaForCausalLM

TINY = Path(__file__).parent.parent / "golden" / "tiny"
Dense = runpy.run_path(str(Path(__file__).with_name("dense.py")))["Dense"]


@pytest.fixture
def tiny() -> HymbaForCausalLM:
    """Learned scales that differ from 1 and between branches, as training leaves them."""
    model = HymbaForCausalLM.from_pretrained(TINY).eval()
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for norm, mean in ((layer.mamba.pre_avg_layernorm1, 0.7), (layer.mamba.pre_avg_layernorm2, 1.4)):
            nn.init.normal_(norm.weight, mean, 0.3, generator=generator)
    return model


def documents(*lengths: int) -> list[Document]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, 257, (length,), generator=generator).tolist() for length in lengths]
    return [Document(str(number), tuple(ids), (True,) * len(ids)) for number, ids in enumerate(made)]


def numbers(found: Fusion) -> list[list[float]]:
    """Of every layer, in the order of `dense_numbers`."""
    rows = []
    for one in found.layers:
        sizes = [
            (size.before, size.after, size.scale, size.scale_min, size.scale_max) for size in (one.attention, one.ssm)
        ]
        rows.append([*sizes[0], *sizes[1], one.cosine, one.ssm_share])
    return rows


def dense_numbers(model: HymbaForCausalLM, given: list[Document]) -> list[list[float]]:
    """Of a dense model in float64."""
    dense = Dense.of(model)
    runs = []
    for document in given:
        dense.run(list(document.token_ids))
        runs.append(dict(dense.fused))
    meta = model.config.num_memory_tokens
    branches = [
        [
            torch.cat([run[layer, branch][side][meta:] for run in runs])
            for branch in ("attention", "ssm")
            for side in (0, 1)
        ]
        for layer in range(model.config.num_hidden_layers)
    ]
    return by_definition(model, branches)


def by_definition(model: HymbaForCausalLM, branches: list[list[Tensor]]) -> list[list[float]]:
    """Token for token in float64, of each layer's branches (T, I): attention before and behind its norm, SSM likewise."""
    rows = []
    for layer, parts in enumerate(branches):
        a, a_normed, y, y_normed = (x.double() for x in parts)
        row: list[Any] = []
        for before, after, number in ((a, a_normed, 1), (y, y_normed, 2)):
            scale = getattr(model.model.layers[layer].mamba, f"pre_avg_layernorm{number}").weight.detach().double()
            sizes = [sum(float((t @ t / len(t)).sqrt()) for t in x) / len(x) for x in (before, after)]
            row += [*sizes, (scale @ scale / len(scale)).sqrt(), scale.min(), scale.max()]
        row.append(sum(float(s @ t / (s.norm() * t.norm())) for s, t in zip(a_normed, y_normed, strict=True)) / len(a))
        row.append(sum(float(t @ t / (s @ s + t @ t)) for s, t in zip(a_normed, y_normed, strict=True)) / len(a))
        rows.append([float(one) for one in row])
    return rows


def near(found: Fusion, wanted: list[list[float]], *, rel: float, abs: float) -> None:
    for ours, theirs in zip(numbers(found), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=abs)


def test_all_numbers_match_the_dense_reference_over_text_tokens_alone(
    tiny: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "TOKENS_AT_ONCE", 7)  # a part that is not full remains
    given = documents(1, 17, 24)

    found = measure_fusion(tiny, pack_rows(given, 30))

    near(found, dense_numbers(tiny, given), rel=1e-5, abs=1e-6)  # float32, observed 1e-6 and 1e-7
    assert found.tokens == 42
    assert [(layer.layer, layer.is_global) for layer in found.layers] == [
        (0, True), (1, False), (2, False), (3, True), (4, False), (5, True),
    ]  # fmt: skip


def test_a_model_in_bfloat16_has_the_numbers_of_the_reference_within_its_precision(tiny: HymbaForCausalLM) -> None:
    model, given = tiny.to(torch.bfloat16), documents(20, 9)
    found = measure_fusion(model, pack_rows(given, 99))
    near(found, dense_numbers(model, given), rel=4e-2, abs=4e-3)  # observed 2e-2 (SSM heads before the norm) and 1e-3


@torch.no_grad()
def test_what_a_model_in_bfloat16_computes_is_added_up_in_full_precision(tiny: HymbaForCausalLM) -> None:
    model, given = tiny.to(torch.bfloat16), documents(20)
    branches: list[list[Tensor]] = []

    def keep(seen: ObservedFusion) -> None:
        four = (seen.attention, seen.attention_normed, seen.ssm, seen.ssm_normed)
        branches.append([x[seen.row.meta_tokens :].clone() for x in four])

    with observe(model, fusion=keep):
        model(torch.tensor([given[0].token_ids]))

    found = measure_fusion(model, pack_rows(given, 99))

    near(found, by_definition(model, branches), rel=2e-6, abs=1e-7)  # float32, observed 2e-7 and 2e-8


def test_a_larger_scale_makes_a_branch_larger_behind_its_norm_alone(tiny: HymbaForCausalLM) -> None:
    given = documents(12)
    before = measure_fusion(tiny, pack_rows(given, 99)).layers[0]
    with torch.no_grad():
        tiny.model.layers[0].mamba.pre_avg_layernorm2.weight *= 3
    after = measure_fusion(tiny, pack_rows(given, 99)).layers[0]
    assert after.attention == before.attention
    assert after.ssm.before == before.ssm.before
    assert after.ssm.after == pytest.approx(3 * before.ssm.after)
    assert after.ssm.scale == pytest.approx(3 * before.ssm.scale)
    assert after.cosine == pytest.approx(before.cosine, abs=1e-6)
    assert after.ssm_share > before.ssm_share


def test_branches_of_zero_are_of_one_size(tiny: HymbaForCausalLM) -> None:
    nn.init.zeros_(tiny.model.layers[1].mamba.pre_avg_layernorm1.weight)
    only_ssm = measure_fusion(tiny, pack_rows(documents(8), 99)).layers[1]
    nn.init.zeros_(tiny.model.layers[1].mamba.pre_avg_layernorm2.weight)
    neither = measure_fusion(tiny, pack_rows(documents(8), 99)).layers[1]
    assert (only_ssm.attention.after, only_ssm.cosine, only_ssm.ssm_share) == (0, 0, 1)
    assert (neither.ssm.after, neither.cosine, neither.ssm_share) == (0, 0, 0.5)


@pytest.mark.parametrize("norms", [None, ["pre_avg_layernorm1", "pre_avg_layernorm2"]])
def test_a_wrapped_model_is_measured_with_its_adapters(tiny: HymbaForCausalLM, norms: list[str] | None) -> None:
    given = documents(11, 6)
    plain = numbers(measure_fusion(tiny, pack_rows(given, 99)))
    config = LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False, modules_to_save=norms)
    torch.manual_seed(1)
    wrapped = get_peft_model(tiny, config).eval()
    if norms:
        for name, weight in wrapped.named_parameters():
            if "pre_avg" in name and "modules_to_save" in name:
                nn.init.constant_(weight, 2.0)

    found = numbers(measure_fusion(wrapped, pack_rows(given, 99)))

    merged = numbers(measure_fusion(wrapped.merge_and_unload(), pack_rows(given, 99)))
    for ours, theirs, before in zip(found, merged, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)  # float32, observed 1e-5 and 2e-6
        assert ours != pytest.approx(before, rel=1e-3)


def test_no_rows_are_an_error(tiny: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError) as caught:
        measure_fusion(tiny, [])
    assert str(caught.value) == "there are no rows, so there is no fusion to measure; give at least one document"
