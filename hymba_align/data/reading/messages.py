"""Messages and tools in one canonical form, whatever wrapping they came in.

A canonical message is {"role": system | user | assistant | tool, "content": text}. An assistant's may hold "tool_calls",
and "train": False where no loss is to count. What the template has no place for is treated so:

- A reasoning part (or a key `reasoning_content`, `reasoning`, `thinking`) of an assistant's turn becomes text between
  `<think>` and `</think>` before what follows it: it is trained on, and the preview shows it.
- The ids of tool calls are used and then left out: results of parallel calls are put into the order of the calls.
- Text parts of one turn are joined by a line break; calls come after all text.
- A turn that only calls (ShareGPT's function_call) joins the assistant's turn right before it, as parallel calls do.
- NUL and other control characters are text like any other: tokenizers read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hymba_align.errors import RenderError

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
CALLS = "function_call"  # the role of a turn that is nothing but calls of the assistant
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
MOST_LEVELS = 100  # of nesting in tools and arguments: far above what is written by hand, far below Python's own limit
SHOWN = 60  # characters of a user's text in a message


@dataclass(frozen=True)
class TurnStyle:
    """How turns are written: keys of role and content (the first that has a value counts), and our role for each name."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: Mapping[str, str]


CANONICAL = TurnStyle(("role",), ("content",), {role: role for role in ROLES})


def canonical_messages(messages: Any, style: TurnStyle = CANONICAL) -> list[Message]:
    """Messages with a known role, a text as content, and tool calls as `canonical_tool_call` writes them.

    Raises: RenderError naming the turn, counted from 1.
    """
    return numbered_messages(messages, style)[0]


def numbered_messages(messages: Any, style: TurnStyle = CANONICAL) -> tuple[list[Message], list[int]]:
    """`canonical_messages`, and for each the number of the turn that it comes from (turns that only call are joined).

    Raises: RenderError naming the turn, counted from 1.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RenderError(f"messages must be a list, not {kind(messages)}")
    canonical: list[Message] = []
    numbers: list[int] = []
    has_result_ids = False
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise RenderError(f"turn {turn} must be an object with role and content, not {kind(message)}")
        role = _role(turn, message, style)
        new = _canonical_message(turn, role, message, style)
        if role == CALLS and canonical and _calls_may_join(canonical[-1], new):
            canonical[-1]["tool_calls"] = [*canonical[-1].get("tool_calls", ()), *new["tool_calls"]]
            continue
        has_result_ids = has_result_ids or (role == "tool" and message.get("tool_call_id") is not None)
        canonical.append(new)
        numbers.append(turn)
    if has_result_ids:
        order = _order_of_results(canonical, numbers, messages)
        canonical, numbers = [canonical[place] for place in order], [numbers[place] for place in order]
    return canonical, numbers


def check_turns(messages: Sequence[Message], numbers: Sequence[int], earlier: Sequence[Message] = ()) -> None:
    """Raises RenderError where turns cannot stand as they do after the `earlier` ones.

    Refused: a system message after other turns, an empty turn of the assistant's, a tool's result before any call.
    Allowed: several system messages at the start, and two turns in a row of one speaker, as real sets have them and the
    template writes them. A conversation may go on after the assistant's last turn: nothing there is trained on.
    """
    begun = any(message["role"] != "system" for message in earlier)
    called = any("tool_calls" in message for message in earlier)
    for message, turn in zip(messages, numbers, strict=True):
        role = message["role"]
        if role == "assistant":
            if "tool_calls" in message:
                called = True
            elif not message["content"] or message["content"].isspace():
                raise RenderError(f"turn {turn}, the assistant's, is empty; give it content or tool_calls")
        elif role == "system":
            if begun:
                raise RenderError(f"turn {turn} is a system message after other turns; move it to the start")
            continue
        elif role == "tool" and not called:
            raise RenderError(
                f"turn {turn} is a tool's result, and no turn before it calls a tool; add the assistant's tool_calls"
            )
        begun = True


def _role(turn: int, message: Mapping[str, Any], style: TurnStyle) -> str:
    name = _first_value(message, style.role_keys)
    if name is None or name == "":
        keys = " or ".join(map(repr, style.role_keys))
        raise RenderError(f"turn {turn} has no role; give it, as {keys}, one of {', '.join(ROLES)}")
    role = style.roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise RenderError(
            f"turn {turn} has the role {shown(name)}; use one of {', '.join(ROLES)}, or say which it is with roles "
            "in the recipe"
        )
    return role


def _canonical_message(turn: int, role: str, message: Mapping[str, Any], style: TurnStyle) -> Message:
    content = _first_value(message, style.content_keys)
    if role == CALLS:
        text, calls = "", _listed_calls(turn, content)
        role = "assistant"
        if not calls:
            raise RenderError(
                f"turn {turn} calls a tool without saying which; write {{'name': ..., 'arguments': {{...}}}}"
            )
    elif isinstance(content, str):
        text, calls = content, _listed_calls(turn, message.get("tool_calls"))
    else:
        text, calls = _content_of_parts(turn, role, content)
        calls += _listed_calls(turn, message.get("tool_calls"))
    legacy = message.get("function_call")
    if legacy:
        calls = [*calls, *_listed_calls(turn, legacy)]
    if calls and role != "assistant":
        raise RenderError(f"turn {turn} is the {role}'s and has tool_calls; only the assistant calls tools")
    thoughts = _thoughts(turn, role, message)
    if content is None and not calls and not thoughts:
        raise RenderError(f"the content of turn {turn} must be text, not nothing")
    text = thoughts + text
    check_text(text, f"the content of turn {turn}")
    canonical: Message = {"role": role, "content": text}
    if calls:
        canonical["tool_calls"] = [canonical_tool_call(turn, call) for call in calls]
    if "train" in message or "weight" in message:
        _set_train(turn, canonical, message)
    return canonical


def _content_of_parts(turn: int, role: str, content: Any) -> tuple[str, list[Any]]:
    """The text of a content that is no text, and the calls among its parts."""
    parts = _parts(content)
    if parts is None:
        if content is None:
            return "", []
        if role == "tool" and isinstance(content, (Mapping, list)):
            return checked_json(content, f"the content of turn {turn}"), []
        raise RenderError(f"the content of turn {turn} must be text, not {kind(content)}")
    pieces: list[str] = []
    calls: list[Any] = []
    for number, part in enumerate(parts, start=1):
        sort = part.get("type")
        value = _first_value(part, ("text", "value", "reasoning", "thinking", "tool_call"))
        if sort == "tool_call":
            calls += _listed_calls(turn, value if value is not None else part)
        elif sort not in (*TEXT_PARTS, "reasoning", "thinking"):
            raise RenderError(
                f"part {number} of turn {turn} is of type {shown(sort)}, and the model reads text only; remove the part "
                "or the row"
            )
        elif not isinstance(value, str):
            raise RenderError(
                f"the content of turn {turn} must be text, not a list whose part {number} holds {kind(value)}"
            )
        elif sort in TEXT_PARTS:
            pieces.append(value)
        elif role != "assistant":
            raise RenderError(f"turn {turn} is the {role}'s and has a part of type {sort}; only the assistant reasons")
        elif value.strip():
            pieces.append(_as_thoughts(value))
    return "\n".join(pieces), calls


def _parts(content: Any) -> list[Mapping[str, Any]] | None:
    """A content's typed parts, or None where it is no list of them."""
    if isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) and "type" in part for part in content):
        return list(content)
    return None


