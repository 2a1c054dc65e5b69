"""The confinement of what runs a model's calls, tried with hostile code in it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hymba_align.errors import GraderError
from hymba_align.eval.bfcl import executor
from hymba_align.eval.bfcl import sandbox as sandbox_module
from hymba_align.eval.bfcl.call_check import check_call
from hymba_align.eval.bfcl.environment import bfcl_python
from hymba_align.eval.bfcl.sandbox import Executed, Limits, Sandbox, Verdict

ENTRY = {
    "id": "multi_turn_base_0",
    "involved_classes": ["MathAPI", "GorillaFileSystem"],
    "initial_config": {
        "GorillaFileSystem": {
            "root": {"home": {"type": "directory", "contents": {"a.txt": {"type": "file", "content": "hello"}}}}
        }
    },
}


INSTANCE = "hymba_multi_turn_base_0_GorillaFileSystem_instance"


@pytest.fixture(scope="module")
def sandbox(snippets: ModuleType) -> Iterator[Any]:
    with snippets.SnippetSandbox(bfcl_python(), limits=Limits(cpu_s=1)) as opened:
        yield opened


# ---- what must fail --------------------------------------------------------------------------------------------------

NOT_PERMITTED = "PermissionError: [Errno 1] Operation not permitted"
HOSTILE = {
    "connects": "import socket; socket.socket().connect(('127.0.0.1', 22))",
    "binds": "import socket; socket.socket().bind(('', 0))",
    "makes a local socket": "import socket; socket.socketpair()",
    "forks": "import os; os.fork()",
    "starts a program": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "becomes a program": "import os; os.execv('/bin/true', ['true'])",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills all": "import os; os.kill(-1, 9)",
    "writes a file": "open('file', 'w')",
    "reads a file": "open('/etc/passwd')",
    "reads this process's variables": "open('/proc/self/environ')",
    "reads its parent's variables": f"open('/proc/{os.getpid()}/environ')",
    "lists a folder": "import os; os.listdir('.')",
    "makes a folder": "import os; os.mkdir('folder')",
    "removes a file": f"import os; os.remove({__file__!r})",
    "changes its folder": "import os; os.chdir('/')",
    "makes a pipe": "import os; os.pipe()",
    "asks for a limit": "import resource; resource.getrlimit(resource.RLIMIT_AS)",
    "becomes another user": "import os; os.setuid(1)",
    "lowers its priority": "import os; os.nice(1)",
    "takes a lock on memory": "import ctypes as c, os; l = c.CDLL(None, use_errno=True); l.mlockall(3); raise OSError(c.get_errno(), os.strerror(c.get_errno()))",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_not_permitted(sandbox: Any, what: str) -> None:
    assert sandbox.run_snippet(HOSTILE[what])["failed"].startswith(NOT_PERMITTED)


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("bytearray(8 << 30)", "memory limit reached"),
        ("while True: pass", "CPU time limit reached"),
        ("import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "ended by signal 9"),
        ("answer = 'a' * (20 << 20)", "output limit reached"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
        ("import os; os._exit(0)", "ended in the middle of its answer"),
        ("import os; os.write(3, b'{')", "ended in the middle of its answer"),
        ("import os; os.write(3, b'[]'); os._exit(0)", "no answer"),
        ("import os; os.write(3, b'[' * 100000); os._exit(0)", "no answer"),
        ("answer = [[1]]", "no answer"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("answer = object()", "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_it_ends_there(sandbox: Any, code: str, failed: str) -> None:
    assert sandbox.run_snippet(code) == {"failed": failed}


def test_it_can_compute(sandbox: Any) -> None:
    code = "import math, os, random\nprint('nobody reads this')\nanswer = [math.prod(range(1, 6)), os.getpid() > 0]"
    assert sandbox.run_snippet(code) == {"answer": [120, True]}


def test_only_the_pipe_of_its_answer_is_open(sandbox: Any) -> None:
    code = """
