"""Sentences follow the numbers: each of them changes or goes when its numbers do."""

from __future__ import annotations

import math
import random
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.inside.evidence import is_above, is_below, limit, of_problems
from hymba_align.inside.findings import findings
from hymba_align.inside.result import (
    DomainAttention,
    Inspection,
    Measured,
    MetaTokens,
)

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
said: Callable[..., list[str]] = MADE_UP["said"]
about: Callable[[list[str], str], str] = MADE_UP["about"]


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return make()


# ---- what is more than chance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "comparisons", "exact"),
    [(5, 1, 2.7764), (10, 1, 2.2622), (41, 1, 2.0211), (101, 8, 2.7943), (41, 64, 3.6364)],
)
def test_the_limit_is_students_t_divided_among_the_comparisons(n: int, comparisons: int, exact: float) -> None:
    assert limit(n, comparisons) == pytest.approx(exact, rel=1e-3)  # exact: scipy.stats.t.ppf(1 - 0.025 / m, n - 1)


def test_fewer_than_five_documents_support_no_claim() -> None:
    assert limit(4) == math.inf
    assert not is_above(Measured(100.0, 0.001), 0.0, 4)
    assert is_above(Measured(100.0, 0.001), 0.0, 5)


def test_a_mean_without_a_standard_error_supports_no_claim() -> None:
    assert not is_above(Measured(1.0), 0.0, 100)
    assert not is_above(Measured(1.0, 0.0), 0.0, 100)
    assert not is_below(Measured(-math.inf, 1.0), 0.0, 100)


def test_chance_alone_is_called_more_than_chance_in_five_of_a_hundred_draws() -> None:
    rng = random.Random(0)

    def draw(n: int) -> Measured:
        values = [rng.gauss(0, 1) for _ in range(n)]
        mean = sum(values) / n
        return Measured(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n))

    drawn = [draw(6) for _ in range(4000)]
    false = sum(is_above(one, 0.0, 6) or is_below(one, 0.0, 6) for one in drawn)
    assert false / 4000 == pytest.approx(0.05, abs=0.012)  # three standard errors of 4,000 draws


def test_problems_that_all_go_alike_have_the_error_of_laplaces_rule() -> None:
    assert of_problems(Measured(-100.0, 0.0), 8).stderr == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 8))
    assert of_problems(Measured(-50.0, 17.0), 8).stderr == 17.0


# ---- attention -------------------------------------------------------------------------------------------------------


def test_attention_is_told_by_its_shares(inspection: Inspection) -> None:
    assert inspection.attention is not None
    shares = replace(inspection.attention.all_layers, meta=0.5, bos=0.125, self=0.125, cross=0.25)
    changed = replace(inspection, attention=replace(inspection.attention, all_layers=shares))
    assert said(changed, "attention")[0] == (
        "Text tokens put 50.0 % of their attention on the meta tokens, 12.5 % on themselves, 25.0 % on other tokens and "
        "12.5 % on the <s> that begins 40 of 40 documents (mean over layers, heads and 4,210 tokens)."
    )


def test_without_a_beginning_token_none_is_spoken_of(inspection: Inspection) -> None:
    assert inspection.attention is not None
    changed = replace(inspection, attention=replace(inspection.attention, documents_with_bos=0))
    assert "none on <s>, with which no document begins" in said(changed, "attention")[0]


def test_heads_with_a_majority_on_meta_tokens_are_counted(inspection: Inspection) -> None:
    assert inspection.attention is not None
    layer, *others = inspection.attention.layers
    heads = (replace(layer.heads[0], meta=0.99), *(replace(head, meta=0.45) for head in layer.heads[1:]))
    rest = tuple(replace(one, heads=tuple(replace(head, meta=0.2) for head in one.heads)) for one in others)
    attention = replace(inspection.attention, layers=(replace(layer, heads=heads), *rest))
    assert about(said(replace(inspection, attention=attention), "attention"), "more than half") == (
        "1 of 16 heads puts more than half of its attention on meta tokens; head 0 of layer 0 puts the most there, 99.0 %."
    )


# ---- fusion and meta tokens ------------------------------------------------------------------------------------------


