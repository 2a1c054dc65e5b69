"""The text of hymba.jinja, written without Jinja: the same characters in a tenth of the time.

The template stays the definition, since it travels with every checkpoint and is what TRL and the evaluation harness
render. Preparing a large set spends a quarter of its time in Jinja; this is what preparation uses where the tokenizer
carries exactly that template. A property test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.json_text import dump_json
from hymba_align.data.reading.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = "<extra_id_"
WORD_JOINER = "\u2060"


def break_up(text: str, tokens: Sequence[str]) -> str:
    """The text with a word joiner (U+2060) after the first character of every one of the tokens in it."""
    for token in tokens:
        text = text.replace(token, token[0] + WORD_JOINER + token[1:])
    return text


@dataclass(frozen=True)
class Written:
    """A conversation's text; spans in it are (start, end) in characters.

    `turns` are the assistant's. `unmarked` are the texts of other turns with `train: False`; None where the template does
    not tell them.
    """

    text: str
    turns: list[tuple[int, int]]
    unmarked: list[tuple[int, int]] | None


def format_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, add_generation_prompt: bool = False
) -> Written:
    """The conversation as hymba.jinja writes it."""
    eos = str(tokenizer.eos_token)
    control = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    plain = partial(break_up, tokens=[HEADER, *(token for token in control if token)])
    turns: list[tuple[int, int]] = []
    unmarked: list[tuple[int, int]] = []
    parts = [*_head(conversation, plain, unmarked)]
    length = sum(map(len, parts))
    before: Message = {"role": "system"}
    for message in conversation.messages:
        role = message["role"]
        text = "\n" if before["role"] == "assistant" else ""
        if role != "system":
            text += f"<extra_id_1>{role.capitalize()}\n"
            start = length + len(text)
            said = plain(message["content"].strip())
            if role == "assistant":
                calls = [_call(call, plain) for call in message.get("tool_calls") or ()]
                text += "\n".join([said, *calls] if said else calls) + eos
                turns.append((start, length + len(text)))
            else:
                text += said + "\n"
                if said and not message.get("train", True):
                    unmarked.append((start, start + len(said)))
        parts.append(text)
        length += len(text)
        before = message
    if add_generation_prompt:
        parts.append(("\n" if before["role"] == "assistant" else "") + "<extra_id_1>Assistant\n")
    return Written("".join(parts), turns, unmarked)


def _head(conversation: Conversation, plain: Callable[[str], str], unmarked: list[tuple[int, int]]) -> Iterator[str]:
    """The system's part in pieces; spans of system messages with `train: False` are added to `unmarked`."""
    yield "<extra_id_0>System"
    length = len("<extra_id_0>System")
    for message in conversation.messages:
        if message["role"] == "system":
            said = plain(message["content"].strip())
            if said and not message.get("train", True):
                unmarked.append((length + 1, length + 1 + len(said)))
            text = f"\n{said}" + ("\n" if conversation.tools else "")
            length += len(text)
            yield text
    for tool in conversation.tools:
        yield f"\n<tool> {plain(dump_json(tool))} </tool>"
    yield "\n\n"


def _call(call: Message, plain: Callable[[str], str]) -> str:
    """A call in canonical form; its arguments are JSON text already."""
    function = call["function"]
    written = f'{{"name": {dump_json(function["name"])}, "arguments": {function["arguments"]}}}'
    return f"<toolcall> {plain(written)} </toolcall>"
