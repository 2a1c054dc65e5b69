"""The command that looks inside a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hymba_align.cli.completion import complete_checkpoint, complete_parts, complete_tasks
from hymba_align.cli.options import json_option, print_json, quiet_libraries
from hymba_align.inspect_choices import DOCUMENTS, DOMAIN_NAME, MAX_LENGTH, PARTS, is_text_file

if TYPE_CHECKING:
    from hymba_align.inside.result import Inspection
    from hymba_align.inside.settings import InspectSettings
    from hymba_align.recipe import DataSection

OF_DATA, OF_PREFERENCES = "data.", "preferences."
"""Before keys of a section `data`, for --data and for --preferences; all others are of a section `eval`"""
WITHOUT_EFFECT = ("bad_rows", "repeat", "streaming", "validation_fraction", "workers")
"""Keys of a section `data` that change nothing about what is read to be looked at"""
REFUSED = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
"""What the system says of files that are not this user's to use, or of names that cannot be those of files"""


def _words(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(word.strip() for word in value.split(","))


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise click.BadParameter(f"'{wrong}' is no whole number from 0 on; write such, separated by commas: 0,15")
    return tuple(dict.fromkeys(map(int, words)))


def _parts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    words = _words(context, parameter, value) or PARTS
    for word in words:
        if word not in PARTS:
            raise click.BadParameter(f"'{word}' is no part; parts: {', '.join(PARTS)}")
    return tuple(word for word in PARTS if word in words)


def _domains(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not path or not re.fullmatch(DOMAIN_NAME, name):
            raise click.BadParameter(f"'{value}' is not NAME=FILE, such as law=law.jsonl")
        if name in named:
            raise click.BadParameter(
                f"the domain {name} is named twice, for {named[name]} and {path}; rename one of them"
            )
        named[name] = path
    return named


@click.command(short_help="What heads and meta tokens do, and what alignment changed.")
@click.argument("checkpoint", shell_complete=complete_checkpoint)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--against",
    metavar="OTHER",
    shell_complete=complete_checkpoint,
    help="The checkpoint from before training, to compare with.",
)
@click.option(
    "--data",
    metavar="FILE",
    help="Rows to look at it with, or a text (.txt).  [default: the texts that ship with hymba-align]",
)
@click.option(
    "--preferences", metavar="FILE", help="Pairs of answers.  [default: those of --data, where its rows have any]"
)
@click.option(
    "--domain", "domains", multiple=True, metavar="NAME=FILE", callback=_domains,
    help="Texts of a domain of your own, whose meta tokens are compared; may be given several times.",
)  # fmt: skip
@click.option(
    "--tasks", metavar="NAMES", shell_complete=complete_tasks,
    help="Also the accuracy on these tasks, separated by commas, without each branch: slow.",
)  # fmt: skip
@click.option(
    "--parts", metavar="NAMES", callback=_parts, shell_complete=complete_parts,
    help=f"What to measure, separated by commas, of {', '.join(PARTS)}.  [default: all]",
)  # fmt: skip
@click.option(
    "--documents", type=click.IntRange(min=1), default=DOCUMENTS, show_default=True, metavar="N",
    help="How many documents are read: of --data, or of all domains together; and of each domain for meta tokens.",
)  # fmt: skip
@click.option(
    "--max-length", type=click.IntRange(min=8), default=MAX_LENGTH, show_default=True, metavar="N",
    help="Most tokens of a document.",
)  # fmt: skip
@click.option(
    "--layers", metavar="NUMBERS", callback=_numbers, help="Layers whose attention is drawn as maps.  [default: a few]"
)
@click.option(
    "--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="A text file whose beginning the maps show.  [default: the first document]",
)  # fmt: skip
@click.option(
    "--contexts", metavar="NUMBERS", callback=_numbers,
    help="Lengths at which decoding is timed.  [default: 512,2048,8192, as far as the model goes]",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Sequences that decode side by side while they are timed.",
)  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Number format.  [default: bfloat16 on a GPU, else float32]",
)
@click.option(
    "--chat-template", default="hymba", show_default=True,
    help="'hymba', 'released' (the one in the checkpoint), or a .jinja file.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/inspect/CHECKPOINT]")
