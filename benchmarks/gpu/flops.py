"""Floating-point operations that a model needs for a row, counted from its shape.

What is counted, with two operations per multiply-add:

- every weight matrix, once per token of the row (meta tokens included, once per row); the language-model head once per
  scored position, because no other logits are needed;
- attention, 2 H (d + e) for each pair of a query and a key that it may see: causal, within the window in local layers;
- training: three times the forward pass. Recomputed activations are work that checkpointing adds, not work that the
  model needs, so they are not counted.

Not counted, as is usual: the scan, the convolution, norms and the optimizer, none of which runs on matrix units. At
the 1.5B configuration the scan's 7 I N operations per token are 0.4 % of a layer's matrices.

Legend: H query heads, d query/key head size, e value head size, M meta tokens, I inner channels, N state size.
"""

from __future__ import annotations

from torch import nn

from hymba_align.model import HymbaForCausalLM, SegmentTree
from hymba_align.model.configuration import HymbaConfig


def matrix_flops(model: HymbaForCausalLM, tree: SegmentTree) -> int:
    """Of all weight matrices in the layers, for a forward pass over a row."""
    tokens = tree.num_tokens + model.config.num_memory_tokens
    weights = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    return 2 * tokens * weights


def head_flops(config: HymbaConfig, scored: int) -> int:
    """Of the logits at so many positions."""
    return 2 * scored * config.hidden_size * config.vocab_size


def visible_pairs(tree: SegmentTree, meta: int, window: int | None) -> int:
    """Pairs of a query and a key it may see, in a row of meta tokens and `tree`; `window` is None in global layers."""
    pairs = meta * (meta + 1) // 2
    for length, before in zip(tree.lengths.tolist(), tree.ancestor_tokens.tolist(), strict=True):
        near = range(before, before + length)  # earlier text tokens on each token's path
        pairs += sum(meta + 1 + (earlier if window is None else min(earlier, window)) for earlier in near)
    return pairs


def attention_flops(config: HymbaConfig, tree: SegmentTree) -> int:
    """Of all layers' attention, for a forward pass over a row."""
    by_kind = {
        is_global: visible_pairs(tree, config.num_memory_tokens, None if is_global else config.sliding_window)
        for is_global in (True, False)
    }
    per_pair = 2 * config.num_attention_heads * (config.head_dim + config.v_head_dim)
    return per_pair * sum(by_kind[config.is_global(layer)] for layer in range(config.num_hidden_layers))


def forward_flops(model: HymbaForCausalLM, tree: SegmentTree, scored: int) -> int:
    """Of one forward pass."""
    return matrix_flops(model, tree) + attention_flops(model.config, tree) + head_flops(model.config, scored)


def training_flops(model: HymbaForCausalLM, tree: SegmentTree, scored: int) -> int:
    """Of one forward and backward pass."""
    return 3 * forward_flops(model, tree, scored)