def test_a_branch_of_nothing_enters_no_ratio_and_no_cosine(inspection: Inspection) -> None:
    assert inspection.fusion is not None
    size = inspection.fusion.layers[0].ssm
    sizes = [(1.0, 0.25, 0.1), (0.0, 0.5, 0.0), (2.0, 1.0, 0.3)]  # attention before, SSM before, cosine
    each = tuple(
        replace(
            layer,
            attention=replace(size, before=a, after=a),
            ssm=replace(size, before=y, after=y),
            cosine=cosine,
        )
        for layer, (a, y, cosine) in zip(inspection.fusion.layers, sizes, strict=False)
    )
    sentences = said(replace(inspection, fusion=replace(inspection.fusion, layers=each)), "fusion")
    assert about(sentences, "Before the norms") == (
        "Before the norms the SSM branch is smaller than attention in every layer; its size is 0.25 to 0.50 times "
        "attention's (median 0.38); attention is 0 in layer 1, which is left out here."
    )
    assert about(sentences, "The cosine") == (
        "The cosine between both branches is 0.20 on average, from 0.10 to 0.30, where neither is 0."
    )


def test_equal_shares_of_the_branches_are_no_range(inspection: Inspection) -> None:
    assert inspection.fusion is not None
    alike = tuple(replace(layer, ssm_share=0.498) for layer in inspection.fusion.layers)
    assert about(
        said(replace(inspection, fusion=replace(inspection.fusion, layers=alike)), "fusion"), "squared size"
    ) == ("After norm and scale the SSM branch makes up 49.8 % of the squared size of both, in every layer.")


def test_a_branch_that_adds_nothing_is_a_sign(inspection: Inspection) -> None:
    assert inspection.fusion is not None
    assert said(inspection, "fusion", signs=True) == []
    layer = inspection.fusion.layers[1]
    dead = replace(layer, ssm=replace(layer.ssm, after=0.0), ssm_share=0.0)
    fusion = replace(inspection.fusion, layers=(inspection.fusion.layers[0], dead, *inspection.fusion.layers[2:]))
    changed = replace(inspection, fusion=fusion)
    assert said(changed, "fusion", signs=True) == ["The SSM branch of layer 1 adds nothing: it is 0 after its norm."]
    assert "from 0.0 % in layer 1" in about(said(changed, "fusion"), "squared size")


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((0.5, 0.25, 0.75, 0.5), "smaller than attention in every layer; its size is 0.25 to 0.75 times attention's (median 0.50)."),
        ((0.5, 2.0, 3.0, 0.5), "larger than attention in layers 1 and 2; its size is 0.50 to 3.00 times attention's (median 1.25)."),
        ((0.5, 1.0, 1.0, 0.5), "nowhere larger than attention; its size is 0.50 to 1.00 times attention's (median 0.75)."),
    ],
)  # fmt: skip
def test_sizes_before_the_norms_are_compared(inspection: Inspection, ratios: tuple[float, ...], words: str) -> None:
    assert inspection.fusion is not None
    layers = tuple(
        replace(layer, attention=replace(layer.attention, before=4.0), ssm=replace(layer.ssm, before=4.0 * ratio))
        for layer, ratio in zip(inspection.fusion.layers, ratios, strict=True)
    )
    sentences = said(replace(inspection, fusion=replace(inspection.fusion, layers=layers)), "fusion")
    assert about(sentences, "Before the norms") == f"Before the norms the SSM branch is {words}"


