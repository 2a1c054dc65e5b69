"""A recipe's stages in order: score the base, SFT, score, DPO, score, look inside, report.

Every stage has a fingerprint of all that enters it (its section, its data's bytes, the base, the stage before it, this
package's version). A stage whose manifest carries that fingerprint as completed is skipped; one that was only started
with it resumes; any other starts afresh, after what other inputs left has moved aside, from where it comes back when
they do. Nothing moves and nothing is written before all inputs were checked (checks.py).

Several processes: this process plans, and starts those of each training stage (stage_training.py) with the resolved
recipe in the run folder. Inside Slurm or torchrun, `sft` and `dpo` use the processes that are there.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align import evaluation, progress
from hymba_align.adapters import has_plain_base
from hymba_align.checks import check_inputs, check_sources
from hymba_align.errors import ChangedDataError, Faults, RecipeError, RunFolderError, UsageError
from hymba_align.plan import Step, base_fingerprint, file_contents, plan
from hymba_align.plan_printing import needed_first, planned, print_guards, print_plan
from hymba_align.processes import signals
from hymba_align.processes.launch import (
    check_devices,
    inside_launcher,
    needs_launch,
    rank,
    scoring_processes,
    started_by_us,
    use_one_gpu,
    use_what_is_there,
)
from hymba_align.processes.slurm import slurm_step
from hymba_align.progress import Later, Place
from hymba_align.recipe import Recipe, TrainingStage, resolved_eval
from hymba_align.recipe_eval import EvalSection, Stage
from hymba_align.run.folder import RunFolder, open_run, run_root
from hymba_align.run.lock import check_free, held
from hymba_align.run.manifest import check_whole
from hymba_align.run.metrics import read_metrics
from hymba_align.run.storage import writing
from hymba_align.stage_training import remove_leftover_checkpoints, train_as_worker, train_step
from hymba_align.terminal import open_console, print_table, print_text

if TYPE_CHECKING:
    from rich.console import Console

# --- What the commands call -------------------------------------------------------------------------------------------


def run_recipe(recipe: Recipe, *, dry_run: bool = False) -> dict[str, Any]:
    """Runs every stage that is not done yet, then writes report.md and prints the scores and where the model is.

    Returns: the plan that it began with (plan_printing.planned).
    Raises:
        UsageError: the recipe or its files are at fault; whatever can be known before the first stage is raised there.
    """
    if inside_launcher() or slurm_step() is not None:
        raise UsageError(
            "'run' starts its processes itself (launch.num_processes), and is one process; start it without torchrun, "
            "accelerate or srun, or start 'sft' and 'dpo' with them, and 'run' afterwards, which scores what they made"
        )
    signals.allow(recipe.launch.grace_s)
    root, console = run_root(recipe), _console()
    if not dry_run:
        check_free(root)
    with contextlib.ExitStack() as stack:
        begun = _begin(recipe, steps := _plan(recipe), stack, dry_run=dry_run)
        if dry_run:
            return begun
        _run_steps(recipe, steps, begun["planned_tokens"])
        from hymba_align.eval.report import score_table, write_report

        report = write_report(root)
    if recipe.scored_stages:
        print_table(console, score_table(root))
    if recipe.training_stages:
        print_text(console, f"Model: {root / recipe.training_stages[-1] / 'final'}")
    for stage in recipe.inspected_stages:
        print_text(console, f"Inside: {root / 'inspect' / stage / 'inspect.html'}")
    print_text(console, f"Report: {report.with_name('report.html')} and {report.name}")
    console.print(f"Next: {shlex.join(['hymba-align', 'show', str(root)])}", markup=False)  # whole, to be copied
    return begun


def run_training_stage(recipe: Recipe, stage: TrainingStage, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Runs one training stage of a recipe, from the checkpoint of the stage before it.

    Returns: the plan that it began with; None in processes that a command of ours has started.
    Raises:
        UsageError: as for `run_recipe`; also when the stage before it is not complete.
    """
    if stage not in recipe.training_stages:
        raise RecipeError(f"the recipe '{recipe.name}' has no section {stage}; add one, or run another stage")
    signals.allow(recipe.launch.grace_s)
    recipe = use_what_is_there(recipe)
    if started_by_us():
        train_as_worker(recipe, stage)
        return None
    root = run_root(recipe)
    if rank() == 0 and not dry_run:
        check_free(root)
    steps = [
        step for step in plan(recipe.model_copy(update={"inspect": None})) if step.trains
    ]  # its data is not read here
    index = [step.name for step in steps].index(stage)
    folder = RunFolder(run_root(recipe))
    for before in steps[:index]:
        if not dry_run and not folder.is_complete(before.name, before.fingerprint):
            raise RunFolderError(
                f"{stage} starts from {folder.root / before.name}, which is not complete for this recipe; "
                f"run 'hymba-align {before.name}' (or 'hymba-align run') first"
            )
    with contextlib.ExitStack() as stack:
        begun = _begin(recipe, [steps[index]], stack, dry_run=dry_run, before=steps[:index])
        if dry_run:
            return begun
        _run_steps(recipe, [steps[index]], begun["planned_tokens"])
        if rank() == 0 and (root / "report.md").is_file():
            from hymba_align.eval.report import write_report

            write_report(root)  # the one that is there tells of what was trained before
    return begun


