"""A run that stopped half-way continues: bitwise as if it had not on as many processes, with equal losses on others.

Two processes of a launch train every engine, whole and in two parts; one process does so before and after them.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hymba_align.recipe import Recipe
from hymba_align.run.manifest import read_manifest
from hymba_align.run.metrics import read_metrics
from tests.forked import TwoProcesses

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.timeout(600),  # DeepSpeed compiles its shared-memory operations on first use
]
ENGINES = {"ddp": None, "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero3_offload": "zero3_offload"}
CROSSED = ("zero2", "zero3")
"""Engines that continue what one process began, and the other way round."""
NARROW = ("zero1", "zero2", "zero3")
"""Engines that train bfloat16 weights beside float32 ones too."""
SETTINGS = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 9,
}
SAVED, NEXT, STEPS = 4, 6, 9
"""Steps: of the checkpoint, which lies within an epoch; of the one after it; and of the whole run.

Five rows make an epoch of three steps of two, so that one of two processes has nothing in the last one.
"""


class Runs:
    """Jobs of one recipe, and what they left behind."""

    def __init__(
        self, folder: Path, base: dict[str, Any], deepspeed_file: Callable[[Path, str | None], str | None]
    ) -> None:
        self.folder, self.deepspeed_file = folder, deepspeed_file
        self.base = {**base, "tokenizer": str(ROOT / base["tokenizer"])}

    def job(
        self, name: str, engine: str | None, accumulation: int, *, bf16: bool = False, **more: Any
    ) -> dict[str, Any]:
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "seed": 7,
                "base": self.base,
                "data": {"path": str(ROOT / "data" / "arithmetic" / "train.jsonl"), "max_rows": 20, "workers": 1},
                "sft": {
                    "max_length": 256,
                    "trainer": {**SETTINGS, "gradient_accumulation_steps": accumulation, "bf16": bf16},
                },
            }
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe.dump_yaml())
        if "continues" in more:
            more |= {"continues": str(self.folder / more["continues"]), "from_step": SAVED}
        return {
            "stage": "sft",
            "recipe": str(path),
            "folder": str(self.folder / name),
            "cache": str(self.folder / f"cache-{name}"),
            "deepspeed": self.deepspeed_file(self.folder, engine),
            **more,
        }

    def run_here(self, jobs: list[dict[str, Any]]) -> None:
        import datasets

        cache = datasets.config.HF_DATASETS_CACHE
        sys.path.insert(0, str(HERE))
        try:
            run_job = runpy.run_path(str(HERE / "resume_worker.py"))["run_job"]
            for job in jobs:
                run_job(job)
        finally:
            sys.path.remove(str(HERE))
            datasets.config.HF_DATASETS_CACHE = cache

    def run_in_two_processes(self, jobs: list[dict[str, Any]]) -> None:
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        TwoProcesses(HERE / "resume_worker.py", file, self.folder).wait()

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in read_metrics(self.folder / name) if "loss" in record]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "final" / "model.safetensors")

    def draws(self, name: str, rank: int = 0) -> list[list[float]]:
        """What each step of a process drew: of Python's, numpy's and torch's random numbers."""
        return list(json.loads((self.folder / name / f"draws-{rank}.json").read_text()))

    def observed(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "observed.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, deepspeed_file: Any) -> Runs:
    base = {
        "tokenizer": "data/arithmetic/tokenizer",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "v_head_dim": 32,
            "mamba_d_state": 4,
            "mamba_dt_rank": 3,
            "num_memory_tokens": 5,
            "sliding_window": 16,
            "global_attn_idx": [0],
            "kv_reuse_group": [[1, 2]],
        },
    }
    runs = Runs(tmp_path_factory.mktemp("resume"), base, deepspeed_file)
    runs.run_here(
        [
            runs.job("one-whole", None, 2),
            runs.job("one-same", None, 2, continues="one-whole"),
        ]
    )
    together = []
    for name, engine in ENGINES.items():
        together += [
            runs.job(f"{name}-whole", engine, 1),
            runs.job(f"{name}-same", engine, 1, continues=f"{name}-whole"),
        ]
    together += [runs.job(f"{name}-from-one", ENGINES[name], 1, continues="one-whole") for name in CROSSED]
    together += [
        runs.job("ddp-from-zero3", None, 1, continues="zero3-whole"),
        runs.job("zero2-from-ddp", "zero2", 1, continues="ddp-whole"),
        runs.job("zero3-full", "zero3", 1, continues="zero3-whole", disk_full=True),
    ]
    for engine in NARROW:
        narrow = [
            runs.job(f"{engine}-bf16-whole", engine, 1, bf16=True),
            runs.job(f"{engine}-bf16-same", engine, 1, bf16=True, continues=f"{engine}-bf16-whole"),
        ]
        if engine == "zero1":  # with which DeepSpeed has an optimizer of its own for bfloat16
            file = Path(narrow[0]["deepspeed"]).with_name("zero1-float32-gradients.json")
            content = json.loads(Path(narrow[0]["deepspeed"]).read_text())
            file.write_text(json.dumps({**content, "data_types": {"grad_accum_dtype": "fp32"}}))
            narrow = [{**job, "deepspeed": str(file)} for job in narrow]
        together += narrow
    runs.run_in_two_processes(together)
    runs.run_here([runs.job(f"one-from-{name}", None, 2, continues=f"{name}-whole") for name in CROSSED])
    return runs


