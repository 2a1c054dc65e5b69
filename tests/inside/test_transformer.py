"""The transformer beside a checkpoint: its shape, and its cache beside transformers' default one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig

from hymba_align.inside.transformer import (
    build_transformer,
    describe,
    fill_transformer_cache,
    held_bytes,
    rewind,
    transformer_cache_bytes,
    transformer_config,
)
from hymba_align.model import HymbaConfig

CPU = torch.device("cpu")


def test_beside_hymba_1_5b_it_is_llama_3_2_3b() -> None:
    found = describe(transformer_config(HymbaConfig()))
    assert found.parameters == 3_212_749_824  # as its model card counts: 3.21B
    assert (found.layers, found.hidden_size, found.heads, found.kv_heads) == (28, 3072, 24, 8)
    assert found.is_published_shape
    assert found.name == "Llama-3.2-3B's shape"


def test_a_few_tokens_more_in_the_vocabulary_or_another_context_change_nothing() -> None:
    released = transformer_config(HymbaConfig())
    for other in (HymbaConfig(vocab_size=32064), HymbaConfig(max_position_embeddings=4096, sliding_window=512)):
        assert transformer_config(other).to_dict() == released.to_dict()
    assert released.vocab_size == 128256


def test_beside_half_a_hymba_it_is_half_of_it() -> None:
    half = HymbaConfig(
        num_hidden_layers=16,
        hidden_size=800,
        intermediate_size=2752,
        num_attention_heads=25,
        num_key_value_heads=5,
        v_head_dim=64,
        vocab_size=16000,
        global_attn_idx=[0],
        kv_reuse_group=[],
    )
    found = transformer_config(half)
    assert (found.num_hidden_layers, found.hidden_size, found.head_dim, found.intermediate_size) == (14, 1536, 64, 4096)
    assert (found.num_attention_heads, found.num_key_value_heads) == (24, 8)  # the heads are as many, and half as wide
    half.num_key_value_heads = 25  # how the checkpoint shares its keys is its own affair
    assert transformer_config(half).to_dict() == found.to_dict()
    assert found.vocab_size == round(128256 * 16000 / 32001)
    described = describe(found)
    assert not described.is_published_shape
    assert described.name == "Llama-3.2-3B's shape scaled to this checkpoint"


@pytest.mark.parametrize(
    ("heads", "groups"), [(1, 1), (2, 2), (4, 1), (4, 2), (5, 5), (16, 1), (16, 2), (25, 5), (40, 2), (40, 5)]
)
def test_every_hymba_has_a_transformer_beside_it_that_computes(heads: int, groups: int) -> None:
    config = HymbaConfig(
        vocab_size=9,
        hidden_size=4 * heads,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        v_head_dim=8,
        global_attn_idx=[0],
        kv_reuse_group=[],
    )
    beside = transformer_config(config)
    assert beside.num_hidden_layers == 1
    assert beside.num_attention_heads == 3 * beside.num_key_value_heads
    model = build_transformer(beside, torch.float32, CPU)
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits
    assert logits.isfinite().all()
    assert describe(beside).parameters == sum(one.numel() for one in model.parameters())


@pytest.fixture(scope="module")
def beside() -> LlamaConfig:
    return transformer_config(AutoConfig.from_pretrained("tests/golden/tiny"))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_its_cache_gives_the_logits_of_the_default_cache(beside: LlamaConfig, dtype: torch.dtype, atol: float) -> None:
    model = build_transformer(beside, dtype, CPU)
    tokens, steps = 30, 4
    cache = fill_transformer_cache(beside, 2, tokens, tokens + steps, dtype, CPU)
    plain = DynamicCache(config=beside)
    for number, layer in enumerate(cache.layers):
        plain.update(layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone(), number)
    ids = torch.randint(0, beside.vocab_size, (2, steps), generator=torch.Generator().manual_seed(0))
    found, expected = (decode(model, one, ids) for one in (cache, plain))
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)  # observed 0 in float32, 0 in bfloat16
    rewind(cache, tokens)
    assert torch.equal(decode(model, cache, ids), found)
    rewind(cache, tokens - 1)
    assert not torch.equal(decode(model, cache, ids), found)


def decode(model: torch.nn.Module, cache: object, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each of the tokens, one at a time."""
    with torch.no_grad():
        return torch.stack([model(input_ids=one, past_key_values=cache).logits for one in ids.split(1, 1)])


def test_its_cache_holds_the_bytes_of_the_formula(beside: LlamaConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = fill_transformer_cache(beside, 3, 10, 24, dtype, CPU)
        assert held_bytes(cache) == transformer_cache_bytes(beside, 3, 24, dtype)


def test_its_weights_are_the_same_every_time_and_random(beside: LlamaConfig) -> None:
    first, second = (build_transformer(beside, torch.float32, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    weights = first["model.layers.0.self_attn.q_proj.weight"]
    assert weights.std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weights, first["model.layers.1.self_attn.q_proj.weight"])
