"""Data sections turned into the datasets that trainers take, with every row accounted for.

Each source is read in chunks, which worker processes turn into records (records.py); its records are cached by content
(cache.py). The sources' records are then repeated, mixed and divided into training and validation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.data.cache import cached, code_digest, digest, tokenizer_digest
from hymba_align.data.counts import Counts, SourceCounts, nothing_left
from hymba_align.data.reading.converters import converter_digest
from hymba_align.data.reading.examples import Example, Located, Lost
from hymba_align.data.reading.row_reader import RowReader, check_stage
from hymba_align.data.reading.schemas import Schema, schema_of
from hymba_align.data.reading.sources import Source, open_source, parse_row
from hymba_align.data.records import Maker, record_features
from hymba_align.data.settings import Settings
from hymba_align.data.streaming import StreamedSource, mixed_stream
from hymba_align.data.template import has_generation_markers
from hymba_align.data.workers import ordered_map
from hymba_align.errors import ChangedDataError, DataError, DataFileError
from hymba_align.recipe import DataSection, SourceSection, TrainingStage
from hymba_align.secrets import shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A dataset ready for a trainer, one for validation if any, and what became of the rows of every source.

    SFT: columns `input_ids`, `assistant_masks`, `place`; DPO: `prompt`, `chosen`, `rejected` (lists of messages), `place`
    and, where there are any, `tools`. A streamed dataset has no counts before it is read; `streams` have them afterwards.
    """

    dataset: Dataset
    validation: Dataset | None
    sources: tuple[SourceCounts, ...]
    streams: tuple[StreamedSource, ...] = ()

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def kept(self) -> int:
        """Rows in the data, on either side; several may share a conversation."""
        return sum(source.rows_kept for source in self.sources)

    @property
    def trained_tokens(self) -> int:
        """Tokens under the loss in one epoch; of preferences, those of both replies."""
        return sum(source.repeat * source.trained_tokens for source in self.sources)

    @property
    def total_tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(source.repeat * source.total_tokens for source in self.sources)

    @property
    def lost(self) -> tuple[Lost, ...]:
        """Every row that is left out, in order."""
        return tuple(chain.from_iterable(source.lost for source in self.sources))

    def counted(self) -> tuple[SourceCounts, ...]:
        """What became of the rows of every source; of streamed ones, of those that were read by now."""
        return self.sources or tuple(stream.counted(stream.counts) for stream in self.streams)

    def summary(self) -> str:
        """A line for each source, below it those about rows that are lost, and one for all sources where there are several."""
        if not self.sources:
            return "streaming: rows are prepared, and counted, while training reads them"
        lines = [source.summary() for source in self.sources]
        if self.validation is not None:
            lines.append(f"{len(self.validation):,} conversations are kept for validation")
        if len(self.sources) > 1:
            lines.append(
                f"together: {len(self.dataset):,} conversations; "
                f"{self.trained_tokens:,} of {self.total_tokens:,} tokens trained on"
            )
        return "\n".join(lines)


def prepare_sft(section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, *, seed: int) -> Prepared:
    """Conversations and texts as tokens, none longer than `max_length`.

    Raises: DataError for a source that cannot be read, and, unless the section lets rows go, for rows that would be lost.
    """
    if not has_generation_markers(tokenizer):
        raise DataError(
            "the chat template does not mark what the assistant writes ({% generation %}), so nothing would be trained; "
            "use chat_template: hymba"
        )
    return _prepare(section, tokenizer, max_length, "sft", seed)


def prepare_preferences(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, *, seed: int
) -> Prepared:
    """Preferences as messages, which TRL tokenizes; neither side is longer than `max_length` tokens.

    Raises: DataError, as `prepare_sft`.
    """
    if section.over_long == "split":
        raise DataError(
            "data.over_long is 'split', and a pair of answers cannot be split; set dpo.data.over_long to 'truncate', "
            "which shortens the prompt, or 'drop'"
        )
    return _prepare(section, tokenizer, max_length, "dpo", seed)


def check_streaming(section: DataSection, stage: TrainingStage) -> None:
    """Raises DataError where a stream is asked for what needs a set that is read before training."""
    if section.streaming and stage == "dpo":
        raise DataError(
            "data.streaming is true, but DPO computes the reference log-probabilities before training and so reads the "
            "whole set; set dpo.data.streaming to false"
        )
    if section.streaming and section.validation_fraction:
        raise DataError(
            "data.validation_fraction needs a set that is read before training; set it to 0, or data.streaming to false"
        )


