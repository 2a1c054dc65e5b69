"""What scoring a task produces, and its file: everything that is needed to believe the score, and to repeat it.

A file says which format it has and carries its own digest. One that was damaged, edited or written by another version
is refused with the reason; the report names it and goes on without it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hymba_align.errors import ResultError
from hymba_align.files import fingerprint, read_json, write_json

FORMAT = 2
"""Of the file; 1 had neither a format nor a digest"""
AGREE = 1e-9
"""How far a stored mean may be from that of its samples: both are sums of 0 and 1 in float64"""


@dataclass(frozen=True)
class Score:
    """A mean over `n` problems in [0, 1] and its standard error; None where one problem gives none."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Sample:
    """One problem: what was asked, what came back, what each match extracted from it and whether that was right.

    Texts that must not be published (GPQA) are None; the id still says which problem it was.
    """

    id: str
    """Of the data set where it has ids, else the number of the row in its file, from 0"""
    target: str
    question: str | None
    response: str | None
    extracted: dict[str, str]
    correct: dict[str, bool]
    group: str = ""
    """Part of the task that the problem belongs to (a category of BFCL)"""
    tokens: int | None = None
    """New tokens of the answer, with its end token; None where choices were compared"""
    cut_off: bool = False
    """Whether the answer ran into `max_new_tokens`"""
    verdict: str = ""
    """The grader's own words, where it has some"""


@dataclass(frozen=True)
class TaskResult:
    """Scores of one checkpoint on one task. `n` of `total` problems were scored; fewer than all makes it partial."""

    task: str
    checkpoint: str
    suite: str | None
    n: int
    total: int
    limit: int | None
    partial: bool
    scores: dict[str, Score]
    """By name; the first is the task's headline"""
    settings: dict[str, Any]
    """All that a score depends on besides the weights: protocol, data files, seed, dtype"""
    generation: dict[str, Any]
    """How answers were generated: greedy, max_new_tokens, stop strings, end tokens; empty where choices were compared"""
    chat_template: dict[str, str]
    """Its name and the SHA-256 of its text"""
    first_prompt: str | None
    """The first problem as the model read it, special tokens included; None where it must not be published"""
    seed: int | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    processes: int
    wall_s: float
    """Of the session that finished the task; answers of interrupted ones were taken over (`reused_answers`)"""
    new_tokens: int
    """Generated in that session"""
    tokens_per_second: float | None
    """New tokens by the seconds of generating them, prompts included; None where nothing was generated"""
    reused_answers: int = 0
    reused_tokens: int = 0
    earlier_s: float = 0.0
    """Of the interrupted sessions, each up to its last answer"""
    peak_memory_bytes: int | None = None
    """While the task was scored, of the process that had most: on its GPU, or of the machine where it computed on the CPU"""
    cut_off: int = 0
    truncated_prompts: int = 0
    not_run: dict[str, str] = field(default_factory=dict)
    """Parts of the benchmark that were left out, and why"""
    warnings: tuple[str, ...] = ()
    section: dict[str, Any] = field(default_factory=dict)
    """The section eval with all its keys, from which `command` follows"""
    inputs: str | None = None
    """Fingerprint of all that the scores depend on, the bytes of weights and data included"""
    finished: str = ""
    """When, in UTC (ISO 8601)"""
    samples: list[Sample] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """The name of the score that stands for the task."""
        return next(iter(self.scores))

    @property
    def command(self) -> str:
        """The command that repeats the score, which the file holds too: it names every key of the section that is not at its default.

        Its paths are as they were given, so they count from the folder in which the score was made.
        """
        template = self.chat_template.get("name", "hymba")
        words = ["hymba-align", "eval", self.checkpoint, "--tasks", self.task]
        words += ["--chat-template", template] if template != "hymba" else []
        return shlex.join(words + list(_overrides(self.section)))

    def problems(self, score: str) -> dict[str, bool] | None:
        """Whether each problem of a score is right, by id; None where it is not the mean of its samples' verdicts.

        A score has the samples that have a verdict of its name, or else those of the group of its name.
        """
        verdicts = {sample.id: sample.correct[score] for sample in self.samples if score in sample.correct}
        if not verdicts:
            of_group = [sample for sample in self.samples if sample.group == score and len(sample.correct) == 1]
            verdicts = {sample.id: next(iter(sample.correct.values())) for sample in of_group}
        found = self.scores[score]
        if len(verdicts) != found.n or found.n == 0:
            return None
        return verdicts if abs(sum(verdicts.values()) / found.n - found.value) <= AGREE else None

    def write(self, path: Path) -> None:
        """Writes the result as JSON; a reader sees the old file or the new one, never a part."""
        content = _encodable({"format": FORMAT, "command": self.command, **asdict(self)})
        write_json(path, {**content, "sha256": fingerprint(content)})


def read_result(path: Path) -> TaskResult:
    """The result that `TaskResult.write` wrote.

    Raises: ResultError for a file that is damaged, was changed since, is of another format, or contradicts itself.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as JSON ({error}); score again") from error
    written = content.get("format", 1)
    if written != FORMAT:
        raise ResultError(
            f"{path} has the format {written} of another version of hymba-align, not {FORMAT}; score again"
        )
    digest = content.pop("sha256", None)
    if digest != fingerprint(content):
        raise ResultError(f"{path} was changed or damaged since it was written (SHA-256); score again")
    del content["format"]
    content.pop("command", None)  # for who reads the file; it follows from the rest
    try:
        result = _from_plain(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path} lacks what a result has, or has more ({error}); score again") from error
    contradiction = _contradiction(result)
    if contradiction is not None:
        raise ResultError(f"{path} contradicts itself: {contradiction}; score again")
    return result


def _from_plain(values: dict[str, Any]) -> TaskResult:
    scores = {name: Score(**score) for name, score in values["scores"].items()}
    samples = [Sample(**sample) for sample in values["samples"]]
    plain = {**values, "scores": scores, "samples": samples, "warnings": tuple(values["warnings"])}
    return TaskResult(**plain)


def _contradiction(result: TaskResult) -> str | None:
    """What in a result cannot be so, in words; None where nothing is found."""
    if result.partial != (result.n < result.total):
        return f"partial is {result.partial}, with {result.n} of {result.total} problems scored"
    if not result.scores:
        return "it holds no score"
    for name, score in result.scores.items():
        if not (math.isfinite(score.value) and 0 <= score.value <= 1) or score.n < 0:
            return f"the score {name} is {score.value} over {score.n} problems"
        verdicts = [sample.correct[name] for sample in result.samples if name in sample.correct]
        if verdicts and len(verdicts) == score.n and abs(sum(verdicts) / score.n - score.value) > AGREE:
            return f"the score {name} is {score.value}, and its samples make {sum(verdicts) / score.n}"
    return None


def _encodable(value: Any) -> Any:
    """Plain values as JSON has them, with what UTF-8 has not (half of a surrogate pair, from an escape in a call) escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _overrides(section: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` for each key of a section eval that differs from its default and enters the scores."""
    from hymba_align.recipe_eval import EvalSection

    left_out = ("suite", "tasks", "stages", "num_processes")  # what the suite says is in the other keys
    own = {key: value for key, value in section.items() if key not in left_out}
    yield from _differences(own, EvalSection().model_dump(), "")


def _differences(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping):
            yield from _differences(value, default if isinstance(default, Mapping) else {}, f"{prefix}{key}.")
        elif _plain(value) != _plain(default):
            yield f"{prefix}{key}={_yaml_word(value)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _yaml_word(value: Any) -> str:
    """A value as an override of the command line has it."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(_plain(value))
