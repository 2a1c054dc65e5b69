"""The sections `data` of a recipe: where rows come from and what becomes of them; and which names mean files here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hymba_align.recipe_loading import Section

SchemaName = Literal[
    "preference", "ranked", "prompt_completion", "messages", "sharegpt", "alpaca", "question_answer", "text"
]
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


class SourceSection(Section):
    """One place that rows come from, and how they become conversations or preferences.

    `path`: a file, a folder, a glob, an fsspec URL, or a data set of the hub (`subset`, `split` and `revision` are its).
    `columns` names the file's column for each column of the schema, `roles` our role for each of the file's; `convert` is
    a function `package.module:name` that turns a row into one of a known schema. `keep_fraction` keeps about that share
    of the rows, chosen by their content and the seed; `repeat` takes the rows that many times; `max_rows` reads no more
    than the first so many. Rows of question and answer become user turns by `question_format`, and up to
    `examples_per_conversation` of them share a conversation, as many as fit.
    """

    path: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    storage_options: dict[str, Any] = Field(default_factory=dict)
    format: SchemaName | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    convert: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    max_rows: int | None = Field(default=None, ge=1)
    keep_fraction: float = Field(default=1.0, gt=0, le=1)
    repeat: int = Field(default=1, ge=1)
    examples_per_conversation: int = Field(default=1, ge=1)
    question_format: str = "{question}"

    @field_validator("question_format")
    @classmethod
    def _holds_the_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("it must contain {question}, where the row's question goes")
        return value


class DataSection(SourceSection):
    """One source, by its own keys, or several in `sources`; and what happens to their rows.

    `bad_rows` and `over_long` say whether a row that cannot be used, or does not fit in max_length, stops the run
    ("refuse") or is left out and counted ("drop"); over-long conversations can also be cut after an assistant's turn
    ("truncate") or continued in further conversations ("split"). `loss_on` names the turns that are trained on.
    `validation_fraction` of the rows, chosen by a hash of their content, are kept for validation. `seed` defaults to the
    recipe's. `workers` processes prepare (None: one per core); the result does not depend on their number.
    `streaming` prepares rows while training reads them, for sets larger than the disk.
    """

    path: str = ""
    sources: tuple[SourceSection, ...] = ()
    bad_rows: Literal["refuse", "drop"] = "refuse"
    over_long: Literal["refuse", "drop", "truncate", "split"] = "refuse"
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    seed: int | None = Field(default=None, ge=0)
    workers: int | None = Field(default=None, ge=1)
    streaming: bool = False

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> DataSection:
        if self.path and self.sources:
            raise ValueError("it holds both path and sources; put the path among the sources")
        fields = DataSection.model_fields
        of_one_source = [
            key
            for key in SourceSection.model_fields
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]
        if self.sources and of_one_source:
            raise ValueError(f"it holds sources, so {of_one_source[0]} belongs into one of them; move it there")
        self._check()
        return self

    def _check(self) -> None:
        if not self.path and not self.sources:
            raise ValueError("it holds neither path nor sources; set one of them")

    @property
    def all_sources(self) -> tuple[SourceSection, ...]:
        """The sources in order; a section with a path is its own only one."""
        if self.sources:
            return self.sources
        own = self.model_dump(include=set(SourceSection.model_fields), exclude_unset=True)
        return (SourceSection.model_validate(own),)


class StageDataSection(DataSection):
    """What a stage's data has otherwise than the recipe's `data`: only the keys that were set count."""

    def _check(self) -> None:
        """Neither path nor sources need be here."""


def has_data_suffix(name: str) -> bool:
    """Whether a name ends as files of rows do, compressed or not."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    while suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in DATA_SUFFIXES


def is_local_path(name: str) -> bool:
    """Whether `name` means a file or folder here rather than a repository on the hub.

    Something that exists is local. So is what no repository can be called: a data file's suffix, a leading dot or slash,
    more than one slash. Saying so before anything is opened turns a mistyped path into an error about that path, where
    the hub's client would report a repository that does not exist.
    """
    if "://" in name:
        return False
    if has_data_suffix(name):
        return True
    return Path(name).expanduser().exists() or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None
