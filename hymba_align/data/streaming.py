"""Records made while training reads them, for sets larger than the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hymba_align.data.counts import Counts, SourceCounts, nothing_left
from hymba_align.data.reading.sources import Source
from hymba_align.data.records import Maker, record_features
from hymba_align.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

SHUFFLED = 10_000  # records from which a stream of several sources draws at random


class StreamedSource:
    """A source's records in order, each time it is called; `counts` are those of the pass that began last.

    Args:
        check: receives the counts of every chunk, and raises for rows that may not be lost.
    """

    def __init__(self, opened: Source, maker: Maker, check: Callable[[SourceCounts], None]) -> None:
        self.opened, self.maker, self.check = opened, maker, check
        self.counts = Counts()

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yields records. Raises: DataError, also where not one record comes of the whole source."""
        self.counts = Counts()
        for chunk in self.opened.chunks():
            table, counts = self.maker(chunk)
            self.counts.add(counts)
            self.check(self.counted(counts))
            yield from table.to_pylist()
        if not self.counts.conversations:
            raise DataError(nothing_left([self.counted(self.counts)]))

    def counted(self, counts: Counts) -> SourceCounts:
        """Counts with what is known about the source."""
        return SourceCounts.of(self.maker.settings, self.maker.reader.schema, counts, self.opened.passed_over)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedSource:
        """Itself: datasets copies what it iterates over, and the counts are wanted here."""
        return self


def mixed_stream(sources: Sequence[StreamedSource], seed: int) -> IterableDataset:
    """The records of all sources, each as often as it is repeated; several take turns and are shuffled."""
    from datasets import IterableDataset, interleave_datasets

    streams = []
    for source in sources:
        settings = source.maker.settings
        stream = IterableDataset.from_generator(source, features=record_features(settings.stage))
        streams += [stream] * settings.source.repeat
    if len(streams) == 1:
        return streams[0].remove_columns("validation")
    mixed = interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
    return mixed.shuffle(seed=seed, buffer_size=SHUFFLED).remove_columns("validation")
