"""`hymba-align data check`, from the command line to what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data_commands.rows import BAD, CHATS, RECIPE, TINY, Run, chats, write


def test_good_data_passes(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("check", chats(tmp_path / "my.jsonl"), *TINY)

    assert code == 0
    assert out.splitlines()[-1].startswith("SFT: no row is lost")
    assert "12 documents" in out


def test_rows_that_would_be_lost_are_named_and_the_exit_code_is_1(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", BAD, malformed='{"messages": \n')

    code, out, _ = run("check", path, *TINY, "--max-length", "128")

    assert code == 1
    for finding in (
        f"{path}:2: the conversation has no assistant turn",
        f"{path}:3: turn 1 has the role ",
        f"{path}:4: longer than max_length=128: it has ",
        f"{path}:5: malformed JSON",
    ):
        assert finding in out
    assert "    -> correct the line" in out
    assert out.splitlines()[-1].startswith("SFT: 4 rows would be lost, so training would stop")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ([], 1),
        (["bad_rows=drop"], 1),
        (["over_long=truncate"], 1),
        (["bad_rows=drop", "over_long=drop"], 0),
        (["data.bad_rows=drop", "data.over_long=split"], 0),
    ],
)
def test_the_exit_code_is_0_once_the_losses_are_allowed(
    run: Run, tmp_path: Path, allowed: list[str], expected: int
) -> None:
    path = write(tmp_path / "my.jsonl", BAD)

    code, _, _ = run("check", path, *TINY, "--max-length", "128", *allowed)

    assert code == expected


def test_duplicates_and_contamination_are_told_and_do_not_fail(run: Run, tmp_path: Path) -> None:
    question = "Anna has seven red apples, buys eleven green ones and gives exactly four of them to her brother Ben."
    rows = [{"question": question, "answer": "7 + 11 - 4 = 14 apples are left for Anna\n#### 14"}]
    test = write(tmp_path / "test.jsonl", rows)
    path = write(tmp_path / "my.jsonl", rows * 2)

    code, out, _ = run("check", path, *TINY, "--gsm8k", test)

    assert code == 0
    assert "exact duplicate: 1\n" in out
    assert "contamination: 2\n" in out
    assert "Compared with GSM8K: 1 test items" in out
    assert "Not compared with GPQA: no file of it was named; get dataset.zip " in out
    assert out.splitlines()[-1] == "SFT: no row is lost (not stopped by exact duplicate 1, contamination 2)"


def test_a_folder_is_enough_for_gsm8k(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [{"question": "How many are there?", "answer": "One.\n#### 1"}])

    _, out, _ = run("check", chats(tmp_path / "my.jsonl"), *TINY, "--gsm8k", tmp_path)

    assert "Compared with GSM8K: 1 test items" in out


@pytest.mark.parametrize(
    ("content", "code"), [("", 2), ("{\n{\n", 2), ('{"a\\u001b[2J": 1}\n', 2), ("[1]\n" * 3, 1), ('{"text": ""}\n', 1)]
)
def test_data_without_a_usable_row_is_told_in_a_sentence(run: Run, tmp_path: Path, content: str, code: int) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(content)

    found, out, error = run("check", path, *TINY)

    assert str(path) in out + error
    assert found == code
    assert "\x1b" not in out + error


def test_one_fix_is_printed_once_for_many_rows(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [{"messages": CHATS[0]}, *([BAD[1]] * 9)])

    _, out, _ = run("check", path, *TINY)

    block = out.split("wrong role: 9\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(":")[1] for line in block[:3]] == ["2", "3", "4"]
    assert block[3] == "  and 6 more"
    assert len([line for line in block if "->" in line]) == 1


def test_of_a_streamed_set_the_beginning_is_checked_and_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hymba_align.stage_data

    monkeypatch.setattr(hymba_align.stage_data, "STREAMED_ROWS", 5)
    path = chats(tmp_path / "my.jsonl")
    path.write_text(path.read_text() + "{malformed\n")

    code, out, _ = run("check", path, *TINY, "streaming=true", "--output", tmp_path / "report.json")

    assert code == 0
    sentence = "data.streaming is true, so this is about the first 5 rows of each source"
    assert out.splitlines().count(sentence) == 1
    assert "hold 5 documents" in out or "holds 5 documents" in out
    (stage,) = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert (stage["rows"], stage["findings"], stage["notes"]) == (5, [], [sentence])
    kept = [json.loads(counts.read_text())["rows_read"] for counts in (tmp_path / "cache").rglob("counts.json")]
    assert kept == [5]


def test_long_paths_lose_their_beginning_in_the_table_and_nowhere_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "a folder with a long name" / "gsm8k"
    folder.mkdir(parents=True)
    path = chats(folder / "train.jsonl")

    _, out, _ = run("check", path, *TINY)

    table = out.split("source")[1].split("Tokens per row")[0]
    assert "…/gsm8k/train.jsonl " in table
    assert "a folder" not in table
    write(path, BAD)
    assert f"{path}:2: the conversation has no assistant turn" in run("check", path, *TINY)[1]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_name_is_broken_within_a_word_however_long_it_is(width: int) -> None:
    from rich.console import Console

    from hymba_align.data.inspection.check_printing import print_report
    from hymba_align.data.inspection.findings import CheckReport, SourceReport

    for length in range(1, 90):
        name = ("folder/" * 20)[:length].replace("r/", "r/" if length % 2 else "rr")
        source = SourceReport(name, "question_answer", 7473, 7473, 7473, {"user": 14946}, 1_000_000, 2_124_248)
        console = Console(width=width, force_terminal=False)
        with console.capture() as captured:
            print_report(CheckReport("sft", 64, "drop", "drop", (source,), None, ()), (), console, "d")
        lines = captured.get().splitlines()
        (row,) = [number for number, line in enumerate(lines) if "question" in line]
        if lines[row] == f"{name} question_answer":
            continue  # a list, for which names are not shortened
        above = lines[row - 1].split("  ")[0].strip()
        assert above == name or (above.startswith("…") and name.endswith(above.removeprefix("…")))


def test_all_stages_of_a_recipe_are_checked(run: Run) -> None:
    code, out, _ = run("check", RECIPE, "data.max_rows=20", "dpo.data.max_rows=10")

    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if "ompared with " in line] == lines[-3:]  # once, not for each stage
    assert "arithmetic: supervised fine-tuning (SFT)" in lines
    assert "arithmetic: preferences (DPO)" in lines
    assert any(line.startswith("SFT: no row is lost") for line in lines)
    assert any(line.startswith("DPO: no row is lost") for line in lines)


def test_one_stage_can_be_chosen(run: Run) -> None:
    _, out, _ = run("check", RECIPE, "dpo.data.max_rows=10", "--stage", "dpo")

    assert "preferences (DPO)" in out
    assert "(SFT)" not in out


def test_the_json_report_holds_every_finding(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [{"messages": CHATS[0]}, *([BAD[1]] * 30)])

    code, out, _ = run("check", path, *TINY, "--output", tmp_path / "out" / "report.json")

    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert code == 1
    assert f"Report: {tmp_path}/out/report.json" in out
    (stage,) = written["stages"]
    lost = [finding for finding in stage["findings"] if finding["loses_row"]]
    assert [finding["place"] for finding in lost] == [f"{path}:{line}" for line in range(2, 32)]
    assert stage["verdict"].startswith("SFT: 30 rows would be lost")
    assert stage["packing"][0].endswith("1.0 per row")
