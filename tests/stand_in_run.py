"""Runs of the pipeline with arithmetic in place of training, killed at every file operation, or every so many; test_kill_points.py reads the result.

    python tests/stand_in_run.py FOLDER SCENARIO EVERY

Prints one line per kill after which the next run did not end as one that nobody killed, then how many kills there were.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_points import SYNC, file_operations, in_child, killed_at

import hymba_align.eval
import hymba_align.pipeline as pipeline
import hymba_align.run.folder as run_folder
from hymba_align import stage_training
from hymba_align.errors import HymbaAlignError
from hymba_align.eval.result import Score, TaskResult
from hymba_align.files import write_text
from hymba_align.recipe import Recipe
from hymba_align.run.folder import check_run_folder
from hymba_align.run.manifest import seal

STEPS = 3
STAGES = ("sft", "dpo")


def make_recipe(folder: Path, learning_rate: float) -> Recipe:
    """Both stages and their scores; the run lies in `folder`/run."""
    data = folder / "train.jsonl"
    data.write_text('{"question": "What is 1+1?", "answer": "2"}\n')
    trainer = {"learning_rate": learning_rate}
    return Recipe.model_validate(
        {
            "name": "killed",
            "output_dir": str(folder / "run"),
            "base": {"model": "owner/hymba"},
            "data": {"path": str(data)},
            "sft": {"trainer": trainer},
            "dpo": {"trainer": trainer},
            "eval": {"stages": STAGES, "gsm8k": {"test_path": str(data), "num_fewshot": 0}},
        }
    )


def train(recipe: Recipe, folder: Any, stage: str, start: str | None) -> dict[str, float]:
    """Hashes in place of steps: each depends on the one before, so that one that is lost or taken twice shows."""
    stage_dir = folder.stage_dir(stage)
    final = stage_dir / "final"
    if not final.is_dir():
        before = (Path(start) / "weights").read_text() if start else "random"
        weights = hashlib.sha256(f"{before} {getattr(recipe, stage).trainer}".encode()).hexdigest()
        for step in range(1, STEPS + 1):
            checkpoint = stage_dir / f"checkpoint-{step}"
            if not checkpoint.is_dir():
                with (Path(recipe.output_dir or "").parent / "work.log").open("a") as log:
                    log.write(f"{stage} {step} {weights}\n")
                weights = hashlib.sha256(weights.encode()).hexdigest()
                appear(checkpoint, weights)
            weights = (checkpoint / "weights").read_text()
        appear(final, weights)
    return {"train_loss": 1.0}


def appear(folder: Path, weights: str) -> None:
    """The folder with its files, under a temporary name first."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_text(temporary / "weights", weights)
    write_text(temporary / "config.json", "{}")
    seal(temporary, {})
    temporary.rename(folder)


def score(checkpoint: str, section: Any, out_dir: Path, **_: Any) -> dict[str, TaskResult]:
    """A score that depends on the weights."""
    weights = (Path(checkpoint) / "weights").read_text()
    result = TaskResult(
        task="gsm8k",
        checkpoint=checkpoint,
        suite=None,
        n=1,
        total=1,
        limit=None,
        partial=False,
        scores={"strict_match": Score(int(weights[:4], 16) / 16**4, None, 1)},
        settings={},
        generation={},
        chat_template={},
        first_prompt=None,
        seed=None,
        versions={"lm-eval": "none"},
        hardware={},
        processes=1,
        wall_s=0.0,
        new_tokens=0,
        tokens_per_second=None,
    )
    result.write(out_dir / "gsm8k.json")
    return {"gsm8k": result}


def state(run: Path) -> dict[str, str]:
    """Every file of a run and what is in it, but for what depends on the moment."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix(): path.read_text() for path in files}


def scenario(folder: Path, name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """What is done first, and what is then killed."""

    def run(learning_rate: float) -> Callable[[], None]:
        return lambda: pipeline.run_recipe(make_recipe(folder, learning_rate))

    def run_twice() -> None:
        run(1e-3)()
        run(1e-4)()

    def run_halfway() -> None:
        steps, pipeline_train = STEPS, stage_training._call_trainer

        def stopped(recipe: Recipe, folder: Any, stage: str, start: str | None) -> dict[str, float]:
            if stage == "dpo":
                globals()["STEPS"] = 1
                pipeline_train(recipe, folder, stage, start)
                shutil.rmtree(folder.stage_dir(stage) / "final")
                raise HymbaAlignError("stopped")
            return pipeline_train(recipe, folder, stage, start)

        stage_training._call_trainer = stopped
        try:
            run(1e-3)()
        except HymbaAlignError:
            globals()["STEPS"], stage_training._call_trainer = steps, pipeline_train

    return {
        "from nothing": (lambda: None, run(1e-3)),
        "with other inputs": (run(1e-3), run(1e-4)),
        "with other inputs over a stage that was interrupted": (run_halfway, run(1e-4)),
        "with inputs that had a result before": (run_twice, run(1e-3)),
    }[name]


def quiet(work: Callable[[], None]) -> Callable[[], None]:
    """The work, in a child, with nothing on the terminal but errors."""

    def run() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            work()

    return run


def main() -> None:
    folder, name, every = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    run_folder.environment = dict  # starts git
    pipeline.check_inputs = lambda recipe, *_, **__: check_run_folder(recipe) or {}
    stage_training._call_trainer = train
    hymba_align.eval.evaluate = score
    os.mkdir(folder / "imports")
    with contextlib.redirect_stdout(io.StringIO()):
        scenario(folder / "imports", "from nothing")[1]()  # children find everything imported
    before, work = map(quiet, scenario(folder, name))
    run, kept, worked = folder / "run", folder / "kept", folder / "work.log"

    def begin() -> None:
        shutil.rmtree(run, ignore_errors=True)
        worked.write_text("")
        if kept.exists():
            shutil.copytree(kept, run)

    assert in_child(before) == 0
    if run.exists():
        run.rename(kept)
    begin()
    operations = file_operations(work, [run], folder / "operations")
    wanted, steps = state(run), len(worked.read_text().splitlines())
    kills = [(number, False) for number in range(len(operations))]
    kills += [(number, True) for number, what in enumerate(operations) if what.startswith(f"{SYNC} ")]
    for number, torn in kills[::every]:
        begin()
        killed_at(work, [run], number, torn=torn)
        status = in_child(work)
        found = state(run) if run.exists() else {}
        differ = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        again = len(worked.read_text().splitlines()) - steps
        if status or differ or again > 1:
            print(
                f"{operations[number]}{', torn' * torn}: exit {status}, {differ} differ, {again} steps again",
                flush=True,
            )
    print(len(kills[::every]))


if __name__ == "__main__":
    main()
