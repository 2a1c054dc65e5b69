"""Rows from files or the hub, every one checked and labelled with its place.

A row that cannot be used is an error where the file is local, hence the user's own to correct. On the hub nobody can
correct a row among a million, so it is left out and counted with the reason (`reason_to_drop`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.data.schemas import REFUSED, SOURCE, Row, Schema, canonical_row, detect_schema, row_features
from hymba_align.errors import DataError
from hymba_align.recipe import is_local_path

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from hymba_align.recipe import DataSection

LabelledRow = tuple[str, Any]  # "path:line" and the row as it stands there
COLUMN_FILES = {".parquet": "parquet", ".csv": "csv"}
JSON_FILES = (".jsonl", ".json")


@dataclass(frozen=True)
class Source:
    """Canonical rows of one schema (see schemas.py) with their places, and the columns that nothing reads.

    A hub data set's rows have the column `refused` too: why a row cannot be used (its values are then None), or None.
    """

    dataset: Dataset
    schema: Schema
    ignored_columns: tuple[str, ...]
    local: bool


def load_rows(section: DataSection) -> Dataset:
    """The canonical rows of a data section that can be used; the column `source` says where each came from.

    Raises: DataError with file and line.
    """
    source = open_source(section)
    if source.local:
        return source.dataset
    usable = [place for place, reason in enumerate(source.dataset[REFUSED]) if reason is None]
    return source.dataset.select(usable).remove_columns(REFUSED)


def reason_to_drop(error: DataError, place: str, *, local: bool) -> str:
    """Why the row at `place` is left out, in words that other rows with the same fault share.

    Raises: the error itself, beginning with its place, where the file is local.
    """
    what = str(error).removeprefix(f"{place}: ")
    if local:
        raise type(error)(f"{place}: {what}") from error
    return re.sub(r"\b(turn|token) \d+", r"a \1", re.split("[;:] ", what)[0])


def open_source(section: DataSection) -> Source:
    """The rows of a file (.jsonl, .json, .parquet, .csv) or of a hub data set, and what is known about them.

    Raises: DataError with file and line.
    """
    path = Path(section.path).expanduser()
    if path.is_file() and path.suffix in JSON_FILES:
        identity = hashlib.sha256(path.read_bytes()).hexdigest()
        read: Callable[[], Iterable[LabelledRow]] = partial(_json_rows, path)
        columns = None
    else:
        table = _load_table(section, path)
        identity = table._fingerprint
        read = partial(_table_rows, section.path, table)
        columns = table.column_names
    if columns is None:
        columns = _columns_of_first(section.path, read())
    try:
        schema = detect_schema(columns)
    except DataError as error:
        raise DataError(f"{section.path}: {error}") from error
    local = is_local_path(section.path)
    features = row_features(schema.name, refusable=not local)
    rows = partial(_canonical_rows, schema, read, section.max_rows, local, tuple(features))
    key = (section.path, identity, section.max_rows, schema.name)
    dataset = generate_dataset(rows, features, key)
    return Source(dataset, schema, schema.ignored(columns), local)


def _canonical_rows(
    schema: Schema,
    read: Callable[[], Iterable[LabelledRow]],
    max_rows: int | None,
    local: bool,
    columns: tuple[str, ...],
) -> Iterator[Row]:
    for label, row in islice(read(), max_rows):
        values: Row = dict.fromkeys(columns)
        try:
            if not isinstance(row, dict):
                raise DataError(f"a row must be an object with columns, not {row!r:.60}")
            values |= canonical_row(schema, row)
        except DataError as error:
            values[REFUSED] = reason_to_drop(error, label, local=local)
        yield {**values, SOURCE: label}


def _columns_of_first(name: str, rows: Iterable[LabelledRow]) -> Collection[str]:
    for label, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{label}: a row must be an object with columns, not {row!r:.60}")
        return list(row)
    raise DataError(f"{name}: the data set is empty; it needs at least one row")


def _json_rows(path: Path) -> Iterator[LabelledRow]:
    """The objects of a JSON Lines file, or of a .json file that holds one list; blank lines are passed over."""
    if path.suffix == ".json" and path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _json_list(path)
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.rstrip(), f"{path}:{number}", first=number == 1)


def _json_list(path: Path) -> Iterator[LabelledRow]:
    for index, row in enumerate(_parse(path.read_bytes(), str(path), first=True), start=1):
        yield f"{path}: row {index}", row


def _parse(content: bytes, label: str, *, first: bool) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        place = label if error.lineno == 1 else f"{label}:{error.lineno}"
        raise DataError(f"{place}: malformed JSON, {error.msg} at column {error.colno}; correct the line") from error


def _load_table(section: DataSection, path: Path) -> Dataset:
    from datasets import load_dataset

    if not is_local_path(section.path):
        return read_hub(section.path, "name a file that exists here, or a data set of the hub", split=section.split)
    _check_file(section.path, path)
    options = _csv_options(path) if path.suffix == ".csv" else {}
    try:
        return load_dataset(COLUMN_FILES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # readers raise many kinds, all about this file
        raise DataError(f"{section.path}: cannot be read as a data set ({_reason(error)})") from error


def read_hub(repository: str, what_to_do: str, **options: Any) -> Any:
    """What `datasets.load_dataset` gives for a data set on the hub. Raises: DataError that ends in `what_to_do`."""
    import datasets

    try:
        return datasets.load_dataset(path=repository, **options)
    except Exception as error:  # the hub, its client and the readers raise many kinds, all about this data set
        raise DataError(
            f"{repository} cannot be read from the Hugging Face hub ({_reason(error)}); {what_to_do}"
        ) from error


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")


def _csv_options(path: Path) -> dict[str, Any]:
    """Texts stay texts: without these, a column of answers such as 007 or NA would be parsed."""
    from datasets import Features, Value

    with path.open(encoding="utf-8", newline="") as lines:
        header = next(csv.reader(lines), [])
    return {"features": Features(dict.fromkeys(header, Value("string"))), "keep_default_na": False}


def _check_file(name: str, path: Path) -> None:
    accepted = ", ".join((*JSON_FILES, *COLUMN_FILES))
    if path.is_dir():
        raise DataError(f"{name}: is a directory; name one file ({accepted}) or a hub data set")
    if not path.is_file():
        raise DataError(f"{name}: no such file; name one that exists, or a hub data set such as openai/gsm8k")
    if path.suffix not in COLUMN_FILES:
        raise DataError(f"{name}: files of this kind are not read; use one of {accepted}")


def _table_rows(name: str, table: Dataset) -> Iterator[LabelledRow]:
    for index, row in enumerate(table, start=1):
        yield f"{name}: row {index}", row


def generate_dataset(rows: Callable[[], Iterator[Row]], features: Features, key: tuple[Any, ...]) -> Dataset:
    """The rows as a dataset on disk, generated once per `key` and version of this package's data code.

    Raises: whatever `rows` raises, unwrapped.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    digest = hashlib.sha256(json.dumps([_code_digest(), *key, str(features)]).encode()).hexdigest()
    try:
        return Dataset.from_generator(rows, features=features, fingerprint=digest)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _code_digest() -> str:
    """Changes with the code or the template, so that no cache outlives what made it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
