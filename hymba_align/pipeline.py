"""A recipe's stages in order: score the base, SFT, score, DPO, score, report.

Every stage has a fingerprint of all that enters it (its section, its data's bytes, the base, the stage before it, this
package's version). A stage whose manifest carries that fingerprint as completed is skipped; one that was only started
with it resumes; any other starts afresh, after what other inputs left has moved aside, from where it comes back when
they do. Nothing moves and nothing is written before all inputs were checked (checks.py).

Several processes: this process plans, and starts each training stage through `accelerate launch` with the resolved
recipe in the run folder. Inside Slurm or torchrun, `sft` and `dpo` use the processes that are there: rank 0 keeps the
run folder, the others wait for it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hymba_align
from hymba_align.checks import check_inputs
from hymba_align.errors import DataError, HymbaAlignError, RecipeError, RunFolderError, UsageError
from hymba_align.files import fingerprint, path_digest
from hymba_align.launch import (
    STARTED_BY_US,
    free_gpu_memory,
    inside_launcher,
    launch,
    launch_command,
    needs_launch,
    rank,
    use_one_gpu,
)
from hymba_align.recipe import DataSection, Recipe, Stage, TrainingStage, resolved_eval
from hymba_align.run_folder import RunFolder, open_run, run_root

if TYPE_CHECKING:
    from rich.console import Console

WAIT_FOR_RANK_0_S = 300.0

# Trainer settings that no weight depends on, so that changing one does not train again.
COSMETIC = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "project",
        "report_to",
        "run_name",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
    }
)


@dataclass(frozen=True)
class Step:
    """One unit of work: a training stage, or the scoring of one (`name` is then `eval/<stage>`)."""

    name: str
    stage: Stage
    data: str
    start: str | None
    """Checkpoint that the step reads; None for the recipe's base section."""
    fingerprint: str

    @property
    def trains(self) -> bool:
        return not self.name.startswith("eval/")


# --- What the commands call -------------------------------------------------------------------------------------------


