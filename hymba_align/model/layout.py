"""From a caller's batch to one packed row and back.

Every input form ends up as a `Layout`: the segment tree of the row, where its tokens come from in the batch, and
where each batch position finds its output.

B batch rows, T columns, L tokens of the packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hymba_align.model.rows import take_rows
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
        return take_rows(torch.cat([x_LD, x_LD.new_zeros(1, x_LD.shape[1])]), self.give_BT.to(x_LD.device))

    def tokens_at(self, positions: Tensor) -> Tensor:
        """(n,) tokens of the row that positions of the flattened batch, (n,) or (1, n), show.

        Raises:
            ValueError: a position outside the batch or at padding.
        """
        positions = positions.detach().cpu().flatten()
        tokens = self.tree.num_tokens
        size = tokens if self.give_BT is None else self.give_BT.numel()
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < size:
            raise ValueError(
                f"positions_to_keep reach from {int(positions.min())} to {int(positions.max())}, "
                f"but the flattened batch has {size} positions"
            )
        if self.give_BT is None:
            return positions
        found = self.give_BT.flatten()[positions]
        if (found == tokens).any():
            position = int(positions[found == tokens][0])
            raise ValueError(f"positions_to_keep holds {position}, which is padding; give real tokens only")
        return found


def lay_out(
    batch: int,
    columns: int,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    seq_idx: Tensor | None = None,
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
        seq_idx: (B, T) or (1, T), the number of the document that each token belongs to.
        segments: an explicit tree over a single row.
        shared_prefix_lengths: (B / 2,) leading real tokens that rows i and i + B / 2 have in common.

    Raises:
        ValueError: forms that contradict each other or the batch; the message names the value.
    """
    mask = _real_tokens(batch, columns, attention_mask)
    described = (position_ids, cu_seq_lens, seq_idx, segments, shared_prefix_lengths)
    if columns == 1 and all(form is None for form in described) and (attention_mask is None or bool(mask.all())):
        return _one_token_each(batch)
    lengths = _document_lengths(mask, position_ids, cu_seq_lens, seq_idx)
    if segments is not None:
        if shared_prefix_lengths is not None:
            raise ValueError("segments and shared_prefix_lengths exclude each other; the tree alone describes the row")
        return _explicit(mask, segments, lengths)
    if shared_prefix_lengths is not None:
        return _preference(mask, shared_prefix_lengths.detach().cpu(), input_ids, lengths)
    return _documents(mask, _one_per_row(mask) if lengths is None else lengths)


@lru_cache(maxsize=64)
def _one_token_each(batch: int) -> Layout:
    """A step of generation; the same for all of them."""
    rows = torch.arange(batch)
    return Layout(SegmentTree.from_lengths(torch.ones_like(rows)), None, None, rows)


def _real_tokens(batch: int, columns: int, attention_mask: Tensor | None) -> Tensor:
    """(B, T) True at real tokens, on the CPU."""
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


def _one_per_row(mask_BT: Tensor) -> Tensor:
    return SegmentTree.from_attention_mask(mask_BT).lengths


