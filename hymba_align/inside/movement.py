"""How far training moved the weights: part by part of every layer, and every meta token.

Norms are Frobenius norms, summed in float64. A layer's input projection makes what both branches read, so its rows count
for the branch that reads them: queries, keys and values for the attention heads, input and gate for the SSM heads.

M meta tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn

from hymba_align.adapters import real_weight
from hymba_align.errors import CheckpointError
from hymba_align.inside.result import MetaMovement, WeightMovement
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.layers import HymbaMixer
from hymba_align.model.modeling import HymbaForCausalLM

ATTENTION, SSM, FUSION, MLP, NORMS = OF_LAYER = ("attention", "ssm", "fusion", "mlp", "norms")
EMBEDDINGS, META_TOKENS, FINAL_NORM = OF_NONE = ("embeddings", "meta tokens", "final norm")
"""The language-model head is the embeddings' own weights in every Hymba."""
WHOLE = "all weights"
AT_ONCE = 2**22
"""Numbers that are compared at a time: 34 MB in float64."""
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "v_head_dim",
    "intermediate_size",
    "num_memory_tokens",
    "mamba_expand",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_dt_rank",
    "kv_reuse_group",
)
"""Of the configuration, in the order in which a difference is told."""


@dataclass
class _Sums:
    """What is known of one part so far."""

    parameters: int = 0
    moved: float = 0.0
    """Squared distance"""
    before: float = 0.0
    after: float = 0.0
    """Squared norms"""

    def add(self, before: Tensor, after: Tensor) -> None:
        """Adds two tensors of one shape."""
        for old, new in zip(before.reshape(-1).split(AT_ONCE), after.reshape(-1).split(AT_ONCE), strict=True):
            new = new.double()
            old = old.to(new)
            self.parameters += old.numel()
            self.moved += float((new - old).square().sum())
            self.before += float(old.square().sum())
            self.after += float(new.square().sum())

    def movement(self, layer: int | None, part: str, squared_whole: float) -> WeightMovement:
        """The sums as a result."""
        distance = self.moved**0.5
        return WeightMovement(
            layer,
            part,
            self.parameters,
            distance,
            _ratio(distance, self.before**0.5, self.after**0.5),
            self.moved / squared_whole if squared_whole else 0.0,
        )


def weight_movement(before: nn.Module, after: nn.Module) -> tuple[tuple[WeightMovement, ...], WeightMovement]:
    """The movement of each part, those of the layers first; and that of all weights together.

    A part whose norm was 0 is `relative` to its norm afterwards. Shares are 0 where nothing moved.

    Args:
        before: a Hymba, or one with adapters of PEFT, whose weights count as if merged.
        after: one of the same shape.

    Raises: CheckpointError for models of different shapes.
    """
    old, new = whole_model(before), whole_model(after)
    check_comparable(old.config, new.config)
    sums: dict[tuple[int | None, str], _Sums] = {}
    parameters = dict(new.named_parameters())
    for name, weight in old.named_parameters():
        changed = real_weight(parameters[name].detach())
        for place, rows in _parts(old, name):
            sums.setdefault(place, _Sums()).add(real_weight(weight.detach())[rows], changed[rows])
    whole = _Sums(
        *(sum(getattr(one, field) for one in sums.values()) for field in ("parameters", "moved", "before", "after"))
    )
    movements = [
        one.movement(*place, whole.moved) for place, one in sorted(sums.items(), key=lambda item: _order(*item[0]))
    ]
    return tuple(movements), whole.movement(None, WHOLE, whole.moved)


