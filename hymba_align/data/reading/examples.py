"""What a row of data becomes: a conversation, a question with its answer, a preference, or a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from hymba_align.data.reading.messages import Message
from hymba_align.data.reading.tool_calls import Tool
from hymba_align.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """Messages in canonical form (messages.py) and the tools that the assistant may call."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer; several may share a conversation, and DPO needs or makes a wrong answer."""

    question: str
    answer: str
    wrong_answer: str | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt that the assistant is about to answer, and a better and a worse continuation of it."""

    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]
    tools: Sequence[Tool] = ()


@dataclass(frozen=True)
class PlainText:
    """A text without roles; every token of it is trained on."""

    text: str


Example = Conversation | QuestionAnswer | Preference | PlainText

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Located(Generic[ValueT]):
    """A value, and where the row that it comes from stands: "file:line", or "file: row N" where lines mean nothing."""

    place: str
    value: ValueT


@dataclass(frozen=True)
class Lost:
    """A row, or a part of one, that is not trained on: it cannot be used, or is `overlong`.

    `reason` says what is wrong and what to do.
    """

    place: str
    reason: str
    overlong: bool = False

    @classmethod
    def because(cls, place: str, error: DataError) -> Lost:
        """From the error that the row caused."""
        return cls(place, str(error).removeprefix(f"{place}: "))
