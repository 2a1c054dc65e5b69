"""What a first recipe has to know of a data file: its schema, the stages it serves, and about how much it holds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from hymba_align.data.counts import Counts
from hymba_align.data.reading.examples import Preference
from hymba_align.data.reading.row_reader import RowReader
from hymba_align.data.reading.schemas import MAPPING, MAPPING_ENDS, canonical_columns, schema_of
from hymba_align.data.reading.sources import RawRow, open_source, parse_row
from hymba_align.errors import ColumnsError, DataError, DataFileError, RecipeError
from hymba_align.recipe import DataSection, SchemaName, TrainingStage, is_local_path
from hymba_align.recipe_loading import load_section

ROWS_READ = 20_000  # of which rows and characters are counted; a larger set gets the largest batch anyway
CHARACTERS_PER_TOKEN = 4  # in English text with a vocabulary of 32,000; 'hymba-align data check' counts exactly


@dataclass(frozen=True)
class DataFile:
    """Rows to train on."""

    path: str
    schema: SchemaName | None
    """None where a function of the user's converts them"""
    stages: tuple[TrainingStage, ...]
    rows: int
    tokens: int
    """About, by `CHARACTERS_PER_TOKEN`"""
    whole: bool
    """Whether all rows were counted"""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe's section `data` that the user gave, with their values"""


def look_at(path: str, keys: Sequence[str] = ()) -> DataFile:
    """What a local file, folder or glob holds, by its first readable row and its first rows.

    Args:
        keys: `key=value` of the recipe's section `data`, such as `columns.question=problem`.
    Raises:
        RecipeError: there is no such key, or it cannot have the value.
        DataError: nothing can be read there, or no schema fits; the message says what to do.
    """
    if not is_local_path(path):
        raise DataFileError(
            f"--data is {path}, which is no file here; give a file, and put a data set of the hub or a URL into the recipe's "
            "data.path afterwards"
        )
    section = _section(path, keys)
    schema: SchemaName | None = None
    stages: tuple[TrainingStage, ...] = ()
    rows = characters = 0
    problem: DataError | None = None
    for raw in chain.from_iterable(open_source(section).chunks()):
        if rows >= ROWS_READ:
            break
        rows += 1
        try:
            row = parse_row(raw)
        except DataError as error:
            problem = problem or type(error)(f"{raw.place}: {error}")
            continue
        characters += sum(len(str(value)) for value in row.values())
        if not stages:
            schema, stages = _converted(section, raw) if section.convert is not None else _recognised(section, raw, row)
    if not stages:
        raise problem or DataFileError(f"{path} holds no row that can be used; it needs at least one")
    given = section.model_dump(mode="json", exclude_unset=True, exclude={"path"})
    return DataFile(path, schema, stages, rows, characters // CHARACTERS_PER_TOKEN, rows < ROWS_READ, given)


def _section(path: str, keys: Sequence[str]) -> DataSection:
    """The section `data` of these keys. Raises: RecipeError."""
    named = [key.removeprefix("data.") for key in keys]
    where = next((key for key in named if key.partition("=")[0] in ("path", "sources")), None)
    if where is not None:
        raise RecipeError(f"override '{where}': --data says already what is read, {path}; leave one of them out")
    return load_section(DataSection, None, [f"path={json.dumps(path)}", *named], prefix="data.")


def _recognised(
    section: DataSection, raw: RawRow, row: Mapping[str, Any]
) -> tuple[SchemaName, tuple[TrainingStage, ...]]:
    """Schema and stages of a row. Raises: DataError."""
    try:
        schema = schema_of(section, row)
    except ColumnsError as error:
        raise ColumnsError(f"{raw.place}: {_with_keys_of_a_command(str(error))}") from error
    columns = canonical_columns([name for name, value in row.items() if value is not None], section)
    if schema.name == "question_answer" and "wrong_answer" in columns:
        return schema.name, ("sft", "dpo")
    return schema.name, ("sft",) if "sft" in schema.stages else ("dpo",)


def _with_keys_of_a_command(told: str) -> str:
    """An error on unknown columns with the mapping as this command takes it; others as they are."""
    before, found, rest = told.partition(MAPPING)
    mapping, ends, after = rest.partition(MAPPING_ENDS)
    if not found or not ends:
        return told
    whole = f"columns={{{mapping}}}"
    quoted = shlex.quote(whole) if set(whole) & set('$`"\\!') else f'"{whole}"'
    return f"{before}as in {quoted} behind the command, or name a function with convert=MODULE:FUNCTION{after}"


def _converted(section: DataSection, raw: RawRow) -> tuple[None, tuple[TrainingStage, ...]]:
    """The stage of a row that the user's function converts; none where it gives no example. Raises: DataError."""
    counts = Counts()
    examples = list(RowReader(section, None).read([raw], counts))
    if counts.lost and not examples:
        raise DataFileError(f"{counts.lost[0].place}: {counts.lost[0].reason}")
    if not examples:
        return None, ()
    return None, ("dpo",) if isinstance(examples[0].value, Preference) else ("sft",)
