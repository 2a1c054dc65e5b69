"""Every error that a user can cause.

HymbaAlignError              exit code 1: the run failed
├── KernelError              a compute kernel is missing or cannot run here
├── StorageError             something cannot be written: a full disk, a read-only file system
├── GraderError              a benchmark's own grader is not installed, or failed
├── Preempted                exit code 75: stopped by SIGTERM; the same command continues
└── UsageError               exit code 2: the input is at fault; the message says what to change
    ├── RecipeError          a recipe key or value
    ├── DataError            a data file or one of its rows
    │   └── RenderError      a conversation that the chat template cannot render faithfully
    ├── CheckpointError      a checkpoint or tokenizer that cannot be loaded
    ├── SeveralErrors        several of these at once
    ├── ResultError          a result file that is damaged, was changed, or is of another version
    └── RunFolderError       a run folder that belongs to another run, or is in use
"""

from __future__ import annotations

from collections.abc import Sequence


class HymbaAlignError(Exception):
    """Base of all errors raised for users; `exit_code` is what the command line returns."""

    exit_code = 1


class KernelError(HymbaAlignError):
    """A compute kernel is missing or cannot run on this machine."""


class StorageError(HymbaAlignError):
    """Something cannot be written: a full disk, a file system that turned read-only or went away."""


class GraderError(HymbaAlignError):
    """A benchmark's own grader is not installed here, or failed."""


class Preempted(HymbaAlignError):
    """SIGTERM stopped the run; what was saved is in the message, and the same command continues."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class UsageError(HymbaAlignError):
    """The input is at fault, not the program."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, or an override of it, is invalid."""


class DataError(UsageError):
    """A data file is missing, malformed or empty."""


class RenderError(DataError):
    """A conversation cannot be rendered into tokens and a loss mask."""


class CheckpointError(UsageError):
    """A checkpoint or tokenizer cannot be loaded."""


class SeveralErrors(UsageError):
    """Several faults at once; `lines` are a heading and one line for each."""

    def __init__(self, heading: str, problems: Sequence[str]) -> None:
        self.lines = [heading, *(f"  {' '.join(problem.splitlines())}" for problem in problems)]
        super().__init__("\n".join(self.lines))


class ResultError(UsageError):
    """A result file is damaged, was changed since it was written, or is of another version."""


class RunFolderError(UsageError):
    """A run folder belongs to another run, or another process writes to it."""
