"""JSON in users' data: texts parsed and values checked, and values shown in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hymba_align.errors import RenderError

MOST_LEVELS = 100  # of nesting in tools and arguments: far above what is written by hand, far below Python's own limit
SHOWN = 60  # characters of a user's text in a message


class _TwiceError(ValueError):
    """A key that stands twice in one object."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


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
    """The value of a JSON text; `what` names it, in the plural, in errors.

    Raises: RenderError, also for a key that stands twice in one object: a reader would keep one of the two.
    """
    try:
        return _DECODER.decode(text)
    except _TwiceError as error:
        twice = shown(error.args[0])
        raise RenderError(f"{what} have the key {twice} twice in one object; remove one of the two") from None
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


def first_value(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first key that has one other than None."""
    for key in keys:
        value = mapping.get(key)
        if value is not None:
            return value
    return None
