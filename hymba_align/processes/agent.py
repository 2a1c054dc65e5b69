"""The process between a command and the processes that train: torch's elastic agent, with exit codes that survive.

    python -m hymba_align.processes.agent --processes 2 --report FILE sft runs/NAME/recipe.yaml

`torchrun` is the same agent, and ends with 1 whatever its processes ended with, and on SIGTERM before they have. Here 75
(preempted, checkpoint written) stays 75, and SIGTERM goes to the processes, which save and end by themselves. What
happened goes into FILE as one sentence, for the command to say.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_align.errors import HymbaAlignError, Preempted

STARTED_BY_US = "HYMBA_ALIGN_LAUNCHED"
"""Set for processes that train, to the process id of their launcher."""
CONTINUES = "the same command continues from the last checkpoint"
STOP_WORKERS_S = 30
MEET_S = 900
"""How long machines wait for one another."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code for the processes together: theirs, 75 after preemption, 128 + N for one that signal N killed."""
    given = _parser().parse_args(arguments)
    die_with(given.parent)
    os.environ[STARTED_BY_US] = str(os.getpid())
    _share_cores(given.processes)
    stopping = _forward_sigterm()
    try:
        code, words = _run(given), ""
    except Exception as error:
        code, words = explain(error, stopping, given.continues)
    if code == 0 and stopping:
        code, words = Preempted.exit_code, "it had just finished"
    if given.report is not None and words:
        Path(given.report).write_text(words, encoding="utf-8")
    return code


def die_with(parent: int | None) -> None:
    """Has the kernel end this process at once when its parent ends, however that ended.

    Otherwise a command that is killed would leave processes that go on training into the folder of the next one.
    """
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(HymbaAlignError.exit_code)


def explain(error: Exception, stopping: Sequence[int] = (), continues: str = CONTINUES) -> tuple[int, str]:
    """The exit code for what the agent raised, and what happened, to follow "sft failed: ".

    Args:
        stopping: the signals that this process passed on.
        continues: words about the same command, given again.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, _StoppedBeforeStartError):
        return Preempted.exit_code, "it was preempted before it began"
    if isinstance(error, SignalException):
        return 128 + int(error.sigval), f"its launcher received {signal.Signals(error.sigval).name}; {continues}"
    if not isinstance(error, ChildFailedError):
        reason = " ".join(str(error).split())
        return HymbaAlignError.exit_code, f"its processes could not be started: {type(error).__name__}: {reason}"
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if _preempted(set(codes.values()), told=bool(stopping)):
        return Preempted.exit_code, "it was preempted"
    rank = min(codes, key=lambda one: _place(codes[one]))
    code, process = codes[rank], f"process {rank} (pid {error.failures[rank].pid})"
    return code if code > 0 else 128 - code, f"{process} {how_it_ended(code, continues)}"


def how_it_ended(code: int, continues: str = CONTINUES) -> str:
    """What the exit code of a process that failed says about it, to follow its name."""
    if code >= 0:
        return f"ended with exit code {code}; its message is above"
    memory = ", which the system also sends when memory is full" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}; {continues}"


def _preempted(codes: set[int], *, told: bool) -> bool:
    """Whether processes that ended with these codes were preempted.

    When one fails, the agent sends the others SIGTERM, and those end as if they were preempted: the failure counts, or a
    cluster would start a run again for ever that cannot go on.

    Args:
        told: whether SIGTERM came to the agent, and so to all of them.
    """
    if told and all(code < 0 for code in codes - {Preempted.exit_code}):  # some may have been killed at the end
        return bool(codes & {Preempted.exit_code, -signal.SIGTERM})
    return Preempted.exit_code in codes and codes <= {Preempted.exit_code, -signal.SIGTERM}


def _place(code: int) -> int:
    """Which of several exit codes is the cause: a signal from outside, an error, what the agent did to the others."""
    if code in (-signal.SIGTERM, Preempted.exit_code):
        return 2
    return 1 if code > 0 or code == -signal.SIGABRT else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hymba_align.processes.agent")
    parser.add_argument("--processes", type=int, required=True, help="on this machine")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine", type=int, default=0, help="which of them this is")
    parser.add_argument("--address", default="127.0.0.1:0", help="HOST:PORT of machine 0")
    parser.add_argument("--parent", type=int, help="process id of the command")
    parser.add_argument("--report", help="file for what happened, in a folder for this launch alone")
    parser.add_argument("--continues", default=CONTINUES, help="what the same command does when it is given again")
    parser.add_argument("command", nargs="+", help="of hymba-align, with its arguments")
    return parser


def _run(given: argparse.Namespace) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # They name each process that ends, in an order that hides the cause; `explain` says it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    several = given.machines > 1
    meeting: Mapping[str, Any] = (
        {
            "rdzv_backend": "static",
            "rdzv_endpoint": given.address,
            "rdzv_configs": {"rank": given.machine, "timeout": MEET_S},
        }
        if several
        else {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    )
    config = LaunchConfig(
        min_nodes=given.machines,
        max_nodes=given.machines,
        nproc_per_node=given.processes,
        run_id="hymba-align" if several else str(uuid.uuid4()),
        max_restarts=0,  # whoever starts the command again continues it
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # SIGTERM is ours
        shutdown_timeout=STOP_WORKERS_S,
        # Else it makes a folder below /tmp, and leaves it there.
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(given.report).parent) if given.report else None),
        **meeting,
    )
    elastic_launch(config, sys.executable)("-u", "-m", "hymba_align", *given.command)
    return 0


def _forward_sigterm() -> list[int]:
    """Passes the first SIGTERM on to the processes, and goes on waiting for them; the list holds what came."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        import psutil

        came.append(number)
        if len(came) > 1:  # the batch script and the cluster may both send it
            return
        workers = psutil.Process().children()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.terminate()
        if not workers:
            raise _StoppedBeforeStartError

    signal.signal(signal.SIGTERM, forward)
    return came


class _StoppedBeforeStartError(Exception):
    """SIGTERM came before there were processes to pass it on to."""


def _share_cores(processes: int) -> None:
    """Gives every process its part of the cores, where the user has not said how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


if __name__ == "__main__":
    sys.exit(main())
