"""A recipe of all stages over a handful of rows, and stages that write files in place of their work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hymba_align.eval
import hymba_align.eval.report
import hymba_align.pipeline as pipeline
import hymba_align.processes.launch
import hymba_align.train.dpo
import hymba_align.train.sft
from hymba_align.files import write_json
from hymba_align.processes.agent import STARTED_BY_US
from hymba_align.recipe import Recipe, load_recipe
from hymba_align.run.manifest import seal


@pytest.fixture
def row() -> dict[str, str]:
    """A row that SFT, DPO and GSM8K can use."""
    return {"question": "What is 1+1?", "answer": "<<1+1=2>>2\n#### 2", "wrong_answer": "<<1+1=3>>3\n#### 3"}


@pytest.fixture
def recipe_file(tmp_path: Path, small_base: dict[str, Any], row: dict[str, str]) -> str:
    """A recipe of all stages over a handful of rows, in a folder of its own."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    sections = {
        "name": "demo",
        "output_dir": str(tmp_path / "run"),
        "base": small_base,
        "data": {"path": str(tmp_path / "train.jsonl")},
        "sft": {"max_length": 64, "trainer": {"per_device_train_batch_size": 1}},
        "dpo": {"max_length": 64, "trainer": {"per_device_train_batch_size": 4}},
        "eval": {"max_new_tokens": 4, "gsm8k": {"num_fewshot": 1}, "limit": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))
    return str(path)


class Work(list[tuple[str, str | None]]):
    """What the stages would do, as (what, starting checkpoint)."""

    @property
    def names(self) -> list[str]:
        """What alone."""
        return [name for name, _ in self]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """What the stages would do, with files in place of the work."""
    done = Work()

    def trainer(stage: str):
        def train(recipe: Recipe, start: str | None, stage_dir: Path, *_: Any) -> dict[str, float]:
            done.append((stage, start))
            write_json(stage_dir / "final" / "config.json", {})
            seal(stage_dir / "final", {})
            return {"train_loss": 1.0}

        return train

    def evaluate(checkpoint: str, section: Any, out_dir: Path, **_: Any) -> dict[str, None]:
        done.append((f"score {out_dir.name}", checkpoint))
        for task in section.tasks:
            write_json(out_dir / f"{task}.json", {})
        return dict.fromkeys(section.tasks)

    monkeypatch.setattr(hymba_align.train.sft, "train_sft", trainer("sft"))
    monkeypatch.setattr(hymba_align.train.dpo, "train_dpo", trainer("dpo"))
    monkeypatch.setattr(hymba_align.processes.launch, "use_engine", lambda launch: None)  # it would outlive the test
    monkeypatch.setattr(hymba_align.eval, "evaluate", evaluate)
    monkeypatch.setattr(hymba_align.eval.report, "score_table", lambda root: "scores")
    monkeypatch.setattr(hymba_align.eval.report, "write_report", lambda root: root / "report.md")
    return done


class FakeLauncher:
    """Stands where the launcher would be: runs the worker's part of a training stage in this process, as `RANK` 0."""

    code = 0
    report: str | None = None
    commands: list[list[str]]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands = []
        self.monkeypatch = monkeypatch

    def __call__(self, command: list[str], env: dict[str, str]) -> FakeLauncher:
        self.commands.append(command)
        self.env = env
        return self

    def __enter__(self) -> FakeLauncher:
        return self

    def __exit__(self, *arguments: object) -> None:
        return None

    def wait(self) -> int:
        command = self.commands[-1]
        if self.report is not None:
            Path(command[command.index("--report") + 1]).write_text(self.report)
        if self.code == 0:
            stage, path = command[-2:]
            started = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", STARTED_BY_US: "1"}
            with self.monkeypatch.context() as patch:
                patch.setattr(os, "environ", {**self.env, **started})
                patch.setattr(hymba_align.processes.launch, "die_with", lambda parent: None)
                pipeline.run_training_stage(load_recipe(path), stage)  # type: ignore[arg-type]
        return self.code


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    fake = FakeLauncher(monkeypatch)
    monkeypatch.setattr(hymba_align.processes.launch, "subprocess", SimpleNamespace(Popen=fake))
    return fake
