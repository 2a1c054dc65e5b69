"""inspect.json: an inspection as a file, and read back.

A file says which format it has and carries its own digest. One that was damaged, edited or written by another version
is refused with the reason. JSON knows no NaN and no infinity: they are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import ResultError
from hymba_align.files import fingerprint, read_json
from hymba_align.inside.result import Inspection

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
AGAIN = "inspect again"


def to_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain values, with the format and the SHA-256 of all the rest."""
    content = {"format": FORMAT, **_plain(asdict(inspection))}
    return {**content, "sha256": fingerprint(content)}


def from_json(value: Any, name: str = "inspect.json") -> Inspection:
    """The inspection that `to_json` gave, equal to it in every value.

    Args:
        name: what an error calls it.

    Raises: ResultError for another format, for values that were changed or damaged, and for keys that an inspection has
        not, or lacks.
    """
    from pydantic import ValidationError

    if not isinstance(value, Mapping):
        raise ResultError(f"{name} holds no JSON object; {AGAIN}")
    if value.get("format") != FORMAT:
        raise ResultError(
            f"{name} has the format {value.get('format')} of another version of hymba-align, not {FORMAT}; {AGAIN}"
        )
    content = {key: inner for key, inner in value.items() if key != "sha256"}
    if value.get("sha256") != fingerprint(content):
        raise ResultError(f"{name} was changed or damaged since it was written (SHA-256); {AGAIN}")
    del content["format"]
    try:
        inspection = _adapter().validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultError(f"{name}: {where} is not what an inspection has there ({first['msg']}); {AGAIN}") from error
    # pydantic lets unknown keys of dataclasses pass, and reads a number from a string: both show in the way back.
    if _plain(asdict(inspection)) != content:
        raise ResultError(f"{name} holds keys or values that no inspection has; {AGAIN}")
    return inspection


def read(path: Path) -> Inspection:
    """The inspection in a file.

    Raises: ResultError as `from_json` does, and for a file that cannot be read.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path} cannot be read as JSON ({error}); {AGAIN}") from error
    return from_json(content, str(path))


@functools.cache
def _adapter() -> TypeAdapter[Inspection]:
    from pydantic import TypeAdapter

    return TypeAdapter(Inspection)


def _plain(value: Any) -> Any:
    """Values as JSON has them; what UTF-8 has not (half of a surrogate pair) is escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
