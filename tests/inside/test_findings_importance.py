"""Sentences on what heads are worth follow the numbers: each of them changes or goes when its numbers do."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hymba_align.inside.result import Importance, Inspection, Measured, Removal

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
said: Callable[..., list[str]] = MADE_UP["said"]
about: Callable[[list[str], str], str] = MADE_UP["about"]
BRANCHES = ("attention", "ssm")
PAPER = "the Hymba paper (arXiv 2411.13676)"


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return make()


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


def test_the_first_layer_is_ranked_by_what_its_removal_costs(inspection: Inspection) -> None:
    for layers, rank in (((1,), "3rd of 16"), ((1, 2, 3, 4, 5), "11th of 16")):
        costs = ranked(make(8), layers)
        assert f"(6.390), the {rank} removals by cost; " in first_layer(with_first_ssm(costs, 0.2, 0.01))


def ranked(inspection: Inspection, dearest: tuple[int, ...]) -> Inspection:
    """Both removals of some layers cost 0.3, all others 0.1."""
    loss = inspection.importance[0]
    dear, cheap = (Removal(loss.whole.mean + cost, Measured(cost, 0.001)) for cost in (0.3, 0.1))
    each = ((one, dear if one.layer in dearest else cheap) for one in loss.layers)
    layers = tuple(replace(one, attention=removal, ssm=removal) for one, removal in each)
    return replace(inspection, importance=(replace(loss, layers=layers),))


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
    for mean, words in (
        (6.38, "6.380 ± 0.030 nats per token, is not below random guessing (6.390) by more than chance"),
        (6.5, "6.500 ± 0.030 nats per token, is above random guessing (6.390)"),
    ):
        loss = replace(inspection.importance[0], whole=Measured(mean, 0.03))
        assert said(replace(inspection, importance=(loss,)), "importance") == [
            f"The loss of the whole model, {words}, so what removing heads does to it says nothing about them."
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


def test_a_removal_that_changes_no_document_is_told_apart_from_one_within_chance(inspection: Inspection) -> None:
    sentences = said(with_first_ssm(inspection, 0.0, 0.0), "importance")
    assert about(sentences, "the first layer") == (
        f"Removing the first layer's SSM heads changes the loss in no document; {PAPER} reports that its own model falls to "
        "random guessing."
    )
    assert "Removed alone, the SSM heads of layer 0 change the loss in none of 40 documents." in sentences
    assert not [one for one in sentences if "SSM heads of layer 0" in one and "than chance" in one]


def test_too_few_documents_on_which_no_removal_costs_anything_name_none(inspection: Inspection) -> None:
    gain = Removal(0.4, Measured(-0.012, 0.01))
    layers = tuple(replace(layer, attention=gain, ssm=gain) for layer in inspection.importance[0].layers)
    few = replace(inspection.importance[0], documents=1, layers=layers)
    assert said(replace(inspection, importance=(few,)), "importance") == [
        "1 document cannot tell what is more than chance (that takes 5). On it the loss is 0.412 nats per token, and no "
        "removal makes it worse."
    ]


@pytest.mark.parametrize("place", [0, 2])
def test_over_few_documents_a_removal_that_leaves_no_number_costs_most(inspection: Inspection, place: int) -> None:
    loss = inspection.importance[0]
    nothing = Removal(math.nan, Measured(math.nan, math.nan))
    layers = tuple(replace(one, ssm=nothing) if one.layer == place else one for one in loss.layers)
    (told,) = said(replace(inspection, importance=(replace(loss, documents=3, layers=layers),)), "importance")
    assert told.endswith(f", and not a number without the SSM heads of layer {place}, whose removal costs most.")


def test_where_no_removal_is_more_than_chance_that_is_said(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    small = Removal(0.422, Measured(0.01, 0.01))
    idle = tuple(replace(layer, attention=small, ssm=small, difference=Measured(0.0, 0.01)) for layer in loss.layers)
    sentences = said(replace(inspection, importance=(replace(loss, layers=idle),)), "importance")
    assert about(sentences, "No removal") == (
        "No removal of one branch of one layer makes the loss worse by more than chance (8 removals, 40 documents)."
    )
    assert not [one for one in sentences if "costliest removal" in one]


def test_numbers_that_are_not_finite_make_no_claim(inspection: Inspection) -> None:
    loss = inspection.importance[0]
    nothing = Removal(math.nan, Measured(math.nan, math.nan))
    broken = tuple(
        replace(layer, attention=nothing, ssm=nothing, difference=Measured(math.nan)) for layer in loss.layers
    )
    sentences = said(replace(inspection, importance=(replace(loss, layers=broken),)), "importance")
    assert len(sentences) == 8
    assert sentences[1] == "Without the SSM heads of layer 0 the loss is not a number."
    one = replace(loss, layers=(replace(loss.layers[0], attention=nothing), *loss.layers[1:]))
    sentences = said(replace(inspection, importance=(one,)), "importance")
    assert sentences[0] == "Without the attention heads of layer 0 the loss is not a number."
    assert about(sentences, "The costliest removal").startswith("The costliest removal is layer 0's SSM heads: ")
