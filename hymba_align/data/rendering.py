"""Conversations rendered by the chat template into token ids, the assistant's turns in them, and a loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from hymba_align.data.hymba_format import HEADER, Written, break_up, format_conversation
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.messages import Message, canonical_messages
from hymba_align.data.reading.tool_calls import Tool
from hymba_align.data.template import backend, has_generation_markers, template_text
from hymba_align.data.time_limit import time_limit
from hymba_align.errors import RenderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"]
# A text this many times longer than the longest piece of the vocabulary allows is not tokenized at all. More than 1,
# because a tokenizer's normalisation may shorten a text.
CERTAINLY_LONGER = 4
TEMPLATE_LIMIT_S = 10.0  # for one conversation, which takes a template of the hub less than a hundredth of a second


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    `assistant_mask` is 1 where the loss counts; `turns` are the assistant's turns as (start, end) in tokens, each with
    its reply or tool calls and the end token (none under a template without generation markers).
    """

    input_ids: list[int]
    assistant_mask: list[int]
    turns: tuple[tuple[int, int], ...] = ()


class OverlongError(RenderError):
    """A text so long that its tokens need not be counted to know that they are too many."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Token ids and loss mask of a conversation, or of a prompt that the assistant is about to answer.

    A conversation and its prefix with a generation prompt agree token for token. The mask is all 0 under a template
    without generation markers, such as the released one.
    Raises: RenderError for a conversation that cannot be trained on or that the template cannot hold.
    """
    conversation = Conversation(canonical_messages(messages), list(tools or []))
    check_turns(conversation.messages, add_generation_prompt=add_generation_prompt)
    (rendered,) = _render_batch(tokenizer, [conversation], "assistant", None, add_generation_prompt)
    if isinstance(rendered, RenderError):
        raise rendered
    return rendered


def render_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> list[Rendered | RenderError]:
    """Each conversation rendered, or why it cannot be; all are tokenized in one batch.

    Args:
        conversations: with messages in canonical form.
        loss_on: which tokens the mask marks: the assistant's turns, the last of them, or all tokens. A turn with
            `train: False` is never marked.
        max_length: tokens; a text that is certainly many times longer is an `OverlongError` and not tokenized.
    """
    return _render_batch(tokenizer, conversations, loss_on, max_length, False)


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Conversation], *, max_length: int | None = None
) -> list[Rendered | RenderError]:
    """Each conversation rendered as far as the assistant's next turn, or why it cannot be; one batch."""
    return _render_batch(tokenizer, prompts, "assistant", max_length, True)


def render_text(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int | None = None) -> Rendered:
    """A text without roles, as the base model saw texts: the tokenizer's own beginning, the text, the end token.

    Every token is marked. Control tokens and turn headers in the text are broken up by a word joiner, as in the template.
    Raises: OverlongError.
    """
    if max_length is not None and len(text) > longest_text(tokenizer, max_length):
        raise _overlong(text, max_length)
    text = break_up(text, [HEADER, *tokenizer.all_special_tokens])
    ids: list[int] = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return Rendered(ids, [1] * len(ids))


