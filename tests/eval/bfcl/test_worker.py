"""The process that grades: what it decodes, what it never runs, and what happens when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hymba_align.errors import GraderError
from hymba_align.eval.bfcl.client import WORKER, BFCLClient, Grade
from hymba_align.eval.bfcl.environment import bfcl_python

CALL = '<toolcall> {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}} </toolcall>'


def graded(client: BFCLClient, text: str, category: str = "simple_python", number: int = 0) -> Grade:
    (grade,) = client.grade(category, {f"{category}_{number}": text})
    return grade


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"I call the function.\n{CALL}\nThat is all.",
        '<toolcall>{"name":"calculate_triangle_area","arguments":"{\\"base\\": 10, \\"height\\": 5}"}</toolcall>',
        '<toolcall> [{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}] </toolcall>',
        "[calculate_triangle_area(base=10, height=5)]",
        "calculate_triangle_area(base=10, height=5)",
        "```\n[calculate_triangle_area(base=2 * 5, height=5)]\n```",
    ],
)
def test_the_same_call_is_right_however_it_is_written(client: BFCLClient, text: str) -> None:
    grade = graded(client, text)
    assert (grade.correct, grade.error_type, grade.error) == (True, "", "")
    assert grade.calls == "[{'calculate_triangle_area': {'base': 10, 'height': 5}}]"


def test_several_blocks_are_several_calls(worker: ModuleType) -> None:
    second = '<toolcall> {"name": "g", "arguments": {"text": "a </toolcall> b"}} </toolcall>'
    text = f'{CALL}\n{second}\n<toolcall> {{"name": "h"}} </toolcall>'
    assert list(worker.toolcalls(text)) == [
        {"calculate_triangle_area": {"base": 10, "height": 5}},
        {"g": {"text": "a </toolcall> b"}},
        {"h": {}},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<toolcall> {"name": "f", "arguments": {}}', "a <toolcall> is not closed by </toolcall>"),
        ('<toolcall> {"arguments": {}} </toolcall>', "a call has no name"),
        ('<toolcall> {"name": "f", "arguments": [1]} </toolcall>', "the arguments of f are no object"),
        (
            "<toolcall> f(a=1) </toolcall>",
            "what follows <toolcall> is no JSON object: Expecting value: line 1 column 12 (char 11)",
        ),
    ],
)
def test_a_block_that_holds_no_call_makes_the_answer_undecodable(worker: ModuleType, text: str, message: str) -> None:
    with pytest.raises(worker.NoCallsError) as raised:
        list(worker.toolcalls(f"{CALL} {text}"[len(CALL) + 1 :]))
    assert str(raised.value) == message


def test_a_broken_block_after_a_right_one_makes_the_answer_wrong(client: BFCLClient) -> None:
    grade = graded(client, f"{CALL}\n<toolcall> {{")
    assert (grade.correct, grade.error_type) == (False, "ast_decoder:decoder_failed")


def test_positional_arguments_are_dropped_by_the_official_decoder_and_that_is_noted(client: BFCLClient) -> None:
    grade = graded(client, "[calculate_triangle_area(10, height=5)]")
    assert grade.calls == "[{'calculate_triangle_area': {'height': 5}}]"
    assert grade.error == "Missing required parameter: 'base'."
    assert grade.dropped_arguments
    assert not graded(client, CALL).dropped_arguments


def test_values_for_java_are_source_code_in_strings_as_the_official_checker_has_it(client: BFCLClient) -> None:
    call = {"name": "SQLCompletionAnalyzer.makeProposalsFromObject"}
    params = 'new HashMap<String, Object>() {{ put("limit", 50); put("schemaFilter", "public"); }}'
    arguments: dict[str, Any] = {"object": "Customers", "useShortName": "true", "params": params}
    right = json.dumps({**call, "arguments": arguments})
    wrong = json.dumps({**call, "arguments": {**arguments, "useShortName": True}})
    assert graded(client, f"<toolcall> {right} </toolcall>", "simple_java", 1).correct
    assert graded(client, f"<toolcall> {wrong} </toolcall>", "simple_java", 1).error_type == "type_error:java"


# ---- nothing is executed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "1 + __import__('os').mkdir({path!r})",
        "__import__('os').mkdir({path!r}) or 1",
        "1 + (lambda: __import__('os').mkdir({path!r}))()",
        "[1 + __import__('os').mkdir({path!r})]",
        "{{'a': 1 + open({path!r}, 'w').write('x')}}",
        "-__import__('os').mkdir({path!r})",
        "'a' * 10**10",
        "9**9**9**9",
        "2**65",
    ],
)
def test_an_argument_is_never_executed(client: BFCLClient, tmp_path: Path, expression: str) -> None:
    path = tmp_path / "made"
    grade = graded(client, f"[calculate_triangle_area(base={expression.format(path=str(path))}, height=5)]")
    assert not grade.correct
    assert not path.exists()


def test_the_package_alone_would_execute_it(tmp_path: Path) -> None:
    path = tmp_path / "made"
    code = (
        "from bfcl_eval.model_handler.utils import default_decode_ast_prompting as decode\n"
        f"text = \"[f(a=1 + (__import__('os').mkdir({str(path)!r}) or 0))]\"\n"
        "print(decode(text))"
    )
    assert in_package(code, tmp_path) == "[{'f': {'a': 1}}]"
    assert path.is_dir()


def test_arguments_that_would_have_to_be_executed_are_noted(client: BFCLClient) -> None:
    assert graded(client, "[calculate_triangle_area(base=x + 1, height=5)]").refused_code
    assert not graded(client, "[calculate_triangle_area(base=60 * 60, height='a' + 'b')]").refused_code


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("[f(a=-3 * 2.5 / 4 - 1 % 3)]", True),
        ("[f(a=10**6)]", True),
        ("[f(a='x' + 'y' + 'z')]", True),
        ("[f(a=1 + x)]", False),
        ("[f(a=1 << 40)]", False),
        ("[f(a='x' * 3)]", False),
        ("[f(a=10**-3)]", False),
        ("[f(a=(2**3)**4)]", False),
        ("[f(a=lambda: 1)]", False),
        ("[f(a=('x' + 'y') * 3)]", False),
        ("[f(a=('%9d' + 'y') % 3)]", False),
        ("[f(a='%s' % 'y')]", False),
        ("[f(a=-'x' + 1)]", False),
        ("[f(a=b'x' + b'y')]", False),
        ("[f(a=[{'b': 1 + x}])]", False),
    ],
)
def test_only_small_arithmetic_of_literals_passes(worker: ModuleType, text: str, allowed: bool) -> None:
    if allowed:
        worker.check_no_code(text)
    else:
        with pytest.raises(worker.CodeError):
            worker.check_no_code(text)


def test_what_python_cannot_parse_does_not_pass(worker: ModuleType) -> None:
    with pytest.raises(SyntaxError):
        worker.check_no_code("[f(a=1]")


def test_a_long_sum_is_checked_in_one_pass(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    kind_of = worker.kind_of
    monkeypatch.setattr(worker, "kind_of", lambda node: (asked.append(node), kind_of(node))[1])
    worker.check_no_code(f"[f(a={'+'.join('3' * 300)})]")
    assert len(asked) == 599  # 300 numbers and 299 sums


def test_a_number_too_long_to_be_written_is_wrong_and_ends_nothing(client: BFCLClient) -> None:
    grade = graded(client, f"[calculate_triangle_area(base={'*'.join(['1000000**64'] * 20)}, height=5)]")
    assert (grade.correct, grade.error_type, grade.calls) == (False, "checker_raised:ValueError", None)


def test_half_of_a_surrogate_pair_comes_back_as_text_that_a_file_can_hold(client: BFCLClient) -> None:
    entry = client.entries("live_simple")[40]
    (tool,) = entry["tools"]
    assert tool["parameters"]["required"] == ["body"]
    call = json.dumps({"name": tool["name"], "arguments": {"body": {"\ud800": 1}}})
    (grade,) = client.grade("live_simple", {entry["id"]: f"<toolcall> {call} </toolcall>"})
    # The package puts the keys of an object into its messages as they are.
    assert grade.error.startswith("Unexpected dict key parameter: '\\ud800'.")
    grade.error.encode()


@pytest.mark.parametrize(
    "text", ["[" * 500, "[f(a=" + "-" * 5000 + "1)]", "[f(a=" + "(" * 300, "\x00", "[f(a='\\ud800')]"]
)
def test_broken_and_deeply_nested_answers_are_wrong_and_harmless(client: BFCLClient, text: str) -> None:
    assert not graded(client, text).correct
    assert graded(client, CALL).correct


@pytest.mark.parametrize(
    ("category", "brackets", "longest"),
    [("simple_java", 20_000, 4_000), ("simple_javascript", 20_000, 4_000), ("simple_python", 20_000, 20_000)],
)
def test_a_list_so_long_that_its_parser_could_crash_is_not_read(
    client: BFCLClient, category: str, brackets: int, longest: int
) -> None:
    text = f"[f(a={'(' * brackets}1{')' * brackets})]"
    grade = graded(client, text, category)
    assert (grade.correct, grade.error_type) == (False, "ast_decoder:decoder_failed")
    assert f"{len(text):,} characters, more than the {longest:,} that are read as a list of calls" in grade.error


def test_blocks_are_read_in_an_answer_of_any_length(worker: ModuleType) -> None:
    text = "a" * 30_000 + CALL + " " * 30_000 + CALL
    assert len(worker.decode(text, None)) == 2


def test_what_takes_too_long_to_decode_in_a_conversation_is_no_call(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(text: str) -> None:
        while True:
            pass

    monkeypatch.setattr(worker, "CPU_LIMIT_S", 0.05)
    monkeypatch.setattr(worker, "toolcalls", endless)
    monkeypatch.setitem(sys.modules, "bfcl_eval.model_handler.utils", ModuleType("utils"))
    monkeypatch.setattr(sys.modules["bfcl_eval.model_handler.utils"], "convert_to_function_call", list, raising=False)
    monkeypatch.setattr(
        sys.modules["bfcl_eval.model_handler.utils"], "default_decode_execute_prompting", list, raising=False
    )
    assert worker.decode_calls({"answers": [CALL]}) == [None]


def test_an_array_that_the_package_would_read_for_ever_is_wrong_after_a_second(client: BFCLClient) -> None:
    arguments = {"filepath": "/var/log/db.log", "encoding": "utf-8", "processFunction": "processFunction"}
    endless = {"name": "extractLastTransactionId", "arguments": {**arguments, "status": "[[1]" + ",[1]" * 60}}
    grade = graded(client, f"<toolcall> {json.dumps(endless)} </toolcall>", "simple_javascript", 2)
    assert (grade.correct, grade.error_type) == (False, "checker_raised:TimeoutError")


def test_grading_evaluates_no_name_even_without_the_search_for_code(tmp_path: Path) -> None:
    path = tmp_path / "made"
    code = (
        "import os\n"
        "from bfcl_eval.model_handler.utils import default_decode_ast_prompting as decode\n"
        "stdout = os.dup(1)\n"
        "worker.main()  # which ends with its requests\n"
        "os.dup2(stdout, 1)\n"
        f"hostile = \"1 + (__import__('os').mkdir({str(path)!r}) or 0)\"\n"
        "print(decode('[f(a=60 * 60)]'))\n"
        "for expression in (hostile, f'1 + (lambda: 2)()', '1 + [one for one in (2,)][0]'):\n"
        "    try:\n"
        "        decode(f'[f(a={expression})]')\n"
        "    except PermissionError as error:\n"
        "        print(error)\n"
    )
    refused = "evaluation of a name while grading"
    assert in_package(code, tmp_path).splitlines() == ["[{'f': {'a': 3600}}]", refused, refused, refused]
    assert not path.exists()


def test_grading_starts_no_program_and_opens_no_connection(tmp_path: Path) -> None:
    code = (
        "import os, socket, subprocess\n"
        "stdout = os.dup(1)\n"
        "worker.main()  # which ends with its requests\n"
        "os.dup2(stdout, 1)\n"
        "for act in (lambda: os.system('true'), lambda: subprocess.run(['true']), lambda: socket.socket(), os.fork):\n"
        "    try:\n"
        "        act()\n"
        "    except PermissionError as error:\n"
        "        print(error)\n"
    )
    said = in_package(code, tmp_path).splitlines()
    assert said == [
        "os.system while grading",
        "subprocess.Popen while grading",
        "socket.__new__ while grading",
        "os.fork while grading",
    ]


# ---- the package's traps --------------------------------------------------------------------------------------------


def in_package(code: str, folder: Path) -> str:
    """What a program prints in BFCL's environment, with the stand-ins of worker.py in place."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(WORKER)!r})\n"
        "worker = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(worker)\n"
        "worker.place_stand_ins()\n"
    )
    environment = {"BFCL_PROJECT_ROOT": str(folder), "PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1"}
    command = [str(bfcl_python()), "-I", "-B", "-c", load + code]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_looks_a_model_name_with_an_underscore_up_as_another(tmp_path: Path, worker: ModuleType) -> None:
    code = (
        "from bfcl_eval.eval_checker.ast_eval.ast_checker import convert_func_name\n"
        "print(convert_func_name('math.sqrt', worker.MODEL))\n"
        "try:\n"
        "    convert_func_name('math.sqrt', 'my_model')\n"
        "except KeyError as error:\n"
        "    print('no such model:', error)\n"
    )
    assert in_package(code, tmp_path).splitlines() == ["math.sqrt", "no such model: 'my/model'"]
    assert "_" not in worker.MODEL  # and no name of a checkpoint ever reaches the package


