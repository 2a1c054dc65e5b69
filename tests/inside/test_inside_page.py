"""docs/inside.md reads a real report: what it quotes is what the program says of the numbers that lie beside it."""

from __future__ import annotations

import re
from pathlib import Path

from hymba_align.inside.findings import findings
from hymba_align.inside.stored import read

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "inside.md").read_text(encoding="utf-8")


def test_every_sentence_that_the_page_quotes_is_what_is_said_of_these_numbers() -> None:
    blocks = re.findall(r"(?:^>.*\n)+", PAGE, flags=re.MULTILINE)
    quoted = [
        " ".join(part.split()) for block in blocks for part in re.sub(r"^> ?", "", block, flags=re.M).split("\n\n")
    ]
    said = {one.text.replace("<s>", "`<s>`") for one in findings(read(DOCS / "inside" / "inspect.json"))}
    assert len(quoted) >= 12
    assert [one for one in quoted if one not in said] == []


def test_the_page_says_that_no_sign_is_marked_and_none_is() -> None:
    alignment = [one for one in findings(read(DOCS / "inside" / "inspect.json")) if one.part == "alignment"]
    assert "None is marked here." in PAGE
    assert alignment
    assert not any(one.sign for one in alignment)


def test_every_picture_of_the_page_is_there_and_no_other() -> None:
    shown = set(re.findall(r"\]\(inside/(\w+\.png)\)", PAGE))
    assert shown == {path.name for path in (DOCS / "inside").glob("*.png")}
