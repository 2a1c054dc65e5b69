"""Messages and tools in one canonical form, whatever wrapping they came in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hymba_align.errors import RenderError

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def canonical_messages(messages: Any) -> list[Message]:
    """Messages with a known role, a text as content, and tool calls as `canonical_tool_call` writes them.

    Raises: RenderError naming the turn, counted from 1.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RenderError(f"messages must be a list, not {_kind(messages)}")
    return [_canonical_message(turn, message) for turn, message in enumerate(messages, start=1)]


def _canonical_message(turn: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RenderError(f"turn {turn} must be an object with role and content, not {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RenderError(f"turn {turn} has the role {role!r}; use one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise RenderError(f"turn {turn} is the {role}'s and has tool_calls; only the assistant calls tools")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RenderError(f"the content of turn {turn} must be text, not {_kind(content)}")
    canonical: Message = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RenderError(f"the tool_calls of turn {turn} must be a list, not {_kind(calls)}")
        canonical["tool_calls"] = [canonical_tool_call(turn, call) for call in calls]
    return canonical


def canonical_tool_call(turn: int, call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name", "arguments"}}; arguments are a JSON object as a string.

    A string, so that calls with different arguments fit one dataset column; the chat template writes it verbatim.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RenderError(f"a tool call of turn {turn} has no name; write {{'name': ..., 'arguments': {{...}}}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise RenderError(
                f"the arguments of the call to {function['name']!r} in turn {turn} are not valid JSON: {error}"
            ) from error
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RenderError(
            f"the arguments of the call to {function['name']!r} in turn {turn} must be an object, not {_kind(arguments)}"
        )
    return {"type": "function", "function": {"name": function["name"], "arguments": dump_json(arguments)}}


def canonical_tools(tools: Any) -> list[Tool]:
    """Tool descriptions as a list of objects; a JSON string is parsed, None is no tools.

    Raises: RenderError.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise RenderError(f"tools are not valid JSON: {error}") from error
    tools = [] if tools is None else tools
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RenderError("tools must be a list of objects, or that list as a JSON string")
    return [dict(tool) for tool in tools]


def dump_json(value: Any) -> str:
    """JSON as the chat template's `tojson` writes it: key order kept, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False)


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
