"""One reader per schema: a row whose columns have their canonical names becomes one example.

| schema            | becomes        | how                                                                                |
|-------------------|----------------|------------------------------------------------------------------------------------|
| messages          | Conversation   | the messages; `tools`                                                              |
| sharegpt          | Conversation   | `conversations`, after `system` where that column holds something; `tools`         |
| alpaca            | Conversation   | `instruction` and `input`, a line break between, and `output`, after `system` and  |
|                   |                | the pairs of `history`, whose answers are trained on like any other                |
| prompt_completion | Conversation   | texts are a user's and the assistant's turn; only the completion is trained on     |
| question_answer   | QuestionAnswer | as it is                                                                           |
| text              | PlainText      | as it is                                                                           |
| preference        | Preference     | replies may repeat the prompt; without one, it is what the two conversations share |
| ranked            | Preference     | the best response against the worst, the first of equals; the rest is not used     |

A reply of a preference is one turn of the assistant's, since DPO trains on every token after the prompt.
A conversation may end with turns that nobody answers: they are kept, and nothing of them is trained on. Texts are left as
they are. Columns that hold lists may hold them as JSON texts, as CSV files must.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hymba_align.data.reading.examples import Conversation, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.json_text import check_text, kind, parse_json, shown
from hymba_align.data.reading.messages import Message, TurnStyle, check_turns, numbered_messages
from hymba_align.data.reading.tool_calls import canonical_tools
from hymba_align.errors import DataError, RenderError

Row = Mapping[str, Any]
Turns = tuple[list[Message], list[int]]  # canonical messages, and the numbers that they have in the file

DIALOGUE_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read_messages(row: Row, style: TurnStyle) -> Conversation:
    """OpenAI's format: `messages` and `tools`."""
    return _conversation(numbered_messages(_listed(row, "messages"), style), row)


def read_sharegpt(row: Row, style: TurnStyle) -> Conversation:
    """ShareGPT's format: `conversations`, `system` and `tools`."""
    return _conversation(_with_system(row, numbered_messages(_listed(row, "conversations"), style)), row)


def read_alpaca(row: Row, style: TurnStyle) -> Conversation:
    """Alpaca's format: one exchange, and those before it."""
    turns: list[Message] = []
    history = _listed(row, "history") or []
    if not isinstance(history, (list, tuple)):
        raise DataError(f"the column 'history' must be a list of [user, assistant] pairs, not {kind(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"entry {number} of the column 'history' must be a pair [user, assistant] of texts")
        turns += _exchange(*(_text(said, f"entry {number} of the column 'history'") for said in pair))
    asked, given = _column(row, "instruction"), _optional(row, "input")
    turns += _exchange(f"{asked}\n{given}" if given else asked, _column(row, "output"))
    return Conversation(_with_system(row, (turns, []))[0])


def read_prompt_completion(row: Row, style: TurnStyle) -> Conversation:
    """A prompt and what completes it; the assistant's turns within the prompt are context."""
    prompt, numbers = _prompt(row["prompt"], "the column 'prompt'", style)
    completion, more = _reply(row["completion"], "the column 'completion'", prompt, style)
    prompt = [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]
    return _conversation(_with_system(row, ([*prompt, *completion], [*numbers, *more])), row, checked=True)


def read_question_answer(row: Row, style: TurnStyle) -> QuestionAnswer:
    """A question, its answer and perhaps a wrong one."""
    wrong = None if row.get("wrong_answer") is None else _column(row, "wrong_answer")
    return QuestionAnswer(_column(row, "question"), _column(row, "answer"), wrong)


def read_text(row: Row, style: TurnStyle) -> PlainText:
    """A text without roles."""
    return PlainText(_column(row, "text"))


def read_preference(row: Row, style: TurnStyle) -> Preference:
    """Two replies to a prompt."""
    return _preference(row, row["prompt"], "prompt", (row["chosen"], row["rejected"]), style)


def read_sharegpt_preference(row: Row, style: TurnStyle) -> Preference:
    """Two replies to a conversation, as LLaMA-Factory writes preferences."""
    return _preference(row, _listed(row, "conversations"), "conversations", (row["chosen"], row["rejected"]), style)


def read_ranked(row: Row, style: TurnStyle) -> Preference:
    """The best and the worst of several replies, by their scores."""
    responses, scores = (_listed(row, column) for column in ("responses", "scores"))
    for column, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, (list, tuple)):
            raise DataError(f"the column {column!r} must be a list, not {kind(values)}")
    if len(responses) != len(scores):
        raise DataError(f"there are {len(responses)} responses and {len(scores)} scores; give each response its score")
    if len(responses) < 2:
        raise DataError(f"the column 'responses' has {len(responses)}; a preference needs two or more")
    for number, score in enumerate(scores, start=1):
        if not _is_number(score):
            raise DataError(f"score {number} is {shown(score)}; every score must be a finite number")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise DataError(f"all {len(scores)} scores are {shown(scores[best])}, so no response is better; remove the row")
    where = tuple(f"response {place + 1}" for place in (best, worst))
    return _preference(row, row["prompt"], "prompt", (responses[best], responses[worst]), style, where)