def assert_equal_weights(runs: Runs, ours: str, theirs: str) -> None:
    one, other = runs.weights(ours), runs.weights(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- what ran --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_ran_and_continued_from_the_checkpoint_within_an_epoch(runs: Runs, engine: str) -> None:
    parts = {"whole": 0, "same": SAVED, **({"from-one": SAVED} if engine in CROSSED else {})}
    for part, began_after in parts.items():
        observed = runs.observed(f"{engine}-{part}")
        assert (observed["engine"], observed["began_after"]) == (engine, began_after), part
    manifest = read_manifest(runs.folder / f"{engine}-whole" / f"checkpoint-{SAVED}")
    assert manifest is not None
    assert (manifest["engine"], manifest["processes"], manifest["step"]) == (engine, 2, SAVED)
    losses = runs.losses(f"{engine}-whole")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.4


# ---- on as many processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["one", *ENGINES, *(f"{engine}-bf16" for engine in NARROW)])
def test_a_resumed_run_ends_with_bitwise_the_weights_and_records_of_an_uninterrupted_one(
    runs: Runs, engine: str
) -> None:
    assert runs.observed(f"{engine}-same")["began_after"] == SAVED
    assert_equal_weights(runs, f"{engine}-same", f"{engine}-whole")
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    ours, theirs = (
        [{key: record[key] for key in kept} for record in read_metrics(runs.folder / name) if "loss" in record]
        for name in (f"{engine}-same", f"{engine}-whole")
    )
    assert ours == theirs


@pytest.mark.parametrize(("engine", "processes"), [("one", 1), *((engine, 2) for engine in ENGINES)])
def test_every_process_goes_on_with_random_numbers_of_its_own(runs: Runs, engine: str, processes: int) -> None:
    whole = [runs.draws(f"{engine}-whole", rank) for rank in range(processes)]
    assert [len(draws) for draws in whole] == [STEPS] * processes
    assert len({json.dumps(draws) for draws in whole}) == processes
    assert [runs.draws(f"{engine}-same", rank) for rank in range(processes)] == [draws[SAVED:] for draws in whole]


@pytest.mark.parametrize("engine", CROSSED)
def test_on_another_number_of_processes_all_go_on_with_those_of_the_first(runs: Runs, engine: str) -> None:
    one = runs.draws("one-whole")[SAVED:]
    assert [runs.draws(f"{engine}-from-one", rank) for rank in (0, 1)] == [one, one]
    assert runs.draws(f"one-from-{engine}") == runs.draws(f"{engine}-whole")[SAVED:]


@pytest.mark.parametrize("engine", ENGINES)
def test_weight_decay_spares_the_same_group_after_a_resume(runs: Runs, engine: str) -> None:
    decay = [group[0] for group in runs.observed(f"{engine}-whole")["groups"]]
    assert decay == [0.1, 0.0]
    for part in ("same", "from-one") if engine in CROSSED else ("same",):
        assert runs.observed(f"{engine}-{part}")["groups"] == runs.observed(f"{engine}-whole")["groups"]


@pytest.mark.parametrize("engine", NARROW)
def test_float32_weights_beside_bfloat16_ones_are_kept(runs: Runs, engine: str) -> None:
    folder = runs.folder / f"{engine}-bf16-whole" / f"checkpoint-{SAVED}"
    state, weights = load_file(folder / "optimizer.safetensors"), load_file(folder / "model.safetensors")
    masters = {name.removeprefix("master:"): value for name, value in state.items() if name.startswith("master:")}
    assert masters.keys() == weights.keys()
    for name, value in weights.items():
        assert (value.dtype, masters[name].dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(masters[name].bfloat16(), value), name
    assert any(not torch.equal(masters[name], value.float()) for name, value in weights.items())


# ---- on others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resumed", "uninterrupted"),
    [
        *((f"{engine}-from-one", f"{engine}-whole") for engine in CROSSED),
        *((f"one-from-{engine}", "one-whole") for engine in CROSSED),
        ("ddp-from-zero3", "ddp-whole"),
        ("zero2-from-ddp", "zero2-whole"),
    ],
)
def test_losses_continue_on_another_number_of_processes_and_under_another_engine(
    runs: Runs, resumed: str, uninterrupted: str
) -> None:
    observed = runs.observed(resumed)
    assert (observed["engine"], observed["began_after"]) == (resumed.split("-")[0].replace("one", "single"), SAVED)
    ours, theirs = runs.losses(resumed), runs.losses(uninterrupted)
    assert len(ours) == len(theirs) == STEPS
    # float32 on the CPU; observed 0: two rows make a step, and the sum of two gradients knows no order
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-6


# ---- saving together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_final_and_the_last_checkpoint_hold_the_gathered_weights(runs: Runs, engine: str) -> None:
    last = load_file(runs.folder / f"{engine}-whole" / f"checkpoint-{STEPS}" / "model.safetensors")
    final, one = runs.weights(f"{engine}-whole"), runs.weights("one-whole")
    assert final.keys() == last.keys() == one.keys()
    for name, value in one.items():
        assert torch.equal(final[name], last[name]), name
        # float32 on the CPU; observed 0
        assert (final[name] - value).abs().max() < 1e-6, name


def test_a_disk_that_is_full_in_one_process_is_an_error_in_all_of_them(runs: Runs) -> None:
    folder = runs.folder / "zero3-full"
    told = [(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert "the disk is full" in told[0]
    assert f"checkpoint-{NEXT} could not be written (OSError: [Errno 28] No space left on device" in told[1]
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]
    assert not (folder / ".saving").exists()


def test_a_model_divided_by_fsdp2_is_saved_whole_and_continues_bitwise(runs: Runs) -> None:
    found = json.loads((runs.folder / "fsdp2" / "fsdp2.json").read_text())
    assert found.pop("weights") > 10
    assert found == {"divided": True, "loaded": [], "after a step": [], "moved": True}
