from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_align.data.lengths import shorten, shorten_prompt
from hymba_align.data.reading.examples import Conversation, Preference
from hymba_align.data.rendering import render
from hymba_align.errors import RenderError

Message = dict[str, Any]
SPEAKERS = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
HOWS = ("truncate", "split")


def talk(turns: str, tools: int = 0) -> Conversation:
    """A conversation from words such as "u3" (a user's turn of 3 tokens); "c": the assistant calls a tool."""
    messages: list[Message] = []
    for number, turn in enumerate(turns.split(), start=1):
        message: Message = {"role": SPEAKERS[turn[0]], "content": f"{number} " * int(turn[1:] or 1)}
        if turn[0] == "c":
            message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
        messages.append(message)
    return Conversation(messages, [{"name": "f"}] * tools)


def words(example: Conversation | Preference) -> int:
    """Length as words of all turns and 1 for each tool."""
    turns: Sequence[Message] = (
        example.messages
        if isinstance(example, Conversation)
        else [*example.prompt, *max(example.chosen, example.rejected, key=tokens)]
    )
    return tokens(turns) + len(example.tools)


def tokens(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def numbers(pieces: Sequence[Conversation]) -> list[list[int]]:
    """The turns that each piece is made of, counted from 1."""
    return [[int(message["content"].split()[0]) for message in piece.messages] for piece in pieces]


def cut(turns: str, max_length: int, how: Any, tools: int = 0) -> tuple[list[list[int]], str | None]:
    pieces, reason = shorten(talk(turns, tools), words, max_length, how)
    return numbers(pieces), reason


@pytest.mark.parametrize("how", HOWS)
def test_a_conversation_that_fits_comes_back_as_it_is(how: Any) -> None:
    conversation = talk("s u a u")  # even if it ends with the user
    pieces, reason = shorten(conversation, words, 4, how)
    assert pieces[0] is conversation
    assert (len(pieces), reason) == (1, None)


def test_truncating_keeps_the_longest_beginning_that_ends_with_an_answer() -> None:
    assert cut("s u2 a3 u1 a4 u1 a9", 11, "truncate") == (
        [[1, 2, 3, 4, 5]],
        "turns 6-7 are cut off to fit in max_length=11",
    )
    assert cut("s u2 a3 u1 a4 u1 a9", 10, "truncate")[0] == [[1, 2, 3]]
    assert cut("u1 a1 u9", 5, "truncate") == ([[1, 2]], "turn 3 is cut off to fit in max_length=5")


@pytest.mark.parametrize("how", HOWS)
def test_nothing_is_left_when_not_even_the_first_answer_fits(how: Any) -> None:
    pieces, reason = cut("s u2 a30", 10, how)
    assert pieces == []
    assert (
        reason
        == {
            "truncate": "the turns up to the assistant's first answer are longer than max_length=10; raise max_length or "
            "shorten them",
            "split": "turns 2-3 are longer than max_length=10 even without the others; raise max_length or shorten the turns",
        }[str(how)]
    )


def test_a_call_whose_results_are_cut_off_is_no_ending() -> None:
    assert cut("u1 a1 u1 c1 t9 a1", 5, "truncate")[0] == [[1, 2]]
    assert cut("u1 c1 t9 a1", 5, "truncate")[0] == []
    assert cut("u1 c1 t1 a1 u9 a1", 5, "truncate")[0] == [[1, 2, 3, 4]]


def test_a_call_that_the_data_never_answers_is_an_ending() -> None:
    assert cut("u1 c1 u9 a1", 5, "truncate")[0] == [[1, 2]]
    assert cut("u3 a1 u3 c1", 5, "split") == ([[1, 2], [3, 4]], None)


def test_splitting_takes_as_many_exchanges_as_fit_and_loses_none() -> None:
    assert cut("s u1 a2 u1 a2 u1 a2 u3 a3", 7, "split") == ([[1, 2, 3, 4, 5], [1, 6, 7], [1, 8, 9]], None)


def test_tool_results_stay_with_their_call_and_with_the_answer_to_them() -> None:
    assert cut("u1 c1 t1 t1 a1 u1 c1 t1 a1", 5, "split") == ([[1, 2, 3, 4, 5], [6, 7, 8, 9]], None)
    assert cut("u1 c1 t1 u1 a1 u1 a1", 5, "split") == ([[1, 2, 3, 4, 5], [6, 7]], None)


def test_every_piece_repeats_the_system_messages_and_the_tools() -> None:
    pieces, _ = shorten(talk("s1 s1 u2 a2 u2 a2", tools=2), words, 8, "split")
    assert numbers(pieces) == [[1, 2, 3, 4], [1, 2, 5, 6]]
    assert all(len(piece.tools) == 2 for piece in pieces)


def test_exchanges_that_are_too_long_by_themselves_are_left_out_and_named() -> None:
    assert cut("u1 a1 u1 a9 u1 a1", 4, "split") == (
        [[1, 2], [5, 6]],
        "turns 3-4 are longer than max_length=4 even without the others",
    )
    assert cut("u1 a1" + " u1 a9" * 5, 4, "split") == (
        [[1, 2]],
        "turns 3-4, 5-6, 7-8 and 2 more like them are longer than max_length=4 even without the others",
    )


def test_turns_after_the_last_answer_are_left_out_and_named() -> None:
    assert cut("u1 a1 u1 a1 u1", 4, "split") == ([[1, 2, 3, 4]], "turn 5 is left over after the last answer")
    assert cut("u1 a1 u1 c1 t1", 4, "split") == ([[1, 2]], "turns 3-5 are left over after the last answer")


def test_system_messages_that_fill_the_room_by_themselves_are_the_reason_after_few_calls() -> None:
    calls: list[int] = []
    pieces, reason = shorten(talk("s50" + " u1 a1" * 500), counting(words, calls), 40, "split")
    assert pieces == []
    assert reason == ("the system message and tools alone fill max_length=40; raise max_length or shorten them")
    assert len(calls) == 3


def test_what_the_assistant_says_first_stays_with_the_first_question() -> None:
    assert cut("s1 a1 u1 a1 u1 a1", 5, "split") == ([[1, 2, 3, 4], [1, 5, 6]], None)


def test_turns_keep_their_marks() -> None:
    conversation = talk("u1 a1 u1 a1")
    messages = [{**message, "train": False} for message in conversation.messages]
    pieces, _ = shorten(Conversation(messages), words, 2, "split")
    assert [message for piece in pieces for message in piece.messages] == messages


def counting(length: Callable[[Any], int], calls: list[int]) -> Callable[[Any], int]:
    def counted(example: Any) -> int:
        calls.append(length(example))
        return calls[-1]

    return counted


@pytest.mark.parametrize("how", HOWS)
def test_length_is_asked_seldom_and_only_of_what_might_fit(how: Any) -> None:
    calls: list[int] = []
    pieces, _ = shorten(talk(" ".join(["u2 a2"] * 1000)), counting(words, calls), 400, how)
    assert calls.pop(0) == 4000
    assert len(calls) <= 15 * len(pieces)
    assert max(calls) <= 2 * 400 + 4
    # A fifth of the calls that asking for every number of exchanges would take.
    assert len(pieces) == (1 if how == "truncate" else 10)


turn = st.tuples(st.sampled_from("uaact"), st.integers(1, 6)).map(lambda one: f"{one[0]}{one[1]}")
conversations = st.builds(
    lambda system, turns, tools: talk(" ".join([*system, *turns]), tools),
    st.lists(st.just("s2"), max_size=2),
    st.lists(turn, min_size=1, max_size=14).filter(lambda turns: any(one[0] in "ac" for one in turns)),
    st.integers(0, 2),
)


def spoken(conversation: Conversation, role: str) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == role]