def _thoughts(turn: int, role: str, message: Mapping[str, Any]) -> str:
    """What the assistant thought before it answered, from keys beside the content, as text."""
    found: dict[str, None] = {}  # some sets write the same thoughts under two keys
    for key in REASONING_KEYS:
        value = message.get(key) if key in message else None
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RenderError(f"{key} of turn {turn} must be text, not {kind(value)}")
        if role != "assistant":
            raise RenderError(f"turn {turn} is the {role}'s and has {key}; only the assistant reasons")
        if not value.isspace():
            found[value] = None
    return "".join(_as_thoughts(value) + "\n" for value in found)


def _as_thoughts(value: str) -> str:
    return f"<think>\n{value.strip()}\n</think>\n"


def _set_train(turn: int, canonical: Message, message: Mapping[str, Any]) -> None:
    """Reads `train` (a boolean) and OpenAI's `weight` (0 or 1); both mean whether the loss counts."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RenderError(f"train of turn {turn} is {shown(train)}; write true or false")
    if weight is not None:
        if not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise RenderError(f"weight of turn {turn} is {shown(weight)}; write 0 or 1")
        if train is not None and train != bool(weight):
            raise RenderError(
                f"turn {turn} says train: {str(train).lower()} and weight: {weight:g}; remove one of them"
            )
        train = bool(weight)
    if canonical["role"] == "assistant":
        if train is False:
            canonical["train"] = False
    elif train:
        raise RenderError(
            f"turn {turn} is the {canonical['role']}'s and says that it is trained on; only the assistant's turns are, "
            "unless the recipe says loss_on: all; remove train or weight"
        )


def _listed_calls(turn: int, calls: Any) -> list[Any]:
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


def _calls_may_join(before: Message, calls: Message) -> bool:
    """Whether a turn of nothing but calls continues the turn before it."""
    return bool(before["role"] == "assistant" and before.get("train") == calls.get("train"))


def canonical_tool_call(turn: int, call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name", "arguments"}}; arguments are a JSON object as a string.

    A string, so that calls with different arguments fit one dataset column; the chat template writes it verbatim.
    """
    function = call
    if isinstance(call, Mapping) and call.get("function") is not None:
        function = call["function"]
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RenderError(f"a tool call of turn {turn} has no name; write {{'name': ..., 'arguments': {{...}}}}")
    check_text(name, f"the name of a tool call of turn {turn}")
    arguments = _first_value(function, ("arguments", "parameters"))
    what = f"the arguments of the call to {shown(name)} in turn {turn}"
    if isinstance(arguments, str):
        arguments = parse_json(arguments, what) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RenderError(f"{what} must be an object, not {kind(arguments)}")
    return {"type": "function", "function": {"name": name, "arguments": checked_json(arguments, what)}}


