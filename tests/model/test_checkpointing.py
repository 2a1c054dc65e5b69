"""Activations recomputed layer by layer: the same gradients to the bit, from little that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_align.model import HymbaForCausalLM, SegmentTree


def tokens(batch: int, columns: int) -> Tensor:
    return torch.randint(3, 61, (batch, columns), generator=torch.Generator().manual_seed(3))


def packed() -> dict[str, Any]:
    ids = tokens(1, 60)
    return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": torch.tensor([0, 21, 22, 60])}


def tree() -> dict[str, Any]:
    ids = tokens(1, 60)
    return {"input_ids": ids, "labels": ids, "segments": SegmentTree([16, 20, 2, 22], [-1, 0, 0, 2])}


def preference() -> dict[str, Any]:
    ids = tokens(4, 17)
    ids[2:, :9] = ids[:2, :9]
    mask = torch.ones_like(ids)
    mask[3, 13:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "shared_prefix_lengths": torch.tensor([9, 4])}


FORMS = [packed, tree, preference]


def gradients(model: HymbaForCausalLM, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_equal_to_the_bit_in_every_form_of_row(
    small_model: HymbaForCausalLM, form: Any, reentrant: bool, lean: bool
) -> None:
    inputs = form() | {"return_logits": not lean}
    small_model.train()
    plain = gradients(small_model, inputs)
    runs = [0] * len(small_model.model.layers)  # the layers 1 to 3 share keys and values

    def count(layer: int) -> Any:
        def add(*_: Any) -> None:
            runs[layer] += 1

        return add

    for index, layer in enumerate(small_model.model.layers):
        layer.mamba.register_forward_pre_hook(count(index))
    small_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients(small_model, inputs)
    assert runs == [2] * len(runs)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(recomputed[name], gradient), name


def saved_between_passes(model: HymbaForCausalLM, inputs: dict[str, Any]) -> int:
    """Bytes of different tensors, parameters apart, that the forward pass keeps for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    holders: list[Tensor] = []  # or a freed tensor's address would come back as another's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            holders.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(kept.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_kept_for_the_backward_pass_is_little_more_than_each_layers_input(
    small_model: HymbaForCausalLM, reentrant: bool
) -> None:
    inputs = packed() | {"return_logits": False}
    small_model.train()
    everything = saved_between_passes(small_model, inputs)
    small_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    little = saved_between_passes(small_model, inputs)
    config = small_model.config
    row = (config.num_memory_tokens + 60) * 4
    inputs_of_layers = config.num_hidden_layers * row * config.hidden_size
    consumers = 2 * row * config.num_key_value_heads * (config.head_dim + config.v_head_dim)
    beyond_the_layers = row * 3 * config.hidden_size + 60 * 4 * 3 * config.vocab_size
    assert inputs_of_layers < little < inputs_of_layers + consumers + beyond_the_layers
    assert little < 0.25 * everything


def test_evaluation_recomputes_nothing(small_model: HymbaForCausalLM) -> None:
    small_model.activation_checkpointing_enable()
    small_model.eval()
    runs: list[int] = []
    small_model.model.layers[0].mamba.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(small_model, packed())
    assert len(runs) == 1
