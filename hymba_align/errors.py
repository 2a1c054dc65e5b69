"""Every error that a user can cause.

HymbaAlignError              exit code 1: the run failed
├── KernelError              a compute kernel is missing or cannot run here
├── StorageError             something cannot be written: a full disk, a read-only file system
├── GraderError              a benchmark's own grader is not installed, or failed
├── DivergedError            the loss, a gradient or a weight is no longer a finite number, or a guard stopped training
├── OutOfMemoryError         a device has less memory than the stage needs
├── ProcessesError           one of several processes is missing or died
├── Preempted                exit code 75: stopped by SIGTERM; the same command continues
└── UsageError               exit code 2: the input is at fault; the message says what to change
    ├── RecipeError          a recipe key or value
    │   ├── TrainerError     a key or value of sft.trainer or dpo.trainer
    │   ├── LaunchError      how many processes train, and which engine joins them
    │   └── AdapterError     what LoRA, DoRA or QLoRA is asked for
    ├── DataError            rows that cannot be used, or none
    │   ├── DataFileError    a data file that cannot be found or read
    │   ├── ColumnsError     columns that are none of the accepted schemas
    │   ├── ConverterError   a converter of one's own
    │   ├── RenderError      a conversation that the chat template cannot render faithfully
    │   ├── ProblemsError    a benchmark's problems: GSM8K's, GPQA's or BFCL's files
    │   └── ChangedDataError data that changed while a run read it
    ├── CheckpointError      a checkpoint that cannot be found or loaded
    │   ├── WeightsError     weights that are incomplete, damaged or dangerous to open
    │   └── TokenizerError   a tokenizer or chat template that cannot be used
    ├── InspectError         something that an inspection is asked for and cannot do
    ├── ResultError          a result file that is damaged, was changed, or is of another version
    ├── RunFolderError       a run folder that belongs to another run, or cannot be used
    │   └── InUseError       a run folder that another process writes to
    └── SeveralErrors        several of these at once

Each has a topic: `hymba-align explain TOPIC` says what is behind it and what to do, from docs/errors.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import ClassVar


class HymbaAlignError(Exception):
    """Base of all errors raised for users; `exit_code` is what the command line returns."""

    exit_code: int = 1
    topic: ClassVar[str] = "failed"
    """What `hymba-align explain` calls it: a heading of docs/errors.md."""


class KernelError(HymbaAlignError):
    """A compute kernel is missing or cannot run on this machine."""

    topic = "kernel"


class StorageError(HymbaAlignError):
    """Something cannot be written: a full disk, a file system that turned read-only or went away."""

    topic = "storage"


class GraderError(HymbaAlignError):
    """A benchmark's own grader is not installed here, or failed."""

    topic = "grader"


class DivergedError(HymbaAlignError):
    """The loss, a gradient or a weight is no longer a finite number, or a guard stopped training."""

    topic = "diverged"


class OutOfMemoryError(HymbaAlignError):
    """A device has less memory than the stage needs."""

    topic = "out-of-memory"


class ProcessesError(HymbaAlignError):
    """One of several processes is missing, died, or computes with another engine than was asked for."""

    topic = "processes"


class Preempted(HymbaAlignError):
    """SIGTERM stopped the run; what was saved is in the message, and the same command continues."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
    topic = "preempted"


class UsageError(HymbaAlignError):
    """The input is at fault, not the program."""

    exit_code = 2
    topic = "usage"


class RecipeError(UsageError):
    """A recipe, or an override of it, is invalid."""

    topic = "recipe"


class TrainerError(RecipeError):
    """A key or value of sft.trainer or dpo.trainer is not TRL's, or not for this run."""

    topic = "trainer"


class LaunchError(RecipeError):
    """The processes that the recipe asks for cannot train together here."""

    topic = "launch"


class AdapterError(RecipeError):
    """What the section lora asks for is not possible."""

    topic = "adapter"


class DataError(UsageError):
    """Rows cannot be used, or there are none."""

    topic = "rows"


class DataFileError(DataError):
    """A data file, folder, URL or set of the hub cannot be found or read."""

    topic = "data-file"


class ColumnsError(DataError):
    """The columns of the data are none of the accepted schemas, or not those that the recipe names."""

    topic = "columns"


class ConverterError(DataError):
    """A converter of one's own cannot be imported, or failed."""

    topic = "converter"


class RenderError(DataError):
    """A conversation cannot be rendered into tokens and a loss mask."""

    topic = "conversation"


class ProblemsError(DataError):
    """A benchmark's problems are missing or not as their authors publish them."""

    topic = "problems"


class ChangedDataError(DataError):
    """Data changed after a run had read it."""

    topic = "changed-data"


class CheckpointError(UsageError):
    """A checkpoint cannot be found or loaded, or is no Hymba."""

    topic = "checkpoint"


class WeightsError(CheckpointError):
    """Weights are incomplete, damaged, or in a format that can run code."""

    topic = "weights"


class TokenizerError(CheckpointError):
    """A tokenizer or chat template cannot be found or used."""

    topic = "tokenizer"


class InspectError(UsageError):
    """An inspection is asked for something that it cannot do."""

    topic = "inspect"


class ResultError(UsageError):
    """A result file is damaged, was changed since it was written, or is of another version."""

    topic = "result"


class RunFolderError(UsageError):
    """A run folder belongs to another run, or cannot be used."""

    topic = "run-folder"


class InUseError(RunFolderError):
    """Another process writes to the run folder."""

    topic = "in-use"


class SeveralErrors(UsageError):
    """Several faults at once; `lines` are a heading and one line for each."""

    topic = "several"

    def __init__(self, heading: str, problems: Sequence[str]) -> None:
        self.problems = [" ".join(problem.splitlines()) for problem in problems]
        self.lines = [heading, *(f"  {problem}" for problem in self.problems)]
        super().__init__("\n".join(self.lines))


class Faults:
    """UsageErrors of checks that do not depend on each other; `errors` are those so far."""

    def __init__(self) -> None:
        self.errors: list[UsageError] = []

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps the UsageError that is raised within, and goes on."""
        try:
            yield
        except UsageError as error:
            self.errors.append(error)

    def together(self) -> UsageError:
        """The only one as it is; of more than one, an error that tells all, the same words once."""
        if len({str(error) for error in self.errors}) == 1:
            return self.errors[0]
        told = [error.problems if isinstance(error, SeveralErrors) else [str(error)] for error in self.errors]
        problems = list(dict.fromkeys(chain.from_iterable(told)))
        return SeveralErrors(f"{len(problems)} things are wrong:", problems)
