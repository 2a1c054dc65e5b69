"""Adapters merged into the model under them, by PEFT's own merge, in float32.

QLoRA was trained over quantised weights, and those are what its adapter belongs to: the base is quantised and read back
in the same way before it is merged (Dettmers et al., arXiv:2305.14314, section 3).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hymba_align.adapter_fit import alpha_of, rank_of
from hymba_align.adapter_folder import PREFIX, Adapter, Quantization
from hymba_align.checkpoint_checks import TIED, first_line
from hymba_align.errors import CheckpointError, KernelError

if TYPE_CHECKING:
    import torch

    from hymba_align.model import HymbaForCausalLM

PROBE_TOKENS = 48
"""Of the row by which merged and unmerged logits are compared"""


@dataclass(frozen=True)
class Merged:
    """What merging one adapter did; the difference is None where nobody asked for it."""

    modules: int
    largest_difference: float | None
    """Between logits of the model with the adapter beside it and with it merged, float32, over one row"""
    largest_logit: float | None


def merge_adapter(
    model: HymbaForCausalLM, adapter: Adapter, *, compare: bool = False
) -> tuple[HymbaForCausalLM, Merged]:
    """A float32 model with the adapter in its weights; the model that was given is used up.

    Args:
        compare: computes the logits of one row before and after, on the CPU.
    Raises: CheckpointError where the adapter's numbers are not finite, or the merged ones are not.
    """
    import torch
    from peft import PeftModel

    if adapter.quantization is not None:
        model = dequantised(model, adapter.quantization, adapter.name)
    tensors = _tensors(adapter)
    _replace_whole(model, adapter, tensors)
    if not adapter.parts:
        return model, Merged(0, None, None)
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):  # PEFT draws numbers, which the adapter's replace
        # peft 0.21 reads transformers' old name; delete when it reads `is_activation_checkpointing`.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped = PeftModel(model, _peft_config(adapter))
    _load(wrapped, adapter, tensors)
    before = _logits(wrapped) if compare else None
    try:
        merged: HymbaForCausalLM = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"{adapter.name}: the adapter cannot be merged: {first_line(error)}") from error
    vars(merged).pop("peft_config", None)  # PEFT leaves it there, and takes the next adapter for a second one
    merged.requires_grad_(requires_grad=True)
    if before is None:
        return merged, Merged(len(adapter.parts), None, None)
    after = _logits(merged)
    difference = float((before - after).abs().max())
    return merged, Merged(len(adapter.parts), difference, float(before.abs().max()))


def _logits(model: Any) -> torch.Tensor:
    """Logits (T, V) of a row of tokens from all over the vocabulary."""
    import torch

    vocabulary = model.config.vocab_size
    row = torch.linspace(0, vocabulary - 1, PROBE_TOKENS).long()[None]
    training = model.training
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(row).logits[0].float()
    model.train(training)
    return logits


def _peft_config(adapter: Adapter) -> Any:
    """The adapter as PEFT's configuration, with every module by its full name in place of patterns."""
    from peft import LoraConfig

    modules = sorted(adapter.parts)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT scales by real numbers too
        target_modules=modules,
        rank_pattern={f"^{re.escape(module)}": rank_of(adapter, module) for module in modules},
        alpha_pattern={f"^{re.escape(module)}": alpha_of(adapter, module) for module in modules},
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=False,
        inference_mode=True,
    )


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter's tensors in float32. Raises: CheckpointError where one is not finite."""
    import torch
    from safetensors import safe_open

    tensors = {}
    with safe_open(adapter.weights, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  not a dict
            tensors[name] = opened.get_tensor(name).float()
            if not torch.isfinite(tensors[name]).all():
                raise CheckpointError(
                    f"{adapter.name}: the tensor {name:.120} holds NaN or infinity; the adapter is damaged, or comes from a run "
                    "that diverged; name another"
                )
    return tensors


def _load(wrapped: Any, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts the tensors in their places, by names of their own and in PEFT's spelling."""
    from peft import set_peft_model_state_dict

    spelling = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
    state = {
        f"{PREFIX}{module}.{spelling[part]}": tensors[tensor]
        for module, parts in adapter.parts.items()
        for part, tensor in parts.items()
    }
    result: Any = set_peft_model_state_dict(wrapped, state)
    missing = [name for name in result.missing_keys if "lora_" in name]
    assert not missing, f"{adapter.name}: checked, and yet PEFT misses {missing[:3]}"
    assert not result.unexpected_keys, (
        f"{adapter.name}: checked, and yet PEFT does not know {result.unexpected_keys[:3]}"
    )


def _replace_whole(model: HymbaForCausalLM, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts tensors that the adapter replaces (modules_to_save) into the model.

    PEFT trains a copy of a module, so that an embedding is no longer tied to the head; that, Hymba does not have.
    """
    import torch

    state = model.state_dict()
    tied = {name: tensors[adapter.whole[name]] for name in TIED if name in adapter.whole}
    equal = len(tied) == len(TIED) and torch.equal(*tied.values())
    for name, tensor in tied.items():
        if not equal and not torch.equal(tensor, state[name]):
            raise CheckpointError(
                f"{adapter.name}: the adapter holds another {name} than its base, and Hymba's embeddings and head are one tensor, "
                "which cannot take the change of one of them; train it without embeddings in modules_to_save"
            )
    with torch.no_grad():
        for name, stored in adapter.whole.items():
            state[name].copy_(tensors[stored])


def dequantised(model: HymbaForCausalLM, quantization: Quantization, name: str) -> HymbaForCausalLM:
    """The model in float32 with the weights that an adapter was trained over: quantised and read back, on the CPU.

    Raises: KernelError without bitsandbytes.
    """
    import torch

    torch.nn.Module.to(model, getattr(torch, quantization.dtype))
    weights = {f"{module}.weight" for module in quantization.modules}
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in weights:
                parameter.copy_(_read_back(parameter.data, quantization, name))
    torch.nn.Module.to(model, torch.float32)
    return model


def _read_back(weight: torch.Tensor, quantization: Quantization, name: str) -> torch.Tensor:
    """A weight after 4-bit quantisation, in its own dtype."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise KernelError(
            f"{name} was trained over quantised weights, and bitsandbytes is missing; in the clone of hymba-align: "
            "pip install -e '.[quantized]'"
        ) from error
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=quantization.block_size,
        quant_type=quantization.quant_type,
        compress_statistics=quantization.double_quant,
    )
    read: torch.Tensor = functional.dequantize_4bit(packed, state)
    return read
