"""Kernels in C++, compiled at first use by the machine's own compiler and loaded with ctypes.

The sources are plain C++ with C functions: they know nothing of Python or torch, so that a build takes seconds and fits
every version of both. What is built lies in a folder of the user's own, under a key of the source, the flags and all that
the compiler says about itself and the processor; a home folder shared by different machines holds one file for each.
A library is loaded only if its content is what its name says, so a cut-off file is built again and never run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hymba_align.errors import KernelError
from hymba_align.model.kernels.choice import DEFAULTS, PLAIN, VARIABLE, log_once

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
BUILD_TIMEOUT_S = 120
# nan and inf stay what they are: no -ffast-math. Products and sums may be contracted, as on every machine with FMA.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)
SWITCH_OFF = f"or set {VARIABLE}=scan=torch,conv=torch,attention=sdpa,norm=torch"

logger = logging.getLogger(__name__)


@lru_cache
def load(name: str) -> ctypes.CDLL:
    """The library built from `native/NAME.cpp`; loaded once per process.

    Raises:
        KernelError: no compiler, or one that fails; the message says what it wrote.
    """
    compiler, described = find_compiler()
    source = b"\0".join(path.read_bytes() for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))))
    key = hashlib.sha256("\0".join([*compiler, *FLAGS, described]).encode() + b"\0" + source).hexdigest()[:32]
    try:
        folder = open_cache()
    except OSError as error:
        log_once(f"native kernels are built again in every process: {error}")
        with tempfile.TemporaryDirectory(prefix="hymba-align-") as temporary:
            return _open(build(name, compiler, key, Path(temporary)))
    for library in sorted(folder.glob(f"{name}-{key}-*.so")):
        if library.name == _library_name(name, key, library.read_bytes()):
            return _open(library)
    return _open(build(name, compiler, key, folder))


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native kernel of this name cannot run there, as half a sentence with the fix; None if it can."""
    if device.type != "cpu":
        there = DEFAULTS.get(device.type, {}).get(name, (PLAIN[name],))[0]
        return f"the native {name} runs on the CPU, not on {device.type}: use {name}={there} there"
    if dtype == torch.float64:
        return f"the native {name} computes in float32: use {name}={PLAIN[name]} for float64"
    return why_not(name)


@lru_cache
def why_not(name: str) -> str | None:
    """Why `native/NAME.cpp` cannot be built and loaded here, as half a sentence with the fix; None if it can."""
    try:
        load(name)
    except KernelError as error:
        return str(error)
    return None


def check(name: str, inputs: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuses what a kernel would read beyond its end, cannot read or would round.

    Args:
        inputs: tensors and the shapes that they must have, by the names that an error calls them.

    Raises:
        ValueError: a tensor of another shape, elsewhere, or in float64.
    """
    for label, (x, shape) in inputs.items():
        if x is None:
            continue
        if x.dtype == torch.float64 or x.device.type != "cpu":
            raise ValueError(
                f"native {name}: {label} is {x.dtype} on {x.device}; it computes in float32 on the CPU, "
                f"use {name}={PLAIN[name]}"
            )
        if x.shape != shape:
            raise ValueError(f"native {name}: {label} has the shape {tuple(x.shape)}, not {shape}")


def needed(parents: list[int], initial: list[int]) -> int:
    """How many given states a plan refers to: the largest index of one, plus 1."""
    return 1 + max((state for parent, state in zip(parents, initial, strict=True) if parent < 0), default=-1)


def given(what: str, x: Tensor | None, least: int, shape: tuple[int, ...]) -> tuple[Tensor | None, tuple[int, ...]]:
    """The given states of a plan, called `what` in errors, with the shape that `check` shall ask of them.

    Raises:
        ValueError: there are none, and the plan refers to some.
    """
    if x is None and least:
        raise ValueError(f"{what}: the plan refers to {least} of them, but none were given")
    return x, (least if x is None else max(least, len(x)), *shape)


def call(name: str, function: str, arguments: ctypes.Structure) -> None:
    """Runs a function of `native/NAME.cpp`.

    Raises:
        MemoryError: the system gives it no memory.
    """
    if getattr(load(name), function)(ctypes.byref(arguments)):
        raise MemoryError(f"{function}: no memory for a kernel's working space; make rows shorter or use fewer threads")


class Rows(ctypes.Structure):
    """(T, I) values and how many lie between two tokens."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


def pointer(x: Tensor | None) -> int | None:
    """Address of the first value, None for none. The caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


def token_rows(x: Tensor) -> Tensor:
    """`x` (T, I) as `Rows` describes it: the values of a token beside each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def find_compiler() -> tuple[list[str], str]:
    """Command of the C++ compiler with its flag for this processor, and all macros that it defines with it.

    The macros name compiler, version, platform and every instruction set extension that it will use.

    Raises:
        KernelError: there is none.
    """
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@lru_cache
def _find_compiler(wanted: str, path: str) -> tuple[list[str], str]:
    if os.name != "posix":
        raise KernelError(
            f"native kernels are built on Linux and macOS only, not on {platform.system()}: use the torch ones"
        )
    if wanted:
        command = shlex.split(wanted)
    else:
        found = next(filter(None, (shutil.which(name, path=path) for name in COMPILERS)), None)
        if found is None:
            raise KernelError(f"no C++ compiler ({', '.join(COMPILERS)}): install one, set CXX, {SWITCH_OFF}")
        command = [found]
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    output = ""
    for flags in ([tuned], []):
        status, output = _call([*command, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        if status == 0:
            return [*command, *flags], output
    raise KernelError(f"the C++ compiler {shlex.join(command)} fails ({_complaint(output)}): repair it, {SWITCH_OFF}")


def open_cache() -> Path:
    """The folder of built libraries, made if need be: $XDG_CACHE_HOME (or ~/.cache)/hymba-align/kernels.

    Raises:
        OSError: it cannot be made or written, or somebody else could put a library there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "hymba-align" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others; make it your own and chmod it to 700")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


def build(name: str, compiler: list[str], key: str, folder: Path) -> Path:
    """The library in `folder`, compiled and put there in one step: nobody sees half of it, and no lock is needed.

    Raises:
        KernelError: the compiler fails.
    """
    source = SOURCES / f"{name}.cpp"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as temporary:
        made = Path(temporary) / f"{name}.so"
        status, output = _call([*compiler, *FLAGS, "-o", str(made), str(source)])
        if status != 0:
            raise KernelError(
                f"{source.name} does not compile with {shlex.join(compiler)} ({_complaint(output)}): "
                f"repair the compiler, set CXX to another, {SWITCH_OFF}"
            )
        library = folder / _library_name(name, key, made.read_bytes())
        made.replace(library)
    logger.info("built %s", library)
    return library


def _library_name(name: str, key: str, content: bytes) -> str:
    return f"{name}-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # such as a folder mounted without the right to execute
        raise KernelError(
            f"{library} cannot be loaded ({error}): set XDG_CACHE_HOME to another folder, {SWITCH_OFF}"
        ) from error


def _call(command: list[str]) -> tuple[int, str]:
    """Exit status of a command and what it wrote."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr


def _complaint(output: str) -> str:
    """The first line that speaks of an error, or the last one."""
    lines = output.strip().splitlines() or ["it writes nothing"]
    return next((line for line in lines if "error" in line), lines[-1])