def _order_of_results(canonical: Sequence[Message], numbers: Sequence[int], messages: Sequence[Any]) -> list[int]:
    """Places of the messages with the results of parallel calls in the order of the calls, as their ids tell it."""
    call_places: dict[str, int] = {}
    calls_read = 0
    keys: list[tuple[int, int]] = []  # the turn or run of results that a message stands in, and its place there
    for place, (message, turn) in enumerate(zip(canonical, numbers, strict=True)):
        calls = _listed_calls(turn, messages[turn - 1].get("tool_calls"))
        for call in calls:
            identifier = call.get("id")
            if isinstance(identifier, str):
                call_places[identifier] = calls_read
            calls_read += 1
        follows_result = place > 0 and message["role"] == canonical[place - 1]["role"] == "tool"
        run = keys[-1][0] if follows_result else place
        answered = messages[turn - 1].get("tool_call_id") if message["role"] == "tool" else None
        if isinstance(answered, str) and call_places and answered not in call_places:
            raise RenderError(
                f"turn {turn} is the result of the call {shown(answered)}, which no turn before it makes; correct "
                "tool_call_id"
            )
        known = call_places.get(answered) if isinstance(answered, str) else None
        before = keys[-1][1] if follows_result else 0
        keys.append((run, before if known is None else known))
    return sorted(range(len(canonical)), key=keys.__getitem__)


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


def dump_json(value: Any) -> str:
    """JSON as the chat template's `tojson` writes it: key order kept, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False)


def checked_json(value: Any, what: str) -> str:
    """`dump_json` of what may come from anywhere; `what` names it, in the plural, in errors.

    Raises: RenderError for NaN and infinite numbers, for what JSON has no form for, and for absurdly deep nesting.
    """
    too_deep = f"{what} are nested more than {MOST_LEVELS} levels deep; flatten them"
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise RenderError(too_deep) from None
    except (TypeError, ValueError) as error:
        raise RenderError(
            f"{what} cannot be written as JSON ({str(error)[:SHOWN]}); use texts, finite numbers, true, false, null, "
            "lists and objects"
        ) from error
    # Counting brackets is cheap, and few of them cannot be deep.
    if text.count("{") + text.count("[") > MOST_LEVELS and _is_deeper(value, MOST_LEVELS):
        raise RenderError(too_deep)
    check_text(text, what)
    return text


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text; `what` names it, in the plural, in errors. Raises: RenderError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise RenderError(f"{what} are nested more than {MOST_LEVELS} levels deep; flatten them") from None
    except ValueError as error:
        raise RenderError(f"{what} are not valid JSON: {error}") from error


def check_text(text: str, what: str) -> None:
    """Raises RenderError where a text holds half of a surrogate pair, as JSON's escapes can write it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RenderError(
            f"character {error.start + 1} of {what} is the lone surrogate U+{code:04X}, which stands for nothing; replace "
            "or remove it"
        ) from None


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, printable, and safe to make for any value."""
    if isinstance(value, str):
        return repr(value[:SHOWN] + "…" if len(value) > SHOWN else value)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 128):
        return repr(value)
    return kind(value)


def kind(value: Any) -> str:
    """What sort of value it is, in JSON's words."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [inner for outer in layer for inner in _children(outer)]
        if not layer:
            return False
    return any(isinstance(inner, (Mapping, list, tuple)) for inner in layer)


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else ()


def _first_value(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first key that has one other than None."""
    for key in keys:
        value = mapping.get(key)
        if value is not None:
            return value
    return None
