"""Documents packed into rows by TRL's best-fit decreasing, and a report of what that saves.

A document is a conversation or text as tokens. It lies whole in one row; its boundaries are kept in `seq_lengths`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DatasetT = TypeVar("DatasetT", bound="Dataset | IterableDataset")
Counts = np.ndarray[Any, np.dtype[np.int64]]

# At most so many documents and tokens are packed at a time. Each time leaves about half a row empty, and takes some 30
# bytes of memory per token. benchmarks/packing.md has the fill rates.
PACKED_TOGETHER = 20_000
TOKENS_PACKED_TOGETHER = 8_000_000
STREAMED_TOGETHER = 2_500  # documents of a stream, whose lengths are not known beforehand
# transformers' own default of `per_device_train_batch_size`.
PADDED_BATCH = 8
LABELLED_TOGETHER = 100
NOT_TRAINED = -100  # the label that TRL and torch leave out of the loss
PLACE = "place"
"""Column of preparation: where a document, or a pair, was read, as file:line."""
PLACES = "places"
"""Column of packed rows: the places of their documents, in order. So a batch that spoils training can be named."""


def add_labels(dataset: DatasetT) -> DatasetT:
    """`input_ids` and `labels` of a dataset with `input_ids` and `assistant_masks`; a label is -100 where the mask is 0.

    The column `place` stays if there is one.
    """
    return _labels_for_masks(_with_place(dataset, "assistant_masks"))


def _with_place(dataset: DatasetT, marks: str) -> DatasetT:
    """The columns that become rows: tokens, what marks them, and where they were read."""
    known = [PLACE] if PLACE in (dataset.column_names or ()) else []
    return cast("DatasetT", dataset.select_columns(["input_ids", marks, *known]))


def pack(dataset: DatasetT, max_length: int) -> DatasetT:
    """Rows of at most `max_length` tokens as `input_ids`, `labels` and `seq_lengths`, the lengths of their documents.

    Where documents have a `place`, rows have `places`, those of their documents in order.

    The same on every call, and cached beside the dataset's own file. Documents are taken in order, so many at a time, and
    the rows of each time come out longest document first; trainers shuffle rows.

    Args:
        dataset: documents as `input_ids`, with `labels` or `assistant_masks`; none is empty or longer than `max_length`.
    """
    from datasets import Dataset

    marks = "labels" if "labels" in (dataset.column_names or ()) else "assistant_masks"
    documents = _with_place(dataset, marks)
    options: dict[str, Any] = {"batched": True, "fn_kwargs": {"max_length": max_length}}
    if isinstance(documents, Dataset):
        lengths = _lengths(documents)
        _check(lengths, max_length)
        together = _documents_together(lengths)
        fingerprint = _fingerprint(dataset, marks, max_length, together, _trl_version())
        options |= {"batch_size": together, "new_fingerprint": fingerprint}
    else:
        options |= {"batch_size": STREAMED_TOGETHER}
    columns = {"remove_columns": [PLACE]} if PLACE in (documents.column_names or ()) else {}
    with _no_progress_bars():
        rows = documents.with_format("arrow").map(_packed, **options, **columns).with_format(None)
    # Masks are a quarter of the size of labels, so they are packed, and made labels afterwards.
    return cast("DatasetT", rows if marks == "labels" else _labels_for_masks(rows))


@dataclass(frozen=True)
class PackingReport:
    """How full packed rows are, and how many tokens need not be computed.

    `tokens` counts the documents' own, without meta tokens. `padded_tokens` is what the same documents come to unpacked,
    one per row of a padded batch: batches of `PADDED_BATCH` documents drawn at random (the expectation over all orders,
    computed exactly), each padded to its own longest document. `meta_tokens` precede every row, packed or padded.
    """

    rows: int
    documents: int
    tokens: int
    max_length: int
    meta_tokens: int
    padded_tokens: int

    @property
    def fill_rate(self) -> float:
        """tokens / (rows * max_length)."""
        return self.tokens / (self.rows * self.max_length) if self.rows else 0.0

    @property
    def documents_per_row(self) -> float:
        """documents / rows."""
        return self.documents / self.rows if self.rows else 0.0

    @property
    def padding_saved(self) -> int:
        """Padding that is not computed: padded_tokens - tokens. Packed rows go to the model without padding."""
        return self.padded_tokens - self.tokens

    @property
    def meta_saved(self) -> int:
        """Meta tokens that are not computed, for a row has them once: meta_tokens * (documents - rows).

        It adds to `padding_saved`: a padded batch computes padded_tokens + meta_tokens * documents.
        """
        return self.meta_tokens * (self.documents - self.rows)

    def lines(self) -> list[str]:
        """The report for people."""
        padded = self.padded_tokens + self.meta_tokens * self.documents
        packed = self.tokens + self.meta_tokens * self.rows
        return [
            f"{_count(self.rows, 'row')} of up to {_count(self.max_length, 'token')} hold{'s' * (self.rows == 1)} "
            f"{_count(self.documents, 'document')}, {self.documents_per_row:.1f} per row",
            f"fill rate {100 * self.fill_rate:.2f} %: {self.tokens:,} tokens in room for {self.rows * self.max_length:,}",
            f"tokens saved: {self.padding_saved:,} of padding (in batches of {PADDED_BATCH} documents in random order, "
            f"each padded to its longest) and {self.meta_saved:,} meta tokens ({self.meta_tokens} once per row instead of "
            f"once per document)",
            f"a training pass computes {packed:,} tokens instead of {padded:,}",
        ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def packing_report(lengths_per_row: Iterable[Sequence[int]], max_length: int, meta_tokens: int) -> PackingReport:
    """The report of packed rows, from the lengths of each row's documents (the column `seq_lengths`).

    Args:
        meta_tokens: how many the model puts in front of a row.
    """
    rows = [np.asarray(lengths, dtype=np.int64) for lengths in lengths_per_row]
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    return PackingReport(
        rows=len(rows),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        max_length=max_length,
        meta_tokens=meta_tokens,
        padded_tokens=_padded_tokens(lengths, PADDED_BATCH),
    )


def _padded_tokens(lengths: Counts, batch: int) -> int:
    """Tokens of the documents in batches padded to their longest, expected over all orders, rounded.

    Of n documents the i-th shortest is the longest of a random batch of B, or longer, with the probability
    (i choose B) / (n choose B).
    """
    count = len(lengths)
    if not count:
        return 0
    drawn = min(batch, count)
    place = np.arange(count + 1, dtype=np.float64)[:, None]
    others = np.arange(drawn)
    at_most = np.prod(np.maximum(place - others, 0) / (count - others), axis=1)
    return round(count * float(np.diff(at_most) @ np.sort(lengths)))


def _documents_together(lengths: Counts) -> int:
    """How many documents to pack at a time: PACKED_TOGETHER, halved until no batch has too many tokens."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    together = PACKED_TOGETHER
    while (
        together > 1 and np.diff(ends[[*range(0, len(lengths), together), -1]]).max(initial=0) > TOKENS_PACKED_TOGETHER
    ):
        together //= 2
    return together


