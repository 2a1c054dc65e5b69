"""Files of rows, good ones and others, for `hymba-align data`; and what it marks as trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = "recipes/tiny/arithmetic.yaml"
TOKENIZER = "data/arithmetic/tokenizer"
TINY = ("--tokenizer", TOKENIZER)
CHATS = [
    [{"role": "user", "content": f"Question {number}: what is \x1b[31m[red]{number}[/red]?"}, {"role": "assistant", "content": f"It is {number}."}]
    for number in range(12)
]  # fmt: skip
BAD = [
    {"messages": CHATS[0]},
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"messages": [{"role": "us\x1b[2Jer", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": "Long"}, {"role": "assistant", "content": "words " * 80}]},
]
PAIR = {"prompt": "What is 1+1?", "chosen": "It is 2.", "rejected": "It is 3, I think."}
Run = Callable[..., tuple[int, str, str]]


def write(path: Path, rows: list[dict[str, Any]], malformed: str = "") -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + malformed, encoding="utf-8")
    return path


def chats(path: Path, count: int = 12) -> Path:
    return write(path, [{"messages": messages} for messages in CHATS[:count]])


def write_recipe(folder: Path, base: dict[str, Any], **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"name": "demo", "base": base, **sections}))
    return path


def spans(out: str) -> list[str]:
    """What is marked as trained, without the legend."""
    return re.findall("⟦([^⟧]*)⟧", out.split("line break\n", 1)[1])