import os
answer = []
for number in range(64):
    try:
        os.write(number, b"")
    except OSError:
        continue
    answer.append(number)
"""
    assert sandbox.run_snippet(code) == {"answer": [3]}


def test_variables_of_ours_are_not_in_it(snippets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with snippets.SnippetSandbox(bfcl_python()) as sandbox:
        names = set(sandbox.run_snippet("import os; answer = list(os.environ)")["answer"])
    assert names - {"LD_LIBRARY_PATH"} == {
        "BFCL_PROJECT_ROOT",
        "HOME",
        "LC_ALL",
        "OPENBLAS_NUM_THREADS",
        "PYTHONHASHSEED",
        "PYTHONSAFEPATH",
        "TZ",
    }


def test_a_request_finds_nothing_that_another_left(sandbox: Any) -> None:
    assert sandbox.run_snippet("import mpmath, random; mpmath.mp.dps = 50; random.left = 1; answer = 1") == {
        "answer": 1
    }
    answer = sandbox.run_snippet("import mpmath, random; answer = [mpmath.mp.dps, hasattr(random, 'left')]")
    assert answer == {"answer": [15, False]}


def test_the_sandbox_itself_runs_no_code() -> None:
    with pytest.raises(GraderError) as caught, Sandbox(bfcl_python()) as sandbox:
        sandbox._ask("snippet", code="answer = 1")
    assert str(caught.value) == (
        "the sandbox that runs BFCL's multi-turn calls ended twice over a request to snippet; start again, the answers so "
        "far are kept"
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_calls_run_on_the_state_that_earlier_ones_left(sandbox: Any) -> None:
    assert sandbox.execute(ENTRY, [["mkdir(dir_name='b')"], ["cd(folder='b')", "pwd()"]]).results == [
        '{"current_working_directory": "b"}',
        '{"current_working_directory": "/home/b"}',
    ]
    assert sandbox.execute(ENTRY, [["ls()"]]).results == ['{"current_directory_content": ["a.txt"]}']


def test_a_refused_call_fails_and_changes_nothing(sandbox: Any) -> None:
    refused = check_call("__import__('os').getcwd()", ["ls"])
    assert sandbox.execute(ENTRY, [[refused.text, "ls()"]]).results == [
        "Error during execution: name 'refused_call' is not defined",
        '{"current_directory_content": ["a.txt"]}',
    ]


def test_a_call_that_computes_too_long_or_too_much_fails_alone(sandbox: Any) -> None:
    assert sandbox.execute(ENTRY, [["power(base=10, exponent=1000000000)"]]) == Executed(None, "CPU time limit reached")
    assert sandbox.execute(ENTRY, [["add(a=1, b=2)"]]).results == ['{"result": 3}']


@pytest.mark.parametrize("answer", [{}, {"results": ["1", "2"]}, {"results": "1"}, {"valid": True}])
def test_an_answer_of_another_form_counts_as_none(
    sandbox: Any, monkeypatch: pytest.MonkeyPatch, answer: dict[str, object]
) -> None:
    monkeypatch.setattr(sandbox, "_ask", lambda what, **request: answer)
    assert sandbox.execute(ENTRY, [["ls()"], ["pwd()"]]) == Executed(None, "no answer")
    assert sandbox.grade({**ENTRY, "target": []}, []) == Verdict(False, "sandbox", "no answer")


def test_official_substitution_is_the_one_that_the_checks_assume(sandbox: Any) -> None:
    texts = ["cd('a')", r"add('\tail (x07(\\sort( )\n')", "add(a=[\"it's cd (1)\"], b='\\x07(')", "add('é cd\\u2028(')"]
    checked = [check_call(text, ["cd", "add"]).text for text in texts]
    assert "refused_call()" not in checked
    code = f"""
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import _process_method_calls
names = {{name: {INSTANCE!r} for name in ("cd", "sort", "tail", "x07", "add")}}
answer = [_process_method_calls(text, names) for text in {checked!r}]
"""
    replaced = sandbox.run_snippet(code)["answer"]
    assert replaced == [substituted(text) for text in checked]
    for text in replaced:
        with warnings.catch_warnings(action="ignore"):  # '\t' before 'ail(' has become '\h', which is no escape
            call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Attribute)
        assert all(isinstance(ast.literal_eval(value), str) for value in call.args)


def substituted(text: str) -> str:
    names = ("cd", "sort", "tail", "x07", "add")
    return re.sub(
        r"\b([a-zA-Z_]\w*)\s*(?=\()", lambda found: f"{INSTANCE}.{found[1]}" if found[1] in names else found[1], text
    )


def test_its_network_is_not_ours_where_the_kernel_allows_that(sandbox: Any) -> None:
    sandbox.prove()
    assert sandbox._process is not None
    networks = [os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", sandbox._process.pid)]
    assert (networks[0] != networks[1]) == sandbox.own_network


def test_without_a_network_of_its_own_it_still_makes_no_socket(
    snippets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sandbox_module.EXECUTOR.read_text()
    assert text.count("own_network = leave_network()") == 1
    (tmp_path / "executor.py").write_text(text.replace("own_network = leave_network()", "own_network = False"))
    monkeypatch.setattr(sandbox_module, "EXECUTOR", tmp_path / "executor.py")
    with snippets.SnippetSandbox(bfcl_python()) as sandbox:
        assert sandbox.run_snippet(HOSTILE["connects"])["failed"] == NOT_PERMITTED
        assert sandbox.own_network is False


# ---- its life --------------------------------------------------------------------------------------------------------


def test_one_that_was_killed_is_started_again_and_its_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Sandbox(bfcl_python()) as sandbox:
        assert sandbox.execute(ENTRY, [["add(a=1, b=2)"]]).results == ['{"result": 3}']
        (folder,) = tmp_path.iterdir()
        assert list((folder / "empty").iterdir()) == []
        assert sandbox._process is not None
        sandbox._process.kill()  # not waited for: the next request may find it dead or dying
        assert sandbox.execute(ENTRY, [["add(a=1, b=2)"]]).results == ['{"result": 3}']
        assert sandbox.starts == 2
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_its_parent_is_killed() -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from snippets import SnippetSandbox
sandbox = SnippetSandbox(Path({str(bfcl_python())!r}))
sandbox.prove()
print(sandbox._process.pid, sandbox._folder.name, sandbox.copy.name, flush=True)
sandbox.run_snippet("import time; time.sleep(60)")
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, *folders = parent.stdout.readline().split()
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text().split():
        time.sleep(0.01)
    (child,) = children.read_text().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while is_alive(pid) or is_alive(child):
        assert time.monotonic() < end, "outlived its parent"
        time.sleep(0.01)
    for folder in folders:
        shutil.rmtree(folder)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_request_that_only_waits_is_ended_and_its_process_gone(snippets: ModuleType) -> None:
    with snippets.SnippetSandbox(bfcl_python(), limits=Limits(wall_s=1)) as sandbox:
        assert sandbox.run_snippet("import time; time.sleep(60)") == {"failed": "time limit reached"}
        assert sandbox._process is not None
        pid = sandbox._process.pid
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


# ---- where it is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64"), ("Windows", "AMD64")])
def test_machines_that_cannot_confine_are_refused(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sandbox_module.platform, "system", lambda: system)
    monkeypatch.setattr(sandbox_module.platform, "machine", lambda: machine)
    with pytest.raises(GraderError) as caught, Sandbox(bfcl_python()) as sandbox:
        sandbox.prove()
    assert str(caught.value) == (
        "BFCL's multi-turn categories run calls that a model wrote, which hymba-align confines on Linux (x86-64, ARM) "
        f"only, and this is {system} on {machine}; score them there, or leave them out with eval.bfcl.categories"
    )


@pytest.mark.parametrize(
    ("line", "instead", "why"),
    [
        (
            "    rules.append((RETURN, 0, 0, REFUSE))",
            "    rules.append((RETURN, 0, 0, ALLOW))",
            "the filter does not forbid to make a socket, make a process, read a file, write a file, list a folder",
        ),
        ("SECCOMP_MODE_FILTER = 2", "SECCOMP_MODE_FILTER = 3", "OSError: [Errno 22] Invalid argument"),
        ("def main() -> None:", "def main() -> None:\n    raise RuntimeError('broken')", "RuntimeError: broken"),
    ],
)
def test_it_is_refused_where_what_must_fail_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, instead: str, why: str
) -> None:
    text = sandbox_module.EXECUTOR.read_text()
    assert text.count(line) == 1
    (tmp_path / "executor.py").write_text(text.replace(line, instead))
    monkeypatch.setattr(sandbox_module, "EXECUTOR", tmp_path / "executor.py")
    with pytest.raises(GraderError) as caught, Sandbox(bfcl_python()) as sandbox:
        sandbox.prove()
    assert str(caught.value) == (
        f"BFCL's multi-turn categories run calls that a model wrote, which cannot be confined here ({why}); score them "
        "where seccomp works, or leave them out with eval.bfcl.categories"
    )


# ---- the filter, on machines that are not this one -------------------------------------------------------------------

FORBIDDEN = {  # numbers from the kernel's tables
    "x86_64": {
        "open": 2, "pread64": 17, "pipe": 22, "socket": 41, "connect": 42, "sendto": 44, "socketpair": 53, "clone": 56,
        "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "prctl": 157, "setrlimit": 160, "tgkill": 234,
        "openat": 257, "prlimit64": 302, "process_vm_readv": 310, "seccomp": 317, "bpf": 321, "execveat": 322,
        "io_uring_setup": 425, "clone3": 435, "openat2": 437,
    },
    "aarch64": {
        "ioctl": 29, "openat": 56, "pipe2": 59, "pread64": 67, "ptrace": 117, "kill": 129, "tgkill": 131, "setrlimit": 164,
        "prctl": 167, "socket": 198, "socketpair": 199, "bind": 200, "connect": 203, "sendto": 206, "clone": 220,
        "execve": 221, "prlimit64": 261, "process_vm_readv": 270, "seccomp": 277, "bpf": 280, "execveat": 281,
        "io_uring_setup": 425, "clone3": 435, "openat2": 437,
    },
}  # fmt: skip


def verdict(machine: str, number: int, architecture: int) -> int:
    """What the filter returns: a small interpreter of the four instructions that it uses."""
    program = executor.filter_program(machine)
    rules = list(struct.iter_unpack("=HBBI", program))
    place, value = 0, 0
    while True:
        code, true, false, operand = rules[place]
        place += 1
        if code == executor.LOAD:
            value = {0: number, 4: architecture}[operand]
        elif code == executor.RETURN:
            return int(operand)
        else:
            holds = value == operand if code == executor.JUMP_IF_EQUAL else value >= operand
            place += true if holds else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_the_listed_calls_pass_and_no_other(machine: str) -> None:
    architecture = executor.AUDIT_ARCH[machine]
    passing = {number for number in range(600) if verdict(machine, number, architecture) == executor.ALLOW}
    assert passing == set(executor.SYSCALLS[machine].values())
    assert not passing & set(FORBIDDEN[machine].values())
    assert verdict(machine, FORBIDDEN[machine]["socket"], architecture) == executor.REFUSE
    other = executor.AUDIT_ARCH["aarch64" if machine == "x86_64" else "x86_64"]
    assert verdict(machine, 0, other) == executor.KILL_PROCESS


def test_the_second_table_of_x86_is_refused() -> None:
    for number in executor.SYSCALLS["x86_64"].values():
        assert verdict("x86_64", executor.X32_CALLS | number, executor.AUDIT_ARCH["x86_64"]) == executor.REFUSE
