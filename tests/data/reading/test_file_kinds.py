"""Tables, archives and compressed files: the rows that JSON Lines would give, or one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.data.reading.read_sources import LINES, lines, read, refusal, rows_of


def test_every_kind_of_file_gives_the_rows_of_json_lines(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"question": "NA", "answer": "7"}, {"question": "q, 2\nr", "answer": "007"}]
    (tmp_path / "d.jsonl").write_bytes(lines(*rows))
    (tmp_path / "d.ndjson").write_bytes(lines(*rows))
    (tmp_path / "lines.json").write_bytes(lines(*rows))
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\nNA,7\r\n\r\n"q, 2\nr",007\r\n')
    (tmp_path / "d.tsv").write_text('question\tanswer\nNA\t7\n"q, 2\nr"\t007\n')
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    arrow = "saved/data-00000-of-00001.arrow"
    for name in ("d.jsonl", "d.ndjson", "lines.json"):
        assert read(tmp_path / name) == [(f"{tmp_path / name}:{n}", row) for n, row in enumerate(rows, start=1)]
    assert read(tmp_path / "d.json") == [(f"{tmp_path}/d.json:2", rows[0]), (f"{tmp_path}/d.json:6", rows[1])]
    assert read(tmp_path / "d.csv") == [(f"{tmp_path}/d.csv:2", rows[0]), (f"{tmp_path}/d.csv:4", rows[1])]
    assert read(tmp_path / "d.tsv") == [(f"{tmp_path}/d.tsv:2", rows[0]), (f"{tmp_path}/d.tsv:3", rows[1])]
    for name in ("d.parquet", arrow):
        assert read(tmp_path / name) == [(f"{tmp_path / name}: row {n}", row) for n, row in enumerate(rows, start=1)]
    assert rows_of(tmp_path / "saved") == rows


def test_compressed_files_give_the_same_bytes_even_those_that_are_not_utf8(tmp_path: Path) -> None:
    content = LINES + b'{"a": "\xe9"}\n'
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packers["zst"] = zstandard.compress
    for suffix, pack in packers.items():
        path = tmp_path / f"d.jsonl.{suffix}"
        path.write_bytes(pack(content))
        bad = "not UTF-8 text (byte 0xE9 at byte 8, invalid continuation byte); save it as UTF-8"
        assert read(path) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2}), (f"{path}:4", bad)]
        path.write_bytes(pack(content) + pack(content))
        assert len(read(path)) == 6
        path.write_bytes(pack(content)[:-5])
        assert f"{path}: cannot be read (" in refusal(path)
        table = tmp_path / f"d.csv.{suffix}"
        table.write_bytes(pack(b"a\n1\n"))
        assert read(table) == [(f"{table}:2", {"a": "1"})]


def test_a_zip_archive_is_read_member_by_member_and_never_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"

    def write(**members: str) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_", "."), content)

    write(README_md="hi", d_jsonl='{"a": 1}')
    assert read(path) == [(f"{path}:1", {"a": 1})]
    write(README_md="hi", d_jsonl='{"a": 2}')
    assert read(path) == [(f"{path}:1", {"a": 2})]
    write(b_csv="a\n1", a_jsonl='{"a": 2}')
    assert read(path) == [(f"{path}/a.jsonl:1", {"a": 2}), (f"{path}/b.csv:2", {"a": "1"})]
    write(README_md="hi")
    assert "d.zip: files of this kind are not read; use one of .jsonl" in refusal(path)


def test_a_compression_whose_package_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    path = tmp_path / "d.jsonl.lz4"
    path.write_bytes(b"\x04\x22\x4d\x18")
    monkeypatch.setattr(fsspec.core, "compr", {None: None})
    assert refusal(path) == f"{path}: cannot be read (the package lz4 is not installed); pip install lz4"


def test_semicolons_tell_cells_apart_where_the_header_has_them_and_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('question;answer\n"1;1, or 2";2\n')
    assert rows_of(path) == [{"question": "1;1, or 2", "answer": "2"}]
    path.write_text("question,answer;\n1;1,2\n")
    assert rows_of(path) == [{"question": "1;1", "answer;": "2"}]


def test_csv_cells_stay_texts_and_rows_that_do_not_fit_the_header_are_found(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'a,b\n"x\ny",z,1\n007\n,NA\n\xe9,1\n' + b"y" * 200_000 + b",1\n")
    assert rows_of(path) == [
        'the row has 3 cells and the header 2; put quotes around a cell with commas, as in "a, b"',
        "the row has 1 cell and the header 2; write all its cells, empty ones too",
        {"a": "", "b": "NA"},
        "line 6 is not UTF-8 text (byte 0xE9 at byte 1, invalid continuation byte); save it as UTF-8",
        {"a": "y" * 200_000, "b": "1"},
    ]
    path.write_text('a,b\n1,"open\n')
    assert refusal(path).startswith(f"{path}:2: malformed CSV, unexpected end of data; correct the quotes")
    path.write_bytes(b"a,b\r1,2\r")
    assert refusal(path) == (
        f"{path}:1: malformed CSV, its lines end in a carriage return alone; save it with line feeds (LF or CRLF)"
    )
    path.write_text("a,b,a\n1,2,3\n")
    assert refusal(path) == f"{path}:1: the column 'a' stands twice in the header; rename one"


def test_tables_keep_missing_cells_and_unlike_objects(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"a": "x", "calls": [{"b": 1}, {"c": 2}]}, {"a": None, "calls": []}]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "d.parquet")
    assert rows_of(tmp_path / "d.parquet") == rows


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.csv.gz", "d.zip", "d.jsonl.xz"])
def test_a_file_that_is_not_what_its_name_says_is_one_sentence(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("x")
    assert f"{tmp_path / name}: cannot be read (" in refusal(tmp_path / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.jsonl", ""), ("blank.jsonl", "\n \n"), ("d.json", "[]"), ("e.json", ""), ("d.csv", "a,b\n")],
)
def test_a_source_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name) == f"{tmp_path / name}: holds no rows; it needs at least one"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("d.txt", "d.txt.gz"):
        (tmp_path / name).write_text("x")
        assert f"{name}: files of this kind are not read; use one of .jsonl, .ndjson, .json, " in refusal(
            tmp_path / name
        )
