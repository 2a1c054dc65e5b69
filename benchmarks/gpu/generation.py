"""Generated tokens per second of batches whose sequences each hold their own context."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from measure import alternate

from gpu.device import seconds, synchronise, waited
from gpu.findings import Finding
from gpu.sizes import Sizes
from hymba_align.model import HymbaCache, HymbaForCausalLM
from hymba_align.model.decoding import run_prefix

SECTION = "generation"


@torch.no_grad()
def run(sizes: Sizes) -> Iterator[Finding]:
    """Tokens per second of decoding steps at each batch size, and of the prefill."""
    torch.manual_seed(0)
    with sizes.device:
        model: HymbaForCausalLM = HymbaForCausalLM(sizes.config)
    model.to(sizes.dtype).eval()
    ids = torch.randint(3, sizes.config.vocab_size, (1, sizes.context), device=sizes.device)
    start = run_prefix(model, []).cache
    prefill = seconds(lambda: model.model(input_ids=ids, use_cache=True), sizes.device, rounds=sizes.rounds, calls=1)
    yield Finding(
        SECTION,
        f"prefill of {sizes.context:,} tokens",
        f"{sizes.context / prefill:,.0f} tokens/s",
        numbers={"seconds": prefill},
    )
    sequence = start.expanded(1)
    model.model(input_ids=ids, past_key_values=sequence)
    for batch in sizes.batches:
        try:
            cache = filled(start, sequence, batch)

            spent = decode_seconds(model, cache, sizes, sizes.rounds)
        except torch.OutOfMemoryError as error:
            yield Finding(SECTION, f"batch {batch}", f"out of memory: {str(error).partition('.')[0]}", met=False)
            continue
        yield Finding(
            SECTION,
            f"batch {batch}, {sizes.context:,} tokens of context each",
            f"{batch / spent:,.0f} tokens/s, {1e3 * spent:.1f} ms per step, {cache.num_bytes / 1e9:.2f} GB of cache",
            numbers={"seconds_per_step": spent, "tokens_per_second": batch / spent, "cache_bytes": cache.num_bytes},
        )
        del cache


def filled(start: HymbaCache, sequence: HymbaCache, batch: int) -> HymbaCache:
    """A cache of so many sequences with a copy of `sequence` each: only what `start` holds is stored once."""
    cache = start.expanded(batch)
    for row in range(batch):
        cache.put(torch.tensor([row]), sequence)
    return cache


def decode_seconds(model: HymbaForCausalLM, cache: HymbaCache, sizes: Sizes, rounds: int) -> float:
    """Median seconds of a decoding step: one token per sequence, the likeliest one, read by the host as `decode` does."""
    newest = torch.ones(len(cache.lengths), 1, dtype=torch.int64, device=sizes.device)

    def steps() -> None:
        nonlocal newest
        for _ in range(each):
            hidden = model.model(input_ids=newest, past_key_values=cache).last_hidden_state
            tokens = model.lm_head(hidden[:, -1]).argmax(-1).tolist()
            newest = torch.tensor(tokens, device=sizes.device)[:, None]

    each = max(1, sizes.decode_steps // rounds)
    synchronise(sizes.device)
    return statistics.median(alternate({"steps": waited(steps, sizes.device)}, rounds=rounds)["steps"]) / each
