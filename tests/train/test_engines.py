"""One process, DDP and DeepSpeed's ZeRO 1, 2, 3, with and without offload, train the same: losses, gradients, weights.

Two processes of a launch run every engine one after the other. What ran is read off the objects that trained, because
several configurations fall back to plain DDP, or to one process, without a word.
"""

from __future__ import annotations

import json
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hymba_align.recipe import BaseSection, Recipe
from hymba_align.run.metrics import read_metrics
from tests.forked import TwoProcesses

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).resolve().with_name("engine_worker.py")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.timeout(600),  # DeepSpeed compiles its shared-memory operations on first use
]

ENGINES = {"ddp": None, "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero3_offload": "zero3_offload"}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "v_head_dim": 32,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
    "num_memory_tokens": 4,
    "sliding_window": 16,
    "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]],
    "initializer_range": 0.1,
}
COMMON = {"logging_steps": 1, "save_strategy": "no", "warmup_steps": 0, "train_sampling_strategy": "sequential"}
ADAMW = {**COMMON, "learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "num_train_epochs": 10}
# Plain gradient descent: weights move by the gradients, and AdamW cannot divide a wrong scale away again.
DESCENT = {
    **COMMON,
    "optim": "sgd",
    "learning_rate": 0.3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
}
UNEQUAL = ("ddp", "zero3")
"""Engines that train rows of unequal numbers of pairs too."""
STEPS = 14  # SFT has six in an epoch, DPO seven
# Of the first 65 rows of the file 41 packed ones are trained on and 4 validate, of the first 52 pairs 49 and 3. With 8 a
# step, 1 is left for the last step of an epoch, where one of two processes has none. Four rows of validation are no
# multiple of three in each of two processes, and of three pairs, one at a time, one process has none of the last.
VALIDATED = {**ADAMW, "max_steps": STEPS}
SFT = {**VALIDATED, "data": {"max_rows": 65, "validation_fraction": 0.12}, "per_device_eval_batch_size": 3}
DPO = {**VALIDATED, "data": {"max_rows": 52, "validation_fraction": 0.12}, "per_device_eval_batch_size": 1}
ROWS = {**ADAMW, "row_tokens": 250, "max_steps": 8}
BALANCED = {**DESCENT, "train_sampling_strategy": "batch_rebalance", "data": {"max_rows": 32}}
STREAMED = {**DESCENT, "data": {"streaming": True}}


def write_rows(path: Path, number: int) -> None:
    """Questions and answers of very different lengths: long questions with short answers, and the other way round."""
    lines = []
    for index in range(number):
        lost, left = index % 17 + 1, index + 20
        story = " ".join(f"Max has {part} pens and Leo has {part + lost}." for part in range(5))
        question = f"Una has {left + lost} pens and loses {lost}. How many?"
        answer = f"#### {left}"
        kind = index % 3
        lines.append(
            {
                "question": f"{story} {question}" if kind == 0 else question,
                "answer": f"{story} {answer}" if kind == 1 else answer,
                "wrong_answer": f"{story} #### {lost}" if index % 5 == 0 else f"#### {lost + left}",
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Runs:
    """Jobs with recipes of one small model and one file, and what they left behind."""

    def __init__(self, folder: Path, deepspeed_file: Callable[[Path, str | None], str | None]) -> None:
        self.folder, self.deepspeed_file = folder, deepspeed_file
        self.jobs: list[dict[str, Any]] = []
        self.data, self.start = folder / "rows.jsonl", folder / "start"
        write_rows(self.data, 100)
        self._write_start()

    def _write_start(self) -> None:
        from hymba_align.checkpoint import build_base
        from hymba_align.data.template import load_tokenizer

        tokenizer = load_tokenizer(str(ROOT / "data" / "arithmetic" / "tokenizer"))
        base = BaseSection(tokenizer=str(ROOT / "data" / "arithmetic" / "tokenizer"), config=SHAPE)
        model = build_base(base, tokenizer, 3)
        model.save_pretrained(self.start)
        tokenizer.save_pretrained(self.start)

    def job(self, name: str, stage: str, engine: str | None = None, **settings: Any) -> dict[str, Any]:
        """One stage's training; `row_tokens`, `data` and `cache` are no trainer settings."""
        # Without samples, which would be half of the time; tests/train/test_answers.py generates under the engines.
        section: dict[str, Any] = {"max_length": 128 if stage == "sft" else 160, "samples": {"prompts": 0}}
        if stage == "dpo":
            section["row_tokens"] = settings.pop("row_tokens", None)
        data, cache = settings.pop("data", {}), settings.pop("cache", name)
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "seed": 7,
                "base": {"model": str(self.start)},
                "data": {"path": str(self.data), "workers": 1, **data},
                stage: {**section, "trainer": settings},
            }
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe.dump_yaml())
        return {
            "stage": stage,
            "recipe": str(path),
            "start": str(self.start),
            "folder": str(self.folder / name),
            "cache": str(self.folder / f"cache-{cache}"),
            "deepspeed": self.deepspeed_file(self.folder, engine),
        }

    def launch(self, jobs: list[dict[str, Any]]) -> TwoProcesses:
        """Two processes that run the jobs."""
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        return TwoProcesses(WORKER, file, self.folder)

    def observed(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "observed.json").read_text()))

    def logged(self, name: str, key: str) -> list[float]:
        return [record[key] for record in read_metrics(self.folder / name) if key in record]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "final" / "model.safetensors")


