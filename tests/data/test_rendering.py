from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba_align.data.hymba_format import format_conversation
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.rendering import (
    OverlongError,
    Rendered,
    _render_text,
    prefix_is_rewritten,
    render,
    render_conversations,
    render_prompts,
    render_text,
)
from hymba_align.errors import RenderError

TEXT = st.text(st.sampled_from("ab \n<>é漢</s><extra_id_1>7"), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def of(*turns: tuple[str, str], **marks: Any) -> Conversation:
    """A conversation of (question, answer) pairs; `marks` go on the first answer."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages[1].update(marks)
    return Conversation(messages)


def rendered(tokenizer: Any, conversation: Conversation, **options: Any) -> Rendered:
    (result,) = render_conversations(tokenizer, [conversation], **options)
    assert isinstance(result, Rendered)
    return result


@pytest.mark.parametrize("name", ["small", "released"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(TURNS, min_size=1, max_size=3))
def test_a_batch_is_what_transformers_makes_of_each_conversation(
    load: Callable[[str], Any], name: str, batch: list[list[tuple[str, str]]]
) -> None:
    tokenizer = load(name)
    conversations = [of(*turns) for turns in batch]
    for conversation, ours in zip(conversations, render_conversations(tokenizer, conversations), strict=True):
        theirs = tokenizer.apply_chat_template(
            list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        assert isinstance(ours, Rendered)
        assert ours.input_ids == theirs["input_ids"]
        assert ours.assistant_mask == theirs["assistant_masks"]
        assert not prefix_is_rewritten(tokenizer, conversation, ours)


TOOLS = st.lists(st.fixed_dictionaries({"name": TEXT, "description": TEXT}), max_size=2)
CALLS = st.lists(
    st.builds(
        lambda name, value: {
            "type": "function",
            "function": {"name": name, "arguments": json.dumps({"a": value}, ensure_ascii=False)},
        },
        TEXT,
        TEXT,
    ),
    min_size=1,
    max_size=2,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "tool", "assistant"]), "content": TEXT | st.just("")}
    ),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT | st.just(""), "tool_calls": CALLS}),
)


@pytest.mark.parametrize("name", ["small", "released"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6), tools=TOOLS, prompt=st.booleans())
def test_what_is_written_without_jinja_is_what_the_template_writes(
    load: Callable[[str], Any], name: str, messages: list[dict[str, Any]], tools: list[dict[str, str]], prompt: bool
) -> None:
    tokenizer, conversation = load(name), Conversation(messages, tools)
    written = format_conversation(tokenizer, conversation, add_generation_prompt=prompt)
    assert written == _render_text(tokenizer, conversation, add_generation_prompt=prompt, marked=True)


def test_another_template_is_rendered_by_jinja(small: Any) -> None:
    own = small.chat_template
    try:
        small.chat_template = own.replace("User", "Person")
        assert "Person" in small.decode(rendered(small, of(("one", "two"))).input_ids)
    finally:
        small.chat_template = own


def test_the_loss_is_on_the_assistants_turns_on_the_last_of_them_or_on_all(small: Any) -> None:
    conversation = of(("one", "two"), ("three", "four"))
    every = rendered(small, conversation)
    (first, last) = every.turns
    places = range(len(every.input_ids))
    assert every.assistant_mask == [int(any(start <= place < end for start, end in every.turns)) for place in places]
    assert rendered(small, conversation, loss_on="last").assistant_mask == [
        int(last[0] <= place < last[1]) for place in places
    ]
    assert rendered(small, conversation, loss_on="all").assistant_mask == [1] * len(places)
    assert small.decode(every.input_ids[first[0] : first[1]]) == "two</s>"


def test_a_turn_with_train_false_is_never_marked(small: Any) -> None:
    conversation = of(("one", "two"), ("three", "four"), train=False)
    for loss_on, marked in (("assistant", [0, 1]), ("last", [0, 1]), ("all", [0, 1])):
        result = rendered(small, conversation, loss_on=loss_on)
        assert [result.assistant_mask[start] for start, _ in result.turns] == marked
    assert rendered(small, conversation, loss_on="all").assistant_mask[0] == 1
    others = Conversation(
        [
            {"role": "system", "content": "rules", "train": False},
            {"role": "user", "content": "secret", "train": False},
            {"role": "assistant", "content": "two"},
        ],
        [{"name": "tool"}],
    )
    result = rendered(small, others, loss_on="all")
    hidden = [token for token, marked in zip(result.input_ids, result.assistant_mask, strict=True) if not marked]
    assert small.decode(hidden) == "rulessecret"
    own = small.chat_template
    try:
        small.chat_template = own + " "
        with pytest.raises(
            RenderError, match="a turn with train: false is not the assistant's, and this chat template"
        ):
            raise render_conversations(small, [others], loss_on="all")[0]  # type: ignore[misc]
    finally:
        small.chat_template = own
    alone = of(("one", "two"), train=False)
    assert not any(rendered(small, alone, loss_on="last").assistant_mask)


def test_one_conversation_that_cannot_be_rendered_leaves_the_others_as_they_are(small: Any) -> None:
    good = of(("one", "two"))
    small_copy_of = small.chat_template
    try:
        small.chat_template = "{{ raise_exception('no') if messages|length > 2 }}" + small_copy_of
        first, second, third = render_conversations(small, [good, of(("a", "b"), ("c", "d")), good])
    finally:
        small.chat_template = small_copy_of
    assert isinstance(second, RenderError)
    assert str(second) == "the chat template refuses the conversation: no"
    assert first == third == rendered(small, good)


def test_a_text_that_is_certainly_too_long_is_not_tokenized(small: Any) -> None:
    (result,) = render_conversations(small, [of(("x" * 10_000_000, "y"))], max_length=64)
    assert isinstance(result, OverlongError)
    assert str(result) == "longer than max_length=64: it has 10,000,065 characters"
    with pytest.raises(OverlongError):
        render_text(small, "x" * 10_000_000, max_length=64)
    assert isinstance(render_conversations(small, [of(("x" * 200, "y"))], max_length=64)[0], Rendered)


def test_a_prompt_ends_where_the_reply_begins(small: Any) -> None:
    whole = of(("one", "two"))
    (prompt,) = render_prompts(small, [Conversation(whole.messages[:1])])
    assert isinstance(prompt, Rendered)
    assert len(prompt.input_ids) == rendered(small, whole).turns[0][0]


@pytest.mark.parametrize("name", ["small", "released"])
def test_a_plain_text_is_trained_whole_and_ends_once(load: Callable[[str], Any], name: str) -> None:
    tokenizer = load(name)
    result = render_text(tokenizer, "One text.\n</s><s> [PAD] <extra_id_1>User")
    assert result.assistant_mask == [1] * len(result.input_ids)
    assert result.input_ids == [
        *tokenizer("One text.\n<\u2060/s><\u2060s> [\u2060PAD] <\u2060extra_id_1>User")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert [token for token in result.input_ids if token in tokenizer.all_special_ids] == [
        *([tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []),
        tokenizer.eos_token_id,
    ]


def test_a_template_that_drops_earlier_thoughts_rewrites_the_prefix(small: Any) -> None:
    own = small.chat_template
    conversation = of(("one", "two"), ("three", "four"))
    try:
        small.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content if loop.last else 'gone' }}{{ eos_token }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
        assert prefix_is_rewritten(small, conversation, rendered(small, conversation))
        single = of(("one", "two"))
        assert not prefix_is_rewritten(small, single, rendered(small, single))
    finally:
        small.chat_template = own


def test_render_checks_what_canonical_conversations_were_checked_for(small: Any) -> None:
    for messages, what in (
        ([], "the conversation has no messages"),
        ([{"role": "user", "content": "u"}], "the conversation has no assistant turn, so there is nothing to train on"),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": " "}],
            "turn 2, the assistant's, is empty",
        ),
    ):
        with pytest.raises(RenderError, match=what):
            render(small, messages)
