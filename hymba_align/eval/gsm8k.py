"""GSM8K through lm-evaluation-harness: its own task definition, our chat template, optionally local files.

What differs from the packaged task: where the rows come from, how many tokens may be generated, and two more stops, the
token that ends an assistant turn (added by the harness) and the marker that starts the next turn.

Few-shot examples: the harness draws `num_fewshot` training rows afresh for every test problem, from a generator seeded
with 1234, walking the test file in order. So problem i gets the same examples in every run with the same files,
whatever the process's random state, and `limit` n scores exactly the first n problems of the full test.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import DataError, RecipeError
from hymba_align.eval.result import Sample, Score, TaskResult
from hymba_align.recipe import EvalSection, SourceSection

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT_SEED = 1234
TURN_MARKER = "<extra_id_1>"
FILTERS = {"strict-match": "strict_match", "flexible-extract": "flexible_match"}
PACKAGES = ("lm-eval", "transformers", "torch", "datasets")


def score_gsm8k(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: EvalSection) -> TaskResult:
    """Strict and flexible exact match of greedy answers, with every sample.

    Raises:
        DataError: a file that is missing, malformed or not in GSM8K's format.
        RecipeError: settings that contradict each other or the model's context.
    """
    from lm_eval.evaluator import evaluate

    from hymba_align.eval.harness import HymbaLM

    started = time.perf_counter()
    context = int(model.config.max_position_embeddings)
    check_context(context, section)
    task = load_task(section)
    with _quiet() as terminal:
        lm = HymbaLM(
            model,
            tokenizer,
            batch_size=section.batch_size,
            max_length=context,
            name="gsm8k",
            terminal=terminal,
        )
        results = evaluate(
            lm=lm,
            task_dict={"tasks": {"gsm8k": task}},
            limit=section.limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    assert results is not None, "scoring runs in one process"
    total = len(task.eval_docs)
    samples = merge_samples(results["samples"]["gsm8k"])
    scores = results["results"]["gsm8k"]
    return TaskResult(
        task="gsm8k",
        n=len(samples),
        total=total,
        limit=section.limit,
        partial=len(samples) < total,
        scores={
            name: Score(float(scores[f"exact_match,{key}"]), _number(scores[f"exact_match_stderr,{key}"]))
            for key, name in FILTERS.items()
        },
        settings=_settings(section, model, task),
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        wall_s=time.perf_counter() - started,
        ended=lm.ended,
        truncated_prompts=lm.truncated_prompts,
        warnings=_warnings(lm.truncated_prompts, lm.max_prompt_tokens, context, section),
        samples=samples,
    )


# ---- the task -------------------------------------------------------------------------------------------------------


def load_task(section: EvalSection) -> Task:
    """The packaged gsm8k task with this section's data, few-shot count and generation settings."""
    import lm_eval.tasks
    import yaml
    from lm_eval.tasks import TaskManager

    packaged = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    config: dict[str, Any] = yaml.safe_load(packaged.read_text(encoding="utf-8"))
    generation = config["generation_kwargs"]
    config["generation_kwargs"] = {
        **generation,
        "until": [*generation["until"], TURN_MARKER],
        "max_gen_toks": section.max_new_tokens,
    }
    config["num_fewshot"] = section.gsm8k.num_fewshot
    config.update(_local_data(section) or _hub_data(config["dataset_path"], config["dataset_name"]))
    # Without `include_defaults=False` the harness first reads all its thousands of task files.
    with _quiet():
        task: Task = TaskManager(include_defaults=False).load([config])["tasks"]["gsm8k"]
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _local_data(section: EvalSection) -> dict[str, Any]:
    """The keys of the task that replace its data by local files; none when the section names none.

    Raises: RecipeError, DataError.
    """
    train, test, shots = section.gsm8k.train_path, section.gsm8k.test_path, section.gsm8k.num_fewshot
    if train is None and test is None:
        return {}
    if test is None:
        raise RecipeError(
            f"eval.gsm8k.test_path is missing: training data is also the source of few-shot examples, and no test.jsonl lies beside "
            f"{train}; set the path, or leave scoring out with eval=null"
        )
    splits = {"test": _read(test, "eval.gsm8k.test_path", at_least=1)}
    if not shots:
        return {"custom_dataset": lambda **_: splits, "training_split": None, "fewshot_split": None}
    if train is None:
        raise RecipeError(
            f"eval.gsm8k.train_path is missing; the {shots} few-shot examples come from it "
            "(or set eval.gsm8k.num_fewshot=0)"
        )
    splits["train"] = _read(train, "eval.gsm8k.train_path", at_least=shots)
    return {"custom_dataset": lambda **_: splits}


