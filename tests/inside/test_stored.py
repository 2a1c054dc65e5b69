"""inspect.json gives back what was measured, or says why it cannot."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.errors import ResultError
from hymba_align.files import fingerprint, write_json
from hymba_align.inside.result import Inspection, Measured
from hymba_align.inside.stored import from_json, read, to_json

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a digest that fits, as a file of another program would have it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "sha256": fingerprint(rest)}


def test_every_value_comes_back_through_a_file(tmp_path: Path) -> None:
    inspection = make()
    write_json(tmp_path / "inspect.json", to_json(inspection))
    assert read(tmp_path / "inspect.json") == inspection


def test_an_inspection_without_any_part_comes_back() -> None:
    bare = replace(
        make(), attention=None, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None, against=None
    )
    assert from_json(json.loads(json.dumps(to_json(bare)))) == bare


def test_numbers_that_json_lacks_come_back_and_the_file_is_strict_json(tmp_path: Path) -> None:
    inspection = make()
    (loss, task), infinite = inspection.importance, Measured(math.inf, -math.inf)
    broken = replace(inspection, importance=(replace(loss, whole=infinite), replace(task, whole=Measured(math.nan))))
    text = json.dumps(to_json(broken), allow_nan=False)  # raises ValueError for NaN as a bare word
    found = from_json(json.loads(text)).importance
    assert found[0].whole == infinite
    assert math.isnan(found[1].whole.mean)


def test_half_of_a_surrogate_pair_in_a_token_is_escaped(tmp_path: Path) -> None:
    write_json(tmp_path / "inspect.json", to_json(replace(make(), data="\ud83d")))
    assert read(tmp_path / "inspect.json").data == "\\ud83d"


def test_a_changed_number_is_refused() -> None:
    content = to_json(make())
    content["tokens"] += 1
    with pytest.raises(ResultError) as error:
        from_json(content)
    assert str(error.value) == ("inspect.json was changed or damaged since it was written (SHA-256); inspect again")


def test_another_format_is_refused() -> None:
    with pytest.raises(ResultError) as error:
        from_json({**to_json(make()), "format": 9}, "a.json")
    assert str(error.value) == ("a.json has the format 9 of another version of hymba-align, not 1; inspect again")


def test_a_missing_key_is_named() -> None:
    content = to_json(make())
    del content["fusion"]["layers"][1]["cosine"]
    with pytest.raises(ResultError) as error:
        from_json(sealed(content))
    assert str(error.value) == (
        "inspect.json: fusion.layers.1.cosine is not what an inspection has there (Field required); inspect again"
    )


@pytest.mark.parametrize(
    "change", [{"tokens": "4210"}, {"unknown": 1}, {"fusion": {"tokens": 1, "layers": [], "x": 2}}]
)
def test_a_key_or_value_that_no_inspection_has_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ResultError) as error:
        from_json(sealed({**to_json(make()), **change}))
    assert str(error.value) == "inspect.json holds keys or values that no inspection has; inspect again"


def test_what_is_no_json_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inspect.json").write_text("{")
    with pytest.raises(ResultError) as error:
        read(tmp_path / "inspect.json")
    assert str(error.value).startswith(f"{tmp_path / 'inspect.json'} cannot be read as JSON (")
    with pytest.raises(ResultError, match="holds no JSON object"):
        from_json([1])
