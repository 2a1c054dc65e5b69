"""The environment of BFCL's grader: made by one command, complete or made anew, and named where it is missing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from hymba_align.cli import main
from hymba_align.errors import GraderError
from hymba_align.eval.bfcl import environment
from hymba_align.eval.bfcl.environment import bfcl_folder, bfcl_python, install
from hymba_align.eval.bfcl.score import check_data
from hymba_align.recipe_eval import EvalSection

PYTHON = """#!/bin/sh
# A Python that makes environments of itself. It notes its calls; pip fails where there is a file `no-network`.
echo "$@" >> "{folder}/calls"
case "$*" in
  *"print(*sys.version_info"*) echo 3.{minor} ;;
  *"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *"-m pip"*) if [ -e "{folder}/no-network" ]; then echo "Connection refused"; echo "no such host" >&2; exit 1; fi ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Stands in for a Python with a network; the real one makes the environment that all other tests use."""
    return stand_in(tmp_path, minor=11)


def stand_in(folder: Path, *, minor: int) -> str:
    path = folder / f"python3.{minor}"
    path.write_text(PYTHON.format(folder=folder, minor=minor))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "grader"))
    return tmp_path / "grader"


def test_the_command_makes_an_environment_and_says_what_it_does(
    tmp_path: Path, folder: Path, python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["install-bfcl", "--python", python]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Making a Python environment in {folder} ...",
        "Installing bfcl-eval 2026.3.23 and 15 packages that it needs ...",
        f"Installed BFCL's grader, bfcl-eval 2026.3.23, in {folder}.",
    ]
    assert bfcl_python() == folder / "bin" / "python"
    requirements = environment.REQUIREMENTS
    assert (tmp_path / "calls").read_text().splitlines()[1:] == [
        f"-I -m venv {folder}",
        f"-I -m pip install --quiet --no-deps --requirement {requirements}",
    ]


def test_a_complete_environment_is_left_alone(folder: Path, python: str, tmp_path: Path) -> None:
    install(folder, print, python=python)
    said: list[str] = []
    (tmp_path / "calls").unlink()
    install(folder, said.append, python=python)
    assert said == [f"BFCL's grader, bfcl-eval 2026.3.23, is installed in {folder}."]
    assert not (tmp_path / "calls").exists()


def test_what_pip_says_is_shown_and_a_half_made_environment_is_made_anew(
    folder: Path, python: str, tmp_path: Path
) -> None:
    (tmp_path / "no-network").touch()
    said: list[str] = []
    with pytest.raises(GraderError) as raised:
        install(folder, said.append, python=python)
    assert said[-1] == "Connection refused\nno such host"
    assert str(raised.value) == (
        "pip cannot install BFCL's grader (exit code 1; its own words are above); correct that (without a network, "
        "PIP_FIND_LINKS can name a folder of wheels), and run the command again"
    )
    with pytest.raises(GraderError, match="is not installed"):
        bfcl_python()
    (tmp_path / "no-network").unlink()
    (folder / "left over").touch()
    install(folder, said.append, python=python)
    assert f"{folder} is half made or outdated; removing what is in it." in said
    assert not (folder / "left over").exists()
    assert bfcl_python().is_file()


def test_scoring_without_the_grader_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYMBA_ALIGN_BFCL", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(GraderError) as raised:
        check_data(EvalSection(tasks=("bfcl",)), "bfcl", ask_hub=True)
    missing = "BFCL's grader is not installed in {}; run '{}' once"
    assert str(raised.value) == missing.format(tmp_path / "bfcl-eval", "hymba-align install-bfcl")
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "b"))
    with pytest.raises(GraderError) as raised:
        bfcl_python()
    command = f"hymba-align install-bfcl --output {tmp_path / 'b'}"
    assert str(raised.value) == missing.format(tmp_path / "b", command)


def test_an_environment_of_other_requirements_is_to_be_made_again(folder: Path, python: str) -> None:
    install(folder, print, python=python)
    (folder / "installed.json").write_text(json.dumps({"requirements": "others"}))
    with pytest.raises(GraderError) as raised:
        bfcl_python()
    assert str(raised.value) == (
        f"{folder} was made for another version of hymba-align; run 'hymba-align install-bfcl --output {folder}' again"
    )
    install(folder, print, python=python)
    assert bfcl_python().is_file()


def test_a_folder_of_somebody_else_is_never_removed(folder: Path, python: str) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(GraderError) as raised:
        install(folder, print, python=python)
    assert str(raised.value) == f"{folder} holds something else; choose another folder with --output"
    assert (folder / "thesis.txt").read_text() == "all of it"


def test_a_python_that_the_pinned_packages_are_not_built_for_is_refused(folder: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path, minor=13)
    with pytest.raises(GraderError) as raised:
        install(folder, print, python=python)
    assert str(raised.value) == (
        "BFCL's grader needs Python 3.10 to 3.12, for which its packages were built, and "
        f"{python} says that it is 3.13; name another with --python"
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("/bin/true", "BFCL's grader needs Python 3.10 to 3.12, for which its packages were built, and /bin/true says that it is nothing; name another with --python"),
        ("/bin/false", "/bin/false is no Python (exit code 1; its own words are above); name one with --python"),
        ("/no/python", "/no/python is no Python (No such file or directory); name one with --python"),
    ],
)  # fmt: skip
def test_what_is_no_python_is_refused(folder: Path, program: str, message: str) -> None:
    with pytest.raises(GraderError) as raised:
        install(folder, print, python=program)
    assert str(raised.value) == message
    assert not folder.exists()


def test_an_environment_whose_python_is_gone_is_made_anew(folder: Path, python: str) -> None:
    install(folder, print, python=python)
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to("/no/python")  # as after an update of the system
    with pytest.raises(GraderError, match="is not installed"):
        bfcl_python()
    install(folder, print, python=python)
    assert bfcl_python().is_file()


def test_a_removal_that_was_interrupted_is_finished(folder: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, print, python=python)
    for number in range(20):
        (folder / f"package-{number}").touch()
    (folder / "installed.json").write_text("{}")
    left = iter(range(10))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        assert path.name != environment.OURS
        os.unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            install(folder, print, python=python)
    with pytest.raises(GraderError, match="is not installed"):
        bfcl_python()
    install(folder, print, python=python)
    assert sorted(path.name for path in folder.iterdir()) == ["bin", "installed.json", "made-by-hymba-align"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, python: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GraderError) as raised:
        install(tmp_path / "file" / "deeper" / "grader", print, python=python)
    assert str(raised.value) == (
        f"BFCL's grader cannot be installed in {tmp_path}/file/deeper/grader (Not a directory); choose another folder with "
        "--output, and name it in HYMBA_ALIGN_BFCL"
    )


def test_the_default_place_is_inside_the_running_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYMBA_ALIGN_BFCL", raising=False)
    assert bfcl_folder() == Path(sys.prefix) / "bfcl-eval"


def test_every_requirement_is_pinned_and_a_wheel_holds_the_file() -> None:
    lines = environment._requirements()
    assert lines[0] == f"bfcl-eval=={environment.BFCL_VERSION}"
    assert all(line.count("==") == 1 and "*" not in line for line in lines)
    package_data = Path("pyproject.toml").read_text(encoding="utf-8")
    assert '"eval/bfcl/requirements.txt"' in package_data