def meta_movement(before: nn.Module, after: nn.Module) -> tuple[MetaMovement, ...]:
    """How far each of the M meta tokens moved, in order; none where the model has no meta tokens.

    The cosine of a token that is 0 on one side is 0.

    Raises: CheckpointError for models of different shapes.
    """
    old, new = whole_model(before), whole_model(after)
    check_comparable(old.config, new.config)
    old_MD = old.model.memory_tokens.detach().double().cpu()
    new_MD = new.model.memory_tokens.detach().double().cpu()
    distances = (new_MD - old_MD).norm(dim=1).tolist()
    norms, new_norms = old_MD.norm(dim=1).tolist(), new_MD.norm(dim=1).tolist()
    dots = (old_MD * new_MD).sum(dim=1).tolist()
    return tuple(
        MetaMovement(
            token,
            distance,
            _ratio(distance, norm, new_norm),
            min(1.0, dot / (norm * new_norm)) if norm * new_norm else 0.0,
        )
        for token, (distance, norm, new_norm, dot) in enumerate(zip(distances, norms, new_norms, dots, strict=True))
    )


def check_comparable(
    before: HymbaConfig, after: HymbaConfig, before_name: str = "before", after_name: str = "after"
) -> None:
    """Raises CheckpointError, naming the first key that differs, for configurations whose weights have other shapes."""
    for key in SHAPE_KEYS:
        old, new = getattr(before, key, None), getattr(after, key, None)
        if old != new:
            raise CheckpointError(
                f"{after_name} and {before_name} cannot be compared: {key} is {new} in the one and {old} in the other; compare "
                "checkpoints of one shape, such as the stages of one run"
            )


def whole_model(model: nn.Module) -> HymbaForCausalLM:
    """The Hymba within a model; adapters of PEFT are merged in a copy, in float32.

    Raises: ValueError for a model that holds none.
    """
    if isinstance(model, HymbaForCausalLM):
        return model
    from peft import PeftModel  # takes seconds to import, for models that hold adapters only

    if isinstance(model, PeftModel):
        merged = copy.deepcopy(model).float().merge_and_unload()
        assert isinstance(merged, HymbaForCausalLM)
        return merged
    return causal_in(model)


def causal_in(model: nn.Module) -> HymbaForCausalLM:
    """The one Hymba with a head within a model, whatever wraps it.

    Raises: ValueError where there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, HymbaForCausalLM)]
    if len(found) != 1:
        raise ValueError(f"a {type(model).__name__} holds {len(found)} Hymba models with a head; give one with one")
    return found[0]


# ---- which weight belongs to which part ------------------------------------------------------------------------------


def _parts(model: HymbaForCausalLM, name: str) -> Iterator[tuple[tuple[int | None, str], slice]]:
    """The parts that a parameter belongs to, each as (layer, part) with its rows."""
    everything = slice(None)
    path = name.split(".")
    if path[:2] != ["model", "layers"]:
        yield (None, _part_outside_layers(name)), everything
        return
    layer = int(path[2])
    if path[3] != "mamba":
        yield (layer, MLP if path[3] == "moe" else NORMS), everything
    elif path[4] == "in_proj":
        mixer = model.model.layers[layer].mamba
        assert isinstance(mixer, HymbaMixer)
        ends = list(accumulate(mixer.splits))  # q | k | v | u | z
        yield (layer, ATTENTION), slice(0, ends[2])
        yield (layer, SSM), slice(ends[2], ends[4])
    else:
        fuses = path[4] in ("pre_avg_layernorm1", "pre_avg_layernorm2", "out_proj")
        yield (layer, FUSION if fuses else SSM), everything


def _part_outside_layers(name: str) -> str:
    parts = {
        "model.embed_tokens.weight": EMBEDDINGS,
        "model.memory_tokens": META_TOKENS,
        "model.final_layernorm.weight": FINAL_NORM,
    }
    return parts[name]


def _order(layer: int | None, part: str) -> tuple[int, int, int]:
    if layer is None:
        return 1, 0, OF_NONE.index(part)
    return 0, layer, OF_LAYER.index(part)


def _ratio(distance: float, before: float, after: float) -> float:
    """Distance over the norm before; over that afterwards where there was nothing; 0 where there still is nothing."""
    return distance / (before or after or 1.0)
