"""The model as one process can run it alone, while any engine trains it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hymba_align.model import HymbaForCausalLM
from hymba_align.train.random_states import random_states, set_random_states


@contextlib.contextmanager
def whole_model(model: nn.Module, device: torch.device) -> Iterator[HymbaForCausalLM]:
    """The Hymba within `model`, ready to generate; every process takes part.

    Nobody waits for another one within, so processes may run it differently often. Where an engine divides the weights
    (ZeRO-3, FSDP2), each process has a copy of them until the end: as much memory as the weights take. Otherwise it is the
    model that trains. Weights keep their type, without autocast, as scoring `final` has them. Training goes on as if
    nothing had been: modes and random numbers are put back.
    """
    (trained,) = (module for module in model.modules() if isinstance(module, HymbaForCausalLM))
    before, random = trained.training, random_states()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass may have left the outermost weights together
    divided = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in trained.parameters())
    whole = _copy(trained, device) if divided else trained
    whole.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield whole
    finally:
        trained.train(before)
        set_random_states(random)


def _copy(divided: HymbaForCausalLM, device: torch.device) -> HymbaForCausalLM:
    """The model with whole weights of its own, put together one by one."""
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        copy = HymbaForCausalLM(divided.config)
        for adapter, config in getattr(divided, "peft_config", {}).items():
            inject_adapter_in_model(config, copy, adapter_name=adapter)
    weights = {name: _whole(weight).to(device) for name, weight in divided.named_parameters()}
    copy.load_state_dict(weights, strict=False, assign=True)  # not strict: the head is tied, and named once
    copy.tie_weights()
    assert not any(weight.is_meta for weight in copy.parameters()), "every weight has a name"
    return copy


def _whole(weight: Any) -> Tensor:
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if not hasattr(weight, "ds_id"):
        return weight.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()
