"""What happens at every log event: a record on disk, and a line on the terminal."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_align.run.metrics import append_metrics, read_metrics, rewrite_metrics
from hymba_align.run.peak_memory import forget_peak, peak_bytes

LINES_PER_RUN = 20  # progress lines when the output is not a terminal


class MetricsFile(TrainerCallback):
    """Appends one JSON object per log event; a resumed run first drops records past its checkpoint.

    TRL counts tokens, those of all processes, from zero again after a resume. `tokens_before` is what earlier sessions
    trained on and `tokens` the sum, on every process that sees the file.

    While it trains, a record also says what it took so far: `seconds` of training in all sessions that left a checkpoint, work
    that had to be repeated included, and `peak_memory_bytes` of this process (run/peak_memory.py).
    """

    def __init__(self, stage_dir: Path) -> None:
        self.stage_dir = stage_dir
        self.tokens_before = self.tokens = 0
        self.seconds, self.peak_memory_bytes = 0.0, 0
        self._seconds_before = 0.0
        self._began: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = self.count_earlier(state)
        self._seconds_before, self._began = self.seconds, time.perf_counter()
        forget_peak()
        if state.is_world_process_zero:
            rewrite_metrics(self.stage_dir, kept)

    def count_earlier(self, state: TrainerState) -> list[dict[str, Any]]:
        """The records up to the step that training starts from, after reading off them what earlier sessions took."""
        records = read_metrics(self.stage_dir) if state.global_step else []
        kept = [record for record in records if record["step"] <= state.global_step]
        self.tokens_before = self.tokens = max((record.get("tokens") or 0 for record in kept), default=0)
        self.seconds = max((record.get("seconds") or 0.0 for record in records), default=0.0)
        self.peak_memory_bytes = max((record.get("peak_memory_bytes") or 0 for record in records), default=0)
        return kept

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Logs before every checkpoint and at the end: a run that resumes there averages over its own steps alone."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # logging precedes saving
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs:
            return
        values = {key: _finite(value) for key, value in logs.items() if key not in ("num_tokens", "total_flos")}
        if "num_tokens" in logs:
            values["tokens"] = self.tokens = self.tokens_before + int(logs["num_tokens"])
        if self._began is not None:
            values["seconds"] = self.seconds = round(self._seconds_before + time.perf_counter() - self._began, 3)
            values["peak_memory_bytes"] = self.peak_memory_bytes = max(self.peak_memory_bytes, peak_bytes())
        if state.is_world_process_zero:
            append_metrics(self.stage_dir, {"step": state.global_step, **values})


class Progress(TrainerCallback):
    """One bar on a terminal; elsewhere a compact line every few percent."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: tqdm[Any] | None = None
        self.next_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            told = f"{self.stage}  step {state.global_step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}"
            tqdm.write(told + describe_answers(logs), file=sys.stderr)
        if "loss" not in logs:
            return
        shown = describe(logs)
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
        elif state.global_step >= min(self.next_line, state.max_steps):
            print(f"{self.stage}  step {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr, flush=True)
            self.next_line = state.global_step + state.max_steps / LINES_PER_RUN

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe(logs: dict[str, Any]) -> str:
    """The few numbers worth watching, e.g. `loss 0.4312  lr 4.9e-05  accuracy 0.93`."""
    parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.1e}"]
    if "rewards/margins" in logs:
        parts += [f"margin {logs['rewards/margins']:.3f}", f"preferred {logs['rewards/accuracies']:.2f}"]
    elif "mean_token_accuracy" in logs:
        parts.append(f"accuracy {logs['mean_token_accuracy']:.2f}")
    return "  ".join(parts)


def describe_answers(logs: dict[str, Any]) -> str:
    """Of answers to held-out problems, where there are any, e.g. `  48 problems: 41.7 % right, 6.2 % cut off`."""
    if "eval_answers/exact" not in logs:
        return ""
    right, cut_off = (100 * logs[f"eval_answers/{key}"] for key in ("exact", "cut_off"))
    shares = f"{right:.1f} % right, {cut_off:.1f} % cut off"
    return f"  {logs['eval_answers/problems']:.0f} problems: {shares}"


def _finite(value: Any) -> Any:
    """The value, or None where JSON has no number for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
