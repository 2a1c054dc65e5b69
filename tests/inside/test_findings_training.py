"""Sentences on what training changed and on costs follow the numbers: each changes or goes when its numbers do."""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.inside.findings import findings
from hymba_align.inside.result import Divergence, Inspection, Measured, Pairs

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
make_pairs: Callable[..., Pairs] = MADE_UP["make_pairs"]
said: Callable[..., list[str]] = MADE_UP["said"]
about: Callable[[list[str], str], str] = MADE_UP["about"]


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return make()


# ---- alignment -------------------------------------------------------------------------------------------------------


def with_pairs(inspection: Inspection, chosen: float, rejected: float) -> list[tuple[str, bool]]:
    assert inspection.alignment is not None
    pairs = make_pairs(random.Random(1), 32, chosen, rejected)
    alone = replace(inspection.alignment, pairs=pairs, divergence=None, weights=(), attention_before=None)
    changed = replace(inspection, alignment=alone)
    return [(one.text, one.sign) for one in findings(changed) if one.part == "alignment"]


def test_chosen_answers_that_fall_while_the_margin_grows_are_a_sign(inspection: Inspection) -> None:
    (text, sign), *_ = with_pairs(inspection, -0.1, -0.5)
    assert sign
    assert text.startswith("Chosen answers lost probability (−0.1")
    assert "while the margin grew (+" in text
    assert text.endswith("A DPO loss shows the margin alone.")


def test_chosen_answers_that_rise_are_no_sign(inspection: Inspection) -> None:
    told = with_pairs(inspection, 0.1, -0.5)
    assert not any(sign for _, sign in told)
    assert told[0][0].startswith("Chosen answers gained probability: +0.09")
    assert told[1][0].startswith("The margin of chosen over rejected answers grew: +")


