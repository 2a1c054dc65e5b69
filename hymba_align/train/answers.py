"""Answers to held-out problems while training: how many are right, and which weights had the most.

They are generated whenever validation runs, greedily, each process a share. What is right is the caller's to say
(`problems.Matcher`), because training knows no grader.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_align.data.hymba_format import HEADER
from hymba_align.model.decoding import decode
from hymba_align.recipe import AnswersSection, Recipe, TrainingStage
from hymba_align.terminal import print_words
from hymba_align.train.problems import Matcher, Problem, choose_for, text_of
from hymba_align.train.samples import Sample, SamplesFile, TakesSamples, choose_samples, section_of
from hymba_align.train.settings import stage_section
from hymba_align.train.whole_model import whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from hymba_align.data.prepare import Prepared
    from hymba_align.model import HymbaForCausalLM

    Base = Trainer
else:
    Base = object

PREFIX = "eval"
EXACT = f"{PREFIX}_answers/exact"
NEXT_TURN = f"{HEADER}1>"
"""A model that goes on with the next turn has ended its own"""
TAIL = 16
"""Tokens at the end of an answer in which that marker is looked for; it has at most as many"""


@dataclass(frozen=True)
class Judged:
    """One answer."""

    is_right: bool
    is_cut_off: bool
    tokens: int
    text: str = ""


class AnswersProblems(Base):
    """Mixin for a trainer: validation also says how many problems are answered right, and shows what the model writes.

    Does nothing before `answer` and `show`. One generation serves both.

    With `keep_best`, the step with the highest share is saved as a checkpoint, and `take_best` goes back to it. Of equal
    ones the latest counts, so that only a better score keeps the end of training out of `final`.
    """

    _section: AnswersSection | None = None
    _problems: Sequence[Problem] = ()
    _matcher: Matcher | None = None
    _samples: Sequence[Problem] = ()
    _sample_tokens = 0

    def answer(self, section: AnswersSection, problems: Sequence[Problem], matcher: Matcher) -> None:
        """Has the problems answered from now on."""
        self._section, self._problems, self._matcher = section, problems, matcher
        self.add_callback(AnswersBeforeSaving(keep_best=section.keep_best))

    def show(self, samples: Sequence[Problem], max_new_tokens: int, stage_dir: Path) -> None:
        """Has these prompts continued from now on; those of `answer` are not generated again."""
        self._samples, self._sample_tokens = samples, max_new_tokens
        if samples:
            self.add_callback(SamplesFile(stage_dir))

    @property
    def keeps_best(self) -> bool:
        """Whether `final` holds the weights with the best answers, rather than the last ones."""
        return self._section is not None and self._section.keep_best

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = PREFIX,
    ) -> Any:
        """TRL's, with the answers' metrics beside its own."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if metric_key_prefix == PREFIX and (self._section is not None or self._samples):
            assert output.metrics is not None, "validation has metrics"
            output.metrics.update({f"{PREFIX}_answers/{key}": value for key, value in self._measure().items()})
        return output

    def _measure(self) -> dict[str, float]:
        """Shares and means over the problems of all processes, the same in each; nothing where only samples are shown."""
        started = time.perf_counter()
        asked, most = self._samples, self._sample_tokens
        if self._section is not None:
            asked, most = self._problems, self._section.max_new_tokens
        judged = self._judged(asked, most)
        if self.is_world_process_zero() and self._samples:
            self._tell_samples(judged)
        if self._section is None:
            return {}
        return {**metrics_of(list(judged.values())), "runtime": time.perf_counter() - started}

    def _judged(self, asked: Sequence[Problem], max_new_tokens: int) -> dict[Problem, Judged]:
        """The answer to each problem, of which every process gives a share."""
        mine = asked[self.accelerator.process_index :: self.accelerator.num_processes]
        tokenizer: Any = self.processing_class
        with whole_model(self.accelerator.unwrap_model(self.model), self.args.device) as model:
            own = judge(model, tokenizer, mine, self._matcher, max_new_tokens)
        judged = dict(gather_object(list(zip(mine, own, strict=True))))
        assert len(judged) == len(asked), "every problem was answered once"
        return judged

    def _tell_samples(self, judged: Mapping[Problem, Judged]) -> None:
        tokenizer: Any = self.processing_class
        samples = []
        for problem in self._samples:
            prompt, one = tokenizer.decode(problem.prompt, clean_up_tokenization_spaces=False), judged[problem]
            right = one.is_right if self._section is not None else None
            samples.append(Sample(prompt, problem.reference, one.text, one.is_cut_off, right))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TakesSamples):
                callback.take_samples(self.state.global_step, samples)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether these weights are the best so far; then they are saved."""
        if not self.keeps_best:
            return super()._determine_best_metric(metrics, trial)
        if self.state.best_metric is not None and metrics[EXACT] < self.state.best_metric:
            return False
        self.state.best_metric, self.state.best_global_step = metrics[EXACT], self.state.global_step
        self.control.should_save = True
        return True

    def take_best(self) -> None:
        """Puts the best weights into the model, once training is over."""
        if not self.keeps_best:
            return
        if final_step(self) != self.state.global_step:
            self._load_best_model()
        if self.is_world_process_zero():
            assert self.state.best_metric is not None, "a best step has a score"
            print_words(
                f"final/ gets the weights of step {final_step(self)} of {self.state.global_step}, with "
                f"{100 * self.state.best_metric:.1f} % right answers"
            )


def generate_at_validation(
    trainer: AnswersProblems,
    recipe: Recipe,
    stage: TrainingStage,
    stage_dir: Path,
    prepared: Prepared,
    matcher: Matcher | None,
) -> None:
    """Has the trainer answer the stage's problems and show its samples, as far as the recipe asks for them.

    Raises: DataError where no held-out reply holds what answers are compared by.
    """
    section, problems = stage_section(recipe, stage), None
    tokenizer: Any = trainer.processing_class
    if section.answers is not None:
        problems, judging = choose_for(section.answers, stage, prepared, tokenizer, matcher, trainer.args)
        trainer.answer(section.answers, problems, judging)
    samples = section_of(recipe, stage)
    trainer.show(choose_samples(samples, stage, prepared, tokenizer, problems), samples.max_new_tokens, stage_dir)


def final_step(trainer: AnswersProblems) -> int:
    """The step whose weights become `final`."""
    if not trainer.keeps_best:
        return trainer.state.global_step
    assert trainer.state.best_global_step is not None, "answers are judged at the end of training, if not before"
    return trainer.state.best_global_step


class AnswersBeforeSaving(TrainerCallback):
    """Moves the validation that ends an epoch in front of the checkpoint of the same step, and has the last step validated.

    transformers saves first, and a run that resumes from that checkpoint never validates the epoch. The last step has a
    score however long `eval_delay` puts validation off: there may be no other.
    """

    def __init__(self, *, keep_best: bool) -> None:
        self.keep_best = keep_best
        self.step = -1  # at which it was moved

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        epoch, ends = float(state.epoch or 0), state.global_step >= state.max_steps
        if args.eval_strategy == "epoch" and (epoch.is_integer() or ends):
            control.should_evaluate = args.eval_delay <= epoch
            self.step = state.global_step
        control.should_evaluate |= ends
        if control.should_evaluate and self.keep_best:
            control.should_log = True  # it may be saved, and logging precedes saving (MetricsFile)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step == state.global_step:
            control.should_evaluate = False


def judge(
    model: HymbaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    matcher: Matcher | None,
    max_new_tokens: int,
) -> list[Judged]:
    """Each problem's greedy answer, compared with its reference; never right where nobody compares."""
    context = int(model.config.max_position_embeddings)
    decoded = decode(
        model,
        [problem.prompt for problem in problems],
        max_new_tokens=[min(max_new_tokens, context - len(problem.prompt)) for problem in problems],
        stop_ids=int(tokenizer.eos_token_id),
        stop=lambda tokens: NEXT_TURN in text_of(tokenizer, tokens[-TAIL:]),
    )
    judged = []
    for problem, one in zip(problems, decoded, strict=True):
        text = text_of(tokenizer, one.tokens).partition(NEXT_TURN)[0]
        is_right = matcher is not None and matcher.is_right(text, problem.reference)
        judged.append(Judged(is_right, not one.ended, len(one.tokens), text))
    return judged


def metrics_of(judged: Sequence[Judged]) -> dict[str, float]:
    """Share that is right with its standard error (of more than one), share cut off, mean tokens, and how many."""
    count = len(judged)
    exact = sum(one.is_right for one in judged) / count
    metrics = {
        "exact": exact,
        "cut_off": sum(one.is_cut_off for one in judged) / count,
        "tokens": sum(one.tokens for one in judged) / count,
        "problems": float(count),
    }
    return {**metrics, "exact_stderr": math.sqrt(exact * (1 - exact) / (count - 1))} if count > 1 else metrics
