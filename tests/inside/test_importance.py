"""Importance by the loss: to the bit what the hook gives, beside a dense model in float64, with errors that are right."""

from __future__ import annotations

import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from hymba_align.errors import DataError
from hymba_align.inside import importance
from hymba_align.inside.importance import _every_removal, _Stack, measure_loss_importance, measured, scorings
from hymba_align.inside.result import Importance, Measured
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.model import HymbaForCausalLM, without_branch

TINY = Path(__file__).parent.parent / "golden" / "tiny"
Dense = runpy.run_path(str(Path(__file__).with_name("dense.py")))["Dense"]


@pytest.fixture(scope="module")
def tiny() -> HymbaForCausalLM:
    return HymbaForCausalLM.from_pretrained(TINY).eval()


def documents(*lengths: int, unscored: int = 0, vocabulary: int = 257) -> list[Document]:
    """Random tokens, of which so many at the beginning are not under the loss."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [
        Document(str(number), tuple(ids), tuple(place >= unscored for place in range(len(ids))))
        for number, ids in enumerate(made)
    ]


def changes(found: Importance) -> dict[tuple[int, str], float]:
    return {
        (layer.layer, branch): getattr(layer, branch).change.mean
        for layer in found.layers
        for branch in ("attention", "ssm")
    }


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_removal_has_the_bits_of_the_model_that_runs_whole_without_the_branch(
    small_model: HymbaForCausalLM, dtype: torch.dtype
) -> None:
    hymba = small_model.to(dtype).model
    [row] = pack_rows(documents(11, 1, 9, vocabulary=61), 50)

    def run_whole() -> Tensor:
        return hymba(input_ids=row.input_ids[None], segments=row.tree, use_cache=False).last_hidden_state[0]

    with torch.no_grad():
        found = dict(_every_removal(hymba, row))
        assert torch.equal(found.pop(None), run_whole())
        assert list(found) == [(layer, branch) for layer in range(5) for branch in ("attention", "ssm")]
        for (layer, branch), hidden in found.items():  # type: ignore[misc]
            with without_branch(hymba, layer, branch):
                assert torch.equal(hidden, run_whole())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hymba.modules())


def test_keys_and_values_are_held_as_long_as_a_later_layer_reads_them(
    small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, list[int]] = {}
    run = _Stack.run

    def listening(stack: _Stack, x_LD: Tensor, made: Any, first: int, end: int) -> Tensor:
        x_LD = run(stack, x_LD, made, first, end)
        held[end - 1] = sorted(made)
        return x_LD

    monkeypatch.setattr(_Stack, "run", listening)
    measure_loss_importance(small_model, pack_rows(documents(6, vocabulary=61), 50))
    assert small_model.config.kv_reuse_group == [[1, 2, 3]]
    assert held == {0: [], 1: [1], 2: [1], 3: [], 4: []}


def test_losses_match_the_dense_reference(tiny: HymbaForCausalLM) -> None:
    given = documents(9, 7, unscored=3)

    def dense_loss(*removed: tuple[int, str]) -> float:
        dense, losses = Dense.of(tiny, *removed), []
        for document in given:
            log_probs = dense.log_probs(list(document.token_ids))
            places = range(3, len(document.token_ids))
            losses += [-float(log_probs[place - 1, document.token_ids[place]]) for place in places]
        return sum(losses) / len(losses)

    found = measure_loss_importance(tiny, pack_rows(given, 50))

    close = {"abs": 1e-5, "rel": 0}  # float32, observed 1.4e-6
    whole = dense_loss()
    assert found.whole.mean == pytest.approx(whole, **close)
    for layer in found.layers:
        without_attention, without_ssm = (dense_loss((layer.layer, branch)) for branch in ("attention", "ssm"))
        assert layer.attention.score == pytest.approx(without_attention, **close)
        assert layer.ssm.score == pytest.approx(without_ssm, **close)
        assert layer.attention.change.mean == pytest.approx(without_attention - whole, **close)
        assert layer.ssm.change.mean == pytest.approx(without_ssm - whole, **close)
        assert layer.difference.mean == pytest.approx(without_ssm - without_attention, **close)
    assert min(map(abs, changes(found).values())) > 2e-4  # each is told from none
    assert (found.n, found.documents, found.chance) == (10, 2, math.log(257))
    assert (found.metric, found.unit, found.lower_is_better) == ("loss", "nats per token", True)
    assert [layer.is_global for layer in found.layers] == [True, False, False, True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_model_s_loss_is_the_one_that_training_shows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = HymbaForCausalLM.from_pretrained(TINY, dtype=dtype).eval()
    monkeypatch.setattr(importance, "LOGITS_AT_ONCE", 5 * 257)  # of 5 tokens, so that documents lie across tiles
    [row] = pack_rows(documents(12, 1, 20, unscored=3), 50)
    wanted = tiny(row.input_ids[None], labels=row.labels[None], segments=row.tree).loss
    assert measure_loss_importance(tiny, [row]).whole.mean == pytest.approx(float(wanted), rel=1e-6)


def test_a_model_in_bfloat16_has_the_changes_of_float32_within_its_precision(tiny: HymbaForCausalLM) -> None:
    given = documents(40, 30)
    model = HymbaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    found, wanted = (changes(measure_loss_importance(one, pack_rows(given, 99))) for one in (model, tiny))
    off = [found[removed] - wanted[removed] for removed in wanted]
    assert max(map(abs, off)) < 3e-2  # bfloat16, observed 1.1e-2 on changes of -0.21 to 0.05
    assert abs(sum(off)) / len(off) < 8e-3  # observed 2.6e-3


def test_a_wrapped_model_is_measured_with_its_adapters(small_model: HymbaForCausalLM) -> None:
    given = documents(11, 8, vocabulary=61)
    plain = changes(measure_loss_importance(small_model, pack_rows(given, 50)))
    torch.manual_seed(1)
    wrapped = get_peft_model(
        small_model, LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    ).eval()
    found = changes(measure_loss_importance(wrapped, pack_rows(given, 50)))
    merged = changes(measure_loss_importance(wrapped.merge_and_unload(), pack_rows(given, 50)))
    assert found == pytest.approx(merged, abs=1e-5)  # float32, observed 5e-7
    assert found != pytest.approx(plain, abs=1e-3)


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_rows_make_no_difference_and_each_of_their_scorings_is_told(small_model: HymbaForCausalLM) -> None:
    given = documents(11, 7, 9, 3, vocabulary=61)
    told: Counter[str] = Counter()
    found = [
        measure_loss_importance(small_model, pack_rows(given, size), scored=lambda size=size: told.update([str(size)]))  # type: ignore[misc]
        for size in (1, 18, 50)  # two documents fill a row of 18
    ]
    assert scorings(small_model) == 11
    assert told == {"1": 4 * 11, "18": 2 * 11, "50": 11}
    for one in found[1:]:
        assert changes(one) == pytest.approx(changes(found[0]), abs=1e-5)  # float32, observed 6e-8
        assert one.whole.stderr == pytest.approx(found[0].whole.stderr, rel=1e-4)


def test_documents_without_a_token_under_the_loss_do_not_count(small_model: HymbaForCausalLM) -> None:
    given = documents(11, 7, vocabulary=61)
    silent = documents(5, 1, unscored=5, vocabulary=61) + documents(1, vocabulary=61)  # a first token is not predicted
    found = measure_loss_importance(small_model, pack_rows([silent[0], given[0], *silent[1:], given[1]], 50))
    wanted = measure_loss_importance(small_model, pack_rows(given, 50))
    assert (found.n, found.documents) == (wanted.n, wanted.documents) == (16, 2)
    assert changes(found) == pytest.approx(changes(wanted), abs=1e-5)
    assert found.whole.stderr == pytest.approx(wanted.whole.stderr, rel=1e-4)


def test_without_a_token_under_the_loss_there_is_an_error(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(DataError) as caught:
        measure_loss_importance(small_model, pack_rows(documents(5, 4, unscored=5, vocabulary=61), 50))
    assert str(caught.value) == (
        "none of the 2 documents has a token under the loss behind its first one, so that the model has no loss on them; "
        "give documents with text of the assistant, or plain text"
    )


# ---- standard errors -------------------------------------------------------------------------------------------------


def test_of_documents_of_one_length_the_error_is_that_of_the_mean_of_their_means() -> None:
    means = np.array([1.0, 2.0, 4.0, 4.5])
    found = measured(7 * means, np.full(4, 7.0))
    assert found.mean == pytest.approx(means.mean())
    assert found.stderr == pytest.approx(means.std(ddof=1) / 2)


def test_of_documents_of_many_lengths_the_error_is_the_spread_of_repeated_samples() -> None:
    random = np.random.default_rng(0)

    def sample() -> Measured:
        tokens = random.integers(5, 60, 200).astype(np.float64)
        return measured(tokens * random.normal(2.0, 0.5, 200), tokens)

    found = [sample() for _ in range(2000)]
    spread = np.std([one.mean for one in found])
    assert np.mean([one.stderr for one in found]) == pytest.approx(spread, rel=0.05)  # observed 0.5 % off
    assert np.mean([one.mean for one in found]) == pytest.approx(2.0, abs=0.005)


def test_a_single_document_has_no_error() -> None:
    assert measured(np.array([6.0]), np.array([3.0])) == Measured(2.0, None)


def test_errors_are_paired_over_documents(small_model: HymbaForCausalLM) -> None:
    given = documents(11, 7, 9, 5, vocabulary=61)
    found = measure_loss_importance(small_model, pack_rows(given, 50))
    alone = [measure_loss_importance(small_model, pack_rows([one], 50)) for one in given]
    tokens = np.array([float(one.n) for one in alone])
    for layer in found.layers:
        for name, value in (
            ("attention", lambda one: one.attention.change),
            ("ssm", lambda one: one.ssm.change),
            ("difference", lambda one: one.difference),
        ):
            means: Any = np.array([value(one.layers[layer.layer]).mean for one in alone])  # type: ignore[no-untyped-call]
            wanted = measured(means * tokens, tokens)
            ours = layer.difference if name == "difference" else getattr(layer, name).change
            assert ours.mean == pytest.approx(wanted.mean, abs=1e-5)
            assert ours.stderr == pytest.approx(wanted.stderr, rel=1e-2)
            assert ours.stderr is not None
    unpaired = math.hypot(found.whole.stderr or 0, found.whole.stderr or 0)
    assert min(layer.attention.change.stderr or 0 for layer in found.layers) < unpaired / 2


def test_gradients_and_the_mode_are_left_alone(small_model: HymbaForCausalLM) -> None:
    small_model.train()
    before = {name: x.clone() for name, x in small_model.state_dict().items()}
    measure_loss_importance(small_model, pack_rows(documents(6, vocabulary=61), 50))
    assert small_model.training
    assert all(x.grad is None for x in small_model.parameters())
    for name, x in small_model.state_dict().items():
        assert_close(x, before[name], atol=0, rtol=0)
