"""Data sections turned into the datasets that TRL's trainers take, with a count of every row that is left out."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hymba_align.data.convert import conversation, preference
from hymba_align.data.messages import Message, Tool, canonical_tools
from hymba_align.data.schemas import SCHEMAS, SOURCE, Row, SchemaName, message_feature
from hymba_align.data.sources import Source, generate_dataset, open_source
from hymba_align.data.template import Rendered, has_generation_markers, render
from hymba_align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from hymba_align.recipe import DataSection

# Bookkeeping columns of generated records: rows they hold, why they are left out ("" if they are not), token counts.
EXAMPLES, DROPPED, TRAINED, TOTAL = "examples", "dropped", "trained", "total"
LONGER = "longer"  # tokens of a pair's longer side; not written to the dataset
SAME_REPLIES = "chosen equals rejected"


@dataclass(frozen=True)
class Prepared:
    """A dataset ready for a trainer, and what became of the rows.

    `kept` counts rows, not conversations; `trained_tokens` are those under the loss (for preferences, of both replies).
    """

    dataset: Dataset
    rows_read: int
    kept: int
    dropped: dict[str, int]
    trained_tokens: int
    total_tokens: int
    ignored_columns: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.kept:,} of {self.rows_read:,} rows kept in {len(self.dataset):,} conversations"]
        parts += [f"{count:,} dropped ({reason})" for reason, count in self.dropped.items()]
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
    dropped = dict(Counter(reason for reason in reasons if reason))
    if dropped:
        dataset = dataset.select([place for place, reason in enumerate(reasons) if not reason])
    rows_read = len(source.dataset)
    if not len(dataset):
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"{section.path}: none of the {rows_read} rows is left ({why}); raise max_length or add rows")
    if "tools" in features and not any(dataset["tools"]):
        dataset = dataset.remove_columns("tools")
    kept, trained, total = (sum(dataset[column]) for column in (EXAMPLES, TRAINED, TOTAL))
    dataset = dataset.remove_columns([EXAMPLES, DROPPED, TRAINED, TOTAL])
    return Prepared(dataset, rows_read, kept, dropped, trained, total, source.ignored_columns)


def _sft_records(
    section: DataSection, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Row]:
    rows: Dataset = source.dataset
    most = section.examples_per_conversation
    joiner = _Joiner(section, tokenizer, max_length)
    waiting: list[Row] = []  # rows read and not yet given out, at most `most`
    for row in _then_none(rows):
        if row is not None:
            waiting.append(row)
        while len(waiting) == most or (row is None and waiting):
            count, rendered = joiner.join(waiting)
            if rendered is None:
                yield {"input_ids": [], "assistant_masks": [], **_dropped(_too_long(max_length))}
            else:
                ids, mask = rendered.input_ids, rendered.assistant_mask
                yield {"input_ids": ids, "assistant_masks": mask, **_kept(count, sum(mask), len(ids))}
            del waiting[: max(count, 1)]


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
        self.lengths: dict[str, int] = {}  # of the rows in `waiting`, alone, by their place

    def join(self, rows: Sequence[Row]) -> tuple[int, Rendered | None]:
        """As many of the first rows as fit, and their rendering; (0, None) where not even the first does."""
        count = self._guess(rows) if len(rows) > 1 else 1
        while count:
            rendered = _render_rows(self.section, self.tokenizer, rows[:count])
            if len(rendered.input_ids) <= self.max_length:
                return count, rendered
            count -= 1
        return 0, None

    def _guess(self, rows: Sequence[Row]) -> int:
        self.lengths = {row[SOURCE]: self.lengths.get(row[SOURCE]) or self.alone(row) for row in rows}
        sums = accumulate(self.added(self.lengths[row[SOURCE]]) for row in rows)
        return sum(self.header() + total <= self.max_length for total in sums)

    def alone(self, row: Row) -> int:
        """Tokens of a conversation of one row."""
        return len(_render_rows(self.section, self.tokenizer, [row]).input_ids)

    def added(self, alone: int) -> int:
        """Tokens that a row adds to a conversation, given its length alone."""
        return alone - self.header()

    def header(self) -> int:
        """Tokens that conversations have once, whatever their turns."""
        if self.header_length is None:
            row = {"question": "1", "answer": "1", SOURCE: ""}
            twice = _render_rows(self.section, self.tokenizer, [row, row]).input_ids
            self.header_length = 2 * self.alone(row) - len(twice)
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
    earlier: deque[tuple[int, Row]] = deque(maxlen=section.examples_per_conversation - 1)  # lengths alone, and rows
    for place, row in enumerate(source.dataset):
        record = _pair_record(_pair(section, row, [], seed, place), row, tokenizer, max_length)
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
            earlier.append((joiner.alone(row), row))


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
        return {**columns, **_dropped(SAME_REPLIES)}
    tools = canonical_tools(row.get("tools"))
    at = partial(_render_at, row[SOURCE], tokenizer, tools=tools)
    prompt = at(pair["prompt"], add_generation_prompt=True).input_ids
    whole = [at([*pair["prompt"], *pair[reply]]).input_ids for reply in ("chosen", "rejected")]
    if any(ids[: len(prompt)] != prompt for ids in whole):
        raise DataError(f"{row[SOURCE]}: the chat template rewrites the prompt when a reply follows; use 'hymba'")
    if max(map(len, whole)) > max_length:
        return {**columns, **_dropped(_too_long(max_length))}
    total = sum(map(len, whole))
    return {**columns, **_kept(1, total - 2 * len(prompt), total), LONGER: max(map(len, whole))}


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


def _dropped(reason: str) -> Row:
    return {EXAMPLES: 0, DROPPED: reason, TRAINED: 0, TOTAL: 0}


def _kept(examples: int, trained: int, total: int) -> Row:
    return {EXAMPLES: examples, DROPPED: "", TRAINED: trained, TOTAL: total}


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

    return {EXAMPLES: Value("int64"), DROPPED: Value("string"), TRAINED: Value("int64"), TOTAL: Value("int64")}


def _sft_features() -> Features:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8")), **_counts()})


def _preference_features(name: SchemaName) -> Features:
    from datasets import Features, Value

    with_tools = name == "preference"
    messages = message_feature(tool_calls=with_tools)
    columns = dict.fromkeys(("prompt", "chosen", "rejected"), messages)
    return Features({**columns, **({"tools": Value("string")} if with_tools else {}), **_counts()})