# --- Running ----------------------------------------------------------------------------------------------------------


def _begin(
    recipe: Recipe, steps: Sequence[Step], stack: contextlib.ExitStack, *, dry_run: bool, before: Sequence[Step] = ()
) -> dict[str, Any]:
    """Checks the inputs and prints the plan; unless that is all, holds the run folder until `stack` is closed.

    Args:
        before: steps that have to be complete and are not run.
    Returns: the plan.
    """
    if not inside_launcher() and not needs_launch(recipe):
        use_one_gpu()
    folder, console = RunFolder(run_root(recipe)), _console()
    waiting = [step for step in steps if not folder.is_complete(step.name, step.fingerprint)]
    stages, ask_hub = _trained(waiting), bool(waiting) and not dry_run
    tokens = check_inputs(recipe, stages, scores=_scores(waiting), ask_hub=ask_hub)
    for inspected in (step.stage for step in waiting if step.kind == "inspect"):
        from hymba_align.inside.of_recipe import check_inspection

        check_inspection(recipe, inspected, ask_hub=ask_hub)
    if stages and not dry_run and needs_launch(recipe):
        check_devices(recipe)
    begun = {**planned(recipe, folder, steps, before), "planned_tokens": tokens}
    print_plan(begun, console)
    if dry_run:
        begun["needed_first"] = needed_first(recipe, waiting)
        print_guards(begun, console)
        for line in begun["needed_first"]:
            print_text(console, line, style="bold")
        print_text(console, "Dry run: nothing was run and nothing was written.")
        return begun
    if rank() == 0:
        stack.enter_context(held(folder.root))
        open_run(recipe)
    stack.enter_context(writing(folder.root))
    return begun


def _plan(recipe: Recipe) -> list[Step]:
    """The plan. Raises, beside that a look inside has nothing to read, what is wrong with the other steps' inputs."""
    faults = Faults()
    try:
        return plan(recipe)
    except UsageError as error:
        faults.errors.append(error)
    rest = recipe.model_copy(update={"inspect": None})
    check_sources(rest, rest.training_stages)
    with faults.gathered():
        folder = RunFolder(run_root(rest))
        waiting = [step for step in plan(rest) if not folder.is_complete(step.name, step.fingerprint)]
        check_inputs(rest, _trained(waiting), scores=_scores(waiting), ask_hub=False, whole=False)
    raise faults.together()


def _trained(steps: Sequence[Step]) -> list[TrainingStage]:
    return [step.stage for step in steps if step.trains and step.stage != "base"]


def _scores(steps: Sequence[Step]) -> bool:
    return any(step.kind == "score" for step in steps)


def _left_out(folder: RunFolder, step: Step) -> str:
    """Words about batches that a complete stage's guard left out; the guard may be another one by now."""
    left_out = sum("skipped_rows" in record for record in read_metrics(folder.root / step.name)) if step.trains else 0
    batches = f"{left_out:,} batch{'' if left_out == 1 else 'es'}"
    return f" (its training left out {batches}: {step.name}/bad_batch.json)" if left_out else ""


def _run_steps(recipe: Recipe, steps: Sequence[Step], tokens: Mapping[str, int]) -> None:
    """Runs what is not complete.

    Args:
        tokens: about how many each training stage trains on, as far as that is known; the progress tells from it when the
            run ends.
    """
    folder, console = RunFolder(run_root(recipe)), _console()
    _write_base_of_adapters(recipe, folder, steps)
    took_s: dict[str, float] = {}  # that scoring one stage, and looking inside it, took
    for number, step in enumerate(steps, start=1):
        signals.raise_if_requested()
        words = step.stage.upper() if step.trains else step.title.capitalize()
        what = f"[{number}/{len(steps)}] {words}"
        if step.trains and rank() == 0:
            _restore(folder, step, console)
        if folder.is_complete(step.name, step.fingerprint):
            if step.trains and rank() == 0:
                remove_leftover_checkpoints(recipe, folder, step.stage)
            print_text(console, f"{what}: complete and unchanged, skipped{_left_out(folder, step)}")
            continue
        print_text(console, what, style="bold")
        started = time.monotonic()
        later = [one for one in steps[number:] if not folder.is_complete(one.name, one.fingerprint)]
        known = [_known(one, tokens, took_s) for one in later]
        with progress.at(Place(number, len(steps), "" if step.trains else step.title, tuple(known))):
            _run_step(recipe, folder, step, console)
        took_s[step.kind] = time.monotonic() - started
        print_text(console, f"{what}: done in {took_s[step.kind]:.0f} s")


def _known(step: Step, tokens: Mapping[str, int], took_s: Mapping[str, float]) -> Later:
    """What the progress can tell of a step that is still to come."""
    if not step.trains:
        return Later(seconds=took_s.get(step.kind))
    return Later(tokens.get(step.stage), at_least=step.stage == "dpo")  # its reference is on top


def _restore(folder: RunFolder, step: Step, console: Console) -> None:
    found = folder.restore(step.name, step.fingerprint)
    if found is not None:
        print_text(console, f"{step.name}: these inputs had a result in {found}, which is back in its place")


def _run_step(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    if step.start is not None and rank() == 0:
        check_whole(Path(step.start), f"'hymba-align run' makes {step.start} again")
    if step.kind == "score":
        _score(recipe, folder, step, console)
    elif step.kind == "inspect":
        _inspect(recipe, folder, step, console)
    else:
        train_step(recipe, folder, step, console)


def _score(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    """Scores a stage; tasks whose own inputs are unchanged keep their results, whatever else changed."""
    from hymba_align.data.unchanged import changed

    section = resolved_eval(recipe)
    section = section.model_copy(update={"num_processes": scoring_processes(recipe)})
    checkpoint = step.start if step.start is not None else _base_checkpoint(recipe, folder)
    folder.mark_started(step.name, step.fingerprint)
    _set_aside_other_tasks(folder.stage_dir(step.name), section, console)
    results = evaluation.score(
        checkpoint,
        section,
        folder.stage_dir(step.name),
        chat_template=recipe.base.chat_template,
        say=partial(print_text, console),
    )
    for (name, begun_with), (_, digest) in zip(step.contents, file_contents(section), strict=True):
        if digest != begun_with:
            raise ChangedDataError(changed(name))
    outputs = tuple(f"{task}.json" for task in results)
    details = {"checkpoint": checkpoint, "inputs": step.start_fingerprint}
    folder.mark_complete(step.name, step.fingerprint, details, outputs)


def _inspect(recipe: Recipe, folder: RunFolder, step: Step, console: Console) -> None:
    """Looks into a stage's checkpoint, beside that of the stage that it is compared with."""
    from hymba_align.inside.of_recipe import inspect_stage

    def checkpoint_of(stage: Stage) -> str:
        return _base_checkpoint(recipe, folder) if stage == "base" else str(folder.root / stage / "final")

    against = checkpoint_of(step.against) if step.against is not None else None
    if against is not None and step.against != "base":
        check_whole(Path(against), f"'hymba-align run' makes {against} again")
    say = partial(print_text, console)
    inspect_stage(recipe, folder, step, checkpoint_of(step.stage), against, say)


def _set_aside_other_tasks(stage_dir: Path, section: EvalSection, console: Console) -> None:
    """Moves aside results of tasks that the recipe no longer asks for, which a report would show; their answers go."""
    from hymba_align.eval.earlier import PREVIOUS, set_aside

    for path in sorted(stage_dir.iterdir()):
        task = path.name.split(".")[0]
        if task in section.tasks or path.name.endswith(PREVIOUS):
            continue
        if path.name == f"{task}.json":
            print_text(console, f"{task}: no task of this recipe; {path} is now {set_aside(path).name}")
        else:
            path.unlink()


def _base_checkpoint(recipe: Recipe, folder: RunFolder) -> str:
    """A checkpoint of the base section: the one it names, or base/final in the run folder where it names none.

    Random weights have no checkpoint yet; and one at a revision, or with another tokenizer, must be scored as such.
    """
    base = recipe.base
    if base.model is not None and base.tokenizer is None and base.revision is None:
        return base.model
    made_from, final = base_fingerprint(recipe), folder.stage_dir("base") / "final"
    if folder.is_complete("base", made_from):
        return str(final)
    from hymba_align.train.common import load_start, load_start_tokenizer, quiet_libraries

    tokenizer = load_start_tokenizer(recipe, None)
    folder.manifest_path("base").unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    with quiet_libraries():
        load_start(recipe, None, tokenizer).save_pretrained(final)
        tokenizer.save_pretrained(final)
    folder.mark_complete("base", made_from, {})
    return str(final)


def _write_base_of_adapters(recipe: Recipe, folder: RunFolder, steps: Sequence[Step]) -> None:
    """Writes base/final where adapters of this run are a change of it, which may not lie there as this recipe has it."""
    if rank() == 0 and recipe.lora is not None and not has_plain_base(recipe) and any(step.trains for step in steps):
        _base_checkpoint(recipe, folder)


# --- Printing ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """The terminal; nothing from ranks other than 0."""
    return open_console(soft_wrap=True, quiet=rank() != 0)
