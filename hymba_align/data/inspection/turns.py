"""Turns that are legal, that training keeps, and that are seldom meant so: empty ones, lost results, one given twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from hymba_align.data.inspection.findings import Finding
from hymba_align.data.reading.examples import Conversation, Example, Preference
from hymba_align.data.reading.messages import Message


def turn_findings(place: str, example: Example) -> Iterator[Finding]:
    """At most one finding of each kind about a row's turns; none of them loses the row."""
    match example:
        case Conversation(messages):
            yield from _findings(place, messages)
        case Preference(prompt, chosen):
            yield from _findings(place, [*prompt, *chosen])


def _findings(place: str, messages: Sequence[Message]) -> Iterator[Finding]:
    asked = [message["content"].strip() for message in messages if message["role"] == "user"]
    empty = [number for number, text in enumerate(asked, start=1) if not text]
    if empty:
        what = f"user {_turns(empty)} {'is' if len(empty) == 1 else 'are'} empty"
        yield Finding("empty user turn", place, what, "write what was asked, or remove the turn", loses_row=False)
    calls = [
        call["function"]["name"]
        for message, following in pairwise(messages)
        if following["role"] != "tool"
        for call in message.get("tool_calls") or ()
    ]
    if calls:
        named = ", ".join(map(repr, dict.fromkeys(calls)))
        what = f"no result follows the call to {named}, and the conversation goes on"
        fix = "add the tool's result after the call, or remove the call"
        yield Finding("call without result", place, what, fix, loses_row=False)
    again = _repeated(messages)
    if again:
        what = f"user {_turns(again)} {'repeats' if len(again) == 1 else 'repeat'} the one right before"
        yield Finding("repeated user turn", place, what, "remove the second of them", loses_row=False)


def _repeated(messages: Sequence[Message]) -> list[int]:
    """The numbers, among the user's turns, of those that say what the user said right before them."""
    repeated, number = [], 0
    for before, message in pairwise([{"role": "", "content": ""}, *messages]):
        if message["role"] == "user":
            number += 1
            said = message["content"].strip()
            if said and before["role"] == "user" and before["content"].strip() == said:
                repeated.append(number)
    return repeated


def _turns(numbers: Sequence[int]) -> str:
    """`turn 2`, or `turns 2, 5`."""
    return f"turn{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
