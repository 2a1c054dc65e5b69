"""The program inside the sandbox: runs calls with BFCL's official executor, and grades with its official checker.

`sandbox.py` starts this file with the Python of BFCL's environment, so it imports the standard library and bfcl-eval only.
A request is a line of JSON on stdin, its answer a line on stdout. Every request is done by a process of its own, forked
from this one after the imports and confined before it does anything (`confine`). It ends with its request, so nothing
that a call leaves behind (objects, random numbers, the precision of mpmath) meets another one. Calls of earlier steps are
run again in each: they take microseconds.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and sys.path[0]:
    del sys.path[0]  # this folder, whose modules are not to be taken for others

import ctypes
import datetime
import errno
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import time
import types
from collections.abc import Callable
from typing import Any

MODEL = "hymba"
"""Part of the names of the objects that calls run on; its first letter gives no escape sequence after a backslash"""
STATE_CLASSES = (
    "GorillaFileSystem",
    "MathAPI",
    "MessageAPI",
    "TwitterAPI",
    "TicketAPI",
    "TradingBot",
    "TravelAPI",
    "VehicleControlAPI",
)

# ---- confinement -----------------------------------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
KILL_PROCESS, ALLOW, REFUSE = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_CALLS = 0x40000000  # the second table of x86-64
# What Python needs to compute and to write into a pipe that is open: memory, clocks, signals of its own, and its end. No
# call that opens a file, makes a socket or a process, or reaches another process.
SYSCALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28,
        "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98, "sigaltstack": 131,
        "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
    },
    "aarch64": {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128,
        "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getrusage": 165,
        "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
        "mprotect": 226, "madvise": 233, "getrandom": 278,
    },
}  # fmt: skip


def filter_program(machine: str) -> bytes:
    """The seccomp filter as classic BPF: the listed calls pass, every other one fails with EPERM."""
    rules = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        rules += [(JUMP_IF_AT_LEAST, 0, 1, X32_CALLS), (RETURN, 0, 0, REFUSE)]
    for number in sorted(SYSCALLS[machine].values()):
        rules += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    rules.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_void_p))


def _prctl(option: int, value: int, pointer: Any = None) -> None:
    """Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def leave_network() -> bool:
    """Whether this process is now in a network of its own, with no interface up; not every kernel allows that."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0 or libc.unshare(CLONE_NEWNET) == 0


def confine(limits: dict[str, int], parent: int) -> None:
    """Takes from this process, for good, all but computing and the pipes that it has open.

    Raises: OSError where the kernel has no seccomp.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # died before the line above
        os._exit(1)
    cpu_s, memory = limits["cpu_s"], limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)
    program = filter_program(platform.machine())
    rules = ctypes.create_string_buffer(program, len(program))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program) // 8, ctypes.addressof(rules))))


def _probe(_: dict[str, Any]) -> dict[str, Any]:
    """What in here is not refused by the filter, and must be. A limit that also forbids it does not count."""
    attempts: dict[str, Callable[[], Any]] = {
        "make a socket": socket.socket,
        "make a process": lambda: os.fork() or os._exit(0),
        "read a file": lambda: os.open(__file__, os.O_RDONLY),
        "write a file": lambda: os.open("probe", os.O_WRONLY | os.O_CREAT),
        "list a folder": lambda: os.listdir("/"),
    }
    possible = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
        possible.append(name)
    return {"possible": possible}


# ---- requests, each in a confined process ----------------------------------------------------------------------------


def _execute(request: dict[str, Any]) -> dict[str, Any]:
    """Results of the calls of the last step, after those of all steps before it."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

    entry, results = request["entry"], []
    for calls in request["steps"]:
        results, _ = execute_multi_turn_func_call(
            calls,
            entry["initial_config"],
            entry["involved_classes"],
            MODEL,
            entry["id"],
            long_context="long_context" in entry["id"],
            is_evaL_run=False,
        )
    return {"results": results}


class _Decoded:
    """Stands in for a model's handler: the calls of a step have been decoded and checked before they came here."""

    def decode_execute(self, result: list[str], has_tool_call_tag: bool) -> list[str]:
        return result