def iterate_examples(section: DataSection, stage: TrainingStage) -> Iterator[Located[Example] | Lost]:
    """Every row of every source in order, as an example or as why it is none; nothing is rendered or left out."""
    for source in section.all_sources:
        opened = open_source(source)
        reader = RowReader(source, _schema(source, opened, stage), stage)
        for chunk in opened.chunks():
            counts = Counts()
            yield from reader.read(chunk, counts)
            yield from counts.lost


def check_first_rows(section: DataSection, stage: TrainingStage) -> None:
    """Raises the DataError of what a stage cannot train on, as far as each source's first row that can be read shows it."""
    for source in section.all_sources:
        _schema(source, open_source(source), stage)


def examine(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, stage: TrainingStage, *, seed: int
) -> list[tuple[Dataset, SourceCounts]]:
    """Each source's records, of both sides, and what became of its rows, whether or not the section lets rows go.

    Raises: DataError for a source that cannot be read.
    """
    return [_records(section, one, tokenizer) for one in _settings(section, max_length, stage, seed)]


def _settings(section: DataSection, max_length: int, stage: TrainingStage, seed: int) -> list[Settings]:
    seed = seed if section.seed is None else section.seed
    over_long = (
        "drop" if section.over_long == "refuse" else section.over_long
    )  # what is refused is counted, then raised
    return [
        Settings(source, stage, section.loss_on, over_long, section.validation_fraction, max_length, seed)
        for source in section.all_sources
    ]


def _prepare(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, stage: TrainingStage, seed: int
) -> Prepared:
    check_streaming(section, stage)
    seed = seed if section.seed is None else section.seed
    if section.streaming:
        return _streamed(section, _settings(section, max_length, stage, seed), tokenizer, seed)
    made = examine(section, tokenizer, max_length, stage, seed=seed)
    counts = tuple(counted for _, counted in made)
    _refuse_losses(section, counts)
    dataset = _mixed([records for records, _ in made], section, seed, validation=False)
    if dataset is None:
        raise DataError(nothing_left(counts))
    validation = _mixed([records for records, _ in made], section, seed, validation=True)
    if validation is None and section.validation_fraction:
        raise DataError(
            f"data.validation_fraction is {section.validation_fraction:g}, which chose none of "
            f"{sum(one.rows_kept for one in counts):,} rows for validation; raise it"
        )
    return Prepared(dataset, validation, counts)


# ---- one source ------------------------------------------------------------------------------------------------------


def _schema(source: SourceSection, opened: Source, stage: TrainingStage) -> Schema | None:
    """The schema of a source's rows, by its first one that can be read; None where a converter decides row by row.

    Raises: DataError where the stage cannot train on it.
    """
    if source.convert is not None:
        return None
    first: Lost | None = None
    for raw in chain.from_iterable(opened.chunks()):
        try:
            row = parse_row(raw)
        except DataError as error:
            first = first or Lost.because(raw.place, error)
            continue  # preparing it counts the row as lost
        try:
            schema = schema_of(source, row, stage)
            check_stage(schema, stage)
        except DataError as error:
            raise type(error)(f"{raw.place}: {error}") from error
        if source.examples_per_conversation > 1 and schema.name != "question_answer":
            raise DataError(
                f"{shown(source.path)}: examples_per_conversation is {source.examples_per_conversation}, but only rows of "
                "question and answer can be joined; set it to 1"
            )
        return schema
    assert first is not None, "a source without rows was refused while it was read"
    raise DataFileError(
        f"{first.place}: {first.reason} (no row of {shown(source.path)} can be read; 'hymba-align data check' lists what is "
        "wrong with each)"
    )


