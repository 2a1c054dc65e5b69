"""Data sections turned into the datasets that TRL's trainers take, with a count of every row that is left out."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hymba_align.data.convert import conversation, preference
from hymba_align.data.messages import Message, Tool, canonical_tools
from hymba_align.data.schemas import REFUSED, SCHEMAS, SOURCE, Row, SchemaName, message_feature
from hymba_align.data.sources import Source, generate_dataset, open_source, reason_to_drop
from hymba_align.data.template import Rendered, has_generation_markers, render
from hymba_align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from hymba_align.recipe import DataSection

# Bookkeeping columns of generated records: rows they hold, why they are left out ("" if they are not), where the (first)
# row stands, token counts.
EXAMPLES, DROPPED, PLACE, TRAINED, TOTAL = BOOKKEEPING = ("examples", "dropped", "place", "trained", "total")
LONGER = "longer"  # tokens of a pair's longer side; not written to the dataset
SAME_REPLIES = "chosen equals rejected"
REASONS_SHOWN = 6


@dataclass(frozen=True)
class Prepared:
    """A dataset ready for a trainer, and what became of the rows.

    `kept` counts rows, not conversations; `dropped` those left out by reason, and `first_dropped` says where the first of
    them stands; `trained_tokens` are those under the loss (for preferences, of both replies).
    """

    dataset: Dataset
    rows_read: int
    kept: int
    dropped: dict[str, int]
    trained_tokens: int
    total_tokens: int
    ignored_columns: tuple[str, ...] = ()
    first_dropped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.kept:,} of {self.rows_read:,} rows kept in {len(self.dataset):,} conversations"]
        parts += _counted(self.dropped, self.first_dropped)
        parts.append(f"{self.trained_tokens:,} of {self.total_tokens:,} tokens trained on")
        if self.ignored_columns:
            parts.append(f"columns not used: {', '.join(self.ignored_columns)}")
        return "; ".join(parts)


def prepare_sft(section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, *, seed: int) -> Prepared:
    """Conversations as `input_ids` and `assistant_masks`; TRL packs them.

    With `examples_per_conversation` n, question-answer rows are joined in order, at most n and as many as fit.
    Raises: DataError, RenderError with file and line.
    """
    source = open_source(section)
    _require(section, source, ("question_answer", "messages"), "SFT")
    if not has_generation_markers(tokenizer):
        raise DataError(
            f"{section.path}: the chat template does not mark what the assistant writes ({{% generation %}}), so "
            "nothing would be trained; use chat_template: hymba"
        )
    records = partial(_sft_records, section, source, tokenizer, max_length)
    return _prepare(
        section, source, records, _sft_features(), _key("sft", section, source, tokenizer, max_length, seed)
    )


def prepare_preferences(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, *, seed: int
) -> Prepared:
    """Preferences as `prompt`, `chosen`, `rejected` (lists of messages) and `tools` where present; TRL tokenizes them.

    With `examples_per_conversation` n, a question's prompt begins with up to n-1 rows before it, solved, as many as fit.
    Raises: DataError, RenderError with file and line.
    """
    source = open_source(section)
    _require(section, source, ("question_answer", "preference"), "DPO")
    records = partial(_preference_records, section, source, tokenizer, max_length, seed)
    features = _preference_features(source.schema.name)
    return _prepare(section, source, records, features, _key("dpo", section, source, tokenizer, max_length, seed))


def _require(section: DataSection, source: Source, accepted: tuple[SchemaName, ...], stage: str) -> None:
    name = source.schema.name
    if name not in accepted:
        wanted = "; or ".join(", ".join(schema.required) for schema in SCHEMAS if schema.name in accepted)
        raise DataError(
            f"{section.path}: the rows are of {', '.join(source.schema.required)}, but {stage} takes {wanted}"
        )
    if section.examples_per_conversation > 1 and name != "question_answer":
        raise DataError(
            f"{section.path}: examples_per_conversation is {section.examples_per_conversation}, but only rows of "
            "question and answer can be joined; set it to 1"
        )


def _prepare(
    section: DataSection,
    source: Source,
    records: Callable[[], Iterator[Row]],
    features: Features,
    key: tuple[Any, ...],
) -> Prepared:
    dataset = generate_dataset(records, features, key)
    reasons: list[str] = dataset[DROPPED][:]
    dropped = dict(Counter(reason for reason in reasons if reason).most_common())
    first_dropped = {reason: dataset[reasons.index(reason)][PLACE] for reason in dropped}
    if dropped:
        dataset = dataset.select([place for place, reason in enumerate(reasons) if not reason])
    rows_read = len(source.dataset)
    if not len(dataset):
        why = ", ".join(_counted(dropped, first_dropped))
        raise DataError(f"{section.path}: none of the {rows_read} rows is left: {why}; raise max_length or add rows")
    if "tools" in features and not any(dataset["tools"]):
        dataset = dataset.remove_columns("tools")
    kept, trained, total = (sum(dataset[column]) for column in (EXAMPLES, TRAINED, TOTAL))
    dataset = dataset.remove_columns(list(BOOKKEEPING))
    return Prepared(dataset, rows_read, kept, dropped, trained, total, source.ignored_columns, first_dropped)


def _counted(dropped: Mapping[str, int], first_dropped: Mapping[str, str]) -> list[str]:
    """Reasons with their counts and first places, most frequent first; those beyond a handful in one sum."""
    places = {reason: f", first {place}" for reason, place in first_dropped.items()}
    shown = list(dropped.items())[:REASONS_SHOWN]
    parts = [f"{count:,} dropped ({reason}{places.get(reason, '')})" for reason, count in shown]
    rest = sum(dropped.values()) - sum(count for _, count in shown)
    return [*parts, *([f"{rest:,} dropped for other reasons"] if rest else [])]


def _sft_records(
    section: DataSection, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Row]:
    most = section.examples_per_conversation
    joiner = _Joiner(section, tokenizer, max_length)
    waiting: list[Row] = []  # rows read and not yet given out, at most `most`
    for row in _then_none(source.dataset):
        if row is not None:
            try:
                _check_not_refused(row)
                joiner.render_alone(row)
            except DataError as error:
                reason = reason_to_drop(error, row[SOURCE], local=source.local)
                yield {"input_ids": [], "assistant_masks": [], **_dropped(row, reason)}
                continue
            waiting.append(row)
        while len(waiting) == most or (row is None and waiting):
            count, rendered = joiner.join(waiting)
            if rendered is None:
                yield {"input_ids": [], "assistant_masks": [], **_dropped(waiting[0], _too_long(max_length))}
            else:
                ids, mask = rendered.input_ids, rendered.assistant_mask
                yield {
                    "input_ids": ids,
                    "assistant_masks": mask,
                    **_kept(waiting[0], count, sum(mask), len(ids)),
                }
            joiner.forget(waiting[: max(count, 1)])
            del waiting[: max(count, 1)]


def _check_not_refused(row: Row) -> None:
    """Raises what was wrong with a hub data set's row when it was read."""
    if row.get(REFUSED) is not None:
        raise DataError(row[REFUSED])


