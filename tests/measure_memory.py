"""Measures the peak memory of two training steps: `measure_memory.py CASES`, one process per case, which it forks.

A case is a configuration and what is trained on. Printed is a list of [bytes that the case added at its peak].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.train.sft import labelled_positions


def train(case: dict[str, Any], steps: int) -> None:
    """What a stage does, without its data: loss on labelled positions, backward pass, AdamW."""
    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig(**case["config"])).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if case["checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, model.config.vocab_size, (1, case["tokens"]))
    labels = ids.clone()
    labels[:, : int(case["tokens"] * (1 - case["labelled"]))] = -100
    for _ in range(steps):
        for _ in range(case["accumulation"]):
            model(input_ids=ids, labels=labels, fused_lm_head=True, **labelled_positions(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def status(key: str) -> int:
    """Bytes of a line of this process's status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def measure(case: dict[str, Any]) -> int:
    """Bytes at the peak of a process of its own, beyond those of the libraries."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the parent
        before = status("VmRSS")
        train(case, 2)
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    _, code = os.waitpid(child, 0)
    assert code == 0, "the case failed; see above"
    return int(os.read(read, 100))


def main() -> None:
    torch.set_num_threads(1)  # a forked process has no threads of the parent's
    cases = json.loads(sys.argv[1])
    warm = {"config": {**cases[0]["config"], "hidden_size": 32, "v_head_dim": 16, "intermediate_size": 32}}
    train({**cases[0], **warm, "tokens": 64}, 1)  # loads what is loaded on first use
    print(json.dumps([measure(case) for case in cases]))


if __name__ == "__main__":
    main()
