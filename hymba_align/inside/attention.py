"""Where the attention of text tokens goes: meta tokens, the token itself, `<s>`, other tokens. Per layer and head.

Legend: M meta tokens, H query heads, Q queries, K keys, n heads of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from hymba_align.inside.observing import ObservedAttention, hymba_in, observe
from hymba_align.inside.passes import Watcher, run_rows
from hymba_align.inside.result import Attention, LayerAttention, Shares
from hymba_align.inside.rows import Row
from hymba_align.inside.weights import WeightBlock
from hymba_align.model import HymbaConfig

QUANTITIES = ("meta", "bos", "self", "cross", "entropy", "even_entropy")
"""What is averaged over text tokens, in the order of `Shares`."""


def measure_attention(model: nn.Module, rows: Iterable[Row], *, bos_token_id: int | None) -> Attention:
    """The attention of every layer and head, mean over all text tokens.

    Exact: every weight of every token is added up, in blocks, from the queries and keys of the model's own forward pass.
    The model's mode is left as it is. Source: Hymba (arXiv 2411.13676), its attention map categories.

    Args:
        model: a Hymba, with or without adapters around it.
        rows: at least one.
        bos_token_id: `<s>`; None where the tokenizer has none.

    Raises:
        ValueError: no rows.
    """
    sums = AttentionSums(model, bos_token_id)
    run_rows(model, rows, [sums])
    return sums.result()


class AttentionSums(Watcher):
    """Adds up the attention of every layer and head over the text tokens of all rows that run while it watches."""

    def __init__(self, model: nn.Module, bos_token_id: int | None) -> None:
        self.hymba, self.bos_token_id = hymba_in(model), bos_token_id
        config, device = self.hymba.config, self.hymba.embed_tokens.weight.device
        shape = config.num_hidden_layers, config.num_attention_heads, len(QUANTITIES)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = self.documents = self.longest = self.with_bos = 0

    def watching(self, row: Row) -> AbstractContextManager[None]:
        """Sees every weight of every layer."""
        return observe(self.hymba, attention=partial(self._add, _bos_of_segments(row, self.bos_token_id)))

    def _add(self, bos: list[int | None], seen: ObservedAttention) -> None:
        meta = seen.row.meta_tokens
        for block in seen.weights():
            first = bos[block.segment]
            heads = slice(block.heads.start, block.heads.stop)
            self.sums[seen.layer, heads] += head_sums(block, meta, None if first is None else meta + first)

    def ran(self, row: Row, hidden_TD: Tensor) -> None:
        """Counts what the sums are over."""
        self.tokens += row.tree.num_tokens
        self.documents += row.tree.num_segments
        self.longest = max(self.longest, int((row.tree.ancestor_tokens + row.tree.lengths).max()))
        self.with_bos += sum(first is not None for first in _bos_of_segments(row, self.bos_token_id))

    def result(self) -> Attention:
        """The means. Raises: ValueError where no row has run."""
        if not self.tokens:
            raise ValueError("there are no rows, so there is no attention to measure; give at least one document")
        config, means = self.hymba.config, (self.sums / self.tokens).tolist()
        layers = tuple(_layer(config, layer, heads) for layer, heads in enumerate(means))
        return Attention(
            tokens=self.tokens,
            documents=self.documents,
            longest=self.longest,
            documents_with_bos=self.with_bos,
            all_layers=_mean([one.mean for one in layers]),
            global_layers=_mean_if_any([one.mean for one in layers if one.is_global]),
            local_layers=_mean_if_any([one.mean for one in layers if not one.is_global]),
            layers=layers,
        )


def _layer(config: HymbaConfig, layer: int, heads: list[list[float]]) -> LayerAttention:
    shares = tuple(Shares(*head) for head in heads)
    return LayerAttention(layer, config.is_global(layer), config.kv_source(layer), _mean(shares), shares)


def _bos_of_segments(row: Row, bos_token_id: int | None) -> list[int | None]:
    """Per segment, the text token that begins its path; None where that is not `<s>`."""
    starts = [row.tree.offsets[row.tree.path(segment)[0]] for segment in range(row.tree.num_segments)]
    return [int(start) if int(row.input_ids[start]) == bos_token_id else None for start in starts]


def head_sums(block: WeightBlock, meta: int, bos: int | None) -> Tensor:
    """(n, 6) of each head, the `QUANTITIES` added up over the block's queries, in float64. Takes the weights' memory."""
    weights = block.weights
    own = weights[..., -len(block.queries) :].diagonal(dim1=-2, dim2=-1)  # the queries' own keys come last
    first = torch.zeros_like(own)
    if bos is not None:
        place = (block.keys == bos).nonzero().flatten()  # none where the window has left it behind
        others = (block.queries != bos).to(weights.dtype)
        first = weights[..., place].sum(-1) * others
    to_meta, to_text = weights[..., :meta].sum(-1), weights[..., meta:].sum(-1)
    even = block.sees.sum(-1).to(weights.dtype).log().expand_as(own)
    shares = [to_meta, first, own.clone(), to_text - own - first]
    entropy = torch.special.entr(weights, out=weights).sum(-1)
    return torch.stack([*shares, entropy, even], dim=-1).double().sum(1)


def _mean(shares: Sequence[Shares]) -> Shares:
    return Shares(*(sum(getattr(one, name) for one in shares) / len(shares) for name in QUANTITIES))


def _mean_if_any(shares: Sequence[Shares]) -> Shares | None:
    return _mean(shares) if shares else None