def check_turns(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> None:
    """Raises RenderError for turns that nothing can be learned from, or that the format has no place for."""
    replies = 0
    for turn, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            replies += 1
            if not message["content"].strip() and not message.get("tool_calls"):
                raise RenderError(f"turn {turn}, the assistant's, is empty; give it content or tool_calls")
        elif message["role"] == "system" and any(earlier["role"] != "system" for earlier in messages[: turn - 1]):
            raise RenderError(f"turn {turn} is a system message after other turns; move it to the start")
    if not messages:
        raise RenderError("the conversation has no messages")
    if not replies and not add_generation_prompt:
        raise RenderError("the conversation has no assistant turn, so there is nothing to train on")


def _render_batch(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    loss_on: LossOn,
    max_length: int | None,
    add_generation_prompt: bool,
) -> list[Rendered | RenderError]:
    longest = longest_text(tokenizer, max_length) if max_length is not None else None
    marked = has_generation_markers(tokenizer)
    own = tokenizer.chat_template == template_text()
    write = format_conversation if own else partial(_render_text, marked=marked)
    results: list[Rendered | RenderError | None] = []
    written: list[Written] = []
    for conversation in conversations:
        try:
            one = write(tokenizer, conversation, add_generation_prompt=add_generation_prompt)
            if longest is not None and max_length is not None and len(one.text) > longest:
                raise _overlong(one.text, max_length)
        except RenderError as error:
            results.append(error)
        else:
            results.append(None)
            written.append(one)
    encodings = iter(zip(_encode(tokenizer, [one.text for one in written]), written, strict=True))
    control = set(tokenizer.all_special_ids) if marked else set()
    for place, conversation in enumerate(conversations):
        if results[place] is None:
            encoding, one = next(encodings)
            try:
                results[place] = _masked(tokenizer, conversation, encoding, one, control, loss_on)
            except RenderError as error:
                results[place] = error
    return [result for result in results if result is not None]


def _render_text(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, add_generation_prompt: bool, marked: bool
) -> Written:
    """The conversation as the template writes it, in transformers' sandbox: a template is code of whoever made it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        with time_limit(TEMPLATE_LIMIT_S):
            rendered: Any = render_jinja_template(
                conversations=[list(conversation.messages)],
                tools=list(conversation.tools) or None,
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
    except TemplateError as error:  # what a template says by raise_exception, what the sandbox forbids, and its syntax
        raise RenderError(f"the chat template refuses the conversation: {error}") from error
    except TimeoutError as error:
        raise RenderError(
            f"the chat template takes more than {TEMPLATE_LIMIT_S:g} s for a conversation; use 'hymba'"
        ) from error
    except Exception as error:  # a template's expressions raise what Python's raise
        raise RenderError(
            f"the chat template fails on the conversation ({type(error).__name__}: {error}); correct it, or use 'hymba'"
        ) from error
    texts, spans = rendered
    others = [message for message in conversation.messages if message["role"] != "assistant"]
    known = all(message.get("train", True) for message in others)
    return Written(texts[0], [(start, end) for start, end in (spans[0] if spans else [])], [] if known else None)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterable[Any]:
    """The Rust tokenizer's encodings, which hold offsets that nobody need convert; as `tokenizer(texts)` has the ids."""
    encodings: Iterable[Any] = backend(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return encodings


def _masked(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    encoding: Any,
    written: Written,
    control: set[int],
    loss_on: LossOn,
) -> Rendered:
    ids: list[int] = encoding.ids
    turns = tuple(_in_tokens(encoding, written.turns))
    if control:
        _check_control_tokens(tokenizer, ids, control, {end - 1 for _, end in turns})
    marked = [message.get("train", True) for message in conversation.messages if message["role"] == "assistant"]
    if turns and len(turns) != len(marked):
        raise RenderError(
            f"the chat template marks {len(turns)} assistant turns where the conversation has {len(marked)}; use 'hymba'"
        )
    mask = [int(loss_on == "all")] * len(ids)
    last = len(turns) - 1
    for number, (start, end) in enumerate(turns):
        counts = marked[number] and (loss_on != "last" or number == last)
        mask[start:end] = [int(counts)] * (end - start)
    if loss_on == "all" and written.unmarked is None:
        raise RenderError(
            "a turn with train: false is not the assistant's, and this chat template does not say where it is; use 'hymba'"
        )
    for start, end in _in_tokens(encoding, written.unmarked or []):
        mask[start:end] = [0] * (end - start)
    return Rendered(ids, mask, turns)


def _in_tokens(encoding: Any, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans of characters as spans of tokens."""
    return ((encoding.char_to_token(start), encoding.char_to_token(end - 1) + 1) for start, end in spans)


def _check_control_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], control: set[int], allowed: set[int]
) -> None:
    """Control tokens may end assistant turns and be nowhere else; the template sees to it for the named ones."""
    for token in control.intersection(ids):
        if ids.count(token) != sum(ids[place] == token for place in allowed):
            place = next(place for place, other in enumerate(ids) if other == token and place not in allowed)
            name = tokenizer.convert_ids_to_tokens(token)
            raise RenderError(f"token {place} of the rendered conversation is the control token {name!r}; remove it")


def longest_text(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Characters above which a text has more than `max_length` tokens whatever they are."""
    return CERTAINLY_LONGER * max_length * _longest_piece(tokenizer)


_longest_pieces: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def _longest_piece(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the vocabulary's longest piece, looked up once per tokenizer."""
    if tokenizer not in _longest_pieces:
        _longest_pieces[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _longest_pieces[tokenizer]


def _overlong(text: str, max_length: int) -> OverlongError:
    return OverlongError(f"longer than max_length={max_length}: it has {len(text):,} characters")


def prefix_is_rewritten(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, rendered: Rendered) -> bool:
    """Whether the template writes a turn otherwise once later turns are there.

    Then an assistant's turn is trained after other tokens than those that it is generated after, or is itself another one.
    """
    ends = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    prompts = [Conversation(conversation.messages[:place], conversation.tools) for place in ends]
    replied = [Conversation(conversation.messages[: place + 1], conversation.tools) for place in ends]
    prefixes = [*render_prompts(tokenizer, prompts), *render_conversations(tokenizer, replied)]
    return any(
        isinstance(prefix, RenderError) or rendered.input_ids[: len(prefix.input_ids)] != prefix.input_ids
        for prefix in prefixes
    )
