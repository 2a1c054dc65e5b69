"""GSM8K through lm-evaluation-harness: its own task definition, our chat template, optionally local files.

What differs from the packaged task stands in eval/tasks/gsm8k.yaml, and eval/README.md says why. `gsm8k_nvidia` asks as
NVIDIA's fork of the harness does, without "Answer:".

Few-shot examples (`gsm8k.shots`): `drawn` are the harness's own, drawn afresh for every test problem from a generator
seeded with 1234, walking the test file in order; `first` are the first training rows, the same for every problem. Either
way problem i gets the same examples in every run with the same files, whatever the process's random state, and `limit` n
scores exactly the first n problems of the full test.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hymba_align.errors import DataError, ProblemsError, RecipeError
from hymba_align.eval.lm_tasks import (
    EXACT_MATCH,
    Outcome,
    check_context,
    generation_of,
    length_warnings,
    make_task,
    read_definition,
    run_harness,
    scores_of,
    settings_of,
)
from hymba_align.eval.result import Sample, TaskResult
from hymba_align.recipe import SourceSection

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task as HarnessTask

    from hymba_align.eval.run import TaskRun
    from hymba_align.recipe_eval import EvalSection

__all__ = ["check_context", "check_data", "data_files", "load_task", "score_gsm8k", "score_gsm8k_nvidia"]

FEWSHOT_SEED = 1234
Variant = Literal["gsm8k", "gsm8k_nvidia"]


def score_gsm8k(run: TaskRun) -> TaskResult:
    """Strict and flexible exact match of greedy answers, with every sample.

    Raises:
        DataError: a file that is missing, malformed or not in GSM8K's format.
        RecipeError: settings that contradict each other or the model's context.
    """
    return _score(run, "gsm8k")


def score_gsm8k_nvidia(run: TaskRun) -> TaskResult:
    """As `score_gsm8k`, asked as NVIDIA's fork of the harness asks."""
    return _score(run, "gsm8k_nvidia")


def _score(run: TaskRun, variant: Variant) -> TaskResult:
    section = run.section
    task = load_task(section, variant)
    outcome = run_harness(run, variant, task)
    names = {f"exact_match,{key}": name for key, name in EXACT_MATCH.items()}
    return run.result(
        variant,
        total=len(task.eval_docs),
        scores=scores_of(outcome, names),
        samples=samples_of(outcome),
        settings={
            **settings_of(task),
            "question": task.config.doc_to_text,
            "num_fewshot": section.gsm8k.num_fewshot,
            "shots": section.gsm8k.shots,
            "train_path": section.gsm8k.train_path,
            "test_path": section.gsm8k.test_path or task.DATASET_PATH,
        },
        generation=generation_of(run, variant, task),
        first_prompt=outcome.first_prompt,
        seed=FEWSHOT_SEED if section.gsm8k.shots == "drawn" and section.gsm8k.num_fewshot else None,
        warnings=length_warnings(run, variant, run.answers_for(variant), "lower eval.gsm8k.num_fewshot"),
    )


def samples_of(outcome: Outcome) -> list[Sample]:
    """One sample per problem, from the harness's one per problem and filter."""
    samples = []
    for number, by_filter in enumerate(outcome.records):
        records = {EXACT_MATCH[name]: record for name, record in by_filter.items()}
        first, answer = next(iter(records.values())), outcome.answers[number]
        samples.append(
            Sample(
                id=str(number),
                target=first["target"],
                question=first["doc"]["question"],
                response=first["resps"][0][0],
                extracted={name: str(record["filtered_resps"][0]) for name, record in records.items()},
                correct={name: bool(record["exact_match"]) for name, record in records.items()},
                tokens=answer.tokens,
                cut_off=answer.cut_off,
            )
        )
    return samples


# ---- the task -------------------------------------------------------------------------------------------------------


def load_task(section: EvalSection, variant: Variant = "gsm8k") -> HarnessTask:
    """The harness's task with this section's data, few-shot examples and length of answers. Raises: DataError, RecipeError."""
    config = read_definition(variant)
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": section.new_tokens(variant)}
    config["num_fewshot"] = section.gsm8k.num_fewshot
    if section.gsm8k.shots == "first":
        config["fewshot_config"] = {"sampler": "first_n"}
    config.update(_local_data(section) or _hub_data(config["dataset_path"], config["dataset_name"]))
    return make_task(config, fewshot_seed=FEWSHOT_SEED)


def data_files(section: EvalSection) -> list[Path]:
    """The local files that the scores depend on."""
    paths = (section.gsm8k.train_path, section.gsm8k.test_path)
    return [Path(path).expanduser() for path in paths if path is not None]


def check_data(section: EvalSection, task: Variant, *, ask_hub: bool) -> None:
    """Raises the DataError or RecipeError of what keeps the task from being set up."""
    if data_files(section) or ask_hub:
        load_task(section, task)


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
    from hymba_align.data.reading.sources import read_cached_or_hub

    what_to_do = "set gsm8k.train_path and gsm8k.test_path (in a recipe under eval) to local files"
    splits = read_cached_or_hub(repository, what_to_do, name=name)
    return {"custom_dataset": lambda **_: splits}


def _read(path: str, key: str, *, at_least: int) -> Dataset:
    """The questions and answers of a file, every answer with its `#### number`."""
    from datasets import Dataset

    from hymba_align.data.reading.sources import open_source, parse_row

    if Path(path).expanduser().is_dir():
        raise ProblemsError(f"{path} is a folder; {key} names a file")
    if not Path(path).expanduser().is_file():
        raise ProblemsError(f"{path}: no such file; correct {key}")
    rows = []
    for chunk in open_source(SourceSection(path=path)).chunks():
        for raw in chunk:
            try:
                rows.append(_question_and_answer(parse_row(raw)))
            except DataError as error:
                raise ProblemsError(f"{raw.place}: {error}") from error
    if len(rows) < at_least:
        raise ProblemsError(f"{path}: the file has {len(rows)} rows; {key} needs at least {at_least}")
    return Dataset.from_list(rows)


def _question_and_answer(row: dict[str, Any]) -> dict[str, str]:
    """These two columns of a row. Raises: DataError without its place."""
    for column in ("question", "answer"):
        if column not in row:
            raise ProblemsError(
                f"GSM8K rows have a question and an answer; this one has {', '.join(row) or 'no columns'}"
            )
        if not isinstance(row[column], str) or not row[column].strip():
            raise ProblemsError(f"the column '{column}' must be text, not {row[column]!r:.60}")
    if "#### " not in row["answer"]:
        raise ProblemsError("the answer has no line '#### <number>' to compare with; add one")
    return {"question": row["question"], "answer": row["answer"]}
