"""Documents and pairs of answers that a checkpoint is looked at with, from any file that training reads.

The rows are read by the code of `data` and rendered as the stages render them. Which of them are taken follows from what
they say and a seed alone: neither their order in the file nor who reads it changes the choice.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.data.conversations import ConversationMaker
from hymba_align.data.counts import Counts, describe_losses, losses_by_reason
from hymba_align.data.inspection.duplicates import SHINGLE_WORDS, THRESHOLD, content_digest, find_duplicates
from hymba_align.data.pairs import PairMaker
from hymba_align.data.prepare import iterate_examples
from hymba_align.data.reading.examples import (
    Conversation,
    Example,
    Located,
    Lost,
    PlainText,
    Preference,
    QuestionAnswer,
)
from hymba_align.data.reading.raw_rows import not_utf8
from hymba_align.data.reading.row_reader import RowReader, content_hash
from hymba_align.data.reading.sources import open_source
from hymba_align.data.records import ALL_HASHES
from hymba_align.data.rendering import Rendered, render_conversations, render_prompts, render_text
from hymba_align.data.settings import Settings
from hymba_align.data.template import has_generation_markers
from hymba_align.errors import ColumnsError, DataError, DataFileError
from hymba_align.inside.rows import Document
from hymba_align.inspect_choices import is_text_file
from hymba_align.recipe import DataSection, SourceSection, TrainingStage
from hymba_align.secrets import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIES = 4
"""How many times the rows that are wanted are held ready, because some may not fit."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as DPO trains on it."""

    name: str
    """Where it stands: file and line"""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    is_made: bool = False
    """Whether the rejected answer was made from the right one, because the row has none"""


@dataclass(frozen=True)
class Texts:
    """What was read, and what was not and why."""

    source: str
    """The file, folder, data set or several of them"""
    rows: int
    """Examples that the documents were chosen from"""
    documents: tuple[Document, ...]
    pairs: tuple[Pair, ...]
    """Of rows from which DPO makes pairs; none of others"""
    left_out: tuple[Lost, ...] = ()
    """Rows that cannot be read, or were chosen and fit in no document"""
    shortened: tuple[Lost, ...] = ()
    """Documents whose end, and pairs the beginning of whose prompt, was cut away"""
    pairs_left_out: tuple[Lost, ...] = ()
    """Documents of which no pair could be made, though their schema has pairs"""

    def summary(self) -> str:
        """What was read, in one line."""
        parts = [f"{_count(len(self.documents), 'document')} chosen from {_count(self.rows, 'row')} of {self.source}"]
        if self.pairs:
            made = sum(pair.is_made for pair in self.pairs)
            parts.append(
                _count(len(self.pairs), "pair") + (f", {made:,} with a wrong answer made for it" if made else "")
            )
        if self.left_out:
            parts.append(f"{_count(len(self.left_out), 'row')} left out")
        if self.shortened:
            first = self.shortened[0]
            parts.append(f"{len(self.shortened):,} shortened (first {first.place}: {first.reason})")
        parts += [
            f"no pair from {_count(len(lost), 'row')} ({reason}, first {lost[0].place})"
            for reason, lost in losses_by_reason(self.pairs_left_out)
        ]
        return "; ".join(parts)

    def why_left_out(self) -> list[str]:
        """Why rows are left out: each reason with how many there are and the first one's place."""
        return describe_losses(self.left_out)


def read_texts(
    data: str | Path | DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    documents: int,
    max_length: int,
    seed: int,
    held_out: bool = False,
    distinct: bool = False,
) -> Texts:
    """So many documents, and the pairs that DPO would make of their rows.

    Questions with answers and texts are documents as SFT sees them; of preferences the chosen conversation is one, with
    the chosen answer scored. What is longer than `max_length` is cut as `data.over_long: truncate` does, or left out
    where the section says drop.

    Args:
        data: a file, folder, glob or data set of the hub; or a section of a recipe, all of whose keys count. A file
            .txt is one document.
        documents: how many, at least 1; fewer where there are fewer.
        max_length: most tokens of a document, and of a prompt with its answer.
        seed: chooses the rows, and makes wrong answers as a recipe's seed does.
        held_out: only the rows that the section's `validation_fraction` keeps from training.
        distinct: of rows that say the same or nearly the same, as `data check` tells them, one counts and the others are
            left out.

    Raises: DataError where nothing can be read, or nothing of it can be used; it begins with the first row's place.
    """
    section = data if isinstance(data, DataSection) else DataSection(path=str(data))
    if is_text_file(section.path):
        file = Path(section.path).expanduser()
        document, cut = document_of_text(text_of_file(file), section.path, tokenizer, max_length=max_length)
        return Texts(section.path, 1, (document,), (), shortened=(cut,) if cut is not None else ())
    read = _Reading(section, seed=section.seed if section.seed is not None else seed, held_out=held_out)
    wanted = documents * max(source.examples_per_conversation for source in section.all_sources)
    waiting = read.chosen(TRIES * wanted, distinct=distinct)
    repeated: list[Lost] = []
    if distinct:
        waiting, repeated = _each_once(waiting)
    maker = _Maker(section, tokenizer, max_length, read.seed)
    while waiting and len(maker.documents) < documents:
        missing = wanted - wanted * len(maker.documents) // documents
        maker.take(waiting[:missing], documents)
        waiting = waiting[missing:]
    texts = Texts(
        read.name,
        read.rows,
        tuple(maker.documents[:documents]),
        tuple(maker.pairs[:documents]),
        (*read.lost, *repeated, *maker.counts.lost),
        (*maker.counts.cut, *maker.pair_counts.cut),
        tuple(maker.pair_counts.lost),
    )
    if not texts.documents:
        raise DataError(_no_document(texts, section, held_out))
    return texts


