"""Trains the jobs of a file one after the other: `resume_worker.py JOBS`, under torchrun or alone.

A job is one stage of a recipe under one engine in one folder, which may begin as another's was when it was killed: with a
checkpoint, and records of later steps. The last one of several processes has no recipe: it saves and loads a model
divided by FSDP2, which accelerate does not run on a CPU.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from engine_worker import choose_engine, release
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Knows the step that training began after, and what each step could draw: here nothing else uses random numbers."""

    began_after = -1

    def __init__(self) -> None:
        self.draws: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import torch

        self.began_after = state.global_step
        torch.rand(args.process_index)  # processes go different ways, as dropout makes them

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import torch

        self.draws.append([random.random(), float(np.random.rand()), float(torch.rand(()))])


def as_if_killed(source: Path, folder: Path, step: int) -> None:
    """Copies a run's folder without `final`, and of its checkpoints that of one step alone."""
    others = {path.name for path in source.glob("checkpoint-*")} - {f"checkpoint-{step}"}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("final", *others))


def run_job(job: dict[str, Any]) -> None:
    """Trains `stage` of `recipe` in `folder`, from where the run that it `continues` was after `from_step`."""
    import datasets
    import torch

    from hymba_align.errors import HymbaAlignError
    from hymba_align.recipe import load_recipe
    from hymba_align.train import dpo, sft, stage_run
    from hymba_align.train.engine import running_engine

    datasets.config.HF_DATASETS_CACHE = Path(job["cache"])
    choose_engine(job["deepspeed"])
    folder, rank = Path(job["folder"]), int(os.environ.get("RANK", "0"))
    is_main, watch = rank == 0, Watch()
    if is_main and job.get("continues"):
        as_if_killed(Path(job["continues"]), folder, job["from_step"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    module, train = (sft, sft.train_sft) if job["stage"] == "sft" else (dpo, dpo.train_dpo)
    kept, draw_curves = (module.stage_callbacks, module.run_stage), stage_run.draw_curves

    def watched(trainer: Any, stage_dir: Path) -> dict[str, float]:
        try:
            return kept[1](trainer, stage_dir)
        finally:
            (folder / f"draws-{rank}.json").write_text(json.dumps(watch.draws))
            if is_main:
                groups = [[group["weight_decay"], group["lr"]] for group in trainer.optimizer.param_groups]
                began_after = watch.began_after
                observed = {"engine": running_engine(trainer), "groups": groups, "began_after": began_after}
                (folder / "observed.json").write_text(json.dumps(observed))
            release(trainer)

    module.stage_callbacks = lambda *given: [*kept[0](*given), watch]
    module.run_stage = watched
    stage_run.draw_curves = lambda stage_dir: stage_dir  # takes as long as training here
    fails = mock.patch("transformers.Trainer._save", disk_full) if is_main and job.get("disk_full") else None
    try:
        with fails or contextlib.nullcontext():
            train(load_recipe(job["recipe"]), None, folder)
    except HymbaAlignError as error:
        if not job.get("disk_full"):
            raise
        (folder / f"error-{rank}.txt").write_text(str(error))
    finally:
        module.stage_callbacks, module.run_stage = kept
        stage_run.draw_curves = draw_curves
        choose_engine(None)
    gc.collect()


def disk_full(*_: Any, **__: Any) -> None:
    """What writing the model's files does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def fsdp2_round_trip(folder: Path) -> None:
    """Trains a divided model on, and a second one from what was saved of the first; fsdp2.json says how they differ."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from hymba_align.model import HymbaConfig, HymbaForCausalLM
    from hymba_align.train.optimizer_state import gather_state, load_state, load_weights

    folder.mkdir(exist_ok=True)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    shape |= {"num_key_value_heads": 1, "v_head_dim": 16, "num_memory_tokens": 5, "sliding_window": 6}
    config = HymbaConfig(
        vocab_size=61, mamba_d_state=4, mamba_dt_rank=3, global_attn_idx=[0], kv_reuse_group=[], **shape
    )

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        model = HymbaForCausalLM(config)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(model: Any, optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed + dist.get_rank())
        ids = torch.randint(0, 61, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole(model: Any) -> dict[str, Any]:
        return {name: weight.detach().full_tensor().clone() for name, weight in model.named_parameters()}

    model, optimizer = build(0)
    train(model, optimizer, 10)
    train(model, optimizer, 20)
    weights, state = whole(model), gather_state(model, optimizer, keep=True)
    if dist.get_rank() == 0:
        save_file(weights, folder / "model.safetensors")
        state.save(folder / "optimizer.safetensors")
    dist.barrier()
    other, others = build(1)
    load_weights(other, others, folder)
    load_state(other, others, folder)
    loaded = whole(other)
    train(model, optimizer, 30)
    train(other, others, 30)
    ours, theirs = whole(model), whole(other)
    found = {
        "divided": all(isinstance(weight, DTensor) for weight in other.parameters()),
        "loaded": [name for name in weights if not torch.equal(weights[name], loaded[name])],
        "after a step": [name for name in ours if not torch.equal(ours[name], theirs[name])],
        "moved": all(not torch.equal(ours[name], weights[name]) for name in ours),
        "weights": len(ours),
    }
    if dist.get_rank() == 0:
        (folder / "fsdp2.json").write_text(json.dumps(found))


def main() -> None:
    """Runs the jobs, in all processes alike."""
    import torch

    for job in json.loads(Path(sys.argv[1]).read_text()):
        run_job(job)
    if torch.distributed.is_initialized():
        fsdp2_round_trip(Path.cwd() / "fsdp2")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