def jobs_of(runs: Runs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of one process, and those of two under every engine."""
    eight = {"per_device_train_batch_size": 8}
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    alone = [
        runs.job("sft-8x1", "sft", **SFT, **eight),
        runs.job("sft-1x8", "sft", **SFT, **one_by_one),
        runs.job("descent-8x1", "sft", **DESCENT, **eight),
        runs.job("stream-8x1", "sft", **STREAMED, **eight),
        runs.job("dpo-8x1", "dpo", **DPO, **eight),
        runs.job("dpo-1x8", "dpo", **DPO, **one_by_one),
        runs.job("rows-8x1", "dpo", **ROWS, per_device_train_batch_size=4),
        runs.job("balance-8x1", "dpo", **BALANCED, **eight),
    ]
    together = [
        runs.job("stream-ddp", "sft", **STREAMED, **two),
        runs.job("balance-ddp", "dpo", **BALANCED, **two),
    ]
    for name, engine in ENGINES.items():
        divides = name.startswith("zero3")
        # With the weights that ZeRO-3 has divided, the log-probabilities that plain processes left must be found.
        cache = "dpo-ddp" if name == "zero3" else f"dpo-{name}"
        together += [
            runs.job(f"sft-{name}", "sft", engine, **SFT, **two),
            runs.job(f"descent-{name}", "sft", engine, **DESCENT, **two, gradient_checkpointing=divides),
            runs.job(f"dpo-{name}", "dpo", engine, **DPO, **two, cache=cache),
        ]
    together += [runs.job(f"rows-{name}", "dpo", ENGINES[name], **ROWS, **one_row) for name in UNEQUAL]
    return alone, together


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, deepspeed_file: Any) -> Runs:
    """Everything trained: by one process here, meanwhile by two of a launch."""
    import datasets

    runs = Runs(tmp_path_factory.mktemp("engines"), deepspeed_file)
    alone, together = jobs_of(runs)
    cache = datasets.config.HF_DATASETS_CACHE
    both = runs.launch(together)
    try:
        run_job = runpy.run_path(str(WORKER))["run_job"]
        for job in alone:
            run_job(job)
        both.wait()
    finally:
        both.stop()
        datasets.config.HF_DATASETS_CACHE = cache
    return runs


def assert_same_curve(ours: list[float], theirs: list[float], *, steps: int) -> None:
    """Pointwise within 1e-4, and on average not to one side by 1e-5, in float32."""
    assert len(ours) == len(theirs) == steps
    residuals = [one - other for one, other in zip(ours, theirs, strict=True)]
    # Observed, at most: losses 1.4e-6, of validation 4.1e-6, gradient norms 1.7e-5; means 3e-7, 1.2e-6 and 4e-6.
    assert max(map(abs, residuals)) < 1e-4, residuals
    assert abs(statistics.fmean(residuals)) < 1e-5, residuals


def assert_same_weights(runs: Runs, one: str, other: str) -> None:
    """Every saved weight of both is there, has moved, and by the same."""
    start, theirs, ours = load_file(runs.start / "model.safetensors"), runs.weights(one), runs.weights(other)
    assert ours.keys() == theirs.keys() == start.keys()
    for name, weight in theirs.items():
        assert not torch.equal(weight, start[name]), f"{name} did not move"
        assert (ours[name] - weight).abs().max() < 1e-6, name  # observed 5e-7, from how DeepSpeed clips


# ---- what ran --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *((stage, name) for stage in ("sft", "descent", "dpo") for name in ENGINES),
        *(("rows", name) for name in UNEQUAL),
    ],
)
def test_the_engine_that_was_asked_for_is_the_one_that_ran(runs: Runs, stage: str, name: str) -> None:
    found = runs.observed(f"{stage}-{name}")["engine"]
    assert (found["processes"], found["device"][:3]) == (2, "cpu")
    weights = len(runs.observed(f"{stage}-ddp")["shapes"])
    if name == "ddp":
        assert found["class"] == "DistributedDataParallel"
    else:
        number, offload, divided = {
            "zero1": (1, None, 0),
            "zero2": (2, None, 0),
            "zero3": (3, None, weights),
            "zero3_offload": (3, "cpu", weights),
        }[name]
        assert (found["class"], found["stage"]) == ("DeepSpeedEngine", number)
        assert (found["optimizer_offload"], found["divided"]) == (offload, divided)
        assert found["optimizer"] == ("SGD" if stage == "descent" else "AdamW")


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


def test_rows_differ_in_what_they_train_so_that_a_mean_of_means_would_show(runs: Runs) -> None:
    trained = runs.observed("sft-8x1")["trained_per_row"]
    batches = [sum(trained[first : first + 2]) for first in range(0, len(trained), 2)]
    steps = [batches[first : first + 4] for first in range(0, len(batches), 4)]
    assert sum(max(step) > 2 * min(step) for step in steps) >= 2, steps


@pytest.mark.parametrize("name", ["1x8", *ENGINES])
def test_sft_has_the_same_losses_and_gradient_norms(runs: Runs, name: str) -> None:
    one = runs.logged("sft-8x1", "loss")
    assert one[-1] < one[0] - 0.5
    for key in ("loss", "grad_norm"):
        assert_same_curve(runs.logged(f"sft-{name}", key), runs.logged("sft-8x1", key), steps=STEPS)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize(("stage", "epochs"), [("sft", 3), ("dpo", 2)])
def test_validation_has_the_same_loss(runs: Runs, stage: str, epochs: int, name: str) -> None:
    ours, theirs = runs.logged(f"{stage}-{name}", "eval_loss"), runs.logged(f"{stage}-8x1", "eval_loss")
    assert_same_curve(ours, theirs, steps=epochs)


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_weight_moves_by_the_same_gradient(runs: Runs, name: str) -> None:
    assert_same_weights(runs, "descent-8x1", f"descent-{name}")
    for key in ("loss", "grad_norm"):
        assert_same_curve(runs.logged(f"descent-{name}", key), runs.logged("descent-8x1", key), steps=3)


# ---- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1x8", *ENGINES])
def test_dpo_has_the_same_losses_and_gradient_norms(runs: Runs, name: str) -> None:
    one = runs.logged("dpo-8x1", "loss")
    assert one[0] - one[-1] > 0.05
    for key in ("loss", "grad_norm"):
        assert_same_curve(runs.logged(f"dpo-{name}", key), runs.logged("dpo-8x1", key), steps=STEPS)


@pytest.mark.parametrize("name", UNEQUAL)
def test_rows_of_unequal_numbers_of_pairs_have_the_same_losses_and_gradient_norms(runs: Runs, name: str) -> None:
    pairs = runs.observed("rows-8x1")["trained_per_row"]
    assert {1, 2, 3} <= set(pairs[:32]), "the rows of the steps below"
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "tokens"):
        assert_same_curve(runs.logged(f"rows-{name}", key), runs.logged("rows-8x1", key), steps=8)


def test_divided_weights_are_known_by_their_content(runs: Runs) -> None:
    kept = list((runs.folder / "cache-dpo-ddp").rglob("logps.npy"))
    assert len(kept) == 2, "ZeRO-3 did not find what DDP left for the pairs of training and of validation"
    assert runs.observed("dpo-zero3")["engine"]["stage"] == 3


# ---- what only the sampler or the reader divides -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["balance", "stream"])
def test_two_processes_take_the_steps_of_one_from_balanced_batches_and_from_a_stream(runs: Runs, stage: str) -> None:
    assert runs.observed(f"{stage}-ddp")["engine"]["class"] == "DistributedDataParallel"
    for key in ("loss", "grad_norm", "tokens"):
        assert_same_curve(runs.logged(f"{stage}-ddp", key), runs.logged(f"{stage}-8x1", key), steps=3)
    assert_same_weights(runs, f"{stage}-8x1", f"{stage}-ddp")


@pytest.mark.parametrize("name", list(ENGINES))
def test_data_that_processes_share_is_removed(runs: Runs, name: str) -> None:
    for stage in ("sft", "dpo"):
        left = {entry.name for entry in (runs.folder / f"{stage}-{name}").iterdir() if entry.is_dir()}
        assert left == {"final"}


# ---- parameter groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("stage", ["sft", "descent", "dpo"])
def test_every_engine_keeps_the_parameter_groups_of_one_process(runs: Runs, stage: str, name: str) -> None:
    one, ours = runs.observed(f"{stage}-8x1"), runs.observed(f"{stage}-{name}")
    assert ours["groups"] == one["groups"]
    assert ours["shapes"] == one["shapes"]
    assert sorted(weight for group in ours["groups"] for weight in group["names"]) == sorted(one["shapes"])
