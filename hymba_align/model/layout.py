"""From a caller's batch to one packed row and back.

Every input form ends up as a `Layout`: the segment tree of the row, where its tokens come from in the batch, and
where each batch position finds its output.

B batch rows, T columns, L tokens of the packed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.model.segments import ROOT, SegmentTree, document_lengths


@dataclass(frozen=True)
class Layout:
    """How a (B, T) batch lies in one packed row."""

    tree: SegmentTree
    take_L: Tensor | None
    """(L,) position in the flattened batch of each token of the row; None when the row is the batch in order."""
    give_BT: Tensor | None
    """(B, T) token of the row that each batch position shows, L for padding; None when the row is the batch in order."""
    rows_S: Tensor
    """(S,) batch row of each segment."""

    def pack(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (L, D)"""
        flat = x_BTD.flatten(0, 1)
        return flat if self.take_L is None else flat[self.take_L.to(flat.device)]

    def unpack(self, x_LD: Tensor, batch: int) -> Tensor:
        """(L, D) -> (B, T, D), zeros at padding."""
        if self.give_BT is None:
            return x_LD.unflatten(0, (batch, -1))
        return torch.cat([x_LD, x_LD.new_zeros(1, x_LD.shape[1])])[self.give_BT.to(x_LD.device)]


def lay_out(
    batch: int,
    columns: int,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    segments: SegmentTree | None = None,
    shared_prefix_lengths: Tensor | None = None,
) -> Layout:
    """The layout of a batch, from whichever form its documents are described in.

    Args:
        batch: B.
        columns: T.
        input_ids: (B, T), to check shared prefixes against; None with embeddings.
        attention_mask: (B, T), 0 marks padding on any side.
        position_ids: (B, T) or (1, T), restarting at 0 with each document.
        cu_seq_lens: (S + 1,) cumulative document lengths of a single row.
        segments: an explicit tree over a single row.
        shared_prefix_lengths: (B / 2,) leading real tokens that rows i and i + B / 2 have in common.

    Raises:
        ValueError: forms that contradict each other or the batch; the message names the value.
    """
    mask = _real_tokens(batch, columns, attention_mask)
    if segments is not None:
        return _explicit(batch, columns, segments, mask, shared_prefix_lengths)
    if shared_prefix_lengths is not None:
        if cu_seq_lens is not None:
            raise ValueError(
                "shared_prefix_lengths and cu_seq_lens exclude each other; a preference batch is padded, not packed"
            )
        return _preference(mask, shared_prefix_lengths.detach().cpu(), input_ids)
    return _documents(mask, position_ids, cu_seq_lens)


def _real_tokens(batch: int, columns: int, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(batch, columns, dtype=torch.bool)
    if tuple(attention_mask.shape) != (batch, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but the input has {(batch, columns)}; "
            "give one entry per token, 0 at padding"
        )
    mask = attention_mask.detach().cpu() != 0
    if not mask.any():
        raise ValueError("attention_mask has no real token; at least one entry must be 1")
    return mask


def _explicit(batch: int, columns: int, segments: SegmentTree, mask: Tensor, shared: Tensor | None) -> Layout:
    if batch != 1:
        raise ValueError(f"segments describe a single row, but the batch has {batch}; put all segments in one row")
    if shared is not None or not mask.all():
        raise ValueError("segments exclude shared_prefix_lengths and padding; the tree alone describes the row")
    if segments.num_tokens != columns:
        raise ValueError(f"segments hold {segments.num_tokens} tokens but the row has {columns}")
    return Layout(segments, None, None, torch.zeros(segments.num_segments, dtype=torch.int64))


def _documents(mask: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Layout:
    batch, columns = mask.shape
    take = mask.flatten().nonzero().flatten()
    rows = take // columns
    if position_ids is None:
        lengths = SegmentTree.from_attention_mask(mask).lengths
    else:
        lengths = document_lengths(position_ids.detach().cpu().expand(batch, columns).flatten()[take], rows)
    if cu_seq_lens is not None:
        packed = SegmentTree.from_cu_seq_lens(cu_seq_lens)
        if batch != 1 or packed.num_tokens != columns:
            raise ValueError(
                f"cu_seq_lens ends at {packed.num_tokens} but the input is {(batch, columns)}; it describes a single row, whole"
            )
        if position_ids is not None and not torch.equal(packed.lengths, lengths):
            raise ValueError(
                f"cu_seq_lens gives documents of {packed.lengths.tolist()} tokens, position_ids of {lengths.tolist()}; they must agree"
            )
        lengths = packed.lengths
    tree = SegmentTree.from_lengths(lengths)
    rows_S = rows[tree.offsets]
    if len(take) == batch * columns:
        return Layout(tree, None, None, rows_S)
    give = torch.full((batch * columns,), len(take))
    give[take] = torch.arange(len(take))
    return Layout(tree, take, give.view(batch, columns), rows_S)


def _preference(mask: Tensor, shared: Tensor, input_ids: Tensor | None) -> Layout:
    batch, columns = mask.shape
    if batch % 2 or shared.shape != (batch // 2,):
        raise ValueError(
            f"shared_prefix_lengths has shape {tuple(shared.shape)} for a batch of {batch}; "
            "a preference batch is [chosen; rejected] with one length per pair"
        )
    take: list[Tensor] = []
    lengths, parents, rows = [], [], []
    give = torch.full((batch, columns), ROOT)
    total = 0

    def add_segment(row: int, tokens: Tensor, parent: int) -> int:
        nonlocal total
        if len(tokens) == 0:
            return parent
        take.append(row * columns + tokens)
        give[row, tokens] = torch.arange(total, total + len(tokens))
        total += len(tokens)
        lengths.append(len(tokens))
        parents.append(parent)
        rows.append(row)
        return len(lengths) - 1

    for pair, prefix in enumerate(shared.tolist()):
        chosen, rejected = (mask[row].nonzero().flatten() for row in (pair, pair + batch // 2))
        if not 0 <= prefix <= min(len(chosen), len(rejected)):
            raise ValueError(
                f"shared_prefix_lengths[{pair}] is {prefix}, but its rows have {len(chosen)} and {len(rejected)} real tokens"
            )
        if input_ids is not None:
            ids = input_ids.detach().cpu()
            if not torch.equal(ids[pair, chosen[:prefix]], ids[pair + batch // 2, rejected[:prefix]]):
                raise ValueError(
                    f"shared_prefix_lengths[{pair}] is {prefix}, but the first {prefix} tokens of its two rows differ"
                )
        prompt = add_segment(pair, chosen[:prefix], ROOT)
        add_segment(pair, chosen[prefix:], prompt)
        add_segment(pair + batch // 2, rejected[prefix:], prompt)
        give[pair + batch // 2, rejected[:prefix]] = give[pair, chosen[:prefix]]
    give[give == ROOT] = total
    tree = SegmentTree(torch.tensor(lengths), torch.tensor(parents))
    return Layout(tree, torch.cat(take), give, torch.tensor(rows))
