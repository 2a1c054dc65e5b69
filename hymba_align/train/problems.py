"""Held-out conversations as problems: a prompt that ends where the assistant's last reply begins, and that reply."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hymba_align.data.rendering import render
from hymba_align.errors import DataError
from hymba_align.recipe import AnswersSection, TrainingStage
from hymba_align.terminal import print_words

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from hymba_align.data.prepare import Prepared


class Matcher(Protocol):
    """Compares answers with references; the caller has it, since training knows no grader."""

    def can_judge(self, reference: str) -> bool:
        """Whether the reference holds what is compared."""

    def is_right(self, answer: str, reference: str) -> bool:
        """Whether the answer has the same."""


@dataclass(frozen=True)
class Problem:
    """A prompt in tokens, exactly as training has them before the reply, and the reply's text."""

    prompt: tuple[int, ...]
    reference: str
    place: int = field(default=0, compare=False)
    """Among those that were chosen, in the order of their content"""


def choose_problems(
    validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    section: AnswersSection,
    matcher: Matcher,
    stage: TrainingStage,
) -> list[Problem]:
    """Up to `section.problems` different ones, chosen by a hash of their content; those with the longest prompts first.

    Args:
        validation: as `data.prepare` gives it.
    Raises: DataError where no reply holds what is compared.
    """
    chosen = _choose(validation, tokenizer, section.problems, stage, matcher.can_judge)
    if not chosen:
        raise DataError(
            f"{stage}.answers.match is '{section.match}', and none of the {len(validation):,} held-out conversations ends in "
            "a reply that has it; choose another match, hold out more (data.validation_fraction), or remove "
            f"{stage}.answers"
        )
    return chosen


def without_judging(
    validation: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, stage: TrainingStage
) -> list[Problem]:
    """As `choose_problems`, whatever the replies hold; none where no conversation has a prompt."""
    return _choose(validation, tokenizer, count, stage, lambda reference: True)


def first_of_content(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The first of them in the order of their content."""
    return sorted(problems, key=lambda problem: problem.place)[:count]


def _choose(
    validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    stage: TrainingStage,
    fits: Callable[[str], bool],
) -> list[Problem]:
    """Up to so many different problems whose reference fits, by a hash of their content; longest prompts first."""
    read = _trained_tokens if stage == "sft" else _chosen_tokens
    chosen: dict[tuple[int, ...], Problem] = {}
    for row in _in_order_of_content(validation):
        if len(chosen) == count:
            break
        prompt, reply = read(row, tokenizer)
        reference = text_of(tokenizer, reply)
        if prompt and tuple(prompt) not in chosen and fits(reference):
            chosen[tuple(prompt)] = Problem(tuple(prompt), reference, len(chosen))
    return sorted(chosen.values(), key=lambda problem: -len(problem.prompt))


def choose_for(
    section: AnswersSection,
    stage: TrainingStage,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    matcher: Matcher | None,
    arguments: TrainingArguments,
) -> tuple[list[Problem], Matcher]:
    """A stage's problems and what judges their answers; the main process says how many there are."""
    assert matcher is not None, "who asks for answers says which are right"
    assert prepared.validation is not None, "trainer_settings refuses answers without validation"
    problems = choose_problems(prepared.validation, tokenizer, section, matcher, stage)
    if arguments.process_index == 0:
        held_out = f"{len(prepared.validation):,} held-out conversations"
        print_words(f"answers: {len(problems):,} problems of {held_out}, at every validation")
    return problems, matcher


def _in_order_of_content(validation: Dataset) -> Iterator[dict[str, Any]]:
    """The rows in the order of their hashes, which their places in files and the number of processes do not change."""
    rows = validation.remove_columns(["place"])
    hashes = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest() for row in rows]
    for number in sorted(range(len(hashes)), key=hashes.__getitem__):
        row: dict[str, Any] = rows[number]
        yield row


def _trained_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before the last reply under the loss, and its own; none before it in a text without roles."""
    ids, mask = row["input_ids"], row["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)
    start = end - (mask[:end][::-1].index(0) if 0 in mask[:end] else end)
    return ids[:start], ids[start:end]


def _chosen_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before the last message of the chosen side, and its own."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    messages = [*row["prompt"], *row["chosen"]]
    prompt = render(tokenizer, messages[:-1], tools, add_generation_prompt=True).input_ids
    return prompt, render(tokenizer, messages, tools).input_ids[len(prompt) :]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """A reply without its end token."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence"
    return text
