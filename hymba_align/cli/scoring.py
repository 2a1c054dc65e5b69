"""Commands that score: eval, and the installation of BFCL's grader."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hymba_align.cli.completion import complete_checkpoint, complete_suite, complete_tasks
from hymba_align.cli.options import json_option, print_json, quiet_libraries, stops_on_sigterm

if TYPE_CHECKING:
    from hymba_align.eval import TaskResult
    from hymba_align.recipe_eval import EvalSection


@click.command("eval", short_help="Scores of any Hymba checkpoint.")
@click.argument("checkpoint", shell_complete=complete_checkpoint)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--suite",
    metavar="NAME",
    shell_complete=complete_suite,
    help="quick, published or full, or a file of your own: tasks and settings.",
)
@click.option(
    "--tasks",
    shell_complete=complete_tasks,
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
@json_option
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
    as_json: bool,
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
    section = eval_section(options, overrides)
    quiet_libraries()
    from hymba_align.evaluation import run_evaluation

    out_dir = output or Path("runs") / "eval" / checkpoint.strip("./").replace("/", "-")
    results = run_evaluation(checkpoint, section, out_dir, chat_template=chat_template, say=click.echo)
    if results is None:
        return
    _print_results(results, out_dir)
    if as_json:
        from hymba_align.eval.report.plain import plain_result

        shown = {task: {**plain_result(result), "file": out_dir / f"{task}.json"} for task, result in results.items()}
        print_json({"checkpoint": checkpoint, "output": out_dir, "tasks": shown})


@click.command("install-bfcl", short_help="The grader that `eval --tasks bfcl` needs.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to make.  [default: $HYMBA_ALIGN_BFCL, or bfcl-eval inside this Python environment]",
)
@click.option(
    "--python", metavar="PATH", help="Python 3.10 to 3.12 to make it with.  [default: the one that runs this]"
)
@json_option
def install_bfcl(output: Path | None, python: str | None, as_json: bool) -> None:
    """Install bfcl-eval, whose pinned packages contradict ours, in a Python environment of its own (200 MB).

    Does nothing where it is complete; one that is half made is made anew.

    \b
    Example:
      hymba-align install-bfcl
    """
    from hymba_align.eval.bfcl.environment import BFCL_VERSION, bfcl_folder, install

    folder = (output if output is not None else bfcl_folder()).expanduser().absolute()
    install(folder, click.echo, python=python or sys.executable)
    if as_json:
        print_json({"folder": folder, "version": BFCL_VERSION, "is_found_by_default": folder == bfcl_folder()})


def eval_section(options: Mapping[str, str | int | None], overrides: Sequence[str]) -> EvalSection:
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


def _print_results(results: dict[str, TaskResult], out_dir: Path) -> None:
    from hymba_align.eval.report.terminal import results_table
    from hymba_align.terminal import open_console, print_table, print_text

    console = open_console()
    print_table(console, results_table(results))
    for task, result in results.items():
        for warning in result.warnings:
            print_text(console, f"Warning, {task}: {warning}")
        console.print(f"Every answer: {out_dir / f'{task}.json'}", soft_wrap=True, markup=False)
