"""How far each step of a run is, from what its folder holds: nothing is written, and no lock is taken."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hymba_align.eval.report.contents import STAGE_NAMES, STAGES, TRAINING_STAGES, Run
from hymba_align.eval.report.words import duration
from hymba_align.files import read_json
from hymba_align.run import manifest as sealed
from hymba_align.run.folder import RunFolder
from hymba_align.run.lock import Holder, holder
from hymba_align.run.metrics import METRICS_FILE

WORDS = {"eval": "score", "inspect": "inspect"}
"""What is done with a stage, by the folder that has it"""
State = Literal["done", "running", "interrupted", "to do", "damaged"]


@dataclass(frozen=True)
class Progress:
    """How far a step is: `sft`, `dpo`, the scoring of a stage, `eval/<stage>`, or the look inside it, `inspect/<stage>`."""

    name: str
    state: State
    detail: str
    """In words, what else there is to say"""
    step: int | None = None
    """The last that was logged, of `max_steps`"""
    max_steps: int | None = None

    @property
    def title(self) -> str:
        """`train SFT`, `score base`, `inspect after DPO`."""
        kind, _, stage = self.name.rpartition("/")
        return f"{WORDS[kind]} {STAGE_NAMES[stage]}" if kind else f"train {stage.upper()}"


def progress_of(run: Run) -> tuple[list[Progress], Holder | None]:
    """Every step of the recipe, and those that the folder holds besides, in order; and which process works in it now."""
    at_work = holder(run.root)
    steps = [_step(run, name) for name in _names(run)]
    if at_work is not None:
        begun = [number for number, step in enumerate(steps) if step.state == "interrupted"]
        waiting = [number for number, step in enumerate(steps) if step.state == "to do"]
        for number in (begun or waiting)[:1]:
            steps[number] = _running(run, steps[number])
    return steps, at_work


def _names(run: Run) -> list[str]:
    """Names of the steps that the recipe has or the folder shows, in the order in which they run."""
    section = run.recipe.get("eval")
    wanted = section.get("stages") if isinstance(section, dict) else None
    inspected = _inspected_stages(run)
    names = []
    for stage in STAGES:
        trains = stage in TRAINING_STAGES and (isinstance(run.recipe.get(stage), dict) or (run.root / stage).is_dir())
        asked = isinstance(section, dict) and (
            stage in wanted if isinstance(wanted, list) else trains or stage == "base"
        )
        scored = (run.root / f"eval/{stage}.manifest.json").is_file()
        looked = stage in inspected or (run.root / f"inspect/{stage}.manifest.json").is_file()
        names += [stage] if trains else []
        names += [f"eval/{stage}"] if asked or scored else []
        names += [f"inspect/{stage}"] if looked else []
    return names


def _inspected_stages(run: Run) -> Sequence[str]:
    """Stages that the recipe asks to inspect: those it names, else the last that is trained."""
    section = run.recipe.get("inspect")
    if not isinstance(section, dict):
        return ()
    wanted = section.get("stages")
    if isinstance(wanted, list):
        return wanted
    return ("base", *(stage for stage in TRAINING_STAGES if isinstance(run.recipe.get(stage), dict)))[-1:]


def _step(run: Run, name: str) -> Progress:
    folder = RunFolder(run.root)
    manifest, path = folder.read_manifest(name), folder.manifest_path(name)
    if not manifest and path.is_file():
        return Progress(name, "damaged", f"{path.relative_to(run.root)} is not JSON; the same command makes it again")
    step, max_steps = _steps(run, name, manifest)
    if "completed" in manifest:
        lost = _what_is_lost(run.root / name, manifest)
        if lost is not None:
            return Progress(name, "damaged", lost, step, max_steps)
        return Progress(name, "done", _done(run, name, manifest), step, max_steps)
    begun = bool(manifest) or step is not None
    if not begun:
        return Progress(name, "to do", "")
    return Progress(name, "interrupted", _where(run.root / name, step, max_steps), step, max_steps)


def _running(run: Run, step: Progress) -> Progress:
    """The step that the process in the folder works at, with when it last logged."""
    file = run.root / step.name / METRICS_FILE
    logged = f", logged {_ago(file)}" if step.step is not None and file.is_file() else ""
    words = (
        f"step {step.step:,}{_of(step.max_steps)}{logged}" if step.step is not None else _answers(run.root / step.name)
    )
    return Progress(step.name, "running", words, step.step, step.max_steps)


def _what_is_lost(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What a finished step's folder lacks, in words; None where sizes of files are as they were written."""
    outputs = manifest.get("outputs")
    for name in outputs if isinstance(outputs, list) else ():
        if not (folder / str(name)).exists():
            return f"{folder.name}/{name} is gone; the same command makes it again"
    content, again = (
        sealed.read_manifest(folder / "final"),
        f"remove {folder}/final, and the same command makes it again",
    )
    for name, record in content["files"].items() if content is not None else ():
        file = folder / "final" / name
        if not file.is_file():
            return f"{folder.name}/final/{name} is gone; {again}"
        if isinstance(record, dict) and file.stat().st_size != record.get("bytes"):
            return f"{folder.name}/final/{name} has {file.stat().st_size:,} bytes instead of {record.get('bytes')}; {again}"
    return None


