"""Everything about a packed row that all layers share, computed once per forward pass.

Without a cache (or on its first pass) the row starts with the meta tokens, as the segment that all others continue.
With a filled cache each sequence's new tokens are one segment that continues the cached state.

Legend: L tokens of the packed row, S segments, B sequences, Q new tokens per sequence, d query/key head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.model.attention import AttentionRow, attend_cached
from hymba_align.model.cache import HymbaCache, KeyValues
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.kernels import ConvRow, ScanRow
from hymba_align.model.kernels.choice import choose_kernels
from hymba_align.model.segments import ROOT, SegmentTree


@dataclass(frozen=True)
class CachedAttention(AttentionRow):
    """Attention of new tokens over a filled cache."""

    slots_L: Tensor
    """Where each new token lies in the flattened (B, Q)."""
    shape: tuple[int, int]
    """B, Q"""
    masks: dict[bool, tuple[Tensor, Tensor]]
    """By whether a layer is global: which new tokens (B, Q, Q) and which cached ones (B, Q, K) a new token sees."""

    @classmethod
    def build(
        cls, tree: SegmentTree, rows_S: Tensor, index_L: Tensor, cache: HymbaCache, device: torch.device
    ) -> CachedAttention:
        """Plans the attention of one segment of new tokens per sequence.

        Args:
            tree: the new tokens of each sequence that has any.
            rows_S: the sequence of each segment.
            index_L: place of each token in its segment.
            cache: what came before.
        """
        shape = (len(cache.lengths), int(tree.lengths.max()))
        lengths_B = cache.lengths.to(device)
        masks = {
            stored.window is None: _cached_masks(stored, lengths_B, shape[1])
            for stored in (state.key_values for state in cache.states)
            if stored is not None
        }
        return cls((rows_S.repeat_interleave(tree.lengths) * shape[1] + index_L).to(device), shape, masks)

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        assert stored is not None, "a filled cache has keys for every layer"
        q, k, v = (self._pad(x) for x in (q_LHd, k_LGd, v_LGe))
        out = attend_cached(q, (k, v), stored.meta, (stored.keys, stored.values), *self.masks[is_global])
        return out.flatten(0, 1)[self.slots_L]

    def _pad(self, x_L: Tensor) -> Tensor:
        """(L, ...) -> (B, Q, ...)"""
        if len(x_L) == self.shape[0] * self.shape[1]:
            return x_L.unflatten(0, self.shape)
        padded = x_L.new_zeros(self.shape[0] * self.shape[1], *x_L.shape[1:])
        return padded.index_copy(0, self.slots_L, x_L).unflatten(0, self.shape)


def _cached_masks(stored: KeyValues, lengths_B: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    batch = len(lengths_B)
    index = torch.arange(queries, device=lengths_B.device)
    distance = index[:, None] - index
    key_positions = stored.slot_positions(lengths_B)[:, None]  # B 1 K
    own = distance >= 0
    cached = (key_positions >= 0).expand(batch, queries, -1)
    if stored.window is not None:
        own = own & (distance <= stored.window)
        cached = cached & ((lengths_B[:, None] + index)[..., None] - key_positions <= stored.window)
    return own.expand(batch, queries, queries), cached


@dataclass(frozen=True)
class ForwardPlan:
    """The packed row as the layers see it."""

    meta_tokens: int
    """Meta tokens at the start of the row; 0 when they are in the cache."""
    cos_L1d: Tensor
    sin_L1d: Tensor
    conv: ConvRow
    scan: ScanRow
    attention: AttentionRow

    @classmethod
    def build(
        cls,
        config: HymbaConfig,
        tree: SegmentTree,
        rows_S: Tensor,
        cache: HymbaCache | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ForwardPlan:
        """Plans the forward pass over `tree`, whose roots continue the meta tokens or, if filled, the cache.

        Args:
            config: shape of the model.
            tree: segments of the row, meta tokens not counted.
            rows_S: batch row of each segment.
            cache: filled or empty cache, if any.
            dtype: of the activations, and of the rotary angles' cosines and sines.
            device: of the computation.
        """
        lengths, parents = tree.lengths.tolist(), tree.parents.tolist()
        index = torch.arange(tree.num_tokens) - tree.offsets.repeat_interleave(tree.lengths)
        attention: AttentionRow
        kernels = choose_kernels(device, dtype)
        if cache is not None and cache.is_initialized:
            meta = 0
            initial = rows_S.tolist()
            before = cache.lengths[rows_S]
            attention = CachedAttention.build(tree, rows_S, index, cache, device)
        else:
            meta = config.num_memory_tokens
            lengths, parents = [meta, *lengths], [ROOT, *(parent + 1 for parent in parents)]
            initial = [ROOT] * len(lengths)
            before = tree.ancestor_tokens
            attention = kernels.attention_row.build(lengths, parents, config.sliding_window, device)
        positions = config.num_memory_tokens + before.repeat_interleave(tree.lengths) + index
        positions = torch.cat([torch.arange(meta), positions]).to(device)
        cos, sin = rotary_angles(config, positions)
        return cls(
            meta_tokens=meta,
            cos_L1d=cos[:, None].to(dtype),
            sin_L1d=sin[:, None].to(dtype),
            conv=kernels.conv_row.build(lengths, parents, initial, config.mamba_d_conv, device),
            scan=kernels.scan_row.build(lengths, parents, initial, device),
            attention=attention,
        )

    def rotate(self, x_LHd: Tensor) -> Tensor:
        """`x_LHd` with rotary position embedding, rotate-half form. Source: RoFormer (arXiv 2104.09864), section 3.4.2."""
        first, second = x_LHd.chunk(2, dim=-1)
        return x_LHd * self.cos_L1d + torch.cat([-second, first], dim=-1) * self.sin_L1d


def rotary_angles(config: HymbaConfig, positions_L: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, d) in float32.

    Source: NTK-aware base as in the released configuration; DESIGN.md, section 2.
    """
    size = config.head_dim
    base = config.rope_theta
    if config.rope_type == "ntk":
        stretch = 2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1
        base *= stretch ** (size / (size - 2))
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=positions_L.device).float() / size
    angles = positions_L.float()[:, None] / base**exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
