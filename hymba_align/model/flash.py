"""Attention over a tree of segments with flash-attn's kernel for sequences of any length, in global layers.

Each segment's queries are one sequence of the kernel. Its keys are those of its whole path, gathered: the meta tokens,
the ancestors and the segment itself. The kernel aligns queries to the end of the keys, so that its causal mask is the
tree's. A long ancestor is gathered once per segment that continues it, directly or not.

flash-attn wants values as wide as queries. Wider ones are cut into parts of that width, as the released code does,
and the scores computed once per part. Local layers see the meta tokens and a window, which it cannot express; another
backend computes those.

Not run on a GPU for this project yet: tested on the CPU with a stand-in that follows flash-attn's documentation.

Legend: L tokens of the packed row (meta tokens included), K gathered keys, H query heads, G key/value heads,
d query/key head size, e value head size, S segments.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.errors import KernelError
from hymba_align.model.attention import AttentionRow
from hymba_align.model.flex import FlexTreeAttention, compute_dtype
from hymba_align.model.flex import unavailable as flex_unavailable
from hymba_align.model.key_values import KeyValues
from hymba_align.model.segments import ROOT

DTYPES = (torch.float16, torch.bfloat16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run there, with what to do about it; None if it can."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA only, not on {device.type}: choose attention=sdpa"
    if dtype not in DTYPES:
        return f"flash-attn computes in float16 and bfloat16 only, not in {dtype}: choose attention=flex"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"flash-attn does not load ({error}); in the clone: pip install --no-build-isolation -e '.[cuda]'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs a GPU of compute capability 8.0 or above: choose attention=flex"
    return flex_unavailable(device, dtype)  # local layers need it


@dataclass(frozen=True)
class FlashTreeAttention:
    """Attention of one packed row. Made once per forward pass, used by every layer."""

    keys_K: Tensor
    """The row's tokens that the keys of all segments are gathered from, segment by segment, in path order."""
    query_ends: Tensor
    """(S + 1,) int32 tokens before each segment, and in total."""
    key_ends: Tensor
    """(S + 1,) int32 gathered keys before each segment's, and in total."""
    longest: tuple[int, int]
    """Queries of the longest segment and keys of the longest path."""
    local: AttentionRow
    """What computes local layers."""

    @classmethod
    def build(
        cls,
        lengths: list[int],
        parents: list[int],
        window: int,
        device: torch.device,
        local: AttentionRow | None = None,
    ) -> FlashTreeAttention:
        """Plans the attention of a row whose first segment is the meta tokens.

        Args:
            lengths: tokens per segment, meta tokens first.
            parents: the segment that each one continues; -1 for the meta tokens alone.
            window: largest distance to a key that is not a meta token, in local layers.
            device: of the computation.
            local: what computes local layers; FlexAttention if not given.
        """
        tokens = torch.arange(sum(lengths)).split(lengths)
        paths: list[Tensor] = []
        for own, parent in zip(tokens, parents, strict=True):
            paths.append(own if parent == ROOT else torch.cat([paths[parent], own]))
        path_lengths = [len(path) for path in paths]
        return cls(
            keys_K=torch.cat(paths).to(device),
            query_ends=_ends(lengths, device),
            key_ends=_ends(path_lengths, device),
            longest=(max(lengths), max(path_lengths)),
            local=FlexTreeAttention.build(lengths, parents, window, device) if local is None else local,
        )

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e).

        Raises:
            KernelError: values are not a whole number of times as wide as queries.
        """
        if not is_global:
            return self.local.attend(q_LHd, k_LGd, v_LGe, is_global=False, stored=stored)
        from flash_attn import flash_attn_varlen_func

        assert stored is None, "a tree holds all its tokens itself"
        head_size, value_size = q_LHd.shape[-1], v_LGe.shape[-1]
        if value_size % head_size:
            raise KernelError(
                f"flash-attn: value heads of {value_size} cannot be cut into parts of the query heads' {head_size}; "
                "choose attention=flex"
            )
        dtype = compute_dtype(q_LHd)
        q, k_KGd = q_LHd.to(dtype), k_LGd.to(dtype)[self.keys_K]
        parts = [
            flash_attn_varlen_func(
                q,
                k_KGd,
                v_KGd,
                self.query_ends,
                self.key_ends,
                *self.longest,
                causal=True,
            )
            for v_KGd in v_LGe.to(dtype)[self.keys_K].split(head_size, dim=-1)
        ]
        return torch.cat(parts, dim=-1).flatten(1)


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
