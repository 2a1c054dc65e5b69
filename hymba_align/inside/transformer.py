"""The transformer that stands beside a checkpoint: Llama-3.2-3B's shape for Hymba-1.5B, as much smaller for a smaller one.

It is transformers' own Llama with random weights: what decoding costs depends on shapes, not on values. Its cache is
transformers' StaticCache, which writes in place; the default one copies all keys and values at every step, which would
make the transformer look slow for no reason of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from hymba_align.inside.result import Transformer
from hymba_align.model.configuration import HymbaConfig

LLAMA_3B = {
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
}
"""Llama-3.2-3B. Source: its published config.json."""

WIDTH_STEP = 8
"""The hidden size is a multiple of so many per head."""


def transformer_config(config: HymbaConfig) -> LlamaConfig:
    """The transformer's configuration beside that of a checkpoint.

    Every size is the checkpoint's own, times Llama-3.2-3B's over Hymba-1.5B's, rounded: layers (7/8), hidden size (1.92),
    head size (2), query heads (24/25), MLP and vocabulary. Query heads share keys and values by threes, as in Llama-3.2-3B
    and whatever the checkpoint's do: how a checkpoint groups its own heads is its merit or fault, and not the transformer's.
    The hidden size is a multiple of 8 times the query heads. For Hymba-1.5B this is Llama-3.2-3B, whatever the size of its
    vocabulary.
    """
    released = HymbaConfig()  # its defaults are Hymba-1.5B's

    def scaled(size: str, unit: int = 1) -> int:
        exact = LLAMA_3B[size] * getattr(config, size) / getattr(released, size)
        return unit * max(1, round(exact / unit))

    shared_by = LLAMA_3B["num_attention_heads"] // LLAMA_3B["num_key_value_heads"]
    heads = scaled("num_attention_heads", shared_by)
    sizes: dict[str, Any] = {
        "num_hidden_layers": scaled("num_hidden_layers"),
        "hidden_size": scaled("hidden_size", WIDTH_STEP * heads),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // shared_by,
        "head_dim": scaled("head_dim", 2),  # RoPE turns pairs
        "intermediate_size": scaled("intermediate_size"),
        "vocab_size": LLAMA_3B["vocab_size"],
    }
    if sizes != LLAMA_3B:
        sizes["vocab_size"] = scaled("vocab_size")
    return LlamaConfig(
        **sizes,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,  # Llama's own may lie outside of a small vocabulary
    )


def describe(config: LlamaConfig) -> Transformer:
    """Its sizes, for a report."""
    published = all(getattr(config, name) == size for name, size in LLAMA_3B.items())
    with torch.device("meta"):
        parameters = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    return Transformer(
        name="Llama-3.2-3B's shape" if published else "Llama-3.2-3B's shape scaled to this checkpoint",
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=_key_values(config)[0],
        is_published_shape=published,
    )


def build_transformer(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model with random weights, the same at every call; the caller's random numbers are left as they were."""
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu), device:
        torch.manual_seed(0)
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def transformer_cache_bytes(config: LlamaConfig, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Memory of keys and values of so many rows of so many tokens."""
    groups, size = _key_values(config)
    return 2 * config.num_hidden_layers * rows * tokens * groups * size * dtype.itemsize


def _key_values(config: LlamaConfig) -> tuple[int, int]:
    """Key/value heads and their size, which the configuration fills in where nobody names them."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return config.num_key_value_heads, config.head_dim


def fill_transformer_cache(
    config: LlamaConfig, rows: int, tokens: int, slots: int, dtype: torch.dtype, device: torch.device
) -> StaticCache:
    """A cache with room for so many slots per row, of which `tokens` hold random keys and values."""
    cache = StaticCache(config=config, max_cache_len=slots)
    groups, size = _key_values(config)
    shape = rows, groups, tokens, size
    generator = torch.Generator(device).manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(2))
    for layer in range(config.num_hidden_layers):
        cache.update(keys, values, layer)
    return cache


def rewind(cache: StaticCache, tokens: int) -> None:
    """Forgets what follows the first so many tokens: the next ones are written over it."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.cumulative_length.fill_(tokens)


def held_bytes(cache: StaticCache) -> int:
    """Memory of the keys and values that a cache holds, counted as allocated."""
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
