"""The three row schemas that data files may have, and rows brought into them.

| schema          | columns                                        | used for                                  |
|-----------------|------------------------------------------------|-------------------------------------------|
| question_answer | question, answer [, wrong_answer]              | SFT; DPO with wrong_answer or a made one  |
| messages        | messages [, tools]                             | SFT                                       |
| preference      | prompt, chosen, rejected [, tools]             | DPO; each a text or a list of messages    |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hymba_align.data.messages import Message, canonical_messages, canonical_tools, dump_json
from hymba_align.errors import DataError, RenderError

if TYPE_CHECKING:
    from datasets import Features

SchemaName = Literal["question_answer", "messages", "preference"]
Row = dict[str, Any]
SOURCE = "source"  # the column that says where a row came from: "path:line"
REFUSED = "refused"  # the column that says why a row of a hub data set cannot be used, None where it can


@dataclass(frozen=True)
class Schema:
    """Columns of one kind of row; `convert` checks a row's values and brings them into the canonical types."""

    name: SchemaName
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Row]

    def ignored(self, columns: Collection[str]) -> tuple[str, ...]:
        """Columns of a file that this schema does not read, sorted."""
        return tuple(sorted(set(columns) - {*self.required, *self.optional}))


def detect_schema(columns: Collection[str]) -> Schema:
    """The schema whose required columns are all there.

    Raises: DataError naming the columns found and the accepted ones.
    """
    for schema in SCHEMAS:
        if set(schema.required) <= set(columns):
            return schema
    found = ", ".join(sorted(map(str, columns))) or "none"
    accepted = "; or ".join(", ".join(schema.required) for schema in SCHEMAS)
    raise DataError(f"the columns found are {found}; name them as one of these sets: {accepted}")


def canonical_row(schema: Schema, row: Mapping[str, Any]) -> Row:
    """A row with exactly the schema's columns (optional ones may be None), its values checked.

    Raises: DataError, or RenderError for a message that cannot be rendered.
    """
    missing = [column for column in schema.required if row.get(column) is None]
    if missing:
        raise DataError(f"the column {missing[0]!r} is missing; every row needs {', '.join(schema.required)}")
    return schema.convert(row)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"the column {column!r} must be text, not {value!r:.60}")
    if not value.strip():
        raise DataError(f"the column {column!r} is empty; fill it in or remove the row")
    return value


def _question_answer_row(row: Mapping[str, Any]) -> Row:
    wrong = None if row.get("wrong_answer") is None else _text(row, "wrong_answer")
    return {"question": _text(row, "question"), "answer": _text(row, "answer"), "wrong_answer": wrong}


def _messages_row(row: Mapping[str, Any]) -> Row:
    messages = canonical_messages(row["messages"])
    if not any(message["role"] == "assistant" for message in messages):
        raise RenderError("the conversation has no assistant turn, so there is nothing to train on")
    return {"messages": messages, "tools": _tools(row)}


def _preference_row(row: Mapping[str, Any]) -> Row:
    prompt = _column_messages(row, "prompt", "user")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise DataError("the column 'prompt' must end with a turn that the assistant answers")
    replies = {column: _reply(row, column, prompt) for column in ("chosen", "rejected")}
    return {"prompt": prompt, **replies, "tools": _tools(row)}


def _reply(row: Mapping[str, Any], column: str, prompt: list[Message]) -> list[Message]:
    """The messages after the prompt; files that repeat the prompt in `chosen` and `rejected` are common."""
    messages = _column_messages(row, column, "assistant")
    reply = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    if not reply or reply[0]["role"] != "assistant":
        raise DataError(f"the column {column!r} must begin with the assistant's turn, or repeat 'prompt' before it")
    return reply


def _column_messages(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    if isinstance(row[column], str):
        return [{"role": role, "content": _text(row, column)}]
    try:
        return canonical_messages(row[column])
    except RenderError as error:
        raise RenderError(f"in the column {column!r}, {error}") from error


def _tools(row: Mapping[str, Any]) -> str | None:
    """Tools as one JSON string, since their objects differ too much for dataset columns; TRL parses it."""
    tools = canonical_tools(row.get("tools"))
    return dump_json(tools) if tools else None


SCHEMAS = (
    Schema("preference", ("prompt", "chosen", "rejected"), ("tools",), _preference_row),
    Schema("messages", ("messages",), ("tools",), _messages_row),
    Schema("question_answer", ("question", "answer"), ("wrong_answer",), _question_answer_row),
)


def row_features(name: SchemaName, *, refusable: bool = False) -> Features:
    """The dataset columns of canonical rows, with one for why a row cannot be used where that is no error."""
    from datasets import Features, Value

    text = Value("string")
    columns: dict[str, Any] = {
        "question_answer": {"question": text, "answer": text, "wrong_answer": text},
        "messages": {"messages": message_feature(), "tools": text},
        "preference": {**dict.fromkeys(("prompt", "chosen", "rejected"), message_feature()), "tools": text},
    }[name]
    return Features({**columns, SOURCE: text, **({REFUSED: text} if refusable else {})})


def message_feature(*, tool_calls: bool = True) -> Any:
    """The dataset type of a list of messages."""
    from datasets import List, Value

    text = Value("string")
    call = {"type": text, "function": {"name": text, "arguments": text}}
    return List({"role": text, "content": text, **({"tool_calls": List(call)} if tool_calls else {})})
