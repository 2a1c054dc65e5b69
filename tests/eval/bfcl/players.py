"""Answers in conversations by a script: what a perfect model says, and what worse ones do."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hymba_align.eval.answers import Answer
from hymba_align.eval.sharing import Processes

Entry = Mapping[str, Any]
Reply = Callable[[Entry, int, int], str]
"""What is said, by the entry, the number of the user's turn and that of the step in it"""
DONE = "That is done."


class Scripted:
    """In the place of `Answers`: looks up whose turn it is in the prompt's text, and replies by the script."""

    def __init__(self, tokenizer: Any, entries: Sequence[Entry], reply: Reply, *, room: int = 10**9) -> None:
        self.tokenizer, self.reply, self.room = tokenizer, reply, room
        self.processes = Processes.alone()
        self.entries = {first_words(entry): entry for entry in entries}
        assert len(self.entries) == len(entries), "two entries begin with the same words"
        self.asked: list[int] = []
        """Prompts of each step"""
        self.longest_prompt = 0
        self.prompts: list[str] = []
        """Texts of the last step's prompts"""

    def room_for(self, max_new_tokens: int, name: str) -> int:
        return self.room

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, until: Sequence[str], name: str
    ) -> list[Answer]:
        self.asked.append(len(prompts))
        self.longest_prompt = max(self.longest_prompt, *map(len, prompts))
        self.prompts = [self.tokenizer.decode(prompt) for prompt in prompts]
        return [Answer(self.say(text), 1, False) for text in self.prompts]

    def say(self, prompt: str) -> str:
        turns = prompt.split("<extra_id_1>")[1:-1]
        users = [place for place, turn in enumerate(turns) if turn.startswith("User\n")]
        entry = self.entries[turns[0].removeprefix("User\n").strip()]
        step = sum(turn.startswith("Assistant\n") for turn in turns[users[-1] :])
        return self.reply(entry, len(users) - 1, step)


def first_words(entry: Entry) -> str:
    return str(entry["question"][0][0]["content"]).strip()


def perfect(entry: Entry, turn: int, step: int) -> str:
    """All calls of a turn at once, and then no more."""
    return as_toolcalls(entry, entry["target"][turn]) if step == 0 and entry["target"][turn] else DONE


def one_by_one(entry: Entry, turn: int, step: int) -> str:
    """A call per step."""
    calls = entry["target"][turn]
    return as_toolcalls(entry, calls[step : step + 1]) if step < len(calls) else DONE


def silent(entry: Entry, turn: int, step: int) -> str:
    return DONE


def calls_the_first_function(entry: Entry, turn: int, step: int) -> str:
    """A call of some function, without its arguments."""
    return as_toolcalls(entry, [f"{entry['tools'][0]['name']}()"]) if step == 0 else DONE


def calls_what_there_is_not(entry: Entry, turn: int, step: int) -> str:
    """The right calls, each of a function whose name has one letter too many."""
    calls = perfect(entry, turn, step)
    return calls.replace('{"name": "', '{"name": "x')


def as_toolcalls(entry: Entry, calls: Sequence[str]) -> str:
    """Calls in Python, as the ground truth has them, in the chat template's format."""
    later = [tool for tools in entry.get("missed_tools", {}).values() for tool in tools]
    parameters = {tool["name"]: list(tool["parameters"]["properties"]) for tool in [*entry["tools"], *later]}
    return "\n".join(_as_toolcall(parameters, call) for call in calls)


def _as_toolcall(parameters: Mapping[str, Sequence[str]], text: str) -> str:
    call: Any = ast.parse(text, mode="eval").body
    name = call.func.id
    given = dict(zip(parameters[name], map(ast.literal_eval, call.args), strict=False))
    given |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return f"<toolcall> {json.dumps({'name': name, 'arguments': given})} </toolcall>"