def test_the_tokens_that_share_half_of_the_attention_are_counted(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    share = (0.05, 0.3, 0.2, 0.2, 0.25, *(0.0 for _ in range(11)))
    domains = tuple(replace(domain, share=share) for domain in inspection.meta_tokens.domains)
    assert about(with_meta(inspection, domains=domains), "Half of") == (
        "Half of the attention on meta tokens goes to 2 of 16 tokens (mean over domains); were it even, 8 would share it."
    )


def with_meta(inspection: Inspection, **changes: Any) -> list[str]:
    assert inspection.meta_tokens is not None
    meta: MetaTokens = replace(inspection.meta_tokens, **changes)
    return said(replace(inspection, meta_tokens=meta), "meta_tokens")


def test_domains_are_told_by_what_their_meta_tokens_draw_largest_first(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    shares = (0.01, 0.02, 0.005)
    domains = tuple(
        replace(one, mass=(mass,) * 16) for one, mass in zip(inspection.meta_tokens.domains, shares, strict=False)
    )
    assert about(with_meta(inspection, domains=domains), "all meta tokens together").startswith(
        "Of the text's attention, all meta tokens together draw 32.0 % in code, 16.0 % in maths and 8.0 % in text ("
    )


def test_meta_tokens_that_stayed_are_said_to_have_stayed(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    assert inspection.meta_tokens.movement is not None
    one = inspection.meta_tokens.movement[0]
    moved = tuple(
        replace(one, token=token, distance=relative, relative=relative)
        for token, relative in enumerate((0.5, 0.1, 0.3))
    )
    assert about(with_meta(inspection, movement=moved), "Training") == (
        "Training moved meta tokens by 30.0 % of their length on average: token 0 most (50.0 %), token 1 least (10.0 %)."
    )
    still = tuple(replace(one, distance=0.0, relative=0.0) for one in moved)
    assert about(with_meta(inspection, movement=still), "Training") == (
        "Training left every meta token as it was, to the bit."
    )


def test_meta_tokens_that_prefer_a_domain_are_named(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    clearest = max(inspection.meta_tokens.preferences, key=lambda one: one.z)
    assert about(with_meta(inspection), "The clearest").startswith(f"The clearest is token {clearest.token} for ")
    assert with_meta(inspection)[0] == (
        "2 of 16 meta tokens get at least 1.05 times as much of the attention on meta tokens in one domain as in the mean of the others, "
        "by over 3.4 standard errors: 1 in maths (3) and 1 in code (15)."
    )


def test_without_preferences_that_is_said_with_the_limit(inspection: Inspection) -> None:
    assert with_meta(inspection, preferences=())[0] == (
        "No meta token gets at least 1.05 times as much of the attention on meta tokens in one domain (maths, code, text and "
        "function calls) as in the mean of the others by more than chance (over 3.4 standard errors)."
    )
    assert inspection.meta_tokens is not None
    few, *others = inspection.meta_tokens.domains
    domains = (replace(few, documents=4), *others)  # not compared
    assert "(code, text and function calls)" in with_meta(inspection, domains=domains, preferences=())[0]
    assert with_meta(inspection, preferences=(), threshold_z=None)[0] == (
        "Which meta token prefers which domain cannot be told: that takes two domains with 5 documents each."
    )


def test_a_domain_that_the_tokenizer_hardly_knows_is_a_sign(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    first, *others = inspection.meta_tokens.domains
    poor: DomainAttention = replace(first, unknown=0.25, characters_per_token=1.2)
    sentences = with_meta(inspection, domains=(poor, *others))
    assert about(sentences, "unknown to the tokenizer") == (
        "25.0 % of the tokens in maths are unknown to the tokenizer, or single bytes of characters for which it has no piece."
    )
    assert about(sentences, "half as long") == (
        "Tokens are less than half as long in maths as in code (1.2 and 3.1 characters): the tokenizer may hardly know it."
    )
    for unknown, signs in ((0.0099, 0), (0.01, 1)):  # one rare character in a long text is no sign
        meta = replace(inspection.meta_tokens, domains=(replace(first, unknown=unknown), *others))
        assert len(said(replace(inspection, meta_tokens=meta), "meta_tokens", signs=True)) == signs


def test_a_tokenizer_of_short_pieces_is_spoken_of(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    assert not [one for one in with_meta(inspection) if "characters long" in one]
    domains = tuple(replace(one, characters_per_token=1.3) for one in inspection.meta_tokens.domains[:2])
    assert about(with_meta(inspection, domains=domains), "characters long") == (
        "In maths and code a token is 1.3 characters long on average, so what prefers them prefers pieces as small as that."
    )
    assert about(with_meta(inspection, domains=domains, preferences=()), "characters long").endswith("on average.")


def test_texts_cut_to_those_of_one_domain_are_told_with_its_name(inspection: Inspection) -> None:
    cut = about(with_meta(inspection, first_tokens=74, cut_by="function_calls"), "Of the text's attention")
    assert cut.endswith("(the first 74 tokens of each text, the median length in function calls).")


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_a_part_that_was_not_measured_has_no_sentence(inspection: Inspection) -> None:
    bare = replace(inspection, attention=None, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None)
    assert findings(bare) == ()
