"""Over-long conversations and preferences, cut where a turn ends; an assistant's answer is never cut.

A cut may follow an assistant's turn unless a tool's turn comes next: a call stays with its results. A call that the data
never answers ends a conversation as any answer does.

`length` (the tokens of a conversation or preference) renders and tokenizes, so it is called seldom, and never on much
more than what fits: the number of turns that fit is doubled until it is too large, then bisected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from hymba_align.data.reading.examples import Conversation, Preference
from hymba_align.data.reading.messages import Message


def shorten(
    conversation: Conversation,
    length: Callable[[Conversation], int],
    max_length: int,
    how: Literal["truncate", "split"],
) -> tuple[list[Conversation], str | None]:
    """The conversations of at most `max_length` tokens that one becomes, and what was cut away in words.

    A conversation that fits comes back as it is. Otherwise each of them ends with an assistant's turn. "truncate": the
    longest beginning that fits. "split": consecutive pieces, each with the system messages and the tools, each as long as
    fits, beginning at a user's turn (the first as the conversation begins). A user's turn with all that follows up to the
    next one is left out if it is too long by itself; so are turns after the last that can end a conversation.
    No conversation, and the reason with what to do, if nothing fits. None in place of words if nothing was cut away.
    """
    if length(conversation) <= max_length:
        return [conversation], None
    if how == "truncate":
        return _truncated(conversation, length, max_length)
    return _split(conversation, length, max_length)


def shorten_prompt(preference: Preference, length: Callable[[Preference], int], max_length: int) -> Preference | None:
    """The preference with as many of the newest turns of its prompt as fit, from a user's turn on.

    System messages and tools stay, and so does the last user's turn with what follows it; None if these do not fit.
    `length` is that of the longer side, prompt included.
    """
    if length(preference) <= max_length:
        return preference
    prompt = preference.prompt
    head = _system_turns(prompt)
    starts = [
        turn
        for turn in range(head + 1, len(prompt))
        if prompt[turn]["role"] == "user" and prompt[turn - 1]["role"] != "user"
    ]

    def newest(count: int) -> Preference:
        return replace(preference, prompt=[*prompt[:head], *prompt[starts[-count] :]])

    count = _most(lambda count: length(newest(count)) <= max_length, len(starts))
    return newest(count) if count else None


def _truncated(
    conversation: Conversation, length: Callable[[Conversation], int], max_length: int
) -> tuple[list[Conversation], str | None]:
    messages = conversation.messages
    # The whole is known not to fit.
    ends = [end for end in range(1, len(messages)) if _can_end(messages, end)]

    def first(count: int) -> Conversation:
        return replace(conversation, messages=list(messages[: ends[count - 1]]))

    count = _most(lambda count: length(first(count)) <= max_length, len(ends))
    if not count:
        return [], (
            f"the turns up to the assistant's first answer are longer than max_length={max_length}; "
            "raise max_length or shorten them"
        )
    cut = _turns(ends[count - 1], len(messages))
    return [first(count)], f"{_are(cut)} cut off to fit in max_length={max_length}"


def _split(
    conversation: Conversation, length: Callable[[Conversation], int], max_length: int
) -> tuple[list[Conversation], str | None]:
    messages = conversation.messages
    head = _system_turns(messages)
    cuts, end = _cuts(messages, head)
    pieces: list[Conversation] = []
    too_long: list[str] = []
    first = 0  # of the cuts, where the next piece begins
    while first < len(cuts) - 1:

        def piece(count: int, first: int = first) -> Conversation:
            return replace(conversation, messages=[*messages[:head], *messages[cuts[first] : cuts[first + count]]])

        def fits(count: int, first: int = first) -> bool:
            return length(piece(count, first)) <= max_length

        count = _most(fits, len(cuts) - 1 - first)
        if count:
            pieces.append(piece(count))
        else:
            repeated = head + len(conversation.tools)
            if repeated and not pieces and not too_long and length(_bare(conversation, head)) > max_length:
                return [], (
                    f"the system message and tools alone fill max_length={max_length}; raise max_length or shorten them"
                )
            too_long.append(_turns(cuts[first], cuts[first + 1]))
        first += count or 1
    return pieces, _left_out(too_long, _turns(end, len(messages)) if end < len(messages) else None, max_length, pieces)


def _left_out(
    too_long: Sequence[str], unanswered: str | None, max_length: int, pieces: Sequence[Conversation]
) -> str | None:
    """What the pieces lack, in words."""
    parts = []
    if too_long:
        parts.append(f"{_are(*too_long)} longer than max_length={max_length} even without the others")
    if unanswered:
        parts.append(f"{_are(unanswered)} left over after the last answer")
    if not pieces:
        parts.append("raise max_length or shorten the turns")
    return "; ".join(parts) or None


def _cuts(messages: Sequence[Message], head: int) -> tuple[list[int], int]:
    """Where pieces may begin and, last, where the last one ends; and this end again, `head` if no piece is possible.

    Pieces begin right after the system messages, and at user's turns that follow an assistant's. What the assistant says
    before the first user's turn stays with it.
    """
    asked = next((turn for turn in range(head, len(messages)) if messages[turn]["role"] == "user"), len(messages))
    starts = [head]
    for turn in range(asked + 1, len(messages)):
        if messages[turn]["role"] == "user" and messages[turn - 1]["role"] == "assistant":
            starts.append(turn)
    end = max((end for end in range(head + 1, len(messages) + 1) if _can_end(messages, end)), default=head)
    return [*(start for start in starts if start < end), end], end


def _can_end(messages: Sequence[Message], end: int) -> bool:
    """Whether a conversation may end before turn `end`: after an assistant's turn that has no results cut off."""
    return messages[end - 1]["role"] == "assistant" and (end == len(messages) or messages[end]["role"] != "tool")


def _bare(conversation: Conversation, head: int) -> Conversation:
    """The shortest conversation with these system messages and tools."""
    exchange = [{"role": "user", "content": ""}, {"role": "assistant", "content": "."}]
    return replace(conversation, messages=[*conversation.messages[:head], *exchange])


def _system_turns(messages: Sequence[Message]) -> int:
    """How many system messages come first."""
    return next((turn for turn, message in enumerate(messages) if message["role"] != "system"), len(messages))


def _turns(start: int, end: int) -> str:
    """The turns [start, end) counted from 1: "3" or "3-5"."""
    return f"{end}" if end == start + 1 else f"{start + 1}-{end}"


def _are(*ranges: str) -> str:
    """ "turn 3 is" or "turns 3-5, 8-9 are", the first few by name."""
    if len(ranges) == 1 and "-" not in ranges[0]:
        return f"turn {ranges[0]} is"
    more = f" and {len(ranges) - 3} more like them" if len(ranges) > 3 else ""
    return f"turns {', '.join(ranges[:3])}{more} are"


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count up to `limit` that fits, if all smaller ones do; 0 if 1 does not. It was seen to fit."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # high is known not to fit, or beyond the limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
