"""An invented inspection of any size with every part in it: what findings, plots and pages are tried on.

Its numbers obey what measured ones obey (shares add up to 1, changes are differences); nothing else about them is real.
"""

from __future__ import annotations

import math
import random
from dataclasses import fields, is_dataclass, replace
from statistics import fmean
from typing import Any

from hymba_align.inside.findings import findings
from hymba_align.inside.result import (
    Alignment,
    Attention,
    AttentionMap,
    BranchSize,
    CacheCost,
    Cost,
    DecodeCost,
    Divergence,
    DomainAttention,
    Fusion,
    Importance,
    Inspection,
    LayerAttention,
    LayerFusion,
    LayerImportance,
    Measured,
    MetaMovement,
    MetaTokens,
    PairChange,
    Pairs,
    Preference,
    Removal,
    Shares,
    Shift,
    Transformer,
    WeightMovement,
)

WORDS = ("Mia", " has", " 4", " pens", " and", " buys", " 3", " more", ".", "\n", "How", " many", " pens", "?")
CHANCE = math.log(596)


def inspection(layers: int = 4, heads: int = 4, meta: int = 16, words: tuple[str, ...] = WORDS) -> Inspection:
    """Every part, with the first and last layer global."""
    rng = random.Random(layers * 1000 + heads)
    attention = make_attention(rng, layers, heads, meta, words)
    return Inspection(
        checkpoint="runs/arithmetic/dpo/final",
        against="runs/arithmetic/sft/final",
        created="2026-11-22T04:30:00+00:00",
        data="40 of 200 conversations of data/arithmetic/test.jsonl",
        documents=40,
        tokens=4_210,
        shape={
            "layers": layers,
            "hidden size": 192,
            "attention heads": heads,
            "meta tokens": meta,
            "parameters": 3_456_789,
        },
        dtype="float32",
        device="cpu",
        versions={"hymba-align": "0.7.0", "torch": "2.13.0"},
        hardware={"platform": "Linux", "cpu_count": 2, "memory_gib": 7.7, "gpu": None},
        seconds={"attention": 3.2, "importance": 8.9, "fusion": 1.0, "meta_tokens": 4.0, "alignment": 5.1, "cost": 7.7},
        left_out={},
        attention=attention,
        importance=(make_importance(rng, layers), make_task_importance(rng, layers)),
        fusion=make_fusion(rng, layers),
        meta_tokens=make_meta_tokens(rng, layers, meta),
        alignment=make_alignment(rng, layers, make_attention(rng, layers, heads, meta, words), words),
        cost=make_cost(),
    )


def filled(value: Any, number: float) -> Any:
    """The value with one number wherever it holds a measured one."""
    if isinstance(value, float):
        return number
    if isinstance(value, tuple):
        return tuple(filled(one, number) for one in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{field.name: filled(getattr(value, field.name), number) for field in fields(value)})


def make_shares(rng: random.Random, *, bos: bool) -> Shares:
    parts = [rng.random() ** 2 + 0.02, 0.3 * rng.random() if bos else 0.0, 0.5 * rng.random(), rng.random()]
    meta, first, own, cross = (part / sum(parts) for part in parts)
    even = 4.0 + rng.random()
    return Shares(meta, first, own, cross, even * (0.2 + 0.7 * rng.random()), even)


def mean_shares(shares: list[Shares]) -> Shares:
    names = ("meta", "bos", "self", "cross", "entropy", "even_entropy")
    return Shares(*(fmean([getattr(one, name) for one in shares]) for name in names))


def make_attention(rng: random.Random, layers: int, heads: int, meta: int, words: tuple[str, ...]) -> Attention:
    found = []
    for layer in range(layers):
        each = [make_shares(rng, bos=True) for _ in range(heads)]
        is_global = layer in (0, layers - 1)
        found.append(LayerAttention(layer, is_global, max(0, layer - layer % 2), mean_shares(each), tuple(each)))
    maps = tuple(make_map(rng, layer, meta, words) for layer in sorted({0, layers - 1}))
    return Attention(
        tokens=4_210,
        documents=40,
        longest=160,
        documents_with_bos=40,
        all_layers=mean_shares([layer.mean for layer in found]),
        global_layers=mean_shares([layer.mean for layer in found if layer.is_global]),
        local_layers=mean_shares([layer.mean for layer in found if not layer.is_global]) if layers > 2 else None,
        layers=tuple(found),
        maps=maps,
    )


