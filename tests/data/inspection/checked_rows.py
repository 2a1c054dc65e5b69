"""Rows that tests of the check write and read, good ones and others, and templates that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]}
GOOD_PAIR = {"prompt": "hi", "chosen": "good day", "rejected": "go away"}


def messages(*turns: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


SIMPLE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] ~ ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed
