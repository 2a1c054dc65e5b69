"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once.

Exit codes: 0 done, 1 the run failed, 2 the input is at fault, 75 stopped by SIGTERM, 130 interrupted; after the last two,
and after most failures, the same command continues.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hymba_align import __version__
from hymba_align.errors import HymbaAlignError, Preempted, SeveralErrors, StorageError
from hymba_align.processes import signals
from hymba_align.secrets import RedactingStream, redact

if TYPE_CHECKING:
    from hymba_align.eval import TaskResult
    from hymba_align.recipe import TrainingStage
    from hymba_align.recipe_eval import EvalSection

INTERRUPTED = 130
INTERRUPTION = (
    "Interrupted; the same command continues, a stage from its last checkpoint and scoring from its last answer."
)

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check the recipe and the files that are here, print the plan, and stop."
)


def launch_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --launcher and --num-processes, which reach the command as overrides of the recipe's section launch."""

    @functools.wraps(command)
    def with_overrides(
        *, overrides: tuple[str, ...], launcher: str | None, num_processes: int | None, **given: Any
    ) -> None:
        chosen = {"launcher": launcher, "num_processes": num_processes}
        added = tuple(f"launch.{key}={value}" for key, value in chosen.items() if value is not None)
        command(overrides=(*overrides, *added), **given)

    for option in (
        click.option(
            "--num-processes",
            type=int,
            metavar="N",
            help="How many processes train, on all machines together; the recipe's number or 1 otherwise. Each adds its batch to the global one.",
        ),
        click.option(
            "--launcher", metavar="NAME", help="How they train together: a file of accelerate_configs/, such as zero2."
        ),
    ):
        with_overrides = option(with_overrides)
    return with_overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line (that of this process by default); prints one sentence for errors of the user."""
    try:
        code = cli.main(args=arguments, prog_name="hymba-align", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        if _speaks_for_all():
            click.echo(INTERRUPTION, err=True)
        return INTERRUPTED
    except Preempted as error:
        return _preempted(str(error))
    except Exception as error:
        if signals.requested() and not isinstance(error, StorageError):
            # What SIGTERM did to other processes of this run (data workers, other ranks), as this one saw it.
            what = " ".join(str(error).split())
            return _preempted(
                f"stopped by SIGTERM, and then {type(error).__name__}: {what}; the same command continues"
            )
        if not isinstance(error, HymbaAlignError):
            raise
        from hymba_align.data.inspection.preview import visible

        lines = error.lines if isinstance(error, SeveralErrors) else [" ".join(str(error).splitlines())]
        told = "\n".join(visible(redact(line)) for line in lines)
        click.echo(f"{_rank_prefix()}Error: {told}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _preempted(what: str) -> int:
    if _speaks_for_all():
        click.echo(f"{_rank_prefix()}Preempted: {redact(what)}.", err=True)
    return Preempted.exit_code


def _speaks_for_all() -> bool:
    """Whether this is the only process, or the first of those that a command has started."""
    from hymba_align.processes.agent import STARTED_BY_US

    return STARTED_BY_US not in os.environ or os.environ.get("RANK", "0") == "0"


def stops_on_sigterm(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command checkpoint and end with exit code 75 when the cluster takes the machine back."""

    @functools.wraps(command)
    def stopping(*arguments: Any, **given: Any) -> None:
        with signals.stop_on_sigterm():
            try:
                command(*arguments, **given)
            except signals.Terminated:
                raise Preempted("stopped by SIGTERM; the same command continues") from None

    return stopping


def entry_point() -> None:
    """The console script, on whose streams no secret is written: not in a message, a log line or a traceback."""
    sys.stdout, sys.stderr = RedactingStream(sys.stdout), RedactingStream(sys.stderr)
    code = main()
    if code == Preempted.exit_code:
        signals.end_soon()
    sys.exit(code)


def _rank_prefix() -> str:
    """Which of several processes speaks."""
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ and "LOCAL_RANK" in os.environ else ""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hymba-align", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune and align Hymba, NVIDIA's hybrid-head language model, from one YAML recipe."""


@cli.command(short_help="All stages of a recipe: SFT, DPO, scores, report.")
@recipe_argument
@overrides_argument
@launch_options
@dry_run_option
@stops_on_sigterm
def run(recipe: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Run all stages of RECIPE: score the base, SFT, score, DPO, score, report.

    Finished stages are skipped while their inputs are unchanged, interrupted ones resume.

    \b
    Example:
      hymba-align run recipes/tiny/arithmetic.yaml eval.limit=20
    """
    from hymba_align.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    _quiet_libraries()
    from hymba_align.pipeline import run_recipe

    run_recipe(loaded, dry_run=dry_run)


@cli.command(short_help="Supervised fine-tuning alone.")
@recipe_argument
@overrides_argument
@launch_options
@dry_run_option
@stops_on_sigterm
def sft(recipe: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Run the SFT stage of RECIPE, from its base to runs/NAME/sft/final.

    \b
    Example:
      hymba-align sft recipes/tiny/arithmetic.yaml sft.trainer.learning_rate=1e-4
    """
    _run_training_stage("sft", recipe, overrides, dry_run)


@cli.command(short_help="Direct preference optimisation alone.")
@recipe_argument
@overrides_argument
@launch_options
@dry_run_option
@stops_on_sigterm
def dpo(recipe: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Run the DPO stage of RECIPE, from its SFT checkpoint (or its base, without a section sft) to runs/NAME/dpo/final.

    \b
    Example:
      hymba-align dpo recipes/tiny/arithmetic.yaml dpo.trainer.beta=0.2
    """
    _run_training_stage("dpo", recipe, overrides, dry_run)


def _run_training_stage(stage: str, recipe: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    from hymba_align.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    _quiet_libraries()
    from hymba_align.pipeline import run_training_stage

    run_training_stage(loaded, "sft" if stage == "sft" else "dpo", dry_run=dry_run)


@cli.command("eval", short_help="Scores of any Hymba checkpoint.")
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--suite", metavar="NAME", help="quick, published or full, or a file of your own: tasks and settings.")
@click.option(
    "--tasks",
    help="What to score, separated by commas, in place of the suite's tasks.  [default: the suite's, or gsm8k]",
)
@click.option(
    "--limit",
    type=int,
    metavar="N",
    help="Score the first N problems of each task, of BFCL at least one of each category: a partial result.",
)
@click.option(
    "--num-processes",
    type=int,
    metavar="N",
    help="How many processes share the work, each on a GPU of its own where there are any; the scores stay the same.  [default: 1]",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for scores and samples.  [default: runs/eval/CHECKPOINT]"
)
@click.option(
    "--chat-template",
    default="hymba",
    show_default=True,
    help="'hymba', 'released' (the one in the checkpoint), or a .jinja file.",
)
@stops_on_sigterm
def evaluate(
    checkpoint: str,
    overrides: tuple[str, ...],
    suite: str | None,
    tasks: str | None,
    limit: int | None,
    num_processes: int | None,
    output: Path | None,
    chat_template: str,
) -> None:
    """Score CHECKPOINT, a folder or a hub repository.

    Every answer is kept as it comes: an interrupted evaluation continues with the same command, and a task that is
    complete and unchanged is not scored again. KEY=VALUE are keys of a recipe's section eval.

    \b
    Example:
      hymba-align eval runs/arithmetic/sft/final --tasks gsm8k --limit 20 \\
          gsm8k.train_path=data/arithmetic/train.jsonl gsm8k.test_path=data/arithmetic/test.jsonl
      hymba-align eval runs/my-instruct/dpo/final --suite published --num-processes 4
      accelerate launch --num_processes 4 -m hymba_align eval runs/my-instruct/dpo/final --suite published
    """
    options = {"suite": suite, "tasks": tasks, "limit": limit, "num_processes": num_processes}
    section = _eval_section(options, overrides)
    _quiet_libraries()
    from hymba_align.evaluation import run_evaluation

    out_dir = output or Path("runs") / "eval" / checkpoint.strip("./").replace("/", "-")
    results = run_evaluation(checkpoint, section, out_dir, chat_template=chat_template, say=click.echo)
    if results is not None:
        _print_results(results, out_dir)


@cli.command("install-bfcl", short_help="The grader that `eval --tasks bfcl` needs.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to make.  [default: $HYMBA_ALIGN_BFCL, or bfcl-eval inside this Python environment]",
)
@click.option(
    "--python", metavar="PATH", help="Python 3.10 to 3.12 to make it with.  [default: the one that runs this]"
)
def install_bfcl(output: Path | None, python: str | None) -> None:
    """Install bfcl-eval, whose pinned packages contradict ours, in a Python environment of its own (200 MB).

    Does nothing where it is complete; one that is half made is made anew.

    \b
    Example:
      hymba-align install-bfcl
    """
    from hymba_align.eval.bfcl.environment import bfcl_folder, install

    install(output if output is not None else bfcl_folder(), click.echo, python=python or sys.executable)


def _eval_section(options: Mapping[str, str | int | None], overrides: Sequence[str]) -> EvalSection:
    """The section that options and KEY=VALUE describe.

    Args:
        options: suite, tasks, limit and num_processes; None where one was not given.
    """
    from hymba_align.recipe_eval import TASKS, EvalSection
    from hymba_align.recipe_loading import load_section

    given = {name: value for name, value in options.items() if value is not None}
    if "tasks" in given:
        names = [name.strip() for name in str(given["tasks"]).split(",")]
        for name in names:
            if name not in TASKS:
                raise click.BadParameter(f"'{name}' is not a task; tasks: {', '.join(TASKS)}", param_hint="'--tasks'")
        given["tasks"] = f"[{','.join(names)}]"
    keys = [override.removeprefix("eval.") for override in overrides]
    return load_section(
        EvalSection, None, [*(f"{name}={value}" for name, value in given.items()), *keys], prefix="eval."
    )


@cli.group("data", short_help="Check and show data before training.")
def data_group() -> None:
    """Check data, and show what training will see of it.

    \b
    Example:
      hymba-align data check my.jsonl
      hymba-align data preview recipes/tiny/arithmetic.yaml -n 3
    """


def _data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that check and preview have in common."""
    for decorate in (
        click.option("--max-length", type=click.IntRange(min=8), help="Without a recipe.  [default: 8192, DPO 2048]"),
        click.option(
            "--tokenizer", help="Folder or hub id, without a recipe.  [default: nvidia/Hymba-1.5B-Base]", metavar="NAME"
        ),
        click.option("--stage", type=click.Choice(["sft", "dpo"]), help="Only this stage, or what to take a file for."),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.argument("target", metavar="RECIPE|FILE"),
    ):
        command = decorate(command)
    return command


@data_group.command(short_help="Everything that is wrong with the data, by file and line.")
@_data_options
@click.option("--gsm8k", type=click.Path(path_type=Path, exists=True), help="GSM8K's test.jsonl, or its folder.")
@click.option(
    "--gpqa",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GPQA's dataset.zip, read in memory only.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the whole report here."
)
def check(
    target: str,
    overrides: tuple[str, ...],
    stage: str | None,
    tokenizer: str | None,
    max_length: int | None,
    gsm8k: Path | None,
    gpqa: Path | None,
    json_file: Path | None,
) -> int:
    """Check the data of RECIPE's stages, or a FILE, folder, glob, URL or hub data set alone.

    Every row is read: what cannot be used, what is too long, duplicates, overlap with test sets, each with its file and
    line and what to do. With RECIPE, KEY=VALUE are keys of the recipe; without one, keys of its section data.

    Exit code 1: rows would be lost, and neither bad_rows nor over_long allows it.

    \b
    Example:
      hymba-align data check recipes/tiny/arithmetic.yaml
      hymba-align data check my.jsonl columns.question=problem over_long=drop --tokenizer data/arithmetic/tokenizer
    """
    _quiet_libraries()
    from hymba_align.data_commands import check_stages
    from hymba_align.stage_data import stages_of

    stages = stages_of(target, overrides, stage=_stage(stage), tokenizer=tokenizer, max_length=max_length)
    return check_stages(stages, gsm8k=gsm8k, gpqa=gpqa, json_file=json_file)


@data_group.command(short_help="What training will see: tokens, loss mask, packed rows.")
@_data_options
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Conversations to show.")
@click.option("--ids", is_flag=True, help="Show token ids below the tokens.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page here instead."
)
def preview(
    target: str,
    overrides: tuple[str, ...],
    stage: str | None,
    tokenizer: str | None,
    max_length: int | None,
    count: int,
    ids: bool,
    html: Path | None,
) -> None:
    """Show what training will see of RECIPE's data, or of a FILE, folder, glob, URL or hub data set alone.

    Conversations as tokens, with those that are trained on in colour (between ⟦ and ⟧ where there are no colours), the
    tree of a packed row, and how well rows are packed. KEY=VALUE as for check.

    \b
    Example:
      hymba-align data preview recipes/tiny/arithmetic.yaml -n 3
      hymba-align data preview my.jsonl --tokenizer data/arithmetic/tokenizer --ids
      hymba-align data preview recipes/tiny/arithmetic.yaml --html preview.html
    """
    _quiet_libraries()
    from hymba_align.data_commands import preview_data
    from hymba_align.stage_data import stages_of

    stages = stages_of(target, overrides, stage=_stage(stage), tokenizer=tokenizer, max_length=max_length)
    preview_data(stages, count, with_ids=ids, html=html)


def _stage(name: str | None) -> TrainingStage | None:
    return "sft" if name == "sft" else "dpo" if name == "dpo" else None


def _print_results(results: dict[str, TaskResult], out_dir: Path) -> None:
    from rich.console import Console

    from hymba_align.eval.report.terminal import results_table

    console = Console(highlight=False)
    console.print(results_table(results))
    for task, result in results.items():
        for warning in result.warnings:
            console.print(f"Warning, {task}: {warning}", soft_wrap=True, markup=False)
        console.print(f"Every answer: {out_dir / f'{task}.json'}", soft_wrap=True, markup=False)


def _quiet_libraries() -> None:
    """Turns off, by the libraries' own switches, what does not concern the user; their warnings stay on.

    Environment variables where they exist, because those reach launched processes too.
    """
    # Before torch looks for GPUs: asked in its own way, the driver would read CUDA_VISIBLE_DEVICES now and never again.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a dozen bars per stage, for work of seconds
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork of a data worker
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    transformers.logging.disable_progress_bar()  # one for every checkpoint read or written
    enable_progress_bars()  # which that switched off too; downloads take long enough to be watched
