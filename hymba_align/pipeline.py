"""A recipe's stages in order: score the base, SFT, score, DPO, score, report.

Every stage has a fingerprint of all that enters it (its section, its data's bytes, the base, the stage before it, this
package's version). A stage whose manifest carries that fingerprint as completed is skipped; one that was only started
with it resumes; any other starts afresh.

Several processes: this process plans, and starts each training stage through `accelerate launch` with the resolved
recipe in the run folder. Inside Slurm or torchrun, `sft` and `dpo` use the processes that are there: rank 0 keeps the
run folder, the others wait for it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hymba_align
from hymba_align.checkpoint import (
    RunFolder,
    base_config,
    check_is_hymba,
    check_run_folder,
    fingerprint,
    open_run,
    path_digest,
    read_json,
    run_root,
)
from hymba_align.errors import DataError, HymbaAlignError, RecipeError, RunFolderError, UsageError
from hymba_align.recipe import Recipe, Stage, TrainingStage, is_local_path, resolved_eval

if TYPE_CHECKING:
    from rich.console import Console

STARTED_BY_US = "HYMBA_ALIGN_LAUNCHED"
WAIT_FOR_RANK_0_S = 300.0
STOP_CHILDREN_S = 60.0


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
    """Runs every stage that is not done yet, then prints the scores and writes report.md.

    Raises:
        UsageError: the recipe or its files are at fault; whatever can be known before the first stage is raised there.
    """
    if _inside_launcher():
        raise UsageError(
            "'run' starts its processes itself (launch.num_processes); start it without torchrun or accelerate, "
            "or launch 'sft' and 'dpo' one by one"
        )
    steps = plan(recipe)
    _run_steps(recipe, steps, dry_run=dry_run)
    if dry_run or not recipe.scored_stages:
        return
    from hymba_align.eval.report import score_table, write_report

    root, console = run_root(recipe), _console()
    report = write_report(root)
    console.print(score_table(root), soft_wrap=False)
    console.print(f"Report: {report}")


def run_stage(recipe: Recipe, stage: TrainingStage, *, dry_run: bool = False) -> None:
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
        inputs = {
            "previous": previous,
            "section": getattr(recipe, stage).model_dump(mode="json", exclude={"data"}),
            "data": data.model_dump(mode="json"),
            "files": path_digest(data.path),
        }
        previous = fingerprint(inputs)
        steps.append(Step(stage, stage, data.path, start, previous))
        start = str(root / stage / "final")
        if stage in recipe.scored_stages:
            steps.append(_scoring_step(recipe, stage, start, previous))
    return steps


def _scoring_step(recipe: Recipe, stage: Stage, start: str | None, checkpoint: str) -> Step:
    section = resolved_eval(recipe)
    inputs = {
        "checkpoint": checkpoint,
        "section": section.model_dump(mode="json", exclude={"stages"}),
        "files": [path_digest(section.gsm8k.train_path), path_digest(section.gsm8k.test_path)],
    }
    data = ", ".join(f"{task}: {section.gsm8k.test_path or 'from the hub'}" for task in section.tasks)
    return Step(f"eval/{stage}", stage, data, start, fingerprint(inputs))


# --- Checks before the first stage ------------------------------------------------------------------------------------


def check_inputs(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Raises the UsageError of whatever can be found out about the recipe's inputs without running a stage."""
    from hymba_align.train.common import trainer_settings

    check_run_folder(recipe)
    for step in steps:
        if step.stage != "base" and step.trains:
            path = recipe.data_for(step.stage).path
            shared = recipe.data is not None and recipe.data.path == path
            _check_exists("data.path" if shared else f"{step.stage}.data.path", path)
    if any(not step.trains for step in steps):
        gsm8k = resolved_eval(recipe).gsm8k
        _check_exists("eval.gsm8k.test_path", gsm8k.test_path)
        _check_exists("eval.gsm8k.train_path", gsm8k.train_path)
    context = _checked_context(recipe)
    for stage in recipe.training_stages:
        trainer_settings(recipe, stage)
        max_length = getattr(recipe, stage).max_length
        if context is not None and max_length > context:
            raise RecipeError(f"{stage}.max_length is {max_length}, above the model's context of {context}; lower it")
    if recipe.launch.accelerate_config is not None:
        _check_accelerate_config(recipe.launch.accelerate_config)


