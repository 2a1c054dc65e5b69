"""The environment that bfcl-eval runs in: its own Python packages, made by one command, found by one rule.

bfcl-eval pins numpy 1.26.4 and others that contradict ours, so it is never imported here. `worker.py` and what runs
multi-turn calls are started with this environment's Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from hymba_align.errors import GraderError
from hymba_align.files import write_json

BFCL_VERSION = "2026.3.23"
VARIABLE = "HYMBA_ALIGN_BFCL"
COMMAND = "hymba-align install-bfcl"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
OURS = "made-by-hymba-align"
"""A file that marks a folder which may be removed and made anew"""
STAMP = "installed.json"
"""Written last: a folder without it is half made"""
PYTHONS = ("3.10", "3.11", "3.12")
"""Those that numpy 1.26.4 and tree-sitter 0.21.3 were built for"""


def bfcl_folder() -> Path:
    """Where the environment is: the folder that HYMBA_ALIGN_BFCL names, else `bfcl-eval` in the running environment."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else Path(sys.prefix) / "bfcl-eval"


def bfcl_python() -> Path:
    """The Python of the environment, which has been made completely and from the present requirements.

    Raises: GraderError, which names the command that makes it.
    """
    folder = bfcl_folder()
    stamp = _stamp(folder)
    if stamp is None or not _python(folder).exists():
        raise GraderError(f"BFCL's grader is not installed in {folder}; run '{_command(folder)}' once")
    if stamp != _wanted():
        raise GraderError(f"{folder} was made for another version of hymba-align; run '{_command(folder)}' again")
    return _python(folder)


def missing_grader() -> str | None:
    """Why BFCL cannot be graded here, with the command that installs its grader; None where it is installed."""
    try:
        bfcl_python()
    except GraderError as error:
        return str(error)
    return None


def install(folder: Path, say: Callable[[str], None], *, python: str = sys.executable) -> None:
    """Makes the environment, unless it is there; one that is half made or outdated is made anew.

    Args:
        say: is told what happens, a line at a time.
        python: the interpreter that it is made with.

    Raises: GraderError.
    """
    folder = folder.expanduser().absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _stamp(folder) == _wanted() and _python(folder).exists():
                say(f"BFCL's grader, bfcl-eval {BFCL_VERSION}, is installed in {folder}.")
                return
            _make(folder, say, python)
    except OSError as error:
        raise GraderError(
            f"BFCL's grader cannot be installed in {folder} ({error.strerror or error}); choose another folder with "
            f"--output, and name it in {VARIABLE}"
        ) from error
    say(f"Installed BFCL's grader, bfcl-eval {BFCL_VERSION}, in {folder}.")
    if folder != bfcl_folder():
        say(f"Scoring finds it there with {VARIABLE}={folder} in the environment.")


def _make(folder: Path, say: Callable[[str], None], python: str) -> None:
    _check_python(python, say)
    if folder.exists():
        if any(folder.iterdir()) and not (folder / OURS).is_file():
            raise GraderError(f"{folder} holds something else; choose another folder with --output")
        say(f"{folder} is half made or outdated; removing what is in it.")
        _empty(folder)
    folder.mkdir(exist_ok=True)
    (folder / OURS).touch()
    say(f"Making a Python environment in {folder} ...")
    _run([python, "-I", "-m", "venv", str(folder)], say, "a Python environment cannot be made", "install Python's venv")
    say(f"Installing bfcl-eval {BFCL_VERSION} and {len(_requirements()) - 1} packages that it needs ...")
    _run(
        [
            str(_python(folder)),
            "-I",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--requirement",
            str(REQUIREMENTS),
        ],
        say,
        "pip cannot install BFCL's grader",
        "correct that (without a network, PIP_FIND_LINKS can name a folder of wheels), and run the command again",
    )
    write_json(folder / STAMP, _wanted())


def _empty(folder: Path) -> None:
    """Removes what is in a folder of ours but its mark, so that a removal that is interrupted can be finished."""
    (folder / STAMP).unlink(missing_ok=True)  # first: from here on it is half made
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OURS:
            path.unlink()


def _check_python(python: str, say: Callable[[str], None]) -> None:
    """Raises GraderError for an interpreter that the pinned packages were not built for."""
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    found = _run([python, "-I", "-c", code], say, f"{python} is no Python", "name one with --python").strip()
    if found not in PYTHONS:
        raise GraderError(
            "BFCL's grader needs Python 3.10 to 3.12, for which its packages were built, and "
            f"{python} says that it is {found[:20] or 'nothing'}; name another with --python"
        )


def _run(command: list[str], say: Callable[[str], None], what: str, advice: str) -> str:
    """What the command prints. Raises: GraderError, after passing on all that it said."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise GraderError(f"{what} ({error.strerror}); {advice}") from error
    if done.returncode:
        say((done.stdout + done.stderr).strip())
        raise GraderError(f"{what} (exit code {done.returncode}; its own words are above); {advice}")
    return done.stdout


def _requirements() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _wanted() -> dict[str, str]:
    """What the stamp of a finished environment holds."""
    return {"requirements": hashlib.sha256("\n".join(_requirements()).encode()).hexdigest()}


def _stamp(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _command(folder: Path) -> str:
    return COMMAND if folder == Path(sys.prefix) / "bfcl-eval" else f"{COMMAND} --output {folder}"