def named(reason: str | None) -> set[int]:
    """The turns that a reason names."""
    found: set[int] = set()
    for turns in re.findall(r"turns? (\d[\d, -]*)", reason or ""):
        for one in turns.strip().split(", "):
            first, _, last = one.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


@given(conversations, st.integers(2, 30), st.sampled_from(HOWS))
@settings(max_examples=400, deadline=None)
def test_pieces_fit_end_with_an_answer_and_with_what_is_named_are_the_whole(
    conversation: Conversation, max_length: int, how: Any
) -> None:
    pieces, reason = shorten(conversation, words, max_length, how)
    if pieces and pieces[0] is conversation:
        return
    assert reason or how == "split"
    body = [number for number, message in enumerate(conversation.messages, 1) if message["role"] != "system"]
    head, kept = body[0] - 1, list[int]()
    for piece, turns in zip(pieces, numbers(pieces), strict=True):
        assert words(piece) <= max_length
        assert piece.messages[-1]["role"] == "assistant"
        assert spoken(piece, "system") == spoken(conversation, "system")
        own = [number for number in turns if number in body]
        assert own == list(range(own[0], own[-1] + 1))
        assert own[0] == body[0] or conversation.messages[own[0] - 1]["role"] == "user"
        # No results without their call, no call without its results.
        beside = [one for one in (own[0] - 1, own[-1]) if head < one < len(conversation.messages)]
        assert all(conversation.messages[one]["role"] != "tool" for one in beside)
        kept += own
    if pieces and "more like them" not in (reason or ""):
        assert sorted([*kept, *named(reason)]) == body


