"""Examples turned into SFT records: token ids and a loss mask, none longer than max_length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from hymba_align.data.convert import conversation
from hymba_align.data.counts import Counts
from hymba_align.data.joining import join_questions
from hymba_align.data.lengths import shorten
from hymba_align.data.reading.examples import (
    Conversation,
    Example,
    Located,
    Lost,
    PlainText,
    Preference,
    QuestionAnswer,
)
from hymba_align.data.rendering import OverlongError, Rendered, longest_text, render_conversations, render_text
from hymba_align.data.settings import Settings, bookkeeping_columns, too_long
from hymba_align.errors import RenderError

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


def sft_features() -> Features:
    """The columns of SFT records."""
    from datasets import Features, List, Value

    tokens = {"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8"))}
    return Features({**tokens, **bookkeeping_columns()})


@dataclass(frozen=True)
class Unit:
    """What becomes one record, unless it is cut; several rows of question and answer may share one."""

    places: tuple[str, ...]
    validation: bool
    example: Conversation | PlainText

    @property
    def place(self) -> str:
        """Where its first row stands."""
        return self.places[0]


class ConversationMaker:
    """Makes the SFT records of a chunk's examples."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.tokenizer = settings, tokenizer

    def records(self, chosen: Sequence[tuple[Located[Example], bool]], counts: Counts) -> list[dict[str, Any]]:
        """The records of examples, each given with whether it is for validation."""
        units = self._units(chosen, counts)
        renderings = self._render(units)
        records = []
        kept: set[str] = set()
        for unit, rendered in zip(units, renderings, strict=True):
            if isinstance(rendered, RenderError) and not isinstance(rendered, OverlongError):
                counts.lost.append(Lost.because(unit.place, rendered))
                continue
            fitting = self._fitting(unit, rendered, counts)
            kept.update(unit.places if fitting else ())
            records += [self._record(unit, one, counts) for one in fitting]
        counts.rows_kept += len(kept)
        return records

    def _units(self, chosen: Sequence[tuple[Located[Example], bool]], counts: Counts) -> list[Unit]:
        """Conversations and texts, those for validation last; runs of questions and answers are joined."""
        most = self.settings.source.examples_per_conversation
        units: list[Unit] = []
        by_side = sorted(chosen, key=lambda pair: pair[1])
        for (side, joinable), run in groupby(
            by_side, lambda pair: (pair[1], isinstance(pair[0].value, QuestionAnswer))
        ):
            located: list[Located[Any]] = [one for one, _ in run]
            if joinable and most > 1:
                for group in join_questions(
                    located, self._conversation, self.tokenizer, self.settings.max_length, most
                ):
                    units.append(Unit(tuple(one.place for one in group), side, self._conversation(group)))
            else:
                units += [Unit((one.place,), side, self._alone(one)) for one in located]
        return units

    def _conversation(self, group: Sequence[Located[Any]]) -> Conversation:
        return Conversation(conversation([one.value for one in group], self.settings.source.question_format))

    def _alone(self, located: Located[Example]) -> Conversation | PlainText:
        example = located.value
        assert not isinstance(example, Preference), "the schema's stages were checked before"
        return self._conversation([located]) if isinstance(example, QuestionAnswer) else example

    def _render(self, units: Sequence[Unit]) -> list[Rendered | RenderError]:
        """Every unit rendered; the conversations among them in one batch."""
        limit = self.settings.max_length
        conversations = [unit.example for unit in units if isinstance(unit.example, Conversation)]
        rendered = iter(
            render_conversations(self.tokenizer, conversations, loss_on=self.settings.loss_on, max_length=limit)
        )
        return [
            next(rendered) if isinstance(unit.example, Conversation) else self._text(unit.example) for unit in units
        ]

    def _text(self, example: PlainText) -> Rendered | RenderError:
        limit, how = self.settings.max_length, self.settings.over_long
        text = example.text[: longest_text(self.tokenizer, limit)] if how == "truncate" else example.text
        try:
            return render_text(self.tokenizer, text, max_length=limit if how == "drop" else None)
        except OverlongError as error:
            return error

    def _fitting(self, unit: Unit, rendered: Rendered | RenderError, counts: Counts) -> list[Rendered]:
        """What of a unit fits in max_length and has something to train on, by the user's choice for what is longer."""
        limit, how = self.settings.max_length, self.settings.over_long
        if isinstance(rendered, Rendered) and len(rendered.input_ids) <= limit:
            pieces = [rendered]
        elif how == "drop":
            counts.lost.append(Lost(unit.place, too_long(rendered, limit), overlong=True))
            return []
        elif isinstance(unit.example, PlainText):
            assert isinstance(rendered, Rendered), "a text that is to be cut is tokenized whole"
            pieces, cut = cut_text(rendered, limit, how)
            if cut is not None:
                counts.cut.append(Lost(unit.place, cut, overlong=True))
        else:
            pieces, why = self._shortened(unit.example, how)
            if why is not None:
                (counts.cut if pieces else counts.lost).append(Lost(unit.place, why, overlong=True))
        trained = [piece for piece in pieces if any(piece.assistant_mask)]
        if pieces and not trained:
            counts.lost.append(Lost(unit.place, "no token of it is trained on; mark a turn 'train: true' or remove it"))
        elif len(trained) < len(pieces):
            untrained = f"{len(pieces) - len(trained)} of its {len(pieces)} parts have no token to train on"
            counts.cut.append(Lost(unit.place, untrained, overlong=True))
        return trained

    def _shortened(self, whole: Conversation, how: Literal["truncate", "split"]) -> tuple[list[Rendered], str | None]:
        if self.settings.loss_on == "last":
            whole = _only_last_trained(whole)  # which a part of it would take its own last turn for
        pieces, why = shorten(whole, self._length, self.settings.max_length, how)
        rendered = render_conversations(self.tokenizer, pieces, loss_on=self.settings.loss_on)
        assert all(isinstance(one, Rendered) for one in rendered), "parts of a conversation that was rendered"
        return [one for one in rendered if isinstance(one, Rendered)], why

    def _length(self, whole: Conversation) -> int:
        """Tokens of a conversation; a lower bound above max_length where counting would take long."""
        (rendered,) = render_conversations(self.tokenizer, [whole], max_length=self.settings.max_length)
        if isinstance(rendered, OverlongError):
            return self.settings.max_length + 1
        if isinstance(rendered, RenderError):
            raise rendered
        return len(rendered.input_ids)

    def _record(self, unit: Unit, rendered: Rendered, counts: Counts) -> dict[str, Any]:
        counts.conversations += 1
        counts.for_validation += unit.validation
        if not unit.validation:
            counts.trained_tokens += sum(rendered.assistant_mask)
            counts.total_tokens += len(rendered.input_ids)
        return {
            "input_ids": rendered.input_ids,
            "assistant_masks": rendered.assistant_mask,
            "place": unit.place,
            "validation": unit.validation,
        }


def _only_last_trained(whole: Conversation) -> Conversation:
    """The conversation with every assistant's turn but the last marked `train: False`."""
    last = max(turn for turn, message in enumerate(whole.messages) if message["role"] == "assistant")
    messages = [
        {**message, "train": False} if message["role"] == "assistant" and turn != last else message
        for turn, message in enumerate(whole.messages)
    ]
    return replace(whole, messages=messages)


def cut_text(
    rendered: Rendered, max_length: int, how: Literal["truncate", "split"]
) -> tuple[list[Rendered], str | None]:
    """A plain text's tokens in pieces of at most `max_length`, and what was cut away in words."""
    ids, mask = rendered.input_ids, rendered.assistant_mask
    starts = range(0, len(ids), max_length)
    pieces = [Rendered(ids[start : start + max_length], mask[start : start + max_length]) for start in starts]
    if how == "split":
        return pieces, None
    return pieces[:1], f"all but the first {max_length:,} tokens of the text were cut away"
