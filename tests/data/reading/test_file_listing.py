"""Files, folders, globs and URLs: what is read of them, in order, and what is passed over."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.reading.sources import (
    open_source,
    source_digest,
)
from tests.data.reading.read_sources import LINES, QA, lines, read, refusal, rows_of, section


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


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file.csv", "a/b/c", "d.tsv", "d.tar.gz"])
def test_a_missing_file_is_named(name: str) -> None:
    assert f"{name}: no such file; name one that exists, or a hub data set" in refusal(name)


def test_what_only_the_hub_has_is_refused_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINES)
    for key in ("subset", "revision", "split"):
        assert f"d.jsonl: {key} is 'x', but only data sets of the hub have one; remove it" in refusal(
            tmp_path / "d.jsonl", **{key: "x"}
        )
