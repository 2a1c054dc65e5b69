"""The folder that the command `inspect` writes: all of it or nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.inside import attention, output
from hymba_align.inside.stored import read
from hymba_align.run.lock import LOCK
from tests.inside.looking import FEW, files_below, inspect, look


def test_another_inspection_takes_the_place_of_an_earlier_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert inspect(checkpoint, *FEW, "--output", out, parts="attention,fusion") == 0
    before = files_below(out)
    created = read(out / "inspect.json").created
    (out / ".inspect.1.tmp" / "plots").mkdir(parents=True)  # of one that was killed
    assert "takes the place" not in capsys.readouterr().out

    assert inspect(checkpoint, *FEW, "--output", out, parts="fusion") == 0

    assert capsys.readouterr().out.splitlines()[0] == (
        f"This one takes the place of the inspection of {created} in {out} (attention, fusion) when it is done; "
        "--output FOLDER keeps both"
    )

    assert set(files_below(out)) < set(before)
    assert read(out / "inspect.json").attention is None
    assert not list(out.glob(".inspect.*"))


def test_half_an_inspection_has_no_numbers_that_would_vouch_for_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert inspect(checkpoint, *FEW, "--output", out) == 0
    move = Path.replace

    def broken(path: Path, target: Path) -> Path:
        if path.name == "inspect.html" and path.parent.name.startswith(".inspect."):
            raise OSError(5, "Input/output error", str(path))
        return move(path, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        output.write(look(checkpoint, parts=("fusion",)), out)

    assert not (out / "inspect.json").exists()
    assert not list(out.glob(".inspect.*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_text("mine"), "{out} is a file, and an inspection needs a folder there; name another one"),
        (lambda out: (out.mkdir(), (out / "mine.txt").write_text("")), "{out} is not empty and holds no inspection (it has mine.txt); name another folder, or an empty one"),
    ],
)  # fmt: skip
def test_what_lies_there_is_not_overwritten(
    make: Callable[[Path], Any], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(out)

    assert inspect(checkpoint, *FEW, "--output", out) == 2

    assert capsys.readouterr().err.splitlines()[0] == f"Error: {message.format(out=out)}"


def test_what_is_interrupted_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "AttentionSums", stop)

    assert inspect(checkpoint, *FEW, "--output", tmp_path / "out", parts="attention") == 130

    assert "Interrupted.\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_leaves_the_earlier_inspection_as_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert inspect(checkpoint, *FEW, "--output", out) == 0
    before = {name: (out / name).read_bytes() for name in files_below(out)}

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(output, "write_json", full)
    assert inspect(checkpoint, *FEW, "--output", out) == 1

    assert "(the disk is full)" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in files_below(out)} == before
    assert not list(out.glob(".inspect.*"))


def test_a_folder_that_may_not_be_written_is_told_without_talk_of_a_training(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def refused(folder: Path, lock: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / LOCK))

    monkeypatch.setattr("hymba_align.run.lock._flocked_in", refused)

    assert inspect(checkpoint, *FEW, "--output", out) == 1

    told = capsys.readouterr().err.splitlines()[0]
    assert told == (
        f"Error: {out / LOCK} cannot be written (this user may not write there); make it writable, then run the same command "
        "again"
    )
