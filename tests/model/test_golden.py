"""Parity with what NVIDIA's released code computes (tests/golden/tiny), float32 on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model import HymbaForCausalLM

LOGITS = {"atol": 5e-5, "rtol": 0}  # observed 1.3e-5; a plain textbook implementation reaches 1.1e-5
HIDDEN = {"atol": 1e-4, "rtol": 0}  # observed 3.1e-5; a plain textbook implementation reaches 2.3e-5


def pack(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    positions = [torch.arange(len(document)) for document in documents]
    return torch.cat(documents)[None], torch.cat(positions)[None]


def test_logits_and_every_hidden_state_match_the_released_code(
    golden: dict[str, Tensor], golden_model: HymbaForCausalLM
) -> None:
    meta = golden_model.config.num_memory_tokens
    layer_inputs: list[Tensor] = []
    for layer in golden_model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0].detach()))
    with torch.no_grad():
        output = golden_model(golden["batch.input_ids"], output_hidden_states=True)

    assert_close(output.logits, golden["batch.logits"], **LOGITS)
    assert len(output.hidden_states) == 7
    for index, state in enumerate(output.hidden_states):
        assert_close(state, golden[f"batch.hidden_states.{index}"][:, meta:], **HIDDEN)
    for index, layer_input in enumerate(layer_inputs):
        assert_close(layer_input[:meta], golden[f"batch.hidden_states.{index}"][0, :meta], **HIDDEN)


@pytest.mark.parametrize("order", list(itertools.permutations(range(6)))[::103])
def test_documents_packed_in_any_order_match_each_document_alone(
    golden: dict[str, Tensor], golden_model: HymbaForCausalLM, golden_documents: list[Tensor], order: tuple[int, ...]
) -> None:
    ids, positions = pack([golden_documents[i] for i in order])
    with torch.no_grad():
        logits = golden_model(ids, position_ids=positions).logits[0]
    for i, found in zip(order, logits.split([len(golden_documents[i]) for i in order]), strict=True):
        assert_close(found, golden[f"docs.{i}.logits"], **LOGITS)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_documents_in_a_padded_batch_match_each_document_alone(
    golden: dict[str, Tensor],
    golden_model: HymbaForCausalLM,
    golden_documents: list[Tensor],
    pad: Callable[[list[Tensor], str], tuple[Tensor, Tensor]],
    side: str,
) -> None:
    ids, mask = pad(golden_documents, side)
    with torch.no_grad():
        logits = golden_model(ids, attention_mask=mask).logits
    for i in range(6):
        assert_close(logits[i, mask[i].bool()], golden[f"docs.{i}.logits"], **LOGITS)


def test_loss_and_every_gradient_of_the_packed_row_match_the_released_code(
    golden: dict[str, Tensor], golden_model: HymbaForCausalLM, golden_documents: list[Tensor]
) -> None:
    ids, positions = pack(golden_documents)
    loss = golden_model(ids, position_ids=positions, labels=ids).loss
    loss.backward()

    assert_close(loss.detach(), golden["docs.mean_nll"], atol=0, rtol=1e-5)  # observed 1.5e-7
    parameters = dict(golden_model.named_parameters())
    assert {f"docs.grad.{name}" for name in parameters} == {key for key in golden if key.startswith("docs.grad.")}
    for name, parameter in parameters.items():
        expected = golden[f"docs.grad.{name}"]
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name  # observed 1.1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_decoding_matches_token_for_token_alone(
    golden: dict[str, Tensor], golden_model: HymbaForCausalLM, use_cache: bool
) -> None:
    golden_model.config.sliding_window = int(golden["generate.sliding_window"])
    for i in range(3):
        output = golden_model.generate(
            golden[f"generate.{i}.input_ids"][None],
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
        )
        assert output[0].tolist() == golden[f"generate.{i}.output_ids"].tolist()


@pytest.mark.parametrize("side", ["left", "mixed"])
def test_greedy_decoding_matches_token_for_token_as_one_batch(
    golden: dict[str, Tensor],
    golden_model: HymbaForCausalLM,
    pad: Callable[[list[Tensor], str], tuple[Tensor, Tensor]],
    side: str,
) -> None:
    golden_model.config.sliding_window = int(golden["generate.sliding_window"])
    prompts = [golden[f"generate.{i}.input_ids"] for i in range(3)]
    ids, mask = pad(prompts, side)
    if side == "mixed":  # transformers' generate reads the last column only, so it wants left padding
        output = decode_by_hand(golden_model, ids, mask, 24)
    else:
        output = golden_model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)[
            :, -24:
        ]
    for i, prompt in enumerate(prompts):
        assert output[i].tolist() == golden[f"generate.{i}.output_ids"][len(prompt) :].tolist()


def decode_by_hand(model: HymbaForCausalLM, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy decoding with the cache from a batch padded on any side: (B, steps)."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        tokens = [output.logits[torch.arange(len(ids)), last].argmax(-1)]
        for _ in range(steps - 1):
            output = model(tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
            tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)
