from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.reading.converters import converter_digest, load_converter
from hymba_align.errors import DataError

TO_TEXT = "def convert(row):\n    return {'text': row['body']}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory; modules that a test imports from it, and what it did to the path, go with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(name: str, source: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def refusal(name: str, row: dict[str, Any] | None = None) -> str:
    with pytest.raises(DataError) as error:
        load_converter(name)({} if row is None else row)
    return str(error.value)


def test_a_function_of_the_current_directory_converts_rows(here: Path) -> None:
    write("h1_own.py", TO_TEXT)
    assert str(here) not in sys.path
    assert load_converter("h1_own:convert")({"body": "t"}) == [{"text": "t"}]
    assert sys.path[-1] == str(here)


def test_an_installed_module_needs_no_current_directory(tmp_path: Path, here: Path) -> None:
    write("lib/h1_pkg/__init__.py", "")
    write("lib/h1_pkg/mod.py", TO_TEXT)
    sys.path.insert(0, str(tmp_path / "lib"))
    assert load_converter("h1_pkg.mod:convert")({"body": "t"}) == [{"text": "t"}]
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ("return None", []),
        ("return []", []),
        ("return {'text': 'a'}", [{"text": "a"}]),
        ("return [{'text': 'a'}, {'text': 'b'}]", [{"text": "a"}, {"text": "b"}]),
        ("return ({'text': c} for c in 'ab')", [{"text": "a"}, {"text": "b"}]),
        ("yield {'text': 'a'}", [{"text": "a"}]),
    ],
)
def test_a_row_becomes_none_one_or_several(body: str, rows: list[dict[str, str]]) -> None:
    write("h1_many.py", f"def convert(row):\n    {body}\n")
    assert load_converter("h1_many:convert")({}) == rows


def test_a_converter_may_change_its_row_and_the_callers_stays() -> None:
    write("h1_pop.py", "def convert(row):\n    return {'text': row.pop('body')}\n")
    row = {"body": "t"}
    assert load_converter("h1_pop:convert")(row) == [{"text": "t"}]
    assert row == {"body": "t"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return row['text']",
            "the converter h1_bad:convert failed with KeyError: 'text'; correct it, or let it return None for rows that "
            "it cannot use",
        ),
        (
            "raise ValueError('no\\nuse.')",
            "the converter h1_bad:convert failed with ValueError: no; correct it, or let",
        ),
        ("yield row['text']", "the converter h1_bad:convert failed with KeyError: 'text'; correct it"),
        (
            "return 7",
            "the converter h1_bad:convert returned a number; let it return a row (a dict), a list of rows, or None",
        ),
        (
            "return 'text'",
            "the converter h1_bad:convert returned text; let it return a row (a dict), a list of rows, or",
        ),
        ("return [row, 7]", "the converter h1_bad:convert returned a list with a number in it; let it return a row"),
    ],
)
def test_a_converter_that_fails_or_returns_no_rows_is_named(body: str, message: str) -> None:
    write("h1_bad.py", f"def convert(row):\n    {body}\n")
    assert refusal("h1_bad:convert").startswith(message)


def test_a_converter_that_ends_the_program_is_one_that_fails() -> None:
    write("h1_exit.py", "import sys\n\ndef convert(row):\n    sys.exit(1)\n\ndef later(row):\n    yield sys.exit()\n")
    assert refusal("h1_exit:convert").startswith("the converter h1_exit:convert failed with SystemExit: 1; correct it")
    assert refusal("h1_exit:later").startswith("the converter h1_exit:later failed with SystemExit; correct it")


def test_a_module_that_ends_the_program_cannot_be_imported(tmp_path: Path, here: Path) -> None:
    write("h1_leave.py", "raise SystemExit('usage: none')\n")
    assert "importing h1_leave failed with SystemExit: usage: none; run from" in refusal("h1_leave:convert")
    assert str(here) not in sys.path
    write("lib/h1_leave_too.py", "import sys\nsys.exit(2)\n")
    sys.path.insert(0, str(tmp_path / "lib"))
    assert "importing h1_leave_too failed with SystemExit: 2; run from" in refusal("h1_leave_too:convert")


def test_what_cannot_be_imported_is_named(here: Path) -> None:
    assert refusal("h1_none.mod:convert") == (
        "convert is h1_none.mod:convert, and importing h1_none.mod failed with ModuleNotFoundError: No module named "
        "'h1_none'; run from the folder that holds it, or install it"
    )
    assert str(here) not in sys.path
    write("h1_broken.py", "def convert(:\n")
    assert refusal("h1_broken:convert").startswith(
        "convert is h1_broken:convert, and importing h1_broken failed with SyntaxError: invalid syntax"
    )
    write("h1_raises.py", "1 / 0\n")
    assert "importing h1_raises failed with ZeroDivisionError: division by zero" in refusal("h1_raises:convert")
    write("h1_plain.py", "convert = 7\n")
    assert refusal("h1_plain:convert") == (
        "convert is h1_plain:convert, which is a number and no function; name a function"
    )
    assert refusal("h1_plain:other") == (
        f"convert is h1_plain:other, and h1_plain ({here / 'h1_plain.py'}) has no 'other'; name a function of it"
    )
    assert refusal("h1_plain") == "convert is 'h1_plain'; write it as package.module:function"


