"""Tool calls and tool descriptions in one form, and results in the order of the calls that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hymba_align.data.reading.json_text import check_text, checked_json, first_value, kind, parse_json, shown
from hymba_align.errors import RenderError

Tool = dict[str, Any]
Identifier = str | int


def listed_calls(turn: int, calls: Any) -> list[Any]:
    """Calls as a list: from a list, from a single call, or from either as JSON text."""
    if not calls:
        return []
    if isinstance(calls, str):
        calls = parse_json(calls, f"the tool_calls of turn {turn}") if calls.strip() else []
    if isinstance(calls, Mapping):
        return [calls]
    if not isinstance(calls, (list, tuple)):
        raise RenderError(f"the tool_calls of turn {turn} must be a list, not {kind(calls)}")
    return list(calls)


def canonical_tool_call(turn: int, call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name", "arguments"}}; arguments are a JSON object as a string.

    A string, so that calls with different arguments fit one dataset column; the chat template writes it verbatim. One
    that is a string already stays as it is, but for white space around it: nothing in it is written anew.
    """
    function = call
    if isinstance(call, Mapping) and call.get("function") is not None:
        function = call["function"]
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RenderError(f"a tool call of turn {turn} has no name; write {{'name': ..., 'arguments': {{...}}}}")
    check_text(name, f"the name of a tool call of turn {turn}")
    arguments = first_value(function, ("arguments", "parameters"))
    what = f"the arguments of the call to {shown(name)} in turn {turn}"
    written = arguments.strip() if isinstance(arguments, str) else None
    if written is not None:
        arguments = parse_json(written, what) if written else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RenderError(f"{what} must be an object, not {kind(arguments)}")
    text = checked_json(arguments, what)
    return {"type": "function", "function": {"name": name, "arguments": written or text}}


def call_id(call: Any) -> Identifier | None:
    """What a call as a file has it says that its result refers to; None where it has no name of its own."""
    return _identifier(call.get("id")) if isinstance(call, Mapping) else None


def order_of_results(
    roles: Sequence[str],
    numbers: Sequence[int],
    call_ids: Sequence[Sequence[Identifier | None]],
    answered: Sequence[Any],
) -> list[int]:
    """Places of messages with the results of parallel calls in the order of the calls, as their ids tell it.

    Args:
        roles: of the canonical messages.
        numbers: of the turns that they come from.
        call_ids: of the calls of each message.
        answered: the id of the call that a message is the result of, as the file has it.
    """
    call_places: dict[Identifier, int] = {}
    calls_read = 0
    keys: list[tuple[int, int]] = []  # the turn or run of results that a message stands in, and its place there
    for place, role in enumerate(roles):
        for identifier in call_ids[place]:
            if identifier is not None:
                call_places[identifier] = calls_read
            calls_read += 1
        answer = _identifier(answered[place])
        if answer is not None and call_places and answer not in call_places:
            raise RenderError(
                f"turn {numbers[place]} is the result of the call {shown(answer)}, which no turn before it makes; correct "
                "tool_call_id"
            )
        follows_result = place > 0 and role == roles[place - 1] == "tool"
        run, before = keys[-1] if follows_result else (place, 0)
        keys.append((run, before if answer is None else call_places.get(answer, before)))
    return sorted(range(len(roles)), key=keys.__getitem__)


def _identifier(value: Any) -> Identifier | None:
    return value if isinstance(value, (str, int)) else None


def canonical_tools(tools: Any) -> list[Tool]:
    """Tool descriptions as a list of objects; a JSON string is parsed, None is no tools.

    Raises: RenderError.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") if tools.strip() else []
    tools = [] if tools is None else tools
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RenderError("tools must be a list of objects, or that list as a JSON string")
    if tools:
        checked_json(tools, "tools")
    return [dict(tool) for tool in tools]
