"""What `data check` and `data preview` take a file for, and how they refuse what they cannot use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data_commands.rows import CHATS, PAIR, RECIPE, TINY, TOKENIZER, Run, chats, spans, write


@pytest.mark.parametrize(
    ("rows", "stage"),
    [
        ([{"messages": CHATS[0]}], "SFT"),
        ([{"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}], "SFT"),
        ([{"text": "All of it."}], "SFT"),
        ([PAIR], "DPO"),
    ],
)
def test_the_stage_follows_from_the_columns(run: Run, tmp_path: Path, rows: list[dict[str, Any]], stage: str) -> None:
    code, out, _ = run("preview", write(tmp_path / "my.jsonl", rows), *TINY)

    assert code == 0
    assert f"({stage})" in out.splitlines()[0]
    assert f"max_length {8192 if stage == 'SFT' else 2048:,}" in out


def test_the_stage_follows_from_what_a_converter_makes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_converter.py").write_text("def pairs(row):\n    return {**row['pair'], 'prompt': row['q']}\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "my.jsonl", [{"q": "Why?", "pair": {"chosen": "Because.", "rejected": "No idea."}}])

    code, out, _ = run("preview", path, *TINY, "convert=my_converter:pairs")

    assert code == 0
    assert spans(out) == ["Because.</s>", "No idea.</s>"]


def test_columns_can_be_named(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [{"problem": "1+1?", "solution": "2\n#### 2"}])

    code, out, _ = run("preview", path, *TINY, "columns.question=problem", "columns.answer=solution")

    assert code == 0
    assert spans(out) == ["2↵\n#### 2</s>"]


def test_a_path_with_quotes_and_colons_is_a_path(run: Run, tmp_path: Path) -> None:
    path = chats(tmp_path / "my: 'best' \"rows\" #1.jsonl", 1)

    code, out, _ = run("preview", path, *TINY)

    assert code == 0
    assert f"{path}:1" in out


def test_files_that_are_not_read_are_named_by_check_and_preview(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    chats(folder / "a.jsonl")
    for number in range(12):
        (folder / f"c{number:02}.txt").write_text("")
    said = f"files passed over: {', '.join(f'c{number:02}.txt' for number in range(10))} and 2 more"

    for command in ("check", "preview"):
        code, out, _ = run(command, folder, *TINY)

        assert code == 0
        assert said in " ".join(out.split())


@pytest.mark.parametrize("command", ["check", "preview"])
def test_a_stream_is_refused_what_training_refuses_it(run: Run, tmp_path: Path, command: str) -> None:
    path = chats(tmp_path / "a.jsonl")
    code, _, error = run(command, path, "streaming=true", "validation_fraction=0.1", *TINY)
    assert code == 2
    assert "data.validation_fraction needs a set that is read before training; set it to 0, or data.str" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check", "my.jsonl", "over_lnog=drop", *TINY],
            "Error: override 'over_lnog=drop': data.over_lnog is not a key of a recipe; the nearest is data.over_long",
        ),
        (["check", RECIPE, *TINY], f"Error: --tokenizer is for data without a recipe; for a recipe, write base.tokenizer={TOKENIZER}"),
        (["preview", RECIPE, "--max-length", "64"], "Error: --max-length is for data without a recipe; for a recipe, write sft.max_length=64"),
        (["check", "nothing.yaml"], "Error: nothing.yaml: there is no such recipe file"),
        (["check", RECIPE, "sft=null", "dpo=null"], f"Error: {RECIPE} has neither a section sft nor a section dpo, so there is no data in it; add one"),
        (["check", RECIPE, "sft=null", "--stage", "sft"], "Error: the recipe has no sft section; add one to run this stage"),
        (["preview", RECIPE, "-n", "0"], "Error: Invalid value for '-n': 0 is not in the range x>=1."),
        (["check", RECIPE, "--gsm8k", "nothing"], "Error: Invalid value for '--gsm8k': Path 'nothing' does not exist."),
        (["check"], "Error: Missing argument 'RECIPE|FILE'."),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(
    run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, error = run(*arguments)

    assert (code, out) == (2, "")
    assert [line for line in error.splitlines() if not line.startswith("More: ")][-1] == message


def test_a_file_that_is_missing_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    code, _, error = run("check", tmp_path / "nothing.jsonl", *TINY)

    assert code == 2
    assert error.startswith(f"Error: {tmp_path}/nothing.jsonl: ")
    assert error.splitlines()[1:] == ["More: hymba-align explain data-file"]


def test_a_default_tokenizer_out_of_reach_names_the_option(run: Run, tmp_path: Path) -> None:
    code, _, error = run("check", chats(tmp_path / "my.jsonl"))

    assert code == 2
    assert error == (
        "Error: the tokenizer of nvidia/Hymba-1.5B-Base, which is the default, is neither here nor given out by the "
        "Hugging Face hub; name a folder with --tokenizer, for instance --tokenizer data/arithmetic/tokenizer\n"
        "More: hymba-align explain tokenizer\n"
    )


@pytest.mark.parametrize("command", ["check", "preview"])
def test_help_imports_nothing_heavy_and_has_an_example(command: str) -> None:
    code = (
        "import sys\n"
        "from hymba_align.cli import main\n"
        f"code = main(['data', {command!r}, '--help'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy', 'rich'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert f"Example:\n    hymba-align data {command} " in done.stdout
