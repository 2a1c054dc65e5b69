"""Commands that hand a model on: merge, export."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import click

from hymba_align.cli.completion import complete_checkpoint
from hymba_align.cli.options import json_option, print_json, quiet_libraries

GB = 1e9
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights that are written.  [default: that of the checkpoint, of an adapter that of its base]",
)
base_option = click.option(
    "--base", metavar="CHECKPOINT", help="The model under the adapter, where the one that it names is not there."
)


@click.command(short_help="An adapter and its base as one checkpoint.")
@click.argument("adapter", shell_complete=complete_checkpoint)
@click.argument("output", type=click.Path(path_type=Path))
@base_option
@dtype_option
@json_option
def merge(adapter: str, output: Path, base: str | None, dtype: str | None, as_json: bool) -> None:
    """Merge ADAPTER (LoRA, rsLoRA, DoRA or QLoRA) into the model under it and write that to OUTPUT, a new folder.

    ADAPTER is a folder or a hub repository with adapter_config.json; adapters under it are merged too. Logits of the
    merged model are compared with unmerged ones before anything is written.

    \b
    Example:
      hymba-align merge runs/adapter/sft/final merged
      hymba-align merge my-name/my-adapter merged --base models/Hymba-1.5B-Base
    """
    quiet_libraries()
    from hymba_align.export.merge import merge as merge_into

    result = merge_into(adapter, output, base=base, dtype=dtype, say=click.echo)
    click.echo(f"{output}: {result.parameters:,} parameters in {result.dtype}, {result.bytes / GB:,.3f} GB")
    if as_json:
        print_json(asdict(result))


@click.command(short_help="A folder to hand on, with a model card.")
@click.argument("checkpoint", shell_complete=complete_checkpoint)
@click.argument("output", type=click.Path(path_type=Path))
@base_option
@dtype_option
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of weights, such as 500MB."
)
@click.option(
    "--with-remote-code",
    is_flag=True,
    help="Also open in NVIDIA's released code: config.json points at its repository.",
)
@click.option("--title", help="Name of the model in its card.  [default: the repository of --push, else OUTPUT]")
@click.option("--license", "license_name", metavar="ID", help="Its licence, as the hub calls it, such as apache-2.0.")
@click.option("--push", metavar="OWNER/NAME", help="Upload the folder to this repository of the Hugging Face hub.")
@click.option("--private", is_flag=True, help="With --push: a repository that others cannot see.")
@json_option
def export(
    checkpoint: str,
    output: Path,
    base: str | None,
    dtype: str | None,
    max_shard_size: str,
    with_remote_code: bool,
    title: str | None,
    license_name: str | None,
    push: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT to OUTPUT, a new folder for other people: weights, tokenizer, licence notes and a model card.

    CHECKPOINT is a run folder (its last finished training stage is meant), a checkpoint, an adapter (which is merged) or a
    hub repository.
    For --push the token is taken from HF_TOKEN or from 'hf auth login'.

    \b
    Example:
      hymba-align export runs/arithmetic exported
      hymba-align export runs/my-instruct my-hymba --dtype bfloat16 --with-remote-code --push my-name/my-hymba --private
    """
    if private and push is None:
        raise click.UsageError("--private is about the repository of --push; name one, or leave --private out")
    quiet_libraries()
    from hymba_align.export.export import ExportSettings
    from hymba_align.export.export import export as export_to
    from hymba_align.export.publish import check_push
    from hymba_align.export.publish import push as push_to

    if re.fullmatch(r"[1-9]\d*(\.\d+)?(KB|MB|GB)", max_shard_size.upper()) is None:
        raise click.BadParameter(
            f"'{max_shard_size}' is not a size such as 5GB or 500MB", param_hint="'--max-shard-size'"
        )
    if push is not None:
        check_push(push)
    settings = ExportSettings(
        dtype=dtype,
        base=base,
        max_shard_size=max_shard_size,
        with_remote_code=with_remote_code,
        license=license_name,
        title=title,
        place=push,
    )
    result = export_to(checkpoint, output, settings, say=click.echo)
    click.echo(f"Exported: {result.checkpoint}")
    click.echo(f"{output}: {result.parameters:,} parameters in {result.dtype}, {result.bytes / GB:,.3f} GB")
    click.echo(f"Files: {', '.join(result.files)}")
    for remark in result.remarks:
        click.echo(f"To do: {remark}")
    address = push_to(output, push, private=private) if push is not None else None
    if address is not None:
        click.echo(f"Pushed to {address}")
    if as_json:
        print_json({**asdict(result), "pushed_to": address})
