"""Trains with answers to held-out problems under several engines: `answers_worker.py JOBS`, under torchrun.

The last part has no recipe: a model divided by FSDP2, which accelerate does not run on a CPU, generates.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_worker import choose_engine, release


def run_job(job: dict[str, Any]) -> None:
    """Trains a recipe's SFT under one engine into `folder`; observed.json says which it was."""
    from hymba_align.eval.matching import matcher
    from hymba_align.recipe import load_recipe
    from hymba_align.train import sft
    from hymba_align.train.engine import running_engine

    choose_engine(job["deepspeed"])
    folder, run_stage = Path(job["folder"]), sft.run_stage

    def watched(trainer: Any, stage_dir: Path) -> dict[str, float]:
        summary = run_stage(trainer, stage_dir)
        if dist.get_rank() == 0:
            (folder / "observed.json").write_text(json.dumps({"engine": running_engine(trainer), "summary": summary}))
        release(trainer)
        return summary

    sft.run_stage = watched
    recipe = load_recipe(job["recipe"])
    assert recipe.sft is not None
    assert recipe.sft.answers is not None
    try:
        sft.train_sft(recipe, None, folder, matcher(recipe.sft.answers.match))
    finally:
        sft.run_stage = run_stage
        choose_engine(None)
    gc.collect()


def generate_under_fsdp2(folder: Path) -> None:
    """Generates with a divided model, differently many tokens in each process, and trains on; fsdp2-RANK.json tells."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from hymba_align.model import HymbaConfig, HymbaForCausalLM
    from hymba_align.model.decoding import decode
    from hymba_align.train.whole_model import whole_model

    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    shape |= {"num_key_value_heads": 1, "v_head_dim": 16, "num_memory_tokens": 5, "sliding_window": 6}
    config = HymbaConfig(
        vocab_size=61,
        mamba_d_state=4,
        mamba_dt_rank=3,
        global_attn_idx=[0],
        kv_reuse_group=[],
        initializer_range=0.3,
        **shape,
    )
    torch.manual_seed(0)
    plain, tokens = HymbaForCausalLM(config).eval(), 4 + 9 * dist.get_rank()
    torch.manual_seed(0)
    model = HymbaForCausalLM(config).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))  # leaves the outermost weights together
    prompts = [[7, 8, 9], [10, 11]]
    with whole_model(model, torch.device("cpu")) as whole:
        found = [one.tokens for one in decode(whole, prompts, max_new_tokens=tokens)]
    expected = [one.tokens for one in decode(plain, prompts, max_new_tokens=tokens)]
    model(input_ids=torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()
    told = {
        "same": found == expected,
        "tokens": [len(one) for one in found],
        "divided": all(isinstance(weight, DTensor) for weight in model.parameters()),
        "training": model.training,
        "gradients": all(weight.grad is not None for weight in model.parameters()),
    }
    (folder / f"fsdp2-{dist.get_rank()}.json").write_text(json.dumps(told))


def main() -> None:
    """Runs the jobs, in both processes alike."""
    file = Path(sys.argv[1])
    for job in json.loads(file.read_text()):
        run_job(job)
    generate_under_fsdp2(file.parent)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
