"""Examples turned into preference records: messages that TRL tokenizes, neither side longer than max_length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hymba_align.data.convert import conversation, preference
from hymba_align.data.counts import Counts
from hymba_align.data.joining import solved_examples
from hymba_align.data.lengths import shorten_prompt
from hymba_align.data.reading.examples import Conversation, Example, Located, Lost, Preference, QuestionAnswer
from hymba_align.data.reading.json_text import dump_json
from hymba_align.data.reading.row_reader import content_hash
from hymba_align.data.rendering import OverlongError, Rendered, render_conversations, render_prompts
from hymba_align.data.settings import LONGER_REMEDY, Settings, bookkeeping_columns
from hymba_align.errors import DataError, RenderError

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


def preference_features() -> Features:
    """The columns of preference records."""
    from datasets import Features, Value

    from hymba_align.data.reading.schemas import message_feature

    messages = dict.fromkeys(("prompt", "chosen", "rejected"), message_feature())
    return Features({**messages, "tools": Value("string"), **bookkeeping_columns()})


def preference_columns(pair: Preference) -> dict[str, Any]:
    """A pair as a dataset row: lists of messages, and the tools as one JSON string since their objects differ."""
    sides = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    columns: dict[str, Any] = {
        name: [{key: value for key, value in message.items() if key != "train"} for message in messages]
        for name, messages in sides.items()
    }
    return {**columns, "tools": dump_json(list(pair.tools)) if pair.tools else None}


class PairMaker:
    """Makes the preference records of a chunk's examples."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.tokenizer = settings, tokenizer

    def records(self, chosen: Sequence[tuple[Located[Example], bool]], counts: Counts) -> list[dict[str, Any]]:
        """The records of examples, each given with whether it is for validation."""
        pairs: list[tuple[Located[Preference], bool]] = []
        earlier: dict[bool, list[Located[QuestionAnswer]]] = {False: [], True: []}
        for located, validation in chosen:
            try:
                pairs.append((Located(located.place, self._preference(located, earlier[validation])), validation))
            except DataError as error:
                counts.lost.append(Lost.because(located.place, error))
        records = []
        kept: set[str] = set()
        lengths = self._pair_lengths([pair for pair, _ in pairs])
        for (pair, validation), measured in zip(pairs, lengths, strict=True):
            try:
                fitting, (prompt, total) = self._fitting_pair(pair.value, measured, counts, pair.place)
            except DataError as error:
                overlong = isinstance(error, OverlongError)
                counts.lost.append(Lost(pair.place, Lost.because(pair.place, error).reason, overlong))
                continue
            kept.add(pair.place)
            counts.conversations += 1
            counts.for_validation += validation
            if not validation:
                counts.trained_tokens += total - 2 * prompt
                counts.total_tokens += total
            records.append({**preference_columns(fitting), "place": pair.place, "validation": validation})
        counts.rows_kept += len(kept)
        return records

    def _preference(self, located: Located[Example], earlier: list[Located[QuestionAnswer]]) -> Preference:
        """The pair of an example; a question's prompt begins with earlier rows, solved, as many as fit."""
        example = located.value
        if isinstance(example, Preference):
            pair = example
        else:
            assert isinstance(example, QuestionAnswer), "the schema's stages were checked before"
            rng = random.Random(f"{self.settings.seed}:{content_hash(example)}")
            question_format, most = self.settings.source.question_format, self.settings.source.examples_per_conversation
            pair = preference(example, [], rng, question_format)
            if most > 1:
                before = solved_examples(
                    pair, earlier[1 - most :], self._conversation, self.tokenizer, self.settings.max_length
                )
                pair = Preference([*before.messages, *pair.prompt], pair.chosen, pair.rejected)
                earlier.append(Located(located.place, example))
        return pair

    def _pair_lengths(self, pairs: Sequence[Located[Preference]]) -> list[tuple[int, int, int] | DataError]:
        """Tokens of prompt, prompt with chosen, and prompt with rejected; or why they cannot be counted. Two batches."""
        limit = self.settings.max_length
        prompts = render_prompts(
            self.tokenizer, [Conversation(pair.value.prompt, pair.value.tools) for pair in pairs], max_length=limit
        )
        sides = render_conversations(
            self.tokenizer,
            [
                Conversation([*pair.value.prompt, *reply], pair.value.tools)
                for pair in pairs
                for reply in (pair.value.chosen, pair.value.rejected)
            ],
            max_length=limit,
        )
        return [pair_lengths(prompts[place], *sides[2 * place : 2 * place + 2]) for place in range(len(pairs))]

    def _fitting_pair(
        self, pair: Preference, lengths: tuple[int, int, int] | DataError, counts: Counts, place: str
    ) -> tuple[Preference, tuple[int, int]]:
        """The pair as it fits in max_length, the tokens of its prompt, and those of both sides together."""
        if isinstance(lengths, DataError) and not isinstance(lengths, OverlongError):
            raise lengths
        limit = self.settings.max_length
        if not isinstance(lengths, DataError) and max(lengths) <= limit:
            return pair, (lengths[0], lengths[1] + lengths[2])
        if self.settings.over_long != "truncate":
            raise (
                lengths
                if isinstance(lengths, OverlongError)
                else OverlongError(
                    f"longer than max_length={limit}: its longer side has {max(lengths):,} tokens; {LONGER_REMEDY}"
                )
            )
        shorter = shorten_prompt(pair, self._longer_side, limit)
        if shorter is None:
            raise OverlongError(
                f"even its last exchange is longer than max_length={limit}; raise max_length or remove it"
            )
        (measured,) = self._pair_lengths([Located(place, shorter)])
        if isinstance(measured, DataError):
            raise measured
        gone = len(pair.prompt) - len(shorter.prompt)
        counts.cut.append(Lost(place, f"the oldest {gone} turns of the prompt were cut away", overlong=True))
        return shorter, (measured[0], measured[1] + measured[2])

    def _longer_side(self, pair: Preference) -> int:
        (measured,) = self._pair_lengths([Located("", pair)])
        if isinstance(measured, OverlongError):
            return self.settings.max_length + 1
        if isinstance(measured, DataError):
            raise measured
        return max(measured)

    def _conversation(self, group: Sequence[Located[Any]]) -> Conversation:
        return Conversation(conversation([one.value for one in group], self.settings.source.question_format))


def pair_lengths(
    prompt: Rendered | RenderError, chosen: Rendered | RenderError, rejected: Rendered | RenderError
) -> tuple[int, int, int] | DataError:
    """Tokens of the three; or what is wrong with one of them."""
    for rendered in (prompt, chosen, rejected):
        if isinstance(rendered, RenderError):
            return rendered
    assert isinstance(prompt, Rendered)
    assert isinstance(chosen, Rendered)
    assert isinstance(rejected, Rendered)
    length = len(prompt.input_ids)
    if any(side.input_ids[:length] != prompt.input_ids for side in (chosen, rejected)):
        return DataError("the chat template rewrites the prompt when a reply follows; use chat_template: hymba")
    if chosen.input_ids == rejected.input_ids:
        return DataError("chosen equals rejected, so there is nothing to prefer; correct or remove the pair")
    return length, len(chosen.input_ids), len(rejected.input_ids)
