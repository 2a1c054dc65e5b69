"""The text of hymba.jinja, written without Jinja: the same characters in a tenth of the time.

The template stays the definition, since it travels with every checkpoint and is what TRL and the evaluation harness
render. Preparing a large set spends a quarter of its time in Jinja; this is what preparation uses where the tokenizer
carries exactly that template. A property test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.messages import Message, dump_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = "<extra_id_"
WORD_JOINER = "\u2060"


def break_up(text: str, tokens: Sequence[str]) -> str:
    """The text with a word joiner (U+2060) after the first character of every one of the tokens in it."""
    for token in tokens:
        text = text.replace(token, token[0] + WORD_JOINER + token[1:])
    return text


def format_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text that hymba.jinja writes, and the assistant's turns in it as (start, end) in characters."""
    eos = str(tokenizer.eos_token)
    control = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    plain = partial(break_up, tokens=[HEADER, *(token for token in control if token)])
    text = _head(conversation, plain)
    spans: list[tuple[int, int]] = []
    before: Message | None = None
    for message in conversation.messages:
        role, said = message["role"], plain(message["content"].strip())
        if before is not None and before["role"] == "assistant":
            text += "\n"
        if role == "user":
            text += f"<extra_id_1>User\n{said}\n"
        elif role == "tool":
            text += f"<extra_id_1>Tool\n{said}\n"
        elif role == "assistant":
            text += "<extra_id_1>Assistant\n"
            start = len(text)
            text += "\n".join(
                [*([said] if said else []), *(_call(call, plain) for call in message.get("tool_calls") or ())]
            )
            text += eos
            spans.append((start, len(text)))
        before = message
    if add_generation_prompt:
        text += ("\n" if before is not None and before["role"] == "assistant" else "") + "<extra_id_1>Assistant\n"
    return text, spans


def _head(conversation: Conversation, plain: Callable[[str], str]) -> str:
    text = "<extra_id_0>System"
    for message in conversation.messages:
        if message["role"] == "system":
            text += "\n" + plain(message["content"].strip()) + ("\n" if conversation.tools else "")
    for tool in conversation.tools:
        text += f"\n<tool> {plain(dump_json(tool))} </tool>"
    return text + "\n\n"


def _call(call: Message, plain: Callable[[str], str]) -> str:
    """A call in canonical form; its arguments are JSON text already."""
    function = call["function"]
    written = f'{{"name": {dump_json(function["name"])}, "arguments": {function["arguments"]}}}'
    return f"<toolcall> {plain(written)} </toolcall>"