def _hub_data(repository: str, name: str) -> dict[str, Any]:
    """The key of the task that lets us read the task's own data set, for one clear sentence where it cannot be read."""
    from hymba_align.data.reading.sources import read_hub

    what_to_do = "set gsm8k.train_path and gsm8k.test_path (in a recipe under eval) to local files"
    splits = read_hub(repository, what_to_do, name=name)
    return {"custom_dataset": lambda **_: splits}


def _read(path: str, key: str, *, at_least: int) -> Dataset:
    """The questions and answers of a file, every answer with its `#### number`."""
    from datasets import Dataset

    from hymba_align.data.reading.sources import open_source, parse_row

    if not Path(path).expanduser().is_file():
        raise DataError(f"{path}: no such file; correct {key}")
    rows = []
    for chunk in open_source(SourceSection(path=path)).chunks():
        for raw in chunk:
            try:
                rows.append(_question_and_answer(parse_row(raw)))
            except DataError as error:
                raise DataError(f"{raw.place}: {error}") from error
    if len(rows) < at_least:
        raise DataError(f"{path}: the file has {len(rows)} rows; {key} needs at least {at_least}")
    return Dataset.from_list(rows)


def _question_and_answer(row: dict[str, Any]) -> dict[str, str]:
    """These two columns of a row. Raises: DataError without its place."""
    for column in ("question", "answer"):
        if column not in row:
            raise DataError(f"GSM8K rows have a question and an answer; this one has {', '.join(row) or 'no columns'}")
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"the column '{column}' must be text, not {row[column]!r:.60}")
    if "#### " not in row["answer"]:
        raise DataError("the answer has no line '#### <number>' to compare with; add one")
    return {"question": row["question"], "answer": row["answer"]}


# ---- the model ------------------------------------------------------------------------------------------------------


def check_context(context: int, section: EvalSection) -> None:
    """Raises RecipeError when answers leave no room for a prompt in a model's context of so many text tokens."""
    if section.max_new_tokens >= context:
        raise RecipeError(
            f"eval.max_new_tokens is {section.max_new_tokens}, which leaves no room for a prompt in the model's context "
            f"of {context} tokens; lower it"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
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


# ---- the result -----------------------------------------------------------------------------------------------------


def merge_samples(logged: list[dict[str, Any]]) -> list[Sample]:
    """One sample per problem, from the harness's one per problem and filter."""
    by_problem: dict[int, dict[str, dict[str, Any]]] = {}
    for record in logged:
        by_problem.setdefault(record["doc_id"], {})[FILTERS[record["filter"]]] = record
    samples = []
    for number, records in sorted(by_problem.items()):
        first = next(iter(records.values()))
        samples.append(
            Sample(
                doc_id=number,
                question=first["doc"]["question"],
                target=first["target"],
                response=first["resps"][0][0],
                extracted={name: str(record["filtered_resps"][0]) for name, record in records.items()},
                correct={name: bool(record["exact_match"]) for name, record in records.items()},
            )
        )
    return samples


def _settings(section: EvalSection, model: PreTrainedModel, task: Task) -> dict[str, Any]:
    return {
        "harness_task_version": task.VERSION,
        "num_fewshot": section.gsm8k.num_fewshot,
        "fewshot_seed": FEWSHOT_SEED,
        "fewshot_as_multiturn": True,
        "apply_chat_template": True,
        "greedy": True,
        "max_new_tokens": section.max_new_tokens,
        "batch_size": section.batch_size,
        "until": task.config.generation_kwargs["until"],
        "train_path": section.gsm8k.train_path,
        "test_path": section.gsm8k.test_path or "openai/gsm8k",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _warnings(truncated: int, longest: int, context: int, section: EvalSection) -> tuple[str, ...]:
    if not truncated:
        return ()
    return (
        f"{truncated} prompts lost their beginning: the longest has {longest} tokens, and the model's context of {context} "
        f"leaves {context - section.max_new_tokens} beside eval.max_new_tokens; lower eval.gsm8k.num_fewshot",
    )


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where a standard error is undefined, as for one problem."""
    return float(value) if isinstance(value, (int, float)) else None
