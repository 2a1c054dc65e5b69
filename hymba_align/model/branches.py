"""A Hymba without the attention heads or without the SSM heads of some layers.

A layer joins its two branches as the mean of what they computed, each behind a norm with a learned scale (Hymba,
arXiv 2411.13676, equation 3):

    out_proj((pre_avg_layernorm1(attention) + pre_avg_layernorm2(ssm)) / 2)

Removing a branch is setting its term to zero, which is what a norm whose learned scale is zero does. Weights stay as
they are: a forward hook on the norm gives zeros in place of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from hymba_align.model.layers import HymbaMixer

Branch = Literal["attention", "ssm"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


@contextmanager
def without_branch(model: nn.Module, layers: int | Sequence[int], branch: Branch) -> Iterator[None]:
    """Within, one branch of these layers adds nothing to the model's output.

    The branch still runs: its keys and values go to the layers that share them and to caches, and its state to caches. So
    what other layers and later tokens read is changed by the layers' outputs alone. The other term keeps its factor 1/2.
    A cache that was filled within belongs to the model without the branch.

    Contexts nest, of any layers and branches. Behind the last one, also where an error ends it, the model is as before
    to the bit. Weights, mode and gradients of the rest are left alone. The hook acts in every thread that runs the model.

    Args:
        model: a Hymba with or without its head, alone or inside a wrapper (PEFT, data parallel); not compiled: a compiled
            graph does not see hooks that come after it. Compile within the context instead.
        layers: one index or several, from 0.
        branch: "attention" or "ssm".

    Raises:
        ValueError: no Hymba, a compiled one, a layer or branch that there is not; the message names the value.

    Source: Hymba (arXiv 2411.13676), its analysis of head importance, which removes the heads of a layer.
    """
    with ExitStack() as hooks:
        for norm in branch_norms(model, layers, branch):
            hooks.enter_context(cast(Any, norm.register_forward_hook(_zeros)))
        yield


def branch_norms(model: nn.Module, layers: int | Sequence[int], branch: Branch) -> list[nn.Module]:
    """The modules whose outputs these layers add up for a branch: in a wrapper with copies of a layer, one per copy.

    Raises: ValueError, as `without_branch`.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}; it is one of {', '.join(BRANCHES)}")
    mixers = [module for module in model.modules() if isinstance(module, HymbaMixer)]
    if not mixers:
        raise ValueError(f"the model is a {type(model).__name__} without a layer of Hymba; give a Hymba")
    if any(_is_compiled(module) for module in model.modules()):
        raise ValueError(
            "the model is compiled, and a compiled graph does not see the hook that removes a branch; "
            "give the model as it was before torch.compile"
        )
    wanted = [layers] if isinstance(layers, int) else list(layers)
    last = max(mixer.layer for mixer in mixers)
    for layer in wanted:
        if not 0 <= layer <= last:
            raise ValueError(f"layer is {layer}; the model has the layers 0 to {last}")
    name = "pre_avg_layernorm1" if branch == "attention" else "pre_avg_layernorm2"
    return [getattr(mixer, name) for mixer in mixers if mixer.layer in wanted]


def _is_compiled(module: nn.Module) -> bool:
    # torch.compile wraps a module in one that holds it under this name; module.compile() compiles in place.
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _zeros(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """In place of the norm's output."""
    return torch.zeros_like(output)
