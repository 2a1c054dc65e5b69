"""The command that looks whether everything is in order: doctor."""

from __future__ import annotations

from pathlib import Path

import click

from hymba_align.cli.completion import complete_recipe
from hymba_align.cli.options import json_option, overrides_argument, print_json, quiet_libraries


@click.command(short_help="Versions, devices, kernels with a self-test, and room for a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path), required=False, shell_complete=complete_recipe)
@overrides_argument
@click.option(
    "--gpus", metavar="COUNTxGIB", help="Compare with other GPUs than are here, such as 8x80; looks at memory alone."
)
@json_option
def doctor(recipe: Path | None, overrides: tuple[str, ...], gpus: str | None, as_json: bool) -> int:
    """Look at versions, devices and kernels; with RECIPE, at the memory and disk that it needs.

    Every kernel that can run here is compared with a recurrence in float64, forward and backward, within some 10 seconds. The
    hub is asked only where the recipe takes something from it that is not in the cache.

    Exit code 1: something in use is wrong.

    \b
    Example:
      hymba-align doctor
      hymba-align doctor recipes/tiny/arithmetic.yaml sft.max_length=512
      hymba-align doctor recipes/hymba-1.5b/instruct.yaml --gpus 8x80
    """
    if gpus is not None and recipe is None:
        raise click.UsageError("--gpus is about the memory that a recipe needs; name the recipe")
    from hymba_align.recipe import load_recipe

    loaded = load_recipe(recipe, overrides) if recipe is not None else None
    quiet_libraries()
    from hymba_align.doctor.command import examine, examine_room
    from hymba_align.hardware import detect, with_gpus
    from hymba_align.run.folder import run_root

    if gpus is not None and loaded is not None:
        report = examine_room(loaded, with_gpus(detect(run_root(loaded)), gpus))
    else:
        report = examine(loaded)
    if as_json:
        print_json(report.plain())
    return 1 if report.wrong else 0
