"""The attention between the tokens of a text's beginning, in chosen layers.

Legend: Q text tokens shown, M meta tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hymba_align.inference.token_texts import TokenTexts
from hymba_align.inside.observing import ObservedAttention, hymba_in, observe
from hymba_align.inside.result import AttentionMap
from hymba_align.inside.rows import Document


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    layers: Iterable[int],
    *,
    most_tokens: int,
) -> tuple[AttentionMap, ...]:
    """One map per layer, in the order of the layers; exact, in one forward pass over the beginning of the document.

    What follows the beginning does not change it, for the model is causal.

    Args:
        model: a Hymba, with or without adapters around it.
        document: not empty.
        tokenizer: for the tokens' texts.
        layers: each at most once.
        most_tokens: tokens of the document that are shown, at least 1.

    Raises:
        ValueError: a layer that the model does not have, or that is named twice; nothing to show.
    """
    hymba, wanted, ids = hymba_in(model), list(layers), list(document.token_ids[:most_tokens])
    last = hymba.config.num_hidden_layers - 1
    for place, layer in enumerate(wanted):
        if not 0 <= layer <= last or layer in wanted[:place]:
            raise ValueError(f"layer {layer} is named twice or not one of the model's, 0 to {last}")
    if most_tokens < 1 or not ids:
        raise ValueError(
            f"{document.name} has {len(document.token_ids)} tokens, of which {most_tokens} may be shown; a map needs 1"
        )
    texts = TokenTexts(tokenizer)
    queries = tuple(texts.of(token)[0] for token in ids)
    found: dict[int, AttentionMap] = {}

    def show(seen: ObservedAttention) -> None:
        if seen.layer not in wanted:
            return
        meta, heads = seen.row.meta_tokens, seen.row.config.num_attention_heads
        mass = torch.zeros(len(ids), meta + len(ids), dtype=torch.float64, device=seen.row.device)
        for block in seen.weights():
            mass[block.queries[:, None] - meta, block.keys] += block.weights.double().sum(0) / heads
        to_meta, to_text = mass.split([meta, len(ids)], dim=1)
        weights = torch.cat([to_meta.sum(1, keepdim=True), to_text], dim=1)
        found[seen.layer] = AttentionMap(
            layer=seen.layer,
            is_global=seen.is_global,
            document=document.name,
            queries=queries,
            meta=tuple(to_meta.mean(0).tolist()),
            weights=tuple(map(tuple, weights.tolist())),
        )

    with observe(hymba, attention=show):
        hymba(input_ids=torch.tensor([ids], device=hymba.embed_tokens.weight.device), use_cache=False)
    return tuple(found[layer] for layer in wanted)