def _lengths(dataset: Dataset) -> Counts:
    """Tokens of each document, read a batch at a time."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return np.concatenate([np.zeros(0, dtype=np.int64), *map(_table_lengths, batches)])


def _table_lengths(table: Any) -> Counts:
    import pyarrow.compute as pc

    lengths: Counts = pc.list_value_length(table["input_ids"]).to_numpy()
    return lengths


def _packed(table: Any, max_length: int) -> Any:
    """The Arrow table of rows that TRL packs an Arrow table of documents into.

    TRL packs columns with a value per token, and says how long a row's documents are but not which they are. So what it
    packs is each token's document number, and the documents follow.
    """
    import pyarrow as pa

    _check(_table_lengths(table), max_length)
    order, ends, lengths = _best_fit(_table_lengths(table), max_length)
    documents = table.take(order)
    columns = {}
    for name in (name for name in documents.column_names if name != PLACE):
        column = documents[name].combine_chunks()
        columns[name] = type(column).from_arrays(pa.array(ends, column.offsets.type), column.flatten())
    columns["seq_lengths"] = lengths
    if PLACE in documents.column_names:
        columns[PLACES] = pa.ListArray.from_arrays(lengths.offsets, documents[PLACE].combine_chunks())
    return pa.table(columns)


def _best_fit(document_lengths: Counts, max_length: int) -> tuple[Counts, Counts, Any]:
    """The documents' numbers in the order in which rows hold them, where rows begin and end in tokens, and each row's
    lengths of documents as an Arrow list array."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl.data_utils import pack_dataset

    count = len(document_lengths)
    offsets = np.concatenate([[0], np.cumsum(document_lengths)]).astype(np.int64)
    numbers = np.repeat(np.arange(count, dtype=np.int32), document_lengths)
    table = pa.table({"number": pa.LargeListArray.from_arrays(offsets, numbers)})
    together = {"batch_size": count, "keep_in_memory": True, "new_fingerprint": "packed"}
    rows = pack_dataset(Dataset(InMemoryTable(table)), max_length, "bfd", map_kwargs=together).with_format("arrow")[:]
    lengths = rows["seq_lengths"].combine_chunks()
    packed = rows["number"].combine_chunks()
    starts = np.concatenate([[0], np.cumsum(lengths.flatten().to_numpy())])[:-1].astype(np.int64)
    order: Counts = packed.flatten().to_numpy()[starts]
    ends: Counts = np.concatenate([[0], np.cumsum(packed.value_lengths().to_numpy())]).astype(np.int64)
    return order, ends, lengths


