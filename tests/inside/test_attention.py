"""Attention statistics beside a dense model in float64, one sequence at a time: no blocks, no tree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dense import Dense
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from hymba_align.inside import weights
from hymba_align.inside.attention import QUANTITIES, measure_attention
from hymba_align.inside.result import Attention, Shares
from hymba_align.inside.rows import Document, Row, pack_rows
from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree

TINY = Path(__file__).parent.parent / "golden" / "tiny"
BOS = 1
CLOSE = {"atol": 3e-6, "rtol": 0}  # float32 beside float64 through six layers, observed 5e-7


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="session")
def tiny() -> HymbaForCausalLM:
    return HymbaForCausalLM.from_pretrained(TINY).eval()


def documents(lengths: list[int], *, bos: list[bool] | None = None, vocabulary: int = 257) -> list[Document]:
    """Random tokens that are not `<s>`, but for the first ones where `bos` says so and one in the middle of the longest."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        if bos is not None and bos[number]:
            ids[0] = BOS
        if length == max(lengths):
            ids[length // 2] = BOS
        made.append(Document(f"document {number}", tuple(ids), (True,) * length))
    return made


def dense_shares(dense: Dense, paths: list[tuple[list[int], int]]) -> Tensor:
    """(layers, H, 6) means over tokens, one token at a time.

    Args:
        paths: tokens of each path, and how many of its last ones are counted.
    """
    c = dense.config
    meta = c.num_memory_tokens
    sums = torch.zeros(c.num_hidden_layers, c.num_attention_heads, len(QUANTITIES), dtype=torch.float64)
    for ids, counted in paths:
        for layer, attention in enumerate(dense.run(ids)[1]):
            for token in range(meta + len(ids) - counted, meta + len(ids)):
                row = attention[:, token]
                others = range(meta, token)
                first = [meta] if ids[0] == BOS and token > meta else []
                seen = int((row[0] > 0).sum())
                sums[layer, :, 0] += row[:, :meta].sum(-1)
                sums[layer, :, 1] += row[:, first].sum(-1)
                sums[layer, :, 2] += row[:, token]
                sums[layer, :, 3] += row[:, [key for key in others if key not in first]].sum(-1)
                sums[layer, :, 4] -= torch.where(row > 0, row * row.clamp(min=1e-300).log(), 0).sum(-1)
                sums[layer, :, 5] += math.log(seen)
    return sums / sum(counted for _, counted in paths)


def as_tensor(attention: Attention) -> Tensor:
    """(layers, H, 6)"""
    return torch.tensor([[values(head) for head in layer.heads] for layer in attention.layers], dtype=torch.float64)


def values(shares: Shares) -> list[float]:
    return [getattr(shares, name) for name in QUANTITIES]


# --- Exactness --------------------------------------------------------------------------------------------------------


def test_the_reference_itself_computes_what_the_released_code_does(
    golden: dict[str, Tensor], tiny: HymbaForCausalLM
) -> None:
    inputs, _ = Dense.of(tiny).run(golden["batch.input_ids"][0].tolist())
    for layer, x in enumerate(inputs):
        assert_close(x.float(), golden[f"batch.hidden_states.{layer}"][0], atol=1e-4, rtol=0)  # float32, observed 3e-5


def test_shares_and_entropies_of_every_head_match_the_dense_reference(tiny: HymbaForCausalLM) -> None:
    lengths, bos = [1, 16, 17, 18, 40], [True, False, True, True, True]  # the window is 16
    given = documents(lengths, bos=bos)
    wanted = dense_shares(Dense.of(tiny), [(list(one.token_ids), len(one.token_ids)) for one in given])

    found = measure_attention(tiny, pack_rows(given, 60), bos_token_id=BOS)

    assert_close(as_tensor(found), wanted, **CLOSE)
    assert (found.tokens, found.documents, found.longest, found.documents_with_bos) == (92, 5, 40, 4)
    assert [layer.is_global for layer in found.layers] == [True, False, False, True, False, True]
    assert [layer.kv_source for layer in found.layers] == [0, 1, 1, 3, 4, 5]
    assert wanted[:, :, 1].min() > 0.01  # `<s>` draws enough to be told from none


def test_in_a_tree_every_token_counts_once_and_looks_along_its_path(tiny: HymbaForCausalLM) -> None:
    lengths, parents = [20, 9, 12, 3], [-1, 0, 0, 2]
    ids = documents([44], bos=[True])[0].token_ids
    tree = SegmentTree(torch.tensor(lengths), torch.tensor(parents))
    parts = [list(part) for part in torch.tensor(ids).split(lengths)]
    parts = [[int(token) for token in part] for part in parts]
    paths = [
        (parts[0], 20),
        (parts[0] + parts[1], 9),
        (parts[0] + parts[2], 12),
        (parts[0] + parts[2] + parts[3], 3),
    ]
    whole = Document("tree", ids, (True,) * 44)
    row = Row(torch.tensor(ids), torch.tensor(ids), tree, (whole,) * 4)

    found = measure_attention(tiny, [row], bos_token_id=BOS)

    assert_close(as_tensor(found), dense_shares(Dense.of(tiny), paths), **CLOSE)
    assert (found.tokens, found.longest, found.documents_with_bos) == (44, 35, 4)


def test_a_model_in_bfloat16_has_the_shares_of_the_reference_within_its_precision(tiny: HymbaForCausalLM) -> None:
    given = documents([30, 12], bos=[True, True])
    model = HymbaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    wanted = dense_shares(Dense.of(model), [(list(one.token_ids), len(one.token_ids)) for one in given])

    found = measure_attention(model, pack_rows(given, 100), bos_token_id=BOS)

    assert_close(as_tensor(found)[..., :4], wanted[..., :4], atol=1.5e-2, rtol=0)  # bfloat16, observed 4e-3
    assert_close(as_tensor(found)[..., 4:], wanted[..., 4:], atol=3e-2, rtol=0)  # bfloat16, observed 8e-3


def test_shares_add_up_to_1(tiny: HymbaForCausalLM) -> None:
    found = measure_attention(tiny, pack_rows(documents([33, 5, 21], bos=[True, False, True]), 100), bos_token_id=BOS)
    assert_close(as_tensor(found)[..., :4].sum(-1), torch.ones(6, 5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_where_every_query_is_zero_attention_is_even_and_shares_are_counts(tiny: HymbaForCausalLM) -> None:
    model = HymbaForCausalLM.from_pretrained(TINY).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mamba.in_proj.weight[: layer.mamba.splits[0]] = 0

    found = measure_attention(model, pack_rows(documents([20], bos=[True]), 50), bos_token_id=BOS)

    window, meta = 16, 8
    for layer in found.layers:
        seen = [place + 1 if layer.is_global else min(place + 1, window + 1) for place in range(20)]
        bos = [place > 0 and (layer.is_global or place <= window) for place in range(20)]
        wanted = Shares(
            meta=sum(meta / (meta + one) for one in seen) / 20,
            bos=sum(first / (meta + one) for first, one in zip(bos, seen, strict=True)) / 20,
            self=sum(1 / (meta + one) for one in seen) / 20,
            cross=sum((one - 1 - first) / (meta + one) for first, one in zip(bos, seen, strict=True)) / 20,
            entropy=sum(math.log(meta + one) for one in seen) / 20,
            even_entropy=sum(math.log(meta + one) for one in seen) / 20,
        )
        assert values(layer.mean) == pytest.approx(values(wanted), abs=1e-6)  # float32, observed 3e-8


# --- What is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_row", [1, 30, 200])
def test_rows_make_no_difference(tiny: HymbaForCausalLM, tokens_per_row: int) -> None:
    given = documents([18, 2, 25, 9], bos=[True, False, True, True])
    alone = measure_attention(tiny, pack_rows(given[::-1], 1), bos_token_id=BOS)

    found = measure_attention(tiny, pack_rows(given, tokens_per_row), bos_token_id=BOS)

    assert_close(as_tensor(found), as_tensor(alone), atol=2e-6, rtol=0)  # float32, observed 2e-8


def test_heads_that_come_one_at_a_time_make_no_difference(
    tiny: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = documents([30, 12], bos=[True, False])
    wanted = measure_attention(tiny, pack_rows(given, 60), bos_token_id=BOS)
    monkeypatch.setattr(weights, "WEIGHTS_AT_ONCE", 1)
    found = measure_attention(tiny, pack_rows(given, 60), bos_token_id=BOS)
    assert_close(as_tensor(found), as_tensor(wanted), atol=2e-6, rtol=0)  # float32, observed 0


def test_layers_and_the_whole_are_means_and_global_and_local_layers_stand_apart(tiny: HymbaForCausalLM) -> None:
    found = measure_attention(tiny, pack_rows(documents([30]), 100), bos_token_id=BOS)
    heads = as_tensor(found)

    def kind(is_global: bool) -> Tensor:
        return heads[[layer.layer for layer in found.layers if layer.is_global is is_global]].mean((0, 1))

    for layer in found.layers:
        assert values(layer.mean) == pytest.approx(heads[layer.layer].mean(0).tolist())
    assert found.global_layers is not None
    assert found.local_layers is not None
    assert values(found.all_layers) == pytest.approx(heads.mean((0, 1)).tolist())
    assert values(found.global_layers) == pytest.approx(kind(True).tolist())
    assert values(found.local_layers) == pytest.approx(kind(False).tolist())


def test_a_model_of_local_layers_only_has_no_global_mean(small_config: HymbaConfig) -> None:
    config = HymbaConfig(**{**small_config.to_diff_dict(), "global_attn_idx": [], "kv_reuse_group": []})
    model = HymbaForCausalLM(config).eval()
    found = measure_attention(model, pack_rows(documents([9], vocabulary=61), 10), bos_token_id=BOS)
    assert found.global_layers is None
    assert found.local_layers == found.all_layers


@pytest.mark.parametrize("bos_token_id", [None, 2])
def test_without_a_first_bos_its_share_is_0_and_counts_as_cross(
    tiny: HymbaForCausalLM, bos_token_id: int | None
) -> None:
    given = documents([30], bos=[True])
    with_bos = measure_attention(tiny, pack_rows(given, 100), bos_token_id=BOS)
    without = measure_attention(tiny, pack_rows(given, 100), bos_token_id=bos_token_id)

    assert without.documents_with_bos == 0
    assert all(head.bos == 0 for layer in without.layers for head in layer.heads)
    assert without.all_layers.cross == pytest.approx(with_bos.all_layers.cross + with_bos.all_layers.bos)


def test_no_rows_are_an_error(tiny: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError) as caught:
        measure_attention(tiny, pack_rows([], 10), bos_token_id=BOS)
    assert str(caught.value) == ("there are no rows, so there is no attention to measure; give at least one document")
