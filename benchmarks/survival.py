"""Kills of `hymba-align run` with SIGKILL, at aimed and at random moments, and what is lost: the run's end beside one never killed.

    python benchmarks/survival.py [--seed 0] [--runs 5] [--output benchmarks/survival.md]

Each run is given its command again after every kill, until nobody kills it. Runs take turns in one process and with two
(gloo; `--launcher`), with caches of their own. A kill comes to the command's whole family of processes at once, or to
the command alone, whose processes the system must end. Exits with 1 where a bit of the end differs, or a phase got no kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from measure import Table, finish

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "arithmetic"
PHASES = ("data preparation", "any moment", "a step", "a save", "between stages", "evaluation")
LATER_FIRST = (*PHASES[:2], *PHASES[4:], *PHASES[2:4])
"""So that steps and saves are those of DPO"""
TIMES = ("runtime", "per_second")
PATIENCE_S = 600


@dataclass
class Trial:
    """One run, its kills and its end."""

    folder: Path
    processes: int
    kills: list[tuple[str, str]] = field(default_factory=list)  # phase, who was killed
    again: int = 0
    """Steps that were taken a second time"""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self) -> subprocess.Popen[bytes]:
        """The command, in a session of its own; its output goes to the end of `folder/output`."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"HF_DATASETS_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "hymba_align", "run", str(self.folder / "recipe.yaml")]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def steps(self) -> list[tuple[str, int]]:
        """Steps that the stages have recorded."""
        return [(stage, record["step"]) for stage in ("sft", "dpo") for record in self.metrics(stage)]

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Records of steps in metrics.jsonl that are whole, without times."""
        path, records = self.run / stage / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # being written
            records.append({key: value for key, value in record.items() if not any(part in key for part in TIMES)})
        return [record for record in records if "loss" in record]

    def lost_steps(self) -> int:
        """Steps that were recorded after the newest checkpoint of the stage that is being trained."""
        for stage in ("sft", "dpo"):
            folder = self.run / stage
            if folder.is_dir() and not (folder / "final").is_dir():
                saved = max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)
                return max(0, max((record["step"] for record in self.metrics(stage)), default=0) - saved)
        return 0

    def end(self) -> dict[str, Any]:
        """What a run leaves, by name: weights, metrics, scores."""
        left: dict[str, Any] = {}
        for stage in ("sft", "dpo"):
            left[f"{stage} weights"] = (self.run / stage / "final" / "model.safetensors").read_bytes()
            left[f"{stage} metrics"] = self.metrics(stage)
            scores = json.loads((self.run / "eval" / stage / "gsm8k.json").read_text())
            left[f"{stage} scores"] = {key: value for key, value in scores.items() if key != "wall_s"}
        return left


def make_trial(folder: Path, processes: int, launcher: str) -> Trial:
    """A run that is about to be started for the first time."""
    folder.mkdir(parents=True)
    trainer = {"per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 4, "max_steps": 16, "use_cpu": True}
    gsm8k = {"train_path": str(SHIPPED / "train.jsonl"), "test_path": str(SHIPPED / "test.jsonl"), "num_fewshot": 2}
    config = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "v_head_dim": 48,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_memory_tokens": 8,
        "sliding_window": 32,
        "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]],
        "rope_type": None,
    }
    recipe = {
        "name": "survival",
        "seed": 11,
        "output_dir": str(folder / "run"),
        "base": {"tokenizer": str(SHIPPED / "tokenizer"), "config": config},
        "data": {"path": str(SHIPPED / "train.jsonl"), "workers": 2},
        "sft": {"max_length": 512, "trainer": {**trainer, "learning_rate": 3e-3}},
        "dpo": {
            "max_length": 256,
            "row_tokens": 512,
            "data": {"max_rows": 2400},
            "trainer": {**trainer, "learning_rate": 1e-4, "precompute_ref_log_probs": False},
        },
        "eval": {"stages": ["sft", "dpo"], "limit": 24, "batch_size": 6, "max_new_tokens": 32, "gsm8k": gsm8k},
        **({"launch": {"launcher": launcher, "num_processes": processes}} if processes > 1 else {}),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return Trial(folder, processes)


# ---- moments ---------------------------------------------------------------------------------------------------------


class Aim:
    """Says when a phase is on, from the run's files alone."""

    def __init__(self, trial: Trial, phase: str, latest_s: float, dice: random.Random) -> None:
        self.trial, self.phase = trial, phase
        self.started, self.at = (
            time.monotonic(),
            dice.uniform(0, 0.5 * latest_s),
        )  # the second half belongs to the phases below
        self.steps, self.done = trial.steps(), self.manifests("completed")

    def manifests(self, key: str, where: str = "*/manifest.json") -> int:
        """How many manifests of stages (or of scores) have a key."""
        return sum(f'"{key}"' in path.read_text() for path in self.trial.run.glob(where) if path.is_file())

    def reached(self) -> bool:
        try:
            return self._reached()
        except OSError:  # a file went away between two looks
            return False

    def _reached(self) -> bool:
        run = self.trial.run
        if self.phase == "data preparation":
            return any((self.trial.cache / "hymba_align").glob(".*/.lock"))
        if self.phase == "a step":
            return len(self.trial.steps()) > len(self.steps) and not any(run.glob("*/.saving"))
        if self.phase == "a save":
            return any(run.glob("*/.saving/checkpoint-*/*"))
        if self.phase == "between stages":
            return self.manifests("completed") > self.done
        if self.phase == "evaluation":
            begun, ended = (self.manifests(key, "eval/*.manifest.json") for key in ("started", "completed"))
            return begun > ended
        return time.monotonic() - self.started > self.at


