"""Raw rows read into examples, with what is counted on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.counts import Counts, SourceCounts
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.raw_rows import RawRow
from hymba_align.data.reading.row_reader import RowReader
from hymba_align.data.reading.schemas import detect_schema
from hymba_align.data.reading.sources import open_source, parse_row
from hymba_align.data.settings import Settings
from hymba_align.recipe import SourceSection

Row = dict[str, Any]
CONVERTERS = """
def labelled(row):
    return {"messages": row["messages"], "label": row["score"] > 0}

def same(row):
    return row
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "h1_rows.py").write_text(CONVERTERS, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("h1_rows", None)


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str, **keys: Any) -> Row:
    return {"role": "assistant", "content": content, **keys}


def call(name: str, arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(section: SourceSection, raws: list[RawRow]) -> tuple[list[Any], Counts]:
    counts = Counts()
    schema = None if section.convert else detect_schema(parse_row(raws[0]))
    return [located.value for located in RowReader(section, schema).read(raws, counts)], counts


def parquet(rows: list[Row], **keys: Any) -> tuple[list[Any], Counts]:
    """What is read of the rows after they were a Parquet file."""
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet("rows.parquet")
    section = SourceSection(path="rows.parquet", **keys)
    return read(section, [raw for chunk in open_source(section).chunks() for raw in chunk])


CALLS = [call("weather", {"city": "Oslo"}), call("tax", {"income": {"year": 2025}, "unit": ["NOK", None]})]
TOOLS = [
    {"name": "weather", "parameters": {"city": {"type": "string"}}},
    {"name": "tax", "parameters": {"income": {"type": "object", "enum": ["a"]}}},
]


@pytest.mark.parametrize("keys", [{}, {"convert": "h1_rows:same"}])
def test_the_nulls_that_a_table_invents_are_no_arguments(keys: Row) -> None:
    row = {"messages": [user("u"), assistant("", tool_calls=CALLS)], "tools": TOOLS}
    (example,), counts = parquet([row], **keys)
    arguments = [one["function"]["arguments"] for one in example.messages[1]["tool_calls"]]
    assert arguments == ['{"city": "Oslo"}', '{"income": {"year": 2025}, "unit": ["NOK", null]}']
    assert example.tools == TOOLS
    assert not counts.lost


def test_a_column_of_tools_by_another_name_is_freed_of_invented_nulls_too() -> None:
    row = {"messages": [user("u"), assistant("a")], "functions": TOOLS, "x": {"y": None}}
    (example,), _ = parquet([row], columns={"tools": "functions"})
    assert example == Conversation(row["messages"], TOOLS)


def test_the_nulls_of_a_json_row_are_its_authors() -> None:
    raw = (
        b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": '
        b'[{"name": "f", "arguments": {"city": "Oslo", "unit": null}}]}], "tools": [{"name": "f", "parameters": null}]}'
    )
    (example,), _ = read(SourceSection(path="rows.jsonl"), [RawRow("rows.jsonl:1", raw)])
    assert example.messages[1]["tool_calls"] == [call("f", '{"city": "Oslo", "unit": null}')]
    assert example.tools == [{"name": "f", "parameters": None}]


def test_the_nulls_of_json_in_the_cell_of_a_table_are_its_authors() -> None:
    messages = '[{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": null}}]}]'
    (example,), _ = read(SourceSection(path="rows.csv"), [RawRow("rows.csv:2", {"messages": messages})])
    assert example.messages[1]["tool_calls"] == [call("f", '{"a": null}')]


# ---- what is not used -------------------------------------------------------------------------------------------------


def counted(section: SourceSection, row: Row) -> SourceCounts:
    schema = None if section.convert else detect_schema(row)
    _, counts = read(section, [RawRow("rows.jsonl:1", row)])
    return SourceCounts.of(Settings(section, "sft", "assistant", "drop", 0.0, 100, 0), schema, counts)


def test_columns_that_a_converter_gives_and_nothing_reads_are_told() -> None:
    row = {"messages": [user("u"), assistant("a")], "score": 1}
    source = counted(SourceSection(path="rows.jsonl", convert="h1_rows:labelled"), row)
    assert source.ignored_columns == ("label",)
    assert source.summary().endswith("; columns not used: label")


def test_a_column_that_columns_puts_another_in_the_place_of_is_told() -> None:
    source = counted(SourceSection(path="rows.jsonl", columns={"text": "body"}), {"text": "old", "body": "new"})
    assert source.ignored_columns == ("text",)


def test_keys_of_turns_that_nothing_reads_are_told() -> None:
    row = {"messages": [user("u"), assistant("a", trian=False, refusal=None), assistant("b", audio={"id": 1})]}
    source = counted(SourceSection(path="rows.jsonl"), row)
    assert (source.ignored_columns, source.unread_keys) == ((), ("audio", "trian"))
    assert source.summary().endswith("; keys of turns not used: audio, trian")
