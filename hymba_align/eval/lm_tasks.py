"""Tasks of lm-evaluation-harness: its own definitions with what eval/tasks/ replaces, and a run of one of them.

A file of eval/tasks/ is a harness task with an `include:`, as the harness has them, but that the included file is looked
for below the installed harness's own tasks, wherever that is. As there, a key of the file replaces the included one whole.
What depends on the recipe (data, lengths, few-shot examples) is set on top by gsm8k.py and gpqa.py.

Every process runs the whole harness, with the same prompts; only the answers are divided (`Answers`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import RecipeError
from hymba_align.eval.result import Score

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

    from hymba_align.eval.answers import Answer, Answers
    from hymba_align.eval.run import TaskRun
    from hymba_align.recipe_eval import EvalSection, Task

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""A link to eval/tasks/, whose files a wheel then holds"""
PROTOCOL = {"apply_chat_template": True, "fewshot_as_multiturn": True}
"""Of every task, as NVIDIA states it for the published scores"""
EXACT_MATCH = {"strict-match": "strict_match", "flexible-extract": "flexible_match"}
"""The harness's filters of generated answers, and what their scores are called here"""


@dataclass(frozen=True)
class Outcome:
    """What the harness made of a task."""

    task: HarnessTask
    metrics: dict[str, Any]
    """By "metric,filter", as the harness names them"""
    records: list[dict[str, Any]]
    """The harness's records of each problem, by filter; in memory only, for they hold the rows"""
    answers: dict[int, Answer]
    """Of each problem, by its number; empty where choices were compared"""
    first_prompt: str


# ---- definitions ----------------------------------------------------------------------------------------------------


def definition_text(task: Task) -> str | None:
    """The text of eval/tasks/`task`.yaml; None where a task has none (BFCL)."""
    path = TASKS_FOLDER / f"{task}.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_definition(task: str, **names: str) -> dict[str, Any]:
    """The complete configuration of eval/tasks/`task`.yaml; `names` fill the placeholders of its `include:`."""
    import lm_eval.tasks
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    ours: dict[str, Any] = yaml.safe_load((TASKS_FOLDER / f"{task}.yaml").read_text(encoding="utf-8"))
    packaged = Path(lm_eval.tasks.__file__).parent / ours.pop("include").format(**names)
    return {**load_yaml(packaged), **ours}


def make_task(config: Mapping[str, Any], *, fewshot_seed: int | None = None) -> HarnessTask:
    """The harness's task of a complete configuration."""
    from lm_eval.tasks import TaskManager

    # Without `include_defaults=False` the harness first reads all its thousands of task files.
    with quiet():
        task: HarnessTask = TaskManager(include_defaults=False).load([dict(config)])["tasks"][config["task"]]
    task.set_fewshot_seed(fewshot_seed)
    return task


def check_context(context: int, section: EvalSection, task: Task) -> None:
    """Raises RecipeError when a task's answers leave no room for a prompt in a context of so many text tokens."""
    most = section.new_tokens(task)
    if most >= context:
        raise RecipeError(
            f"{length_key(section, task)} is {most}, which leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it"
        )


def length_key(section: EvalSection, task: Task) -> str:
    """The key of a recipe that says how long a task's answers may be."""
    return f"eval.{'' if section.max_new_tokens is not None else task.partition('_')[0] + '.'}max_new_tokens"


# ---- running --------------------------------------------------------------------------------------------------------


def run_harness(
    run: TaskRun, name: Task, task: HarnessTask, *, redact: Callable[[dict[str, Any], str], str] | None = None
) -> Outcome:
    """The harness's scores of a task, and what it keeps of every problem.

    Args:
        redact: makes of a problem and its answer what may be kept of the answer, at the moment it comes.

    Raises: RecipeError where answers leave no room for prompts.
    """
    from lm_eval.evaluator import evaluate

    from hymba_align.eval.harness import HymbaLM

    check_context(run.context, run.section, name)
    answers = run.answers_for(name)
    with quiet() as terminal:
        answers.terminal = answers.terminal or terminal  # the bar over answers is the one to show
        lm = HymbaLM(answers, name=name, redact=redact)
        results = evaluate(
            lm=lm,
            task_dict={"tasks": {task.task_name: task}},
            limit=run.section.limit,
            apply_chat_template=PROTOCOL["apply_chat_template"],
            fewshot_as_multiturn=PROTOCOL["fewshot_as_multiturn"],
        )
    assert results is not None, "to the harness, every process is the only one"
    records: dict[int, dict[str, Any]] = {}
    for record in results["samples"][task.task_name]:
        records.setdefault(record["doc_id"], {})[record["filter"]] = record
    return Outcome(
        task=task,
        metrics=results["results"][task.task_name],
        records=[records[number] for number in range(len(records))],
        answers={number: lm.answers_of[task.task_name, number] for number in records}
        if task.OUTPUT_TYPE == "generate_until"
        else {},
        first_prompt=task.instances[0].args[0],
    )


def scores_of(outcome: Outcome, names: Mapping[str, str]) -> dict[str, Score]:
    """Scores by our names, from the harness's metrics by theirs ("metric,filter"), with their standard errors."""
    n = len(outcome.records)
    scores = {}
    for key, name in names.items():
        metric, _, filter_name = key.partition(",")
        error = outcome.metrics[f"{metric}_stderr,{filter_name}"]  # "N/A" for a single problem
        value = float(outcome.metrics[key])
        scores[name] = Score(value, float(error) if isinstance(error, (int, float)) else None, n)
    return scores


def settings_of(task: HarnessTask) -> dict[str, Any]:
    """The part of a result's settings that the harness's own task decides."""
    return {"harness_task": task.task_name, "harness_task_version": task.VERSION, **PROTOCOL}


def generation_of(run: TaskRun, name: Task, task: HarnessTask) -> dict[str, Any]:
    """How answers to a task are generated."""
    end = run.tokenizer.eos_token
    return {
        "greedy": True,
        "max_new_tokens": run.section.new_tokens(name),
        "until": list(task.config.generation_kwargs["until"]),
        "end_token": end,
    }


def length_warnings(run: TaskRun, name: Task, answers: Answers, what_to_do: str) -> list[str]:
    """What is to be said of prompts that lost their beginning."""
    if not answers.truncated_prompts:
        return []
    most = run.section.new_tokens(name)
    beside = f" leaves {run.context - most} beside {length_key(run.section, name)}" if most else " is shorter"
    return [
        f"{answers.truncated_prompts} prompts lost their beginning: the longest has {answers.longest_prompt} tokens, and "
        f"the model's context of {run.context}{beside}; {what_to_do}"
    ]


def sha256(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ---- the terminal ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Silences the harness's logger and its bar over problems, which no switch turns off; yields the real stderr.

    Whatever else is written to stderr meanwhile, warnings and messages of other libraries, reaches the terminal at once.
    """
    terminal, logger = sys.stderr, logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(_WithoutBars(terminal)):
            yield terminal
    finally:
        logger.setLevel(level)


class _WithoutBars(io.TextIOBase):
    """Passes text on, except for progress bars: they begin with a carriage return, and end with a line break alone."""

    def __init__(self, terminal: Any) -> None:
        self.terminal, self.in_bar = terminal, False

    def write(self, text: str) -> int:
        bar = text.startswith("\r") or (self.in_bar and text in ("", "\n"))
        self.in_bar = text.startswith("\r") or (self.in_bar and not text)
        if not bar:
            self.terminal.write(text)
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()