def read_implicit_preference(row: Row, style: TurnStyle) -> Preference:
    """Two conversations that begin alike; the prompt is what they share, up to the assistant's turn where they part."""
    chosen, numbers = _whole(row["chosen"], "chosen", style)
    rejected, other_numbers = _whole(row["rejected"], "rejected", style)
    parting = _parting(chosen, rejected, numbers)
    prompt = _without_train(chosen[:parting])
    if all(message["role"] == "system" for message in prompt):
        raise DataError(
            "the columns 'chosen' and 'rejected' share no turn that is answered; begin both with the same prompt, or add "
            "the column 'prompt'"
        )
    _check_turns(prompt, numbers, "the column 'chosen'")
    replies = []
    for column, messages, turns in (("chosen", chosen, numbers), ("rejected", rejected, other_numbers)):
        reply, where = messages[parting:], f"the column {column!r}"
        _check_turns(reply, turns[parting:], where, prompt)
        _check_reply(reply, turns[parting:], where)
        replies.append(reply)
    return Preference(_with_system(row, (prompt, []))[0], replies[0], replies[1], _tools(row))


def _parting(chosen: Sequence[Message], rejected: Sequence[Message], numbers: Sequence[int]) -> int:
    """How many turns two conversations share before their replies.

    Equal ones part at their last reply, which is the one that was meant to differ.
    """
    parting = 0
    while parting < min(len(chosen), len(rejected)) and _same(chosen[parting], rejected[parting]):
        parting += 1
    if parting == len(chosen) == len(rejected):
        parting = max((place for place, message in enumerate(chosen) if message["role"] == "assistant"), default=0)
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if parting == len(messages):
            raise DataError(f"the column {column!r} is only the beginning of the other; end it with another reply")
        if messages[parting]["role"] != "assistant":
            raise DataError(
                f"the columns 'chosen' and 'rejected' part at turn {numbers[parting]}, which is not the assistant's in "
                "both; only replies may differ"
            )
    while parting and chosen[parting - 1]["role"] == "assistant":
        parting -= 1  # a prompt ends where the assistant is to answer; `_check_reply` refuses what goes on from there
    return parting


