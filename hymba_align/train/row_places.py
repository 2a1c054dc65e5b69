"""Where rows were read, carried beside their batches: no model takes it, and a message can name file and line."""

from __future__ import annotations

from typing import Any

from hymba_align.data.packing import PLACE, PLACES


class NamesRows:
    """A collator whose batches say where their rows were read, under `places`, beside what another one collates."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch; `places` is a list over all documents, missing where rows have none."""
        batch: dict[str, Any] = self.collator(examples)
        places = places_of(examples)
        return {**batch, PLACES: places} if places else batch


def places_of(examples: list[dict[str, Any]]) -> list[str]:
    """Places of packed rows' documents, or of rows that are a document or pair each."""
    found: list[str] = []
    for example in examples:
        found += example[PLACES] if PLACES in example else [example[PLACE]] if PLACE in example else []
    return found
