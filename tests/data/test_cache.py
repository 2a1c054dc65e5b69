"""A second preparation reads the cache; a change of anything that it depends on does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data import cache, prepare
from hymba_align.data.prepare import Prepared, prepare_preferences, prepare_sft
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection

ROWS = [{"question": f"question {number}", "answer": f"answer {number}\n#### {number}"} for number in range(20)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of sources that are built from now on."""
    built: list[str] = []
    build = prepare._build

    def counted(opened: Any, *rest: Any) -> None:
        built.append(opened.name)
        build(opened, *rest)

    monkeypatch.setattr(prepare, "_build", counted)
    return built


def same(one: Prepared, other: Prepared) -> bool:
    return one.dataset.to_list() == other.dataset.to_list() and one.sources == other.sources


def test_an_unchanged_set_is_read_from_the_cache(small: Any, data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    first = prepare_sft(section, small, 512, seed=0)
    again = prepare_sft(section, load_tokenizer(small.name_or_path), 512, seed=0)
    assert builds == [str(data)]
    assert same(first, again)
    assert first.dataset._fingerprint == again.dataset._fingerprint, "TRL would compute again what it derives from it"


def test_what_does_not_change_the_records_rebuilds_nothing(small: Any, data: Path, builds: list[str]) -> None:
    one = prepare_sft(DataSection(path=str(data)), small, 512, seed=0)
    prepare_sft(DataSection(path=str(data), workers=2), small, 512, seed=0)
    prepare_sft(DataSection(path=str(data), bad_rows="drop"), small, 512, seed=0)
    prepare_sft(DataSection(path=str(data), repeat=3), small, 512, seed=0)
    assert len(builds) == 1
    assert one.kept == 20


@pytest.mark.parametrize(
    "change",
    [
        {"keep_fraction": 0.5},
        {"max_rows": 7},
        {"question_format": "Q: {question}"},
        {"examples_per_conversation": 2},
        {"loss_on": "all"},
        {"validation_fraction": 0.3},
        {"over_long": "truncate"},
        {"format": "question_answer"},
        {"columns": {"question": "answer", "answer": "question"}},
        {"roles": {"bot": "assistant"}},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_rebuilds(small: Any, data: Path, builds: list[str], change: dict[str, Any]) -> None:
    prepare_sft(DataSection(path=str(data)), small, 512, seed=0)
    prepare_sft(DataSection(path=str(data), **change), small, 512, seed=0)
    assert len(builds) == 2


def test_another_length_or_stage_rebuilds(small: Any, data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    prepare_sft(section, small, 512, seed=0)
    prepare_sft(section, small, 511, seed=0)
    prepare_preferences(section, small, 512, seed=0)
    assert len(builds) == 3


def test_other_content_under_the_same_name_size_and_date_is_seen(small: Any, data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    first = prepare_sft(section, small, 512, seed=0)
    before = data.stat()
    data.write_text(data.read_text().replace("answer 7", "answer 3", 1))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = prepare_sft(section, small, 512, seed=0)
    assert len(builds) == 2
    assert "answer 3" in small.decode(again.dataset[7]["input_ids"])
    assert "answer 7" in small.decode(first.dataset[7]["input_ids"])


def test_another_tokenizer_rebuilds(load: Callable[[str], Any], data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    changed = load_tokenizer(load("small").name_or_path)
    prepare_sft(section, load("small"), 512, seed=0)
    changed.add_tokens(["question"])
    prepared = prepare_sft(section, changed, 512, seed=0)
    assert len(builds) == 2
    assert changed.convert_tokens_to_ids("question") in prepared.dataset[0]["input_ids"]


def test_another_name_of_a_special_token_rebuilds(load: Callable[[str], Any], data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    changed = load_tokenizer(load("small").name_or_path)
    before = cache.tokenizer_digest(changed)
    changed.bos_token = "</s>"
    assert changed.backend_tokenizer.to_str() == load("small").backend_tokenizer.to_str()
    assert cache.tokenizer_digest(changed) != before
    prepare_sft(section, load("small"), 512, seed=0)
    prepare_sft(section, changed, 512, seed=0)
    assert len(builds) == 2


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_another_version_of_a_library_that_tokenizes_rebuilds(
    small: Any, data: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    section = DataSection(path=str(data))
    prepare_sft(section, small, 512, seed=0)
    monkeypatch.setattr(f"{library}.__version__", "0.0.0")
    prepare_sft(section, small, 512, seed=0)
    assert len(builds) == 2


def test_records_made_again_are_known_as_the_same(small: Any, data: Path, builds: list[str], tmp_path: Path) -> None:
    import datasets

    section = DataSection(path=str(data))
    first = prepare_sft(section, small, 512, seed=0).dataset._fingerprint
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / cache.FOLDER)
    assert prepare_sft(section, small, 512, seed=0).dataset._fingerprint == first
    assert len(builds) == 2


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    small: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, content = DataSection(path=str(data)), data.read_text()
    ordered_map = prepare.ordered_map

    def changed_first(*arguments: Any) -> Any:
        data.write_text(content.replace("answer", "other"))
        return ordered_map(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "ordered_map", changed_first)
        with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; run the command again"):
            prepare_sft(section, small, 512, seed=0)
    data.write_text(content)
    assert "answer 7" in small.decode(prepare_sft(section, small, 512, seed=0).dataset[7]["input_ids"])


def test_a_cache_that_cannot_be_written_is_one_sentence(
    small: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data / "below")
    with pytest.raises(
        DataError, match=r"^prepared data cannot be written to .*; set HF_DATASETS_CACHE to a folder with room"
    ):
        prepare_sft(DataSection(path=str(data)), small, 512, seed=0)


def test_another_template_rebuilds(load: Callable[[str], Any], data: Path, builds: list[str]) -> None:
    section = DataSection(path=str(data))
    changed = load_tokenizer(load("small").name_or_path)
    prepare_sft(section, load("small"), 512, seed=0)
    changed.chat_template = changed.chat_template.replace("System", "Setting")
    prepared = prepare_sft(section, changed, 512, seed=0)
    assert len(builds) == 2
    assert "Setting" in changed.decode(prepared.dataset[0]["input_ids"])


def test_a_changed_converter_rebuilds(
    small: Any, data: Path, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "own_converter_of_test_cache.py"
    source = "def convert(row):\n    return {**row, 'answer': row['answer'] + 'FIRST'}\n"
    section = DataSection(path=str(data), convert="own_converter_of_test_cache:convert")
    for word in ("FIRST", "OTHER"):
        module.write_text(source.replace("FIRST", word))
        prepared = prepare_sft(section, small, 512, seed=0)
        assert word in small.decode(prepared.dataset[0]["input_ids"])
    assert len(builds) == 2


def test_other_code_rebuilds(small: Any, data: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    section = DataSection(path=str(data))
    prepare_sft(section, small, 512, seed=0)
    monkeypatch.setattr(prepare, "code_digest", lambda: "other")
    prepare_sft(section, small, 512, seed=0)
    assert len(builds) == 2


def test_the_code_digest_covers_every_module_of_the_data_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "data"
    shutil.copytree(Path(cache.__file__).parent, copied)
    monkeypatch.setattr(cache, "__file__", str(copied / "cache.py"))
    before = cache.code_digest()
    for name in ("lengths.py", "hymba.jinja", "reading/messages.py"):
        (copied / name).write_text((copied / name).read_text() + "\n")
        after = cache.code_digest()
        assert after != before
        before = after


def test_an_interrupted_build_leaves_nothing_behind(
    small: Any, data: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    section = DataSection(path=str(data))

    def interrupted(opened: Any, maker: Any, workers: Any, folder: Path) -> None:
        (folder / "records.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_sft(section, small, 512, seed=0)
    assert list((Path(datasets.config.HF_DATASETS_CACHE) / cache.FOLDER).iterdir()) == []
    assert prepare_sft(section, small, 512, seed=0).kept == 20


def test_another_process_that_was_faster_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("mine")
        other = folder.parent / cache.digest({"key": 1})
        if not other.exists():
            other.mkdir()
            (other / "file").write_text("theirs")

    assert (cache.cached({"key": 1}, build) / "file").read_text() == "theirs"


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_entry_is_named_and_made_again(
    small: Any, data: Path, builds: list[str], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    import datasets

    section = DataSection(path=str(data))
    first = prepare_sft(section, small, 512, seed=0).dataset.to_list()
    (records,) = (Path(datasets.config.HF_DATASETS_CACHE) / cache.FOLDER).glob("*/records.arrow")
    content = bytearray(records.read_bytes())
    if damage == "cut":
        records.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        records.write_bytes(content)
    else:
        records.unlink()
    again = prepare_sft(section, small, 512, seed=0)
    assert len(builds) == 2
    assert again.dataset.to_list() == first
    reason = (
        f"[Errno 2] No such file or directory: '{records}'"
        if damage == "missing"
        else "records.arrow is not what was written"
    )
    assert capsys.readouterr().err == f"prepared data in {records.parent} is damaged ({reason}); it is made again\n"


def test_what_a_killed_process_had_begun_is_removed_and_what_a_living_one_has_begun_is_not(tmp_path: Path) -> None:
    root = cache.cache_folder({"key": 1}).parent
    root.mkdir(parents=True)
    (root / ".abandoned").mkdir()
    (root / ".abandoned" / cache.LOCK).touch()
    with cache._new_folder(root, "begun") as begun:
        (begun / "half").write_text("half")
        cache.cached({"key": 2}, lambda folder: (folder / "file").write_text("all") and None)
        assert (begun / "half").read_text() == "half"
    assert [path.name for path in root.iterdir()] == [cache.digest({"key": 2})]