def _then_none(rows: Iterable[Row]) -> Iterator[Row | None]:
    yield from rows
    yield None


class _Joiner:
    """Finds how many rows fit in one conversation, rendering few candidates: lengths of turns add up.

    They do exactly under this package's template, where `</s>` separates turns; under another one the sum is a guess,
    which is lowered until the rendering fits.
    """

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.section, self.tokenizer, self.max_length = section, tokenizer, max_length
        self.header_length: int | None = None
        self.alone: dict[str, Rendered] = {}  # rows as conversations of their own, by their place, until forgotten

    def join(self, rows: Sequence[Row]) -> tuple[int, Rendered | None]:
        """As many of the first rows as fit, and their rendering; (0, None) where not even the first does."""
        count = self._guess(rows) if len(rows) > 1 else 1
        while count:
            rendered = self._render(rows[:count])
            if len(rendered.input_ids) <= self.max_length:
                return count, rendered
            count -= 1
        return 0, None

    def _guess(self, rows: Sequence[Row]) -> int:
        sums = accumulate(self.added(self.length(row)) for row in rows)
        return sum(self.header() + total <= self.max_length for total in sums)

    def render_alone(self, row: Row) -> Rendered:
        """A conversation of one row. Raises: DataError."""
        if row[SOURCE] not in self.alone:
            self.alone[row[SOURCE]] = _render_rows(self.section, self.tokenizer, [row])
        return self.alone[row[SOURCE]]

    def forget(self, rows: Iterable[Row]) -> None:
        """Lets go of the renderings of rows that are done with."""
        for row in rows:
            self.alone.pop(row[SOURCE], None)

    def _render(self, rows: Sequence[Row]) -> Rendered:
        return self.render_alone(rows[0]) if len(rows) == 1 else _render_rows(self.section, self.tokenizer, rows)

    def length(self, row: Row) -> int:
        """Tokens of a conversation of one row."""
        return len(self.render_alone(row).input_ids)

    def added(self, alone: int) -> int:
        """Tokens that a row adds to a conversation, given its length alone."""
        return alone - self.header()

    def header(self) -> int:
        """Tokens that conversations have once, whatever their turns."""
        if self.header_length is None:
            row = {"question": "1", "answer": "1", SOURCE: ""}
            twice = _render_rows(self.section, self.tokenizer, [row, row]).input_ids
            self.header_length = 2 * self.length(row) - len(twice)
        return self.header_length