def _check(lengths: Counts, max_length: int) -> None:
    """TRL leaves out empty documents and cuts long ones without a word; preparation has none of them."""
    assert lengths.min(initial=1) > 0, "a document is empty"
    assert lengths.max(initial=0) <= max_length, f"a document has {lengths.max()} tokens, max_length is {max_length}"


def _labels_for_masks(dataset: DatasetT) -> DatasetT:
    from datasets import Dataset

    options: dict[str, Any] = {"batched": True, "batch_size": LABELLED_TOGETHER, "remove_columns": ["assistant_masks"]}
    if isinstance(dataset, Dataset):
        options["new_fingerprint"] = _fingerprint(dataset, "labels")
    with _no_progress_bars():
        return cast("DatasetT", dataset.with_format("arrow").map(_labelled, **options).with_format(None))


def _labelled(rows: Any) -> Any:
    """An Arrow table with `labels` in place of `assistant_masks`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids, masks = (rows[column].combine_chunks() for column in ("input_ids", "assistant_masks"))
    tokens = ids.flatten()
    labels = pc.if_else(pc.equal(masks.flatten(), 1), tokens, pa.scalar(NOT_TRAINED, tokens.type))
    offsets = pc.subtract(ids.offsets, ids.offsets[0])  # a slice's offsets count from the start of the whole
    place = rows.column_names.index("assistant_masks")
    return rows.set_column(place, "labels", type(ids).from_arrays(offsets, labels))


def _fingerprint(dataset: Dataset, *settings: Any) -> str:
    """A digest of what a result depends on: the dataset, the settings, and this code.

    datasets would identify an installed function, TRL's too, by its name alone, and find the rows of an older version.
    """
    code = Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(repr((dataset._fingerprint, *settings, code)).encode()).hexdigest()


def _trl_version() -> str:
    import trl

    return str(trl.__version__)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps datasets quiet within the block, unless the user's environment asks for its bars."""
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    shown = config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
