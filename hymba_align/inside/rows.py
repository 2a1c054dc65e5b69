"""Documents packed into rows that the model runs whole.

T tokens of a row, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_align.model.modeling import NOT_SCORED
from hymba_align.model.segments import SegmentTree


@dataclass(frozen=True)
class Document:
    """One text or conversation as tokens."""

    name: str
    """Where it comes from: file and line, or a title"""
    token_ids: tuple[int, ...]
    scored: tuple[bool, ...]
    """Which tokens are under the loss: what the assistant writes, of a plain text all"""
    domain: str = ""
    """What it is an example of (maths, code, ...); empty where nobody says"""


@dataclass(frozen=True, eq=False)
class Row:
    """Documents one after another, each a segment that continues the meta tokens."""

    input_ids: Tensor
    """(T,)"""
    labels: Tensor
    """(T,) token ids; `NOT_SCORED` where the loss does not look"""
    tree: SegmentTree
    documents: tuple[Document, ...]
    """(S,) of each segment"""


def pack_rows(documents: Sequence[Document], tokens_per_row: int) -> Iterator[Row]:
    """The documents in order, as many in a row as fit.

    Args:
        documents: none of them empty.
        tokens_per_row: most tokens of a row, meta tokens not counted; a longer document has a row of its own.
    """
    waiting: list[Document] = []
    for document in documents:
        if waiting and sum(len(one.token_ids) for one in waiting) + len(document.token_ids) > tokens_per_row:
            yield _row(waiting)
            waiting = []
        waiting.append(document)
    if waiting:
        yield _row(waiting)


def _row(documents: Sequence[Document]) -> Row:
    input_ids = torch.tensor([token for document in documents for token in document.token_ids])
    scored = torch.tensor([flag for document in documents for flag in document.scored])
    return Row(
        input_ids,
        input_ids.masked_fill(~scored, NOT_SCORED),
        SegmentTree.from_lengths([len(document.token_ids) for document in documents]),
        tuple(documents),
    )
