"""What each branch of each layer is worth, in sentences: whatever they claim is more than chance (`evidence`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from hymba_align.inside.evidence import FEWEST, apart, is_above, is_below, of_problems
from hymba_align.inside.result import Branch, Finding, Importance, LayerImportance, Measured, Removal
from hymba_align.inside.wording import count, layers, listed, number, percent, with_error

PAPER = "the Hymba paper (arXiv 2411.13676)"
ALL_THE_WAY = 0.9
"""Share of the way to random guessing before which a score is not called to be there, however large its error"""
BRANCH_WORDS: dict[Branch, str] = {"attention": "attention heads", "ssm": "SSM heads"}


def of_importance(importance: Importance) -> Iterator[Finding]:
    """What each branch is worth; each sentence corrected for the number of removals it chooses from."""
    if not importance.layers:
        return
    if importance.documents < FEWEST:
        yield _too_few(importance)
        return
    if importance.chance is not None and not is_below(importance.whole, importance.chance, importance.documents):
        yield _say(
            f"The loss of the whole model, {with_error(importance.whole)} nats per token, is "
            f"{beside_guessing(importance.whole, importance.chance, importance.documents)}, so what removing heads does to it "
            "says nothing about them.",
            sign=True,
        )
        return
    removals = []
    for layer, branch, removal in _removals(importance):
        if math.isfinite(removal.change.mean):
            removals.append((layer, branch, removal))
        else:
            yield _say(
                f"Without the {BRANCH_WORDS[branch]} of layer {layer} {_metric(importance).lower()} is "
                f"{number(removal.score)}.",
                sign=True,
            )
    if not removals:
        return
    yield from _first_layer(importance, removals)
    yield from _costliest(importance, removals)
    yield from _compared(importance)
    yield from _without_effect(importance, removals)
    better = [one for one in removals if _verdict(importance, one[2], len(removals)) > 0]
    for layer, branch, removal in better:
        yield _say(
            f"{_metric(importance)} is better without the {BRANCH_WORDS[branch]} of layer {layer}: "
            f"{with_error(removal.change, sign=True)} {_points(importance)}.",
            sign=True,
        )


Removed = tuple[int, Branch, Removal]


def _removals(importance: Importance) -> list[Removed]:
    """Every removal with an error that may be believed."""
    each: list[Removed] = []
    for layer in importance.layers:
        each += [(layer.layer, "attention", layer.attention), (layer.layer, "ssm", layer.ssm)]
    if importance.metric == "loss":
        return each
    return [
        (layer, branch, Removal(removal.score, of_problems(removal.change, importance.documents)))
        for layer, branch, removal in each
    ]


def _too_few(importance: Importance) -> Finding:
    """What was measured over so few documents or problems that nothing can be claimed of others."""
    layer, branch, worst = max(_removals(importance), key=lambda one: _cost(importance, one[2]))
    read = count(importance.documents, _documents(importance))
    told = (
        f"and {_value(importance, worst.score)} without the {BRANCH_WORDS[branch]} of layer {layer}, whose removal costs most"
        if _cost(importance, worst) > 0
        else "and no removal makes it worse"
    )
    return _say(
        f"{read} cannot tell what is more than chance (that takes {FEWEST}). On {'it' if importance.documents == 1 else 'them'} "
        f"{_metric(importance).lower()} is {_value(importance, importance.whole.mean)} {importance.unit}, {told}."
    )


def beside_guessing(loss: Measured, chance: float, documents: int) -> str:
    """How a loss that is not known to be below that of random guessing stands to it."""
    if is_above(loss, chance, documents):
        return f"above random guessing ({number(chance)})"
    return f"not below random guessing ({number(chance)}) by more than chance"


def _verdict(importance: Importance, removal: Removal, comparisons: int) -> int:
    """-1 where the removal makes the score worse by more than chance, 1 where better, 0 where neither can be said."""
    worse = 1 if importance.lower_is_better else -1
    if is_above(removal.change, 0.0, importance.documents, comparisons):
        return -worse
    return worse if is_below(removal.change, 0.0, importance.documents, comparisons) else 0


def _first_layer(importance: Importance, removals: Sequence[Removed]) -> Iterator[Finding]:
    """The removal that the paper singles out, and how it went here.

    Source: Hymba (arXiv 2411.13676), head importance analysis: without the first layer's SSM heads its model is at the
    level of random guessing.
    """
    found = next((removal for layer, branch, removal in removals if (layer, branch) == (0, "ssm")), None)
    if found is None:
        return
    n = importance.documents
    reports = f"{PAPER} reports that its own model falls to random guessing"
    verdict = _verdict(importance, found, 1)
    if _changes_nothing(found):
        yield _say(
            f"Removing the first layer's SSM heads changes {_metric(importance).lower()} in no document; {reports}."
        )
        return
    if verdict >= 0:
        told = "cannot be told from chance" if verdict == 0 else "is an improvement"
        yield _say(
            f"Removing the first layer's SSM heads changes {_metric(importance).lower()} by "
            f"{with_error(found.change, sign=True)} {_points(importance)}, which {told}; {reports}."
        )
        return
    change = (
        f"Without the first layer's SSM heads {_metric(importance).lower()} goes from {_value(importance, importance.whole.mean)} to "
        f"{_value(importance, found.score)} {importance.unit}"
    )
    rank = _rank(importance, removals, found)
    if importance.chance is None:
        yield _say(f"{change}, {rank}; {reports}.")
        return
    score = Measured(found.score, found.change.stderr)
    way = (found.score - importance.whole.mean) / (importance.chance - importance.whole.mean)
    is_told_apart = is_below(score, importance.chance, n)
    if not is_told_apart and way >= ALL_THE_WAY:
        where = "beyond" if is_above(score, importance.chance, n) else "at the level of"
        yield _say(
            f"{change}, {where} random guessing ({number(importance.chance)}), {rank}: it shows what {PAPER} reports of its own model."
        )
    else:
        unsure = f", which {count(n, 'document')} do not tell apart" if not is_told_apart else ""
        yield _say(
            f"{change}, {percent(way)} of the way to random guessing ({number(importance.chance)}){unsure}, {rank}; {reports}."
        )


def _rank(importance: Importance, removals: Sequence[Removed], found: Removal) -> str:
    """Where a removal stands among all, by what it costs."""
    others = [removal for _, _, removal in removals if removal is not found]
    costlier = sum(_cost(importance, one) > _cost(importance, found) for one in others)
    if costlier:
        return f"the {_ordinal(costlier + 1)} of {len(removals)} removals by cost"
    close = sum(not _is_costlier(importance, found, one, len(others)) for one in others)
    unsure = f", not told apart by more than chance from {count(close, 'other')}" if close else ""
    return f"the costliest of {len(removals)} removals{unsure}"


def _costliest(importance: Importance, removals: Sequence[Removed]) -> Iterator[Finding]:
    """The removal that costs most, and whether that is certain."""
    ordered = sorted(removals, key=lambda one: _cost(importance, one[2]), reverse=True)
    worst, others = ordered[0], ordered[1:]
    if _verdict(importance, worst[2], len(removals)) >= 0:
        yield _say(
            f"No removal of one branch of one layer makes {_metric(importance).lower()} worse by more than chance "
            f"({count(len(removals), 'removal')}, {count(importance.documents, _documents(importance))})."
        )
        return
    close = [one for one in others if not _is_costlier(importance, worst[2], one[2], len(others))]
    named = listed((f"layer {layer}'s {BRANCH_WORDS[branch]}" for layer, branch, _ in close), most=3)
    unsure = f", not told apart by more than chance from {named}" if close else ""
    yield _say(
        f"The costliest removal is layer {worst[0]}'s {BRANCH_WORDS[worst[1]]}{unsure}: "
        f"{with_error(worst[2].change, sign=True)} {_points(importance)}; half of all removals cost "
        f"{_value(importance, median(_cost(importance, one[2]) for one in removals))} or less."
    )


def _is_costlier(importance: Importance, one: Removal, other: Removal, comparisons: int) -> bool:
    difference = apart(one.change, other.change)
    compare = is_above if importance.lower_is_better else is_below
    return compare(difference, 0.0, importance.documents, comparisons)


def _compared(importance: Importance) -> Iterator[Finding]:
    """In which layers one branch is worth more than the other, one comparison per layer."""
    comparisons, n = len(importance.layers), importance.documents
    sides: dict[str, list[int]] = {"ssm": [], "attention": [], "neither": []}
    for layer in importance.layers:
        sides[_dearer(importance, layer, n, comparisons)].append(layer.layer)
    told = [
        f"{words} in {layers(sides[side])}"
        for side, words in (
            ("ssm", "the SSM heads are worth more than the attention heads"),
            ("attention", "the attention heads are worth more than the SSM heads"),
            ("neither", "neither can be told to be worth more"),
        )
        if sides[side]
    ]
    yield _say(f"By {_metric(importance).lower()}, {'; '.join(told)}.")


def _dearer(importance: Importance, layer: LayerImportance, n: int, comparisons: int) -> str:
    difference = layer.difference if importance.metric == "loss" else of_problems(layer.difference, n)
    if is_above(difference, 0.0, n, comparisons):
        return "ssm" if importance.lower_is_better else "attention"
    if is_below(difference, 0.0, n, comparisons):
        return "attention" if importance.lower_is_better else "ssm"
    return "neither"


def _without_effect(importance: Importance, removals: Sequence[Removed]) -> Iterator[Finding]:
    """Branches that can go without a change that is more than chance."""
    read = count(importance.documents, _documents(importance))
    for is_dead, words in (
        (False, f"by no more than chance ({read})"),
        (True, f"in none of {read}"),
    ):
        idle: dict[Branch, list[int]] = {"attention": [], "ssm": []}
        for layer, branch, removal in removals:
            if _changes_nothing(removal) == is_dead and _verdict(importance, removal, len(removals)) == 0:
                idle[branch].append(layer)
        told = [f"the {BRANCH_WORDS[branch]} of {layers(found)}" for branch, found in idle.items() if found]
        if told:
            yield _say(f"Removed alone, {listed(told)} change {_metric(importance).lower()} {words}.")


def _changes_nothing(removal: Removal) -> bool:
    """Whether no document's loss changed; of a task's problems the few that were asked may all go alike by chance."""
    return removal.change == Measured(0.0, 0.0)


def _cost(importance: Importance, removal: Removal) -> float:
    """What a removal costs, above 0 where the score gets worse."""
    change = removal.change.mean if importance.lower_is_better else -removal.change.mean
    return math.inf if math.isnan(change) else change


def _metric(importance: Importance) -> str:
    return "The loss" if importance.metric == "loss" else f"The score on {importance.metric}"


def _value(importance: Importance, value: float) -> str:
    """A score or a change as precisely as its unit is read."""
    return number(value, 1 if importance.unit.startswith("%") else 3)


def _points(importance: Importance) -> str:
    return "percentage points" if importance.unit.startswith("%") else importance.unit


def _documents(importance: Importance) -> str:
    return "document" if importance.metric == "loss" else "problem"


def _ordinal(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def _say(text: str, *, sign: bool = False) -> Finding:
    return Finding("importance", text, sign)
