"""A recipe's adapters in the terms of PEFT and bitsandbytes: which layers, which configuration, which base.

The section itself is in recipe_lora.py, what training adds in train/adapting.py. An adapter is a change of one base, so
its folder names the base (a path inside the run relative to the adapter folder, so that a run folder may move) and has a
digest of the base's files; a quantised base is described by what rounds it again to the same numbers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.adapter_folder import Quantization, base_digest
from hymba_align.errors import AdapterError
from hymba_align.recipe import Recipe, TrainingStage, is_local_path
from hymba_align.recipe_lora import LoraSection, nothing_matches

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn

    from hymba_align.model import HymbaConfig

QUANTISED = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
"""The large matrices. x_proj and dt_proj, which set the recurrence's step sizes, are 2 % of a layer and stay as they are."""
BLOCK_SIZE = 64
UNDIVIDED = ("single", "ddp", "zero1", "zero2", "zero3")
"""Engines that adapters are trained with."""
WITH_QUANTISED = ("single", "ddp")


# ---- which layers ----------------------------------------------------------------------------------------------------


def linear_names(config: HymbaConfig) -> list[str]:
    """Names of the linear layers that can be adapted, from the configuration alone; no weight is made."""
    import torch
    from torch import nn

    from hymba_align.model import HymbaForCausalLM

    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def check_targets(section: LoraSection, names: Sequence[str]) -> None:
    """Raises AdapterError for a target that no linear layer's name is, or ends in.

    Args:
        names: those of the model's linear layers.
    """
    for target in section.target_modules:
        if not any(is_target(name, target) for name in names):
            raise AdapterError(nothing_matches(target))


def is_target(name: str, target: str) -> bool:
    """Whether a module is meant, as PEFT reads a list of targets: by its whole name, or by how that ends."""
    return name == target or name.endswith(f".{target}")


def check_adapters(recipe: Recipe, config: HymbaConfig | None, engine: str) -> None:
    """Raises AdapterError for what the section lora asks for and cannot have; reads no weights.

    Args:
        config: the base's; None where it lies on the hub and nobody is to ask. Names are then those of every Hymba.
        engine: what joins the processes.
    """
    section = recipe.lora
    if section is None:
        return
    from hymba_align.model import HymbaConfig

    check_targets(section, linear_names(config if config is not None else HymbaConfig()))
    if engine not in UNDIVIDED:
        raise AdapterError(
            f"lora trains with the engines {', '.join(UNDIVIDED)}, and this run has {engine}; adapters have next to no "
            "optimizer state to divide, so take launch.launcher=ddp, or zero3 where the frozen weights are too large"
        )
    if section.quantize is None:
        return
    if engine not in WITH_QUANTISED:
        raise AdapterError(
            f"lora.quantize is {section.quantize}, and {engine} cannot divide 4-bit weights; take launch.launcher=ddp"
        )
    check_quantiser(section)
    for stage in ("sft", "dpo"):
        if stage in recipe.training_stages and section.adapts(stage):
            _refuse_half_precision(recipe, stage)


def check_quantiser(section: LoraSection) -> None:
    """Raises AdapterError where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AdapterError(
            f"lora.quantize is {section.quantize}, and bitsandbytes is missing; in the clone of hymba-align: "
            "pip install -e '.[quantized]'"
        )


def _refuse_half_precision(recipe: Recipe, stage: TrainingStage) -> None:
    if getattr(recipe, stage).trainer.get("fp16"):
        raise AdapterError(
            f"{stage}.trainer.fp16 is true, and with lora.quantize the small matrices stay in {recipe.base.dtype}; use bf16"
        )


# ---- configuration and base ------------------------------------------------------------------------------------------


def peft_config(section: LoraSection) -> LoraConfig:
    """PEFT's configuration of the section."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.scale_numerator,  # type: ignore[arg-type]  # declared int; only ever divided
        lora_dropout=section.dropout,
        target_modules=list(section.target_modules),
        use_dora=section.dora,
        use_rslora=section.rslora,
    )


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter is a change of, as its folder names it."""

    name: str
    revision: str | None
    sha256: str | None
    """`base_digest` of a local folder; None for a repository on the hub, which its revision names."""

    @classmethod
    def of(cls, recipe: Recipe, start: str | Path | None, stage_dir: Path) -> AdapterBase:
        """The base of the adapter that a stage trains from `start` (None: from the recipe's base section)."""
        if start is None and has_plain_base(recipe) and not is_local_path(str(recipe.base.model)):
            return cls(str(recipe.base.model), recipe.base.revision, None)
        if start is not None:
            folder = Path(start)
        else:
            folder = Path(str(recipe.base.model)) if has_plain_base(recipe) else stage_dir.parent / "base" / "final"
        inside = folder.resolve().is_relative_to(stage_dir.parent.resolve())
        whole = folder.resolve()
        name = os.path.relpath(whole, stage_dir.resolve() / "final") if inside else str(whole)
        return cls(name, None, base_digest(folder) if folder.is_dir() else None)


def has_plain_base(recipe: Recipe) -> bool:
    """Whether the base section names a checkpoint that anybody can open as it is, with its own tokenizer."""
    base = recipe.base
    if base.model is None or base.tokenizer is not None:
        return False
    return base.revision is None or not is_local_path(base.model)


# ---- quantised base --------------------------------------------------------------------------------------------------


def quantise(model: nn.Module, dtype: str) -> Quantization:
    """How the large matrices were rounded to NF4, in place, so that it can be done again.

    bitsandbytes' own layers compute with them. On the CPU, so that one base gives the same numbers on every machine.

    Args:
        dtype: that of the weights, by torch's name.
    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from torch import nn

    modules = [name for name, module in model.named_modules() if type(module) is nn.Linear and is_quantised(name)]
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        # Where a CPU has AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation; from then on products are
        # rounded to bfloat16, and no gradient passes.
        layer.support_avx512bf16_for_cpu = False
        weight: Any = Params4bit(
            linear.weight.detach().contiguous(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            blocksize=BLOCK_SIZE,
            module=layer,
        )
        layer.weight = weight.to("cpu")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT and TRL ask this of a model
    return Quantization(dtype=dtype, modules=tuple(modules), block_size=BLOCK_SIZE)


def is_quantised(name: str) -> bool:
    """Whether a module of that name is one of the large matrices."""
    return name.rpartition(".")[2] in QUANTISED


def real_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as numbers: one in 4 bits dequantised, any other as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    whole: torch.Tensor = dequantize_4bit(weight.data, state)
    return whole