def _records(
    section: DataSection, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, SourceCounts]:
    """The records of a source, both sides, from the cache or made now."""
    from datasets import Dataset, DatasetInfo

    opened = open_source(settings.source)
    schema = _schema(settings.source, opened, settings.stage)
    maker = Maker(settings, schema, tokenizer)
    key = _key(settings, opened, tokenizer)
    folder = cached(key, partial(_build, opened, maker, section.workers))
    counts = Counts.of_json(json.loads((folder / "counts.json").read_text(encoding="utf-8")))
    read = Dataset.from_file(str(folder / "records.arrow"), info=DatasetInfo(features=record_features(settings.stage)))
    # By content, so that what TRL derives from it and caches is found again, and never for other content.
    read._fingerprint = digest([folder.name, "records"])[:16]
    return read, SourceCounts.of(settings, schema, counts, opened.passed_over)


def _key(settings: Settings, opened: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that a source's records depend on."""
    source = settings.source.model_dump(exclude={"repeat", "storage_options"})
    source["path"] = shown(settings.source.path)
    return {
        **asdict(settings),
        "source": source,
        "content": opened.identity,
        "converter": converter_digest(settings.source.convert) if settings.source.convert else None,
        "tokenizer": tokenizer_digest(tokenizer),
        "code": code_digest(),
    }


def _build(opened: Source, maker: Maker, workers: int | None, folder: Path) -> None:
    """Writes a source's records, and what became of its rows, to `folder`."""
    from datasets.arrow_writer import ArrowWriter

    total = Counts()
    with ArrowWriter(path=str(folder / "records.arrow"), features=record_features(maker.settings.stage)) as writer:
        for table, counts in ordered_map(maker, opened.chunks(), workers):
            if len(table):
                writer.write_table(table)
            total.add(counts)
        writer.finalize()
    if opened.dataset is None and open_source(maker.settings.source).identity != opened.identity:
        raise ChangedDataError(f"{opened.name}: changed while it was read; run the command again")
    (folder / "counts.json").write_text(json.dumps(total.to_json()), encoding="utf-8")


def _streamed(
    section: DataSection, settings: Sequence[Settings], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Prepared:
    streams = []
    for one in settings:
        opened = open_source(one.source)
        maker = Maker(one, _schema(one.source, opened, one.stage), tokenizer)
        streams.append(StreamedSource(opened, maker, lambda counts: _refuse_losses(section, [counts])))
    return Prepared(mixed_stream(streams, seed), None, (), tuple(streams))


# ---- several sources -------------------------------------------------------------------------------------------------


def _mixed(records: Sequence[Dataset], section: DataSection, seed: int, *, validation: bool) -> Dataset | None:
    """One side of all sources; None where it is empty.

    Several sources, or repeated ones, are shuffled, so that packed rows mix them; a single one keeps its order.
    Validation repeats nothing.
    """
    import numpy as np
    from datasets import concatenate_datasets

    if validation and not section.validation_fraction:
        return None
    together = concatenate_datasets(list(records)) if len(records) > 1 else records[0]
    of_side = together.with_format("numpy", columns=["validation"])[:]["validation"] == validation
    ends = np.cumsum([len(one) for one in records])
    parts = []
    for source, start, end in zip(section.all_sources, [0, *ends[:-1]], ends, strict=True):
        indices = start + np.flatnonzero(of_side[start:end])
        parts.append(indices if validation else np.tile(indices, source.repeat))
    chosen = np.concatenate(parts)
    if not len(chosen):
        return None
    if len(chosen) != len(together) or len(parts) > 1:
        if not validation and (len(parts) > 1 or section.all_sources[0].repeat > 1):
            chosen = np.random.default_rng(seed).permutation(chosen)
        together = together.select(chosen)
    together = together.remove_columns("validation")
    if "tools" in together.column_names and not any(together["tools"]):
        together = together.remove_columns("tools")
    return together


def _refuse_losses(section: DataSection, sources: Sequence[SourceCounts]) -> None:
    """Raises DataError, beginning with the first row's place, where rows are lost and the section does not let them go."""
    lost = [one for source in sources for one in source.lost]
    refused = [one for one in lost if (section.over_long if one.overlong else section.bad_rows) == "refuse"]
    if not refused:
        return
    first, more = refused[0], len(refused) - 1
    rest = ""
    if more:
        rest = f" ({more:,} more row{'s' if more > 1 else ''} would be lost; 'hymba-align data check' lists them)"
    remedy = "" if first.overlong else "; data.bad_rows: drop leaves such rows out"
    raise DataError(f"{first.place}: {first.reason}{rest}{remedy}")
