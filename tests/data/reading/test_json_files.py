"""JSON Lines and JSON: whatever the bytes, rows with their lines, or a sentence that names the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hymba_align.data.reading import readers, sources
from hymba_align.data.reading.sources import (
    CHUNK_ROWS,
    RawRow,
    open_source,
    parse_row,
)
from hymba_align.errors import DataError
from tests.data.reading.read_sources import QA, lines, read, refusal, rows_of, section


def reference_lines(content: bytes) -> list[tuple[int, bytes]]:
    numbered = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def fault(text: bytes) -> str:
    with pytest.raises(DataError) as raised:
        parse_row(RawRow("d:1", text))
    return str(raised.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.dictionaries(st.text(max_size=3), st.none() | st.text(max_size=5)).map(
                lambda row: json.dumps(row).encode()
            ),
            st.sampled_from(
                [b"", b"\r", b"{}", b"[", b"{", b"\xef\xbb\xbf{}", b"\xff\xfe", b'"\\ud800"', b"\x00", b"NaN"]
            ),
        ),
        max_size=8,
    ).map(b"\n".join)
)
@example(b'{"a": "\xe9"}\n{"a": 1}')
@example(b"[" * 100_000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
def test_any_bytes_are_rows_or_findings_at_the_lines_of_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    given_rows: list[RawRow] = []
    try:
        given_rows += [raw for chunk in open_source(section(path)).chunks() for raw in chunk]
        expected = [(f"{path}:{number}", line) for number, line in reference_lines(content)]
        message = f"{path}"
    except DataError as error:  # of the file as a whole: nothing in it, another encoding, one JSON list
        expected, message = [], str(error)
    assert [(raw.place, raw.value) for raw in given_rows] == expected
    assert message.startswith(str(path))
    for raw, (_, found) in zip(given_rows, read(path) if given_rows else [], strict=True):
        assert found == json.loads(raw.value) if isinstance(found, dict) else len(found) < 200  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text(max_size=9) | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.integers()),
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 1]),
    escaped=st.booleans(),
    block=st.integers(1, 30),
    kept=st.floats(0, 1),
)
def test_a_json_list_is_walked_alike_whatever_the_blocks_and_wherever_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    indent: int | None,
    escaped: bool,
    block: int,
    kept: float,
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    path = tmp_path / "d.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=escaped).encode("utf-8", "replace")
    rows = json.loads(content)
    path.write_bytes(content)
    assert rows_of(path) == rows
    cut = content[: int(kept * (len(content) - 1))]
    path.write_bytes(cut)
    with pytest.raises(DataError) as raised:
        list(open_source(section(path)).rows())
    last = cut.count(b"\n") + 1
    assert "holds no rows" in str(raised.value) or any(f"{path}:{n}: " in str(raised.value) for n in range(1, last + 1))
    path.write_bytes(cut + b"\x00")
    assert len(refusal(path)) < 300


def test_json_lines_keep_their_lines_across_blank_ones_a_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": "\xc3\xa9"}\r\n \t\r\n\n{"a":\r2}')
    assert read(path) == [(f"{path}:1", {"a": "é"}), (f"{path}:4", {"a": 2})]


def test_a_line_longer_than_a_block_is_whole_and_a_chunk_of_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    long = {"a": "x" * 10_000_000}
    path.write_bytes(lines(QA, long, QA))
    source = open_source(section(path))
    assert [len(chunk) for chunk in source.chunks()] == [2, 1]
    assert rows_of(path) == [QA, long, QA]


def test_chunks_follow_from_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(*[{"n": n} for n in range(2 * CHUNK_ROWS + 1)]))
    whole = list(open_source(section(path)).chunks())
    assert [len(chunk) for chunk in whole] == [CHUNK_ROWS, CHUNK_ROWS, 1]
    monkeypatch.setattr(readers, "BLOCK_BYTES", 7)
    assert list(open_source(section(path)).chunks()) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "malformed JSON, Expecting property name enclosed in double quotes at column 2; correct the line"),
        (b'{"a": 1', "malformed JSON, Expecting ',' delimiter at column 8; correct the line"),
        (b'{"a": "\x00"}', "malformed JSON, Invalid control character at column 8; correct the line"),
        (b'{"a": "x', "malformed JSON, Unterminated string starting at column 7; correct the line"),
        (b'{"a": "\\q"}', "malformed JSON, Invalid \\escape at column 8; correct the line"),
        (b'{"a": NaN}', "malformed JSON, NaN is not a JSON value; write null or a number"),
        (b'{"a": -Infinity}', "malformed JSON, -Infinity is not a JSON value; write null or a number"),
        (b'{"a": "\xe9"}', "not UTF-8 text (byte 0xE9 at byte 8, invalid continuation byte); save it as UTF-8"),
        (b"[1]", "a row must be an object with columns, not [1]; write {...}"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object; remove one of the two"),
        (b'{"a": "\\ud83d!"}', "\\ud83d is half of a character and means nothing alone; remove it"),
        (b'{"\\uDE00": 1}', "\\ude00 is half of a character and means nothing alone; remove it"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has too many digits to be read; write it as text"),
        (
            b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
            "lists and objects are nested more than 100 levels deep; flatten the row",
        ),
        (b"[" * 100_000, "lists and objects are nested more than 100 levels deep; flatten the row"),
    ],
)
def test_a_json_text_that_is_no_row_says_why(text: bytes, message: str) -> None:
    assert fault(text) == message


def test_whole_characters_written_as_escapes_and_a_hundred_levels_are_fine() -> None:
    assert parse_row(RawRow("d:1", b'{"a": "\\ud83d\\ude00"}')) == {"a": "\U0001f600"}
    deep = b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert parse_row(RawRow("d:1", deep)) == json.loads(deep)


def test_files_where_every_line_would_be_malformed_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for content, message in {
        b'\n[\n{"a": 1}\n]': ":2: the file is one JSON list, not an object on each line; call it .json",
        b'[{"a": 1}]': ":1: the file is one JSON list, not an object on each line; call it .json",
        b'{\n"a": 1\n}\n': ":1: the objects go over several lines; write one on each, or call the file .json",
        '{"a": 1}\n'.encode("utf-16"): ": the file is UTF-16 text, not UTF-8; save it as UTF-8",
    }.items():
        path.write_bytes(content)
        assert refusal(path) == f"{path}{message}"


def test_a_json_file_may_hold_one_object_or_several_over_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{\n"a": 1\n}\n\n{"a":\n2}')
    assert read(path) == [(f"{path}:1", {"a": 1}), (f"{path}:5", {"a": 2})]
    path.write_text('{"a": 1}\n{"a" 2}\n{"a": 3}\n')
    assert read(path)[1:] == [
        (f"{path}:2", "malformed JSON, Expecting ':' delimiter at column 6; correct the line"),
        (f"{path}:3", {"a": 3}),
    ]
    path.write_text('[{"a": 1}, 2,\n{"a": NaN}]')
    assert [place for place, _ in read(path)] == [f"{path}:1", f"{path}:1 (row 2)", f"{path}:2"]
    assert rows_of(path)[1:] == [
        "a row must be an object with columns, not 2; write {...}",
        "malformed JSON, NaN is not a JSON value; write null or a number",
    ]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[\n{"question": "q"},\n{"question" "q"}]', ":3: malformed JSON, Expecting ':' delimiter at column 13"),
        ('[\n{"a": 1}\n{"a": 2}]', ":3: malformed JSON, Expecting ',' delimiter at column 1"),
        ('[{"a": 1},\n]', ":2: malformed JSON, Expecting value at column 1"),
        ('[{"a": 1}\n', ":2: malformed JSON, the list has no end at column 1"),
        ('[{"a": 1}]\n\n x', ":3: malformed JSON, Extra data after the list at column 2"),
        ('[{"a": 1},\n{"a": "x', ":2: malformed JSON, Unterminated string starting at column 7"),
        ("[" * 100_000, ":1: malformed JSON, lists and objects are nested more than 100 levels deep at column 2"),
    ],
)
def test_a_broken_json_list_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, what: str
) -> None:
    (tmp_path / "d.json").write_text(content)
    after = "; correct the line, since the rows after it cannot be told apart"
    for block in (3, 1 << 20) if len(content) < 1000 else (1 << 20,):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block)
        assert refusal(tmp_path / "d.json") == f"{tmp_path / 'd.json'}{what}{after}"


def test_a_json_list_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]')
    assert refusal(path) == f"{path}:2: not UTF-8 text (byte 0xE9, invalid continuation byte); save it as UTF-8"


def test_real_sets_are_read_line_by_line(shared: Path) -> None:
    path = shared / "data" / "gsm8k" / "test.jsonl"
    assert rows_of(path) == [json.loads(line) for line in path.read_text().splitlines()]
    assert sources.CHUNK_ROWS == 480
