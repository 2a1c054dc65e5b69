"""The accuracy of the whole model and of every removal on a task, asked and graded by the eval package.

A task is scored once for every removal, which takes a large model hours. So the result of each scoring, and the answers
of the one that was interrupted, stay on the disk until the inspection is written. Both are named by all that they depend
on, the removal included, and what has another name is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from hymba_align.errors import ResultError
from hymba_align.files import fingerprint
from hymba_align.inside.importance import Removed, scorings
from hymba_align.inside.observing import hymba_in
from hymba_align.inside.output import KEPT
from hymba_align.inside.result import Importance, LayerImportance, Measured, Removal
from hymba_align.inside.showing import display, one_more
from hymba_align.model.branches import BRANCHES, without_branch
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.progress import Display, Field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.eval.result import TaskResult
    from hymba_align.recipe_eval import EvalSection, Task


@dataclass(frozen=True)
class Kept:
    """Where results and answers are kept, and the checkpoint that they are of."""

    folder: Path
    identity: str
    """Of the checkpoint's files, as the eval package has it"""

    @classmethod
    def of(cls, checkpoint: str, output: Path) -> Kept:
        """Those of a checkpoint, below the folder that its inspection is written to."""
        from hymba_align.eval.inputs import checkpoint_identity

        return cls(output / KEPT, checkpoint_identity(checkpoint))


def measure_task_importance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    task: Task,
    *,
    kept: Kept | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Importance:
    """The share of problems that every removal solves, in percent.

    The eval package's own scorer asks and grades, so that the whole model's score is that of `hymba-align eval` with the
    same section, dtype and kind of device. Every removal answers every problem itself. The score is the task's first that
    is a mean over single problems, which is named where it is not about all of them (a category of BFCL).
    Source: Hymba (arXiv 2411.13676), its analysis of head importance.

    Args:
        model: a Hymba with its head on its device, with or without LoRA adapters around it, in eval mode.
        tokenizer: with the chat template that prompts are rendered with.
        section: which problems, how they are asked, and the batch size; of its tasks only `task` is scored.
        task: its name.
        kept: what an interrupted call left there is not asked for again. None keeps nothing.
        say: prints a line: how many scorings there will be.

    Raises:
        UsageError, GraderError: problems or settings that cannot be used.
        StorageError: answers cannot be kept.
    """
    hymba = hymba_in(model)
    layers = range(len(hymba.layers))
    removals: list[Removed] = [None, *((layer, branch) for layer in layers for branch in BRANCHES)]
    with _folder(kept) as folder:
        scoring = _Scoring(model, tokenizer, section, task, folder, "" if kept is None else kept.identity)
        results = scoring.earlier(removals, say)
        say(_words(task, scorings(model), len(results), goes_on=kept is not None))
        with display(f"{task} without each branch", len(removals), "models", done=len(results)) as shown:
            for removed in removals:
                if removed not in results:
                    results[removed] = scoring.score(removed, shown)
                    one_more(shown)
    whole = results[None]
    score = next(name for name in whole.scores if whole.problems(name) is not None)
    found = whole.scores[score]
    return Importance(
        metric=task if score == whole.headline and found.n == whole.n else f"{task} {score}",
        unit="% correct",
        lower_is_better=False,
        whole=Measured(100 * found.value, None if found.stderr is None else 100 * found.stderr),
        chance=None,
        n=found.n,
        documents=found.n,
        layers=tuple(_task_layer(hymba.config.is_global(layer), layer, results, score) for layer in layers),
    )


def _words(task: Task, total: int, earlier: int, *, goes_on: bool) -> str:
    """What is about to happen, and that it may be interrupted."""
    there = f", of which {earlier} are there from an interrupted inspection" if earlier else ""
    after = "; after an interruption the same command goes on where it stopped" if goes_on else ""
    return f"{task}: {total} scorings, of the whole model and without each branch of each layer{there}{after}"