def _document_lengths(
    mask_BT: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """(S,) lengths of the documents, in the batch's order; None where nothing describes them."""
    batch, columns = mask_BT.shape
    found: dict[str, Tensor] = {}
    rows = torch.arange(batch)[:, None].expand(batch, columns)[mask_BT]
    if position_ids is not None:
        positions = position_ids.detach().cpu().expand(batch, columns)
        _check_first_positions(mask_BT, positions)
        found["position_ids"] = document_lengths(positions[mask_BT], rows)
    if cu_seq_lens is not None:
        packed = SegmentTree.from_cu_seq_lens(cu_seq_lens)
        if batch != 1 or packed.num_tokens != columns or not mask_BT.all():
            raise ValueError(
                f"cu_seq_lens ends at {packed.num_tokens} but the input is {(batch, columns)}; "
                "it describes a single row, whole and without padding"
            )
        found["cu_seq_lens"] = packed.lengths
    if seq_idx is not None:
        documents = seq_idx.detach().cpu().expand(batch, columns)[mask_BT]
        _, found["seq_idx"] = torch.unique_consecutive(torch.stack([rows, documents]), dim=1, return_counts=True)
    names = list(found)
    for name in names[1:]:
        if not torch.equal(found[names[0]], found[name]):
            raise ValueError(
                f"{names[0]} gives documents of {found[names[0]].tolist()} tokens, {name} of {found[name].tolist()}; they must agree"
            )
    return found[names[0]] if names else None


def _check_first_positions(mask_BT: Tensor, positions_BT: Tensor) -> None:
    """A row starts at position 0, or at its column where the caller simply numbered the columns."""
    first = mask_BT.int().argmax(dim=1)
    start = positions_BT.gather(1, first[:, None])[:, 0]
    bad = (mask_BT.any(dim=1) & (start != 0) & (start != first)).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise ValueError(
            f"position_ids of row {row} start at {int(start[row])}; they must start at 0, because a row without a cache "
            "starts right after the meta tokens"
        )


def _explicit(mask_BT: Tensor, segments: SegmentTree, lengths: Tensor | None) -> Layout:
    batch, columns = mask_BT.shape
    if batch != 1:
        raise ValueError(f"segments describe a single row, but the batch has {batch}; put all segments in one row")
    if not mask_BT.all():
        raise ValueError("segments exclude padding; the tree alone describes the row")
    if segments.num_tokens != columns:
        raise ValueError(f"segments hold {segments.num_tokens} tokens but the row has {columns}")
    if lengths is not None and len(lengths) > 1:
        raise ValueError(
            "segments exclude position_ids, cu_seq_lens and seq_idx that divide the row; the tree alone describes it"
        )
    return Layout(segments, None, None, torch.zeros(segments.num_segments, dtype=torch.int64))


def _documents(mask_BT: Tensor, lengths_S: Tensor) -> Layout:
    """Independent documents of the given lengths over the batch's real tokens."""
    batch, columns = mask_BT.shape
    take = mask_BT.flatten().nonzero().flatten()
    tree = SegmentTree.from_lengths(lengths_S)
    rows_S = (take // columns)[tree.offsets]
    if len(take) == batch * columns:
        return Layout(tree, None, None, rows_S)
    give = torch.full((batch * columns,), len(take))
    give[take] = torch.arange(len(take))
    return Layout(tree, take, give.view(batch, columns), rows_S)


class _RowBuilder:
    """Collects the segments of a packed row, one after another."""

    def __init__(self, batch: int, columns: int) -> None:
        self.columns = columns
        self.take: list[Tensor] = []
        self.give_BT = torch.full((batch, columns), ROOT)
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.rows: list[int] = []

    def add(self, row: int, tokens: Tensor, parent: int) -> int:
        """The new segment of these columns of a batch row; without columns, its parent."""
        if len(tokens) == 0:
            return parent
        start = sum(self.lengths)
        self.take.append(row * self.columns + tokens)
        self.give_BT[row, tokens] = torch.arange(start, start + len(tokens))
        self.lengths.append(len(tokens))
        self.parents.append(parent)
        self.rows.append(row)
        return len(self.lengths) - 1

    def layout(self) -> Layout:
        """What was collected; batch positions that nobody gave a token are padding."""
        self.give_BT[self.give_BT == ROOT] = sum(self.lengths)
        tree = SegmentTree(torch.tensor(self.lengths), torch.tensor(self.parents))
        return Layout(tree, torch.cat(self.take), self.give_BT, torch.tensor(self.rows))


def _preference(mask_BT: Tensor, shared: Tensor, input_ids: Tensor | None, lengths: Tensor | None) -> Layout:
    batch, columns = mask_BT.shape
    if batch % 2 or shared.shape != (batch // 2,):
        raise ValueError(
            f"shared_prefix_lengths has shape {tuple(shared.shape)} for a batch of {batch}; "
            "a preference batch is [chosen; rejected] with one length per pair"
        )
    if lengths is not None and not torch.equal(lengths, _one_per_row(mask_BT)):
        raise ValueError(
            "shared_prefix_lengths excludes several documents per row; a preference batch is padded, not packed"
        )
    row = _RowBuilder(batch, columns)
    ids = None if input_ids is None else input_ids.detach().cpu()
    for pair, prefix in enumerate(shared.tolist()):
        other = pair + batch // 2
        chosen, rejected = mask_BT[pair].nonzero().flatten(), mask_BT[other].nonzero().flatten()
        if not 0 <= prefix <= min(len(chosen), len(rejected)):
            raise ValueError(
                f"shared_prefix_lengths[{pair}] is {prefix}, but its rows have {len(chosen)} and {len(rejected)} real tokens"
            )
        if ids is not None and not torch.equal(ids[pair, chosen[:prefix]], ids[other, rejected[:prefix]]):
            raise ValueError(
                f"shared_prefix_lengths[{pair}] is {prefix}, but the first {prefix} tokens of its two rows differ"
            )
        prompt = row.add(pair, chosen[:prefix], ROOT)
        row.add(pair, chosen[prefix:], prompt)
        row.add(other, rejected[prefix:], prompt)
        row.give_BT[other, rejected[:prefix]] = row.give_BT[pair, chosen[:prefix]]
    return row.layout()