@json_option
def inspect(checkpoint: str, overrides: tuple[str, ...], output: Path | None, as_json: bool, **given: Any) -> None:
    """Look inside CHECKPOINT, a folder (of an adapter too) or a hub repository.

    Where attention goes, what each layer's attention and SSM heads are worth, how they are joined, what meta tokens
    specialise in, what training moved, what decoding costs: inspect.html, inspect.json and plots.

    KEY=VALUE are keys of a recipe's section eval, for --tasks; with data. or preferences. in front they are keys of its
    section data, for --data or --preferences.

    \b
    Example:
      hymba-align inspect runs/arithmetic/dpo/final --against runs/arithmetic/sft/final \\
          --data data/arithmetic/test.jsonl
      hymba-align inspect runs/arithmetic/dpo/final --parts cost --contexts 1024,8192
    """
    folder = output or Path("runs") / "inspect" / _name_of(checkpoint)
    with _files_that_may_be_used():
        settings = _settings(checkpoint, overrides, given)
        quiet_libraries()
        from hymba_align.inside.inspecting import inspect_checkpoint
        from hymba_align.inside.output import PAGE, earlier, reserved, write

        with reserved(folder):
            if replaced := earlier(folder):
                _say(replaced)
            inspection = inspect_checkpoint(replace(settings, output=folder), _say)
            write(inspection, folder)
    _print(inspection, folder / PAGE)
    if as_json:
        _print_json(inspection, folder)


@contextlib.contextmanager
def _files_that_may_be_used() -> Iterator[None]:
    """Turns the system's refusal of a file or folder, named or of a cache, into an InspectError."""
    from hymba_align.errors import InspectError

    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in REFUSED:
            raise
        may = ", or let this user read and write there" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise InspectError(f"{error.filename} cannot be used ({error.strerror}); name another{may}") from error


def _name_of(checkpoint: str) -> str:
    """A folder's name for what is found in a checkpoint."""
    given = Path(checkpoint).expanduser()
    words = given.resolve() if ".." in given.parts or given == Path() else given
    return "-".join(part for part in words.parts if part != words.anchor)


def _settings(checkpoint: str, overrides: Sequence[str], given: dict[str, Any]) -> InspectSettings:
    """What the command line asks for."""
    from hymba_align.cli.scoring import eval_section
    from hymba_align.errors import InspectError
    from hymba_align.inside.settings import InspectSettings
    from hymba_align.stage_data import DEFAULT_SEED

    tasks = given.pop("tasks")
    paths = {OF_DATA: given.pop("data"), OF_PREFERENCES: given.pop("preferences")}
    named = {"CHECKPOINT": checkpoint, "--against": given["against"], "--data": paths[OF_DATA]}
    for what, value in {**named, "--preferences": paths[OF_PREFERENCES]}.items():
        if value == "":
            raise InspectError(f"{what} is empty; name a file or folder there")
    keys = _keys(overrides, paths)
    if keys[""] and tasks is None:
        raise InspectError(f"{keys[''][0]} is about --tasks, and none is given; add --tasks gsm8k, or leave it out")
    scoring = eval_section({"tasks": tasks}, keys[""]) if tasks is not None else None
    settings = InspectSettings(
        checkpoint,
        data=_rows_of(paths[OF_DATA], checkpoint, keys[OF_DATA], OF_DATA),
        preferences=_rows_of(paths[OF_PREFERENCES], checkpoint, keys[OF_PREFERENCES], OF_PREFERENCES),
        scoring=scoring,
        seed=DEFAULT_SEED,
        **given,
    )
    for line in _without_effect(settings):
        _say(line)
    return settings


def _without_effect(settings: InspectSettings) -> list[str]:
    """A line for each option of the command that was given and that nothing of what is measured looks at."""
    from hymba_align.inside.settings import READS_TEXTS

    parts = set(settings.parts)
    reads_domains = "meta_tokens" in parts or (settings.data is None and settings.preferences is None)
    compares = "alignment" in parts and settings.against is not None
    reads_texts = bool(READS_TEXTS & parts)
    cuts = reads_texts and not all(one is None for one in (settings.data, settings.preferences, settings.text))
    options = (
        (
            "--against",
            settings.against,
            bool({"alignment", "meta_tokens"} & parts),
            "the parts alignment and meta_tokens",
        ),
        ("--data", settings.data, reads_texts, "all parts but cost"),
        (
            "--preferences",
            settings.preferences,
            reads_texts if settings.data is None else compares,
            "the part alignment, which needs --against" if settings.data is not None else "all parts but cost",
        ),
        ("--domain", settings.domains or None, reads_domains and reads_texts, "the part meta_tokens"),
        ("--documents", _unless(DOCUMENTS, settings.documents), reads_texts, "all parts but cost"),
        ("--max-length", _unless(MAX_LENGTH, settings.max_length), cuts, "the texts of --data and --text"),
        ("--chat-template", _unless("hymba", settings.chat_template), reads_texts, "all parts but cost"),
        ("--text", settings.text, "attention" in parts, "the part attention"),
        ("--layers", settings.layers, "attention" in parts, "the part attention"),
        ("--contexts", settings.contexts, "cost" in parts, "the part cost"),
        ("--batch-size", _unless(1, settings.batch_size), "cost" in parts, "the part cost"),
    )
    return [
        f"{option} has no effect on what is measured here: it is for {where}"
        for option, value, counts, where in options
        if value is not None and not counts
    ]


