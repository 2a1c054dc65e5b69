"""The folder of an inspection: inspect.html, inspect.json and plots/, all of them or none.

inspect.json says that the rest is there: it goes first and comes back last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.errors import InspectError, ResultError
from hymba_align.files import sync_file, sync_folder, write_json, write_text
from hymba_align.run.lock import LEASE, LOCK, held
from hymba_align.run.storage import AGAIN, writing

if TYPE_CHECKING:
    from hymba_align.inside.result import Inspection

PAGE, NUMBERS, PLOTS = "inspect.html", "inspect.json", "plots"
UNFINISHED = ".inspect."
"""Beginning of the name of a folder that is being written"""
KEPT = f"{UNFINISHED}answers"
"""Folder of scores and answers that an interrupted inspection left, so that the next one goes on from them"""


def check_output(folder: Path) -> None:
    """Raises InspectError unless the folder is absent, empty, or holds an inspection, which a new one takes the place of."""
    if folder.exists() and not folder.is_dir():
        raise InspectError(f"{folder} is a file, and an inspection needs a folder there; name another one")
    if not folder.is_dir() or (folder / NUMBERS).is_file():
        return
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if others:
        raise InspectError(
            f"{folder} is not empty and holds no inspection (it has {others[0]}); name another folder, or an empty one"
        )


def _is_ours(path: Path) -> bool:
    return path.name in (LOCK, LEASE, PAGE, PLOTS) or path.name.startswith(UNFINISHED)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Holds a folder for one inspection, after checking that it can take one; it goes again if nothing came into it.

    Raises: InspectError for a folder that holds other things, InUseError for one in use, StorageError for one that cannot be written.
    """
    check_output(folder)
    with writing(folder, resumes=AGAIN), held(folder, resumes=AGAIN):
        yield


def earlier(folder: Path) -> str:
    """Words about the inspection in a folder, of which a new one takes the place; empty where there is none."""
    from hymba_align.inside.stored import read

    if not (folder / NUMBERS).is_file():
        return ""
    try:
        found = read(folder / NUMBERS)
    except ResultError:
        which = f"what {folder / NUMBERS} holds, which cannot be read,"
    else:
        which = f"the inspection of {found.created} in {folder} ({', '.join(found.seconds)})"
    return f"This one takes the place of {which} when it is done; --output FOLDER keeps both"


def write(inspection: Inspection, folder: Path) -> None:
    """Writes the inspection's page, numbers and plots, in the place of an earlier one's.

    Raises: OSError where the folder cannot be written; then it is without inspect.json, or as it was.
    """
    from hymba_align.inside.page import html
    from hymba_align.inside.plots import draw
    from hymba_align.inside.stored import to_json

    plots = draw(inspection)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder / f"{UNFINISHED}{os.getpid()}.tmp"
    try:
        (unfinished / PLOTS).mkdir(parents=True)
        for plot in plots:
            path = unfinished / PLOTS / f"{plot.name}.png"
            path.write_bytes(plot.png)
            sync_file(path)
        write_text(unfinished / PAGE, html(inspection, plots))
        write_json(unfinished / NUMBERS, to_json(inspection))
        (folder / NUMBERS).unlink(missing_ok=True)
        shutil.rmtree(folder / PLOTS, ignore_errors=True)
        for name in (PLOTS, PAGE, NUMBERS):
            (unfinished / name).replace(folder / name)
        sync_folder(folder)
        _forget_kept(folder, inspection)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget_kept(folder: Path, inspection: Inspection) -> None:
    """Removes scores and answers of the tasks that the inspection has; what is kept of others stays."""
    tasks = [one.metric.split()[0] for one in inspection.importance]
    for file in (file for task in tasks for file in (folder / KEPT).glob(f"{task}.*")):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or holds what is kept of other tasks
        (folder / KEPT).rmdir()
