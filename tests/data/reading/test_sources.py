"""Where rows come from: every file kind, compression and place, each row with file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hymba_align.data.reading import readers, sources
from hymba_align.data.reading.sources import (
    CHUNK_ROWS,
    RawRow,
    files_passed_over,
    open_source,
    parse_row,
    source_digest,
)
from hymba_align.errors import DataError
from hymba_align.recipe import SourceSection

QA = {"question": "q", "answer": "a"}
LINES = b'{"a": 1}\n\n{"a": 2}\n'


def lines(*rows: Any) -> bytes:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def section(path: Path | str, **keys: Any) -> SourceSection:
    return SourceSection(path=str(path), **keys)


def read(path: Path | str, **keys: Any) -> list[tuple[str, Any]]:
    """Places and rows; of a row that cannot be used, the sentence about it."""
    found: list[tuple[str, Any]] = []
    for chunk in open_source(section(path, **keys)).chunks():
        for raw in chunk:
            try:
                found.append((raw.place, parse_row(raw)))
            except DataError as error:
                found.append((raw.place, str(error)))
    return found


def rows_of(path: Path | str, **keys: Any) -> list[Any]:
    return [row for _, row in read(path, **keys)]


def refusal(path: Path | str, **keys: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(path, **keys)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def fault(text: bytes) -> str:
    with pytest.raises(DataError) as raised:
        parse_row(RawRow("d:1", text))
    return str(raised.value)


def reference_lines(content: bytes) -> list[tuple[int, bytes]]:
    numbered = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


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


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_file_system_whose_package_is_missing_names_it(
    protocol: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for url in (f"{protocol}://bucket/d.jsonl", f"{protocol}://bucket/*.jsonl"):
        assert refusal(url) == f"{url}: cannot be read (the package {package} is not installed); pip install {package}"


def test_folders_and_globs_are_read_in_order_and_relative_paths_stay_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.jsonl", "deep/a.jsonl", ".c.jsonl", ".hidden/d.jsonl", "README.md", "notes.txt"):
        (tmp_path / "in" / name).write_text(json.dumps({"from": name}))
    (tmp_path / "in" / "a.csv").write_text("from\na.csv\n")
    everything = [("in/a.csv:2", "a.csv"), ("in/b.jsonl:1", "b.jsonl"), ("in/deep/a.jsonl:1", "deep/a.jsonl")]
    assert [(place, row["from"]) for place, row in read("in")] == everything
    assert [(place, row["from"]) for place, row in read("in/**")] == everything
    assert [place for place, _ in read("in/*.jsonl")] == ["in/b.jsonl:1"]
    assert [place for place, _ in read(f"{tmp_path}/in/*.jsonl")] == [f"{tmp_path}/in/b.jsonl:1"]
    assert open_source(section("in")).files == ("in/a.csv", "in/b.jsonl", "in/deep/a.jsonl")
    assert refusal("out/*.jsonl") == (
        "out/*.jsonl: no such file; name one that exists, or a hub data set such as openai/gsm8k"
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("")
    (tmp_path / "none" / "d.txt").write_text("")
    assert "none: holds no data files among its 2; they end in .jsonl, " in refusal("none")


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    assert refusal(tmp_path / "in") == f"{tmp_path}/in: the folder is empty; put data files into it, or name another"
    (tmp_path / "in" / ".hidden.jsonl").write_bytes(LINES)
    assert refusal(tmp_path / "in").startswith(f"{tmp_path}/in: holds no data files among its 1; they end in .jsonl, ")


def test_files_of_a_folder_or_glob_that_are_not_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read_files = ["_x.jsonl", "d.jsonl", "deep/e.csv.gz"]
    passed_over = [
        *(".hidden.jsonl", "LICENSE.jsonl.old", "__p/y.jsonl", "b.jsonl.tar.gz", "c.txt", "config.json", "d.jsonl.old"),
        *("deep/noext", "x.docx"),
    ]
    unmentioned = [".DS_Store", ".git/x.jsonl", ".gitattributes", "LICENSE", "README.md", "deep/.cache/d.jsonl.lock"]
    for name in (*read_files, *passed_over, *unmentioned):
        path = tmp_path / "in[1]" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"a\n1\n") if name.endswith(".gz") else LINES)
    source = open_source(section("in[1]"))
    assert source.files == tuple(f"in[1]/{name}" for name in read_files)
    assert source.passed_over == tuple(passed_over)
    assert open_source(section(tmp_path / "in[1]")).passed_over == tuple(passed_over)
    assert open_source(section("in[[]1]/*")).passed_over == tuple(one for one in passed_over if "/" not in one)
    assert open_source(section("in[[]1]/*.jsonl")).passed_over == (".hidden.jsonl",)
    assert open_source(section("in[1]/d.jsonl")).passed_over == ()


def test_members_of_an_archive_and_files_of_a_url_that_are_not_read_are_named_too(tmp_path: Path) -> None:
    import fsspec

    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("a.jsonl", "b.txt", "README.md", "__MACOSX/a.jsonl"):
            archive.writestr(name, LINES)
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("README.md", "")
    assert open_source(section(tmp_path / "d.zip")).passed_over == ("b.txt",)
    assert open_source(section(tmp_path)).passed_over == ("d.zip/b.txt", "e.zip")
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.txt", "deep/c.docx"):
        system.pipe_file(f"/passed/{name}", LINES)
    assert open_source(section("memory://passed")).passed_over == ("b.txt", "deep/c.docx")
    assert open_source(section("memory://passed/*")).passed_over == ("b.txt",)


def test_what_datasets_writes_beside_its_tables_is_no_file_that_is_passed_over(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([QA])}).save_to_disk(tmp_path / "saved")
    assert (tmp_path / "saved" / "dataset_dict.json").exists()
    assert open_source(section(tmp_path / "saved")).passed_over == ()


def test_a_stream_reads_a_remote_file_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    from hymba_align.data.prepare import prepare_sft
    from hymba_align.recipe import DataSection

    content = lines(*[{**QA, "n": n} for n in range(2000)])
    MemoryFileSystem().pipe_file("/stream/d.jsonl", content)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    read_bytes, read_from_memory = [0], MemoryFile.read

    def counted(file: MemoryFile, *size: int) -> bytes:
        block = bytes(read_from_memory(file, *size))
        read_bytes[0] += len(block)
        return block

    monkeypatch.setattr(MemoryFile, "read", counted, raising=False)
    section = DataSection(path="memory://stream/d.jsonl", streaming=True)
    prepared = prepare_sft(section, small, 64, seed=0)
    assert len(list(prepared.dataset)) == 2000
    assert len(content) <= read_bytes[0] < 1.3 * len(content)  # and the first chunk, for the schema


def test_reading_rows_computes_no_digest_and_the_identity_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digests = tmp_path / "d.jsonl", []
    path.write_bytes(LINES)
    content_tag = sources._content_tag
    monkeypatch.setattr(sources, "_content_tag", lambda file: digests.append(file.name) or content_tag(file))
    source = open_source(section(path))
    assert len(list(source.rows())) == 2
    assert digests == []
    assert source.identity == source.identity == source_digest(section(path))
    assert digests == [str(path)] * 2, "once by this source, and once by source_digest's own"


def test_names_with_the_signs_of_globs_are_names_when_they_exist(tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "d*.jsonl").write_bytes(lines(QA))
    Dataset.from_list([QA]).to_parquet(folder / "[d].parquet")
    assert rows_of(folder / "d*.jsonl") == rows_of(folder / "[d].parquet") == [QA]
    assert rows_of(folder) == [QA, QA]


def test_urls_of_any_file_system_are_read_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Locked(MemoryFileSystem):
        protocol = "locked"
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.replace("locked://", "memory://", 1)))

        def __init__(self, key: str = "", **options: Any) -> None:
            super().__init__(**options)
            self.key = key

        def _open(self, *arguments: Any, **options: Any) -> Any:
            if self.key != "open sesame":
                raise PermissionError("the key does not fit")
            return super()._open(*arguments, **options)

    fsspec.register_implementation("locked", Locked, clobber=True)
    system = fsspec.filesystem("locked", key="open sesame")
    for name, content in {"in/b.jsonl": LINES, "in/a.jsonl.gz": gzip.compress(LINES), "in/x.txt": b""}.items():
        system.pipe_file(f"/{name}", content)
    options = {"storage_options": {"key": "open sesame"}}
    for url in ("locked://in/b.jsonl", "locked://in/a.jsonl.gz"):
        assert read(url, **options) == [(f"{url}:1", {"a": 1}), (f"{url}:3", {"a": 2})]
        assert refusal(url) == f"{url}: cannot be read (the key does not fit); correct the path or the file"
    for url in ("locked://in", "locked://in/*"):
        files = open_source(section(url, **options)).files
        assert [file.rsplit("/")[-1] for file in files] == ["a.jsonl.gz", "b.jsonl"]
    identity = source_digest(section("locked://in/b.jsonl", **options))
    assert source_digest(section("locked://in/b.jsonl", **options)) == identity
    system.pipe_file("/in/b.jsonl", LINES.replace(b"2", b"3"))
    assert source_digest(section("locked://in/b.jsonl", **options)) != identity
    assert refusal("locked://in/none.jsonl", **options).startswith("locked://in/none.jsonl: no such file; name one")


def test_a_file_url_is_the_file_and_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert read(f"file://{tmp_path}/d.jsonl.gz")[1] == (f"file://{tmp_path}/d.jsonl.gz:3", {"a": 2})
    assert refusal("nope://d.jsonl") == (
        "nope://d.jsonl: cannot be read (Protocol not known: nope); correct the path or the file"
    )


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


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file.csv", "a/b/c", "d.tsv", "d.tar.gz"])
def test_a_missing_file_is_named(name: str) -> None:
    assert f"{name}: no such file; name one that exists, or a hub data set" in refusal(name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("d.txt", "d.txt.gz"):
        (tmp_path / name).write_text("x")
        assert f"{name}: files of this kind are not read; use one of .jsonl, .ndjson, .json, " in refusal(
            tmp_path / name
        )


def test_what_only_the_hub_has_is_refused_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINES)
    for key in ("subset", "revision", "split"):
        assert f"d.jsonl: {key} is 'x', but only data sets of the hub have one; remove it" in refusal(
            tmp_path / "d.jsonl", **{key: "x"}
        )


def test_max_rows_ends_the_reading_before_what_comes_after(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"a": 1}, {"a": 2}, broken')
    assert rows_of(tmp_path / "d.json", max_rows=2) == [{"a": 1}, {"a": 2}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES + b"[broken\n")
    (tmp_path / "in" / "b.parquet").write_text("broken")
    assert rows_of(tmp_path / "in", max_rows=2) == [{"a": 1}, {"a": 2}]
    assert "b.parquet: cannot be read" in refusal(tmp_path / "in")


def test_rows_come_before_the_rest_of_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = lines({"a": "x" * 1000})
    path.write_bytes(row * 10_000)
    rows = open_source(section(path)).rows()
    next(rows)
    with path.open("r+b") as file:
        file.truncate(5_000_000)
    assert sum(1 for _ in rows) < 5_000


def test_a_file_rewritten_with_the_same_size_and_time_is_another_source_with_other_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    for name in ("d.jsonl", "d.csv", "d.parquet"):
        path, seen = tmp_path / name, []
        for value in ("1", "2", "1"):
            if name == "d.parquet":
                Dataset.from_list([{"a": value}]).to_parquet(path)
            else:
                path.write_text(f'{{"a": "{value}"}}' if name == "d.jsonl" else f"a\n{value}")
            os.utime(path, (1_000_000_000, 1_000_000_000))
            assert rows_of(path) == [{"a": value}]
            seen.append(source_digest(section(path)))
        assert seen[0] == seen[2] != seen[1]


def test_the_identity_follows_names_order_and_content_of_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    seen = [source_digest(section(folder))]
    for content, name in ((LINES, "b.jsonl"), (b"{}", "b.jsonl"), (b"{}", "c.jsonl")):
        (folder / name).write_bytes(content)
        seen.append(source_digest(section(folder)))
    assert len(set(seen)) == 4
    assert open_source(section(folder)).identity == seen[-1]


# ---- the hub --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A data set of the hub with tool calls that differ, as JSON Lines; gives the arguments of every loading."""
    import datasets

    folder, load, asked = tmp_path / "hub", datasets.load_dataset, []
    folder.mkdir()
    calls = [[{"a": 1}, {"b": [2]}], [], [{"c": None}]]
    (folder / "train.jsonl").write_bytes(lines(*({"calls": each} for each in calls)))

    def load_dataset(path: str, *, streaming: bool = False, split: str, **options: Any) -> Any:
        asked.append({"path": path, "streaming": streaming, "split": split, **options})
        return load(str(folder), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def commit_now(monkeypatch: pytest.MonkeyPatch, commit: str) -> None:
    import huggingface_hub

    class Api:
        def dataset_info(self, *_: Any, **__: Any) -> Any:
            return type("Info", (), {"sha": commit})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_rows_of_the_hub_are_streamed_at_the_commit_that_names_them_and_keep_their_objects(
    on_the_hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_now(monkeypatch, COMMIT)
    assert read("someone/data", subset="main", revision="v1") == [
        ("someone/data: row 1", {"calls": [{"a": 1}, {"b": [2]}]}),
        ("someone/data: row 2", {"calls": []}),
        ("someone/data: row 3", {"calls": [{"c": None}]}),
    ]
    expected = {"path": "someone/data", "name": "main", "split": "train", "revision": COMMIT, "streaming": True}
    assert on_the_hub == [expected]
    assert rows_of("someone/data", max_rows=1) == [{"calls": [{"a": 1}, {"b": [2]}]}]


def test_the_identity_of_a_hub_data_set_is_its_commit_subset_and_split(
    on_the_hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_now(monkeypatch, COMMIT)
    seen = [source_digest(section("someone/data", **keys)) for keys in ({}, {"subset": "s"}, {"split": "test"})]
    commit_now(monkeypatch, COMMIT[::-1])
    seen.append(source_digest(section("someone/data")))
    assert len(set(seen)) == 4
    assert source_digest(section("someone/data", revision=COMMIT)) == seen[0]
    assert files_passed_over(section("someone/data")) == ()
    assert on_the_hub == [], "nothing is loaded for it"
    assert open_source(section("someone/data")).identity == seen[-1]


def test_without_a_network_a_loaded_data_set_is_known_by_its_rows_and_others_by_their_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    assert source_digest(section("no/such")) == source_digest(section("no/such"))
    assert source_digest(section("no/such")) != source_digest(section("no/such", revision="v1"))
    seen = []
    for row in (QA, {**QA, "answer": "b"}):
        table = datasets.Dataset.from_list([row])
        monkeypatch.setattr(datasets, "load_dataset", lambda table=table, **_: table)
        assert rows_of("someone/data") == [row]
        seen.append(source_digest(section("someone/data")))
        assert open_source(section("someone/data")).identity == seen[-1]
    assert seen[0] != seen[1]


def test_without_a_network_what_was_downloaded_before_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*, streaming: bool = False, **_: Any) -> Any:
        if streaming:
            raise ConnectionError("Couldn't reach the hub")
        return datasets.Dataset.from_list([QA])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("someone/data", revision=COMMIT) == [QA]


def test_a_hub_data_set_that_cannot_be_read_is_one_sentence() -> None:
    assert refusal("no/such") == (
        "no/such cannot be read from the Hugging Face hub (Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled)); "
        "name a file that exists here, or a data set of the hub"
    )


def test_a_digest_of_files_that_are_missing_is_refused() -> None:
    with pytest.raises(DataError, match=r"missing.jsonl: no such file"):
        source_digest(section("missing.jsonl"))


def test_real_sets_are_read_line_by_line(shared: Path) -> None:
    path = shared / "data" / "gsm8k" / "test.jsonl"
    assert rows_of(path) == [json.loads(line) for line in path.read_text().splitlines()]
    assert sources.CHUNK_ROWS == 480
