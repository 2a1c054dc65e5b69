"""Commands in processes of their own: a recipe that trains in seconds, the environment, and how far it has come."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.processes import engines
from hymba_align.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
Environment = Callable[..., dict[str, str]]
WaitForStep = Callable[[Path, int, "subprocess.Popen[str]"], None]


@pytest.fixture
def recipe_file(tmp_path: Path, small_base: dict[str, Any]) -> Path:
    """A stage of SFT over a few rows, with absolute paths, in a folder of its own."""
    recipe = {
        "name": "launched",
        "output_dir": str(tmp_path / "run"),
        "base": {**small_base, "tokenizer": str(ROOT / small_base["tokenizer"])},
        "data": {"path": str(ROOT / "data" / "arithmetic" / "train.jsonl"), "max_rows": 12},
        "sft": {
            "max_length": 256,
            "trainer": {"per_device_train_batch_size": 1, "logging_steps": 1, "max_steps": 2, "use_cpu": True},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """That of a command: no GPU, one thread, caches of its own, and nothing of a launcher that runs these tests."""

    def make(**more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", *engines.ENGINE_VARIABLES))
        }
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        fixed = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        }
        return {**kept, **fixed, **more}

    return make


@pytest.fixture
def wait_for_step() -> WaitForStep:
    """Waits until a stage's metrics.jsonl holds a step."""

    def wait(stage_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if (stage_dir / "metrics.jsonl").is_file() and any(
                record["step"] >= step for record in read_metrics(stage_dir)
            ):
                return
            assert process.poll() is None, f"it ended with exit code {process.returncode}"
            time.sleep(0.1)
        raise AssertionError(f"no step {step} in 200 s")

    return wait
