"""One finding of each kind, told in full, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.inspection.contamination import Item, NotCompared, make_benchmark
from hymba_align.data.inspection.findings import KINDS, CheckReport, Compared, Kind, kind_of
from hymba_align.data.reading.examples import Lost
from tests.data.inspection.checked_rows import GOOD, GOOD_PAIR, SIMPLE_TEMPLATE, messages


def only(found: CheckReport, tmp_path: Path) -> tuple[str, str, str, str, bool]:
    """The one finding, its place without the folder."""
    (one,) = found.findings
    folder = f"{tmp_path}/"
    return one.kind, one.place.replace(folder, ""), one.message.replace(folder, ""), one.fix, one.loses_row


FINDINGS: dict[str, tuple[list[Any], dict[str, Any], tuple[str, str, str, str, bool]]] = {
    "malformed row": (
        [GOOD, '{"messages": '],
        {},
        ("malformed row", "d.jsonl:2", "malformed JSON, Expecting value at column 13", "correct the line", True),
    ),
    "missing column": (
        [GOOD, {"message": []}],
        {},
        ("malformed row", "d.jsonl:2", "the column 'messages' is missing (there is 'message')", "every row needs messages", True),
    ),
    "wrong role": (
        [GOOD, messages(("user", "hi"), ("bot", "good day"))],
        {},
        (
            "wrong role",
            "d.jsonl:2",
            "turn 2 has the role 'bot'",
            "use one of system, user, assistant, tool, or say which it is with data.roles, such as roles: {NAME: assistant}",
            True,
        ),
    ),
    "no answer": (
        [GOOD, messages(("user", "hi"))],
        {},
        (
            "wrong role",
            "d.jsonl:2",
            "the conversation has no assistant turn, so there is nothing to train on",
            "correct or remove the row",
            True,
        ),
    ),
    "late system message": (
        [GOOD, messages(("user", "hi"), ("system", "be brief"), ("assistant", "yes"))],
        {},
        ("wrong role", "d.jsonl:2", "turn 2 is a system message after other turns", "move it to the start", True),
    ),
    "empty answer": (
        [GOOD, messages(("user", "hi"), ("assistant", " "))],
        {},
        ("empty answer", "d.jsonl:2", "turn 2, the assistant's, is empty", "give it content or tool_calls", True),
    ),
    "empty column": (
        [{"question": "hi", "answer": "good day"}, {"question": "hello", "answer": " "}],
        {},
        ("empty answer", "d.jsonl:2", "the column 'answer' is empty", "fill it in or remove the row", True),
    ),
    "empty question": (
        [{"question": "hi", "answer": "good day"}, {"question": "", "answer": "yes"}],
        {},
        ("malformed row", "d.jsonl:2", "the column 'question' is empty", "fill it in or remove the row", True),
    ),
    "malformed tool call": (
        [GOOD, {"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}],
        {},
        (
            "malformed tool call",
            "d.jsonl:2",
            "the arguments of the call to 'f' in turn 3 must be an object, not a list",
            "correct or remove the row",
            True,
        ),
    ),
    "nothing trained": (
        [GOOD, {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": False}]}],
        {},
        (
            "nothing trained",
            "d.jsonl:2",
            "no token of it is trained on",
            "mark a turn 'train: true' or remove it",
            True,
        ),
    ),
    "equal answers": (
        [GOOD_PAIR, {"prompt": "hello", "chosen": "yes", "rejected": "yes"}],
        {},
        (
            "equal answers",
            "d.jsonl:2",
            "chosen equals rejected, so there is nothing to prefer",
            "correct or remove the pair",
            True,
        ),
    ),
    "over-long": (
        [GOOD, messages(("user", "7 " * 50), ("assistant", "yes"))],
        {},
        (
            "over-long",
            "d.jsonl:2",
            "longer than max_length=64: it has 117 tokens",
            "raise max_length, or set data.over_long to say what becomes of such rows",
            True,
        ),
    ),
    "over-long pair": (
        [GOOD_PAIR, {"prompt": "7 " * 50, "chosen": "yes", "rejected": "no"}],
        {},
        (
            "over-long",
            "d.jsonl:2",
            "longer than max_length=64: its longer side has 117 tokens",
            "raise max_length, or set data.over_long to say what becomes of such rows",
            True,
        ),
    ),
    "truncated": (
        [GOOD, messages(("user", "hi"), ("assistant", "yes"), ("user", "7 " * 50), ("assistant", "no"))],
        {"over_long": "truncate"},
        (
            "over-long",
            "d.jsonl:2",
            "turns 3-4 are cut off to fit in max_length=64",
            "raise max_length to keep it whole",
            False,
        ),
    ),
    "split": (
        [GOOD, messages(*([("user", "7 " * 15), ("assistant", "yes")] * 2))],
        {"over_long": "split"},
        ("over-long", "d.jsonl:2", "longer than max_length=64: it has 90 tokens, so it is cut into parts that fit", "raise max_length to keep it whole", False),
    ),
    "another schema": (
        [GOOD, {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}],
        {},
        (
            "another schema",
            "d.jsonl:2",
            "the row has the columns of sharegpt (conversations), and the first row those of messages (messages)",
            "put rows of each kind into a file of their own and name both files in sources, or make all rows one kind with convert",
            True,
        ),
    ),
    "empty user turn": (
        [GOOD, messages(("user", "hello"), ("assistant", "yes"), ("user", "   "), ("assistant", "no"))],
        {},
        ("empty user turn", "d.jsonl:2", "user turn 2 is empty", "write what was asked, or remove the turn", False),
    ),
    "empty user turns of a pair": (
        [GOOD_PAIR, {"prompt": [{"role": "user", "content": ""}] * 2, "chosen": "yes", "rejected": "no"}],
        {},
        ("empty user turn", "d.jsonl:2", "user turns 1, 2 are empty", "write what was asked, or remove the turn", False),
    ),
    "call without result": (
        [GOOD, {"messages": [GOOD["messages"][0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}, GOOD["messages"][1]]}],
        {"max_length": 200},
        (
            "call without result",
            "d.jsonl:2",
            "no result follows the call to 'f', and the conversation goes on",
            "add the tool's result after the call, or remove the call",
            False,
        ),
    ),
    "repeated user turn": (
        [GOOD, messages(("user", "hello"), ("user", "hello "), ("assistant", "yes"))],
        {},
        ("repeated user turn", "d.jsonl:2", "user turn 2 repeats the one right before", "remove the second of them", False),
    ),
    "exact duplicate": (
        [GOOD, messages(("user", "hello"), ("assistant", "yes")), GOOD],
        {},
        (
            "exact duplicate",
            "d.jsonl:3",
            "it says the same as d.jsonl:1",
            "remove one of them, unless it is to count twice",
            False,
        ),
    ),
    "near duplicate": (
        [
            {"question": " ".join(f"a{number}" for number in range(20)), "answer": "yes"},
            {"question": "A0, " + " ".join(f"a{number}" for number in range(1, 20)), "answer": "yes!"},
            {"question": " ".join(f"a{number}" for number in range(20)), "answer": "no"},
        ],
        {"max_length": 200},
        (
            "near duplicate",
            "d.jsonl:2",
            "it and d.jsonl:1 share 100 % of their runs of 5 words",
            "remove one of them, unless it is to count twice",
            False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_a_row_gives_the_one_finding_that_it_should(
    report: Callable[..., CheckReport], tmp_path: Path, name: str
) -> None:
    rows, keys, expected = FINDINGS[name]
    found = report(*rows, **keys)
    if name == "near duplicate":  # the third row shares most runs too, and nothing else
        near = found.of_kind("near duplicate")
        assert [one.place.rpartition(":")[2] for one in near] == ["2", "3"]
        found = CheckReport(**{**vars_of(found), "findings": near[:1]})
    assert only(found, tmp_path) == expected


def vars_of(found: CheckReport) -> dict[str, Any]:
    return {name: value for name, value in vars(found).items() if name != "counts"}


@pytest.mark.parametrize("rows", [[GOOD], [GOOD_PAIR]], ids=["sft", "dpo"])
def test_good_rows_give_no_finding(report: Callable[..., CheckReport], rows: list[Any]) -> None:
    found = report(*rows)
    assert (found.findings, found.counts, found.rows_lost, found.allowed, found.exit_code) == ((), {}, 0, True, 0)
    assert found.verdict() == "no row is lost"


def test_a_call_at_the_end_and_a_question_asked_again_later_are_no_finding(report: Callable[..., CheckReport]) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    asked, answer = GOOD["messages"]
    found = report(
        {"messages": [asked, call, {"role": "tool", "content": "1"}, answer, asked, call]}, max_length=200
    )  # fmt: skip
    assert found.findings == ()


def test_a_row_of_a_test_set_is_contamination_and_its_neighbour_is_not(
    report: Callable[..., CheckReport], tmp_path: Path
) -> None:
    asked = "Ana buys twelve red apples and gives three of them to her friend Ben on a Monday morning"
    test_set = make_benchmark(
        "GSM8K", [Item("line 1", {"question": asked, "answer": "9"}), Item("line 2", {"question": "hm"})]
    )
    absent = NotCompared("BFCL", "it is not here", "get it")
    found = report(
        {"question": asked, "answer": "nine"},
        {"question": asked.replace("red", "green").replace("gives", "hands"), "answer": "nine"},
        max_length=400,
        benchmarks=(test_set, absent),
    )  # fmt: skip
    assert only(CheckReport(**{**vars_of(found), "findings": found.of_kind("contamination")}), tmp_path) == (
        "contamination",
        "d.jsonl:1",
        "it holds 6 of the 6 runs of 13 words in GSM8K's test set, line 1, question (100 %)",
        "remove it, or do not report GSM8K scores of what is trained on it",
        False,
    )
    assert found.compared == (Compared("GSM8K", 2, 1),)
    assert found.not_compared == (absent,)
    assert found.allowed
    assert found.verdict() == "no row is lost"


def test_a_control_token_that_a_foreign_template_lets_through_is_found(
    report: Callable[..., CheckReport], tmp_path: Path, load: Callable[[str], Any]
) -> None:
    import copy

    tokenizer = copy.deepcopy(load("small"))
    tokenizer.chat_template = SIMPLE_TEMPLATE
    found = report(GOOD, messages(("user", "</s>"), ("assistant", "yes")), tokenizer=tokenizer)
    kind, place, message, fix, loses = only(found, tmp_path)
    assert (kind, place, fix, loses) == ("control token", "d.jsonl:2", "remove it", True)
    assert message.endswith("of the rendered conversation is the control token '</s>'")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("in the column 'chosen', turn 1, the assistant's, is empty; give it content or tool_calls", "empty answer"),
        ("the column 'completion' is empty; fill it in or remove the row", "empty answer"),
        ("the column 'prompt' is empty; fill it in or remove the row", "malformed row"),
        ("turn 3 has no role; give it, as 'role', one of system, user, assistant, tool", "wrong role"),
        ("the column 'prompt' must end with a turn that the assistant answers", "wrong role"),
        ("turn 1 is a tool's result, and no turn before it calls a tool; add the assistant's tool_calls", "wrong role"),
        ("tools must be a list of objects, or that list as a JSON string", "malformed tool call"),
        ("a tool call of turn 2 has no name; write {'name': ..., 'arguments': {...}}", "malformed tool call"),
        ("the answer does not end in a line '#### <number>'; add one, or a column wrong_answer", "no wrong answer"),
        ("not UTF-8 text (byte 0xFF, invalid start byte); save it as UTF-8", "malformed row"),
        ("something that nobody thought of", "malformed row"),
    ],
)  # fmt: skip
def test_reasons_are_of_the_kind_that_they_tell(reason: str, kind: Kind) -> None:
    assert kind_of(Lost("d.jsonl:1", reason)) == kind
    assert kind_of(Lost("d.jsonl:1", reason, overlong=True)) == "over-long"
    assert kind in KINDS