def _unless(default: object, value: object) -> object | None:
    """What was given; None for what stands there by default."""
    return value if value != default else None


def _keys(overrides: Sequence[str], paths: Mapping[str, str | None]) -> dict[str, list[str]]:
    """The overrides without their prefix, by prefix. Raises: InspectError for one that changes nothing.

    Args:
        paths: what --data and --preferences name, by prefix.
    """
    from hymba_align.errors import InspectError

    keys: dict[str, list[str]] = {OF_DATA: [], OF_PREFERENCES: [], "": []}
    for override in overrides:
        prefix = next(prefix for prefix in keys if override.startswith(prefix))
        keys[prefix].append(override.removeprefix(prefix))
    for prefix, path in paths.items():
        option = f"--{prefix.rstrip('.')}"
        for key in keys[prefix]:
            if path is None:
                raise InspectError(f"{prefix}{key} is about {option}, and none is given; add it, or leave this out")
            name = key.partition("=")[0]
            if name in ("path", "sources"):
                raise InspectError(f"{prefix}{key} names other rows than {option} does; name them there")
            if name in WITHOUT_EFFECT:
                raise InspectError(f"{prefix}{key} is about training, and changes nothing here; leave it out")
    return keys


def _rows_of(path: str | None, checkpoint: str, keys: Sequence[str], prefix: str) -> DataSection | None:
    """A file whose rows are read as the checkpoint's run reads its own, unless the keys say otherwise.

    Args:
        prefix: what the command has before such keys.
    """
    from hymba_align.errors import InspectError
    from hymba_align.inside.settings import trained_on
    from hymba_align.plan_inspection import keys_of_run

    if path is None:
        return None
    of_run, told = keys_of_run(checkpoint, path, of_pairs=prefix == OF_PREFERENCES)
    if is_text_file(path):
        of_run, told = {}, ""
        if keys:
            raise InspectError(f"{prefix}{keys[0]} is about rows, and {path} is a text: one document; leave it out")
    section, left_out = _fitting(path, of_run, keys, prefix)
    unfit = (
        f"Of these keys, {', '.join(left_out)} is left out: the rows of {path} are of another kind" if left_out else ""
    )
    for line in (told, unfit, trained_on(checkpoint, path)):
        if line:
            _say(line)
    return section


def _fitting(
    path: str, of_run: dict[str, Any], keys: Sequence[str], prefix: str
) -> tuple[DataSection, tuple[str, ...]]:
    """The file with the keys of the run and one's own; and which of the run's were left out, because its rows are not so.

    Where none of that helps nothing is left out, and reading the file says what is wrong.
    """
    from hymba_align.inside.texts import rows_fit
    from hymba_align.recipe import DataSection
    from hymba_align.recipe_loading import load_section

    def section(left_out: Sequence[str]) -> DataSection:
        kept = {key: value for key, value in of_run.items() if key not in left_out}
        words = [f"{key}={json.dumps(value)}" for key, value in {"path": path, **kept}.items()]
        return load_section(DataSection, None, [*words, *keys], prefix=prefix)

    whole = section(())
    own = {key.partition("=")[0] for key in keys}
    names = tuple(name for name in of_run if name != "loss_on" and name not in own)
    if not names or rows_fit(whole):
        return whole, ()
    for left_out in (*((name,) for name in names), names):
        found = section(left_out)
        if rows_fit(found):
            return found, left_out
    return whole, ()


def _say(text: str) -> None:
    """Prints a line, in which texts of files may stand."""
    from hymba_align.eval.report.words import seen
    from hymba_align.secrets import redact

    click.echo(seen(redact(text)))


def _print(inspection: Inspection, page: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from hymba_align.eval.report.words import seen
    from hymba_align.inside.summary import summary
    from hymba_align.secrets import redact
    from hymba_align.terminal import open_console, print_table, print_text

    console, told = open_console(), summary(inspection)
    if told.rows:
        table = Table()
        for name in told.head:
            table.add_column(name, overflow="fold")
        for row in told.rows:
            table.add_row(*(Text(seen(redact(cell))) for cell in row))
        print_table(console, table)
    for finding in told.findings:
        print_text(console, Text(seen(redact(f"{'! ' if finding.sign else '- '}{finding.text}"))))
    console.print(f"All of it: {page}", soft_wrap=True, markup=False)


def _print_json(inspection: Inspection, folder: Path) -> None:
    from hymba_align.inside.output import NUMBERS, PAGE, PLOTS

    print_json(
        {
            "checkpoint": inspection.checkpoint,
            "against": inspection.against,
            "page": folder / PAGE,
            "numbers": folder / NUMBERS,
            "plots": sorted((folder / PLOTS).glob("*.png")),
            "findings": inspection.findings,
            "left_out": inspection.left_out,
            "seconds": inspection.seconds,
        }
    )
