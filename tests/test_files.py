"""Digests, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hymba_align.files import file_digest, fingerprint, path_digest, write_json


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_a_digest_follows_the_bytes_of_files_and_the_names_of_repositories(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"one\n")
    assert file_digest(rows) == "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806"
    first, folder = path_digest(str(rows)), path_digest(str(tmp_path))

    rows.write_bytes(b"two\n")

    assert path_digest(str(rows)) != first
    assert path_digest(str(tmp_path)) != folder
    assert path_digest("owner/data") == "owner/data"
    assert path_digest(None) is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"old": True})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": True})

    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]
