"""A base, an adapter over it, and a finished run whose last stage is the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_align.eval.result import Sample, Score, TaskResult
from hymba_align.run.folder import RunFolder
from tests.adapters_of_others import write_adapter, write_base

QUESTION = "a question of GPQA that nobody may publish"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    write_adapter(folder, base)
    return folder


def result(task: str, **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "task": task, "checkpoint": "runs/mine/sft/final", "suite": None, "n": 2, "total": 2, "limit": None, "partial": False,
        "scores": {"strict_match": Score(0.5, 0.35, 2)}, "settings": {"test_path": "/home/alice/test.jsonl", "dtype": "float32"},
        "generation": {"greedy": True, "max_new_tokens": 7}, "chat_template": {"name": "hymba", "sha256": "0" * 64},
        "first_prompt": QUESTION, "seed": 1, "versions": {"torch": "2.13"}, "hardware": {"cores": 2}, "processes": 1,
        "wall_s": 3.0, "new_tokens": 14, "tokens_per_second": 5.0,
        "samples": [Sample(str(i), "4", QUESTION, QUESTION, {}, {"strict_match": i == 0}) for i in range(2)],
    }  # fmt: skip
    return TaskResult(**{**values, **changes})


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run of SFT over a folder called Hymba-of-alice, with scores."""
    root = tmp_path / "mine"
    shutil.copytree(base, root / "sft" / "final")
    shutil.copytree(base, root / "base" / "final")
    recipe = {
        "name": "mine",
        "base": {"model": "/home/alice/Hymba-of-alice", "tokenizer": None},
        "data": {"path": "s3://bucket/train.jsonl", "storage_options": {"secret": "hunter2hunter2"}},
        "sft": {"max_length": 64, "trainer": {"learning_rate": 0.001}},
    }
    RunFolder(root).mark_complete("sft", "what entered it", {})
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "environment.json").write_text(json.dumps({"gpus": [], "cpu_count": 2, "versions": {"torch": "2.13"}}))
    source = {
        "name": "/home/alice/train.jsonl", "repeat": 1, "rows_read": 9, "rows_kept": 8, "rows_not_chosen": 0,
        "rows_passed_over": 0, "conversations": 8, "total_tokens": 321, "trained_tokens": 123, "lost": {"too long": 1},
        "shortened": 0,
    }  # fmt: skip
    (root / "sft" / "data.json").write_text(json.dumps({"sources": [source], "validation": 0}))
    record = {"step": 1, "loss": 2.0, "seconds": 42.0, "tokens": 321, "peak_memory_bytes": 2**30}
    (root / "sft" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    result("gsm8k").write(root / "eval" / "sft" / "gsm8k.json")
    result("gpqa", scores={"acc": Score(0.5, 0.35, 2)}, partial=True, total=448, limit=2, samples=[]).write(
        root / "eval" / "sft" / "gpqa.json"
    )
    return root
