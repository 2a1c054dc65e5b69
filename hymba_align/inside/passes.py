"""One forward pass over each row for all that look at the same model: attention, fusion, the states behind predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from hymba_align.inside.observing import hymba_in
from hymba_align.inside.rows import Row
from hymba_align.model.modeling import NOT_SCORED
from hymba_align.model.segments import ROOT


class Watcher(Protocol):
    """Something that looks at a model while it runs."""

    def watching(self, row: Row) -> AbstractContextManager[None]:
        """A context in which the row runs."""
        ...

    def ran(self, row: Row, hidden_TD: Tensor) -> None:
        """The row ran, and these are its last hidden states."""
        ...


@torch.no_grad()
def run_rows(model: nn.Module, rows: Iterable[Row], watchers: Sequence[Watcher]) -> None:
    """Runs each row once while all of them watch. The model's mode is left as it is.

    Args:
        model: a Hymba, with or without adapters around it.
    """
    hymba = hymba_in(model)
    device = hymba.embed_tokens.weight.device
    for row in rows:
        with ExitStack() as stack:
            for one in watchers:
                stack.enter_context(one.watching(row))
            output = hymba(input_ids=row.input_ids[None].to(device), segments=row.tree, use_cache=False)
        for one in watchers:
            one.ran(row, output.last_hidden_state[0])


def scored_places(row: Row) -> tuple[Tensor, Tensor]:
    """(n,) places of the row's tokens under the loss, and (n,) those of the tokens that predict them.

    A document's first token is predicted by nothing.
    """
    before_T = row.tree.predecessors()
    chosen_n = ((row.labels != NOT_SCORED) & (before_T != ROOT)).nonzero().flatten()
    return chosen_n, before_T[chosen_n]


class PredictingStates(Watcher):
    """Keeps the last hidden states of the tokens that predict, in main memory: they are as many as the rows make."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        """(n, D) of each row"""

    def watching(self, row: Row) -> AbstractContextManager[None]:
        """Nothing: the states come at the end."""
        return nullcontext()

    def ran(self, row: Row, hidden_TD: Tensor) -> None:
        """Keeps those of the row."""
        self.states.append(hidden_TD[scored_places(row)[1].to(hidden_TD.device)].cpu())
