"""Scores on the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from hymba_align.eval.report import score_table
from hymba_align.eval.report.terminal import results_table
from hymba_align.eval.result import TaskResult

Make = Callable[..., TaskResult]


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 120])
def test_all_tasks_and_stages_fit_with_partial_ones_marked(full_run: Path, width: int) -> None:
    text = printed(score_table(full_run), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for words in (
        "gsm8k_nvidia",
        "gpqa_generative",
        "partial: 200",
        "of 1,319",
        "57.5 ± 3.5",
        "n = 448",
        "58.76",
        "46.40",
    ):
        assert words in text, words
    assert text.count("partial:") == 9


def test_a_run_without_published_numbers_has_no_column_for_them(tmp_path: Path, result_of: Make) -> None:
    result_of("gsm8k", [True, False]).write(tmp_path / "mine" / "eval" / "sft" / "gsm8k.json")
    text = printed(score_table(tmp_path / "mine"), 80)
    assert "published" not in text
    assert "after SFT" in text
    assert "base" not in text


def test_a_run_that_was_not_scored_is_an_empty_table(tmp_path: Path) -> None:
    assert score_table(tmp_path).row_count == 0


@pytest.mark.parametrize("width", [80, 120])
def test_the_scores_of_a_checkpoint_are_marked_where_they_are_partial(result_of: Make, width: int) -> None:
    results = {"gsm8k": result_of("gsm8k", [True, False] * 10, total=1319), "gpqa": result_of("gpqa", [True, False])}
    text = printed(results_table(results), width)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "│ gsm8k │ strict match │ partial: 20 of 1,319 │ 50.0 ± 11.5 │" in lines
    assert "│ │ flexible match │ partial: 20 of 1,319 │ 50.0 ± 11.5 │" in lines
    assert "│ gpqa │ acc │ 2 │ 50.0 ± 50.0 │" in lines


def test_names_from_files_cannot_style_the_terminal(tmp_path: Path, result_of: Make) -> None:
    made = result_of("gsm8k", [True])
    renamed = type(made)(**{**vars(made), "scores": {"[red]strict[/red]": made.scores["strict_match"]}})
    assert "[red]strict[/red]" in printed(results_table({"[bold]x": renamed}), 80)
