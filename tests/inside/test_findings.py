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
    Importance,
    Inspection,
    Measured,
    MetaTokens,
    Removal,
)

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
said: Callable[..., list[str]] = MADE_UP["said"]
about: Callable[[list[str], str], str] = MADE_UP["about"]
BRANCHES = ("attention", "ssm")
PAPER = "the Hymba paper (arXiv 2411.13676)"


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


# ---- importance ------------------------------------------------------------------------------------------------------


def with_first_ssm(inspection: Inspection, change: float, stderr: float) -> Inspection:
    """The loss with another change where the first layer's SSM heads are removed."""
    loss = inspection.importance[0]
    removal = Removal(loss.whole.mean + change, Measured(change, stderr))
    first = replace(loss.layers[0], ssm=removal)
    return replace(inspection, importance=(replace(loss, layers=(first, *loss.layers[1:])),))


def first_layer(inspection: Inspection) -> str:
    return about(said(inspection, "importance"), "first layer")


def test_the_first_layer_at_the_level_of_random_guessing_is_what_the_paper_reports(inspection: Inspection) -> None:
    assert first_layer(with_first_ssm(inspection, 5.9, 0.1)) == (
        "Without the first layer's SSM heads the loss goes from 0.412 to 6.312 nats per token, at the level of random "
        f"guessing (6.390), the costliest of 8 removals: it shows what {PAPER} reports of its own model."
    )


def test_the_first_layer_short_of_random_guessing_is_told_with_how_far_it_gets(inspection: Inspection) -> None:
    assert first_layer(with_first_ssm(inspection, 2.989, 0.1)) == (
        "Without the first layer's SSM heads the loss goes from 0.412 to 3.401 nats per token, 50.0 % of the way to random "
        f"guessing (6.390), the costliest of 8 removals; {PAPER} reports that its own model falls to random guessing."
    )


def test_too_few_documents_do_not_bring_the_first_layer_to_random_guessing(inspection: Inspection) -> None:
    assert first_layer(with_first_ssm(inspection, 4.0, 1.5)) == (
        "Without the first layer's SSM heads the loss goes from 0.412 to 4.412 nats per token, 66.9 % of the way to random "
        "guessing (6.390), which 40 documents do not tell apart, the costliest of 8 removals, not told apart by more than chance from 7 others; "
        f"{PAPER} reports that its own model falls to random guessing."
    )


def test_the_first_layer_beyond_random_guessing_is_said_to_be(inspection: Inspection) -> None:
    assert "beyond random guessing" in first_layer(with_first_ssm(inspection, 9.0, 0.1))


def test_a_change_of_the_first_layer_within_chance_is_said_to_be(inspection: Inspection) -> None:
    assert first_layer(with_first_ssm(inspection, 0.05, 0.04)) == (
        "Removing the first layer's SSM heads changes the loss by +0.050 ± 0.040 nats per token, which cannot be told from "
        f"chance; {PAPER} reports that its own model falls to random guessing."
    )


def test_a_model_that_guesses_makes_no_claim_about_its_heads(inspection: Inspection) -> None:
    loss = replace(inspection.importance[0], whole=Measured(6.38, 0.03))
    assert said(replace(inspection, importance=(loss,)), "importance") == [
        "The loss of the whole model, 6.380 ± 0.030 nats per token, is not below random guessing (6.390), so what removing "
        "heads does to it says nothing about them."
    ]


def test_too_few_documents_are_said_to_be_too_few_and_not_a_model_that_guesses(inspection: Inspection) -> None:
    few = with_first_ssm(replace(inspection, importance=inspection.importance[:1]), 5.9, 0.1).importance[0]
    assert said(replace(inspection, importance=(replace(few, documents=4),)), "importance") == [
        "4 documents cannot tell what is more than chance (that takes 5). On them the loss is 0.412 nats per token, and 6.312 "
        "without the SSM heads of layer 0, whose removal costs most."
    ]
    assert len(said(replace(inspection, importance=(replace(few, documents=5),)), "importance")) > 1


