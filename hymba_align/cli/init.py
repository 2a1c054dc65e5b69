"""The command that writes a first recipe: init."""

from __future__ import annotations

from pathlib import Path

import click

from hymba_align.cli.options import json_option, print_json, quiet_libraries

WAYS = ("full", "zero1", "zero2", "zero3", "zero3_offload", "lora", "qlora")


@click.command(short_help="A first recipe for this machine, with the reason for every line.")
@click.argument("name")
@click.argument("keys", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--data", metavar="FILE", help="What to train on: a file, folder or glob.  [default: the published recipe's]"
)
@click.option(
    "--model", metavar="NAME", default="nvidia/Hymba-1.5B-Base", show_default=True, help="The base: a folder or hub id."
)
@click.option(
    "--way", type=click.Choice(WAYS), help="How to train.  [default: all parameters if they fit, else LoRA, QLoRA]"
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file to write.  [default: recipes/NAME.yaml]"
)
@click.option(
    "--gpus", metavar="COUNTxGIB", help="Plan for other GPUs than are here, such as 8x80.  [default: this machine]"
)
@json_option
def init(
    name: str,
    keys: tuple[str, ...],
    data: str | None,
    model: str,
    way: str | None,
    output: Path | None,
    gpus: str | None,
    as_json: bool,
) -> None:
    """Write a commented recipe called NAME for the hardware found here, and say what else would fit.

    KEY=VALUE are keys of the recipe's section data, such as columns.question=problem, and are written into it.
    Memory is estimated for training all parameters, with each ZeRO stage and with adapters. Nothing is downloaded, and no
    file is overwritten.

    \b
    Example:
      hymba-align init my-instruct --data my.jsonl
      hymba-align init on-top --data my.jsonl --model runs/arithmetic/dpo/final
      hymba-align init planned --gpus 8x80
    """
    quiet_libraries()
    from hymba_align.recipe_init.command import write_recipe

    result = write_recipe(name, data=data, model=model, output=output, way=way, keys=keys, gpus=gpus)
    if as_json:
        print_json(result)
