"""A source as a whole: read once and no further than asked, known by its content; data sets of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.reading import readers, sources
from hymba_align.data.reading.sources import (
    files_passed_over,
    open_source,
    source_digest,
)
from hymba_align.errors import DataError
from tests.data.reading.read_sources import LINES, QA, lines, read, refusal, rows_of, section


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


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_read(
    monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    import datasets
    import huggingface_hub

    class Api:
        def dataset_info(self, *_: Any, **__: Any) -> Any:
            raise type("ConnectError", (Exception,), {"__module__": client})("Name or service not known")

    def load_dataset(**_: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE, "the hub is asked again"
        return datasets.Dataset.from_list([QA])

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert refusal("no/such") == (
        "no/such is not in the cache, and the Hugging Face hub does not answer; "
        "name a file that exists here, or a data set of the hub"
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("someone/data") == [QA]


def test_a_hub_data_set_that_cannot_be_read_is_one_sentence() -> None:
    assert refusal("no/such") == (
        "no/such cannot be read from the Hugging Face hub (Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled)); "
        "name a file that exists here, or a data set of the hub"
    )


def test_a_digest_of_files_that_are_missing_is_refused() -> None:
    with pytest.raises(DataError, match=r"missing.jsonl: no such file"):
        source_digest(section("missing.jsonl"))
