"""The shipped samples: the card tells the truth about them, and every row can be used."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.data.reading.schemas import SCHEMAS
from hymba_align.recipe import DataSection

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
CARD = (SAMPLES / "README.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^\| `([\w.]+)` \| (\d+) \| (\w+) \| ([\w ]+) \| (.*) \|$", CARD, flags=re.MULTILINE)
FILES = [name for name, *_ in LISTED]
FOR = {name: stage for name, _, _, stage, _ in LISTED}
SCHEMA_OF = {name: schema for name, _, schema, _, _ in LISTED}
PREPARE = {"SFT": prepare_sft, "DPO": prepare_preferences}
CASES = [(name, stage) for name in FILES for stage in ("SFT", "DPO") if stage in FOR[name]]


def rows_of(name: str) -> list[dict[str, Any]]:
    path = SAMPLES / name
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def columns_of(rows: list[dict[str, Any]]) -> set[str]:
    return {column for row in rows for column in row}


@pytest.mark.parametrize(("name", "count", "schema", "stage", "columns"), LISTED)
def test_the_card_has_the_counts_and_the_columns_of_the_files(
    name: str, count: str, schema: str, stage: str, columns: str
) -> None:
    rows = rows_of(name)
    assert len(rows) == int(count)
    assert re.findall(r"`(\w+)`", columns) == sorted(columns_of(rows), key=columns.index)
    assert columns_of(rows) <= set(re.findall(r"`(\w+)`", CARD.split("## Columns")[1])), "a column is not explained"


def test_the_card_names_every_file_and_every_schema_has_one() -> None:
    assert sorted(FILES) == sorted(path.name for path in SAMPLES.iterdir() if path.name != "README.md")
    assert {schema for _, _, schema, _, _ in LISTED} == {schema.name for schema in SCHEMAS}
    for name, _, schema, stage, _ in LISTED:
        stages = {of for known in SCHEMAS if known.name == schema for of in known.stages}
        assert set(stage.lower().split(" and ")) == stages, name


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_every_row_of_a_sample_can_be_used_and_its_schema_is_found(name: str, stage: str, small: Any) -> None:
    prepared = PREPARE[stage](DataSection(path=f"data/samples/{name}", workers=1), small, 2048, seed=0)
    (counts,) = prepared.sources
    assert (counts.schema, counts.rows_read, counts.rows_kept) == (SCHEMA_OF[name], *[len(rows_of(name))] * 2)
    assert counts.lost == ()
    assert counts.ignored_columns == ()
    assert prepared.trained_tokens > 0


def test_rows_are_the_same_from_json_lines_a_compressed_file_and_parquet(tmp_path: Path, small: Any) -> None:
    from datasets import Dataset

    rows = rows_of("question_answer.jsonl")
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    expected, *others = (
        prepare_sft(DataSection(path=str(path), workers=1), small, 2048, seed=0).dataset["input_ids"][:]
        for path in [SAMPLES / "question_answer.jsonl", *sorted(tmp_path.glob("rows.*"))]
    )
    assert len(others) == 3
    assert all(other == expected for other in others)


def test_the_samples_show_what_the_card_says_they_show() -> None:
    messages = [message for row in rows_of("messages.jsonl") for message in row["messages"]]
    assert any(message.get("train") is False for message in messages)
    assert max(len(message.get("tool_calls", [])) for message in messages) > 1
    assert {message["role"] for message in messages} == {"system", "user", "assistant", "tool"}
    assert any(isinstance(message["content"], list) for message in messages)
    senders = {turn["from"] for row in rows_of("sharegpt.json") for turn in row["conversations"]}
    assert senders == {"system", "human", "gpt", "function_call", "observation"}
    for name in ("prompt_completion.jsonl", "preference.jsonl"):
        assert {type(row["prompt"]) for row in rows_of(name)} == {str, list}, name
    assert {"wrong_answer" in row for row in rows_of("question_answer.jsonl")} == {True, False}
    texts = "".join(row["text"] for row in rows_of("text.csv"))
    assert "\n" in texts
    assert '"' in texts
    assert any(len(row["chosen"]) > 2 for row in rows_of("preference_implicit.jsonl"))
    scores = [score for row in rows_of("ranked.jsonl") for score in row["scores"]]
    assert min(scores) < 0
    assert {type(score) for score in scores} == {int, float}
