"""Conversations of BFCL's multi-turn categories: the official loop, checker and data, with models made by a script.

A perfect model was held to all 800 conversations by hand, and gets all of them right; here it holds two of each
category, and one with a call per step.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hymba_align.eval import answers as answers_module
from hymba_align.eval.answers import Answers, Processes
from hymba_align.eval.bfcl.client import BFCLClient
from hymba_align.eval.bfcl.environment import bfcl_python
from hymba_align.eval.bfcl.multi_turn import Conversation, conversation_warnings, grade_multi_turn, run_conversations
from hymba_align.eval.bfcl.sandbox import Limits, Sandbox, Verdict
from hymba_align.model.decoding import Decoded

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
ALONE = Processes.alone()
Entries = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(bfcl_python(), limits=Limits(cpu_s=2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def entries(client: BFCLClient) -> Entries:
    return {category: client.entries(category) for category in CATEGORIES}


@pytest.fixture
def hold(tokenizer: Any, client: BFCLClient, sandbox: Sandbox, players: ModuleType) -> Any:
    """Conversations of a player, and the official verdicts on them."""

    def held(
        chosen: Sequence[dict[str, Any]], reply: Any, *, max_steps: int = 20, **settings: Any
    ) -> tuple[dict[str, Conversation], dict[str, Verdict]]:
        answers = players.Scripted(tokenizer, chosen, reply, **settings)
        conversations = run_conversations(
            answers, tokenizer, client, sandbox, chosen, max_steps=max_steps, max_new_tokens=64
        )
        return conversations, grade_multi_turn(ALONE, sandbox, conversations)

    return held


def right(verdicts: dict[str, Verdict]) -> int:
    return sum(verdict.valid for verdict in verdicts.values())


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize(("player", "count"), [("perfect", 2), ("one_by_one", 1)])
def test_a_perfect_model_gets_all_right(
    hold: Any, entries: Entries, players: ModuleType, category: str, player: str, count: int
) -> None:
    conversations, verdicts = hold(entries[category][3:200:100][:count], getattr(players, player))
    assert len(verdicts) == count
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.valid} == {}
    assert conversation_warnings(list(conversations.values()), context=1, max_steps=20) == []


def test_all_of_the_ground_truth_is_right_and_silence_never(sandbox: Sandbox, entries: Entries) -> None:
    """Without prompts: 20 of each category."""
    chosen = [entry for category in CATEGORIES for entry in entries[category][::10]]
    truth = {entry["id"]: Conversation(entry, turns=as_steps(entry["target"])) for entry in chosen}
    silence = {entry["id"]: Conversation(entry, turns=[[] for _ in entry["target"]]) for entry in chosen}
    assert right(grade_multi_turn(ALONE, sandbox, truth)) == len(chosen) == 80
    verdicts = grade_multi_turn(ALONE, sandbox, silence)
    assert {verdict.error_type for verdict in verdicts.values()} == {"multi_turn:empty_turn_model_response"}


def as_steps(target: list[list[str]]) -> list[list[list[str]]]:
    return [[calls] if calls else [] for calls in target]


@pytest.mark.parametrize("player", ["silent", "calls_the_first_function", "calls_what_there_is_not"])
def test_models_that_call_nothing_or_wrongly_get_nothing(
    hold: Any, entries: Entries, players: ModuleType, player: str
) -> None:
    _, verdicts = hold(entries["multi_turn_base"][:60:20], getattr(players, player))
    assert right(verdicts) == 0


def test_one_wrong_argument_is_wrong(sandbox: Sandbox, entries: Entries) -> None:
    entry = entries["multi_turn_base"][0]
    assert "mkdir(dir_name='temp')" in entry["target"][0]
    turns = as_steps(
        [[call.replace("mkdir(dir_name='temp')", "mkdir(dir_name='tmp')") for call in turn] for turn in entry["target"]]
    )
    verdict = grade_multi_turn(ALONE, sandbox, {"it": Conversation(entry, turns=turns)})["it"]
    assert verdict == Verdict(
        False,
        "multi_turn:instance_state_mismatch",
        "Model instance for GorillaFileSystem does not match the state with ground truth instance.",
    )


def test_verdicts_do_not_depend_on_what_ran_before(hold: Any, entries: Entries, players: ModuleType) -> None:
    """The official executor keeps objects by the names of model and problem for as long as its process lives."""
    chosen = entries["multi_turn_base"][:3]

    def half_right(entry: dict[str, Any], turn: int, step: int) -> str:
        player = players.silent if entry is chosen[1] else players.perfect
        return str(player(entry, turn, step))

    first, verdicts = hold(chosen, half_right)
    again, verdicts_again = hold(chosen[::-1], half_right)
    assert verdicts == verdicts_again
    assert [verdicts[entry["id"]].valid for entry in chosen] == [True, False, True]
    for name, conversation in first.items():
        assert conversation.messages == again[name].messages


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_all_conversations_advance_together(
    tokenizer: Any, client: BFCLClient, sandbox: Sandbox, entries: Entries, players: ModuleType
) -> None:
    chosen = sorted(entries["multi_turn_base"][:12], key=lambda entry: len(entry["question"]))[:3]
    answers = players.Scripted(tokenizer, chosen, players.perfect)
    run_conversations(answers, tokenizer, client, sandbox, chosen, max_steps=20, max_new_tokens=64)
    lengths = [sum(2 if calls else 1 for calls in entry["target"]) for entry in chosen]
    assert answers.asked == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_results_come_back_as_turns_of_the_tool_one_per_call(hold: Any, entries: Entries, players: ModuleType) -> None:
    entry = entries["multi_turn_base"][0]
    conversations, _ = hold([entry], players.perfect)
    (conversation,) = conversations.values()
    assert conversation.messages[:6] == [
        {"role": "user", "content": entry["question"][0][0]["content"]},
        {"role": "assistant", "content": players.as_toolcalls(entry, entry["target"][0])},
        {"role": "tool", "content": '{"current_working_directory": "document"}'},
        {"role": "tool", "content": "None"},
        {"role": "tool", "content": "{\"result\": \"'final_report.pdf' moved to 'temp/final_report.pdf'\"}"},
        {"role": "assistant", "content": "That is done."},
    ]
    # On the state that the first turn left: the folder 'temp' is below 'document'.
    assert conversation.messages[8] == {"role": "tool", "content": '{"current_working_directory": "temp"}'}
    assert conversation.turns == [[["cd(folder='document')", "mkdir(dir_name='temp')", "mv(source='final_report.pdf', destination='temp')"]],
                                  [["cd(folder='temp')", "grep(file_name='final_report.pdf', pattern='budget analysis')"]],
                                  [["sort(file_name='final_report.pdf')"]],
                                  [["cd(folder='..')", "mv(source='previous_report.pdf', destination='temp')", "cd(folder='temp')", "diff(file_name1='final_report.pdf', file_name2='previous_report.pdf')"]]]  # fmt: skip


def test_functions_that_were_held_back_are_told_of_with_the_official_words(
    tokenizer: Any, client: BFCLClient, sandbox: Sandbox, entries: Entries, players: ModuleType
) -> None:
    entry = entries["multi_turn_miss_func"][0]
    assert list(entry["missed_tools"]) == ["3"]
    answers = players.Scripted(tokenizer, [entry], players.silent)
    prompts: list[str] = []
    run_conversations(
        answers, tokenizer, client, sandbox, [entry], max_steps=20, max_new_tokens=64,
        on_prompts=lambda step: prompts.append(tokenizer.decode(step[0])),
    )  # fmt: skip
    assert ['<tool> {"name": "sort"' in prompt for prompt in prompts] == [False, False, False, True, True]
    words = "<extra_id_1>User\nI have updated some more functions you can choose from. What about now?\n"
    assert [prompt.count(words) for prompt in prompts] == [0, 0, 0, 1, 1]


def test_a_refused_call_does_not_run_and_the_model_reads_why(hold: Any, entries: Entries, players: ModuleType) -> None:
    entry = entries["multi_turn_base"][0]

    def attack(entry: dict[str, Any], turn: int, step: int) -> str:
        if (turn, step) == (0, 0):
            bad = {"name": "mkdir", "arguments": {"dir_name": "temp", "x=__import__('os').getcwd(), y": 1}}
            return (
                f"<toolcall> {json.dumps(bad)} </toolcall>\n<toolcall> {json.dumps({'name': 'os.getcwd'})} </toolcall>"
            )
        return str(players.perfect(entry, turn, step - (turn == 0)))

    conversations, verdicts = hold([entry], attack)
    (conversation,) = conversations.values()
    assert [message["content"] for message in conversation.messages[2:4]] == [
        "Error during execution: arguments must be plain values: text, numbers, True, False, None, lists, tuples and "
        "dicts",
        "Error during execution: not a call of a function by its name",
    ]
    assert conversation.turns[0][0] == ["refused_call()", "refused_call()"]
    assert right(verdicts) == 1, "a call that fails changes nothing"
    assert conversation_warnings([conversation], context=1, max_steps=20) == [
        "2 calls in multi-turn conversations were no plain call of a known function, and did not run"
    ]


def test_too_many_steps_end_a_conversation(hold: Any, entries: Entries, players: ModuleType) -> None:
    entry = entries["multi_turn_base"][0]
    endless, verdicts = hold([entry], lambda entry, turn, step: players.as_toolcalls(entry, ["pwd()"]), max_steps=3)
    (conversation,) = endless.values()
    assert conversation.turns == [[["pwd()"]] * 4]  # the official loop lets one more step run than its limit says
    (verdict,) = verdicts.values()
    assert verdict.error_type == "multi_turn:force_terminated"
    assert conversation_warnings([conversation], context=1, max_steps=3) == [
        "1 of 1 multi-turn conversations were ended after 3 steps in one turn, as the official loop does"
    ]


def test_steps_are_counted_per_turn(hold: Any, entries: Entries, players: ModuleType) -> None:
    entry = entries["multi_turn_base"][0]
    assert [len(calls) for calls in entry["target"]] == [3, 2, 1, 4]
    _, verdicts = hold([entry], players.one_by_one, max_steps=4)
    assert right(verdicts) == 1
    _, verdicts = hold([entry], players.one_by_one, max_steps=2)
    assert right(verdicts) == 0


def test_a_conversation_beyond_the_context_is_wrong_and_said(hold: Any, entries: Entries, players: ModuleType) -> None:
    chosen = entries["multi_turn_base"][:2]
    conversations, verdicts = hold(chosen, players.perfect, room=1_000)
    assert [conversation.failure for conversation in conversations.values()] == ["context", "context"]
    assert {verdict.error_type for verdict in verdicts.values()} == {"multi_turn:inference_error"}
    assert conversation_warnings(list(conversations.values()), context=8192, max_steps=20) == [
        "2 of 2 multi-turn conversations grew beyond the context of 8,192 tokens; they count as wrong"
    ]


def test_the_context_is_measured_at_every_step(
    tokenizer: Any, client: BFCLClient, sandbox: Sandbox, entries: Entries, players: ModuleType
) -> None:
    chosen = entries["multi_turn_base"][:1]

    def held(room: int) -> tuple[Any, Conversation]:
        answers = players.Scripted(tokenizer, chosen, players.perfect, room=room)
        conversations = run_conversations(answers, tokenizer, client, sandbox, chosen, max_steps=20, max_new_tokens=64)
        return answers, conversations[chosen[0]["id"]]

    answers, conversation = held(10**9)
    assert conversation.failure == ""
    assert held(answers.longest_prompt)[1].failure == ""
    shorter, conversation = held(answers.longest_prompt - 1)
    assert (len(shorter.asked), conversation.failure) == (len(answers.asked) - 1, "context")


def test_a_call_that_never_ends_fails_its_conversation_alone(hold: Any, entries: Entries, players: ModuleType) -> None:
    with_maths = next(entry for entry in entries["multi_turn_base"] if "MathAPI" in entry["involved_classes"])
    other = entries["multi_turn_base"][0]

    def compute(entry: dict[str, Any], turn: int, step: int) -> str:
        if entry is with_maths:
            return str(players.as_toolcalls(entry, ["power(base=10, exponent=1000000000)"]))
        return str(players.perfect(entry, turn, step))

    conversations, verdicts = hold([with_maths, other], compute)
    assert conversations[with_maths["id"]].failure == "sandbox"
    assert {name: verdict.valid for name, verdict in verdicts.items()} == {with_maths["id"]: False, other["id"]: True}
    assert conversation_warnings(list(conversations.values()), context=1, max_steps=20) == [
        "1 of 2 multi-turn conversations ran into a limit of the sandbox; they count as wrong"
    ]


@pytest.mark.parametrize("said", ["", "  ", "No.", "[]", "<toolcall> {", "def f(): pass", "cd('a'"])
def test_an_answer_without_calls_ends_the_turn(hold: Any, entries: Entries, players: ModuleType, said: str) -> None:
    entry = min(entries["multi_turn_base"], key=lambda entry: len(entry["question"]))
    conversations, _ = hold([entry], lambda entry, turn, step: said)
    (conversation,) = conversations.values()
    assert conversation.turns == [[] for _ in entry["question"]]
    assert [message["role"] for message in conversation.messages].count("assistant") == (
        len(entry["question"]) if said.strip() else 0
    )


# ---- with what answers for real --------------------------------------------------------------------------------------


def test_an_interrupted_run_takes_over_its_answers(
    tmp_path: Path,
    tokenizer: Any,
    client: BFCLClient,
    sandbox: Sandbox,
    entries: Entries,
    players: ModuleType,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = entries["multi_turn_base"][:2]
    script = players.Scripted(tokenizer, chosen, players.perfect)
    asked: list[int] = []

    def decode(model: Any, prompts: list[list[int]], *, on_end: Any, **settings: Any) -> None:
        asked.append(len(prompts))
        for number, prompt in enumerate(prompts):
            reply = tokenizer.encode(script.say(tokenizer.decode(prompt)), add_special_tokens=False)
            on_end(number, Decoded([*reply, tokenizer.eos_token_id], ended=True))

    monkeypatch.setattr(answers_module, "decode", decode)

    def hold(stop_at: int) -> tuple[dict[str, Conversation], Answers]:
        answers = Answers(
            model, tokenizer, processes=ALONE, store=tmp_path / "bfcl", identity="x", batch_size=2, max_length=100_000
        )

        def interrupt(prompts: list[list[int]]) -> None:
            if len(asked) == stop_at:
                raise KeyboardInterrupt

        held = run_conversations(
            answers, tokenizer, client, sandbox, chosen, max_steps=20, max_new_tokens=2000, on_prompts=interrupt
        )
        return held, answers

    with pytest.raises(KeyboardInterrupt):
        hold(3)
    assert asked == [2, 2, 2]
    held, answers = hold(-1)
    assert answers.reused == 6
    lengths = [2 * len(entry["target"]) for entry in chosen]
    assert asked == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert right(grade_multi_turn(ALONE, sandbox, held)) == 2


def test_other_processes_get_what_rank_0_decodes_and_runs(
    tokenizer: Any, client: BFCLClient, sandbox: Sandbox, entries: Entries, players: ModuleType
) -> None:
    """Ranks above 0 have neither a grader nor a sandbox here, so that they cannot come to another result."""
    chosen = entries["multi_turn_base"][:1]
    barrier, given = threading.Barrier(2, timeout=60), [None, None]

    def processes(rank: int) -> Processes:
        def gather(value: Any) -> list[Any]:
            given[rank] = value
            barrier.wait()
            values = list(given)
            barrier.wait()
            return values

        return Processes(rank, 2, gather)

    results: dict[int, Any] = {}

    def one(rank: int, grader: Any, box: Any) -> None:
        answers = players.Scripted(tokenizer, chosen, players.perfect)
        answers.processes = processes(rank)
        held = run_conversations(answers, tokenizer, grader, box, chosen, max_steps=20, max_new_tokens=64)
        results[rank] = (held[chosen[0]["id"]].messages, grade_multi_turn(answers.processes, box, held))

    other = threading.Thread(target=one, args=(1, None, None))
    other.start()
    one(0, client, sandbox)
    other.join()
    assert results[0] == results[1]
    assert right(results[1][1]) == 1