@contextlib.contextmanager
def _folder(kept: Kept | None) -> Iterator[Path]:
    if kept is not None:
        kept.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield kept.folder
        finally:
            with contextlib.suppress(OSError):  # where it holds what the next inspection goes on from
                kept.folder.rmdir()
        return
    with tempfile.TemporaryDirectory(prefix="hymba-align-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class _Scoring:
    """What a task is scored with, and the folder of results and answers."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    section: EvalSection
    task: Task
    folder: Path
    checkpoint: str
    """Its identity; empty where nothing is kept"""

    @cached_property
    def template(self) -> str:
        """Digest of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @cached_property
    def inputs(self) -> str:
        """Fingerprint of all that the scores of this model depend on."""
        from hymba_align.eval.inputs import task_inputs

        of_task = task_inputs(self.section, self.task, self.checkpoint, self.template)
        parameter = next(self.model.parameters())
        return fingerprint([of_task, str(parameter.dtype), parameter.device.type])

    def identity(self, removed: Removed) -> str:
        """Fingerprint of all that the scores and answers of a removal depend on."""
        return fingerprint([self.inputs, "removed", removed])

    def path(self, removed: Removed) -> Path:
        """The file of a removal's result."""
        name = "whole" if removed is None else f"{removed[0]}-{removed[1]}"
        return self.folder / f"{self.task}.{name}.json"

    def earlier(self, removals: Sequence[Removed], say: Callable[[str], None]) -> dict[Removed, TaskResult]:
        """Results that an interrupted call left; says of those that cannot be used why they are made again."""
        from hymba_align.eval.result import read_result

        found: dict[Removed, TaskResult] = {}
        others = 0
        for removed in removals:
            path = self.path(removed)
            if not path.is_file():
                continue
            try:
                result = read_result(path)
            except ResultError as error:
                say(str(error).removesuffix("; score again") + "; it is made again")
                continue
            if result.inputs == self.identity(removed):
                found[removed] = result
            else:
                others += 1
        if others:
            say(
                f"{self.task}: {others} scorings of an interrupted inspection are made again: they are of another checkpoint, "
                "other settings or other data"
            )
        return found

    def score(self, removed: Removed, shown: Display) -> TaskResult:
        """The result of a removal, which is on the disk before its answers go."""
        from hymba_align.eval.inputs import scorer
        from hymba_align.eval.run import TaskRun
        from hymba_align.eval.sharing import Processes

        run = TaskRun(
            model=cast(HymbaForCausalLM, self.model),
            tokenizer=self.tokenizer,
            section=self.section,
            out_dir=self.folder,
            checkpoint=str(hymba_in(self.model).config.name_or_path),
            chat_template={"name": "", "sha256": self.template},
            processes=Processes.alone(),
            identity=self.identity(removed),
            terminal=io.StringIO(),  # one display counts the removals, and tells how far each is
        )
        answers = run.answers_for(self.task)
        answers.on_progress = lambda done, total: shown.tell(_answers(removed, done, total))
        with _without(self.model, removed):
            result = replace(scorer(self.task)(run), inputs=self.identity(removed))
        result.write(self.path(removed))
        answers.finish()
        return result


def _answers(removed: Removed, done: int, total: int) -> Field:
    """How far a removal's answers are."""
    of = "the whole model" if removed is None else f"the model without {removed[1]} in layer {removed[0]}"
    return Field(f"answer {done}/{total} of {of}", f"{done}/{total} answers", 4)


def _without(model: nn.Module, removed: Removed) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if removed is None else without_branch(hymba_in(model), *removed)


def _task_layer(is_global: bool, layer: int, results: dict[Removed, TaskResult], score: str) -> LayerImportance:
    whole, attention, ssm = results[None], results[layer, "attention"], results[layer, "ssm"]
    return LayerImportance(
        layer=layer,
        is_global=is_global,
        attention=Removal(100 * attention.scores[score].value, _paired(whole, attention, score)),
        ssm=Removal(100 * ssm.scores[score].value, _paired(whole, ssm, score)),
        difference=_paired(attention, ssm, score),
    )


def _paired(before: TaskResult, after: TaskResult, score: str) -> Measured:
    """By how much the score is higher after, in points, with the standard error over the problems that both answered."""
    from hymba_align.eval.report.differences import difference

    found = difference(before, after, score)
    assert not isinstance(found, str), f"removals are scored alike, and yet cannot be compared: {found}"
    return Measured(100 * found.value, None if found.stderr is None else 100 * found.stderr)
