"""A chunk of raw rows turned into the records of a training set, with every row accounted for.

This is what worker processes do. It depends on the chunk and the settings alone, and chunks depend on the content alone,
so the records are the same whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hymba_align.data.conversations import ConversationMaker, sft_features
from hymba_align.data.counts import Counts
from hymba_align.data.pairs import PairMaker, preference_features
from hymba_align.data.reading.examples import Example, Located
from hymba_align.data.reading.row_reader import RowReader, content_hash
from hymba_align.data.reading.schemas import Schema
from hymba_align.data.reading.sources import RawRow
from hymba_align.data.settings import Settings
from hymba_align.recipe import TrainingStage

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

ALL_HASHES = 1 << 64  # a hash below a share of this belongs to that share


def record_features(stage: TrainingStage) -> Features:
    """The columns of a stage's records."""
    return sft_features() if stage == "sft" else preference_features()


class Maker:
    """Makes the records of chunks; a worker process has one."""

    def __init__(self, settings: Settings, schema: Schema | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.reader = RowReader(settings.source, schema, settings.stage)
        self.maker = (ConversationMaker if settings.stage == "sft" else PairMaker)(settings, tokenizer)

    def __call__(self, chunk: Sequence[RawRow]) -> tuple[pa.Table, Counts]:
        """The chunk's records and what became of its rows."""
        import pyarrow as pa

        counts = Counts()
        chosen = list(self._chosen(chunk, counts))
        records = self.maker.records(chosen, counts)
        return pa.Table.from_pylist(records, schema=record_features(self.settings.stage).arrow_schema), counts

    def _chosen(self, chunk: Sequence[RawRow], counts: Counts) -> Iterator[tuple[Located[Example], bool]]:
        """The examples that keep_fraction keeps, each with whether it is for validation."""
        fraction, salt = self.settings.source.keep_fraction, f"{self.settings.seed}:"
        for located in self.reader.read(chunk, counts):
            if fraction < 1 and content_hash(located.value, salt=salt) >= fraction * ALL_HASHES:
                counts.rows_not_chosen += 1
                continue
            held_out = self.settings.validation_fraction * ALL_HASHES
            yield located, held_out > 0 and content_hash(located.value) < held_out
