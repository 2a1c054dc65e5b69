"""Memory that runs out: the message names the estimate, the device, and settings that fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.errors import HymbaAlignError
from hymba_align.memory import Setting, Shape, estimate
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.modeling import HymbaModel
from hymba_align.train.dpo import train_dpo
from hymba_align.train.out_of_memory import is_out_of_memory, remedies
from hymba_align.train.sft import train_sft

ROOT = Path(__file__).resolve().parents[2]
RELEASED = Shape.of(HymbaConfig())
GIB = 2**30


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_a_stage_that_runs_out_of_memory_says_what_would_fit(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(HymbaModel, "forward", fails)
    with pytest.raises(HymbaAlignError) as raised:
        train_sft(make_recipe(per_device_train_batch_size=4), None, tmp_path)
    message = str(raised.value)
    assert re.match(
        r"sft ran out of memory on cpu of process 0 at step 1; it has [\d.]+ GiB, and training takes about", message
    )
    named = message.split("by the estimate each of these fits: ")[1].split("; ")
    assert len(named) == 3
    assert named[0].startswith("sft.trainer.per_device_train_batch_size=2 sft.trainer.gradient_accumulation_steps=2 (")
    assert raised.value.__cause__ is error


def test_another_error_of_the_model_stays_what_it_is(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HymbaModel, "forward", fails)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        train_sft(make_recipe(), None, tmp_path)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_a_stage_of_pairs_names_its_own_settings(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = HymbaModel.forward

    def fails(self: Any, *given: Any, **named: Any) -> Any:
        if self.training:
            raise MemoryError
        return whole(self, *given, **named)

    monkeypatch.setattr(HymbaModel, "forward", fails)
    with pytest.raises(HymbaAlignError) as raised:
        train_dpo(make_recipe(precompute_ref_log_probs=False), None, tmp_path)
    assert "dpo ran out of memory on cpu" in str(raised.value)
    assert "dpo.trainer.per_device_train_batch_size=1 dpo.trainer.gradient_accumulation_steps=2" in str(raised.value)


def overrides(setting: Setting, budget_gib: float) -> list[str]:
    """Remedies for the released model, each of which must fit."""
    found = list(remedies(RELEASED, setting, "sft", budget_gib * GIB))
    assert all(estimate(RELEASED, remedy.setting).total <= budget_gib * GIB for remedy in found)
    return [str(remedy) for remedy in found]


def test_what_changes_no_result_is_named_before_what_rounds_or_shortens() -> None:
    setting = Setting(batch=8, row_tokens=8192)
    needed = estimate(RELEASED, setting).total / GIB
    assert overrides(setting, 0.9 * needed)[0] == (
        "sft.trainer.per_device_train_batch_size=4 sft.trainer.gradient_accumulation_steps=2"
    )
    tight = overrides(setting, 40.0)
    assert len(tight) == 3
    assert "activation_checkpointing=true" in tight[0]
    lone = overrides(Setting(batch=1, row_tokens=8192, checkpointing=True), 32.0)
    assert lone
    assert any("bf16" in one or "max_length" in one for one in lone)


def test_several_devices_divide_what_one_cannot_hold() -> None:
    setting = Setting(batch=1, row_tokens=4096, checkpointing=True, compute_bytes=2, engine="ddp", processes=8)
    named = overrides(setting, 20.0)
    assert named[0] == "launch.launcher=zero2"
    assert named[1] == "launch.launcher=zero3"
    assert overrides(setting, 0.5) == []


def test_parameters_are_counted_exactly() -> None:
    for config in (
        HymbaConfig(),
        HymbaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=5, num_attention_heads=3,
            num_key_value_heads=1, v_head_dim=16, num_memory_tokens=5, sliding_window=6, global_attn_idx=[0, 4],
            kv_reuse_group=[[1, 2, 3]], mamba_d_state=4, mamba_dt_rank=3,
        ),
    ):  # fmt: skip
        with torch.device("meta"):
            model = HymbaForCausalLM(config)
        assert Shape.of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


LIMITED = """
import resource, sys
from pathlib import Path
from hymba_align.recipe import load_recipe
from hymba_align.train.sft import train_sft
from hymba_align.errors import HymbaAlignError
import hymba_align.train.sft as sft
whole = sft.run_stage
def limited(trainer, stage_dir):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    return whole(trainer, stage_dir)
sft.run_stage = limited
try:
    train_sft(load_recipe(sys.argv[1]), None, Path(sys.argv[2]))
except HymbaAlignError as error:
    print("SAID", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_an_allocator_that_finds_no_memory_is_recognised(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(rows=60, per_device_train_batch_size=16, packing=False)
    values = recipe.model_dump()
    values["dpo"] = None
    values["base"]["config"] |= {"hidden_size": 512, "intermediate_size": 4096, "v_head_dim": 512}
    (tmp_path / "recipe.yaml").write_text(type(recipe).model_validate(values).dump_yaml())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "recipe.yaml", "run"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "SAID sft ran out of memory on cpu of process 0" in done.stdout, done.stdout[-800:] + done.stderr[-1500:]
    assert "sft.trainer." in done.stdout
