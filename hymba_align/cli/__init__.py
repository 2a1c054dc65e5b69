"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once.

Exit codes: 0 done, 1 the run failed, 2 the input is at fault, 75 stopped by SIGTERM, 130 interrupted. After the last two,
and after most failures, the same command continues a run, a stage or an evaluation; other commands begin anew.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from hymba_align import __version__
from hymba_align.cli import (
    chat,
    completion,
    data,
    doctor,
    explain,
    export,
    init,
    inspect,
    scoring,
    serve,
    show,
    training,
)
from hymba_align.cli.options import print_json_error
from hymba_align.errors import HymbaAlignError, Preempted, SeveralErrors, StorageError
from hymba_align.processes import signals
from hymba_align.secrets import RedactingStream, redact
from hymba_align.terminal import print_words

INTERRUPTED = 130
CONTINUED = ("run", "sft", "dpo", "eval")
"""Commands that go on where they stopped"""
INTERRUPTION = (
    "Interrupted; the same command continues, a stage from its last checkpoint and scoring from its last answer."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hymba-align", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune and align Hymba, NVIDIA's hybrid-head language model, from one YAML recipe."""


for command in (
    init.init,
    doctor.doctor,
    training.run,
    training.sft,
    training.dpo,
    scoring.evaluate,
    scoring.install_bfcl,
    inspect.inspect,
    chat.chat,
    serve.serve,
    data.data_group,
    export.merge,
    export.export,
    show.show,
    show.compare,
    completion.completion,
    explain.explain,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line (that of this process by default); prints one sentence for errors of the user."""
    try:
        code = cli.main(args=arguments, prog_name="hymba-align", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        print_json_error(arguments, type(error).__name__, error.format_message(), error.exit_code)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        told = INTERRUPTION if _command(arguments) in CONTINUED else "Interrupted."
        if _speaks_for_all():
            print_words(told, stderr=True)
        print_json_error(arguments, "Interrupted", told, INTERRUPTED)
        return INTERRUPTED
    except Preempted as error:
        return _preempted(str(error), arguments)
    except Exception as error:
        if signals.requested() and not isinstance(error, StorageError):
            # What SIGTERM did to other processes of this run (data workers, other ranks), as this one saw it.
            what = " ".join(str(error).split())
            return _preempted(
                f"stopped by SIGTERM, and then {type(error).__name__}: {what}; the same command continues", arguments
            )
        if not isinstance(error, HymbaAlignError):
            print_json_error(arguments, type(error).__name__, str(error), HymbaAlignError.exit_code)
            raise
        from hymba_align.data.inspection.preview import visible

        lines = error.lines if isinstance(error, SeveralErrors) else [" ".join(str(error).splitlines())]
        told = "\n".join(visible(redact(line)) for line in lines)
        print_words(f"{_rank_prefix()}Error: {told}", stderr=True)
        click.echo(f"{_rank_prefix()}More: hymba-align explain {error.topic}", err=True)
        print_json_error(arguments, type(error).__name__, told, error.exit_code, error.topic)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _command(arguments: Sequence[str] | None) -> str | None:
    """The first word of a command line that is no option; None where there is none."""
    words = sys.argv[1:] if arguments is None else arguments
    return next((word for word in words if not word.startswith("-")), None)


def _preempted(what: str, arguments: Sequence[str] | None) -> int:
    if _speaks_for_all():
        print_words(f"{_rank_prefix()}Preempted: {redact(what)}.", stderr=True)
    print_json_error(arguments, "Preempted", what, Preempted.exit_code, Preempted.topic)
    return Preempted.exit_code


def _speaks_for_all() -> bool:
    """Whether this is the only process, or the first of those that a command has started."""
    from hymba_align.processes.agent import STARTED_BY_US

    return STARTED_BY_US not in os.environ or os.environ.get("RANK", "0") == "0"


def entry_point() -> None:
    """The console script, on whose streams no secret is written: not in a message, a log line or a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, here and in processes to be started
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is no UTF-8, ? stands for what cannot be written
    sys.stdout, sys.stderr = RedactingStream(sys.stdout), RedactingStream(sys.stderr)
    code = main()
    if code == Preempted.exit_code:
        signals.end_soon()
    sys.exit(code)


def _rank_prefix() -> str:
    """Which of several processes speaks."""
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ and "LOCAL_RANK" in os.environ else ""
