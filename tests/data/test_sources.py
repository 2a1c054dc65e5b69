from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.schemas import SOURCE
from hymba_align.data.sources import load_rows, open_source
from hymba_align.errors import DataError, RenderError
from hymba_align.recipe import DataSection

QA = {"question": "q", "answer": "a"}


def write(path: Path, *rows: Any) -> DataSection:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSection(path=str(path))


def refusal(section: DataSection) -> str:
    with pytest.raises(DataError) as error:
        load_rows(section)
    return str(error.value)


def test_json_lines_become_rows_that_know_their_line(tmp_path: Path) -> None:
    section = write(tmp_path / "d.jsonl", QA, "\n", {"answer": "日", "question": " r ", "wrong_answer": "w", "id": 1})
    assert load_rows(section).to_list() == [
        {"question": "q", "answer": "a", "wrong_answer": None, SOURCE: f"{section.path}:1"},
        {"question": " r ", "answer": "日", "wrong_answer": "w", SOURCE: f"{section.path}:3"},
    ]


def test_a_json_list_parquet_and_csv_give_the_rows_of_json_lines(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"question": "NA", "answer": "7"}, {"question": "q, 2\nr", "answer": "007"}]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text('question,answer\nNA,7\n"q, 2\nr",007\n')
    expected = load_rows(write(tmp_path / "d.jsonl", *rows)).remove_columns(SOURCE).to_list()
    for name in ("d.json", "d.parquet", "d.csv"):
        loaded = load_rows(DataSection(path=str(tmp_path / name)))
        assert loaded.remove_columns(SOURCE).to_list() == expected
        assert loaded[1][SOURCE] == f"{tmp_path / name}: row 2"
    lines = write(tmp_path / "lines.json", *rows)
    assert load_rows(lines).remove_columns(SOURCE).to_list() == expected


def test_messages_with_unlike_tool_calls_fit_one_column(tmp_path: Path) -> None:
    def called(arguments: Any) -> dict[str, Any]:
        reply = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}
        return {"messages": [{"role": "user", "content": "u"}, reply], "tools": [{"name": "f", "x": arguments}]}

    rows = load_rows(write(tmp_path / "d.jsonl", called({"a": 1}), called({"a": "é", "b": [None]})))
    calls = [row["messages"][1]["tool_calls"][0]["function"] for row in rows]
    assert calls == [{"name": "f", "arguments": '{"a": 1}'}, {"name": "f", "arguments": '{"a": "é", "b": [null]}'}]
    assert rows[1]["tools"] == '[{"name": "f", "x": {"a": "é", "b": [null]}}]'


def test_preferences_take_texts_and_messages_and_forgive_a_repeated_prompt(tmp_path: Path) -> None:
    prompt, chosen = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}
    rejected = {"role": "assistant", "content": "r"}
    section = write(
        tmp_path / "d.jsonl",
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]},
        {"prompt": "p", "chosen": [prompt, chosen], "rejected": [prompt, rejected]},
    )
    rows = load_rows(section).select_columns(["prompt", "chosen", "rejected"]).to_list()
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["chosen"] == [{**chosen, "tool_calls": None}]


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    assert open_source(write(tmp_path / "d.jsonl", {**QA, "id": 1, "b": 2})).ignored_columns == ("b", "id")


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    section = write(tmp_path / "d.jsonl", QA, QA, "broken\n").model_copy(update={"max_rows": 2})
    assert len(load_rows(section)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((QA, '{"question": "q", \n'), ":2: malformed JSON, Expecting property name enclosed in double quotes"),
        ((QA, "{}{}\n"), ":2: malformed JSON, Extra data at column 3; correct the line"),
        ((QA, "7\n"), ":2: a row must be an object with columns, not 7"),
        (("[1]\n",), ":1: a row must be an object with columns, not [1]"),
        ((QA, {"question": "q"}), ":2: the column 'answer' is missing; every row needs question, answer"),
        ((QA, {**QA, "answer": 7}), ":2: the column 'answer' must be text, not 7"),
        ((QA, {**QA, "question": " "}), ":2: the column 'question' is empty; fill it in or remove the row"),
        (({"prompt": "p", "chosen": "c", "rejected": 1},), ":1: in the column 'rejected', messages must be a list"),
        (({"prompt": [], "chosen": "c", "rejected": "r"},), ":1: the column 'prompt' must end with a turn that the"),
        (
            ({"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "r"},),
            ":1: the column 'chosen' must begin with the assistant's turn",
        ),
        (({"messages": "hi"},), ":1: messages must be a list, not text"),
        (({"messages": [{"role": "user", "content": "x"}]},), ":1: the conversation has no assistant turn"),
        (
            ({"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]},),
            ":1: turn 2 has the role 'bot'; use one of system, user, assistant, tool",
        ),
        (
            ({"messages": [{"role": "assistant", "content": "x"}], "tools": "{"},),
            ":1: tools are not valid JSON",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: tuple[Any, ...], message: str) -> None:
    section = write(tmp_path / "d.jsonl", *rows)
    assert f"{section.path}{message}" in refusal(section)


def test_a_conversation_that_cannot_be_rendered_keeps_its_error_class(tmp_path: Path) -> None:
    with pytest.raises(RenderError):
        load_rows(write(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "x"}]}))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(QA).encode() + b"\n" + '{"question": "é"}'.encode("latin-1"))
    assert f"{path}:2: not UTF-8 text" in refusal(DataSection(path=str(path)))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QA).encode())
    assert len(load_rows(DataSection(path=str(path)))) == 1


def test_a_broken_json_list_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n{"question": "q"},\n{"question" "q"}]')
    assert f"{path}:3: malformed JSON, Expecting ':' delimiter at column 13" in refusal(DataSection(path=str(path)))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file.csv", "a/b/c"])
def test_a_missing_file_is_named(name: str) -> None:
    assert f"{name}: no such file; name one that exists, or a hub data set" in refusal(DataSection(path=name))


def test_a_hub_data_set_that_cannot_be_read_is_one_sentence() -> None:
    assert refusal(DataSection(path="no/such")) == (
        "no/such cannot be read from the Hugging Face hub (Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled)); "
        "name a file that exists here, or a data set of the hub"
    )


def test_empty_files_folders_unknown_kinds_and_columns_are_refused(tmp_path: Path) -> None:
    for name, content in {"d.jsonl": "", "blank.jsonl": "\n\n", "d.json": "[]"}.items():
        (tmp_path / name).write_text(content)
        assert f"{tmp_path / name}: the data set is empty; it needs at least" in refusal(
            DataSection(path=str(tmp_path / name))
        )
    assert f"{tmp_path}: is a directory; name one file" in refusal(DataSection(path=str(tmp_path)))
    (tmp_path / "d.txt").write_text("x")
    assert "d.txt: files of this kind are not read; use one of .jsonl, .json, .parquet, .csv" in refusal(
        DataSection(path=str(tmp_path / "d.txt"))
    )
    (tmp_path / "d.parquet").write_text("x")
    assert "d.parquet: cannot be read as a data set (" in refusal(DataSection(path=str(tmp_path / "d.parquet")))
    section = write(tmp_path / "d.jsonl", {"input": "i", "output": "o"})
    assert refusal(section) == (
        f"{section.path}: the columns found are input, output; name them as one of these sets: "
        "prompt, chosen, rejected; or messages; or question, answer"
    )


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "d.jsonl", QA))["answer"][:] == ["a"]
    assert load_rows(write(tmp_path / "d.jsonl", {**QA, "answer": "b"}))["answer"][:] == ["b"]