def _render_rows(section: DataSection, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Rendered:
    if "messages" in rows[0]:
        messages, tools = rows[0]["messages"], canonical_tools(rows[0]["tools"])
    else:
        messages, tools = conversation(rows, section.question_format), []
    return _render_at(rows[0][SOURCE], tokenizer, messages, tools)


def _preference_records(
    section: DataSection, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> Iterator[Row]:
    joiner = _Joiner(section, tokenizer, max_length)
    columns = ("prompt", "chosen", "rejected", *(["tools"] if source.schema.name == "preference" else []))
    earlier: deque[tuple[int, Row]] = deque(maxlen=section.examples_per_conversation - 1)  # lengths alone, and rows
    for place, row in enumerate(source.dataset):
        try:
            _check_not_refused(row)
            record = _pair_record(_pair(section, row, [], seed, place), row, tokenizer, max_length)
        except DataError as error:
            reason = reason_to_drop(error, row[SOURCE], local=source.local)
            yield {**dict.fromkeys(columns), **_dropped(row, reason)}
            continue
        if earlier and not record[DROPPED]:
            room = max_length - record[LONGER]
            added = accumulate(joiner.added(length) for length, _ in reversed(earlier))
            for count in range(sum(total <= room for total in added), 0, -1):
                pair = _pair(section, row, [row for _, row in list(earlier)[-count:]], seed, place)
                longer = _pair_record(pair, row, tokenizer, max_length)
                if not longer[DROPPED]:
                    record = longer
                    break
        yield {column: value for column, value in record.items() if column != LONGER}
        if earlier.maxlen:
            earlier.append((joiner.length(row), row))
            joiner.forget([row])


def _pair(section: DataSection, row: Row, earlier: Sequence[Row], seed: int, place: int) -> dict[str, list[Message]]:
    if "prompt" in row:
        return {column: row[column] for column in ("prompt", "chosen", "rejected")}
    try:
        return preference(row, earlier, random.Random(f"{seed}:{place}"), section.question_format)
    except DataError as error:
        raise type(error)(f"{row[SOURCE]}: {error}") from error


def _pair_record(pair: dict[str, list[Message]], row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    columns = {**pair, **({"tools": row["tools"]} if "tools" in row else {})}
    if pair["chosen"] == pair["rejected"]:
        return {**columns, **_dropped(row, SAME_REPLIES)}
    tools = canonical_tools(row.get("tools"))
    at = partial(_render_at, row[SOURCE], tokenizer, tools=tools)
    prompt = at(pair["prompt"], add_generation_prompt=True).input_ids
    whole = [at([*pair["prompt"], *pair[reply]]).input_ids for reply in ("chosen", "rejected")]
    if any(ids[: len(prompt)] != prompt for ids in whole):
        raise DataError(f"{row[SOURCE]}: the chat template rewrites the prompt when a reply follows; use 'hymba'")
    if max(map(len, whole)) > max_length:
        return {**columns, **_dropped(row, _too_long(max_length))}
    total = sum(map(len, whole))
    return {**columns, **_kept(row, 1, total - 2 * len(prompt), total), LONGER: max(map(len, whole))}


def _render_at(
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    try:
        return render(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise type(error)(f"{place}: {error}") from error


def _too_long(max_length: int) -> str:
    return f"longer than max_length={max_length}"


def _dropped(row: Row, reason: str) -> Row:
    return {EXAMPLES: 0, DROPPED: reason, PLACE: row[SOURCE], TRAINED: 0, TOTAL: 0}


def _kept(first: Row, examples: int, trained: int, total: int) -> Row:
    return {EXAMPLES: examples, DROPPED: "", PLACE: first[SOURCE], TRAINED: trained, TOTAL: total}


def _key(
    stage: str,
    section: DataSection,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
) -> tuple[Any, ...]:
    """Everything that the records depend on; the rows are there by their fingerprint."""
    settings = (section.examples_per_conversation, section.question_format, max_length, seed)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    return (stage, *settings, source.dataset._fingerprint, tokenizer.chat_template, vocabulary)


def _counts() -> dict[str, Any]:
    from datasets import Value

    counts = dict.fromkeys((EXAMPLES, TRAINED, TOTAL), Value("int64"))
    return {**counts, **dict.fromkeys((DROPPED, PLACE), Value("string"))}


def _sft_features() -> Features:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8")), **_counts()})


def _preference_features(name: SchemaName) -> Features:
    from datasets import Features, Value

    with_tools = name == "preference"
    messages = message_feature(tool_calls=with_tools)
    columns = dict.fromkeys(("prompt", "chosen", "rejected"), messages)
    return Features({**columns, **({"tools": Value("string")} if with_tools else {}), **_counts()})
