"""A stage's data looked at before training: what is there, what would be lost, what is there twice, what is a test's.

Two readings come together. `prepare_sft` or `prepare_preferences`, told to let rows go, says exactly which rows training
would lose and what it would cut. A second reading, row by row, measures what is not kept there: lengths before cutting,
turns, duplicates, overlap with test sets, and conversations that a foreign template rewrites as they grow. It sees all
rows, also those that `keep_fraction` leaves out.

A streamed set is prepared like any other, which keeps it on the disk: give a section of its beginning, as the command line
does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from hymba_align.data.convert import conversation
from hymba_align.data.counts import SourceCounts
from hymba_align.data.inspection.contamination import Benchmark, NotCompared, describe, example_runs
from hymba_align.data.inspection.duplicates import SHINGLE_WORDS, DuplicateFinder, Duplicates
from hymba_align.data.inspection.findings import (
    KINDS,
    PERCENTILES,
    CheckReport,
    Compared,
    Finding,
    Kind,
    Lengths,
    SourceReport,
)
from hymba_align.data.inspection.turns import turn_findings
from hymba_align.data.prepare import Prepared, examine, iterate_examples, prepare_preferences, prepare_sft
from hymba_align.data.reading.examples import (
    Conversation,
    Example,
    Located,
    Lost,
    PlainText,
    Preference,
    QuestionAnswer,
)
from hymba_align.data.reading.sources import files_passed_over, open_source, parse_row
from hymba_align.data.rendering import (
    OverlongError,
    Rendered,
    prefix_is_rewritten,
    render_conversations,
    render_text,
)
from hymba_align.data.settings import too_long
from hymba_align.data.template import has_generation_markers, template_text
from hymba_align.errors import DataError, RenderError
from hymba_align.recipe import DataSection, SourceSection, TrainingStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 500  # rows that are rendered together
ROLE_ORDER = ("system", "user", "assistant", "tool")


def check_data(
    section: DataSection,
    stage: TrainingStage,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    seed: int,
    benchmarks: Sequence[Benchmark | NotCompared] = (),
) -> CheckReport:
    """Everything that is worth knowing about a stage's data; nothing in the data makes it raise.

    Args:
        benchmarks: test sets to compare with, as `contamination.find_benchmarks` gives them.
    """
    reader = _Reader(stage, tokenizer, max_length, [one for one in benchmarks if isinstance(one, Benchmark)])
    seen = [reader.read(source) for source in section.all_sources]
    usable = [one for one in seen if not one.unusable]
    lenient = _lenient(section, [one.source for one in usable])
    prepared, failure = _prepare(lenient, stage, tokenizer, max_length, seed)
    findings = [*(finding for one in seen for finding in one.unusable), *([failure] if failure is not None else [])]
    counts = _counts(lenient, stage, tokenizer, max_length, seed) if prepared is None else prepared.sources
    losses, cuts = ([one for source in counts for one in getattr(source, kind)] for kind in ("lost", "cut"))
    findings += [Finding.of_loss(lost) for lost in losses]
    findings += _over_long(cuts, reader.over_long, losses)
    duplicates = reader.duplicates.find(lambda: _examples(section.all_sources, stage))
    findings += _twice(duplicates)
    findings += reader.findings
    return CheckReport(
        stage,
        max_length,
        section.bad_rows,
        section.over_long,
        _source_reports(seen, prepared),
        reader.lengths(),
        _in_order(findings, seen),
        tuple(Compared(one.name, one.items, one.too_short) for one in reader.benchmarks),
        tuple(one for one in benchmarks if isinstance(one, NotCompared)),
        len(prepared.validation) if prepared is not None and prepared.validation is not None else 0,
        duplicates.short,
    )


TWICE = "remove one of them, unless it is to count twice"
WHOLE = "raise max_length to keep it whole"


def _twice(duplicates: Duplicates) -> Iterator[Finding]:
    for group in duplicates.exact:
        for place in group.others:
            yield Finding("exact duplicate", place, f"it says the same as {group.first}", TWICE, False)
    for group in duplicates.near:
        for place, similarity in zip(group.others, group.similarities, strict=True):
            alike = f"it and {group.first} share {int(100 * similarity)} % of their runs of {SHINGLE_WORDS} words"
            yield Finding("near duplicate", place, alike, TWICE, False)


def _in_order(findings: Sequence[Finding], seen: Sequence[_Seen]) -> tuple[Finding, ...]:
    """By kind, then as the rows are read."""
    order = {place: number for number, place in enumerate(chain.from_iterable(one.places for one in seen))}
    return tuple(sorted(findings, key=lambda one: (KINDS.index(one.kind), order.get(one.place, -1))))


def _lenient(section: DataSection, sources: Sequence[SourceSection]) -> DataSection | None:
    """The usable sources in a section that lets every bad row go and reads all of them; None without any."""
    if not sources:
        return None
    lenient = {
        "sources": tuple(sources),
        "bad_rows": "drop",
        "over_long": "drop" if section.over_long == "refuse" else section.over_long,
        "streaming": False,
        "validation_fraction": 0.0 if section.streaming else section.validation_fraction,
    }
    settings = section.model_dump(exclude=set(SourceSection.model_fields))
    return DataSection.model_validate({**settings, **lenient})


def _prepare(
    lenient: DataSection | None, stage: TrainingStage, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> tuple[Prepared | None, Finding | None]:
    """The data as training would have it, if it let every bad row go; or why nothing can be prepared."""
    if lenient is None:
        return None, None
    prepare = prepare_sft if stage == "sft" else prepare_preferences
    try:
        return prepare(lenient, tokenizer, max_length, seed=seed), None
    except DataError as error:
        return None, _unusable("cannot be prepared", lenient.sources[0].path, error)


def _counts(
    lenient: DataSection | None, stage: TrainingStage, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> Sequence[SourceCounts]:
    """What became of rows of which nothing is left, or nothing can be trained on."""
    if lenient is None or (stage == "sft" and not has_generation_markers(tokenizer)):
        return ()
    return [counted for _, counted in examine(lenient, tokenizer, max_length, stage, seed=seed)]


def _unusable(kind: Kind, name: str, error: DataError) -> Finding:
    """Something that cannot be used at all; the error says where, if it knows."""
    place, separator, what = str(error).partition(": ")
    if not separator or " " in place.replace(name, ""):
        place, what = name, str(error).removeprefix(f"{name}: ")
    message, separator, fix = what.rpartition("; ")
    return Finding(kind, place, message or what, fix if separator else "correct the source", True)


def _examples(sources: Sequence[SourceSection], stage: TrainingStage) -> Iterator[Located[Example]]:
    """The examples of all sources in order, of each as far as it can be read."""
    for source in sources:
        with suppress(DataError):  # the first reading reports it
            rows = iterate_examples(DataSection(sources=(source,)), stage)
            yield from (row for row in rows if isinstance(row, Located))


def _over_long(cuts: Sequence[Lost], measured: Sequence[Lost], losses: Sequence[Lost]) -> Iterator[Finding]:
    """Rows that are longer than max_length and not lost, each once, with what becomes of it."""
    for cut in cuts:
        yield Finding("over-long", cut.place, cut.reason, WHOLE, False)
    told = Counter(one.place for one in (*cuts, *losses))  # several rows may stand on one line
    for one in measured:
        if told[one.place]:
            told[one.place] -= 1
            continue
        what = one.reason.rpartition("; ")[0]
        yield Finding("over-long", one.place, f"{what}, so it is cut into parts that fit", WHOLE, False)


def _source_reports(seen: Sequence[_Seen], prepared: Prepared | None) -> tuple[SourceReport, ...]:
    counted = iter(prepared.sources if prepared is not None else ())
    reports = []
    for one in seen:
        turns = {role: one.turns[role] for role in ROLE_ORDER if one.turns[role]}
        source = None if one.unusable else next(counted, None)
        if source is None:
            unprepared = SourceReport(one.source.path, "", one.rows, 0, 0, turns, 0, 0, one.source.repeat)
            reports.append(replace(unprepared, passed_over=one.passed_over))
            continue
        reports.append(
            SourceReport(
                source.name,
                source.schema,
                source.rows_read,
                source.rows_kept,
                source.conversations,
                turns,
                source.trained_tokens,
                source.total_tokens,
                source.repeat,
                source.rows_not_chosen,
                source.rows_passed_over,
                source.ignored_columns,
                source.unread_keys,
                one.passed_over,
            )
        )
    return tuple(reports)


# ---- row by row ------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What reading one source's rows showed."""

    source: SourceSection
    rows: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    places: dict[str, None] = field(default_factory=dict)  # of its rows, in order
    unusable: list[Finding] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()  # files


