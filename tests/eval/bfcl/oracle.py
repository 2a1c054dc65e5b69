"""Answers that are right by the ground truth, written as a model would write them: what a perfect model scores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
"""A function's name, and its arguments as the model writes them"""

TYPE = re.compile(r"This is (?:Java|JavaScript) (\w+) type parameter in string representation")
ITEMS = re.compile(r"The list elements are of type (\w+);")


def right_calls(entry: Mapping[str, Any]) -> list[Call]:
    """The calls of the ground truth, with the first value of each argument that it accepts."""
    calls = []
    for call in entry["target"]:
        ((name, possible),) = call.items()
        parameters = next(tool["parameters"] for tool in entry["tools"] if tool["name"] == name)
        calls.append((name, _arguments(possible, parameters)))
    return calls


def _arguments(possible: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for name, values in possible.items():
        said = [value for value in values if value != ""]
        if said:
            arguments[name] = _written(_plain(said[0]), parameters["properties"].get(name, {}).get("description", ""))
        elif name in parameters["required"]:
            arguments[name] = ""
    return arguments


def _plain(value: Any) -> Any:
    """A value of the ground truth, where an object holds a list of possible values for each key (or, seldom, the value)."""
    if isinstance(value, Mapping):
        listed = {key: values if isinstance(values, list) else [values] for key, values in value.items()}
        chosen = {key: [one for one in values if one != ""] for key, values in listed.items()}
        return {key: _plain(values[0]) for key, values in chosen.items() if values}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _written(value: Any, description: str) -> Any:
    """The value; as source code in a string, where the description asks for that."""
    if "in string representation" not in description:
        return value
    found, items = TYPE.search(description), ITEMS.search(description)
    kind = found.group(1) if found else "any"
    if "JavaScript" in description:
        return value if isinstance(value, str) else f"{value}n" if kind == "Bigint" else json.dumps(value)
    return _java(value, kind, items.group(1) if items else None)


def _java(value: Any, kind: str, items: str | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        puts = "".join(f' put("{key}", {_java_literal(one)});' for key, one in value.items())
        return f"new HashMap<String, Object>() {{{{{puts} }}}}"
    if isinstance(value, Sequence):
        if kind == "Array":  # whose strings the official converter wants without quotes; in an ArrayList with them
            return f"new Object[]{{{', '.join(_java(one, '', None) for one in value)}}}"
        return f"new ArrayList<>(Arrays.asList({', '.join(_java_literal(one, items) for one in value)}))"
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind, '') }"


def _java_literal(value: Any, kind: str | None = None) -> str:
    return (
        f"'{value}'" if kind == "char" else f'"{value}"' if isinstance(value, str) else _java(value, kind or "", None)
    )


def as_toolcalls(calls: Sequence[Call], *, arguments_as_text: bool = False) -> str:
    """The chat template's format, one block per call."""
    blocks = []
    for name, arguments in calls:
        given = json.dumps(arguments) if arguments_as_text else arguments
        blocks.append(f"<toolcall> {json.dumps({'name': name, 'arguments': given})} </toolcall>")
    return "\n".join(blocks)


def as_plain_list(calls: Sequence[Call], *, quoted: bool = True) -> str:
    """BFCL's own format, [name(argument=value), ...]; `quoted` writes strings as Python has them, else as they are."""
    return (
        "["
        + ", ".join(
            f"{name}({', '.join(f'{key}={value!r}' if quoted else f'{key}={value}' for key, value in arguments.items())})"
            for name, arguments in calls
        )
        + "]"
    )
