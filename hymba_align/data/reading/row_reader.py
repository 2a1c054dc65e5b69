"""Raw rows read into examples, and a hash of what an example says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hymba_align.data.counts import Counts
from hymba_align.data.reading.converters import load_converter
from hymba_align.data.reading.examples import Example, Located, Lost, Preference
from hymba_align.data.reading.json_text import MOST_LEVELS
from hymba_align.data.reading.schemas import SCHEMAS, Schema, read_examples, schema_of, unread_columns
from hymba_align.data.reading.sources import RawRow, parse_row
from hymba_align.errors import ColumnsError, DataError
from hymba_align.recipe import SourceSection, TrainingStage

ARGUMENT_KEYS = ("arguments", "parameters")  # of a tool call


class RowReader:
    """Raw rows read into examples: parsed, converted by the user's function, brought into a schema.

    `schema` is that of every row; None where a converter gives rows of any, which must then suit the stage, if one is
    given.
    """

    def __init__(self, source: SourceSection, schema: Schema | None, stage: TrainingStage | None = None) -> None:
        self.source, self.schema, self.stage = source, schema, stage
        self.convert = load_converter(source.convert) if source.convert else None

    def read(self, chunk: Sequence[RawRow], counts: Counts) -> Iterator[Located[Example]]:
        """The examples of a chunk in order; rows that cannot be used are counted as lost."""
        for raw in chunk:
            counts.rows_read += 1
            try:
                row = parse_row(raw)
                counts.columns.update(row)
                rows = [row] if self.convert is None else self.convert(dict(row))
            except DataError as error:
                counts.lost.append(Lost.because(raw.place, error))
                continue
            counts.rows_passed_over += not rows
            if _holds_structs(raw):
                rows = [without_invented_nulls(one, self.source.columns.get("tools", "tools")) for one in rows]
            for one in rows:
                try:
                    examples = self._examples(one, counts)
                except DataError as error:
                    counts.lost.append(Lost.because(raw.place, error))
                    continue
                yield from (Located(raw.place, example) for example in examples)

    def _examples(self, row: Mapping[str, Any], counts: Counts) -> list[Example]:
        """The examples of a row of a known schema: the source's, or after a converter its own."""
        schema = self.schema
        if schema is None:
            schema = schema_of(self.source, row, self.stage)
            if self.stage is not None:
                check_stage(schema, self.stage)
            counts.unread_columns.update(unread_columns(row, schema, self.source))
        return read_examples(row, schema, self.source, counts.unread_keys)


def _holds_structs(raw: RawRow) -> bool:
    """Whether a row is a table's with lists or objects in its cells, unlike those of CSV files."""
    return not isinstance(raw.value, bytes) and any(isinstance(cell, (list, Mapping)) for cell in raw.value.values())


def without_invented_nulls(row: Mapping[str, Any], tools_column: str = "tools") -> dict[str, Any]:
    """The row without keys that are null in the arguments of tool calls and in tool descriptions.

    A column of Parquet or Arrow gives all its objects the same keys, so that a call gets the arguments of every other
    call, as null. Which nulls the file's author wrote cannot be told any more.
    """
    pruned: dict[str, Any] = _without_nulls(row, (*ARGUMENT_KEYS, tools_column), MOST_LEVELS, inside=False)
    return pruned


def _without_nulls(value: Any, names: Collection[str], levels: int, *, inside: bool) -> Any:
    """The value without null keys at any depth below the keys `names`, or everywhere if already `inside` one."""
    if not levels:
        return value  # what reads the row refuses such nesting
    if isinstance(value, Mapping):
        return {
            key: _without_nulls(one, names, levels - 1, inside=inside or key in names)
            for key, one in value.items()
            if one is not None or not inside
        }
    if isinstance(value, (list, tuple)):
        return [_without_nulls(one, names, levels - 1, inside=inside) for one in value]
    return value


def check_stage(schema: Schema, stage: TrainingStage) -> None:
    """Raises DataError where the stage cannot train on rows of the schema."""
    if stage not in schema.stages:
        wanted = "; or ".join(", ".join(one.required) for one in SCHEMAS if stage in one.stages)
        raise ColumnsError(f"the rows are of {', '.join(schema.required)}, but {stage.upper()} takes {wanted}")


def content_hash(example: Example, *, salt: str = "") -> int:
    """64 bits of what an example says; of its prompt alone for a preference, whose answers belong on one side."""
    if isinstance(example, Preference):
        content: Any = [list(example.prompt), list(example.tools)]
    else:
        content = vars(example)
    text = salt + json.dumps(content, sort_keys=True, default=list)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
