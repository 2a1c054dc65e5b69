"""The engine that trains is the one that was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
Environment = Callable[..., dict[str, str]]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@pytest.mark.timeout(600)  # DeepSpeed compiles its shared-memory operations on first use
def test_every_engine_runs_under_torchrun_and_fall_backs_are_refused(
    recipe_file: Path, tmp_path: Path, environment: Environment
) -> None:
    def job(*overrides: str, **variables: str) -> dict[str, Any]:
        few = ["launch.num_processes=2", "sft.trainer.max_steps=1", "sft.trainer.save_strategy=no"]
        return {"overrides": [*few, *overrides], "environment": variables}

    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    multi_cpu = tmp_path / "multi_cpu.yaml"
    multi_cpu.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    jobs = [
        *(job(f"launch.launcher={name}") for name in ENGINES),
        job(f"launch.accelerate_config={multi_cpu}"),
        job("launch.launcher=zero2", **on_cpu),
        job("launch.launcher=fsdp2"),
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(ROOT / "tests" / "processes" / "engine_choices.py"),
        str(recipe_file),
        "jobs.json",
        str(tmp_path / "outcomes.json"),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    for name, outcome in zip(ENGINES, outcomes[: len(ENGINES)], strict=True):
        assert outcome["record"] == {"engine": name, "processes": 2, "device": "cpu"}, outcome
        assert outcome["wrapped"] == ("DistributedDataParallel" if name == "ddp" else "DeepSpeedEngine")
    assert outcomes[5]["record"]["engine"] == "ddp"
    assert outcomes[6] == {
        "wrapped": "DistributedDataParallel",
        "read": "ddp",
        "error": "launch.launcher is zero2, which is the engine zero2; 2 processes started, and ddp runs with 2. "
        "ACCELERATE_USE_CPU is set, with which accelerate trains with plain DDP; unset it (use_cpu of the stage's trainer says "
        "the same to all engines), or take launch.launcher=ddp",
    }
    assert outcomes[7] == {
        "wrapped": "DistributedDataParallel",
        "read": "ddp",
        "error": "launch.launcher is fsdp2, which is the engine fsdp2; 2 processes started, and ddp runs with 2. "
        "Accelerate has no FSDP on the CPU; take GPUs, or launch.launcher=zero3, which divides as much there",
    }
