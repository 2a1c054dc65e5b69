"""The benchmark of what decoding costs, on made-up numbers and at sizes of seconds."""

from __future__ import annotations

from dataclasses import replace

import inspect_cost
import pytest
from transformers import AutoConfig

from hymba_align.inside.result import CacheCost, Cost, DecodeCost, Transformer

COST = Cost(
    dtype="float32",
    device="cpu",
    threads=1,
    batch_size=1,
    rounds=3,
    steps=8,
    parameters=2_000_000,
    transformer=Transformer("Llama's shape", 5_000_000, 4, 360, 3, 3, False),
    cache=(
        CacheCost(512, 1_000_000, 800_000, 1_000_000, 3_000_000, 3_000_000),
        CacheCost(2048, 4_000_000, 3_800_000, None, 12_000_000, None),
    ),
    decode=(DecodeCost(512, 20.0, 10.0, 2.1, 1.5, 2.5),),
    not_timed="At 2,048 tokens nothing was timed.",
)


def test_a_context_that_was_not_timed_has_dashes_and_the_reason_stands_above() -> None:
    timed = ("tiny, float32", "512", "1.0", "3.0", "3.00", "3.75", "20.0", "10.0", "2.10 (1.50 to 2.50)")
    assert inspect_cost.rows("tiny", COST) == [
        timed,
        ("tiny, float32", "2,048", "4.0", "12.0", "3.00", "3.16", "–", "–", "–"),
    ]
    assert inspect_cost.beside("tiny", COST) == (
        "tiny: 2.0 million parameters beside 5.0 million (Llama's shape: 4 layers of 360, 3 heads, 3 of keys and values). "
        "At 2,048 tokens nothing was timed."
    )


def test_bytes_that_differ_from_the_formula_are_missed() -> None:
    assert inspect_cost.differing(COST) == []
    wrong = replace(COST.cache[0], transformer_measured=9)
    assert inspect_cost.differing(replace(COST, cache=(wrong,))) == [
        "the transformer's cache at 512 tokens has 9 bytes, by the formula 3000000"
    ]


def test_caches_that_decode_other_tokens_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained("tests/golden/tiny")
    seconds = inspect_cost.compare_caches(config, 40, rounds=1, steps=3)
    assert set(seconds) == {"StaticCache", "DynamicCache"}
    assert all(spent > 0 for spent in seconds.values())
    tokens = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(inspect_cost, "decode", lambda model, cache, steps: next(tokens))
    with pytest.raises(SystemExit, match=r"^the caches decode other tokens: \[1, 2\] and \[1, 3\]$"):
        inspect_cost.compare_caches(config, 40, rounds=1, steps=3)
