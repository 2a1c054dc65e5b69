"""Records, and what the terminal shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hymba_align.run.metrics import read_metrics
from hymba_align.train import callbacks
from hymba_align.train.callbacks import MetricsFile, Progress
from hymba_align.train.samples import Sample, in_a_line


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, report_to="none")


def at_step(step: int, max_steps: int = 40) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps)


def test_a_resumed_stage_drops_the_records_that_it_repeats_and_goes_on_counting_tokens(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    first = MetricsFile(tmp_path)
    first.on_train_begin(arguments, at_step(0), TrainerControl())
    for step in (1, 2, 3):
        first.on_log(arguments, at_step(step), TrainerControl(), logs={"loss": 1.0 / step, "num_tokens": 10.0 * step})
    resumed = MetricsFile(tmp_path)
    resumed.on_train_begin(arguments, at_step(2), TrainerControl())
    resumed.on_log(arguments, at_step(3), TrainerControl(), logs={"loss": 0.25, "num_tokens": 10.0})
    assert [(record["step"], record["loss"], record["tokens"]) for record in read_metrics(tmp_path)] == [
        (1, 1.0, 10),
        (2, 0.5, 20),
        (3, 0.25, 30),
    ]


def test_seconds_and_peak_memory_are_of_all_sessions_repeated_work_included(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(step: int, *, seconds: float, memory: int) -> MetricsFile:
        """One that logs once, two steps behind `step`, and so long after it began."""
        clock = iter((100.0, 100.0 + seconds))
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(callbacks, "peak_bytes", lambda: memory)
        metrics = MetricsFile(tmp_path)
        metrics.on_train_begin(arguments, at_step(step), TrainerControl())
        metrics.on_log(arguments, at_step(step + 2), TrainerControl(), logs={"loss": 1.0})
        return metrics

    session(0, seconds=60.0, memory=900)
    session(1, seconds=5.0, memory=500)  # from a checkpoint before that record, which goes

    assert [(one["step"], one["seconds"], one["peak_memory_bytes"]) for one in read_metrics(tmp_path)] == [
        (3, 65.0, 900)
    ]
    found = MetricsFile(tmp_path)
    found.count_earlier(at_step(3))
    assert (found.seconds, found.peak_memory_bytes) == (65.0, 900)


def test_a_stage_resumes_behind_a_record_that_a_crash_cut_off(tmp_path: Path, arguments: TrainingArguments) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "tokens": 20}\n{"step": 3, "lo')
    MetricsFile(tmp_path).on_train_begin(arguments, at_step(2), TrainerControl())
    MetricsFile(tmp_path).on_log(arguments, at_step(3), TrainerControl(), logs={"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 2, "tokens": 20}, {"step": 3, "loss": 0.5}]


def test_a_stage_that_starts_again_starts_an_empty_file(tmp_path: Path, arguments: TrainingArguments) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    MetricsFile(tmp_path).on_train_begin(arguments, at_step(0), TrainerControl())
    assert read_metrics(tmp_path) == []


def test_a_loss_that_is_not_a_number_is_written_as_null(tmp_path: Path, arguments: TrainingArguments) -> None:
    MetricsFile(tmp_path).on_log(arguments, at_step(4), TrainerControl(), logs={"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 4, "loss": None}


def test_metrics_are_logged_before_every_checkpoint_and_at_the_end(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    metrics = MetricsFile(tmp_path)
    assert metrics.on_step_end(arguments, at_step(3), TrainerControl(should_save=True)).should_log
    assert metrics.on_step_end(arguments, at_step(40), TrainerControl()).should_log
    assert not metrics.on_step_end(arguments, at_step(3), TrainerControl()).should_log


def test_outside_a_terminal_a_long_run_prints_a_few_compact_lines(
    capsys: pytest.CaptureFixture[str], arguments: TrainingArguments
) -> None:
    progress = Progress("dpo")
    progress.on_train_begin(arguments, at_step(0, 1000), TrainerControl())
    for step in range(1, 1001):
        logs = {"loss": 0.5, "learning_rate": 3e-6, "rewards/margins": 0.25, "rewards/accuracies": 0.75}
        progress.on_log(arguments, at_step(step, 1000), TrainerControl(), logs={**logs, "tokens_per_second": 1234.4})
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[-1].split("  ")[1:-1] == [
        *("DPO", "step 1000/1000 (100 %)", "loss 0.5000", "lr 3.0e-06", "margin 0.250", "preferred 0.75"),
        "1,234 tokens/s",
    ]


def test_samples_are_shown_below_the_validation_loss_and_cannot_order_the_terminal_about(
    capsys: pytest.CaptureFixture[str], arguments: TrainingArguments
) -> None:
    progress = Progress("sft")
    progress.on_train_begin(arguments, at_step(0), TrainerControl())
    prompt = "<extra_id_0>System\n\n<extra_id_1>User\nHow many?\n<extra_id_1>Assistant\n"
    spoken = [
        Sample(prompt, "#### 5", "\x1b[2J5\u202e\nBen", cut_off=False, right=True),
        Sample(prompt, "#### 6", "word " * 40, cut_off=True, right=None),
        Sample(prompt, "#### 7", "", cut_off=False, right=None),
    ]
    progress.take_samples(20, spoken)
    progress.on_log(arguments, at_step(20), TrainerControl(), logs={"eval_loss": 0.25})
    lines = [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "SFT  step 20/40  validation loss 0.2500",
        "SFT  sample at step 20: How many? -> ␛[2J5‹U+202E› Ben   [reference: #### 5]",
        "SFT  sample at step 20: How many? -> " + ("word " * 12).strip() + "… (cut off)   [reference: #### 6]",
    ]
    assert in_a_line(spoken[2]) == "How many? -> (nothing)   [reference: #### 7]"


def test_samples_are_told_by_what_was_asked_last_and_not_by_a_system_message_that_all_share() -> None:
    turns = ("System\nYou are brief.\n", "User\nHello.", "Assistant\nHi.</s>", "User\nHow many?", "Assistant\n")
    prompt = "\n".join(f"<extra_id_{number > 0:d}>{turn}" for number, turn in enumerate(turns))
    sample = Sample(prompt, "7", "Seven.", cut_off=False, right=None)
    assert in_a_line(sample) == "How many? -> Seven.   [reference: 7]"


def test_tokens_per_second_leave_out_what_is_no_training(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: passed[0])
    metrics, control = MetricsFile(tmp_path), TrainerControl()
    metrics.on_train_begin(arguments, at_step(0), control)
    passed[0] += 100.0  # until the first step begins: trackers, workers
    found = []
    for step in range(1, 6):
        metrics.on_step_begin(arguments, at_step(step - 1), control)
        passed[0] += 2.0
        metrics.on_step_end(arguments, at_step(step), control)
        logs = {"loss": 1.0, "num_tokens": 500.0 * step}
        metrics.on_log(arguments, at_step(step), control, logs=logs)
        found.append(logs["tokens_per_second"])
        if step in (2, 3):
            passed[0] += 50.0
            (metrics.on_evaluate if step == 2 else metrics.on_save)(arguments, at_step(step), control)
        passed[0] += 0.5  # loading data, which is part of it unless validation or saving came before
    assert found == [250.0, 200.0, 250.0, 250.0, 200.0]
    assert [record["tokens_per_second"] for record in read_metrics(tmp_path)] == found