def _check_exists(key: str, path: str | None) -> None:
    if path is not None and is_local_path(path) and not Path(path).exists():
        raise DataError(f"{key} is {path}, which does not exist (paths are relative to {Path.cwd().name}/); correct it")


def _checked_context(recipe: Recipe) -> int | None:
    """The base model's context in text tokens, after checking what of the base is here; None where it is on the hub."""
    from hymba_align.data.template import load_tokenizer

    base = recipe.base
    tokenizer = None
    if base.tokenizer is not None and is_local_path(base.tokenizer):
        tokenizer = load_tokenizer(base.tokenizer, chat_template=base.chat_template)
    if base.model is not None:
        if not is_local_path(base.model):
            return None
        check_is_hymba(base.model, base.revision)
        context = read_json(Path(base.model) / "config.json").get("max_position_embeddings")
        return context if isinstance(context, int) else None
    if tokenizer is None:
        return None
    return int(base_config(base, tokenizer).max_position_embeddings)


def _check_accelerate_config(path: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    if not Path(path).is_file():
        raise RecipeError(f"launch.accelerate_config is {path}, which does not exist; accelerate_configs/ holds some")
    try:
        config = load_config_from_file(path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"launch.accelerate_config {path} is not an accelerate configuration: {reason}") from error
    if config.num_machines > 1 and not _inside_launcher():
        raise RecipeError(
            f"launch.accelerate_config {path} names {config.num_machines} machines; start each of them with 'accelerate "
            f"launch --config_file {path} --machine_rank N -m hymba_align sft RECIPE' (then dpo)"
        )


# --- Running ----------------------------------------------------------------------------------------------------------


def _run_steps(recipe: Recipe, steps: Sequence[Step], *, dry_run: bool) -> None:
    check_inputs(recipe, steps)
    folder, console = RunFolder(run_root(recipe)), _console()
    _print_plan(recipe, folder, steps, console)
    if dry_run:
        console.print("Dry run: nothing was run and nothing was written.")
        return
    if _rank() == 0:
        open_run(recipe)
    for number, step in enumerate(steps, start=1):
        what = f"{step.stage.upper()}" if step.trains else f"Score {step.stage}"
        if folder.is_complete(step.name, step.fingerprint):
            console.print(f"[{number}/{len(steps)}] {what}: complete and unchanged, skipped", markup=False)
            continue
        console.print(f"[{number}/{len(steps)}] {what}", markup=False, style="bold")
        started = time.monotonic()
        if not step.trains:
            _score(recipe, folder, step)
        elif _needs_launch(recipe):
            _mark_started(folder, step, console)
            _launch(recipe, step)
        else:
            _train_here(recipe, folder, step, console)
        console.print(f"[{number}/{len(steps)}] {what}: done in {time.monotonic() - started:.0f} s", markup=False)


def _mark_started(folder: RunFolder, step: Step, console: Console) -> None:
    moved_to = folder.mark_started(step.name, step.fingerprint)
    if moved_to is not None:
        console.print(f"What entered {step.name} has changed; its earlier result is now in {moved_to}")


def _train_here(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    """Trains in this process, one of several when a launcher started it."""
    if _rank() == 0:
        _mark_started(folder, step, console)
    else:
        _wait_for_rank_0(folder, step)
    if not _inside_launcher():
        _use_one_gpu()
    metrics = _train(recipe, folder, step.stage, step.start)
    if _rank() == 0:
        folder.mark_complete(step.name, step.fingerprint, {"metrics": metrics})


def _train_as_worker(recipe: Recipe, stage: TrainingStage) -> None:
    """Trains as one of the processes that `_launch` started; the process that launched has checked and planned."""
    folder, started = RunFolder(run_root(recipe)), int(os.environ.get("WORLD_SIZE", "1"))
    if started != recipe.launch.num_processes:
        raise HymbaAlignError(
            f"launch.num_processes is {recipe.launch.num_processes}, but accelerate started {started} with "
            f"{recipe.launch.accelerate_config}; choose a file whose distributed_type can (MULTI_CPU cannot)"
        )
    before = recipe.training_stages[: recipe.training_stages.index(stage)]
    start = str(folder.root / before[-1] / "final") if before else None
    metrics = _train(recipe, folder, stage, start)
    if _rank() == 0:
        folder.mark_complete(stage, folder.read_manifest(stage)["started"], {"metrics": metrics})


def _train(recipe: Recipe, folder: RunFolder, stage: Stage, start: str | None) -> dict[str, float]:
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


# --- Processes --------------------------------------------------------------------------------------------------------


def launch_command(recipe: Recipe, stage: str) -> list[str]:
    """The command that starts a training stage with `launch.num_processes` processes."""
    return [
        "accelerate",
        "launch",
        "--config_file",
        str(recipe.launch.accelerate_config),
        "--num_processes",
        str(recipe.launch.num_processes),
        "-m",
        "hymba_align",
        stage,
        str(run_root(recipe) / "recipe.yaml"),
    ]


def _launch(recipe: Recipe, step: Step) -> None:
    """Runs a stage in processes of its own. Raises: HymbaAlignError with their exit code when they fail."""
    command = launch_command(recipe, step.name)
    # accelerate of this very interpreter, whatever `accelerate` the shell would find.
    command[:2] = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    with subprocess.Popen(command, env={**os.environ, STARTED_BY_US: "1"}) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal interrupted the whole group; killing the launcher at once would orphan its workers.
            process.wait(timeout=STOP_CHILDREN_S)
            raise
    if code != 0:
        error = HymbaAlignError(f"{step.name} failed in its processes (exit code {code}); their messages are above")
        error.exit_code = code if code > 0 else 128 - code
        raise error
    if not RunFolder(run_root(recipe)).is_complete(step.name, step.fingerprint):
        raise HymbaAlignError(f"{step.name} ended without a complete checkpoint; did its inputs change meanwhile?")


def _needs_launch(recipe: Recipe) -> bool:
    return recipe.launch.accelerate_config is not None and not _inside_launcher()


def _inside_launcher() -> bool:
    """Whether torchrun, accelerate or DeepSpeed started this process (clusters set WORLD_SIZE on their own)."""
    return "LOCAL_RANK" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if _inside_launcher() else 0


def _wait_for_rank_0(folder: RunFolder, step: Step) -> None:
    deadline = time.monotonic() + WAIT_FOR_RANK_0_S
    while not folder.is_started(step.name, step.fingerprint):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"rank {_rank()} waited {WAIT_FOR_RANK_0_S:.0f} s for rank 0 to start {step.name} in {folder.root}; "
                "set output_dir to a folder that all machines share"
            )
        time.sleep(0.2)


def _use_one_gpu() -> None:
    """Hides all GPUs but the first: transformers would wrap the model in DataParallel, which is not what one process means."""
    import torch

    if torch.cuda.device_count() > 1 and not torch.cuda.is_initialized():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


# --- Printing ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """The terminal; nothing from ranks other than 0."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=_rank() != 0)


def _print_plan(recipe: Recipe, folder: RunFolder, steps: Sequence[Step], console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"Plan of {recipe.name}, in {folder.root}", title_justify="left")
    for column in ("step", "data", "starts from", "writes to", "state"):
        table.add_column(column, overflow="fold")
    for step in steps:
        done = folder.is_complete(step.name, step.fingerprint)
        begun = step.trains and folder.is_started(step.name, step.fingerprint)
        table.add_row(
            step.stage if step.trains else f"score {step.stage}",
            step.data,
            str(Path(step.start).relative_to(folder.root)) if step.start else _base_name(recipe),
            f"{step.name}/final" if step.trains else step.name,
            "done" if done else "resumes" if begun else "to do",
        )
    console.print(table, soft_wrap=False)
    for step in steps:
        if step.trains and _needs_launch(recipe):
            console.print(f"{step.name} runs as: {shlex.join(launch_command(recipe, step.name))}", markup=False)


def _base_name(recipe: Recipe) -> str:
    base: Any = recipe.base
    if base.model is None:
        return "random weights"
    return f"{base.model} ({base.revision})" if base.revision else str(base.model)
