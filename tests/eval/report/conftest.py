"""Run folders with invented results: five tasks, three stages, training records, data."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.eval.result import Sample, Score, TaskResult

SETTINGS: dict[str, dict[str, Any]] = {
    "gsm8k": {"num_fewshot": 5, "apply_chat_template": True, "fewshot_as_multiturn": True, "shots": "drawn"},
    "gpqa": {"num_fewshot": 0, "apply_chat_template": True, "subset": "main"},
    "bfcl": {"max_steps": 20},
}
BFCL = {
    "simple_python": 40,
    "irrelevance": 24,
    "live_simple": 30,
    "live_multiple": 40,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_relevance": 16,
}
LIVE = tuple(name for name in BFCL if name.startswith("live_"))


def mean(verdicts: list[bool]) -> Score:
    n = len(verdicts)
    value = sum(verdicts) / n
    return Score(value, math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None, n)


def make_result(task: str, right: list[bool], *, total: int | None = None, **changed: Any) -> TaskResult:
    """An invented result with one sample per verdict."""
    names = {"gpqa": ("acc",), "bfcl": ("ast",)}.get(task.split("_")[0], ("strict_match", "flexible_match"))
    secret, total = task.startswith("gpqa"), total or len(right)
    samples = [
        Sample(
            id=f"{task}-{number}",
            target="(B)" if secret else f"2 + 3 = 5\n#### {number}",
            question=None if secret else f"Max has {number} bags\nof plums. How many?",
            response=None if secret else f"There are {number}.\n#### {number if verdict else -number}",
            extracted={name: "(B)" if secret and verdict else "(A)" if secret else str(number) for name in names},
            correct=dict.fromkeys(names, verdict),
            tokens=None if task == "gpqa" else 20 + number * 7 % 90,
            cut_off=task != "gpqa" and number % 9 == 4,
        )
        for number, verdict in enumerate(right)
    ]
    made: dict[str, Any] = {
        "task": task,
        "checkpoint": "runs/my-run/sft/final",
        "suite": "published",
        "n": len(right),
        "total": total,
        "limit": len(right) if len(right) < total else None,
        "partial": len(right) < total,
        "scores": {name: mean(right) for name in names},
        "settings": {**SETTINGS.get(task.split("_")[0], {}), "dtype": "float32", "device": "cpu", "batch_size": 16},
        "generation": {} if task == "gpqa" else {"greedy": True, "max_new_tokens": 512, "until": ["</s>"]},
        "chat_template": {"name": "hymba", "sha256": "0" * 64},
        "first_prompt": None if secret else "<extra_id_1>User\nMax has 0 bags\n<extra_id_1>Assistant\n",
        "seed": 1234,
        "versions": {"hymba-align": "0.1.0", "lm-eval": "0.4.13"},
        "hardware": {"cpu": "one core", "gpus": []},
        "processes": 1,
        "wall_s": 61.4,
        "new_tokens": 4200,
        "tokens_per_second": 81.5,
        "cut_off": sum(sample.cut_off for sample in samples),
        "samples": samples,
    }
    return TaskResult(**{**made, **changed})


def make_bfcl(draw: random.Random, share: float) -> TaskResult:
    """A result with categories, whose samples name them."""
    samples, scores = [], {}
    for name, n in BFCL.items():
        verdicts = [draw.random() < share for _ in range(n)]
        scores[name] = mean(verdicts)
        samples += [
            Sample(
                id=f"{name}_{number}",
                target='[{"get_weather": {"city": ["Berlin"], "unit": ["celsius", ""]}}]',
                question="What is the weather like in Berlin, in degrees?",
                response='<toolcall> {"name": "get_weather", "arguments": {"city": "Berlin"}} </toolcall>',
                extracted={"calls": "[{'get_weather': {'city': 'Berlin'}}]"},
                correct={name: verdict, **({"live": verdict} if name in LIVE else {})},
                group=name,
                tokens=30 + number % 17,
                verdict="" if verdict else "value_error:string: invalid value for parameter 'city'",
            )
            for number, verdict in enumerate(verdicts)
        ]
    live = mean([sample.correct["live"] for sample in samples if "live" in sample.correct])
    scores = {"live": live, "non_live": Score(share, 0.02, 64), **scores, "irrelevance_never_call": Score(1.0, 0.0, 24)}
    result = make_result("bfcl", [True])
    n = len(samples)
    return TaskResult(**{**vars(result), "scores": scores, "samples": samples, "n": n, "total": n, "cut_off": 0})


def build_run(root: Path) -> Path:
    """A run with all that a report shows."""
    draw = random.Random(1)
    for stage, share in (("base", 0.05), ("sft", 0.55), ("dpo", 0.6)):
        folder = root / "eval" / stage
        for task, n, total in (("gsm8k", 200, 1319), ("gsm8k_nvidia", 100, 1319), ("gpqa_generative", 60, 448)):
            make_result(task, [draw.random() < share for _ in range(n)], total=total).write(folder / f"{task}.json")
        make_result("gpqa", [draw.random() < 0.25 + share / 10 for _ in range(448)]).write(folder / "gpqa.json")
        make_bfcl(draw, share).write(folder / "bfcl.json")
    for stage, steps in (("sft", 900), ("dpo", 60)):
        (root / stage).mkdir(parents=True)
        write_metrics(root / stage, training_records(stage, steps))
        (root / stage / "data.json").write_text(json.dumps(data_record(stage)))
    base = "base: {model: nvidia/Hymba-1.5B-Base}\n"
    sft = "sft: {max_length: 256, trainer: {learning_rate: 5e-5}}\ndpo: {trainer: {beta: 0.1}}\nlaunch: {num_processes: 2}\n"
    (root / "recipe.yaml").write_text(f"name: {root.name}\n{base}data: {{path: 'hf://a/b?token=secret-token'}}\n{sft}")
    versions = {"hymba-align": "0.1.0", "torch": "2.13.0", "lm-eval": "0.4.13"}
    machine = {
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "cpu_count": 2,
        "gpus": [],
        "git_revision": "98e838e3c58e",
    }
    (root / "environment.json").write_text(json.dumps({**machine, "versions": versions}))
    return root


def training_records(stage: str, steps: int) -> list[dict[str, Any]]:
    draw, records = random.Random(stage), []
    for step in range(1, steps + 1):
        share = step / steps
        record = {
            "step": step,
            "epoch": 2 * share,
            "learning_rate": 5e-5 * min(share * 20, 1 - share),
            "tokens": step * 900,
        }
        record["loss"] = 0.3 + 5 * math.exp(-6 * share) + draw.gauss(0, 0.05)
        record["grad_norm"] = 1 + draw.random()
        if stage == "dpo":
            record |= {"rewards/margins": share, "rewards/accuracies": 0.5 + share / 3, "rewards/chosen": -share / 2}
            record["rewards/rejected"] = -1.5 * share
        records.append(record)
        if step % (steps // 6) == 0:
            records.append({"step": step, "eval_loss": record["loss"] + 0.05})
    records.append(
        {"step": steps // 2, "warning": f"{stage}: the loss rose to 6.1 in one step", "skipped_rows": ["a:1"]}
    )
    took = {"train_runtime": 9.0, "seconds": 4061.4, "peak_memory_bytes": 5 << 29}
    return [*records, {"step": steps, "epoch": 2.0, "train_loss": 0.9, **took}]


def data_record(stage: str) -> dict[str, Any]:
    counted = {
        "rows_read": 1200,
        "rows_kept": 1100,
        "rows_not_chosen": 40,
        "rows_passed_over": 0,
        "conversations": 1090,
    }
    tokens = {"total_tokens": 9000, "trained_tokens": 4000, "shortened": 3, "lost": {"turn is empty": 60}}
    source = {"name": f"a|{stage}.jsonl", "repeat": 2, **counted, **tokens}
    return {"sources": [source], "validation": 11, "packing": {"documents": 1090, "rows": 20, "fill_rate": 0.987}}


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with five tasks and three stages; not to be changed."""
    return build_run(tmp_path_factory.mktemp("runs") / "my-run")


@pytest.fixture
def sft_data() -> dict[str, Any]:
    """What became of the rows of one source, as SFT records it."""
    return data_record("sft")


@pytest.fixture
def result_of() -> Callable[..., TaskResult]:
    """Makes invented results."""
    return make_result