def test_the_package_counts_a_category_that_was_not_run_as_nothing_right(tmp_path: Path) -> None:
    code = (
        "from bfcl_eval.eval_checker.eval_runner_helper import calculate_unweighted_accuracy, get_category_score\n"
        "run = {'accuracy': 1.0, 'total_count': 258, 'display_accuracy': 1.0}\n"
        "missing = get_category_score({}, 'live_multiple')\n"
        "print(calculate_unweighted_accuracy([run, missing], display_na_if_category_missing=False)['display_accuracy'])"
    )
    assert in_package(code, tmp_path) == "0.5"


def test_the_package_needs_a_module_that_it_does_not_declare(tmp_path: Path) -> None:
    code = (
        "del sys.modules['soundfile']\n"
        "try:\n"
        "    import soundfile\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert in_package(code, tmp_path) == "No module named 'soundfile'"
    package = subprocess.run(
        [str(bfcl_python()), "-I", "-c", "import importlib.metadata as m; print(m.requires('bfcl-eval'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "tree_sitter" in package
    assert "soundfile" not in package


def test_grading_writes_nothing_beside_the_package_or_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    site_packages = next(bfcl_python().parents[1].rglob("bfcl_eval")).parent

    def files() -> set[Path]:
        return {*site_packages.iterdir(), *(site_packages / "bfcl_eval").rglob("*")}

    before = files()
    with BFCLClient() as client:
        assert graded(client, CALL).correct
    assert files() == before
    assert list(tmp_path.iterdir()) == []


# ---- a process that fails -------------------------------------------------------------------------------------------


def started(folder: Path, program: str, *, timeout_s: float = 20.0) -> BFCLClient:
    """A client whose worker is this program; `say` sends a reply."""
    worker = folder / "worker.py"
    begin = "import json, os, sys, time\ndef say(reply): print(json.dumps({'reply': reply}), flush=True)\n"
    worker.write_text(begin + program)
    return BFCLClient(python=Path(sys.executable), worker=worker, timeout_s=timeout_s)


HELLO = "sys.stdin.readline(); say({'version': '2026.3.23'}); sys.stdin.readline()\n"


def test_a_worker_that_ends_is_named_with_its_exit_code_and_last_words(tmp_path: Path) -> None:
    with started(tmp_path, HELLO + "sys.exit('no more memory')") as client, pytest.raises(GraderError) as raised:
        graded(client, CALL)
    assert str(raised.value) == (
        "BFCL's grader ended with exit code 1 over the answers to simple_python_0 to simple_python_0; its last words: "
        "no more memory"
    )


def test_a_worker_that_is_killed_is_named_with_the_signal(tmp_path: Path) -> None:
    with (
        started(tmp_path, HELLO + "os.kill(os.getpid(), 9)") as client,
        pytest.raises(GraderError) as raised,
    ):
        client.entries("multiple")
    assert str(raised.value) == "BFCL's grader was ended by signal 9 over the problems of multiple"


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    client = started(tmp_path, HELLO + "time.sleep(60)", timeout_s=1.0)
    with client, pytest.raises(GraderError) as raised:
        client.entries("multiple")
    assert str(raised.value) == (
        "BFCL's grader took more than 1 s over the problems of multiple; this is a bug, please report it with the answers"
    )


def test_another_version_of_the_package_is_refused(tmp_path: Path) -> None:
    client = started(tmp_path, "sys.stdin.readline(); say({'version': '2025.1.1'}); sys.stdin.readline()")
    with pytest.raises(GraderError) as raised, client:
        pass
    assert str(raised.value) == (
        f"{sys.executable} has bfcl-eval 2025.1.1, and scores are made by 2026.3.23; remove "
        f"{Path(sys.executable).parents[1]} and run 'hymba-align install-bfcl'"
    )


def test_a_request_that_fails_says_so_and_the_next_one_is_answered(client: BFCLClient) -> None:
    with pytest.raises(GraderError) as raised:
        client.grade("simple_python", {"simple_python_400": CALL})
    assert str(raised.value) == (
        "BFCL's grader failed over the answers to simple_python_400 to simple_python_400: KeyError: 'simple_python_400'"
    )
    assert graded(client, CALL).correct


def test_the_grader_gets_no_token_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started(tmp_path, HELLO + "say([dict(os.environ)])") as client:
        (environment,) = client.entries("multiple")
    assert "hf_secret" not in environment.values()
    assert "PYTHONPATH" not in environment
    assert Path(environment["BFCL_PROJECT_ROOT"]).name == "project"
