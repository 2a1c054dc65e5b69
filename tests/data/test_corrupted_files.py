"""Corrupted files: every line, document and table is told or handled; and the cases that tools stumble over, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection
from tests.data.corruptions import as_line, corrupted_documents, corrupted_tables, tries
from tests.data.what_holds import MAX_LENGTH, accounted, check_reason


def check_file(path: Path, tokenizer: Any) -> None:
    """A file gives counts that add up, or a DataError that names it, under either stage."""
    for prepare in (prepare_sft, prepare_preferences):
        section = DataSection(path=str(path), bad_rows="drop", over_long="drop", workers=1)
        try:
            prepared = prepare(section, tokenizer, MAX_LENGTH, seed=0)
        except DataError as error:
            told = str(error)
            check_reason(told.replace(str(path), path.name), longest=2000)  # several reasons
            named = path.name in told
        else:
            named = True
            (counts,) = prepared.sources
            assert counts.rows_read == counts.rows_kept + len(counts.lost)
            for one in counts.lost:
                assert re.fullmatch(rf"{re.escape(str(path))}(:\d+)?(: row \d+| \(row \d+\))?", one.place)
                check_reason(one.reason)
        assert named, told


def test_a_corrupted_file_is_told_or_handled(small: Any, tmp_path: Path) -> None:
    number = [0]

    def check(drawn: tuple[str, bytes]) -> None:
        suffix, content = drawn
        number[0] += 1
        path = tmp_path / f"{number[0]}{suffix}"
        path.write_bytes(content)
        check_file(path, small)

    tries("documents", corrupted_documents(), check)


def test_a_corrupted_table_is_told_or_handled(small: Any, tmp_path: Path) -> None:
    number = [0]

    def check(content: bytes) -> None:
        number[0] += 1
        path = tmp_path / f"{number[0]}.csv"
        path.write_bytes(content)
        check_file(path, small)

    tries("tables", corrupted_tables(), check)


# ---- cases by name ---------------------------------------------------------------------------------------------------


GOOD = json.dumps({"prompt": "2+2?", "completion": "4"}).encode()
LONG = 10_000_000
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
NAMED: dict[str, bytes] = {
    "nothing but a BOM": b"\xef\xbb\xbf",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a text": b'"hello"',
    "NaN": b'{"prompt": NaN, "completion": "4"}',
    "a number of 5,000 digits": b'{"prompt": ' + b"9" * 5000 + b', "completion": "4"}',
    "a lone surrogate": b'{"prompt": "\\ud800", "completion": "4"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80", "completion": "4"}',
    "not UTF-8": b'{"prompt": "\xff", "completion": "4"}',
    "100,000 brackets": b'{"prompt": ' + b"[" * 100_000 + b', "completion": "4"}',
    "100,000 closed brackets": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "completion": "4"}',
    "a key twice": b'{"prompt": "a", "prompt": "b", "completion": "4"}',
    "a prompt of 10 MB": b'{"prompt": "' + b"x" * LONG + b'", "completion": "4"}',
    "an open text of 10 MB": b'{"prompt": "' + b"x" * LONG,
    "a role of 10 MB": b'{"prompt": [{"role": "' + b"x" * LONG + b'", "content": "a"}], "completion": "4"}',
    "a column of 10 MB": b'{"' + b"x" * LONG + b'": 1}',
    "a null role": b'{"prompt": [{"role": null, "content": "a"}], "completion": "4"}',
    "100,001 turns": as_line({"prompt": [USER, ASSISTANT] * 50_000 + [USER], "completion": "4"}),
    "another schema": b'{"text": "a"}',
    "an empty object": b"{}",
}


@pytest.fixture(scope="module")
def named_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("named") / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, *NAMED.values(), GOOD]))
    yield path
    path.unlink()


@pytest.mark.timeout(60)
def test_the_cases_that_tools_stumble_over_are_lost_one_by_one_between_good_rows(named_rows: Path, small: Any) -> None:
    section = DataSection(path=str(named_rows), bad_rows="drop", over_long="drop", workers=1)
    prepared = prepare_sft(section, small, MAX_LENGTH, seed=0)
    lines = [GOOD, *NAMED.values(), GOOD]
    assert accounted(prepared, named_rows, 1, lines) == {1, len(lines)}


@pytest.mark.parametrize("name", ["NaN", "a lone surrogate", "not UTF-8", "a null role"])
def test_a_bad_row_stops_the_run_with_its_line_unless_rows_may_be_dropped(
    name: str, small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, NAMED[name]]))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: .*data\.bad_rows: drop"):
        prepare_sft(DataSection(path=str(path), workers=1), small, MAX_LENGTH, seed=0)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(
    end: bytes, mark: bytes, small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + end.join([GOOD, b"", GOOD]) + end)
    prepared = prepare_sft(DataSection(path=str(path), workers=1), small, MAX_LENGTH, seed=0)
    assert prepared.dataset["place"][:] == [f"{path}:1", f"{path}:3"]
    first, second = prepared.dataset["input_ids"][:]
    assert first == second


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "end", ["#### 5" + " " * 1_000_000 + "x", "#### " * 200_000, "<<1=" * 200_000, "<<" + "=1" * 500_000]
)
def test_a_long_answer_from_which_no_wrong_one_can_be_made_is_told_in_seconds(
    end: str, small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"question": "1+1?", "answer": "#### 2"}
    path.write_bytes(b"\n".join(map(as_line, [good, {"question": "2+2?", "answer": end}])))
    section = DataSection(path=str(path), bad_rows="drop", over_long="drop", workers=1)
    assert len(prepare_preferences(section, small, MAX_LENGTH, seed=0).lost) == 1


def test_rows_of_a_list_that_is_one_line_are_told_apart(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good = json.loads(GOOD)
    path.write_text(json.dumps([good, good, {"prompt": "2+2?"}, {"completion": "4"}]), encoding="utf-8")
    prepared = prepare_sft(DataSection(path=str(path), bad_rows="drop", workers=1), small, MAX_LENGTH, seed=0)
    (counts,) = prepared.sources
    assert (counts.rows_read, counts.rows_kept, len(counts.lost)) == (4, 2, 2)
    places = [*prepared.dataset["place"], *(one.place for one in counts.lost)]
    assert len(set(places)) == 4
    assert all(place.startswith(f"{path}:1") for place in places)


def test_letters_whose_bytes_look_like_line_ends_do_not_end_a_line(small: Any, tmp_path: Path) -> None:
    text = "\u0085 \u2028 \u2029 \x0b \x0c \x1c \x1e Å …"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": text, "completion": "4"}, ensure_ascii=False), encoding="utf-8")
    prepared = prepare_sft(DataSection(path=str(path), workers=1), small, MAX_LENGTH, seed=0)
    assert prepared.kept == 1
    assert text.strip() in small.decode(prepared.dataset[0]["input_ids"])
