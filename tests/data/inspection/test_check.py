"""A check of whole sources: what cannot be used, the verdict, the numbers, and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hymba_align.data.inspection.check import check_data
from hymba_align.data.inspection.check_printing import print_report
from hymba_align.data.inspection.contamination import Benchmark, NotCompared, make_benchmark
from hymba_align.data.inspection.findings import CheckReport, Finding
from hymba_align.data.prepare import prepare_sft
from hymba_align.data.rendering import render
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection, SourceSection
from tests.data.inspection.checked_rows import GOOD, GOOD_PAIR, messages, write

# ---- sources that cannot be used -------------------------------------------------------------------------------------


def test_a_missing_file_is_a_finding_and_the_other_sources_are_checked(small: Any, tmp_path: Path) -> None:
    missing, there = str(tmp_path / "no.jsonl"), write(tmp_path / "d.jsonl", GOOD)
    section = DataSection(sources=(SourceSection(path=missing), SourceSection(path=there)), bad_rows="drop")
    found = check_data(section, "sft", small, 64, seed=0)
    assert found.findings == (
        Finding(
            "unusable source",
            missing,
            "no such file",
            "name one that exists, or a hub data set such as openai/gsm8k",
            True,
        ),
    )
    assert [(source.name, source.rows, source.rows_kept) for source in found.sources] == [
        (missing, 0, 0),
        (there, 1, 1),
    ]
    assert (found.exit_code, found.verdict()) == (
        1,
        "not all of the data can be read or prepared, so training would stop; correct what is named above",
    )


def test_a_truncated_json_list_is_a_finding_at_the_line_where_it_ends(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(f"[\n{json.dumps(GOOD)},\n" + json.dumps(GOOD)[:30])
    found = check_data(DataSection(path=str(path)), "sft", small, 64, seed=0)
    (one,) = found.findings
    assert (one.kind, one.loses_row, found.exit_code) == ("unusable source", True, 1)
    assert one.place.startswith(f"{path}:3")
    assert one.message.startswith("malformed JSON")


def test_duplicates_are_found_behind_a_source_that_ends_too_early(small: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    rows = [
        messages(("user", f"{number} is a number of which nothing is said"), ("assistant", "yes"))
        for number in range(600)
    ]
    broken.write_text(json.dumps(rows)[:-1])
    said = " ".join(f"a{number}" for number in range(20))
    there = write(
        tmp_path / "d.jsonl",
        messages(("user", said), ("assistant", "yes")),
        messages(("user", said), ("assistant", "yes!")),
    )
    found = check_data(
        DataSection(sources=(SourceSection(path=str(broken)), SourceSection(path=there))), "sft", small, 400, seed=0
    )
    assert found.sources[0].rows >= 500
    assert [(one.kind, one.place) for one in found.findings if one.kind != "near duplicate"] == [
        ("unusable source", f"{broken}:1")
    ]
    assert f"{there}:2" in [one.place for one in found.of_kind("near duplicate")]
    assert f"it and {there}:1 share 100 % of their runs of 5 words" in [one.message for one in found.findings]


def test_a_file_without_a_row_that_can_be_read_names_every_one(small: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "{bad", "[1]")
    found = check_data(DataSection(path=path, bad_rows="drop"), "sft", small, 64, seed=0)
    assert [(one.kind, one.place) for one in found.findings] == [
        ("unusable source", path),
        ("malformed row", f"{path}:1"),
        ("malformed row", f"{path}:2"),
    ]
    assert found.findings[0].message == "none of its rows can be read"
    assert (found.rows, found.rows_lost, found.exit_code) == (2, 2, 1)


def test_rows_of_the_other_stage_are_a_finding(small: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD_PAIR)
    (one,) = check_data(DataSection(path=path), "sft", small, 64, seed=0).findings
    assert one.kind == "unusable source"
    assert one.place == f"{path}:1"
    assert one.message.startswith("the rows are of prompt, chosen, rejected, but SFT takes ")


def test_a_file_of_which_no_row_is_left_says_why_row_by_row(report: Callable[..., CheckReport], tmp_path: Path) -> None:
    empty = messages(("user", "hi"), ("assistant", " "))
    found = report(empty, messages(("user", "7 " * 50), ("assistant", "yes")), bad_rows="drop", over_long="drop")
    assert [(one.kind, one.place.rpartition(":")[2]) for one in found.findings[1:]] == [
        ("empty answer", "1"),
        ("over-long", "2"),
    ]
    assert found.findings[0].kind == "cannot be prepared"
    assert found.findings[0].message.startswith("none of the 2 rows is left for training: ")
    assert found.exit_code == 1


# ---- the verdict -----------------------------------------------------------------------------------------------------


BAD_AND_LONG = (
    GOOD,
    messages(("user", "hi"), ("assistant", " ")),
    messages(("user", "7 " * 50), ("assistant", "yes")),
)


@pytest.mark.parametrize(
    ("keys", "lost", "verdict"),
    [
        ({}, 2, "2 rows would be lost, so training would stop; correct what is named above, or set data.over_long and data.bad_rows: drop"),
        ({"bad_rows": "drop"}, 2, "1 row would be lost, so training would stop; correct what is named above, or set data.over_long"),
        ({"over_long": "drop"}, 2, "1 row would be lost, so training would stop; correct what is named above, or set data.bad_rows: drop"),
        ({"over_long": "truncate"}, 2, "1 row would be lost, so training would stop; correct what is named above, or set data.bad_rows: drop"),
        ({"bad_rows": "drop", "over_long": "drop"}, 2, "2 of 3 rows are lost, as the recipe allows"),
    ],
)  # fmt: skip
def test_the_exit_code_is_1_where_training_would_refuse_the_rows(
    report: Callable[..., CheckReport], small: Any, tmp_path: Path, keys: dict[str, Any], lost: int, verdict: str
) -> None:
    found = report(*BAD_AND_LONG, **keys)
    assert (found.rows_lost, found.verdict()) == (lost, verdict)
    try:
        prepare_sft(DataSection(path=str(tmp_path / "d.jsonl"), **keys), small, 64, seed=0)
    except DataError:
        assert found.exit_code == 1
    else:
        assert found.exit_code == 0


def test_rows_that_stand_on_one_line_are_all_counted(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    empty = messages(("user", "hi"), ("assistant", " "))
    path.write_text(json.dumps([empty, GOOD, empty, empty]))
    found = check_data(DataSection(path=str(path)), "sft", small, 64, seed=0)
    assert (found.rows, found.rows_lost) == (4, 3)
    long = messages(("user", "7 " * 15), ("assistant", "yes"), ("user", "7 " * 15), ("assistant", "yes"))
    path.write_text(json.dumps([long, GOOD, long]))
    found = check_data(DataSection(path=str(path), over_long="split"), "sft", small, 64, seed=0)
    assert found.counts["over-long"] == 2


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_rows_turns_tokens_and_lengths_are_those_of_the_rows(report: Callable[..., CheckReport], small: Any) -> None:
    rows = [
        messages(("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")),
        *(messages(("user", "7 " * count), ("assistant", "yes")) for count in range(1, 40)),
    ]
    found = report(*rows, max_length=60, over_long="drop")
    rendered = [render(small, row["messages"]) for row in rows]
    lengths = sorted(len(one.input_ids) for one in rendered)
    kept = [one for one in rendered if len(one.input_ids) <= 60]
    (source,) = found.sources
    assert source.turns == {"system": 1, "user": 41, "assistant": 41}
    assert list(source.turns) == ["system", "user", "assistant"]
    assert (source.rows, source.rows_kept, source.conversations) == (40, len(kept), len(kept))
    assert 0 < len(kept) < 40
    assert source.total_tokens == sum(len(one.input_ids) for one in kept)
    assert source.trained_tokens == sum(sum(one.assistant_mask) for one in kept)
    assert found.trained_share == source.trained_tokens / source.total_tokens
    assert found.lengths is not None
    # The smallest length that at least so many per cent of the rows do not exceed.
    assert found.lengths.percentiles == {
        percent: lengths[-(-percent * 40 // 100) - 1] for percent in (1, 5, 25, 50, 75, 90, 95, 99, 100)
    }
    assert len(found.of_kind("over-long")) == 40 - len(kept)


def test_a_text_too_long_to_be_counted_is_over_long_and_in_no_percentile(report: Callable[..., CheckReport]) -> None:
    found = report(GOOD, messages(("user", "hi " * 20000), ("assistant", "yes")))
    assert found.lengths is not None
    assert found.lengths.uncounted == 1
    assert found.lengths.percentiles[100] < 64
    assert [one.kind for one in found.findings] == ["over-long"]


def test_plain_texts_and_pairs_are_measured_too(report: Callable[..., CheckReport], small: Any) -> None:
    found = report({"text": "good day"}, {"text": "7 " * 100})
    assert found.lengths is not None
    assert found.lengths.percentiles[1] == len(small("good day")["input_ids"]) + 1
    assert [(one.kind, one.place.rpartition(":")[2]) for one in found.findings] == [("over-long", "2")]
    pair = report({"prompt": "hi", "chosen": "a", "rejected": "7 7 7 7"})
    assert pair.lengths is not None
    sides = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}] for said in ("a", "7 7 7 7")]
    assert pair.lengths.percentiles[100] == max(len(render(small, side).input_ids) for side in sides)


def test_sources_are_counted_apart_and_duplicates_are_found_across_them(small: Any, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", GOOD, messages(("user", "a"), ("assistant", "b")))
    two = write(tmp_path / "two.jsonl", {"question": "hi", "answer": "good day"})
    section = DataSection(sources=(SourceSection(path=one), SourceSection(path=two, repeat=3)))
    found = check_data(section, "sft", small, 64, seed=0)
    assert [(source.schema, source.rows, source.repeat) for source in found.sources] == [
        ("messages", 2, 1),
        ("question_answer", 1, 3),
    ]
    assert [(finding.kind, finding.place, finding.message) for finding in found.findings] == [
        ("exact duplicate", f"{two}:1", f"it says the same as {one}:1")
    ]


def test_files_that_are_not_read_are_told_and_are_no_finding(small: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", GOOD)
    for name in ("c.txt", "b.jsonl.tar.gz"):
        (tmp_path / name).write_text("")
    found = check_data(DataSection(path=str(tmp_path)), "sft", small, 64, seed=0)
    assert found.sources[0].passed_over == ("b.jsonl.tar.gz", "c.txt")
    assert f"{tmp_path}: files passed over: b.jsonl.tar.gz, c.txt" in printed(found)
    assert found.to_json()["sources"][0]["passed_over"] == ("b.jsonl.tar.gz", "c.txt")
    assert found.exit_code == 0


def test_validation_and_streamed_sets_are_checked_as_a_whole(report: Callable[..., CheckReport]) -> None:
    rows = [messages(("user", str(number)), ("assistant", "yes")) for number in range(40)]
    found = report(*rows, validation_fraction=0.5)
    assert 0 < found.validation_conversations < 40
    assert found.sources[0].conversations == 40
    assert report(*rows, streaming=True).sources[0].rows_kept == 40


# ---- what is shown ---------------------------------------------------------------------------------------------------


def printed(found: CheckReport) -> list[str]:
    """The lines of the printed report, without their ends."""
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        print_report(found, (), console, "demo")
    return [line.rstrip() for line in captured.get().splitlines()]


def test_findings_are_capped_where_they_are_shown_and_never_in_the_counts(report: Callable[..., CheckReport]) -> None:
    found = report(GOOD, *("{bad" for _ in range(10)))
    assert found.counts == {"malformed row": 10}
    assert len(found.of_kind("malformed row")) == 10
    lines = printed(found)
    start = lines.index("malformed row: 10")
    shown = [line.rpartition("d.jsonl")[2].split(" ")[0] for line in lines[start + 1 : start + 4]]
    assert shown == [":2:", ":3:", ":4:"]
    assert lines[start + 4] == "  and 7 more"


def test_what_is_printed_names_source_lengths_share_and_verdict(
    report: Callable[..., CheckReport], tmp_path: Path
) -> None:
    lines = printed(report(GOOD | {"extra": 1}, keep_fraction=1.0))
    assert lines[0] == "demo: supervised fine-tuning (SFT)"
    (row,) = [line for line in lines if "d.jsonl " in line]
    assert " ".join(row.split()[1:]) == "1 0 1 2 26 34.6 %"  # rows, lost, conversations, turns, tokens, trained
    assert f"{tmp_path}/d.jsonl: columns not used: extra" in lines
    assert "1 row is too short to be searched for near duplicates" in lines
    title = lines.index("Tokens per row (max_length 64)")
    assert " ".join(lines[title + 2].split()) == "1 % 5 % 25 % 50 % 75 % 90 % 95 % 99 % longest"
    assert lines[title + 4].split() == ["26"] * 9
    assert lines[-1] == "SFT: no row is lost"


def test_a_report_is_json(report: Callable[..., CheckReport], tmp_path: Path) -> None:
    found = report(*BAD_AND_LONG, benchmarks=(NotCompared("GPQA", "absent", "get it"),))
    content = json.loads(json.dumps(found.to_json()))
    assert content["counts"] == {"empty answer": 1, "over-long": 1}
    assert (content["rows"], content["rows_lost"], content["allowed"]) == (3, 2, False)
    assert content["lengths"]["percentiles"]["100"] == 117
    assert content["findings"][0] == {
        "kind": "empty answer",
        "place": f"{tmp_path}/d.jsonl:2",
        "message": "turn 2, the assistant's, is empty",
        "fix": "give it content or tool_calls",
        "loses_row": True,
    }
    assert content["not_compared"] == [{"name": "GPQA", "reason": "absent", "fix": "get it"}]


def test_findings_come_by_kind_and_then_as_the_rows_are_read(report: Callable[..., CheckReport]) -> None:
    other = messages(("user", "hello"), ("assistant", "yes"))
    empty = messages(("user", "hi"), ("assistant", " "))
    found = report(other, GOOD, GOOD, empty, "{bad", other, empty, bad_rows="drop")
    assert [(one.kind, one.place.rpartition(":")[2]) for one in found.findings] == [
        ("malformed row", "5"),
        ("empty answer", "4"),
        ("empty answer", "7"),
        ("exact duplicate", "3"),
        ("exact duplicate", "6"),
    ]


def test_gsm8k_s_training_set_is_clean_but_for_seven_rows_like_test_items(small: Any, shared: Path) -> None:
    folder = shared / "data" / "gsm8k"
    test_set = make_benchmark("GSM8K", check_items(folder / "test.jsonl"))
    assert isinstance(test_set, Benchmark)
    found = check_data(
        DataSection(path=str(folder / "train.jsonl")), "sft", small, 2048, seed=0, benchmarks=(test_set,)
    )
    assert (found.rows, found.counts, found.exit_code) == (7473, {"contamination": 7}, 0)


def check_items(path: Path) -> Any:
    from hymba_align.data.inspection.contamination import gsm8k_items

    return gsm8k_items(path)