def document_of_text(
    text: str, name: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[Document, Lost | None]:
    """A plain text as a document, with the tokenizer's own beginning and the end token; and what was cut away, if any.

    All of it is scored. Of a text with more than `max_length` tokens the beginning is the document.

    Raises: DataError for a text without a word.
    """
    if not text.strip():
        raise DataError(f"{name}: the text is empty; write something into it")
    ids = render_text(tokenizer, text).input_ids
    cut = Lost(name, f"its first {max_length:,} of {len(ids):,} tokens are read") if len(ids) > max_length else None
    kept = tuple(ids[:max_length])
    return Document(name, kept, (True,) * len(kept)), cut


def text_of_file(path: Path) -> str:
    """What a text file holds. Raises: DataFileError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: {not_utf8(error)}") from error
    except OSError as error:
        raise DataFileError(f"{path}: it cannot be read ({error.strerror or error}); name a file that can") from error
    if not text.strip():
        raise DataFileError(f"{path}: it holds no text; name a file that does")
    return text


def rows_fit(section: DataSection) -> bool:
    """Whether the rows of every source are of a kind that its keys are for, by its first row that can be read."""
    try:
        for source in section.all_sources:
            next(_examples(source), None)
    except DataError:
        return False
    return True


def _no_document(texts: Texts, section: DataSection, held_out: bool) -> str:
    """Why nothing of the rows can be looked at, and what to do."""
    if texts.left_out:
        first, more = texts.left_out[0], len(texts.left_out) - 1
        lists = "; 'hymba-align data check' lists why" if not all(one.overlong for one in texts.left_out) else ""
        others = (
            f" ({_count(more, 'more row')} of {texts.source} give{'s' if more == 1 else ''} no document either{lists})"
        )
        return f"{first.place}: {first.reason}{others if more else ''}"
    assert held_out, "a source without rows, and one without a row that can be read, were refused before"
    return (
        f"{texts.source}: no row gives a document to look at: data.validation_fraction is "
        f"{section.validation_fraction:g}, which keeps none for validation; raise it, or name a file of texts that were "
        "not trained on"
    )


@dataclass(frozen=True, order=True)
class _Chosen:
    """An example with its place in the choice."""

    hash: int
    source: int
    number: int
    """Place among the source's examples"""
    located: Located[Example] = field(compare=False)


def _each_once(chosen: Sequence[_Chosen]) -> tuple[list[_Chosen], list[Lost]]:
    """Of examples that say the same or nearly the same the first one, in the order given; and the others."""
    found = find_duplicates(lambda: [one.located for one in chosen])
    same = {place for group in found.exact for place in group.others}
    nearly = {place for group in found.near for place in group.others} - same
    alike = f"at least {100 * THRESHOLD:.0f} % of their runs of {SHINGLE_WORDS} words are the same"
    lost = [
        Lost(
            place,
            "it says the same as another row" if place in same else f"it says nearly the same as another row: {alike}",
        )
        for place in (one.located.place for one in chosen)
        if place in same | nearly
    ]
    return [one for one in chosen if one.located.place not in same | nearly], lost


class _Reading:
    """The examples of a section, and what became of its rows."""

    def __init__(self, section: DataSection, *, seed: int, held_out: bool) -> None:
        self.section, self.seed, self.held_out = section, seed, held_out
        self.name = ", ".join(shown(source.path) for source in section.all_sources)
        self.rows = 0
        self.lost: list[Lost] = []

    def chosen(self, most: int, *, distinct: bool = False) -> list[_Chosen]:
        """At most so many of the examples, in an order that follows from what they say and the seed.

        Args:
            distinct: of those that say the same, the first alone.
        """
        return heapq.nsmallest(most, self._first_of_each() if distinct else self._all())

    def _first_of_each(self) -> Iterator[_Chosen]:
        known: set[bytes] = set()
        for one in self._all():
            digest = content_digest(one.located.value)
            if digest in known:
                self.lost.append(Lost(one.located.place, "it says the same as another row"))
                continue
            known.add(digest)
            yield one

    def _all(self) -> Iterator[_Chosen]:
        for place, source in enumerate(self.section.all_sources):
            for number, row in enumerate(_examples(source)):
                if isinstance(row, Lost):
                    self.lost.append(row)
                elif self._counts(row.value, source):
                    self.rows += 1
                    yield _Chosen(content_hash(row.value, salt=f"inspect:{self.seed}:"), place, number, row)

    def _counts(self, example: Example, source: SourceSection) -> bool:
        """Whether the stage would have the example, on the side that is asked for; as `data/records.py` decides."""
        if (
            source.keep_fraction < 1
            and content_hash(example, salt=f"{self.seed}:") >= source.keep_fraction * ALL_HASHES
        ):
            return False
        return not self.held_out or content_hash(example) < self.section.validation_fraction * ALL_HASHES


def _examples(source: SourceSection) -> Iterator[Located[Example] | Lost]:
    """Every row of a source as an example, whichever stage trains on such rows; or why it is none."""
    if source.convert is not None:  # its rows may be of any schema, and each is told by itself
        reader = RowReader(source, None)
        for chunk in open_source(source).chunks():
            counts = Counts()
            yield from reader.read(chunk, counts)
            yield from counts.lost
        return
    one = DataSection(sources=(source,))
    try:
        yield from iterate_examples(one, "sft")
    except ColumnsError as error:  # raised for the first row that can be read, before any is given out
        try:
            yield from iterate_examples(one, "dpo")
        except ColumnsError:  # which would ask for preferences
            raise error from None


class _Maker:
    """Documents and pairs made of examples, as the stages make them."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> None:
        self.section, self.tokenizer, self.max_length, self.seed = section, tokenizer, max_length, seed
        self.documents: list[Document] = []
        self.pairs: list[Pair] = []
        self.counts, self.pair_counts = Counts(), Counts()

    def take(self, chosen: Sequence[_Chosen], most_pairs: int) -> None:
        """Adds the documents of examples, and their pairs until there are so many.

        Raises: DataError for a chat template that does not say what the assistant writes, unless all are plain texts.
        """
        plain = all(isinstance(one.located.value, PlainText) for one in chosen)
        if not plain and not has_generation_markers(self.tokenizer):
            raise DataError(
                "the chat template does not mark what the assistant writes ({% generation %}), so nothing would be "
                "scored; use chat_template: hymba"
            )
        sources = self.section.all_sources
        for place, group in groupby(sorted(chosen, key=lambda one: one.source), key=lambda one: one.source):
            rows = [one.located for one in group]
            self._add_documents(sources[place], rows)
            self._add_pairs(sources[place], rows[: max(0, most_pairs - len(self.pairs))])

    def _settings(self, source: SourceSection, stage: TrainingStage) -> Settings:
        how: str = self.section.over_long
        return Settings(
            source,
            stage,
            self.section.loss_on,
            "drop" if how == "drop" else "truncate",
            0.0,
            self.max_length,
            self.seed,
        )

    def _add_documents(self, source: SourceSection, rows: Sequence[Located[Example]]) -> None:
        maker = ConversationMaker(self._settings(source, "sft"), self.tokenizer)
        shown_to_sft = [(Located(row.place, _as_conversation(row.value)), False) for row in rows]
        for record in maker.records(shown_to_sft, self.counts):
            scored = tuple(bool(flag) for flag in record["assistant_masks"])
            self.documents.append(Document(record["place"], tuple(record["input_ids"]), scored))

    def _add_pairs(self, source: SourceSection, rows: Sequence[Located[Example]]) -> None:
        maker = PairMaker(self._settings(source, "dpo"), self.tokenizer)
        paired = [(row, False) for row in rows if isinstance(row.value, (Preference, QuestionAnswer))]
        made = {
            row.place for row, _ in paired if isinstance(row.value, QuestionAnswer) and row.value.wrong_answer is None
        }
        for record in maker.records(paired, self.pair_counts):
            tools = json.loads(record["tools"]) if record["tools"] else ()
            pair = Preference(record["prompt"], record["chosen"], record["rejected"], tools)
            read = tokenized_pair(pair, record["place"], self.tokenizer)
            self.pairs.append(replace(read, is_made=record["place"] in made))


def _as_conversation(example: Example) -> Example:
    """What SFT would read of an example: of a preference the chosen conversation, with the chosen answer scored."""
    if not isinstance(example, Preference):
        return example
    prompt = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in example.prompt]
    return Conversation([*prompt, *example.chosen], example.tools)


def tokenized_pair(pair: Preference, name: str, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """The tokens of a pair that fits, whose prompt the template writes alike before both answers."""
    (prompt,) = render_prompts(tokenizer, [Conversation(pair.prompt, pair.tools)])
    sides = render_conversations(
        tokenizer, [Conversation([*pair.prompt, *reply], pair.tools) for reply in (pair.chosen, pair.rejected)]
    )
    chosen, rejected = sides
    assert isinstance(prompt, Rendered), "it was rendered to be counted"
    assert isinstance(chosen, Rendered)
    assert isinstance(rejected, Rendered)
    start = len(prompt.input_ids)
    return Pair(name, tuple(prompt.input_ids), tuple(chosen.input_ids[start:]), tuple(rejected.input_ids[start:]))


def _count(number: int, of: str) -> str:
    """ "1 row" or "4,800 rows"."""
    return f"{number:,} {of}" if number == 1 else f"{number:,} {of}s"
