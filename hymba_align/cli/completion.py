"""Shell completion: the script that a shell reads, and the names that arguments and options are completed with.

Completing runs at every press of the tab key, so nothing heavy is imported, and no error is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

PROGRAM = "hymba-align"
VARIABLE = "_HYMBA_ALIGN_COMPLETE"
"""Through which click's script asks; its name follows from the program's"""
SHELLS = ("bash", "zsh", "fish")
RECIPES = Path("recipes")
PACKAGE = Path(__file__).parent.parent

Completions = list[CompletionItem]


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Recipes below recipes/ and in the working folder, and else any file."""
    below = RECIPES.glob("**/*.yaml") if RECIPES.is_dir() else ()
    names = sorted({str(path) for path in (*below, *Path().glob("*.yaml"))})
    return _or_any_file(names, incomplete)


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Runs by their name in runs/, the newest first, and else any folder."""
    from hymba_align.run_view.find import known_runs

    return _or_any_file([path.name for path in known_runs()], incomplete, kind="dir")


def complete_checkpoint(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """The final checkpoints of the runs in runs/, and else any folder."""
    from hymba_align.run_view.find import known_runs

    finals = [path / stage / "final" for path in known_runs() for stage in ("dpo", "sft")]
    return _or_any_file([str(path) for path in finals if path.is_dir()], incomplete, kind="dir")


def complete_launcher(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Names of the files in accelerate_configs/."""
    return _matching(_names_in(PACKAGE / "accelerate_configs"), incomplete)


def complete_suite(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Names of the suites, and else any file."""
    return _or_any_file(_names_in(PACKAGE / "eval" / "suites"), incomplete)


def complete_tasks(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Names of tasks, of which several are joined by commas."""
    from hymba_align.recipe_eval import TASKS

    return _joined(TASKS, incomplete)


def complete_parts(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Names of the parts of an inspection, of which several are joined by commas."""
    from hymba_align.inspect_choices import PARTS

    return _joined(PARTS, incomplete)


def _joined(names: Iterable[str], incomplete: str) -> Completions:
    """The names that can follow those that stand there already."""
    before, comma, begun = incomplete.rpartition(",")
    chosen = before.split(",") if before else []
    return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(begun) and name not in chosen]


def _names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _matching(names: Iterable[str], incomplete: str) -> Completions:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _or_any_file(names: Iterable[str], incomplete: str, kind: str = "file") -> Completions:
    """The names that begin so; where none does, the shell is asked to complete a path."""
    found = _matching(names, incomplete)
    return found or [CompletionItem(incomplete, type=kind)]


@click.command(short_help="A script with which a shell completes commands.")
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
def completion(shell: str) -> None:
    """Print the script with which SHELL (bash, zsh or fish) completes what is typed, at the tab key.

    Where it goes: bash, a line in ~/.bashrc as below; zsh, the same with zsh in ~/.zshrc; fish, a file
    ~/.config/fish/completions/hymba-align.fish.

    \b
    Example:
      hymba-align completion bash > ~/.hymba-align-completion
      echo 'source ~/.hymba-align-completion' >> ~/.bashrc
    """
    from hymba_align.cli import cli

    made = get_completion_class(shell)
    assert made is not None, "click knows the shells that this command offers"
    click.echo(made(cli, {}, PROGRAM, VARIABLE).source())
