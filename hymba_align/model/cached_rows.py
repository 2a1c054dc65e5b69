"""Which sequences of a batch a cache holds after a forward pass: its rows, or the paths of a packed row or tree.

B batch rows, S segments, R rows of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_align.model.cache import HymbaCache
from hymba_align.model.layout import Layout
from hymba_align.model.segments import ROOT


def obstacle_to_caching(
    layout: Layout,
    batch: int,
    past: HymbaCache | None,
    shared_prefix_lengths: Tensor | None,
    paths: Tensor | None,
) -> str | None:
    """Why the rows of a batch cannot start or continue a cache, if they cannot."""
    if shared_prefix_lengths is not None:
        return "a cache holds whole sequences; pass use_cache=False and no past_key_values with shared_prefix_lengths"
    if past is not None and past.is_initialized:
        if paths is not None:
            if len(past.lengths) != 1:
                return f"the cache holds {len(past.lengths)} sequences; a packed row or a tree can only continue a cache of one"
        elif len(past.lengths) != batch:
            return f"the cache holds {len(past.lengths)} sequences but the batch has {batch} rows"
    elif missing := set(range(batch)) - set(layout.rows_S.tolist()):
        return f"attention_mask has no real token in row {min(missing)}; every sequence needs one to start a cache"
    return None


def paths_to_cache(layout: Layout, cache_segments: Tensor | None) -> Tensor | None:
    """The segments that end the cache's rows, for packed rows and trees; None where each batch row is one sequence."""
    if cache_segments is None:
        if len(set(layout.rows_S.tolist())) == len(layout.rows_S):
            return None
        inner = torch.zeros(layout.tree.num_segments, dtype=torch.bool)
        inner[layout.tree.parents[layout.tree.parents != ROOT]] = True
        return (~inner).nonzero().flatten()
    ends = cache_segments.detach().cpu()
    segments = layout.tree.num_segments
    if ends.ndim != 1 or not len(ends) or int(ends.min()) < 0 or int(ends.max()) >= segments:
        raise ValueError(
            f"cache_segments is {ends.tolist()}; it lists one or more of the row's segments, 0 to {segments - 1}"
        )
    return ends