def make_map(rng: random.Random, layer: int, meta: int, words: tuple[str, ...]) -> AttentionMap:
    rows = []
    for query in range(len(words)):
        mass = [rng.random() ** 3 + 0.3 * (key == 0) for key in range(query + 2)]
        rows.append(tuple(one / sum(mass) for one in mass) + (0.0,) * (len(words) - query - 1))
    total = fmean(row[0] for row in rows)
    each = [rng.random() ** 4 for _ in range(meta)]
    return AttentionMap(layer, True, "test.jsonl:3", words, tuple(total * one / sum(each) for one in each), tuple(rows))


def make_importance(rng: random.Random, layers: int) -> Importance:
    whole = 0.412

    def removal(change: float) -> Removal:
        return Removal(whole + change, Measured(change, 0.02 + 0.05 * abs(change)))

    each = []
    for layer in range(layers):
        attention, ssm = 0.9 * rng.random() ** 3, (5.98 if layer == 0 else 1.5 * rng.random() ** 2)
        each.append(
            LayerImportance(
                layer,
                layer in (0, layers - 1),
                removal(attention),
                removal(ssm),
                Measured(ssm - attention, 0.03 + 0.05 * abs(ssm - attention)),
            )
        )
    return Importance(
        "loss", "nats per token", True, Measured(whole, 0.031), CHANCE, n=1_890, documents=40, layers=tuple(each)
    )


def make_task_importance(rng: random.Random, layers: int) -> Importance:
    whole = 92.5

    def removal(change: float) -> Removal:
        return Removal(whole + change, Measured(change, 3.0))

    each = []
    for layer in range(layers):
        attention, ssm = -40 * rng.random() ** 2, (-92.5 if layer == 0 else -60 * rng.random() ** 2)
        each.append(
            LayerImportance(
                layer, layer in (0, layers - 1), removal(attention), removal(ssm), Measured(ssm - attention, 4.0)
            )
        )
    return Importance("gsm8k", "% correct", False, Measured(whole, 4.2), None, n=40, documents=40, layers=tuple(each))


def make_fusion(rng: random.Random, layers: int) -> Fusion:
    def size(before: float) -> BranchSize:
        scale = 0.8 + 0.4 * rng.random()
        return BranchSize(before, scale, scale, scale - 0.2 - 0.3 * rng.random(), scale + 0.2 + 0.5 * rng.random())

    each = []
    for layer in range(layers):
        attention, ssm = size(0.3 + rng.random()), size(5 * rng.random() + 0.1)
        share = ssm.after**2 / (ssm.after**2 + attention.after**2)
        each.append(LayerFusion(layer, layer in (0, layers - 1), attention, ssm, 0.4 * (rng.random() - 0.5), share))
    return Fusion(4_210, tuple(each))


def make_meta_tokens(rng: random.Random, layers: int, meta: int) -> MetaTokens:
    domains = []
    for name in ("maths", "code", "text", "function_calls"):
        mass = [0.6 * rng.random() ** 3 / meta for _ in range(meta)]
        by_layer = tuple(tuple(one * 2 * rng.random() for one in mass) for _ in range(layers))
        share = tuple(one / sum(mass) for one in mass)
        stderr = tuple(0.05 * one + 1e-4 for one in share)
        domains.append(
            DomainAttention(
                domain=name,
                source="what ships with the package",
                documents=20,
                tokens=2_000,
                mass=tuple(mass),
                stderr=stderr,
                by_layer=by_layer,
                share=share,
                unknown=0.0,
                characters_per_token=3.1,
            )
        )
    preferences = (
        Preference(3, "maths", 0.031, 0.012, 0.11, 0.05, 7.9),
        Preference(meta - 1, "code", 0.020, 0.009, 0.08, 0.03, 5.1),
    )
    movement = tuple(
        MetaMovement(token, 0.1 * rng.random(), 0.02 * rng.random() + 0.001, 0.999) for token in range(meta)
    )
    return MetaTokens(tuple(domains), preferences, 3.4, movement, first_tokens=400)


