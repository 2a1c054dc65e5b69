"""The command chat: a question in a pipe, JSON lines, a terminal with its commands, conversations in files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hymba_align.cli import main
from hymba_align.data.reading.examples import Conversation as Row
from hymba_align.data.reading.messages import CANONICAL
from hymba_align.data.reading.schemas import detect_schema
from hymba_align.errors import UsageError
from hymba_align.inference.chat_terminal import TerminalChat
from hymba_align.inference.conversation import ChatSettings, Conversation
from hymba_align.inference.conversation_files import (
    LARGEST_FILE,
    changed_settings,
    load_conversation,
    load_tools,
    save_conversation,
    setting_value,
)
from hymba_align.inference.listening import harmless
from hymba_align.inference.replies import parse_reply
from hymba_align.inference.sampling import SamplingSettings

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = '<toolcall> {"name": "add", "arguments": {"a": 2, "to": "b\\u001b[2J"}} </toolcall>'
CUT_OFF = (
    "The reply was cut off after 6 tokens (max_new_tokens). A base model, which has not learned to end its turn, never "
    "stops by itself."
)


def asked(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> int:
    """The exit code of `hymba-align chat` with that on stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", *map(str, words)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with a question and its answer."""
    path = tmp_path / "before.json"
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "Five."}]
    path.write_text(json.dumps({"messages": messages, "settings": {"max_new_tokens": 4}}))
    return path


# ---- in a pipe ------------------------------------------------------------------------------------------------------


def test_a_run_folder_in_the_place_of_a_checkpoint_is_told_those_in_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "final").symlink_to(checkpoint)

    assert asked(monkeypatch, "2 + 3?", tmp_path / "run") == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        f"Error: {tmp_path}/run: the folder has no config.json, so it is no checkpoint; below it are "
        f"{tmp_path}/run/sft/final"
    )


def test_in_a_pipe_stdout_has_the_answer_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, "What is 2 + 3?\nIn words.\n", checkpoint, "--max-new-tokens", 6) == 0
    out, err = capsys.readouterr()
    assert err == CUT_OFF + "\n"
    assert out.endswith("\n")
    assert all(one == "\n" or one.isprintable() for one in out), "nothing in it acts on a terminal"
    assert asked(monkeypatch, '"What is 2 + 3?\\nIn words."\n', checkpoint, "--max-new-tokens", 6, "--json") == 0
    said = json.loads(capsys.readouterr().out)["message"]["content"]
    assert out.strip() == harmless(said), "all of stdin was one message"


