"""Texts that others wrote, as Markdown that shows them and does nothing else: no link, no picture, no heading, no HTML."""

from __future__ import annotations

import re
from typing import Any

from hymba_align.eval.report.words import seen

_ACTS = re.compile(r"[\\`*_\[\]<>&~$|#@!]|(?<=:)/|(?<=www)\.", re.IGNORECASE)
"""What begins markup within a line, and the middle of an address, which some readers make a link of"""
_TICKS = re.compile("`+")


def words(value: Any) -> str:
    """The text in one line of running text, also in the cell of a table."""
    return _ACTS.sub(lambda found: f"\\{found[0]}", _line(value))


def code(value: Any) -> str:
    """The text in one line, between backticks that it cannot close; as running text where a table would read a bar in it."""
    line = _line(value)
    if not line or "|" in line:
        return words(line)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(value: Any) -> str:
    """The text with its line breaks, in a fence that it cannot close."""
    text = seen(value)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _line(value: Any) -> str:
    return " ".join(seen(value).split())


def _longest_run(text: str) -> int:
    return max(map(len, _TICKS.findall(text)), default=0)
