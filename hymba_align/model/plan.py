"""Everything about a packed row that all layers share, computed once per forward pass.

Without a cache (or on its first pass) the row starts with the meta tokens, as the segment that all others continue.
With a filled cache each sequence's new tokens are one segment that continues the cached state, or, if the cache holds
one sequence, all roots of a tree continue that.

Legend: L tokens of the packed row, S segments, d query/key head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.model.attention import AttentionRow
from hymba_align.model.cache import HymbaCache
from hymba_align.model.cached_attention import CachedAttention, PrefixAttention, StepAttention
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.kernels import ConvRow, ScanRow
from hymba_align.model.kernels.choice import choose_kernels
from hymba_align.model.segments import ROOT, SegmentTree


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
    @torch.compiler.disable  # lists and choices of kernels, nothing that a graph could hold
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
        if cache is not None and cache.is_initialized:
            return cls._continuing(config, tree, rows_S, cache, dtype, device)
        lengths, parents = tree.lengths.tolist(), tree.parents.tolist()
        index = torch.arange(tree.num_tokens) - tree.offsets.repeat_interleave(tree.lengths)
        kernels = choose_kernels(device, dtype)
        meta = config.num_memory_tokens
        lengths, parents = [meta, *lengths], [ROOT, *(parent + 1 for parent in parents)]
        initial = [ROOT] * len(lengths)
        positions = meta + tree.ancestor_tokens.repeat_interleave(tree.lengths) + index
        cos, sin = rotary_angles(config, torch.cat([torch.arange(meta), positions]).to(device))
        return cls(
            meta_tokens=meta,
            cos_L1d=cos[:, None].to(dtype),
            sin_L1d=sin[:, None].to(dtype),
            conv=kernels.conv_row.build(lengths, parents, initial, config.mamba_d_conv, device),
            scan=kernels.scan_row.build(lengths, parents, initial, device),
            attention=kernels.attention_row.build(lengths, parents, config.sliding_window, device),
        )

    @classmethod
    def _continuing(
        cls,
        config: HymbaConfig,
        tree: SegmentTree,
        rows_S: Tensor,
        cache: HymbaCache,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ForwardPlan:
        """As `build`, for new tokens that continue a filled cache."""
        if tree.num_tokens == len(rows_S) == len(cache.lengths):
            return cls._step(config, cache, dtype, device)
        lengths, parents = tree.lengths.tolist(), tree.parents.tolist()
        rows = rows_S.tolist()
        initial = [row if parent == ROOT else ROOT for row, parent in zip(rows, parents, strict=True)]
        kernels = choose_kernels(device, dtype)
        attention: AttentionRow
        if len(set(rows)) < len(rows):
            attention = PrefixAttention.build(kernels.attention_row, tree, cache, device)
        else:
            attention = CachedAttention.build(tree, rows_S, cache, device)
        index = torch.arange(tree.num_tokens) - tree.offsets.repeat_interleave(tree.lengths)
        before = cache.lengths[rows_S] + tree.ancestor_tokens
        positions = config.num_memory_tokens + before.repeat_interleave(tree.lengths) + index
        cos, sin = rotary_angles(config, positions.to(device, non_blocking=True))
        return cls(
            meta_tokens=0,
            cos_L1d=cos[:, None].to(dtype),
            sin_L1d=sin[:, None].to(dtype),
            conv=kernels.conv_row.build(lengths, parents, initial, config.mamba_d_conv, device),
            scan=kernels.scan_row.build(lengths, parents, initial, device),
            attention=attention,
        )

    @classmethod
    def _step(cls, config: HymbaConfig, cache: HymbaCache, dtype: torch.dtype, device: torch.device) -> ForwardPlan:
        """As `build`, for one new token of every cached sequence."""
        kernels = choose_kernels(device, dtype)
        rows = len(cache.lengths)
        segments = [1] * rows, [ROOT] * rows, list(range(rows))
        cos, sin = rotary_angles(config, config.num_memory_tokens + cache.lengths.to(device, non_blocking=True))
        return cls(
            meta_tokens=0,
            cos_L1d=cos[:, None].to(dtype),
            sin_L1d=sin[:, None].to(dtype),
            conv=kernels.conv_step_row.build(*segments, config.mamba_d_conv, device),
            scan=kernels.scan_step_row.build(*segments, device),
            attention=StepAttention.build(cache, device),
        )

    def rotate(self, x_LHd: Tensor) -> Tensor:
        """`x_LHd` with rotary position embedding, rotate-half form. Source: RoFormer (arXiv 2104.09864), section 3.4.2."""
        first, second = x_LHd.chunk(2, dim=-1)
        return x_LHd * self.cos_L1d + torch.cat([-second, first], dim=-1) * self.sin_L1d


def rotary_angles(config: HymbaConfig, positions_L: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, d) in float32.

    Raises:
        ValueError: a context that the base of an NTK-aware embedding cannot be stretched to.

    Source: NTK-aware base as in the released configuration; DESIGN.md, section 2.
    """
    size = config.head_dim
    base = config.rope_theta
    if config.rope_type == "ntk":
        # Above 0, as the configuration checks; else the base would be complex.
        stretch = 2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1
        base *= stretch ** (size / (size - 2))
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=positions_L.device).float() / size
    angles = positions_L.float()[:, None] / base**exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