@given(conversations, st.integers(2, 30))
@settings(max_examples=200, deadline=None)
def test_truncating_finds_what_trying_every_beginning_finds(conversation: Conversation, max_length: int) -> None:
    messages = conversation.messages
    fitting = [
        end
        for end in range(1, len(messages))
        if messages[end - 1]["role"] == "assistant"
        and messages[end]["role"] != "tool"
        and words(Conversation(messages[:end], conversation.tools)) <= max_length
    ]
    pieces, _ = shorten(conversation, words, max_length, "truncate")
    if words(conversation) > max_length:
        assert [len(piece.messages) for piece in pieces] == fitting[-1:]


def test_rendered_conversations_fit_token_for_token(small: Any) -> None:
    def length(conversation: Conversation) -> int:
        return len(render(small, conversation.messages, conversation.tools).input_ids)

    conversation = talk("s3 " + "u5 a9 u4 c1 t6 a8 " * 6, tools=1)
    for how in HOWS:
        pieces, reason = shorten(conversation, length, 250, how)
        assert all(length(piece) <= 250 for piece in pieces)
        assert all(render(small, piece.messages, piece.tools).assistant_mask[-1] == 1 for piece in pieces)
        assert (reason is None) == (how == "split")
    assert length(conversation) > 300


def test_a_conversation_that_cannot_be_rendered_stays_an_error(small: Any) -> None:
    with pytest.raises(RenderError, match="no assistant turn"):
        shorten(talk("u9"), lambda one: len(render(small, one.messages).input_ids), 5, "split")


def pair(prompt: str, chosen: str = "a1", rejected: str = "a2") -> Preference:
    return Preference(talk(prompt).messages, talk(chosen).messages, talk(rejected).messages, [{"name": "f"}])


def prompt_left(prompt: str, max_length: int) -> list[int] | None:
    shortened = shorten_prompt(pair(prompt), words, max_length)
    return None if shortened is None else numbers([Conversation(shortened.prompt)])[0]


def test_a_prompt_that_fits_comes_back_as_it_is() -> None:
    whole = pair("s1 u1 a1 u1")
    assert shorten_prompt(whole, words, 7) is whole


def test_a_prompt_loses_its_oldest_turns_and_never_the_system_message() -> None:
    assert prompt_left("s1 u2 a2 u2 a2 u2", 10) == [1, 4, 5, 6]
    assert prompt_left("s1 u2 a2 u2 a2 u2", 9) == [1, 6]
    assert prompt_left("s1 u2 a2 u2 a2 u2", 5) is None
    assert prompt_left("u2 c1 t1 a1 u1 c1 t1", 6) == [5, 6, 7]
    assert prompt_left("u1 a1 u1 u1", 5) == [3, 4]


def test_a_prompt_without_a_later_question_cannot_be_shortened() -> None:
    assert prompt_left("s1 u9", 5) is None
    assert prompt_left("s9", 5) is None


def test_the_answers_and_tools_of_a_preference_stay() -> None:
    whole = pair("u9 a9 u1")
    shortened = shorten_prompt(whole, words, 5)
    assert shortened is not None
    assert (shortened.chosen, shortened.rejected, shortened.tools) == (whole.chosen, whole.rejected, whole.tools)


@given(st.lists(turn, min_size=1, max_size=14), st.integers(3, 30))
@settings(max_examples=200, deadline=None)
def test_shortened_prompts_are_the_longest_that_fit_and_begin_with_a_question(turns: list[str], limit: int) -> None:
    whole = pair(" ".join(["s2", *turns]))
    shortened = shorten_prompt(whole, words, limit)
    starts = [
        start
        for start in range(2, len(whole.prompt))
        if whole.prompt[start]["role"] == "user" and whole.prompt[start - 1]["role"] != "user"
    ]
    candidates = [whole.prompt, *([whole.prompt[0], *whole.prompt[start:]] for start in starts)]
    fitting = [one for one in candidates if tokens(one) + 2 + 1 <= limit]
    assert (shortened.prompt if shortened else None) == (fitting[0] if fitting else None)
