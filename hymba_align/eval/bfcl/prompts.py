"""BFCL's problems as prompts: the chat template's tools block, then the problem's own messages.

Tools are written as data of the schema `messages` has them, one JSON object of name, description and parameters each,
so the model reads what it was trained on. BFCL gives the system message of some live problems, and no other: its
prompts that explain a call format are for models without one of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.messages import canonical_messages
from hymba_align.data.reading.tool_calls import canonical_tools
from hymba_align.data.rendering import render_prompts
from hymba_align.errors import RenderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Entry = dict[str, Any]


def conversation_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages and tools as training data has them."""
    return Conversation(canonical_messages(list(messages)), canonical_tools(list(tools)))


def prompts_of(tokenizer: PreTrainedTokenizerBase, entries: Sequence[Entry]) -> list[list[int]]:
    """Token ids of each problem's prompt, up to where the assistant answers.

    Args:
        entries: of single-turn categories, as `BFCLClient.entries` gives them.

    Raises: RenderError naming a problem that the chat template cannot hold.
    """
    conversations = [conversation_of(entry["question"][0], entry["tools"]) for entry in entries]
    prompts = []
    for entry, rendered in zip(entries, render_prompts(tokenizer, conversations), strict=True):
        if isinstance(rendered, RenderError):
            raise RenderError(f"BFCL's problem {entry['id']}: {rendered}") from rendered
        prompts.append(rendered.input_ids)
    return prompts


def question_of(entry: Entry) -> str:
    """What the user says, for people: a paragraph per message."""
    said = [message for turn in entry["question"] for message in turn]
    return "\n\n".join(
        message["content"] if message["role"] == "user" else f"{message['role']}: {message['content']}"
        for message in said
    )