def _done(run: Run, name: str, manifest: Mapping[str, Any]) -> str:
    if name.startswith("eval/"):
        tasks = [scored for scored in run.scored if f"eval/{scored.stage}" == name]
        return f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"
    if name.startswith("inspect/"):
        found = [one.seconds for one in run.inspected if f"inspect/{one.stage}" == name and one.seconds is not None]
        return duration(found[0]) if found else ""
    metrics = _metrics(manifest)
    seconds = metrics.get("total_runtime_s", metrics.get("runtime_s"))
    steps = [f"{int(metrics['steps']):,} steps"] if "steps" in metrics else []
    return ", ".join([*steps, *([duration(seconds)] if seconds is not None else [])])


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a training stage's summary."""
    details = manifest.get("details")
    found = details.get("metrics") if isinstance(details, dict) else None
    numbers = found if isinstance(found, dict) else {}
    return {key: value for key, value in numbers.items() if isinstance(value, (int, float))}


def _where(folder: Path, step: int | None, max_steps: int | None) -> str:
    """Where an interrupted step stopped, and where it goes on."""
    if "eval" in folder.parts[-2:-1]:
        return _answers(folder)
    if "inspect" in folder.parts[-2:-1]:
        return "begins anew"
    checkpoints = checkpoint_steps(folder)
    goes_on = f"continues from {checkpoints[-1].name}" if checkpoints else "begins anew: it left no checkpoint"
    return f"step {step:,}{_of(max_steps)}; {goes_on}" if step is not None else goes_on


def _of(max_steps: int | None) -> str:
    return f" of {max_steps:,}" if max_steps is not None else ""


def _answers(folder: Path) -> str:
    """How many answers a scoring has so far."""
    count = 0
    for path in folder.glob("*.answers-*.jsonl"):
        with path.open("rb") as file:
            count += sum(1 for _ in file)
    return f"{count:,} answers so far" if count else ""


def checkpoint_steps(folder: Path) -> list[Path]:
    """A stage's checkpoint-N, in the order of N."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _steps(run: Run, name: str, manifest: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The last step that a training stage logged, and how many it has in all, as far as the folder says."""
    records: Sequence[Mapping[str, Any]] = run.metrics.get(name, ())
    step = max((record["step"] for record in records), default=None)
    metrics = _metrics(manifest)
    if "steps" in metrics:
        return int(metrics["steps"]), int(metrics["steps"])
    if step is None:
        return None, None
    trainer = run.section(name).get("trainer")
    wanted = trainer.get("max_steps") if isinstance(trainer, dict) else None
    if isinstance(wanted, int) and wanted > 0:
        return step, wanted
    for checkpoint in reversed(checkpoint_steps(run.root / name)):
        try:
            return step, int(read_json(checkpoint / "trainer_state.json")["max_steps"])
        except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError):
            continue
    return step, _from_epochs(records[-1], trainer if isinstance(trainer, dict) else {})


def _from_epochs(record: Mapping[str, Any], trainer: Mapping[str, Any]) -> int | None:
    """All steps of a stage, from how many its last record had made of how much of an epoch."""
    epochs, done = trainer.get("num_train_epochs", 3), record.get("epoch")
    if not isinstance(epochs, (int, float)) or not isinstance(done, (int, float)) or done <= 0:
        return None
    return max(int(record["step"]), round(record["step"] / done * epochs))


def _ago(file: Path) -> str:
    return f"{duration(max(0.0, time.time() - file.stat().st_mtime))} ago"