class _Reader:
    """Reads sources row by row and keeps what all rows together show."""

    def __init__(
        self,
        stage: TrainingStage,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        benchmarks: Sequence[Benchmark],
    ) -> None:
        self.stage, self.tokenizer, self.max_length, self.benchmarks = stage, tokenizer, max_length, benchmarks
        self.duplicates = DuplicateFinder()
        self.findings: list[Finding] = []
        self.over_long: list[Lost] = []
        self._lengths: list[int] = []
        self._uncounted = 0
        # A test proves that this package's own template never rewrites a prefix.
        self._may_rewrite = tokenizer.chat_template != template_text()

    def read(self, source: SourceSection) -> _Seen:
        """Reads a source to its end, or to where it cannot be read any further."""
        seen = _Seen(source)
        batch: list[Located[Example] | Lost] = []
        try:
            seen.passed_over = files_passed_over(source)
            for row in iterate_examples(DataSection(sources=(source,)), self.stage):
                batch.append(row)
                if len(batch) == BATCH:
                    self._look_at(batch, seen)
                    batch = []
            self._look_at(batch, seen)
        except DataError as error:
            self._look_at(batch, seen)
            malformed = [] if seen.places else _malformed_rows(source)
            seen.rows += len(malformed)
            seen.places.update(dict.fromkeys(lost.place for lost in malformed))
            whole = (
                Finding("unusable source", source.path, "none of its rows can be read", "correct them", True)
                if malformed
                else _unusable("unusable source", source.path, error)
            )
            seen.unusable = [whole, *map(Finding.of_loss, malformed)]
        return seen

    def lengths(self) -> Lengths | None:
        """The percentiles of all rows' lengths; None where no row has any."""
        if not self._lengths and not self._uncounted:
            return None
        counted = np.array(self._lengths, dtype=np.int64)
        percents = (*PERCENTILES, 100) if len(counted) else ()
        values = np.percentile(counted, percents, method="inverted_cdf") if percents else ()
        return Lengths({at: int(tokens) for at, tokens in zip(percents, values, strict=True)}, self._uncounted)

    def _look_at(self, batch: Sequence[Located[Example] | Lost], seen: _Seen) -> None:
        seen.rows += len(batch)
        seen.places.update(dict.fromkeys(row.place for row in batch))
        rows = [row for row in batch if isinstance(row, Located)]
        for row in rows:
            seen.turns.update(_roles(row.value))
            self.duplicates.add(row)
            self.findings += turn_findings(row.place, row.value)
            if self.benchmarks:
                self._compare(row)
        self._measure(rows, seen)

    def _compare(self, row: Located[Example]) -> None:
        runs = example_runs(row.value)
        for benchmark in self.benchmarks:
            overlap = benchmark.overlap(runs)
            if overlap is not None:
                fix = f"remove it, or do not report {benchmark.name} scores of what is trained on it"
                self.findings.append(Finding("contamination", row.place, describe(overlap), fix, loses_row=False))

    def _measure(self, rows: Sequence[Located[Example]], seen: _Seen) -> None:
        """Renders the rows, each by itself, for their lengths and for what the template makes of them."""
        sides = [_conversations(row.value, seen.source) for row in rows]
        whole = [one for conversations in sides for one in conversations]
        rendered = iter(render_conversations(self.tokenizer, whole, max_length=self.max_length))
        for row, conversations in zip(rows, sides, strict=True):
            if isinstance(row.value, PlainText):
                results = [self._text(row.value)]
            else:
                results = list(islice(rendered, len(conversations)))
            self._note(row.place, results)
            if self._may_rewrite and self.stage == "sft":
                self._check_prefix(row.place, conversations, results)

    def _text(self, example: PlainText) -> Rendered | RenderError:
        try:
            return render_text(self.tokenizer, example.text, max_length=self.max_length)
        except RenderError as error:
            return error

    def _note(self, place: str, results: Sequence[Rendered | RenderError]) -> None:
        """Keeps how long a row is; what cannot be rendered, the preparation reports."""
        uncounted = [one for one in results if isinstance(one, OverlongError)]
        counted = [one for one in results if isinstance(one, Rendered)]
        if uncounted:
            self._uncounted += 1
            self.over_long.append(Lost(place, too_long(uncounted[0], self.max_length), overlong=True))
        elif len(counted) == len(results):
            longest = max(counted, key=lambda one: len(one.input_ids))
            self._lengths.append(len(longest.input_ids))
            if len(longest.input_ids) > self.max_length:
                self.over_long.append(Lost(place, too_long(longest, self.max_length), overlong=True))

    def _check_prefix(
        self, place: str, conversations: Sequence[Conversation], results: Sequence[Rendered | RenderError]
    ) -> None:
        for whole, rendered in zip(conversations, results, strict=False):
            if isinstance(rendered, Rendered) and prefix_is_rewritten(self.tokenizer, whole, rendered):
                what = "the chat template writes a turn otherwise once later turns are there"
                fix = "use base.chat_template: hymba, or correct the template"
                self.findings.append(Finding("prefix rewritten", place, what, fix, loses_row=False))
                return


def _conversations(example: Example, source: SourceSection) -> list[Conversation]:
    """What is rendered of an example: one conversation, both sides of a pair, or none of a plain text."""
    match example:
        case Conversation():
            return [example]
        case QuestionAnswer():
            return [Conversation(conversation([example], source.question_format))]
        case Preference(prompt, chosen, rejected, tools):
            return [Conversation([*prompt, *reply], tools) for reply in (chosen, rejected)]
        case PlainText():
            return []


def _roles(example: Example) -> list[str]:
    match example:
        case Conversation(messages):
            return [message["role"] for message in messages]
        case QuestionAnswer():
            return ["user", "assistant"]
        case Preference(prompt, chosen, rejected):
            return [message["role"] for message in (*prompt, *chosen, *rejected)]
        case PlainText():
            return []


def _malformed_rows(source: SourceSection) -> list[Lost]:
    """The rows that are no rows at all, of a source without one that is; none where the source is at fault otherwise."""
    lost = []
    try:
        for chunk in open_source(source).chunks():
            for raw in chunk:
                try:
                    parse_row(raw)
                except DataError as error:
                    lost.append(Lost.because(raw.place, error))
                else:
                    return []
    except DataError:
        return []
    return lost