def test_a_converter_goes_to_another_process_by_its_name() -> None:
    write("h1_sent.py", "convert = lambda row: {'text': row['body']}\n")
    sent = pickle.loads(pickle.dumps(load_converter("h1_sent:convert")))
    assert sent({"body": "t"}) == [{"text": "t"}]


def test_the_digest_follows_the_module_and_what_it_imports_of_the_users() -> None:
    write("h1_dig/__init__.py", "")
    write("h1_dig/mod.py", "from . import near\nfrom .sub.far import value\nimport h1_beside\n" + TO_TEXT)
    write("h1_dig/near.py", "import json\n")
    write("h1_dig/sub/__init__.py", "")
    write("h1_dig/sub/far.py", "def inner():\n    from h1_dig import late\nvalue = 1\n")
    write("h1_dig/late.py", "")
    write("h1_dig/unused.py", "")
    write("h1_beside.py", "")
    digests = [converter_digest("h1_dig.mod:convert")]
    for name in ("__init__", "mod", "near", "sub/__init__", "sub/far", "late", "../h1_beside"):
        with Path(f"h1_dig/{name}.py").open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        digests.append(converter_digest("h1_dig.mod:convert"))
    assert len(set(digests)) == len(digests)
    write("h1_dig/unused.py", "# changed\n")
    write("h1_unused.py", "# new\n")
    assert converter_digest("h1_dig.mod:convert") == digests[-1]
    assert converter_digest("h1_dig.mod:value") != digests[-1]


def test_the_digest_follows_the_users_modules_wherever_python_finds_them(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        sys.path.insert(0, str(tmp_path / folder))
    write(
        "one/h1_first.py", "import h1_second.part\nimport json, hypothesis\nfrom hymba_align import errors\n" + TO_TEXT
    )
    write("two/h1_second/part.py", "def late():\n    import h1_third\n")  # no __init__.py
    write("two/h1_third.py", "")
    write("two/h1_unused.py", "")
    digests = [converter_digest("h1_first:convert")]
    for name in ("h1_second/part", "h1_third"):
        with Path(f"two/{name}.py").open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        digests.append(converter_digest("h1_first:convert"))
    assert len(set(digests)) == 3
    write("two/h1_unused.py", "# changed\n")
    assert converter_digest("h1_first:convert") == digests[-1]


def test_a_changed_helper_in_another_folder_is_imported_anew(tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path / "lib"))
    write("h1_user.py", "from h1_far import WORD\ndef convert(row):\n    return {'text': WORD}\n")
    for word in ("a", "b"):
        write("lib/h1_far.py", f"WORD = '{word}'\n")
        assert load_converter("h1_user:convert")({}) == [{"text": word}]


def test_the_modules_of_a_digest_are_not_imported_for_it(tmp_path: Path) -> None:
    write("h1_lazy.py", "def inner():\n    import h1_heavy.part\n" + TO_TEXT)
    write("h1_heavy/__init__.py", "raise RuntimeError\n")
    write("h1_heavy/part.py", "")
    before = converter_digest("h1_lazy:convert")
    write("h1_heavy/part.py", "# changed\n")
    assert converter_digest("h1_lazy:convert") != before


def test_the_digest_does_not_depend_on_where_the_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for folder in ("one", "two"):
        write(f"{folder}/h1_moved.py", TO_TEXT)
        monkeypatch.chdir(tmp_path / folder)
        digests.add(converter_digest("h1_moved:convert"))
        monkeypatch.chdir(tmp_path)
        sys.path.remove(str(tmp_path / folder))
        del sys.modules["h1_moved"]
    assert len(digests) == 1


def test_the_digest_of_an_installed_function_leaves_other_libraries_out() -> None:
    assert converter_digest("yaml:safe_load") == converter_digest("yaml:safe_load") != converter_digest("yaml:dump")


def test_a_function_whose_source_changed_is_imported_anew_even_within_a_second() -> None:
    write("h1_new/__init__.py", "")
    write("h1_new/helper.py", "WORD = 'a'\n")
    write("h1_new/mod.py", "from h1_new.helper import WORD\ndef convert(row):\n    return {'text': WORD}\n")
    first = converter_digest("h1_new.mod:convert")
    assert load_converter("h1_new.mod:convert")({}) == [{"text": "a"}]
    write("h1_new/helper.py", "WORD = 'b'\n")
    assert load_converter("h1_new.mod:convert")({}) == [{"text": "b"}]
    assert converter_digest("h1_new.mod:convert") != first
