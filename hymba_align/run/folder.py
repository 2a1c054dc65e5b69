"""The run folder and its manifests.

    runs/<name>/
      recipe.yaml  environment.json
      .lock  .lease   while a process works here (lock.py)
      base/        only where the base is random weights: base/final, so that it can be scored
      sft/  dpo/   checkpoint-N/ while training, final/, manifest.json, metrics.jsonl
      <stage>.previous/  <stage>.interrupted/   what a stage had when its inputs changed, finished or not
      eval/        <stage>/<task>.json, <stage>.manifest.json
      inspect/     <stage>/inspect.html, inspect.json, plots/; <stage>.manifest.json, which holds the summary

A manifest records which inputs (a fingerprint) a stage was started with and, at its end, completed with. Every file
written here appears whole or not at all: temporary name, fsync, rename.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hymba_align.environment import environment
from hymba_align.errors import RunFolderError
from hymba_align.files import read_json, write_json, write_text
from hymba_align.recipe import Recipe
from hymba_align.run.lock import LEASE, LOCK

LOCK_FILES = frozenset({LOCK, LEASE})
NEVER_FINISHED = re.compile(r"\..*\.\d+\.tmp")
"""What `write_text` leaves of a file when the process is killed"""

BESIDE = ("eval/", "inspect/")
"""Stages whose manifest lies beside their folder"""
ASIDE = ("previous", "interrupted")  # what a stage had finished, what it had not, when its inputs changed
MOVING = "moving"  # on its way back


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes; stages are named `base`, `sft`, `dpo`, `eval/<stage>` and `inspect/<stage>`."""

    root: Path

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage, made when absent."""
        folder = self.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def manifest_path(self, stage: str) -> Path:
        """`<stage>/manifest.json`; beside the folder of scores and inspections, which holds what they wrote and nothing else."""
        if stage.startswith(BESIDE):
            return self.root / f"{stage}.manifest.json"
        return self.root / stage / "manifest.json"

    def read_manifest(self, stage: str) -> dict[str, Any]:
        """What the manifest holds; empty where there is none or it is not JSON."""
        try:
            return read_json(self.manifest_path(stage))
        except (OSError, ValueError):
            return {}

    def is_complete(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage finished with these inputs and its output is still there."""
        manifest = self.read_manifest(stage)
        if manifest.get("completed") != fingerprint:
            return False
        return all((self.root / stage / name).exists() for name in manifest.get("outputs", ()))

    def is_started(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage was started with these inputs, finished or not."""
        return bool(self.read_manifest(stage).get("started") == fingerprint)

    def mark_started(
        self, stage: str, fingerprint: str, contents: Sequence[tuple[str, str | None]] = ()
    ) -> Path | None:
        """Makes the folder ready for these inputs.

        Started with the same inputs before: it stays as it is, or comes back (`restore`), so that the stage can resume.
        Otherwise checkpoints of other inputs move aside, and what holds none is removed.

        Args:
            contents: names and digests of the data, for the stage to compare with what it reads.
        Returns: the folder that checkpoints moved to, if any did.
        """
        if self.is_started(stage, fingerprint) or self.restore(stage, fingerprint) is not None:
            return None
        moved_to = self._set_aside(stage)
        self.stage_dir(stage)
        started = {"stage": stage, "started": fingerprint, "contents": [list(each) for each in contents]}
        write_json(self.manifest_path(stage), started)
        return moved_to

    def find_aside(self, stage: str, fingerprint: str) -> Path | None:
        """The folder beside the stage's that was started or finished with these inputs; None where none was."""
        for suffix in (*ASIDE, MOVING):
            folder = f"{stage}.{suffix}"
            if not self.is_started(stage, fingerprint) and self.is_started(folder, fingerprint):
                return self.root / folder
        return None

    def restore(self, stage: str, fingerprint: str) -> Path | None:
        """Exchanges the stage's folder for the one beside it with these inputs; that one's old path, if there is one.

        Through a third name, because both may want the same one; a move that was interrupted is finished first.
        """
        moving = self.root / f"{stage}.{MOVING}"
        if moving.is_dir():
            moving.rename(self._aside(stage, moving.name) if (self.root / stage).exists() else self.root / stage)
        found = self.find_aside(stage, fingerprint)
        if found is not None:
            found.rename(moving)
            self._set_aside(stage)
            moving.rename(self.root / stage)
        return found

    def _set_aside(self, stage: str) -> Path | None:
        """Moves a stage's checkpoints to where they are kept, over older ones of their kind; returns that folder.

        Scores stay: each carries the fingerprint of its own inputs, and scoring moves aside those that are out of date. So
        does an inspection, until another one takes its place.
        """
        folder = self.root / stage
        if stage.startswith(BESIDE):
            return None
        if not (folder / "final").is_dir() and not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        aside = self._aside(stage, stage)
        shutil.rmtree(aside, ignore_errors=True)
        return folder.rename(aside)

    def _aside(self, stage: str, folder: str) -> Path:
        """Where the contents of `folder` are kept: unfinished ones never take the place of finished ones."""
        finished = "completed" in self.read_manifest(folder) and (self.root / folder / "final").is_dir()
        return self.root / f"{stage}.{ASIDE[0 if finished else 1]}"

    def mark_complete(
        self,
        stage: str,
        fingerprint: str,
        details: Mapping[str, Any],
        outputs: tuple[str, ...] = ("final/config.json",),
    ) -> None:
        """Records that the stage finished with these inputs and wrote `outputs` (paths inside its folder)."""
        manifest = {
            "stage": stage,
            "started": fingerprint,
            "completed": fingerprint,
            "outputs": list(outputs),
            "details": dict(details),
        }
        write_json(self.manifest_path(stage), manifest)


def open_run(recipe: Recipe) -> RunFolder:
    """The run's folder with recipe.yaml and environment.json of this moment in it.

    Raises:
        RunFolderError: the folder belongs to another run, holds other things, or cannot be written.
    """
    folder = RunFolder(run_root(recipe))
    check_run_folder(recipe)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        for path in folder.root.rglob(".*.tmp"):
            if NEVER_FINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        write_text(folder.root / "recipe.yaml", recipe.dump_yaml())
        write_json(folder.root / "environment.json", environment())
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(f"{folder.root}: the run folder cannot be written ({reason}); set output_dir") from error
    return folder


def run_root(recipe: Recipe) -> Path:
    """`output_dir`, or else runs/<name>."""
    return Path(recipe.output_dir) if recipe.output_dir else Path("runs") / recipe.name


def check_run_folder(recipe: Recipe) -> None:
    """Raises RunFolderError unless the folder is absent, empty, or a run of the same name; writes nothing."""
    root = run_root(recipe)
    if not root.exists():
        return
    if not root.is_dir():
        raise RunFolderError(f"{root} is a file, and a run needs a folder there; set output_dir to another path")
    _check_links(root)
    description = root / "recipe.yaml"
    if not description.exists():
        if any(path.name not in LOCK_FILES and not NEVER_FINISHED.fullmatch(path.name) for path in root.iterdir()):
            raise RunFolderError(f"{root} is not empty and holds no run; set output_dir to another folder")
        return
    try:
        found = yaml.safe_load(description.read_text(encoding="utf-8"))
        name = found["name"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        raise RunFolderError(f"{description} is not a recipe; set output_dir to another folder") from None
    if name != recipe.name:
        raise RunFolderError(
            f"{root} belongs to the run '{name}', and this recipe's name is '{recipe.name}'; set output_dir to another folder"
        )


def _check_links(root: Path) -> None:
    """Raises RunFolderError for a link inside the folder through which a run would write outside of it."""
    home = root.resolve()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise RunFolderError(
                    f"{path} is a link that leads out of the run folder, to {path.resolve()}, and a run writes only inside; "
                    "remove it (output_dir itself may be a link)"
                )
