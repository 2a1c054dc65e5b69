"""report.md: scores, data, training, sample answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.eval.report import load_results, write_report
from hymba_align.eval.result import TaskResult, read_result

Make = Callable[..., TaskResult]


@pytest.fixture
def run_root(tmp_path: Path, result_of: Make) -> Path:
    root = tmp_path / "my-run"
    before = result_of(
        "gsm8k", [number == 3 for number in range(20)], total=200, warnings=("3 prompts lost their beginning",)
    )
    before.write(root / "eval" / "base" / "gsm8k.json")
    result_of("gsm8k", [number % 8 != 0 for number in range(200)]).write(root / "eval" / "sft" / "gsm8k.json")
    (root / "sft").mkdir()
    records = [
        {"step": 5, "epoch": 0.5, "loss": 4.25, "learning_rate": 5e-5, "tokens": 900, "mean_token_accuracy": 0.25},
        {"step": 10, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-6, "tokens": 1800, "mean_token_accuracy": 0.9},
        {"step": 5, "epoch": 0.5, "eval_loss": 3.5},
        {"step": 10, "epoch": 1.0, "eval_loss": 1.25, "eval_rewards/accuracies": 0.75},
        {
            "step": 10,
            "epoch": 1.0,
            "train_runtime": 9.0,
            "train_loss": 2.375,
            "seconds": 61.4,
            "peak_memory_bytes": 3 << 29,
        },
    ]
    (root / "sft" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = "base: {model: nvidia/Hymba-1.5B-Base}\nsft: {max_length: 256, trainer: {learning_rate: 5e-5}}\n"
    (root / "recipe.yaml").write_text(f"name: my-run\n{recipe}")
    return root


def text_of(root: Path) -> str:
    return write_report(root).read_text(encoding="utf-8")


def test_scores_stand_by_stage_with_n_and_error_beside_the_published_number(run_root: Path) -> None:
    text = text_of(run_root)
    head = "| score, % | base (partial: 20 of 200) | after SFT (200) | after SFT − base | published |"
    assert f"{head}\n| --- | ---: | ---: | ---: | ---: |\n" in text
    assert "| strict match | 5.0 ± 5.0 | 87.5 ± 2.3 | other problems | 58.76 |" in text
    assert "| flexible match | 5.0 ± 5.0 | 87.5 ± 2.3 | other problems |  |" in text
    assert "- Warning, base: 3 prompts lost their beginning." in text


def test_what_keeps_a_score_from_comparing_with_the_published_one_is_said(run_root: Path) -> None:
    text = text_of(run_root)
    assert (
        "- Base: comparable with the 58.76 of Hymba-1.5B-Instruct? no: only 20 of 200 problems were scored; its test set has "
        "200 problems, the official one 1,319." in text
    )


def test_a_partial_result_is_marked_at_the_top_at_its_scores_and_at_its_samples(run_root: Path) -> None:
    text = text_of(run_root)
    assert text.startswith("# my-run\n\n**Partial**: some scores are over fewer problems")
    assert "base (partial: 20 of 200)" in text
    assert "### gsm8k, base (partial)" in text
    assert "### gsm8k, after SFT\n" in text


def test_a_run_of_another_model_is_not_set_beside_the_published_number(run_root: Path) -> None:
    (run_root / "recipe.yaml").write_text("name: my-run\nbase: {config: {}, tokenizer: t}\n")
    text = text_of(run_root)
    assert "| strict match | 5.0 ± 5.0 | 87.5 ± 2.3 | other problems |\n" in text
    assert "58.76" not in text
    assert "comparable" not in text


def test_how_to_repeat_a_score_stands_below_it(run_root: Path) -> None:
    assert "again `hymba-align eval runs/my-run/sft/final --tasks gsm8k`." in text_of(run_root)


def test_how_it_was_asked_stands_once_with_what_stages_differ_in(run_root: Path, result_of: Make) -> None:
    path = run_root / "eval" / "base" / "gsm8k.json"
    made = read_result(path)
    replace(made, checkpoint="base/final", settings={**made.settings, "num_fewshot": 3}).write(path)
    text = text_of(run_root)
    [common] = re.findall(r"^- How it was asked: .*$", text, flags=re.MULTILINE)
    assert "which examples `drawn`; number format `float32`" in common
    assert "new tokens at most `512`" in common
    assert "examples in the prompt" not in common
    assert "- Base: checkpoint `base/final`; examples in the prompt `3`; again `hymba-align eval base/final " in text
    assert "- After SFT: checkpoint `runs/my-run/sft/final`; examples in the prompt `5`; again `hymba-align" in text


def test_what_the_scores_mean_stands_below_their_table(run_root: Path) -> None:
    assert (
        "| flexible match | 5.0 ± 5.0 | 87.5 ± 2.3 | other problems |  |\n\nStrict match: the number after "
        "\\#\\#\\#\\# is right; flexible match: the last number of the answer is right. An answer counts as right by "
        "strict match." in text_of(run_root)
    )


def test_cut_offs_stand_below_the_scores_with_their_limit(run_root: Path) -> None:
    assert "- After SFT: cut off were 22 of 200 answers at 512 new tokens." in text_of(run_root)


def test_the_data_section_says_what_became_of_every_sources_rows(run_root: Path, sft_data: dict[str, Any]) -> None:
    (run_root / "sft" / "data.json").write_text(json.dumps(sft_data))
    text = text_of(run_root)
    assert (
        "| SFT | a\\|sft.jsonl | 1,200 | 1,100 | 1,090 (each 2 times) | 9,000 | 4,000 | "
        "60 turn is empty; 40 not chosen; 3 shortened |" in text
    )
    assert "SFT: 11 conversations are kept for validation." in text
    assert "SFT: 1,090 conversations are packed into 20 rows, which they fill to 98.7 %." in text


def test_training_shows_settings_and_the_loss_at_start_and_end(run_root: Path) -> None:
    text = text_of(run_root)
    assert "| loss at the start | 4.2500 (step 5) |" in text
    assert "| loss at the end | 0.5000 (step 10) |" in text
    assert "| trainer.learning\\_rate | `5e-5` |" in text
    assert "| validation loss, first | 3.5000 (step 5) |" in text
    assert "| validation loss, last | 1.2500 (step 10) |" in text
    assert "| validation pairs preferred rightly | 0.750 |" in text
    assert "### DPO" not in text


def test_what_every_stage_took_is_a_table(run_root: Path, result_of: Make) -> None:
    made = result_of("gsm8k", [True] * 12)
    resumed = replace(made, earlier_s=58.6, reused_tokens=800, peak_memory_bytes=5 << 28)
    resumed.write(run_root / "eval" / "dpo" / "gsm8k.json")
    lines = text_of(run_root).split("## Cost\n\n")[1].split("\n\n")[0].splitlines()
    assert lines == [
        "| what | time | tokens | tokens per second | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| train SFT | 1 min 1 s | 1,800 | 29 | 1.50 GiB |",
        "| score base, gsm8k (partial: 20 of 200) | 1 min 1 s | 4,200 | 82 | – |",
        "| score after SFT, gsm8k | 1 min 1 s | 4,200 | 82 | – |",
        "| score after DPO, gsm8k | 2 min 0 s | 5,000 | 82 | 1.25 GiB |",
        "| together | 5 min 4 s |  |  |  |",
    ]


def test_times_are_not_added_up_where_one_was_not_recorded(run_root: Path) -> None:
    assert "| together | 3 min 4 s |" in text_of(run_root)
    path = run_root / "sft" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"seconds"', '"other"'))
    text = text_of(run_root)
    assert "| train SFT | – | 1,800 |" in text
    assert "together" not in text


def test_a_record_that_a_crash_cut_off_is_left_out(run_root: Path) -> None:
    with (run_root / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert "| loss at the end | 0.5000 (step 10) |" in text_of(run_root)


def test_three_answers_of_each_stage_with_verdicts_and_no_fence_that_an_answer_can_close(
    run_root: Path, result_of: Make
) -> None:
    made = result_of("gsm8k", [False, True, True, True])
    samples = [
        type(sample)(**{**vars(sample), "question": "Two and\nthree?", "response": "```\n# Title"})
        for sample in made.samples
    ]
    type(made)(**{**vars(made), "samples": samples}).write(run_root / "eval" / "sft" / "gsm8k.json")
    shown = text_of(run_root).split("### gsm8k, after SFT")[1]
    assert shown.count("```text\nTwo and\nthree?\n```\n\n````text\n```\n# Title\n````\n") == 3
    assert shown.count("wrong; expected `0`") == 1
    assert shown.count("right; expected") == 2


def test_an_empty_run_reports_that_nothing_happened_yet(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    assert "No stage has been scored yet." in text
    assert "No data was recorded yet." in text
    assert "No stage has trained yet." in text


def test_scores_of_weights_that_were_trained_anew_since_are_left_out(run_root: Path) -> None:
    def manifest(path: Path, **values: object) -> None:
        path.write_text(json.dumps(values))

    manifest(run_root / "eval" / "sft.manifest.json", completed="b", details={"inputs": "earlier"})
    manifest(run_root / "sft" / "manifest.json", started="earlier", completed="earlier")
    assert [stage for stage, _, _ in load_results(run_root)] == ["base", "sft"]

    manifest(run_root / "sft" / "manifest.json", started="now", completed="now")
    text = text_of(run_root)
    assert "Note: Scores after SFT are of weights that were trained anew since; score again." in text
    assert [stage for stage, _, _ in load_results(run_root)] == ["base"]


def test_a_result_that_was_edited_is_named_and_left_out(run_root: Path) -> None:
    path = run_root / "eval" / "sft" / "gsm8k.json"
    path.write_text(path.read_text().replace('"value": 0.875', '"value": 0.975'))
    text = text_of(run_root)
    assert "Note: eval/sft/gsm8k.json was changed or damaged since it was written (SHA-256); score again." in text
    assert "| strict match | 5.0 ± 5.0 | 58.76 |" in text


def test_a_result_that_another_took_the_place_of_is_no_task(run_root: Path) -> None:
    before, folder = load_results(run_root), run_root / "eval" / "base"
    (folder / "gsm8k.previous.json").write_bytes((folder / "gsm8k.json").read_bytes())
    assert load_results(run_root) == before
    assert "previous" not in text_of(run_root)


def test_what_training_warned_of_is_in_the_report(run_root: Path) -> None:
    with (run_root / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "warning": "sft: the loss spiked", "skipped_rows": ["a:1"]}) + "\n")
    assert "Warnings:\n\n- step 7: sft: the loss spiked\n" in text_of(run_root)


def test_gpqa_shows_ids_and_letters_whatever_its_file_holds(tmp_path: Path, result_of: Make) -> None:
    made = result_of("gpqa_generative", [True, False])
    samples = [
        type(sample)(**{**vars(sample), "question": "SECRET", "response": "SECRET", "verdict": "SECRET"})
        for sample in made.samples
    ]
    type(made)(**{**vars(made), "samples": samples}).write(tmp_path / "eval" / "sft" / "gpqa_generative.json")
    text = text_of(tmp_path)
    assert "`gpqa_generative-0`: right; expected B, found B" in text
    assert "SECRET" not in text
