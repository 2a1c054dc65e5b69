"""How a task's problems were asked, in names that people read: once for what all stages share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hymba_align.eval.result import TaskResult

NAMES = {
    "harness_task": "the harness's task",
    "harness_task_version": "version of that task",
    "apply_chat_template": "asked in the chat template",
    "fewshot_as_multiturn": "examples as earlier turns",
    "question": "form of the question",
    "num_fewshot": "examples in the prompt",
    "shots": "which examples",
    "train_path": "file of the examples",
    "test_path": "file of the problems",
    "dtype": "number format",
    "data": "file of the problems",
    "choice_order": "order of the choices",
    "first_prompt_sha256": "SHA-256 of the first prompt",
    "greedy": "always the likeliest token (greedy)",
    "max_new_tokens": "new tokens at most",
    "until": "texts that end an answer",
    "max_steps": "steps in a turn at most",
    "formats": "forms of a call that are read",
    "scores": "how scores are formed",
}
"""Of settings whose key does not read well with spaces"""

Fact = tuple[str, tuple[str, ...]]
"""A name, and the lines of its value"""


@dataclass(frozen=True)
class Asked:
    """What all of a task's stages have in common, and what each has of its own, in the stages' order."""

    common: tuple[Fact, ...]
    own: tuple[tuple[Fact, ...], ...]
    prompt: str | None
    """The first problem as every stage's model read it; None where it differs, or must not be published"""


def asked(results: Sequence[TaskResult]) -> Asked:
    """How the problems of one task were asked in these results."""
    each = [dict(_facts(result)) for result in results]
    common = {name: lines for name, lines in each[0].items() if all(facts.get(name) == lines for facts in each)}
    own = tuple(tuple(fact for fact in facts.items() if fact[0] not in common) for facts in each)
    prompts = {result.first_prompt for result in results}
    return Asked(tuple(common.items()), own, prompts.pop() if len(prompts) == 1 else None)


def _facts(result: TaskResult) -> Iterator[Fact]:
    yield "checkpoint", (result.checkpoint,)
    if result.suite:
        yield "suite", (result.suite,)
    for key, value in {**result.settings, **result.generation}.items():
        yield NAMES.get(key, key.replace("_", " ")), _lines(value)
    yield "seed", _lines(result.seed)
    yield "chat template", (result.chat_template.get("name", ""),)
    yield "SHA-256 of the chat template", (result.chat_template.get("sha256", ""),)
    yield "versions", (", ".join(f"{name} {version}" for name, version in result.versions.items()),)
    yield "hardware", (", ".join(f"{key} {_word(value)}" for key, value in result.hardware.items()),)
    yield "processes", _lines(result.processes)
    if result.inputs:
        yield "fingerprint of all inputs", (result.inputs,)


def _lines(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(f"{inner}: {_word(told)}" for inner, told in value.items())
    return (_word(value),)


def _word(value: Any) -> str:
    """A value as people write it: yes and no, 3 for 3.0, lists with commas."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_word, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