def _grade(request: dict[str, Any]) -> dict[str, Any]:
    """The official verdict."""
    from bfcl_eval.eval_checker.eval_runner import _evaluate_single_multi_turn_entry

    entry = request["entry"]
    verdict = _evaluate_single_multi_turn_entry(
        _Decoded(),
        entry["id"],
        request["turns"],
        request["ground_truth"],
        dict(entry),
        MODEL,
        entry["id"].rsplit("_", 1)[0],
    )
    error = verdict.get("error", {})
    words = error.get("error_message", "")
    return {
        "valid": bool(verdict["valid"]),
        "error_type": str(error.get("error_type", "")),
        "error": str(words[0] if isinstance(words, list) else words),
    }


# ---- the process that forks ------------------------------------------------------------------------------------------


def _child(work: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any], pipe: int, parent: int) -> None:
    """Does a request, confined, and writes its answer into the pipe. Never returns."""
    try:
        sys.stdout = sys.stderr = None  # print() does nothing then
        os.dup2(pipe, 3)
        for number in range(3):
            os.close(number)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        confine(request["limits"], parent)
        try:
            answer = work(request)
        except MemoryError:
            answer = {"failed": "memory limit reached"}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(3, data) :]
    except BaseException as error:
        os.write(3, json.dumps({"failed": f"{type(error).__name__}: {error}"[:1000]}).encode())
    finally:
        os._exit(0)


def _run(work: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a confined process, or why there is none: `failed`."""
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _child(work, request, writing, parent)
    os.close(writing)
    data, why = _read_all(reading, request["limits"])
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # has ended, or must; not waited for yet, so the number is still its own
    _, status = os.waitpid(child, 0)
    if why:
        return {"failed": why}
    if os.WIFSIGNALED(status) and not data:
        number = os.WTERMSIG(status)
        return {"failed": "CPU time limit reached" if number == signal.SIGXCPU else f"ended by signal {number}"}
    try:
        answer = json.loads(data)
    except ValueError:
        return {"failed": "ended in the middle of its answer"}
    except RecursionError:
        return {"failed": "no answer"}
    return answer if is_flat(answer) else {"failed": "no answer"}


def is_flat(answer: Any) -> bool:
    """Whether it is an object of plain values and lists of them, as all answers are; others may be too deep to be passed on."""
    plain = (str, int, float, type(None))
    return isinstance(answer, dict) and all(
        all(isinstance(one, plain) for one in (value if isinstance(value, list) else [value]))
        for value in answer.values()
    )


def _read_all(pipe: int, limits: dict[str, int]) -> tuple[bytes, str]:
    """What comes out of the pipe until it closes, and why it was not waited for."""
    end, data = time.monotonic() + limits["wall_s"], bytearray()
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return b"", "time limit reached"
        part = os.read(pipe, 1 << 16)
        if not part:
            return bytes(data), ""
        data += part
        if len(data) > limits["output_bytes"]:
            return b"", "output limit reached"


def _import_official() -> None:
    """Imports all that requests need: a confined process can open no file any more."""
    stand_in = types.ModuleType("bfcl_eval.constants.model_config")  # imports every vendor's client
    stand_in.MODEL_CONFIG_MAPPING = {}  # type: ignore[attr-defined]
    stand_in.ModelConfig = object  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in
    importlib.import_module("bfcl_eval.eval_checker.eval_runner")
    paths = importlib.import_module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    for name in STATE_CLASSES:
        importlib.import_module(paths[name])
    datetime.datetime.strptime("2024", "%Y")  # imports more at its first use


def main() -> None:
    """Answers requests until stdin closes."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = json.loads(sys.argv[2])
    probe = _run(_probe, {"limits": limits})
    if probe.get("possible") != []:
        why = probe.get("failed") or f"the filter does not forbid to {', '.join(probe['possible'])}"
        print(json.dumps({"refused": why}), flush=True)
        return
    _import_official()
    own_network = leave_network()  # not before: with it, root loses the right to read what belongs to others
    works = {"execute": _execute, "grade": _grade}
    print(json.dumps({"own_network": own_network}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_run(works[request["do"]], {**request, "limits": limits})), flush=True)


if __name__ == "__main__":
    main()
