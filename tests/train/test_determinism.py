"""One seed, one machine, the same versions: two processes with two threads each write the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hymba_align.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("runtime", "second", "peak_memory")
"""Parts of the names of metrics that are about time and memory."""

WORKER = """
import os, sys
from pathlib import Path
import torch
from hymba_align.eval import evaluate
from hymba_align.recipe import load_recipe, resolved_eval
from hymba_align.train.dpo import train_dpo
from hymba_align.train.sft import train_sft

assert torch.get_num_threads() == 2, torch.get_num_threads()
recipe, folder = load_recipe(sys.argv[1]), Path(sys.argv[2])
train_sft(recipe, None, folder / "sft")
train_dpo(recipe, folder / "sft" / "final", folder / "dpo")
evaluate(folder / "dpo" / "final", resolved_eval(recipe), folder / "eval")
print(hash("a string"))
"""


def run(folder: Path, recipe: Path, name: str) -> str:
    """Trains and scores in a process of its own; what the process says `hash("a string")` is."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the core to other tests
        "PYTHONHASHSEED": str(len(name)),  # order of sets
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", WORKER, str(recipe), str(folder / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(part in key for part in TIMES)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two runs of one recipe: SFT on packed rows, DPO on rows of pairs with shared prompts, scores.

    Wide enough that torch divides its work among the threads.
    """
    folder = tmp_path_factory.mktemp("determinism")
    trainer = {"per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 4, "activation_checkpointing": True}
    shipped = ROOT / "data" / "arithmetic"
    sections = {
        "name": "determinism",
        "seed": 3,
        "base": {
            "tokenizer": str(shipped / "tokenizer"),
            "config": {
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "v_head_dim": 48,
                "mamba_d_state": 16,
                "mamba_dt_rank": 6,
                "num_memory_tokens": 16,
                "sliding_window": 64,
                "global_attn_idx": [0],
                "kv_reuse_group": [[1, 2]],
                "rope_type": None,
            },
        },
        "data": {"path": str(shipped / "train.jsonl"), "max_rows": 240, "examples_per_conversation": 3},
        "sft": {"max_length": 1024, "trainer": {**trainer, "learning_rate": 3e-3}},
        "dpo": {
            "max_length": 512,
            "row_tokens": 1024,
            "data": {"max_rows": 60, "examples_per_conversation": 1},
            "trainer": {**trainer, "learning_rate": 1e-4},
        },
        "eval": {
            "limit": 6,
            "max_new_tokens": 16,
            "batch_size": 4,
            "gsm8k": {
                "train_path": str(shipped / "train.jsonl"),
                "test_path": str(shipped / "test.jsonl"),
                "num_fewshot": 2,
            },
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(sections))
    hashes = [run(folder, recipe, name) for name in ("a", "bb")]
    assert len(set(hashes)) == 2, "both processes order sets alike, so that nothing that hangs on it shows"
    return folder / "a", folder / "bb"


pytestmark = pytest.mark.timeout(600)  # the first test pays for both runs


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_runs_with_one_seed_write_the_same_weights(runs: tuple[Path, Path], stage: str) -> None:
    one, other = ((run / stage / "final" / "model.safetensors").read_bytes() for run in runs)
    assert one == other


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_runs_with_one_seed_log_the_same_numbers_in_the_same_order(runs: tuple[Path, Path], stage: str) -> None:
    one, other = ([without_times(record) for record in read_metrics(run / stage)] for run in runs)
    assert [record["step"] for record in one if "loss" in record] == [1, 2, 3, 4]
    assert len({record["loss"] for record in one if "loss" in record}) > 2, "the steps did not move the loss"
    assert one == other


def test_two_runs_with_one_seed_score_the_same(runs: tuple[Path, Path]) -> None:
    moment = ("checkpoint", "command", "wall_s", "tokens_per_second", "peak_memory_bytes", "finished", "sha256")
    one, other = (json.loads((run / "eval" / "gsm8k.json").read_text()) for run in runs)
    assert all(result.pop(key) for result in (one, other) for key in moment)
    assert len({sample["response"] for sample in one["samples"]}) > 1, "every answer is the same"
    assert one == other
