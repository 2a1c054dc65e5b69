"""Mamba's causal depthwise convolution over a tree of segments, in plain torch on any device.

    y_t = bias + sum_k weight_k u_{t-k}

The taps of a segment's first tokens reach back into its parent, as far as the meta tokens. Every segment is laid out
behind a copy of the last tokens of its path, so that one shifted sum serves the whole row.

Legend: T tokens, I inner channels, S segments, R given tails, W taps (the kernel width).
Source: Mamba (arXiv 2312.00752), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model.kernels.interface import ConvRow
from hymba_align.model.rows import take_rows


@dataclass(frozen=True)
class GatherConv(ConvRow):
    """Where each tap of a packed row reads.

    Reads go to the row extended by one zero row and the given tails: index t < T is token t, T is zeros, and
    T + 1 + r * (W - 1) + j is entry j of tail r.
    """

    expanded: Tensor
    """(T + S * (W - 1),) source of each entry of the expanded row."""
    tokens_T: Tensor
    """(T,) the output of the shifted sum that belongs to each token."""
    tails: Tensor
    """(S, W - 1) source of each segment's own tail: the last W - 1 inputs on its path."""

    @classmethod
    def build(
        cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device
    ) -> GatherConv:
        reach = taps - 1
        total = sum(lengths)
        tails: list[list[int]] = []
        expanded: list[Tensor] = []
        tokens: list[Tensor] = []
        start = 0
        for segment, (length, parent, tail) in enumerate(zip(lengths, parents, initial, strict=True)):
            if parent >= 0:
                history = tails[parent]
            elif tail >= 0:
                history = [total + 1 + tail * reach + entry for entry in range(reach)]
            else:
                history = [total] * reach
            own = torch.arange(start, start + length)
            expanded += [torch.tensor(history, dtype=torch.int64), own]
            tokens.append(own + segment * reach)
            tails.append((history + own[-reach:].tolist())[-reach:])
            start += length
        return cls(
            expanded=torch.cat(expanded).to(device),
            tokens_T=torch.cat(tokens).to(device),
            tails=torch.tensor(tails).to(device),
        )

    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        source = [u, u.new_zeros(1, u.shape[1])]
        if initial_tails is not None:
            source.append(initial_tails.to(u.dtype).flatten(0, 1))
        extended = torch.cat(source)
        expanded = take_rows(extended, self.expanded)
        taps = weight.shape[1]
        outputs = len(expanded) - taps + 1
        weight = weight.to(u.dtype)
        y = bias.to(u.dtype) + expanded[taps - 1 :] * weight[:, taps - 1]
        for tap in range(taps - 1):
            y = y + expanded[tap : tap + outputs] * weight[:, tap]
        y = y[self.tokens_T]
        return F.silu(y) if silu else y, take_rows(extended, self.tails)