def run_recipe(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Runs every stage that is not done yet, then writes report.md and prints the scores and where the model is.

    Raises:
        UsageError: the recipe or its files are at fault; whatever can be known before the first stage is raised there.
    """
    if inside_launcher():
        raise UsageError(
            "'run' starts its processes itself (launch.num_processes); start it without torchrun or accelerate, "
            "or launch 'sft' and 'dpo' one by one"
        )
    steps = plan(recipe)
    _run_steps(recipe, steps, dry_run=dry_run)
    if dry_run:
        return
    from hymba_align.eval.report import score_table, write_report

    root, console = run_root(recipe), _console()
    report = write_report(root)
    if recipe.scored_stages:
        console.print(score_table(root), soft_wrap=False)
    if recipe.training_stages:
        console.print(f"Model: {root / recipe.training_stages[-1] / 'final'}", markup=False)
    console.print(f"Report: {report}", markup=False)


def run_training_stage(recipe: Recipe, stage: TrainingStage, *, dry_run: bool = False) -> None:
    """Runs one training stage of a recipe, from the checkpoint of the stage before it.

    Raises:
        UsageError: as for `run_recipe`; also when the stage before it is not complete.
    """
    if stage not in recipe.training_stages:
        raise RecipeError(f"the recipe '{recipe.name}' has no section {stage}; add one, or run another stage")
    if os.environ.get(STARTED_BY_US):
        _train_as_worker(recipe, stage)
        return
    steps = [step for step in plan(recipe) if step.trains]
    index = [step.name for step in steps].index(stage)
    folder = RunFolder(run_root(recipe))
    for before in steps[:index]:
        if not dry_run and not folder.is_complete(before.name, before.fingerprint):
            raise RunFolderError(
                f"{stage} starts from {folder.root / before.name}, which is not complete for this recipe; "
                f"run 'hymba-align {before.name}' (or 'hymba-align run') first"
            )
    _run_steps(recipe, [steps[index]], dry_run=dry_run)


# --- Planning ---------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> list[Step]:
    """The recipe's steps in order, each with the fingerprint of all that enters it."""
    root = run_root(recipe)
    base = recipe.base
    previous = fingerprint(
        {
            "version": hymba_align.__version__,
            "seed": recipe.seed,
            "base": base.model_dump(mode="json"),
            "files": [path_digest(base.model), path_digest(base.tokenizer), path_digest(base.chat_template)],
        }
    )
    start: str | None = None
    steps = []
    if "base" in recipe.scored_stages:
        steps.append(_scoring_step(recipe, "base", start, previous))
    for stage in recipe.training_stages:
        data = recipe.data_for(stage)
        previous = fingerprint({"previous": previous, **_stage_inputs(recipe, stage)})
        steps.append(Step(stage, stage, ", ".join(source.path for source in data.all_sources), start, previous))
        start = str(root / stage / "final")
        if stage in recipe.scored_stages:
            steps.append(_scoring_step(recipe, stage, start, previous))
    return steps


def _stage_inputs(recipe: Recipe, stage: TrainingStage) -> dict[str, Any]:
    """What a training stage's weights depend on, besides the checkpoint that it starts from."""
    data, section = recipe.data_for(stage), getattr(recipe, stage)
    return {
        "section": section.model_dump(mode="json", exclude={"data": True, "trainer": COSMETIC}),
        "data": data.model_dump(mode="json", exclude={"workers"}),
        "contents": _contents(data),
        # The global batch, which is the one of all processes together.
        "launch": [recipe.launch.num_processes, path_digest(recipe.launch.accelerate_config)],
    }


def _contents(data: DataSection) -> list[str | None]:
    """Digests of the rows of every source, and of its converter; None for one that is not there.

    What is missing, or cannot be imported, is for check_inputs to report, which knows the key that names it.
    """
    from hymba_align.data.reading.converters import converter_digest
    from hymba_align.data.reading.sources import source_digest

    digests: list[str | None] = []
    for source in data.all_sources:
        try:
            converter = converter_digest(source.convert) if source.convert else None
            digests += [source_digest(source), converter]
        except DataError:
            digests.append(None)
    return digests


def _scoring_step(recipe: Recipe, stage: Stage, start: str | None, checkpoint: str) -> Step:
    section = resolved_eval(recipe)
    inputs = {
        "checkpoint": checkpoint,
        "section": section.model_dump(mode="json", exclude={"stages"}),
        "files": [path_digest(section.gsm8k.train_path), path_digest(section.gsm8k.test_path)],
    }
    data = ", ".join(f"{task}: {section.gsm8k.test_path or 'from the hub'}" for task in section.tasks)
    return Step(f"eval/{stage}", stage, data, start, fingerprint(inputs))


# --- Running ----------------------------------------------------------------------------------------------------------


def _run_steps(recipe: Recipe, steps: Sequence[Step], *, dry_run: bool) -> None:
    if not inside_launcher() and not needs_launch(recipe):
        use_one_gpu()
    folder, console = RunFolder(run_root(recipe)), _console()
    waiting = [step for step in steps if not folder.is_complete(step.name, step.fingerprint)]
    stages = [step.stage for step in waiting if step.trains and step.stage != "base"]
    check_inputs(recipe, stages, scores=any(not step.trains for step in waiting), ask_hub=bool(waiting) and not dry_run)
    _print_plan(recipe, folder, steps, console)
    if dry_run:
        console.print("Dry run: nothing was run and nothing was written.")
        return
    if rank() == 0:
        open_run(recipe)
    for number, step in enumerate(steps, start=1):
        what = f"[{number}/{len(steps)}] {step.stage.upper() if step.trains else f'Score {step.stage}'}"
        if step.trains and rank() == 0:
            _restore(folder, step, console)
        if folder.is_complete(step.name, step.fingerprint):
            console.print(f"{what}: complete and unchanged, skipped", markup=False)
            continue
        console.print(what, markup=False, style="bold")
        started = time.monotonic()
        _run_step(recipe, folder, step, console)
        console.print(f"{what}: done in {time.monotonic() - started:.0f} s", markup=False)


def _restore(folder: RunFolder, step: Step, console: Console) -> None:
    found = folder.restore(step.name, step.fingerprint)
    if found is not None:
        console.print(f"{step.name}: these inputs had a result in {found}, which is back in its place")


def _run_step(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    if not step.trains:
        _score(recipe, folder, step)
    elif not needs_launch(recipe):
        _train_here(recipe, folder, step, console)
    else:
        _mark_started(folder, step, console)
        free_gpu_memory()
        launch(recipe, step.name)
        if not folder.is_complete(step.name, step.fingerprint):
            raise HymbaAlignError(f"{step.name} ended without a complete checkpoint; did its inputs change meanwhile?")


def _mark_started(folder: RunFolder, step: Step, console: Console) -> None:
    moved_to = folder.mark_started(step.name, step.fingerprint)
    if moved_to is not None:
        console.print(f"What entered {step.name} has changed; its earlier result is now in {moved_to}")


def _train_here(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    """Trains in this process, one of several when a launcher started it."""
    if rank() == 0:
        _mark_started(folder, step, console)
    else:
        _wait_for_rank_0(folder, step)
        if folder.is_complete(step.name, step.fingerprint):  # rank 0 had it aside
            return
    assert step.stage != "base", "nothing trains the base"
    metrics = _call_trainer(recipe, folder, step.stage, step.start)
    if rank() == 0:
        _finish(recipe, folder, step.stage, step.fingerprint, metrics)


def _wait_for_rank_0(folder: RunFolder, step: Step) -> None:
    deadline = time.monotonic() + WAIT_FOR_RANK_0_S
    while not folder.is_started(step.name, step.fingerprint):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"rank {rank()} waited {WAIT_FOR_RANK_0_S:.0f} s for rank 0 to start {step.name} in {folder.root}; "
                "set output_dir to a folder that all machines share"
            )
        time.sleep(0.2)


def _train_as_worker(recipe: Recipe, stage: TrainingStage) -> None:
    """Trains as one of the processes that `launch` started; the process that launched has checked and planned."""
    folder, started = RunFolder(run_root(recipe)), int(os.environ.get("WORLD_SIZE", "1"))
    if started != recipe.launch.num_processes:
        raise HymbaAlignError(
            f"launch.num_processes is {recipe.launch.num_processes}, but accelerate started {started} with "
            f"{recipe.launch.accelerate_config}; choose a file whose distributed_type can (MULTI_CPU cannot)"
        )
    before = recipe.training_stages[: recipe.training_stages.index(stage)]
    start = str(folder.root / before[-1] / "final") if before else None
    metrics = _call_trainer(recipe, folder, stage, start)
    if rank() == 0:
        _finish(recipe, folder, stage, folder.read_manifest(stage)["started"], metrics)


def _finish(recipe: Recipe, folder: RunFolder, stage: TrainingStage, inputs: str, metrics: Mapping[str, float]) -> None:
    """Records that a training stage is complete; only then may its checkpoints go."""
    from hymba_align.train.stage_run import remove_checkpoints

    folder.mark_complete(stage, inputs, {"metrics": metrics})
    remove_checkpoints(recipe, stage, folder.stage_dir(stage))


def _call_trainer(recipe: Recipe, folder: RunFolder, stage: TrainingStage, start: str | None) -> dict[str, float]:
    if stage == "sft":
        from hymba_align.train.sft import train_sft

        return train_sft(recipe, start, folder.stage_dir(stage))
    from hymba_align.train.dpo import train_dpo

    return train_dpo(recipe, start, folder.stage_dir(stage))


def _score(recipe: Recipe, folder: RunFolder, step: Step) -> None:
    from hymba_align.eval import evaluate

    section = resolved_eval(recipe)
    checkpoint = step.start if step.start is not None else _base_checkpoint(recipe, folder)
    folder.mark_started(step.name, step.fingerprint)
    results = evaluate(checkpoint, section, folder.stage_dir(step.name), chat_template=recipe.base.chat_template)
    outputs = tuple(f"{task}.json" for task in results)
    folder.mark_complete(step.name, step.fingerprint, {"checkpoint": checkpoint}, outputs)


def _base_checkpoint(recipe: Recipe, folder: RunFolder) -> str:
    """A checkpoint of the base section: the one it names, or base/final in the run folder where it names none.

    Random weights have no checkpoint yet; and one at a revision, or with another tokenizer, must be scored as such.
    """
    base = recipe.base
    if base.model is not None and base.tokenizer is None and base.revision is None:
        return base.model
    from hymba_align.train.common import load_start, load_start_tokenizer

    final = folder.stage_dir("base") / "final"
    tokenizer = load_start_tokenizer(recipe, None)
    load_start(recipe, None, tokenizer).save_pretrained(final)
    tokenizer.save_pretrained(final)
    return str(final)


# --- Printing ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """The terminal; nothing from ranks other than 0."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=rank() != 0)


def _print_plan(recipe: Recipe, folder: RunFolder, steps: Sequence[Step], console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"Plan of {recipe.name}, in {folder.root}", title_justify="left")
    for column in ("step", "data", "starts from", "writes to", "state"):
        table.add_column(column, overflow="fold")
    for step in steps:
        done = folder.is_complete(step.name, step.fingerprint)
        begun = step.trains and folder.is_started(step.name, step.fingerprint)
        aside = folder.find_aside(step.name, step.fingerprint) if step.trains else None
        table.add_row(
            step.stage if step.trains else f"score {step.stage}",
            step.data,
            str(Path(step.start).relative_to(folder.root)) if step.start else _base_name(recipe),
            f"{step.name}/final" if step.trains else step.name,
            "done" if done else "resumes" if begun else f"back from {aside.name}" if aside else "to do",
        )
    console.print(table, soft_wrap=False)
    for step in steps:
        if step.trains and needs_launch(recipe):
            console.print(f"{step.name} runs as: {shlex.join(launch_command(recipe, step.name))}", markup=False)


def _base_name(recipe: Recipe) -> str:
    base: Any = recipe.base
    if base.model is None:
        return "random weights"
    return f"{base.model} ({base.revision})" if base.revision else str(base.model)
