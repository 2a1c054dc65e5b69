"""How the layers join their branches: how large each is before and behind its norm, and what the learned scales are.

Legend: M meta tokens, T text tokens of a row, I inner size.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hymba_align.inside.observing import ObservedFusion, hymba_in, observe
from hymba_align.inside.passes import Watcher, run_rows
from hymba_align.inside.result import Branch, BranchSize, Fusion, LayerFusion
from hymba_align.inside.rows import Row
from hymba_align.model.branches import branch_norms

TOKENS_AT_ONCE = 1024
"""Of a layer, in float32: 13 MB per branch at an inner size of 3,200"""


def measure_fusion(model: nn.Module, rows: Iterable[Row]) -> Fusion:
    """The fusion of every layer, mean over all text tokens. Source: Hymba (arXiv 2411.13676), equation 3.

    Exact: every channel of every text token, as the model's own forward pass computes it; in float32 from there. Meta
    tokens are left out. The model's mode is left as it is.

    Args:
        model: a Hymba, with or without adapters around it.
        rows: at least one.

    Raises:
        ValueError: no rows.
    """
    sums = FusionSums(model)
    run_rows(model, rows, [sums])
    return sums.result()


class FusionSums(Watcher):
    """Adds up the sizes of both branches of every layer over the text tokens of all rows that run while it watches."""

    def __init__(self, model: nn.Module) -> None:
        self.hymba = hymba_in(model)
        self.device = self.hymba.embed_tokens.weight.device
        self.sums = torch.zeros(self.hymba.config.num_hidden_layers, 6, dtype=torch.float64, device=self.device)
        self.tokens = 0

    def watching(self, row: Row) -> AbstractContextManager[None]:
        """Sees both branches of every layer."""
        return observe(self.hymba, fusion=self._add)

    def _add(self, seen: ObservedFusion) -> None:
        branches = (seen.attention, seen.attention_normed, seen.ssm, seen.ssm_normed)
        for parts in zip(*(x[seen.row.meta_tokens :].split(TOKENS_AT_ONCE) for x in branches), strict=True):
            self.sums[seen.layer] += _sums(*(part.float() for part in parts)).to(self.device)

    def ran(self, row: Row, hidden_TD: Tensor) -> None:
        """Counts what the sums are over."""
        self.tokens += row.tree.num_tokens

    def result(self) -> Fusion:
        """The means. Raises: ValueError where no row has run."""
        if not self.tokens:
            raise ValueError("there are no rows, so there is no fusion to measure; give at least one document")
        means = (self.sums / self.tokens).tolist()
        return Fusion(self.tokens, tuple(_layer(self.hymba, layer, of_layer) for layer, of_layer in enumerate(means)))


def _sums(a_TI: Tensor, a_normed_TI: Tensor, y_TI: Tensor, y_normed_TI: Tensor) -> Tensor:
    """(6,) summed over tokens: the attention branch's size before and behind its norm, the SSM's, cosine, SSM's share."""
    a_power, y_power = (x.square().mean(dim=1) for x in (a_normed_TI, y_normed_TI))
    both = a_power + y_power
    per_token = [
        a_TI.square().mean(dim=1).sqrt(),
        a_power.sqrt(),
        y_TI.square().mean(dim=1).sqrt(),
        y_power.sqrt(),
        F.cosine_similarity(a_normed_TI, y_normed_TI, dim=1),  # 0 where a branch is zero
        torch.where(both > 0, y_power / both, 0.5),  # two branches of zero are of one size
    ]
    return torch.stack(per_token).double().sum(dim=1)


def _layer(hymba: nn.Module, layer: int, means: list[float]) -> LayerFusion:
    attention, attention_normed, ssm, ssm_normed, cosine, ssm_share = means
    return LayerFusion(
        layer=layer,
        is_global=hymba_in(hymba).config.is_global(layer),
        attention=_size(hymba, layer, "attention", attention, attention_normed),
        ssm=_size(hymba, layer, "ssm", ssm, ssm_normed),
        cosine=cosine,
        ssm_share=ssm_share,
    )


def _size(hymba: nn.Module, layer: int, branch: Branch, before: float, after: float) -> BranchSize:
    [norm] = branch_norms(hymba, layer, branch)
    scale = cast(Tensor, norm.weight).detach().double()
    return BranchSize(
        before=before,
        after=after,
        scale=float(scale.square().mean().sqrt()),
        scale_min=float(scale.min()),
        scale_max=float(scale.max()),
    )