def test_removals_that_cost_the_same_are_not_ranked_apart(inspection: Inspection) -> None:
    task = inspection.importance[1]
    gone = Removal(0.0, Measured(-92.5, 0.0))
    first = replace(task.layers[0], attention=gone, ssm=gone)
    sentences = said(replace(inspection, importance=(replace(task, layers=(first, *task.layers[1:])),)), "importance")
    assert "the costliest of 8 removals, not told apart by more than chance from 1 other;" in about(
        sentences, "Without the first layer"
    )
    assert "not told apart by more than chance from layer 0's SSM heads" in about(sentences, "The costliest removal")


def test_equal_shares_of_the_branches_are_no_range(inspection: Inspection) -> None:
    assert inspection.fusion is not None
    alike = tuple(replace(layer, ssm_share=0.498) for layer in inspection.fusion.layers)
    assert about(
        said(replace(inspection, fusion=replace(inspection.fusion, layers=alike)), "fusion"), "squared size"
    ) == ("After norm and scale the SSM branch makes up 49.8 % of the squared size of both, in every layer.")


def test_a_branch_without_which_the_loss_is_better_is_a_sign(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    worse = replace(loss.layers[2], attention=Removal(0.312, Measured(-0.1, 0.01)))
    changed = replace(loss, layers=(*loss.layers[:2], worse, *loss.layers[3:]))
    assert said(replace(inspection, importance=(changed,)), "importance", signs=True) == [
        "The loss is better without the attention heads of layer 2: −0.100 ± 0.010 nats per token."
    ]
    within = replace(worse, attention=Removal(0.312, Measured(-0.1, 0.04)))  # above chance, were it the only removal
    changed = replace(loss, layers=(*loss.layers[:2], within, *loss.layers[3:]))
    assert said(replace(inspection, importance=(changed,)), "importance", signs=True) == []


def test_branches_are_compared_layer_by_layer(inspection: Inspection) -> None:
    def with_differences(importance: Importance, differences: list[float]) -> list[str]:
        each = tuple(
            replace(layer, difference=Measured(difference, 0.1))
            for layer, difference in zip(importance.layers, differences, strict=True)
        )
        return said(replace(inspection, importance=(replace(importance, layers=each),)), "importance")

    loss, task = inspection.importance
    assert about(with_differences(loss, [1.0, 1.0, -1.0, 0.1]), "By the loss") == (
        "By the loss, the SSM heads are worth more than the attention heads in layers 0 and 1; the attention heads are worth "
        "more than the SSM heads in layer 2; neither can be told to be worth more in layer 3."
    )
    assert about(
        with_differences(loss, [1.0, 1.0, 0.23, -0.23]), "By the loss"
    ).endswith(  # 2.3 errors, of 2.6 for four
        "neither can be told to be worth more in layers 2 and 3."
    )
    assert about(with_differences(task, [1.0, 1.0, 1.0, 1.0]), "By the score") == (
        "By the score on gsm8k, the attention heads are worth more than the SSM heads in layers 0–3."
    )


def test_the_costliest_removal_is_named_with_the_next_where_they_are_not_told_apart(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    costs = [(0.1, 0.2), (0.3, 0.4), (3.0, 0.5), (2.9, 0.6)]

    def costliest(stderr: float) -> str:
        each = tuple(
            replace(
                layer,
                **{
                    name: Removal(0.4 + cost, Measured(cost, stderr)) for name, cost in zip(BRANCHES, pair, strict=True)
                },
            )
            for layer, pair in zip(loss.layers, costs, strict=True)
        )
        return about(
            said(replace(inspection, importance=(replace(loss, layers=each),)), "importance"), "costliest removal"
        )

    assert costliest(0.01) == (
        "The costliest removal is layer 2's attention heads: +3.000 ± 0.010 nats per token; half of all removals cost 0.450 "
        "or less."
    )
    assert costliest(0.02) == (  # 0.1 apart, with errors of 0.04 at most and 2.8 of them to be certain of seven
        "The costliest removal is layer 2's attention heads, not told apart by more than chance from layer 3's attention heads: "
        "+3.000 ± 0.020 nats per token; half of all removals cost 0.450 or less."
    )


def test_where_no_removal_is_more_than_chance_that_is_said(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    small = Removal(0.422, Measured(0.01, 0.01))
    idle = tuple(replace(layer, attention=small, ssm=small, difference=Measured(0.0, 0.01)) for layer in loss.layers)
    sentences = said(replace(inspection, importance=(replace(loss, layers=idle),)), "importance")
    assert about(sentences, "No removal") == (
        "No removal of one branch of one layer makes the loss worse by more than chance (8 removals, 40 documents)."
    )
    assert not [one for one in sentences if "costliest removal" in one]


# ---- fusion and meta tokens ------------------------------------------------------------------------------------------


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


def test_meta_tokens_that_prefer_a_domain_are_named(inspection: Inspection) -> None:
    assert with_meta(inspection)[0] == (
        "2 of 16 meta tokens get at least 1.05 times as much of the attention on meta tokens in one domain as in the mean of the others, "
        "by over 3.4 standard errors: 1 in maths (3) and 1 in code (15)."
    )


def test_without_preferences_that_is_said_with_the_limit(inspection: Inspection) -> None:
    assert with_meta(inspection, preferences=())[0] == (
        "No meta token gets at least 1.05 times as much of the attention on meta tokens in one domain (maths, code, text and "
        "function calls) as in the mean of the others by more than chance (over 3.4 standard errors)."
    )
    assert with_meta(inspection, preferences=(), threshold_z=None)[0] == (
        "Which meta token prefers which domain cannot be told: that takes two domains with 5 documents each."
    )


def test_a_domain_that_the_tokenizer_hardly_knows_is_a_sign(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    first, *others = inspection.meta_tokens.domains
    poor: DomainAttention = replace(first, unknown=0.25, characters_per_token=1.2)
    sentences = with_meta(inspection, domains=(poor, *others))
    assert about(sentences, "unknown to the tokenizer").startswith("25.0 % of the tokens in maths are unknown")
    assert about(sentences, "in pieces") == (
        "The tokenizer spells maths in pieces: 1.2 characters per token, beside 3.1 in code."
    )


def test_a_tokenizer_of_letters_is_spoken_of(inspection: Inspection) -> None:
    assert inspection.meta_tokens is not None
    assert not [one for one in with_meta(inspection) if "letter by letter" in one]
    domains = tuple(replace(one, characters_per_token=1.3) for one in inspection.meta_tokens.domains[:2])
    assert about(with_meta(inspection, domains=domains), "letter by letter") == (
        "The tokenizer spells maths and code almost letter by letter (1.3 characters per token), so what prefers them "
        "prefers letters and pieces of words."
    )
    assert about(with_meta(inspection, domains=domains, preferences=()), "letter by letter").endswith(
        "(1.3 characters per token)."
    )


def test_texts_cut_to_those_of_one_domain_are_told_with_its_name(inspection: Inspection) -> None:
    cut = about(with_meta(inspection, first_tokens=74, cut_by="function_calls"), "Of the text's attention")
    assert cut.endswith("(the first 74 tokens of each text, the median length in function calls).")


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_a_part_that_was_not_measured_has_no_sentence(inspection: Inspection) -> None:
    bare = replace(inspection, attention=None, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None)
    assert findings(bare) == ()


def test_numbers_that_are_not_finite_make_no_claim(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    nothing = Removal(math.nan, Measured(math.nan, math.nan))
    broken = tuple(
        replace(layer, attention=nothing, ssm=nothing, difference=Measured(math.nan)) for layer in loss.layers
    )
    sentences = said(replace(inspection, importance=(replace(loss, layers=broken),)), "importance")
    assert about(sentences, "No removal")
