"""`hymba-align run` of a small recipe, killed once in every phase, beside one that nobody killed; for test_kills.py.

    python tests/killed_run.py FOLDER

Every run is a forked child of this process, which has imported the libraries; the kill is SIGKILL, out of a function that
is wrapped in that child alone. Leaves the folders `whole` and `killed`, and prints the phases in which a kill came.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from kill_points import in_child

import hymba_align.data.cache
import hymba_align.eval.answer_store
import hymba_align.eval.gsm8k
import hymba_align.eval.run
import hymba_align.train.dpo
import hymba_align.train.saving
import hymba_align.train.sft
from hymba_align.cli import main as hymba_align_command
from hymba_align.run.folder import RunFolder

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "arithmetic"
BASE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "v_head_dim": 32,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
    "num_memory_tokens": 4,
    "sliding_window": 16,
    "global_attn_idx": [0],
    "kv_reuse_group": [],
}
ANSWERED = 2
"""Answers that the kill of scoring leaves"""
TRAINER = {"per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 2, "max_steps": 5, "warmup_steps": 0}


def write_recipe(folder: Path, name: str) -> str:
    """A recipe of all stages, which writes to `folder/name`; the path of it."""
    gsm8k = {"train_path": str(SHIPPED / "train.jsonl"), "test_path": str(SHIPPED / "test.jsonl"), "num_fewshot": 1}
    sections = {
        "name": "killed",
        "seed": 5,
        "output_dir": str(folder / name),
        "base": {"tokenizer": str(SHIPPED / "tokenizer"), "config": BASE},
        "data": {"path": str(SHIPPED / "train.jsonl"), "max_rows": 60, "workers": 1},
        "sft": {"max_length": 256, "trainer": {**TRAINER, "learning_rate": 1e-2}},
        "dpo": {"max_length": 256, "data": {"max_rows": 12}, "trainer": {**TRAINER, "learning_rate": 1e-3}},
        "eval": {"stages": ["sft", "dpo"], "limit": 3, "max_new_tokens": 6, "gsm8k": gsm8k},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(sections))
    return str(path)


def run(recipe: str, cache: Path, arrange: Callable[[], None] = lambda: None) -> None:
    """One command, in a child: the cache of data lies in `cache`."""
    datasets.config.HF_DATASETS_CACHE = cache
    arrange()
    code = hymba_align_command(["run", recipe])
    if code:
        raise SystemExit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner: Any, name: str, number: int, *, before: Callable[..., object] = lambda *_: None) -> None:
    """Wraps a function so that the process dies at its call of this number, after `before` got its arguments."""
    function, calls = getattr(owner, name), 0

    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            before(*given)
            die()
        return function(*given, **named)

    setattr(owner, name, wrapped)


def half_of_weights(folder: Path, *_: object) -> None:
    """As if the kill had come while the weights were written."""
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


PHASES: dict[str, Callable[[], None]] = {
    "data preparation": partial(kill_at_call, hymba_align.data.cache, "_seal", 2),
    "a step": partial(kill_at_call, transformers.Trainer, "training_step", 4),
    "a save": partial(kill_at_call, hymba_align.train.saving, "seal", 2, before=half_of_weights),
    "between stages": partial(kill_at_call, RunFolder, "mark_started", 2),
    "answers": partial(kill_at_call, hymba_align.eval.answer_store.AnswerStore, "add", ANSWERED + 1),
    "a result": partial(kill_at_call, hymba_align.eval.run, "summary", 1),
}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    assert in_child(partial(run, write_recipe(folder, "whole"), folder / "cache of whole")) == 0
    recipe, cache = write_recipe(folder, "killed"), folder / "cache of killed"
    came = [
        name for name, arrange in PHASES.items() if in_child(partial(run, recipe, cache, arrange)) == -signal.SIGKILL
    ]
    assert in_child(partial(run, recipe, cache)) == 0
    print(json.dumps(came))


if __name__ == "__main__":
    main()
