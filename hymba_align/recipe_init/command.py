"""What `hymba-align init` does: looks at the machine, says what fits, writes the recipe."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.checkpoint import checkpoint_config, hub_config
from hymba_align.errors import RecipeError
from hymba_align.hardware import Hardware, detect, with_gpus
from hymba_align.memory import Shape, gib
from hymba_align.recipe import RUN_NAME, Recipe, is_local_path, load_recipe
from hymba_align.recipe_init.data_file import look_at
from hymba_align.recipe_init.ways import Way, best, ways
from hymba_align.recipe_init.writing import Plan, machine, recipe_text
from hymba_align.run.storage import writing
from hymba_align.terminal import open_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from hymba_align.model import HymbaConfig

DEFAULT_MODEL = "nvidia/Hymba-1.5B-Base"
WIDE = 112  # columns, in which the parts of an estimate are shown beside its total
OF_KNOWN_SHAPE = (DEFAULT_MODEL, "nvidia/Hymba-1.5B-Instruct")
"""Repositories whose configuration is that of `HymbaConfig()`, so that nobody needs the network"""


def write_recipe(
    name: str,
    *,
    data: str | None,
    model: str,
    output: Path | None,
    way: str | None = None,
    keys: Sequence[str] = (),
    gpus: str | None = None,
    hardware: Hardware | None = None,
) -> dict[str, Any]:
    """Writes the recipe and prints what was found; the same as plain values.

    Args:
        data: a file to train on; None for the published recipe's data sets.
        model: the base, a folder or a repository of the hub.
        output: the recipe's file; None for recipes/NAME.yaml.
        way: how to train, by its name in `TITLES`; None for the best that fits.
        keys: `key=value` of the recipe's section `data`, which go into it.
        gpus: GPUs to plan for in place of the machine's, as `with_gpus` takes them.
        hardware: the machine; None for this one.

    Raises:
        UsageError: `gpus` describes none.
        RecipeError: the name is none, the file is there already, or a key is no key of data.
        StorageError: the file cannot be written.
        OutOfMemoryError: nothing fits.
        DataError: the data cannot be read.
        CheckpointError: the base cannot be.
    """
    if re.fullmatch(RUN_NAME, name) is None:
        raise RecipeError(
            f"'{name}' cannot be the name of a run; use letters, digits, '.', '_' and '-', with a letter or digit first, and "
            "--output for the recipe's place"
        )
    path = output if output is not None else Path("recipes") / f"{name}.yaml"
    if path.exists():
        raise RecipeError(f"{path} is there already, and init overwrites nothing; give another name, or --output FILE")
    if keys and data is None:
        raise RecipeError(f"'{keys[0]}' is about the data, and --data names none; give --data FILE")
    hardware = hardware if hardware is not None else detect(Path("runs"), timed=gpus is None)
    hardware = with_gpus(hardware, gpus) if gpus is not None else hardware
    config = _config(model)
    shape = Shape.of(config)
    looked = look_at(data, keys) if data is not None else None
    found = ways(hardware, shape, config.max_position_embeddings)
    console = open_console()
    _print_ways(console, hardware, shape, model, found)
    plan = Plan(name, model, shape, hardware, best(found, hardware, way), looked)
    recipe = _write(path, recipe_text(plan))
    _print_choice(console, plan, path, recipe)
    return {
        "recipe": path,
        "hardware": hardware,
        "model": model,
        "parameters": shape.parameters,
        "ways": [_plain(each, chosen=each is plan.way) for each in found],
        "data": looked,
        "next": next_commands(path, plan),
    }


def next_commands(path: Path, plan: Plan) -> list[str]:
    """What to run now, in order."""
    recipe = shlex.quote(str(path))
    check = [f"hymba-align data check {recipe}"] if plan.data is not None else []
    there = f" --gpus {plan.hardware.assumed}" if plan.hardware.assumed is not None else ""
    return [
        *check,
        f"hymba-align doctor {recipe}{there}",
        f"hymba-align run {recipe} --dry-run",
        f"hymba-align run {recipe}",
    ]


def _config(model: str) -> HymbaConfig:
    from hymba_align.model import HymbaConfig

    if is_local_path(model):
        return checkpoint_config(model)
    return HymbaConfig() if model in OF_KNOWN_SHAPE else hub_config(model, None)


def _write(path: Path, text: str) -> Recipe:
    """The recipe as read back; the file appears whole and never over another."""
    with writing(path.parent.parent, resumes="then run the same command again"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RecipeError(f"{path} cannot be made: {error.filename} is no folder; name another --output") from None
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".init-") as folder:
            made = Path(folder) / path.name
            made.write_text(text, encoding="utf-8")
            recipe = load_recipe(made)
            try:
                os.link(made, path)
            except FileExistsError:
                raise RecipeError(f"{path} appeared just now, and init overwrites nothing; give another name") from None
            except OSError:  # a file system without links
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
    return recipe


def _print_ways(console: Console, hardware: Hardware, shape: Shape, model: str, found: list[Way]) -> None:
    from rich.table import Table

    of = "This machine" if hardware.assumed is None else "Assumed"
    console.print(f"{of}: {machine(hardware)}", markup=False)
    device = "of main memory" if hardware.on_cpu else "of each GPU"
    table = Table(title=f"{model}, {shape.parameters:,} parameters: GiB {device}, estimated", title_justify="left")
    table.add_column("trained")
    whole = console.width >= WIDE
    for column in ("total", *(("weights", "gradients", "optimizer", "rest") if whole else ()), "row of"):
        table.add_column(column, justify="right")
    table.add_column("here" if hardware.assumed is None else "there")
    for way in found:
        part = way.estimate
        rest = part.total - part.weights - part.gradients - part.optimizer
        sizes = (part.total, *((part.weights, part.gradients, part.optimizer, rest) if whole else ()))
        table.add_row(way.title, *(gib(size) for size in sizes), f"{way.max_length:,}", way.verdict)
    print_table(console, table)


def _print_choice(console: Console, plan: Plan, path: Path, recipe: Recipe) -> None:
    stages = " and ".join(stage.upper() for stage in recipe.training_stages)
    console.print(f"Chosen: {plan.way.title}, for {stages}.", markup=False)
    line = plan.cpu_line()
    if line is not None:
        console.print(line[0].upper() + line[1:] + ".", markup=False)
        console.print(
            "A run of minutes, with random weights: recipes/tiny/arithmetic.yaml of the repository.", markup=False
        )
    console.print(f"Written: {path}. Next:", markup=False)
    *first, last = next_commands(path, plan)
    for command in first:
        console.print(f"  {command}", markup=False, soft_wrap=True)
    there = "  # on the machine that has these GPUs" if plan.hardware.assumed is not None else ""
    console.print(f"  {last}{there}", markup=False, soft_wrap=True)


def _plain(way: Way, *, chosen: bool) -> dict[str, Any]:
    return {
        "way": way.name,
        "total_bytes": way.estimate.total,
        "parts_bytes": way.estimate.parts,
        "max_length": way.max_length,
        "processes": way.setting.processes,
        "fits": way.fits,
        "verdict": way.verdict,
        "chosen": chosen,
    }
