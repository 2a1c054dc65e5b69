"""The report of a run folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hymba_align.eval.report import score_table, write_report
from hymba_align.eval.result import Sample, Score, TaskResult


def result(strict: float, n: int, total: int, response: str = "5\n#### 5", *, correct: bool = True) -> TaskResult:
    sample = Sample(
        doc_id=0,
        question="Two and\nthree?",
        target="2+3\n#### 5",
        response=response,
        extracted={"strict_match": "5", "flexible_match": "5"},
        correct={"strict_match": correct, "flexible_match": correct},
    )
    return TaskResult(
        task="gsm8k",
        n=n,
        total=total,
        limit=n if n < total else None,
        partial=n < total,
        scores={"strict_match": Score(strict, 0.012), "flexible_match": Score(strict, None)},
        settings={"num_fewshot": 5, "max_new_tokens": 128, "test_path": "data/test.jsonl"},
        versions={"lm-eval": "0.4.13"},
        wall_s=1.0,
        ended=n - 1,
        warnings=("3 prompts lost their beginning",) if n < total else (),
        samples=[sample] * 5,
    )


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    root = tmp_path / "my-run"
    result(0.005, 20, 200, "```\nfive", correct=False).write(root / "eval" / "base" / "gsm8k.json")
    result(0.8765, 200, 200).write(root / "eval" / "sft" / "gsm8k.json")
    (root / "sft").mkdir()
    records = [
        {"step": 5, "epoch": 0.5, "loss": 4.25, "learning_rate": 5e-5, "tokens": 900, "mean_token_accuracy": 0.25},
        {"step": 10, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-6, "tokens": 1800, "mean_token_accuracy": 0.9},
        {"step": 5, "epoch": 0.5, "eval_loss": 3.5},
        {"step": 10, "epoch": 1.0, "eval_loss": 1.25, "eval_rewards/accuracies": 0.75},
        {"step": 10, "epoch": 1.0, "train_runtime": 61.4, "train_loss": 2.375},
    ]
    (root / "sft" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "recipe.yaml").write_text(
        "name: my-run\nbase: {model: nvidia/Hymba-1.5B-Base}\nsft: {max_length: 256, trainer: {learning_rate: 5e-5}}\n"
    )
    return root


def test_scores_stand_by_stage_with_n_and_error_beside_the_published_number(run_root: Path) -> None:
    text = write_report(run_root).read_text(encoding="utf-8")
    assert "| base | gsm8k | 20 of 200 (partial) | 0.5 ± 1.2 | 0.5 | 19 of 20 | 58.76 |" in text
    assert "| after SFT | gsm8k | 200 | 87.6 ± 1.2 | 87.6 | 199 of 200 | 58.76 |" in text
    assert "It compares only with scores on the full official test set" in text
    assert "Warning, base: 3 prompts lost their beginning." in text


def test_a_run_of_another_model_is_not_set_beside_the_published_number(run_root: Path) -> None:
    (run_root / "recipe.yaml").write_text("name: my-run\nbase: {config: {}, tokenizer: t}\n")
    text = write_report(run_root).read_text(encoding="utf-8")
    assert "| after SFT | gsm8k | 200 | 87.6 ± 1.2 | 87.6 | 199 of 200 |" in text
    assert "ublished" not in text


def test_the_data_section_says_what_became_of_every_sources_rows(run_root: Path) -> None:
    counted = {
        "rows_read": 1200,
        "rows_kept": 1100,
        "rows_not_chosen": 40,
        "rows_passed_over": 0,
        "conversations": 1090,
    }
    source = {"name": "a|b.jsonl", "repeat": 2, "total_tokens": 9000, "trained_tokens": 4000, "shortened": 3, **counted}
    packing = {"documents": 1090, "rows": 20, "fill_rate": 0.987}
    record = {"sources": [{**source, "lost": {"turn is empty": 60}}], "validation": 11, "packing": packing}
    (run_root / "sft" / "data.json").write_text(json.dumps(record))
    text = write_report(run_root).read_text(encoding="utf-8")
    assert (
        "| SFT | `a\\|b.jsonl` | 1,200 | 1,100 | 1,090 (each 2 times) | 9,000 | 4,000 | "
        "60 turn is empty; 40 not chosen; 3 shortened |" in text
    )
    assert "SFT: 11 conversations are kept for validation." in text
    assert "SFT: 1,090 conversations are packed into 20 rows, which they fill to 98.7 %." in text


def test_training_shows_settings_and_the_loss_at_start_and_end(run_root: Path) -> None:
    text = write_report(run_root).read_text(encoding="utf-8")
    assert "| loss at the start | 4.2500 (step 5) |" in text
    assert "| loss at the end | 0.5000 (step 10) |" in text
    assert "| trainer.learning_rate | `5e-5` |" in text
    assert "| tokens | 1,800 |" in text
    assert "| validation loss, first | 3.5000 (step 5) |" in text
    assert "| validation loss, last | 1.2500 (step 10) |" in text
    assert "| validation pairs preferred rightly | 0.750 |" in text
    assert "### DPO" not in text


def test_a_record_that_a_crash_cut_off_is_left_out(run_root: Path) -> None:
    with (run_root / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert "| loss at the end | 0.5000 (step 10) |" in write_report(run_root).read_text(encoding="utf-8")


def test_three_answers_of_each_stage_with_verdicts_and_no_fence_that_an_answer_can_close(run_root: Path) -> None:
    text = write_report(run_root).read_text(encoding="utf-8")
    samples = text.split("## Sample answers")[1]
    assert samples.count("**Two and three?**") == 6
    assert samples.count("wrong; expected 5") == 3
    assert samples.count("right; expected 5") == 3
    assert samples.count("```") == 12


def test_an_empty_run_reports_that_nothing_happened_yet(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No stage has been scored yet." in text
    assert "No data was recorded yet." in text
    assert "No stage has trained yet." in text


def test_the_table_for_the_terminal_holds_the_same_scores(run_root: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(score_table(run_root))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "87.6 ± 1.2" in text
    assert "20 of 200 (partial)" in text
    assert "58.76" in text


def test_scores_of_weights_that_were_trained_anew_since_are_left_out(run_root: Path) -> None:
    def manifest(path: Path, **values: object) -> None:
        path.write_text(json.dumps(values))

    manifest(run_root / "eval" / "sft.manifest.json", completed="b", details={"inputs": "earlier"})
    manifest(run_root / "sft" / "manifest.json", started="earlier", completed="earlier")
    assert "| after SFT | gsm8k | 200 |" in write_report(run_root).read_text(encoding="utf-8")

    manifest(run_root / "sft" / "manifest.json", started="now", completed="now")
    text = write_report(run_root).read_text(encoding="utf-8")
    assert "| after SFT |" not in text
    assert "| base | gsm8k |" in text
    assert score_table(run_root).row_count == 1


def test_what_training_warned_of_is_in_the_report(run_root: Path) -> None:
    with (run_root / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "warning": "sft: the loss spiked", "skipped_rows": ["a:1"]}) + "\n")
    assert "Warnings:\n\n- step 7: sft: the loss spiked\n" in write_report(run_root).read_text()
