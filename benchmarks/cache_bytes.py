"""Bytes of the generation cache at 8,192 tokens, 1.5B configuration, bfloat16, batch 1 and 128.

    python benchmarks/cache_bytes.py [--output benchmarks/cache_bytes.md]

Batch 1 is counted on a real cache, filled through the same `commit` that a forward pass calls; no model is needed for
that, since bytes do not depend on values. Batch 128 is the same cache with its row repeated on torch's meta device, which
allocates nothing. Exits with 1 when keys and values take more than the paper's figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Table, finish

from hymba_align.model import HymbaCache, HymbaConfig, SegmentTree
from hymba_align.model.cache import LayerUpdate

TOKENS = 8192
PAPER_BYTES = 79e6
"""Keys and values of one sequence of 8,192 tokens. Source: Hymba (arXiv 2411.13676); DESIGN.md, section 6."""
LLAMA_BYTES = 28 * TOKENS * 8 * (128 + 128) * 2
"""Llama-3.2-3B: 28 layers, 8 key/value heads of 128 each for keys and values, bfloat16."""


@dataclass(frozen=True)
class Bytes:
    """What a cache holds."""

    shared: int
    """keys and values that all rows share: those of the meta tokens"""
    keys_values: int
    """keys and values, the shared ones included"""
    states: int
    """convolution tails and SSM states"""


def fill(config: HymbaConfig, tokens: int, piece: int) -> HymbaCache:
    """A cache of one sequence of so many zeros, taken in piece by piece."""
    cache = HymbaCache(config)
    row = torch.zeros(1, dtype=torch.int64)
    for first in range(0, tokens, piece):
        new = min(piece, tokens - first)
        before = 0 if first else config.num_memory_tokens
        segments = 1 if first else 2
        update = LayerUpdate(
            k=torch.zeros(before + new, config.num_key_value_heads, config.head_dim, dtype=torch.bfloat16),
            v=torch.zeros(before + new, config.num_key_value_heads, config.v_head_dim, dtype=torch.bfloat16),
            conv_tail=torch.zeros(segments, config.mamba_d_conv - 1, config.inner_size, dtype=torch.bfloat16),
            ssm_state=torch.zeros(segments, config.inner_size, config.mamba_d_state),
        )
        with torch.no_grad():
            cache.commit([update] * config.num_hidden_layers, SegmentTree.from_lengths([new]), row, new)
    return cache


def repeat(cache: HymbaCache, rows: int) -> HymbaCache:
    """A cache of so many rows like the only one of `cache`, on the meta device."""
    for state in cache.states:
        state.conv_tail, state.ssm_state = state.conv_tail.to("meta"), state.ssm_state.to("meta")
        if (stored := state.key_values) is not None:
            stored.keys, stored.values = stored.keys.to("meta"), stored.values.to("meta")
    cache.batch_repeat_interleave(rows)
    return cache


def count(cache: HymbaCache) -> Bytes:
    """The cache's bytes by kind; they add up to its `num_bytes`."""
    stored = [state.key_values for state in cache.states if state.key_values is not None]
    shared = sum(tensor.nbytes for one in stored for tensor in one.shared)
    own = sum(one.keys.nbytes + one.values.nbytes for one in stored)
    states = sum(state.conv_tail.nbytes + state.ssm_state.nbytes for state in cache.states)
    if cache.num_bytes != shared + own + states:
        raise SystemExit(f"the cache says {cache.num_bytes} bytes, but its parts have {shared + own + states}")
    return Bytes(shared, shared + own, states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    config = HymbaConfig()
    table = Table(
        "Cache at 8,192 tokens, 1.5B configuration, bfloat16",
        "python benchmarks/cache_bytes.py",
        ("cache", "keys and values, MB", "of which shared by all rows", "tails and states, MB", "paper's keys and values", "Llama-3.2-3B", "wanted"),
        "MB are millions of bytes, counted as allocated. The paper's figure, 79 MB per sequence, counts keys and values "
        "alone; so does that of Llama-3.2-3B. SSM states are float32. A cache that grew token by token has slack of at most "
        "256 slots per row in its three global layers, and none at the end of the context.",
    )  # fmt: skip
    missed = []
    for name, rows, piece in (
        ("batch 1, one pass", 1, TOKENS),
        ("batch 1, in pieces of 100 tokens", 1, 100),
        ("batch 128", 128, TOKENS),
    ):
        cache = fill(config, TOKENS, piece)
        found = count(repeat(cache, rows) if rows > 1 else cache)
        limit = rows * PAPER_BYTES
        if found.keys_values > limit:
            missed.append(f"{name}: {found.keys_values / 1e6:.1f} MB, wanted at most {limit / 1e6:.0f}")
        megabytes = (found.keys_values, found.shared, found.states, limit, rows * LLAMA_BYTES)
        table.add(name, *(f"{size / 1e6:,.1f}" for size in megabytes), f"≤ {limit / 1e6:,.0f}")
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