def test_json_lines_are_turns_of_one_conversation(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = '"2 + 3?"\n\n{"role": "user", "content": "Twice?"}\n'
    words = (checkpoint, "--max-new-tokens", 6, "--json", "--system", "Be brief.", "--save", tmp_path / "saved.json")
    assert asked(monkeypatch, lines, *words) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["finish_reason"] == "length"
    assert first["usage"]["completion_tokens"] == 6
    assert first["usage"]["run_tokens"] == first["usage"]["prompt_tokens"] + 5
    assert second["usage"]["run_tokens"] == second["usage"]["prompt_tokens"] - first["usage"]["run_tokens"] + 5
    kept = load_conversation(tmp_path / "saved.json").messages
    assert [message["role"] for message in kept] == ["system", "user", "assistant", "user", "assistant"]
    assert [kept[2], kept[4]] == [first["message"], second["message"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{",
            "the contents of line 1 of stdin are not valid JSON: Expecting property name enclosed in double quotes: line 2 column 1 (char 2); with --json each line is a JSON text, a message with role and content, or a list of messages",
        ),
        ("3", "line 1 of stdin holds a number; give a text, a message with role and content, or a list of them"),
        (
            '{"role": "system", "content": "x"}',
            "line 1 of stdin has a message of the role 'system'; only user and tool ask, and the system prompt is given by --system",
        ),
    ],
)
def test_a_line_that_asks_nothing_is_an_error(
    line: str, message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, line + "\n", checkpoint, "--json") == 2
    assert f"Error: {message}\n" in capsys.readouterr().err


def test_a_question_that_was_loaded_is_answered_without_another_message(
    checkpoint: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, "", checkpoint, "--load", saved) == 2
    assert "Error: there is no message on stdin; write one, as in: echo 'Hello' | hymba-align chat CHECKPOINT\n" in (
        capsys.readouterr().err
    )
    question = json.loads(saved.read_text())["messages"][:1]
    saved.write_text(json.dumps(question))
    assert asked(monkeypatch, " \n", checkpoint, "--load", saved, "--save", saved, "--max-new-tokens", 6) == 0
    assert [message["role"] for message in load_conversation(saved).messages] == ["user", "assistant"]


def test_options_come_before_a_loaded_conversation_and_that_before_the_checkpoint(
    checkpoint: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for options in ((), ("--max-new-tokens", 3)):
        assert asked(monkeypatch, '"Twice?"', checkpoint, "--json", "--load", saved, *options) == 0
        counts.append(json.loads(capsys.readouterr().out)["usage"]["completion_tokens"])
    assert counts == [4, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0 and at most 100"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be a whole number, at least 1"),
        (["--device", "gpu"], "device is 'gpu'; use cpu, cuda, or cuda with a number such as cuda:1"),
        (["--device", "meta"], "device is 'meta', and {gpus} available here; use cpu, or a GPU that is there"),
        (["--load", "nowhere.json"], "nowhere.json: the conversation file cannot be read: No such file or directory; check the path"),
        (["--tools", "README.md"], "README.md: its contents are not valid JSON: Expecting value: line 1 column 1 (char 0); correct the file"),
        (["--save", "README.md"], "README.md is there already and is no conversation, so it is not written over; name another file"),
        (["--save", "no/where.json"], "no/where.json: there is no folder no to save in; make it first"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    count = torch.cuda.device_count()
    assert asked(monkeypatch, "Hi.", "no/checkpoint", *words) == 2
    expected = message.format(gpus="1 GPU is" if count == 1 else f"{count} GPUs are")
    assert f"Error: {expected}\n" in capsys.readouterr().err


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_is_a_row_of_training_data(
    random_model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(random_model, tokenizer)
    messages = [
        {"role": "user", "content": "2 + 3?"},
        parse_reply(CALL).as_message(),
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five."},
    ]
    messages[2]["tool_call_id"] = messages[1]["tool_calls"][0]["id"]
    conversation.restart(messages, tools=[TOOL])
    path = tmp_path / "chat.json"
    save_conversation(path, conversation, "a model")
    loaded = load_conversation(path)
    assert (loaded.messages, loaded.tools) == (messages, [TOOL])
    assert changed_settings(conversation.settings, loaded.settings) == conversation.settings

    row = json.loads(path.read_text())
    schema = detect_schema(row)
    assert schema.name == "messages"
    read = schema.read(row, CANONICAL)
    assert isinstance(read, Row)
    assert [message["role"] for message in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert read.tools == [TOOL]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3", "{path} is no conversation: it has no list 'messages'; name a file that /save or --save wrote"),
        ('{"messages": [], "settings": 3}', "{path}: settings must be an object, not a number; correct or remove it"),
        ('[{"role": "tool", "content": "5"}]', "{path}: turn 1 is a tool's result, and no turn before it calls a tool; add the assistant's tool_calls"),
        ("[" * 200_000, "{path}: its contents are nested more than 100 levels deep; flatten them; correct the file"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_conversation_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_conversation(path)
    assert str(caught.value) == message.format(path=path)


def test_a_device_without_an_end_is_no_file() -> None:
    with pytest.raises(
        UsageError, match="/dev/zero has more than the 16,777,216 bytes that a conversation file may have"
    ):
        load_conversation(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("loaded", "shown"),
    [
        ({"tool_calls": json.dumps([{"name": "add", "arguments": {"a": "\x1b[2J"}}])}, 'calls add {"a": "\\u001b[2J"}'),
        ({"tool_calls": [{"name": "add", "arguments": {"a": 2}}]}, 'calls add {"a": 2}'),
        ({"content": [{"type": "text", "text": "in parts"}]}, "in parts"),
    ],
)
def test_a_conversation_in_other_forms_that_training_reads_is_shown_as_it_is_meant(
    random_model: Any, tokenizer: Any, tmp_path: Path, loaded: dict[str, Any], shown: str
) -> None:
    path = tmp_path / "chat.json"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Count."}]},
        {"role": "user", "content": "2 + 3?"},
    ]
    messages.append({"role": "assistant", "content": None, **loaded})
    path.write_text(json.dumps({"messages": messages, "tools": [{"type": "function", "function": "add"}]}))
    written = io.StringIO()
    console = Console(file=written, width=200)
    chat = TerminalChat(Conversation(random_model, tokenizer), "a model", console)
    for command in (f"/load {path}", "/tools", "/system"):
        chat._take(command)
    assert written.getvalue().splitlines() == ["system: Count.", "> 2 + 3?", shown, "Tools: ?", "Count."]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UsageError) as caught:
        load_tools(path)
    assert str(caught.value) == (f"{path} has more than the 16,777,216 bytes that a tools file may have; name another")


def test_settings_are_read_as_people_write_them() -> None:
    before = ChatSettings(SamplingSettings(), 9)
    for name, text, value in (
        ("temperature", "0.7", 0.7),
        ("top_k", "5", 5),
        ("seed", "random", None),
        ("drop_oldest", "ON", True),
    ):
        assert setting_value(name, text) == value
        changed_settings(before, {name: value})
    for given, message in (
        ({"drop_oldest": 1}, "drop_oldest is 1; it must be true or false"),
        ({"topp": 1}, "'topp' is not a setting; settings: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, max_new_tokens, drop_oldest"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            changed_settings(before, given)
        assert str(caught.value) == message
    with pytest.raises(UsageError, match=r"^top_k is '2\.5'; give a whole number$"):
        setting_value("top_k", "2.5")


# ---- at a terminal --------------------------------------------------------------------------------------------------


class Echo(Conversation):
    """A conversation with replies that are known, and no model to write them."""

    replies: Iterator[str] = iter(())

    def answer(self, said: Sequence[Any] = ()) -> Any:
        from hymba_align.inference.conversation import Turn

        text = next(self.replies)
        self._prompt([*self.messages, *said])
        yield from text
        reply = parse_reply(text)
        self.messages += [*map(dict, said), reply.as_message()]
        self.last_turn = Turn(text, reply, "tool_calls" if reply.tool_calls else "stop", 10, 5, 15, 0.5)


@pytest.fixture
def at_terminal(
    random_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Echo, list[str]]]:
    """Types lines into a chat with given replies; the conversation afterwards, and the lines of the screen."""

    def typed(lines: Sequence[str], *replies: str, width: int = 80) -> tuple[Echo, list[str]]:
        left = iter(lines)

        def read(prompt: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        conversation = Echo(random_model, tokenizer)
        conversation.replies = iter(replies)
        screen = io.StringIO()
        TerminalChat(conversation, "runs/x", Console(file=screen, width=width, highlight=False)).run()
        return conversation, [line.rstrip() for line in screen.getvalue().splitlines()]

    return typed


def test_an_answer_is_shown_as_text_that_cannot_act(at_terminal: Any) -> None:
    _, lines = at_terminal(["Hi."], "One\x1b[2J\ttwo\u202e.\nThree")
    assert [line for line in lines if line.startswith("One␛[2J") and line.endswith("two‹U+202E›.")]
    assert "Three" in lines
    assert "(5 tokens, 10 a second; 15 of 512 in the context)" in lines


def test_a_call_is_shown_with_its_arguments_and_its_result_goes_back(at_terminal: Any) -> None:
    conversation, lines = at_terminal(["2 + 3?", '{"sum":', "5}", "", "Thanks."], f"Wait.\n{CALL}", "Five.", "Bye.")
    place = lines.index("Wait.")
    assert lines[place + 1 : place + 4] == ["calls add", "  a: 2", "  to: b␛[2J"]
    assert "Paste the result of add, and an empty line after it (only that: no result)." in lines
    call = conversation.messages[1]["tool_calls"][0]["id"]
    assert conversation.messages[2] == {"role": "tool", "tool_call_id": call, "content": '{"sum":\n5}'}
    assert [message["content"] for message in conversation.messages[3:]] == ["Five.", "Thanks.", "Bye."]


def test_a_call_may_be_left_without_a_result(at_terminal: Any) -> None:
    conversation, lines = at_terminal(["2 + 3?", "", "Never mind."], CALL, "Good.")
    assert "No result is given; go on with a message." in lines
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "user", "assistant"]


def test_a_broken_call_is_text_and_is_named(at_terminal: Any) -> None:
    _, lines = at_terminal(["2 + 3?"], "<toolcall> {} </toolcall>", width=200)
    assert "<toolcall> {} </toolcall>" in lines
    fault = "a tool call has no name; write {'name': ..., 'arguments': {...}}"
    assert f"(Not a tool call, and kept as text: {fault}.)" in lines


def test_commands_lead_the_conversation(at_terminal: Any, tmp_path: Path) -> None:
    tools = tmp_path / "my tools.json"
    tools.write_text(json.dumps([TOOL]))
    path = tmp_path / "chat.json"
    conversation, lines = at_terminal(
        [
            *("One?", "/undo", "Two?", "/retry", "/set top-p=0.5", "/set seed 7", "/system Be brief.", f"/tools '{tools}'"),
            *(f"/save {path}", "/reset", f"/load {path}", "//slash", "more\\", "lines", "/set", "/help", "/exit", "never"),
        ],
        "1", "2", "3", "4", "5",
    )  # fmt: skip
    assert [message["content"] for message in conversation.messages] == (
        ["Be brief.", "Two?", "3", "/slash", "4", "more\nlines", "5"]
    )
    assert conversation.tools == [TOOL]
    assert (conversation.settings.sampling.top_p, conversation.settings.sampling.seed) == (0.5, 7)
    for line in ("Taken back: One?", "top_p is 0.5.", "The system prompt is set.", "Tools: add", "A new conversation."):
        assert line in lines
    assert {"> Two?", "3", "seed 7", "/retry             answer the last message again"} <= set(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/foo", "/foo is not a command; /help lists them, and a message that begins with a slash is written with two"),
        ("/undo", "there is nothing to take back; say something first"),
        ("/retry", "there is nothing to answer again; say something first"),
        ("/set", None),
        ("/set heat 3", "heat is not a setting; settings: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, max_new_tokens, drop_oldest"),
        ("/set temperature", "/set temperature needs a value"),
        ("/set temperature hot", "temperature is 'hot'; give a number"),
        ("/save", "/save needs a file, as in /save chat.json"),
        ("/load", "/load needs a file, as in /load chat.json"),
        ("/load a b", "'a b' is 2 file names; put one with spaces in quotes"),
        ("/load 'a", "\"'a\" is no file name: No closing quotation"),
        ("/load nowhere.json", "nowhere.json: the conversation file cannot be read: No such file or directory; check the path"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_followed_says_so_and_the_chat_goes_on(
    line: str, message: str | None, at_terminal: Any
) -> None:
    conversation, lines = at_terminal([line, "Hi."], "Hello.", width=400)
    assert [one for one in lines if one.startswith("Error: ")] == ([f"Error: {message}"] if message else [])
    assert len(conversation.messages) == 2


def test_in_a_real_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(checkpoint: Path) -> None:
    """In a process forked from this one, so that nothing is imported again."""
    process, terminal = pty.fork()
    if process == 0:  # the terminal's own process; nothing of pytest's may run in it
        code = 99
        try:
            import sys

            torch.set_num_threads(1)  # a fork has none of OpenMP's threads, for which the first product would wait
            # As a terminal's shell starts it: what a script starts with & ignores Ctrl-C, and so do these tests then.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
            code = main(["chat", str(checkpoint), "--max-new-tokens", "400", "--temperature", "1", "--seed", "1"])
        finally:
            os._exit(code)
    screen = b""

    def wait(is_there: Callable[[], bool], timeout_s: float = 60.0) -> None:
        nonlocal screen
        end = time.monotonic() + timeout_s
        while not is_there():
            assert time.monotonic() < end, screen.decode(errors="replace")
            if select.select([terminal], [], [], 0.2)[0]:
                screen += os.read(terminal, 65536)

    def seen(text: str) -> None:
        nonlocal screen
        wait(lambda: text.encode() in screen)
        screen = screen.split(text.encode(), 1)[1]

    try:
        seen("> ")
        os.write(terminal, b"What is 2 + 3?\n")
        seen("2 + 3?")
        wait(
            lambda: bool(screen.replace(b"\x1b[?2004l", b"").strip())
        )  # the answer has begun, after readline's last word
        os.write(terminal, b"\x03")
        seen("(Stopped; the reply is kept as far as it goes.)")
        seen("> ")
        for _ in range(20):  # one that comes before readline listens is not heard
            os.write(terminal, b"\x03")
            with contextlib.suppress(AssertionError):
                wait(lambda: b"Ctrl-D or /exit leaves." in screen, timeout_s=2.0)
                break
        seen("Ctrl-D or /exit leaves.")
        seen("> ")
        os.write(terminal, b"\x04")
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    finally:
        os.close(terminal)
