"""Converters for the public sets beside the repository, as a user would write them (`convert:` in a recipe)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def ranked_replies(row: Row) -> list[Row]:
    """Every message of an OpenAssistant tree that has two or more ranked answers, with the turns before it."""
    rows = []
    for path in paths(row.get("prompt", row)):
        ranked = [
            reply for reply in path[-1]["replies"] if reply["role"] == "assistant" and reply.get("rank") is not None
        ]
        if path[-1]["role"] == "prompter" and len(ranked) > 1:
            rows.append(
                {
                    "prompt": messages(path),
                    "responses": [reply["text"] for reply in ranked],
                    "scores": [-reply["rank"] for reply in ranked],  # rank 0 is the best
                }
            )
    return rows


def conversations(row: Row) -> list[Row]:
    """Every conversation of a tree up to an answer that no further answer follows."""
    return [
        {"messages": messages(path)}
        for path in paths(row.get("prompt", row))
        if path[-1]["role"] == "assistant" and not any(reply["replies"] for reply in path[-1]["replies"])
    ]


def paths(message: Row, before: tuple[Row, ...] = ()) -> Iterator[tuple[Row, ...]]:
    """The message after those before it, then the same for its replies."""
    yield (*before, message)
    for reply in message["replies"]:
        yield from paths(reply, (*before, message))


def messages(path: tuple[Row, ...]) -> list[Row]:
    roles = {"prompter": "user", "assistant": "assistant"}
    return [{"role": roles[message["role"]], "content": message["text"]} for message in path]


def alpaca_rows(row: Row) -> list[Row]:
    """One Alpaca row per instance of a Self-Instruct task."""
    return [{"instruction": row["instruction"], **instance} for instance in row["instances"]]


def good_answers(row: Row) -> Row | None:
    """The conversation of a KTO row if its answer is labelled good."""
    return {"messages": row["messages"]} if row["label"] else None


def sharegpt_pair(row: Row) -> Row:
    """A preference whose prompt and answers are ShareGPT turns."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def turns(values: list[Row]) -> list[Row]:
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in values]

    return {
        "prompt": turns(row["conversations"]),
        "chosen": turns([row["chosen"]]),
        "rejected": turns([row["rejected"]]),
    }


def typed_parts(row: Row) -> Row:
    """Messages whose content is a list of parts; calls go into `tool_calls`, the reasoning is left out."""
    converted = []
    for message in row["messages"]:
        parts = [(part["type"], part["value"]) for part in message["content"]]
        calls = [json.loads(value) for kind, value in parts if kind == "tool_call"]
        text = "\n".join(value for kind, value in parts if kind == "text")
        converted.append({"role": message["role"], "content": text, **({"tool_calls": calls} if calls else {})})
    return {"messages": converted, "tools": row["tools"]}


def toolalpaca_calls(row: Row) -> list[Row]:
    """One conversation per instruction of an API: the question, and the calls that answer it.

    Instructions whose arguments hold placeholders instead of JSON, such as ${ip from getDetails}, are passed over.
    """
    tools = [{"name": name, "description": text} for name, text in row["Function_Description"].items()]
    rows = []
    for instruction, answers in zip(row["Instructions"], row["Golden_Answers"], strict=True):
        if all(is_object(answer["Action_Input"]) for answer in answers):
            calls = [{"name": answer["Action"], "arguments": answer["Action_Input"]} for answer in answers]
            question = {"role": "user", "content": instruction}
            rows.append(
                {"messages": [question, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}
            )
    return rows


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
