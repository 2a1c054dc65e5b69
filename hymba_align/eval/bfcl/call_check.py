"""Which function calls of a model may run: one call of a known function, with literal arguments, and nothing else.

The official executor of BFCL's multi-turn categories evaluates the model's call as Python, after a regular expression has
put an object's name before every function name in it, within strings too. What it gets from us is never the model's
text, but one that `check_call` wrote anew from the parsed call.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection
from dataclasses import dataclass

MAX_CHARACTERS = 20_000  # the longest call of the ground truth has 6,839
MAX_NODES = 2_000
MAX_KEYWORDS = 50
MAX_DEPTH = 12
MAX_BITS = 64
REFUSED = "refused_call()"
"""Stands in for a refused call where the official code runs: a name that is not defined there, and so a call that fails"""


@dataclass(frozen=True)
class CheckedCall:
    """A call as it may run, or `REFUSED` with what the model reads as its result instead.

    That result has the form of the official executor's errors, and for an unknown function its very words.
    """

    text: str
    refusal: str = ""


class _Refusal(Exception):
    """Why a call may not run."""


def check_call(text: str, allowed: Collection[str]) -> CheckedCall:
    """The call in canonical form, or its refusal. `allowed` are the names of the entry's functions."""
    try:
        return CheckedCall(_canonical(text, allowed))
    except _Refusal as refusal:
        return CheckedCall(REFUSED, f"Error during execution: {refusal}")


def _canonical(text: str, allowed: Collection[str]) -> str:
    if len(text) > MAX_CHARACTERS:
        raise _Refusal(f"the call has {len(text):,} characters, above the limit of {MAX_CHARACTERS:,}")
    text = text.strip()
    call = _parse(text)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise _Refusal("not a call of a function by its name")
    if call.func.id not in allowed:
        raise _Refusal(f"name '{call.func.id}' is not defined")
    names = [keyword.arg for keyword in call.keywords]
    if None in names or len(set(names)) < len(names) or len(names) > MAX_KEYWORDS:
        raise _Refusal(f"keyword arguments must be named, each once, and at most {MAX_KEYWORDS}")
    written = [call.func, *call.keywords]
    # Python folds identifiers (NFKC): 'ｃd' is parsed as 'cd'. Only what is written as it is named passes.
    for node, name in zip(written, [call.func.id, *names], strict=True):
        if not str(name).isascii() or not (ast.get_source_segment(text, node) or "").startswith(str(name)):
            raise _Refusal("names must be written in ASCII")
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if sum(1 for value in values for _ in ast.walk(value)) > MAX_NODES:
        raise _Refusal(f"the call has more than {MAX_NODES:,} values")
    rebuilt = ast.Call(
        func=ast.Name(call.func.id),
        args=[_literal(value) for value in call.args],
        keywords=[ast.keyword(keyword.arg, _literal(keyword.value)) for keyword in call.keywords],
    )
    return ast.unparse(rebuilt)


def _parse(text: str) -> ast.expr:
    """The expression that the text is. Parsing runs nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as '\d'
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # ValueError: a null byte, or a half of a surrogate pair. The last two: brackets thousands deep.
        raise _Refusal("invalid syntax") from None


def _literal(node: ast.expr, depth: int = 0) -> ast.expr:
    """The same value in a tree of our own: text, a number, a truth value, None, or lists, tuples and dicts of these."""
    if depth > MAX_DEPTH:
        raise _Refusal(f"values are nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=str(value)):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise _Refusal("half of a surrogate pair in a text")
            return ast.Constant(value)
        case ast.Constant(value=bool() | float() | None as value):
            return ast.Constant(value)
        case ast.Constant(value=int(value)):
            if value.bit_length() > MAX_BITS:
                raise _Refusal(f"an integer of more than {MAX_BITS} bits")
            return ast.Constant(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=value) as operand):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return ast.UnaryOp(sign, _literal(operand))
        case ast.List(elts=items):
            return ast.List([_literal(item, depth + 1) for item in items])
        case ast.Tuple(elts=items):
            return ast.Tuple([_literal(item, depth + 1) for item in items])
        case ast.Dict(keys=keys, values=values):
            named = [key for key in keys if key is not None]
            if len(named) == len(keys):
                return ast.Dict(
                    [_literal(key, depth + 1) for key in named], [_literal(value, depth + 1) for value in values]
                )
    raise _Refusal("arguments must be plain values: text, numbers, True, False, None, lists, tuples and dicts")