def make_alignment(rng: random.Random, layers: int, before: Attention, words: tuple[str, ...]) -> Alignment:
    parts = [(layer, part) for layer in range(layers) for part in ("attention", "ssm", "fusion", "mlp", "norms")]
    parts += [(None, part) for part in ("embeddings", "meta tokens", "final norm")]  # type: ignore[list-item]
    distances = [0.05 + rng.random() for _ in parts]
    total = sum(one * one for one in distances)
    weights = tuple(
        WeightMovement(layer, part, 10_000, distance, 0.01 * distance, distance**2 / total)
        for (layer, part), distance in zip(parts, distances, strict=True)
    )
    whole = WeightMovement(None, "all weights", 3_456_789, math.sqrt(total), 0.0061, 1.0)
    return Alignment("runs/arithmetic/sft/final", weights, whole, before, make_pairs(rng), make_divergence(rng, words))


def make_pairs(rng: random.Random, n: int = 32, chosen: float = -0.05, rejected: float = -0.4) -> Pairs:
    """Pairs whose answers move by these nats per token, give or take a fifth."""
    each = []
    for number in range(n):
        tokens = rng.randint(8, 30), rng.randint(8, 30)
        before = tuple(-0.1 * count * (1 + rng.random()) for count in tokens)
        moved = [change + rng.gauss(0, 0.2) * max(abs(change), 0.1) for change in (chosen, rejected)]
        after = [start + change * count for start, change, count in zip(before, moved, tokens, strict=True)]
        each.append(PairChange(f"test.jsonl:{number + 1}", *tokens, before[0], after[0], before[1], after[1]))
    return pairs_of(tuple(each))


def pairs_of(each: tuple[PairChange, ...]) -> Pairs:
    def measured(values: list[float]) -> Measured:
        mean = fmean(values)
        spread = sum((value - mean) ** 2 for value in values)
        return Measured(mean, math.sqrt(spread / (len(values) - 1) / len(values)))

    return Pairs(
        source="data/arithmetic/test.jsonl",
        pairs=each,
        chosen_change=measured([(one.chosen_after - one.chosen_before) / one.chosen_tokens for one in each]),
        rejected_change=measured([(one.rejected_after - one.rejected_before) / one.rejected_tokens for one in each]),
        margin_change=measured(
            [one.chosen_after - one.rejected_after - one.chosen_before + one.rejected_before for one in each]
        ),
        preferred_before=fmean(one.chosen_before > one.rejected_before for one in each),
        preferred_after=fmean(one.chosen_after > one.rejected_after for one in each),
        chosen_fell=fmean(one.chosen_after < one.chosen_before for one in each),
    )


def make_divergence(rng: random.Random, words: tuple[str, ...]) -> Divergence:
    bins = tuple((first, first + 15, 0.01 + 0.0002 * first) for first in range(0, 160, 16))
    largest = tuple(
        Shift("test.jsonl:4", "".join(words[:6]), words[index], 1.2 - 0.1 * index, words[0], words[1])
        for index in range(min(6, len(words)))
    )
    return Divergence(
        source="data/arithmetic/test.jsonl",
        documents=40,
        tokens=1_890,
        kl=Measured(0.031, 0.004),
        reverse_kl=Measured(0.029, 0.004),
        loss_before=Measured(0.420, 0.031),
        loss_after=Measured(0.412, 0.031),
        entropy_before=Measured(0.40, 0.02),
        entropy_after=Measured(0.35, 0.02),
        same_likeliest=0.972,
        by_position=bins,
        largest=largest,
        loss_change=Measured(-0.008, 0.006),
        entropy_change=Measured(-0.05, 0.008),
        kl_growth=Measured(0.011, 0.003),
        halved_documents=40,
        end_change=Measured(-0.30, 0.05),
        ended_documents=40,
    )


def make_cost() -> Cost:
    def cache(context: int) -> CacheCost:
        ours, theirs = 500_000 + 1_200 * context, 5_100 * context
        return CacheCost(context, ours, ours - 300_000, ours, theirs, theirs)

    decode = (DecodeCost(1_024, 310.0, 190.0, 1.63, 1.50, 1.71), DecodeCost(8_192, 280.0, 61.0, 4.60, 4.2, 4.9))
    transformer = Transformer("Llama-3.2-3B's proportions, 8.1M parameters", 8_100_000, 4, 256, 4, 2, False)
    contexts = (1_024, 8_192)
    return Cost("float32", "cpu", 2, 1, 5, 16, 3_456_789, transformer, tuple(map(cache, contexts)), decode)


def said(inspection: Inspection, part: str, *, signs: bool | None = None) -> list[str]:
    return [one.text for one in findings(inspection) if one.part == part and signs in (None, one.sign)]


def about(sentences: list[str], words: str) -> str:
    """The one sentence with these words."""
    (found,) = [sentence for sentence in sentences if words in sentence]
    return found
