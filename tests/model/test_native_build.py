"""How the kernels in C++ are built, kept and loaded, and how they share work among threads."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hymba_align.errors import KernelError
from hymba_align.model.kernels import choice, native, native_scan

CPU = torch.device("cpu")

MISSING = next(filter(None, map(native.why_not, ("scan", "conv", "attention", "norm"))), None)
if MISSING is not None and os.environ.get("CI"):
    pytest.fail(f"the environment variable CI is set, so the native kernels must be tested: {MISSING}", pytrace=False)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source of its own, an empty cache, and nothing logged yet."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_logged", set())
    return folder


def load_anew(name: str = "small") -> ctypes.CDLL:
    return native.load.__wrapped__(name)


def built(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/hymba-align/kernels").iterdir())


def test_a_library_is_built_once_into_a_folder_of_the_users_own(sources: Path, tmp_path: Path) -> None:
    assert load_anew().answer() == 42
    [library] = built(tmp_path)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    made = library.stat().st_mtime_ns
    assert load_anew().answer() == 42
    assert library.stat().st_mtime_ns == made


def test_another_source_or_processor_has_a_library_of_its_own(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_anew()
    (sources / "small.cpp").write_text('extern "C" int answer() { return 43; }\n')
    assert load_anew().answer() == 43
    assert len(built(tmp_path)) == 2
    command, described = native.find_compiler()
    monkeypatch.setattr(native, "find_compiler", lambda: (command, described + "#define __AVX1024F__ 1\n"))
    load_anew()
    assert len(built(tmp_path)) == 3


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_cut_off_library_is_built_again_and_never_run(sources: Path, tmp_path: Path, size: int) -> None:
    load_anew()
    [library] = built(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(whole[:size])
    assert load_anew().answer() == 42
    assert whole in [path.read_bytes() for path in built(tmp_path)]


def test_two_processes_may_build_at_once_into_an_empty_cache(sources: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hymba_align.model.kernels import native\n"
        "native.SOURCES = Path(sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(native.load('small').answer())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(sources)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["42\n", "42\n"]
    assert all(path.suffix == ".so" for path in built(tmp_path))


def test_a_cache_that_cannot_be_written_is_reported_once_and_done_without(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert load_anew().answer() == 42
        assert load_anew().answer() == 42
    [record] = caplog.records
    assert record.getMessage().startswith("native kernels are built again in every process: ")
    assert "cache" in record.getMessage()


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_can_write_is_not_loaded_from(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    load_anew()
    [library] = built(tmp_path)
    library.parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert load_anew().answer() == 42
    [record] = caplog.records
    assert record.getMessage() == (
        f"native kernels are built again in every process: {library.parent} can be written by others; "
        "make it your own and chmod it to 700"
    )


def test_without_a_compiler_the_reason_says_what_to_do(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError) as error:
        load_anew()
    assert str(error.value) == (
        "no C++ compiler (c++, g++, clang++): install one, set CXX, or set "
        "HYMBA_ALIGN_KERNELS=scan=torch,conv=torch,attention=sdpa,norm=torch"
    )
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(
        KernelError, match=r"^the C\+\+ compiler no-such-compiler -O1 fails \(.*No such file.*\): repair"
    ):
        load_anew()


def test_a_source_that_does_not_compile_is_reported_with_what_the_compiler_says(sources: Path, tmp_path: Path) -> None:
    (sources / "small.cpp").write_text("#error too old\n")
    with pytest.raises(
        KernelError, match=r"^small\.cpp does not compile with .*too old.*set CXX to another, or set HYMBA_A"
    ):
        load_anew()
    assert built(tmp_path) == []


def test_a_library_that_cannot_be_loaded_is_reported_with_the_reason(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> ctypes.CDLL:
        raise OSError("failed to map segment from shared object: Operation not permitted")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(
        KernelError, match=r"cannot be loaded \(failed to map.*set XDG_CACHE_HOME to another folder, or"
    ):
        load_anew()


def test_the_reason_is_found_out_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.why_not.cache_clear()
    native.load.cache_clear()
    try:
        reason = native_scan.unavailable(CPU, torch.float32)
        assert reason is not None
        assert reason.startswith("no C++ compiler")
        monkeypatch.undo()
        assert native_scan.unavailable(CPU, torch.float32) == reason
    finally:
        native.why_not.cache_clear()
    assert native_scan.unavailable(CPU, torch.float32) is None


THREADED = """
#include "vectors.h"
extern "C" int64_t done(int64_t count, int64_t threads) {
    std::atomic<int64_t> sum{0};
    in_parallel(count, threads, [&](int64_t) { ++sum; });
    return sum;
}
extern "C" int fails_at(const int64_t *task) {
    return completed([task] {
        in_parallel(9, 3, [task](int64_t index) { if (index == *task) throw std::bad_alloc(); });
    });
}
"""


@pytest.fixture
def threaded(sources: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    shutil.copy(Path(native.__file__).parent / "native/vectors.h", sources)
    (sources / "small.cpp").write_text(THREADED)
    library = load_anew()
    monkeypatch.setattr(native, "load", lambda name: library)
    return library


class Task(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int64),)


def test_a_thread_that_gets_no_memory_is_an_error_and_not_the_end_of_the_process(threaded: ctypes.CDLL) -> None:
    for index in range(9):
        with pytest.raises(MemoryError) as error:
            native.call("small", "fails_at", Task(index))
        assert str(error.value) == (
            "fails_at: no memory for a kernel's working space; make rows shorter or use fewer threads"
        )
    native.call("small", "fails_at", Task(9))  # none of the tasks


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_all_tasks_are_done_where_the_system_grants_no_threads(threaded: ctypes.CDLL) -> None:
    script = (
        "import ctypes, resource, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 40 * 2**20\n"  # stacks of a few threads
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(library.done(ctypes.c_int64(1000), ctypes.c_int64(500)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, threaded._name], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1000\n", "")
