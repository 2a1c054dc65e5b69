"""Corrupted rows: each is told with file:line or handled; none crashes, opens a turn or trains on a user's text.

Every test here counts the inputs that it tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.schemas import detect_schema, read_examples
from hymba_align.data.reading.sources import RawRow, parse_row
from hymba_align.data.rendering import Rendered, render_conversations
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection, SourceSection
from tests.data.corruptions import (
    LINES,
    MARKERS,
    TRIED,
    as_line,
    corrupted_bytes,
    corrupted_rows,
    forged_conversations,
    samples,
    tries,
)
from tests.data.what_holds import (
    MAX_LENGTH,
    accounted,
    check_conversation,
    check_example,
    check_reason,
    check_rendering,
    check_row,
)

ANY = SourceSection(path="rows.jsonl")


def test_at_least_two_thousand_corrupted_inputs_are_tried() -> None:
    assert sum(TRIED.values()) >= 2000


def test_a_forged_text_opens_no_turn_ends_none_and_is_trained_on_only_where_the_assistant_says_it(small: Any) -> None:
    def check(row: dict[str, Any]) -> None:
        (example,) = read_examples(row, detect_schema(row), ANY)
        assert isinstance(example, Conversation)
        assert [(one["role"], one["content"]) for one in example.messages] == [
            (one["role"], one["content"]) for one in row["messages"]
        ]
        assert check_conversation(small, example)
        # What TRL and the evaluation render, through the template itself, are the same tokens.
        (rendered,) = render_conversations(small, [example])
        by_template = small.apply_chat_template(example.messages, tools=list(example.tools) or None, return_dict=True)
        assert isinstance(rendered, Rendered)
        assert rendered.input_ids == by_template["input_ids"]

    tries("conversations", forged_conversations(), check)


def test_so_it_is_with_the_released_tokenizer(load: Any) -> None:
    tokenizer = load("released")
    for forged in MARKERS:
        messages = [
            {"role": "system", "content": f"Be brief.{forged}"},
            {"role": "user", "content": f"{forged}Hi{forged}there{forged}"},
            {
                "role": "assistant",
                "content": f"{forged}x",
                "tool_calls": [{"name": f"f{forged}", "arguments": {forged: forged}}],
            },
            {"role": "tool", "content": f"{forged}3"},
            {"role": "assistant", "content": f"Yes{forged}.", "train": False},
            {"role": "user", "content": forged},
            {"role": "assistant", "content": f"No.{forged}"},
        ]
        row = {"messages": messages, "tools": [{"name": forged, "description": f"a{forged}b"}]}
        assert check_row(tokenizer, row, ANY)


def test_a_row_with_wrong_values_is_told_or_handled(small: Any) -> None:
    usable = [0]

    def check(row: dict[str, Any]) -> None:
        usable[0] += check_row(small, row, ANY)

    tries("values", corrupted_rows(), check)
    assert TRIED["values"] / 20 < usable[0] < TRIED["values"], "the corruptions are too harsh or too mild"


def test_a_line_with_wrong_bytes_is_told_or_handled(small: Any) -> None:
    def check(line: bytes) -> None:
        try:
            row = parse_row(RawRow("rows.jsonl:1", line))
        except DataError as error:
            check_reason(str(error))
        else:
            check_row(small, row, ANY)

    tries("bytes", corrupted_bytes(), check)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_every_line_of_a_corrupted_file_is_kept_or_lost_with_its_number(stage: str, small: Any, tmp_path: Path) -> None:
    stems = {
        "sft": ["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer"],
        "dpo": ["preference", "ranked"],
    }
    number = [0]

    def check(drawn: tuple[str, list[bytes]]) -> None:
        stem, corrupted = drawn
        number[0] += 1
        path = tmp_path / f"{number[0]}.jsonl"
        lines = [json.dumps(samples()[stem][0]).encode(), *corrupted]
        path.write_bytes(b"\n".join(lines))
        section = DataSection(path=str(path), bad_rows="drop", over_long="drop", workers=1)
        prepare = prepare_sft if stage == "sft" else prepare_preferences
        prepared = prepare(section, small, MAX_LENGTH, seed=0)
        kept = accounted(prepared, path, 1, lines)
        assert 1 in kept
        schema = detect_schema(samples()[stem][0])
        for record in prepared.dataset:
            line = lines[int(record["place"].rpartition(":")[2]) - 1]
            (example,) = read_examples(parse_row(RawRow("", line.strip())), schema, ANY)
            assert check_example(small, example)
            if isinstance(example, Conversation):
                check_rendering(small, example, record["input_ids"], record["assistant_masks"])

    case = st.tuples(
        st.sampled_from(stems[stage]),
        st.lists(st.one_of(corrupted_bytes(), corrupted_rows().map(as_line)), min_size=LINES, max_size=LINES),
    )
    tries("lines", case, check, per_case=2 * LINES)  # half of them for each stage
