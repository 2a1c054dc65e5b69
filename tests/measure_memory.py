"""Measures the peak memory of training steps: `measure_memory.py CASES`, in processes that it forks for each case.

A case is a configuration and how it is trained. Printed is a list of the bytes that each case added at its peak, in the
process of its ranks that took most.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.train.dpo_trainer import ScoresLabels
from hymba_align.train.sft import labelled_positions

BETA = 0.1


def build(case: dict[str, Any]) -> nn.Module:
    """The model as a stage has it before its engine: with TRL's head, adapters and recomputation."""
    torch.manual_seed(0)
    model: Any = HymbaForCausalLM(HymbaConfig(**case["config"])).train()
    if "lora" in case:
        model = get_peft_model(model, LoraConfig(lora_alpha=16, **case["lora"]))
        add_fused_lm_head(model.base_model.model, outputs=("log_probs", "entropy", "is_top1"))
    else:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if case["checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def ids_and_labels(case: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, case["config"]["vocab_size"], (rows, case["tokens"]))
    labels = ids.clone()
    labels[:, : int(case["tokens"] * (1 - case["labelled"]))] = -100
    return ids, labels


def sft_loss(model: nn.Module, case: dict[str, Any]) -> Tensor:
    ids, labels = ids_and_labels(case, 1)
    loss: Tensor = model(input_ids=ids, labels=labels, fused_lm_head=True, **labelled_positions(labels)).loss
    return loss


def dpo_loss(model: nn.Module, case: dict[str, Any], reference: nn.Module | None) -> Tensor:
    """Of one pair, both sides whole, as `_compute_loss` of TRL's trainer does; a reference beside it where there is one."""
    ids, labels = ids_and_labels(case, 2)

    def score(scored: nn.Module) -> Tensor:
        total: Tensor = ScoresLabels(scored)(
            input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True
        ).log_probs
        return total.sum(dim=1)

    policy = score(model)
    with torch.no_grad():
        margin = score(reference) if reference is not None else torch.zeros(2)
    chosen, rejected = (policy - margin).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def train(case: dict[str, Any], steps: int) -> None:
    """What a stage does, without its data: loss on labelled positions, backward pass, AdamW."""
    model = build(case)
    reference = build(case).eval().requires_grad_(False) if case.get("reference") else None
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    if "engine" in case:
        train_with_engine(model, optimizer, case, steps)
        return
    for _ in range(steps):
        for _ in range(case["accumulation"]):
            (dpo_loss(model, case, reference) if case.get("pairs") else sft_loss(model, case)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_engine(model: nn.Module, optimizer: torch.optim.Optimizer, case: dict[str, Any], steps: int) -> None:
    """The same in one of several processes, prepared by accelerate as transformers' trainer does."""
    from accelerate import Accelerator, PartialState

    from hymba_align.processes.engines import use_engine
    from hymba_align.recipe import LaunchSection

    use_engine(LaunchSection(launcher=case["engine"], num_processes=case["processes"]))
    PartialState(cpu=case["engine"] == "ddp", backend="gloo")
    accelerator = Accelerator(gradient_accumulation_steps=case["accumulation"])
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(steps):
        for _ in range(case["accumulation"]):
            with accelerator.accumulate(model):
                accelerator.backward(sft_loss(model, case))
                optimizer.step()
                optimizer.zero_grad()


def status(key: str) -> int:
    """Bytes of a line of this process's status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def in_processes(case: dict[str, Any]) -> Iterator[int]:
    """Bytes at the peak of each of the case's processes, beyond those of the libraries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = case.get("processes", 1)
    started = []
    for rank in range(processes):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            if processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                given = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in given.items()})
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the parent
            before = status("VmRSS")
            try:
                train(case, 1 if "lora" in case else 2)  # the second has the optimizer's state, small for adapters
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os.write(write, str(status("VmHWM") - before).encode())
            os._exit(0)
        os.close(write)
        started.append((child, read))
    for child, read in started:
        _, code = os.waitpid(child, 0)
        assert code == 0, "the case failed; see above"
        yield int(os.read(read, 100))


def main() -> None:
    torch.set_num_threads(1)  # a forked process has no threads of the parent's
    cases = json.loads(sys.argv[1])
    small = {"hidden_size": 32, "v_head_dim": 16, "intermediate_size": 32}
    for case in cases:  # loads what is loaded on first use
        if "engine" in case:
            import deepspeed  # noqa: F401
        else:
            train({**case, "config": {**case["config"], **small}, "tokens": 64}, 1)
    print(json.dumps([max(in_processes(case)) for case in cases]))


if __name__ == "__main__":
    main()