# Seconds after a phase is seen to be on, at most: within it, and past its end.
AFTER_S = {
    "data preparation": 0.4,
    "a step": 0.1,
    "a save": 0.05,
    "between stages": 0.3,
    "evaluation": 2.0,
    "any moment": 0.0,
}


def kill_in(trial: Trial, phase: str, latest_s: float, dice: random.Random) -> bool:
    """Starts the command and kills it in a phase; False where it ended before the phase came."""
    process = trial.start()
    aim, give_up = Aim(trial, phase, latest_s, dice), time.monotonic() + PATIENCE_S
    while not aim.reached():
        if process.poll() is not None or time.monotonic() > give_up:
            end_family(process)
            if process.returncode != 0:
                raise RuntimeError(
                    f"{trial.folder}: exit {process.returncode}\n{(trial.folder / 'output').read_text()[-3000:]}"
                )
            return False
        time.sleep(0.002)
    time.sleep(dice.uniform(0, AFTER_S[phase]))
    alone = trial.processes > 1 and dice.random() < 0.3
    end_family(process, alone=alone)
    trial.kills.append((phase, "the command alone" if alone else "all processes"))
    trial.again += trial.lost_steps()
    return True


def end_family(process: subprocess.Popen[bytes], *, alone: bool = False) -> None:
    """Kills the command and its descendants, or the command alone and then sees that the system ends the others.

    Raises: RuntimeError when one is still there after 10 s.
    """
    if process.poll() is not None:
        return
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGKILL)
    for member in () if alone else family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    if alive:
        raise RuntimeError(f"processes {[member.pid for member in alive]} outlived the command that was killed")


# ---- trials ----------------------------------------------------------------------------------------------------------


def finish_run(trial: Trial) -> float:
    """Runs the command to its end; seconds. Raises: RuntimeError when it fails."""
    started, process = time.monotonic(), trial.start()
    if process.wait(timeout=PATIENCE_S) != 0:
        raise RuntimeError(
            f"{trial.folder}: exit {process.returncode}\n{(trial.folder / 'output').read_text()[-3000:]}"
        )
    return time.monotonic() - started


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not equal, bit by bit."""
    return [name for name in one if one[name] != other[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument(
        "--runs", type=int, default=5, help="runs to kill; every second one has two processes (default 5)"
    )
    parser.add_argument("--launcher", default="ddp", help="what joins the two processes (default ddp)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    command = f"python benchmarks/survival.py --seed {arguments.seed} --runs {arguments.runs}"
    columns = (
        "run",
        "processes",
        "kills",
        "in",
        "of the command alone",
        "steps taken again",
        "differs from a run never killed",
    )
    table = Table("Kills, and what they cost", command, columns, [__doc__.split("\n\n")[2].replace("\n", " ")])
    missed, phases = [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        whole: dict[int, tuple[dict[str, Any], float]] = {}
        for number in range(arguments.runs):
            processes = 1 + number % 2
            if processes not in whole:
                trial = make_trial(Path(name) / f"whole {processes}", processes, arguments.launcher)
                seconds = finish_run(trial)
                whole[processes] = (trial.end(), seconds)
            trial = make_trial(Path(name) / f"run {number}", processes, arguments.launcher)
            for phase in PHASES if number // 2 % 2 == 0 else LATER_FIRST:
                kill_in(trial, phase, whole[processes][1], dice)
            finish_run(trial)
            differ = differences(whole[processes][0], trial.end())
            missed += [f"{what} of run {number}" for what in differ]
            phases.update(phase for phase, _ in trial.kills)
            counted = Counter(phase for phase, _ in trial.kills)
            alone = sum(who == "the command alone" for _, who in trial.kills)
            told = ", ".join(f"{phase} {count}" for phase, count in counted.items())
            table.add(number, processes, len(trial.kills), told, alone, trial.again, ", ".join(differ) or "nothing")
            print(table.rows[-1], flush=True)
    table.add("all", "", sum(phases.values()), ", ".join(f"{phase} {phases[phase]}" for phase in PHASES), "", "", "")
    missed += [
        f"only {phases[phase]} kills in {phase}" for phase in PHASES if phase != "any moment" and phases[phase] < 4
    ]
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
