"""Two processes train what one process trains with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hymba_align.metrics import read_metrics
from hymba_align.recipe import Recipe
from hymba_align.train.dpo import train_dpo
from hymba_align.train.sft import train_sft

WORKER = """
import sys
from pathlib import Path
from hymba_align.recipe import load_recipe
from hymba_align.train.dpo import train_dpo
from hymba_align.train.sft import train_sft

stage, recipe, folder, cache = sys.argv[1:]
import datasets
datasets.config.HF_DATASETS_CACHE = Path(cache)
(train_sft if stage == "sft" else train_dpo)(load_recipe(recipe), None, Path(folder))
import torch
assert torch.distributed.get_world_size() == 2, "accelerate did not use both processes"
torch.distributed.destroy_process_group()
"""


def run_two_processes(stage: str, recipe: Recipe, folder: Path) -> None:
    """Trains the stage in `folder`/two."""
    (folder / "recipe.yaml").write_text(recipe.dump_yaml())
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["worker.py", stage, "recipe.yaml", "two", "cache"]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_share_data_and_references_and_train_as_one_with_twice_the_batch(
    make_recipe: Any, tmp_path: Path
) -> None:
    settings = {"rows": 8, "learning_rate": 1e-3, "warmup_steps": 0, "train_sampling_strategy": "sequential"}
    train_dpo(make_recipe(per_device_train_batch_size=4, **settings), None, tmp_path / "one")
    run_two_processes("dpo", make_recipe(per_device_train_batch_size=2, **settings), tmp_path)

    one, two = ([record for record in read_metrics(tmp_path / run) if "loss" in record] for run in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2]
    for ours, theirs in zip(one, two, strict=True):
        # float32 on the CPU; observed 6e-7, 1.1e-6 and 0 (of -172, where neighbouring numbers are 1.5e-5 apart)
        for key, within in (("loss", 5e-6), ("rewards/margins", 1e-5), ("logps/chosen", 5e-5)):
            assert theirs[key] == pytest.approx(ours[key], abs=within, rel=0), key
        assert theirs["tokens"] == ours["tokens"]
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("one", "two")]
    for name, weight in weights[0].items():
        # AdamW divides by the gradient's size, which carries rounding of near-zero gradients to the weight.
        assert (weights[1][name] - weight).abs().mean() < 3e-8, name  # observed 4e-9, in one weight 6e-6
    left = {entry.name for entry in (tmp_path / "two").iterdir() if not entry.name.startswith("checkpoint-")}
    assert left == {"data.json", "final", "metrics.jsonl"}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("balanced_by", ["rows", "the sampler"])
def test_two_processes_with_unequal_numbers_of_pairs_take_the_step_that_one_takes_over_all_pairs(
    make_recipe: Any, tmp_path: Path, balanced_by: str
) -> None:
    # Plain gradient descent: the weights move by the gradients. Rows of 2, 2, 3 and 1 pairs make one step of eight.
    settings = {"rows": 8, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    train_dpo(make_recipe(per_device_train_batch_size=8, **settings), None, tmp_path / "one")
    if balanced_by == "rows":
        recipe = make_recipe(per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings)
        recipe = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"row_tokens": 210})})
    else:
        settings["train_sampling_strategy"] = "batch_rebalance"
        recipe = make_recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    run_two_processes("dpo", recipe, tmp_path)

    if balanced_by == "rows":
        report = json.loads((tmp_path / "two" / "data.json").read_text())["rows"]
        assert (report["rows"], report["fewest_pairs"], report["most_pairs"]) == (4, 1, 3)
    one, two = ([record for record in read_metrics(tmp_path / run) if "loss" in record] for run in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2]
    assert abs(one[1]["loss"] - one[0]["loss"]) > 1e-3, "the step did not move"
    for ours, theirs in zip(two, one, strict=True):
        # float32 on the CPU; observed 2e-7, 4e-7 and 4e-7
        for key, within in (("loss", 1e-6), ("rewards/margins", 5e-6), ("rewards/chosen", 5e-6)):
            assert ours[key] == pytest.approx(theirs[key], abs=within, rel=0), key
        assert ours["tokens"] == theirs["tokens"]
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("one", "two")]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() < 1e-6, name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("streaming", [False, True], ids=["packed before", "streamed"])
def test_two_processes_train_on_packed_rows_as_one_process_with_twice_the_batch(
    make_recipe: Any, tmp_path: Path, streaming: bool
) -> None:
    settings = {"rows": 100, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 3}
    settings["train_sampling_strategy"] = "sequential"
    recipes = []
    for batch in (2, 1):
        recipe = make_recipe(per_device_train_batch_size=batch, **settings)
        recipes.append(recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": streaming})}))
    train_sft(recipes[0], None, tmp_path / "one")
    run_two_processes("sft", recipes[1], tmp_path)
    one, two = ([record for record in read_metrics(tmp_path / run) if "loss" in record] for run in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2, 3]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=5e-6, rel=0)  # float32 on the CPU; observed 5e-7
        assert theirs["tokens"] == ours["tokens"]
