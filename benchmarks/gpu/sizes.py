"""How large everything is: on a GPU, and in the smoke run that only shows that every section works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hymba_align.model import HymbaConfig


@dataclass(frozen=True)
class Sizes:
    """Everything that the sections ask for."""

    smoke: bool
    device: torch.device
    dtype: torch.dtype
    """of weights and activations where speed is measured"""
    config: HymbaConfig
    documents: tuple[int, ...]
    """tokens of the documents of a packed row"""
    pairs: int
    prompt: int
    answer: int
    """DPO: pairs per row, tokens of a prompt and of each answer"""
    context: int
    """tokens that every sequence has behind it when generation is timed"""
    decode_steps: int
    batches: tuple[int, ...]
    checked_lengths: tuple[int, ...]
    """segments of the row on which kernels are checked against the reference"""
    checked_channels: int
    rounds: int
    matmul: int
    """rows and columns of the matrices whose product measures the card's rate"""
    copied_bytes: int

    @property
    def row_tokens(self) -> int:
        return sum(self.documents)


# Lengths from 57 to 2,048 with a mean of 585, as the single sequences that PackMamba's figure stands beside
# (arXiv 2408.03865: 57 to 2,048, mean 646). They fill 8,192.
DOCUMENTS = (57, 128, 200, 256, 300, 384, 450, 512, 600, 640, 700, 921, 996, 2048)


def on_gpu() -> Sizes:
    """Hymba-1.5B in bfloat16 with rows of 8,192 tokens."""
    return Sizes(
        smoke=False,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        config=HymbaConfig(),
        documents=DOCUMENTS,
        pairs=10,
        prompt=512,
        answer=128,
        context=8128,
        decode_steps=32,
        batches=(1, 32, 128),
        checked_lengths=(1, 2, 3, 127, 128, 129, 1025, 4097),
        checked_channels=128,
        rounds=5,
        matmul=8192,
        copied_bytes=2**32,
    )


def in_smoke() -> Sizes:
    """Sizes at which the whole run takes seconds on a CPU; its times say nothing."""
    return Sizes(
        smoke=True,
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=HymbaConfig(**tiny_shape()),
        documents=(5, 9, 18),
        pairs=2,
        prompt=12,
        answer=4,
        context=40,
        decode_steps=2,
        batches=(1, 3),
        checked_lengths=(1, 2, 3, 5, 17),
        checked_channels=32,
        rounds=1,
        matmul=128,
        copied_bytes=2**20,
    )


def tiny_shape() -> dict[str, Any]:
    """A model with every kind of layer: global, local, sharing keys and values."""
    return {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "v_head_dim": 32,
        "num_memory_tokens": 8,
        "sliding_window": 16,
        "global_attn_idx": [0, 3],
        "kv_reuse_group": [[1, 2]],
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "max_position_embeddings": 256,
        "orig_max_position_embeddings": 64,
    }