def test_chosen_answers_that_fall_by_next_to_nothing_are_no_sign(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    assert inspection.alignment.pairs is not None
    for change, margin, sign in (
        (-0.0099, 1.0, False),
        (-0.0101, 1.0, True),
        (-0.0099, 0.0, False),
        (-0.0101, 0.0, True),
    ):
        pairs = replace(
            inspection.alignment.pairs, chosen_change=Measured(change, 1e-4), margin_change=Measured(margin, 0.1)
        )
        alone = replace(inspection.alignment, pairs=pairs, divergence=None, weights=(), attention_before=None)
        first = findings(
            replace(inspection, alignment=alone, attention=None, importance=(), fusion=None, meta_tokens=None)
        )[0]
        assert first.text.startswith("Chosen answers lost probability (−0.0")
        assert first.sign == sign


def test_pairs_that_turned_are_counted(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    assert inspection.alignment.pairs is not None
    one = inspection.alignment.pairs.pairs[0]
    each = tuple(
        replace(one, chosen_before=before, rejected_before=-5.0, chosen_after=after, rejected_after=-5.0)
        for before, after in ((-6.0, -4.0), (-6.0, -4.0), (-4.0, -6.0), (-4.0, -3.0), (-6.0, -7.0))
    )
    alone = replace(inspection.alignment, pairs=MADE_UP["pairs_of"](each), divergence=None)
    assert about(said(replace(inspection, alignment=alone), "alignment"), "likelier one") == (
        "The chosen answer is the likelier one in 60.0 % of 5 pairs, after 40.0 % before: 2 won, 1 lost; 40.0 % of the chosen "
        "answers became less likely."
    )


def test_answers_that_do_not_move_are_told_to_be_within_chance(inspection: Inspection) -> None:
    texts = [text for text, sign in with_pairs(inspection, 0.0, 0.0) if not sign]
    assert texts[0].startswith("Whether chosen answers gained or lost probability cannot be told from 32 pairs: ")
    assert texts[1].startswith("The margin of chosen over rejected answers did not change by more than chance: ")


def test_a_margin_that_shrinks_is_a_sign(inspection: Inspection) -> None:
    told = with_pairs(inspection, 0.1, 0.9)
    assert next(text for text, sign in told if sign).startswith("The margin of chosen over rejected answers shrank: −")


def with_divergence(inspection: Inspection, **changes: Any) -> tuple[list[str], list[str]]:
    """All sentences on the divergence, and the signs among them."""
    assert inspection.alignment is not None
    assert inspection.alignment.divergence is not None
    calm = {"entropy_change": Measured(0.0, 0.01), "kl_growth": Measured(0.0, 0.01), "end_change": Measured(0.0, 0.01)}
    divergence: Divergence = replace(inspection.alignment.divergence, **{**calm, **changes})
    alone = replace(inspection.alignment, pairs=None, divergence=divergence, weights=(), attention_before=None)
    changed = replace(inspection, alignment=alone)
    return said(changed, "alignment"), said(changed, "alignment", signs=True)


def test_a_small_calm_divergence_has_no_sign(inspection: Inspection) -> None:
    sentences, signs = with_divergence(inspection)
    assert signs == []
    assert sentences[:2] == [
        "KL to runs/arithmetic/sft/final is 0.0310 ± 0.0040 nats per token over 1,890 tokens of 40 documents; the likeliest "
        "token is the same at 97.2 % of them.",
        "The loss on these documents did not change by more than chance: −0.0080 ± 0.0060 to 0.412 nats per token.",
    ]


def test_a_divergence_above_the_others_uncertainty_is_a_sign_unless_the_loss_got_better(inspection: Inspection) -> None:
    far = {"kl": Measured(0.9, 0.05), "entropy_before": Measured(0.4, 0.02)}
    _, signs = with_divergence(inspection, **far)
    assert len(signs) == 1
    assert "more than that checkpoint's own uncertainty (0.400 ± 0.020)" in signs[0]
    assert with_divergence(inspection, **far, loss_change=Measured(-0.5, 0.05))[1] == []


def test_a_loss_that_rises_is_a_sign_and_one_that_falls_is_none(inspection: Inspection) -> None:
    assert with_divergence(inspection, loss_change=Measured(0.1, 0.01))[1] == [
        "The loss on these documents rose: +0.100 ± 0.010 to 0.412 nats per token."
    ]
    sentences, signs = with_divergence(inspection, loss_change=Measured(-0.1, 0.01))
    assert signs == []
    assert "The loss on these documents fell: −0.100 ± 0.010 to 0.412 nats per token." in sentences


def test_certainty_without_a_better_loss_is_a_sign(inspection: Inspection) -> None:
    surer = {"entropy_change": Measured(-0.1, 0.01)}
    assert with_divergence(inspection, **surer)[1] == [
        "Predictions got more certain: entropy −0.100 ± 0.010 to 0.350 nats, and not better by more than chance: the loss "
        "changed by −0.0080 ± 0.0060."
    ]
    assert with_divergence(inspection, **surer, loss_change=Measured(-0.1, 0.01))[1] == []


def test_unpaired_entropies_need_to_differ_by_the_sum_of_their_errors(inspection: Inspection) -> None:
    _, close = with_divergence(
        inspection, entropy_change=None, entropy_after=Measured(0.33, 0.02)
    )  # 0.07 of 2.02 x 0.04
    _, apart = with_divergence(inspection, entropy_change=None, entropy_after=Measured(0.31, 0.02))
    assert (len(close), len(apart)) == (0, 1)


def test_a_divergence_that_grows_along_the_document_is_a_sign(inspection: Inspection) -> None:
    assert with_divergence(inspection, kl_growth=Measured(0.01, 0.002))[1] == [
        "The divergence grows along a document: +0.0100 ± 0.0020 nats per token in its second half beside its first."
    ]
    assert with_divergence(inspection, kl_growth=None)[1] == []
    assert with_divergence(inspection, kl_growth=Measured(0.01, 0.002), loss_change=Measured(-0.5, 0.05))[1] == []


def test_an_end_token_that_loses_probability_is_a_sign(inspection: Inspection) -> None:
    assert with_divergence(inspection, end_change=Measured(-0.3, 0.05))[1] == [
        "The end token became less likely where it stands: −0.300 ± 0.050 nats, a sign of longer answers."
    ]
    sentences, signs = with_divergence(inspection, end_change=Measured(0.3, 0.05))
    assert signs == []
    assert "The end token became likelier where it stands: +0.300 ± 0.050 nats." in sentences


@pytest.mark.parametrize(
    ("documents", "changes"),
    [
        ("halved_documents", {"kl_growth": Measured(0.3, 0.1)}),
        ("ended_documents", {"end_change": Measured(-0.3, 0.1)}),
    ],
)
def test_documents_that_have_no_halves_or_no_end_do_not_count_for_what_is_said_of_them(
    inspection: Inspection, documents: str, changes: dict[str, Measured]
) -> None:
    """A mean three standard errors away is more than chance over 8 documents, and is not over 4."""
    assert [len(with_divergence(inspection, **changes, **{documents: n})[1]) for n in (8, 4)] == [1, 0]


@pytest.mark.parametrize(("mean", "signs"), [(0.0099, 0), (0.0101, 1)])
def test_what_nobody_would_notice_is_told_and_is_no_sign(inspection: Inspection, mean: float, signs: int) -> None:
    sentences, found = with_divergence(inspection, kl_growth=Measured(mean, 1e-4))
    assert len(found) == signs
    about(sentences, f"+{mean:.5f} ± 0.00010")


@pytest.mark.parametrize(("before", "noticed"), [(3.0, 0.01), (0.27, 0.0027), (0.01, 0.001)])
def test_a_rise_by_a_hundredth_of_a_small_loss_is_a_sign(inspection: Inspection, before: float, noticed: float) -> None:
    for change, signs in ((0.99 * noticed, 0), (1.01 * noticed, 1)):
        sentences, found = with_divergence(
            inspection, loss_before=Measured(before, 1e-4), loss_change=Measured(change, 1e-5)
        )
        assert len(found) == signs
        about(sentences, "The loss on these documents rose: +0.")


def test_an_end_token_that_hardly_moved_is_not_said_to_make_answers_longer(inspection: Inspection) -> None:
    sentences, signs = with_divergence(inspection, end_change=Measured(-1.54e-6, 2.6e-7))
    assert signs == []
    assert "The end token became less likely where it stands: (−1.54 ± 0.26) × 10⁻⁶ nats." in sentences


def test_movement_is_told_by_the_median_part_and_frozen_parts_apart(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    parts = inspection.alignment.weights[:5]
    assert [one.part for one in parts] == ["attention", "ssm", "fusion", "mlp", "norms"]

    def told(*relatives: float) -> str:
        weights = tuple(
            replace(one, relative=relative, distance=relative, share=0.2)
            for one, relative in zip(parts, relatives, strict=True)
        )
        alone = replace(inspection.alignment, weights=weights)
        return about(said(replace(inspection, alignment=alone), "alignment"), "parts of the weights")

    assert told(0.5, 0.01, 0.2, 0.3, 0.02) == (
        "Training moved the parts of the weights by 20.0 % of their size (median of 5 parts); most attention of layer 0 "
        "(50.0 %), least the SSM branch of layer 0 (1.0 %)."
    )
    assert told(0.5, 0.01, 0.2, 0.0, 0.0) == (
        "Training moved the parts of the weights by 20.0 % of their size (median of the 3 parts that moved; 2 did not); most "
        "attention of layer 0 (50.0 %), least the SSM branch of layer 0 (1.0 %)."
    )


def test_texts_that_the_other_checkpoint_cannot_read_give_no_sign(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    assert inspection.alignment.divergence is not None
    found = replace(inspection.alignment.divergence, end_change=Measured(-0.3, 0.01), loss_change=Measured(0.3, 0.01))

    def signs(loss: float, documents: int = 40) -> tuple[int, bool]:
        divergence = replace(found, loss_before=Measured(loss, 0.1), documents=documents)
        read = replace(
            inspection,
            shape={**inspection.shape, "vocabulary": 596},
            alignment=replace(inspection.alignment, divergence=divergence, pairs=None),
        )
        told = [one for one in findings(read) if one.part == "alignment"]
        return sum(one.sign for one in told), any("cannot be said to read these texts" in one.text for one in told)

    assert signs(0.4) == (4, False)
    assert signs(8.1) == (0, True)
    assert not signs(0.4, documents=4)[1]  # too few to say so


def test_weights_that_did_not_move_are_said_to_be_the_same(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    still = replace(inspection.alignment, whole=replace(inspection.alignment.whole, distance=0.0))
    sentences = said(replace(inspection, alignment=still), "alignment")
    assert sentences[0] == "All weights are the same, to the bit."
    assert not [one for one in sentences if "Training moved" in one]


def test_a_checkpoint_beside_its_equal_is_said_to_be_equal_and_nothing_else(inspection: Inspection) -> None:
    before = inspection.alignment
    assert before is not None
    assert before.divergence is not None
    assert before.pairs is not None
    unmoved = tuple(
        replace(one, chosen_after=one.chosen_before, rejected_after=one.rejected_before) for one in before.pairs.pairs
    )
    nothing = Measured(0.0, 0.0)
    same = replace(
        before,
        whole=replace(before.whole, distance=0.0),
        pairs=replace(before.pairs, pairs=unmoved),
        divergence=replace(before.divergence, kl=nothing),
    )
    equal = ["All weights are the same, to the bit, and so is every probability that was compared."]
    assert said(replace(inspection, alignment=same), "alignment") == equal
    for other in (  # equal weights with another window, say
        replace(same, divergence=before.divergence),
        replace(same, pairs=before.pairs),
        replace(same, whole=before.whole),
    ):
        assert len(said(replace(inspection, alignment=other), "alignment")) > 3


def test_attention_before_and_after_is_compared_over_the_same_tokens_alone(inspection: Inspection) -> None:
    assert inspection.alignment is not None
    assert inspection.attention is not None
    about(said(inspection, "alignment"), "Attention moved by")
    others = replace(inspection.attention, tokens=1)
    changed = replace(inspection, alignment=replace(inspection.alignment, attention_before=others))
    assert not [one for one in said(changed, "alignment") if "Attention" in one]
    assert "<s>" in about(said(inspection, "alignment"), "Attention moved by")
    before = inspection.alignment.attention_before
    assert before is not None
    without = replace(inspection.alignment, attention_before=replace(before, documents_with_bos=0))
    told = about(said(replace(inspection, alignment=without), "alignment"), "Attention moved by")
    assert "<s>" not in told.partition(";")[0]
    layers = inspection.attention.layers  # two shares change, the one that falls by more
    mean = replace(layers[2].mean, meta=layers[2].mean.meta + 0.02, self=layers[2].mean.self - 0.01)
    fell = replace(
        before, layers=(*layers[:2], replace(layers[2], mean=replace(mean, cross=mean.cross + 0.01)), layers[3])
    )
    changed = replace(inspection, alignment=replace(inspection.alignment, attention_before=fell))
    assert about(said(changed, "alignment"), "Attention moved by").endswith("; most in layer 2: −2.00 on meta tokens.")
    same = replace(inspection.alignment, attention_before=inspection.attention)
    assert "Attention is shared out as before, in every layer." in said(
        replace(inspection, alignment=same), "alignment"
    )


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_the_papers_ratio_is_claimed_for_its_own_shapes_alone(inspection: Inspection) -> None:
    assert inspection.cost is not None
    assert about(said(inspection, "cost"), "the cache of a sequence").endswith(
        "The paper's 11.67 is of other shapes: Hymba-1.5B beside Llama-3.2-3B."
    )
    published = replace(inspection.cost, transformer=replace(inspection.cost.transformer, is_published_shape=True))
    *_, last = published.cache
    for formula, keys_values, lies in (
        (86_056_960, 78_888_960, "lies between these two"),  # Hymba-1.5B's own: 10.92 and 11.91
        (70_000_000, 60_000_000, "is neither of these two"),
        (86_056_960, 85_000_000, "is neither of these two"),
    ):
        here = replace(last, formula=formula, keys_values=keys_values, transformer_formula=939_524_096)
        sentences = said(replace(inspection, cost=replace(published, cache=(here,))), "cost")
        assert about(sentences, "the cache of a sequence").endswith(
            f"The paper reports 11.67 for these shapes at 8k tokens by a count of its own, which {lies}."
        )
        assert about(sentences, "decoding runs").endswith(
            "The paper reports 3.49 for these shapes at 8k tokens, on its own hardware."
        )


def test_a_cache_that_is_not_what_the_formula_says_is_a_sign(inspection: Inspection) -> None:
    assert inspection.cost is not None
    first, last = inspection.cost.cache
    unfilled = replace(inspection.cost, cache=(replace(first, measured=None), last))
    assert said(replace(inspection, cost=unfilled), "cost", signs=True) == []
    cost = replace(inspection.cost, cache=(first, replace(last, measured=last.formula + 8)))
    assert said(replace(inspection, cost=cost), "cost", signs=True) == [
        f"At 8,192 tokens a filled cache holds {last.formula + 8:,} bytes, not the {last.formula:,} of the formula."
    ]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.1, 1.3, "faster in every round"), (0.7, 0.9, "slower in every round"), (0.9, 1.3, "neither faster nor slower")],
)
def test_faster_is_said_where_every_round_agrees(inspection: Inspection, low: float, high: float, words: str) -> None:
    assert inspection.cost is not None
    *_, last = inspection.cost.decode
    cost = replace(inspection.cost, decode=(replace(last, ratio_low=low, ratio_high=high),))
    assert words in about(said(replace(inspection, cost=cost), "cost"), "decoding runs")


def test_a_ratio_that_turns_at_shorter_contexts_is_told(inspection: Inspection) -> None:
    assert about(said(inspection, "cost"), "shorter contexts") == (
        "At shorter contexts it runs at this many times the transformer's speed: 1,024 (1.63, 1.50 to 1.71)."
    )
