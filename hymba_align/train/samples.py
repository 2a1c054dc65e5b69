"""What the model writes after held-out prompts, whenever validation runs: kept, shown, and sent to trackers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_align.data.inspection.preview import first_words, last_question, visible
from hymba_align.processes.engines import requested_engine
from hymba_align.recipe import Recipe, SamplesSection, TrainingStage
from hymba_align.run.metrics import SAMPLES_FILE, append_metrics, read_metrics, rewrite_metrics
from hymba_align.train.problems import Problem, first_of_content, without_judging
from hymba_align.train.settings import stage_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.data.prepare import Prepared

LONGEST_WORDS = 60
"""Characters of a prompt, an answer and a reference in the progress"""
DIVIDING = ("zero3", "fsdp")
"""Beginnings of engines of which every process needs a copy of all weights to generate"""


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model wrote after it."""

    prompt: str
    """As the model read it, special tokens included"""
    reference: str
    text: str
    cut_off: bool
    """Whether it ran into the most new tokens"""
    right: bool | None
    """None where answers are not judged (`answers`)"""


class TakesSamples:
    """Mixin for a callback that wants the samples of each validation, in the first process."""

    def take_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Called once per validation."""
        raise NotImplementedError


class SamplesFile(TakesSamples, TrainerCallback):
    """Appends each sample to samples.jsonl; a resumed run first drops those past its checkpoint."""

    def __init__(self, stage_dir: Path) -> None:
        self.stage_dir = stage_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        records = read_metrics(self.stage_dir, SAMPLES_FILE)
        kept = [record for record in records if record["step"] <= state.global_step] if state.global_step else []
        if len(kept) < len(records):
            rewrite_metrics(self.stage_dir, kept, SAMPLES_FILE)

    def take_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            append_metrics(self.stage_dir, {"step": step, **asdict(sample)}, SAMPLES_FILE)


def section_of(recipe: Recipe, stage: TrainingStage) -> SamplesSection:
    """The stage's samples: its own section, else the default, which asks for none where they would cost a copy of all weights.

    With `answers` they cost nothing, because what was generated for these is shown.
    """
    section = stage_section(recipe, stage)
    if section.samples is not None:
        return section.samples
    costly = section.answers is None and requested_engine(recipe.launch).startswith(DIVIDING)
    return SamplesSection(prompts=0) if costly else SamplesSection()


def choose_samples(
    section: SamplesSection,
    stage: TrainingStage,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem] | None,
) -> list[Problem]:
    """The prompts to continue, chosen by content: the first of the `problems` that are answered anyway, where there are any.

    None where nothing is held out, or where what is held out has no prompts (texts without roles).
    """
    if problems is not None:
        return first_of_content(problems, section.prompts)
    if prepared.validation is None or not section.prompts:
        return []
    return without_judging(prepared.validation, tokenizer, section.prompts, stage)


def in_a_line(sample: Sample) -> str:
    """The sample in short, with what would act on a terminal made visible."""
    prompt, text, reference = (shortened(one) for one in (last_question(sample.prompt), sample.text, sample.reference))
    cut_off = " (cut off)" if sample.cut_off else ""
    return f"{prompt} -> {text or '(nothing)'}{cut_off}   [reference: {reference}]"


def shortened(text: str) -> str:
    """The first words, on one line."""
    words = " ".join(visible(first_words(text)).split())
    return words if len(words) <= LONGEST_WORDS else f"{words[: LONGEST_WORDS - 1].rstrip()}…"
