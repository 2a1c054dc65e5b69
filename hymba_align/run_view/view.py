"""A run folder as a whole: how far each step is, settings, data, numbers, scores, costs, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_align.eval.report import cost
from hymba_align.eval.report.charts import Point
from hymba_align.eval.report.contents import TRAINING_STAGES, Run, read_run
from hymba_align.eval.report.plain import plain_result
from hymba_align.run.lock import Holder
from hymba_align.run_view.progress import Progress, checkpoint_steps, progress_of

CURVES = (
    ("loss", "loss"),
    ("eval_loss", "validation loss"),
    ("rewards/margins", "reward margin"),
    ("eval_rewards/margins", "validation reward margin"),
    ("eval_answers/exact", "held-out problems answered rightly"),
)
"""Keys of records that are shown over the steps, and what they are called"""
DEFAULTS: Mapping[str, Any] = {"learning_rate": None, "num_train_epochs": 3, "max_steps": -1}
SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of a trainer that are shown where the recipe has them"""


@dataclass(frozen=True)
class RunView:
    """What there is to show of a run folder at this moment."""

    run: Run
    steps: tuple[Progress, ...]
    holder: Holder | None
    settings: dict[str, str]
    curves: dict[str, dict[str, list[Point]]]
    """By stage and key of `CURVES`: finite values over the steps"""
    checkpoints: tuple[Path, ...]
    next: tuple[tuple[str, str], ...]
    """What could be done now, in words, and the command"""

    @property
    def is_running(self) -> bool:
        """Whether a process holds the run at this moment."""
        return self.holder is not None

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong with the folder, in words."""
        damaged = [f"{step.title}: {step.detail}" for step in self.steps if step.state == "damaged"]
        lacking = (
            [] if self.run.recipe else ["recipe.yaml is missing or cannot be read, so what was asked for is not known"]
        )
        return [*lacking, *damaged, *self.run.notices]


def view_run(root: Path) -> RunView:
    """What the folder holds now; what cannot be read is among its `problems`."""
    run = read_run(root)
    steps, at_work = progress_of(run)
    curves = {stage: curves_of(run.metrics[stage]) for stage in TRAINING_STAGES if run.metrics[stage]}
    return RunView(
        run, tuple(steps), at_work, settings_of(run.recipe), curves, _checkpoints(root), _next(run, steps, at_work)
    )


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Finite values over the steps, by key of `CURVES`; only those that there are."""
    found = {key: [_point(record, key) for record in records if _is_finite(record.get(key))] for key, _ in CURVES}
    return {key: points for key, points in found.items() if points}


def _point(record: Mapping[str, Any], key: str) -> Point:
    return float(record["step"]), float(record[key])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def settings_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The few settings that tell runs apart, in words by name, such as `sft`: `max_length 512, learning_rate 5e-05`."""
    settings = {}
    base = recipe.get("base")
    if isinstance(base, dict):
        revision = f" ({base['revision']})" if base.get("revision") else ""
        name = f"{base['model']}{revision}" if base.get("model") else "random weights"
        settings["base"] = f"{name}, {base['dtype']}" if base.get("dtype") else name
    for stage in TRAINING_STAGES:
        section = recipe.get(stage)
        if isinstance(section, dict):
            settings[stage.upper()] = _of_stage(section)
    lora, launch = recipe.get("lora"), recipe.get("launch")
    if isinstance(lora, dict):
        settings["adapters"] = ", ".join(
            f"{key} {_word(value)}" for key, value in lora.items() if value not in (None, False)
        )
    if isinstance(launch, dict) and launch.get("num_processes") not in (None, 1):
        settings["processes"] = f"{launch['num_processes']}, {launch.get('launcher') or 'ddp'}"
    if recipe.get("seed") is not None:
        settings["seed"] = str(recipe["seed"])
    return settings


def _of_stage(section: Mapping[str, Any]) -> str:
    trainer = section.get("trainer")
    given = trainer if isinstance(trainer, dict) else {}
    shown = [f"{key} {_word(given[key])}" for key in SHOWN if key in given]
    length = [f"max_length {section['max_length']}"] if section.get("max_length") else []
    return ", ".join([*length, *shown, *([f"beta {given['beta']}"] if "beta" in given else [])])


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _checkpoints(root: Path) -> tuple[Path, ...]:
    """Every folder that another command can load, or a stage can continue from."""
    finals = [root / stage / "final" for stage in ("base", *TRAINING_STAGES)]
    whole = [path for path in finals if (path / "config.json").is_file() or (path / "adapter_config.json").is_file()]
    return (*whole, *(path for stage in TRAINING_STAGES for path in checkpoint_steps(root / stage)))


def _next(run: Run, steps: Sequence[Progress], at_work: Holder | None) -> tuple[tuple[str, str], ...]:
    if at_work is not None:
        return (("watch it", shlex.join(["hymba-align", "show", str(run.root), "--follow"])),)
    waiting = [step for step in steps if step.state != "done"]
    if waiting and run.recipe:
        verb = "continue" if any(step.state != "to do" for step in waiting) else "begin"
        return ((verb, shlex.join(_run_command(run))),)
    trained = [stage for stage in TRAINING_STAGES if any(step.name == stage and step.state == "done" for step in steps)]
    if not trained:
        return ()
    talk = ("talk to it", shlex.join(["hymba-align", "chat", str(run.root / trained[-1] / "final")]))
    report = run.root / "report.html"
    return (talk, ("read its report", str(report))) if report.is_file() else (talk,)


def _run_command(run: Run) -> list[str]:
    """What continues the run, from the recipe that it was begun with."""
    words = ["hymba-align", "run", str(run.root / "recipe.yaml")]
    wanted = run.recipe.get("output_dir") or str(Path("runs") / str(run.recipe.get("name")))
    return words if Path(str(wanted)) == run.root else [*words, f"output_dir={run.root}"]


def plain_view(view: RunView) -> dict[str, Any]:
    """The view as plain values, for --json; the keys are what docs/commands/show.md says."""
    run, at_work = view.run, view.holder
    return {
        "name": run.name,
        "folder": str(run.root),
        "steps": [
            {"step": step.name, "state": step.state, "at": step.step, "of": step.max_steps, "detail": step.detail}
            for step in view.steps
        ],
        "holder": None if at_work is None else {"pid": at_work.pid, "host": at_work.host, "since": at_work.since},
        "problems": view.problems,
        "recipe": run.recipe,
        "environment": run.environment,
        "data": run.data,
        "training": {
            stage: {"last": run.metrics[stage][-1], "curves": curves, "cost": cost.of_training(run.metrics[stage])}
            for stage, curves in view.curves.items()
        },
        "scores": {
            stage: {scored.task: plain_result(scored.result) for scored in run.scored if scored.stage == stage}
            for stage in dict.fromkeys(scored.stage for scored in run.scored)
        },
        "inspections": {
            found.stage: {
                "page": str(run.root / found.page),
                "findings": [{"text": text, "sign": sign} for text, sign in found.findings],
                "table": [list(found.head), *map(list, found.rows)],
                "seconds": found.seconds,
            }
            for found in run.inspected
        },
        "checkpoints": [str(path) for path in view.checkpoints],
        "next": [{"what": what, "command": command} for what, command in view.next],
    }
