"""Trains a small Hymba sharded by accelerate's FSDP2 and whole, side by side: `fsdp2_worker.py RESULTS`, under torchrun.

Each process has its own rows; the whole model gets all of them. accelerate never takes this path on a CPU, so its
function that shards a model is called here, with no more of an accelerator than it reads.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree

RANK_LENGTHS = ([21, 1, 17], [5, 8])
"""Documents of each process's row."""


def tokens(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def packed(rank: int) -> dict[str, Any]:
    """A row of documents, every token of which but the first of each is trained."""
    lengths = RANK_LENGTHS[rank]
    ids = tokens(1, sum(lengths), seed=rank)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": starts}


def tree(rank: int) -> dict[str, Any]:
    lengths, parents = [[9, 4, 6, 3], [12, 2, 5]][rank], [[-1, 0, 0, 2], [-1, 0, 0]][rank]
    ids = tokens(1, sum(lengths), seed=10 + rank)
    return {"input_ids": ids, "labels": ids, "segments": SegmentTree(lengths, parents)}


def preferences(rank: int) -> dict[str, Any]:
    """TRL's batch [chosen; rejected] of two pairs, or of one, with prompts of five tokens that are computed once."""
    pairs = 2 - rank
    prompt = tokens(pairs, 5, seed=20 + rank).repeat(2, 1)
    replies = tokens(2 * pairs, 7, seed=30 + rank)
    labels = torch.cat([torch.full_like(prompt, -100), replies], dim=1)
    shared = torch.full((pairs,), 5)
    return {"input_ids": torch.cat([prompt, replies], dim=1), "labels": labels, "shared_prefix_lengths": shared}


def own_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Summed loss of the model's own head."""
    return model(**batch, return_logits=False, num_items_in_batch=1).loss


def fused_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Summed loss as TRL computes it: the backbone, then the head's weight without the head."""
    return -model(**batch, fused_lm_head=True).log_probs.sum()


Case = tuple[Callable[[int], dict[str, Any]], Callable[[Any, dict[str, Any]], Tensor], bool]
CASES: dict[str, Case] = {
    "packed row": (packed, own_loss, False),
    "packed row, recomputed": (packed, own_loss, True),
    "packed row, TRL's head": (packed, fused_loss, False),
    "tree": (tree, own_loss, False),
    "preferences, TRL's head": (preferences, fused_loss, False),
    "preferences, TRL's head, recomputed": (preferences, fused_loss, True),
}


def build_model() -> HymbaForCausalLM:
    """The same weights in every process; layers 1 and 2 share keys and values."""
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        v_head_dim=16,
        num_memory_tokens=5,
        sliding_window=6,
        global_attn_idx=[0, 3],
        kv_reuse_group=[[1, 2]],
        mamba_d_state=4,
        mamba_dt_rank=3,
        max_position_embeddings=128,
        orig_max_position_embeddings=64,
        initializer_range=0.2,
    )
    return HymbaForCausalLM(config).train()


def shard(model: HymbaForCausalLM) -> Any:
    """The model as accelerate shards it for `accelerate_configs/fsdp2.yaml`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=True,
    )
    return fsdp2_prepare_model(accelerator, model)


def run_case(make: Callable[[int], dict[str, Any]], loss_of: Any, recomputed: bool) -> dict[str, Any]:
    """How far two steps of the sharded model are from those of the whole one."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = build_model()
    sharded = copy.deepcopy(whole)
    for model in (whole, sharded):
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if loss_of is fused_loss:
            add_fused_lm_head(model)
    sharded = shard(sharded)
    kinds = {name: type(weight).__name__ for name, weight in sharded.named_parameters()}
    local = sum(weight.to_local().numel() for weight in sharded.parameters())
    # A rate that carries the rounding of gradients near zero no further than the weights' own.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4) for model in (whole, sharded)]
    batches = [make(number) for number in range(processes)]
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    found: dict[str, Any] = {
        "classes": sorted({type(module).__name__ for module in sharded.modules() if hasattr(module, "unshard")}),
        "sharded": sum(kind == "DTensor" for kind in kinds.values()),
        "parameters": len(kinds),
        "share": local / sum(weight.numel() for weight in whole.parameters()),
        "steps": [],
    }
    for _ in range(2):
        losses = []
        for batch in batches:
            loss = loss_of(whole, batch) / labelled
            loss.backward()
            losses.append(float(loss))
        own = loss_of(sharded, batches[rank]) / labelled
        (own * processes).backward()  # gradients are averaged over the processes
        total = own.detach().clone()
        torch.distributed.all_reduce(total)
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) for model in (whole, sharded)]
        gradients = max_difference(whole, sharded, lambda weight: weight.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found["steps"].append(
            {
                "losses": [sum(losses), float(total)],
                "norms": [float(full(norm)) for norm in norms],
                "gradients": gradients,
                "weights": max_difference(whole, sharded, lambda weight: weight.detach()),
            }
        )
    return found


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def max_difference(whole: Any, sharded: Any, read: Callable[[Any], Tensor]) -> dict[str, float]:
    """By name, over parameters; those of one model are those of the other."""
    ours, theirs = dict(sharded.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    return {name: float((full(read(ours[name])) - read(theirs[name])).abs().max()) for name in theirs}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    found = {name: run_case(*case) for name, case in CASES.items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
