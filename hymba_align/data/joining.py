"""Questions and answers that share a conversation: as many as fit, found by rendering few candidates.

Lengths of turns add up exactly under this package's template, where the end token separates turns; under another one the
sum is a guess, which is lowered until the rendering fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from hymba_align.data.reading.examples import Conversation, Located, Preference, QuestionAnswer
from hymba_align.data.rendering import Rendered, render_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Questions = Sequence[Located[QuestionAnswer]]
AsConversation = Callable[[Questions], Conversation]


def join_questions(
    questions: Questions,
    as_conversation: AsConversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    most: int,
) -> list[Questions]:
    """The questions in order, in groups of at most `most` whose conversation fits in `max_length` tokens.

    One that does not fit by itself, or cannot be rendered, is a group of its own.
    """
    lengths = _lengths(tokenizer, [as_conversation([one]) for one in questions], max_length)
    header = _header(as_conversation, tokenizer)
    groups: list[Questions] = []
    start = 0
    while start < len(questions):
        sums = accumulate(length - header for length in lengths[start : start + most])
        count = max(1, sum(header + total <= max_length for total in sums))
        while (
            count > 1 and _length(tokenizer, as_conversation(questions[start : start + count]), max_length) > max_length
        ):
            count -= 1
        groups.append(questions[start : start + count])
        start += count
    return groups


def solved_examples(
    pair: Preference,
    earlier: Questions,
    as_conversation: AsConversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Conversation:
    """The last of the `earlier` questions, as many as fit before both sides of `pair`; possibly none."""
    header = _header(as_conversation, tokenizer)
    sides = [Conversation([*pair.prompt, *reply]) for reply in (pair.chosen, pair.rejected)]
    room = max_length - max(_lengths(tokenizer, sides, max_length))
    lengths = _lengths(tokenizer, [as_conversation([one]) for one in earlier], max_length)
    added = accumulate(length - header for length in reversed(lengths))
    count = sum(total <= room for total in added)
    while count:
        before = as_conversation(earlier[-count:])
        longer = [Conversation([*before.messages, *side.messages]) for side in sides]
        if max(_lengths(tokenizer, longer, max_length)) <= max_length:
            return before
        count -= 1
    return Conversation([])


def _header(as_conversation: AsConversation, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that conversations have once, whatever their turns."""
    one = Located("", QuestionAnswer("1", "1"))
    once, twice = (_length(tokenizer, as_conversation([one] * count), None) for count in (1, 2))
    return 2 * once - twice


def _length(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int | None) -> int:
    return _lengths(tokenizer, [conversation], max_length)[0]


def _lengths(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], max_length: int | None
) -> list[int]:
    """Tokens of each; of one that cannot be rendered, more than would ever fit."""
    rendered = render_conversations(tokenizer, conversations, max_length=max_length)
    return [len(one.input_ids) if isinstance(one, Rendered) else 1 << 62 for one in rendered]