def _conversation(turns: Turns, row: Row, *, checked: bool = False) -> Conversation:
    messages, numbers = turns
    if not messages:
        raise RenderError("the conversation has no messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise RenderError("the conversation has no assistant turn, so there is nothing to train on")
    if not checked:
        check_turns(messages, numbers)
    return Conversation(messages, _tools(row))


def _preference(
    row: Row,
    asked: Any,
    column: str,
    answers: tuple[Any, Any],
    style: TurnStyle,
    where: tuple[str, ...] = ("the column 'chosen'", "the column 'rejected'"),
) -> Preference:
    prompt = _without_train(_prompt(asked, f"the column {column!r}", style)[0])
    replies = []
    for answer, place in zip(answers, where, strict=True):
        reply, numbers = _reply(answer, place, prompt, style)
        _check_reply(reply, numbers, place)
        replies.append(reply)
    return Preference(_with_system(row, (prompt, []))[0], replies[0], replies[1], _tools(row))


def _prompt(value: Any, where: str, style: TurnStyle) -> Turns:
    messages, numbers = _turns(value, where, "user", style)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{where} must end with a turn that the assistant answers")
    _check_turns(messages, numbers, where)
    return messages, numbers


def _reply(value: Any, where: str, prompt: Sequence[Message], style: TurnStyle) -> Turns:
    """The turns after the prompt; files that repeat the prompt before them are common."""
    messages, numbers = _turns(value, where, "assistant", style)
    shared = len(prompt)
    if len(messages) > shared and all(map(_same, prompt, messages)):
        messages, numbers = messages[shared:], numbers[shared:]
    if not messages or messages[0]["role"] != "assistant":
        raise DataError(f"{where} must begin with the assistant's turn, or repeat 'prompt' before it")
    _check_turns(messages, numbers, where, prompt)
    return messages, numbers


def _check_turns(
    messages: Sequence[Message], numbers: Sequence[int], where: str, earlier: Sequence[Message] = ()
) -> None:
    try:
        check_turns(messages, numbers[: len(messages)], earlier)
    except RenderError as error:
        raise RenderError(f"in {where}, {error}") from error


def _check_reply(reply: Sequence[Message], numbers: Sequence[int], where: str) -> None:
    """What a preference asks of its replies: one turn of the assistant's, because DPO trains on every token of it."""
    if len(reply) > 1:
        other = next((message["role"] for message in reply if message["role"] != "assistant"), None)
        if other is None:
            raise DataError(
                f"{where} has {len(reply)} turns of the assistant's in a row, and DPO would train on the header between "
                "them too; join them into one"
            )
        raise DataError(
            f"{where} goes on after the assistant's answer, and DPO would train on the {other}'s text too; end it at that "
            "answer, or move the turns before it into the prompt"
        )
    if "train" in reply[0]:
        raise DataError(
            f"in {where}, turn {numbers[0]} says train: false, but a preference counts whole replies; remove it"
        )


def _turns(value: Any, where: str, role: str, style: TurnStyle) -> Turns:
    """A text as one turn of `role`, a single message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, where)}], [1]
    try:
        return numbered_messages([value] if isinstance(value, Mapping) else value, style)
    except RenderError as error:
        raise RenderError(f"in {where}, {error}") from error


def _whole(value: Any, column: str, style: TurnStyle) -> Turns:
    """A whole conversation: a list of messages, or a text with "Human:" and "Assistant:" before its turns."""
    if not isinstance(value, str) or value.lstrip().startswith("["):
        return _turns(_listed({column: value}, column), f"the column {column!r}", "assistant", style)
    text = _text(value, f"the column {column!r}").strip()
    marks = list(DIALOGUE_TURN.finditer(text))
    if not marks or marks[0].start() > 0:
        raise DataError(
            f"the column {column!r} holds one text that is no dialogue; begin its turns with 'Human:' and 'Assistant:', "
            "write a list of messages, or add the column 'prompt'"
        )
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]
    return messages, list(range(1, len(messages) + 1))


def _same(message: Message, other: Message) -> bool:
    """Whether two messages say the same, whatever of them is trained on."""
    return {**message, "train": None} == {**other, "train": None}


def _without_train(messages: Sequence[Message]) -> list[Message]:
    """The messages of a preference's prompt, of which nothing is trained on anyway."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _with_system(row: Row, turns: Turns) -> Turns:
    """The turns after the column `system`, unless it is empty or they begin with that very message."""
    system = {"role": "system", "content": _optional(row, "system")}
    messages, numbers = turns
    if not system["content"] or (messages and _same(messages[0], system)):
        return turns
    return [system, *messages], [0, *numbers]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tools(row: Row) -> Sequence[dict[str, Any]]:
    return canonical_tools(row.get("tools")) or ()


def _listed(row: Row, column: str) -> Any:
    """A column's value; a list that is written as JSON text becomes one."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, f"the contents of the column {column!r}")
    return value


def _is_number(score: Any) -> bool:
    """A finite number; asked of integers without `isfinite`, for which they may be too large."""
    return type(score) is int or (isinstance(score, float) and math.isfinite(score))


def _column(row: Row, column: str) -> str:
    return _text(row[column], f"the column {column!r}")


def _optional(row: Row, column: str) -> str:
    """A column's text, or "" where it is absent or blank."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _text(value, f"the column {column!r}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, not {shown(value)}")
    if not value or value.isspace():
        raise DataError(f"{what} is empty; fill it in or remove the row")
    check_text(value, what)
    return value
