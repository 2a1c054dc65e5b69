"""What training changed, and what decoding takes, in sentences.

The signs of over-optimisation that a DPO loss hides, which sees the margin between chosen and rejected answers alone:
chosen answers that lose probability while the margin grows; a held-out loss that rises; predictions that get more
certain without getting better; a divergence without a better loss that exceeds what the other checkpoint left open, or
that grows along the document; an end token that loses probability, so that answers get longer. Each needs to be more
than chance over documents or pairs (`evidence`), and at least `NOTICED`, or `LOSS_NOTICED` of the loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from hymba_align.inside.evidence import FEWEST, apart, is_above, is_below
from hymba_align.inside.findings_importance import beside_guessing
from hymba_align.inside.result import (
    Alignment,
    Attention,
    CacheCost,
    Cost,
    DecodeCost,
    Divergence,
    Finding,
    Measured,
    Pairs,
    WeightMovement,
)
from hymba_align.inside.wording import count, listed, number, percent, signed, size_in_bytes, with_error

NOTICED = 0.01
"""Nats: a hundredth of a token's probability. A smaller change is told, and is no sign of anything."""
LOSS_NOTICED = 0.01
"""Share of a loss below 1 nat whose rise is a sign though it is less than `NOTICED`: an answer of a model that is certain of
its tokens loses as much of its probability by less.

Measured on the demo (recipes/tiny/arithmetic.yaml), whose SFT solves 92.5 % of 200 problems at a loss of 0.27: DPO at rates of
3e-6, 6e-5, 1e-4 and 3e-4 changed the loss on 32 other documents by −0.0001, +0.005, +0.012 and +0.112 nats per token, and left
93.0, 90.5, 85.5 and 59.5 % (standard errors 1.8 to 3.5). At 6e-5 a right answer has lost a tenth of its probability. Where
the changes on all 34 documents of the test file are given random signs, or redrawn around no change, 0.5 to 2.6 % of the draws
show a sign.
"""
LOSS_FLOOR = 0.001
"""Nats, below which the rise of no loss is a sign"""
MOST_PARTS = 4
PART_WORDS = {
    "ssm": "the SSM branch",
    "attention": "attention",
    "fusion": "fusion",
    "mlp": "the MLPs",
    "norms": "the norms before heads and MLPs",
}
SHARE_WORDS = {"meta": "meta tokens", "bos": "<s>", "self": "the token itself", "cross": "other tokens"}


def of_alignment(alignment: Alignment, after: Attention | None, chance: float | None) -> Iterator[Finding]:
    """Pairs, divergence, weights and attention, in this order; of equal weights first that they are.

    Args:
        chance: loss of who knows nothing, in nats per token; None where it is not known.
    """
    if _is_same(alignment):
        yield _say("All weights are the same, to the bit, and so is every probability that was compared.")
        return
    has_moved = alignment.whole.distance != 0
    if not has_moved:
        yield _say("All weights are the same, to the bit.")
    if alignment.pairs is not None and alignment.pairs.pairs:
        yield from _pairs(alignment.pairs)
    if alignment.divergence is not None:
        yield from _divergence(alignment.divergence, alignment.against, chance)
    if has_moved:
        yield from _weights(alignment.weights)
    if alignment.attention_before is not None and after is not None:
        yield from _attention(alignment.attention_before, after)


def _is_same(alignment: Alignment) -> bool:
    """Whether weights and probabilities are equal; equal weights with another configuration, such as a window, differ."""
    found, pairs = alignment.divergence, alignment.pairs
    if alignment.whole.distance != 0 or (found is None and pairs is None):
        return False
    return (found is None or found.kl.mean == 0) and all(
        (one.chosen_before, one.rejected_before) == (one.chosen_after, one.rejected_after)
        for one in (pairs.pairs if pairs is not None else ())
    )


def _pairs(pairs: Pairs) -> Iterator[Finding]:
    """What became of chosen and rejected answers; n is the number of pairs."""
    n, chosen, rejected, margin = len(pairs.pairs), pairs.chosen_change, pairs.rejected_change, pairs.margin_change
    fell, grew = is_below(chosen, 0.0, n), is_above(margin, 0.0, n)
    told = f"{with_error(chosen, sign=True)} nats per token"
    if fell and grew:
        yield _say(
            f"Chosen answers lost probability ({told}) while the margin grew ({with_error(margin, sign=True)} nats per pair): "
            f"rejected ones changed by {with_error(rejected, sign=True)} per token. A DPO loss shows the margin alone.",
            sign=_is_noticed(chosen),
        )
    elif fell:
        yield _say(
            f"Chosen answers lost probability ({told}), and the margin did not grow by more than chance.",
            sign=_is_noticed(chosen),
        )
    elif is_above(chosen, 0.0, n):
        yield _say(
            f"Chosen answers gained probability: {told}; rejected ones changed by {with_error(rejected, sign=True)}."
        )
    else:
        yield _say(
            f"Whether chosen answers gained or lost probability cannot be told from {count(n, 'pair')}: {told}; rejected "
            f"ones changed by {with_error(rejected, sign=True)}."
        )
    if is_below(margin, 0.0, n):
        yield _say(
            f"The margin of chosen over rejected answers shrank: {with_error(margin, sign=True)} nats per pair.",
            sign=_is_noticed(margin),
        )
    elif grew and not fell:
        yield _say(f"The margin of chosen over rejected answers grew: {with_error(margin, sign=True)} nats per pair.")
    elif not grew and not fell:
        yield _say(
            f"The margin of chosen over rejected answers did not change by more than chance: "
            f"{with_error(margin, sign=True)} nats per pair."
        )
    won = sum(one.chosen_after > one.rejected_after and one.chosen_before <= one.rejected_before for one in pairs.pairs)
    lost = sum(
        one.chosen_after <= one.rejected_after and one.chosen_before > one.rejected_before for one in pairs.pairs
    )
    yield _say(
        f"The chosen answer is the likelier one in {percent(pairs.preferred_after)} of {count(n, 'pair')}, after "
        f"{percent(pairs.preferred_before)} before: {won:,} won, {lost:,} lost; {percent(pairs.chosen_fell)} of the chosen "
        "answers became less likely."
    )


def _divergence(found: Divergence, against: str, chance: float | None) -> Iterator[Finding]:
    """How far the distributions moved, and whether that bought anything; n is the number of documents.

    Of texts that the other checkpoint could not read nothing is a sign.
    """
    n, loss, entropy = found.documents, _loss_change(found), _entropy_change(found)
    reads = chance is None or n < FEWEST or is_below(found.loss_before, chance, n)
    if chance is not None and not reads:
        yield _say(
            f"{against} cannot be said to read these texts: its loss, {with_error(found.loss_before)} nats per token, is "
            f"{beside_guessing(found.loss_before, chance, n)}, so no change on them counts as a sign."
        )
    better, worse = is_below(loss, 0.0, n), is_above(loss, 0.0, n)
    moved = f"KL to {against} is {with_error(found.kl)} nats per token over {count(found.tokens, 'token')} of {count(n, 'document')}"
    same = f"the likeliest token is the same at {percent(found.same_likeliest)} of them"
    open_before = apart(found.kl, found.entropy_before)
    if not better and is_above(open_before, 0.0, n) and reads and _is_noticed(found.kl):
        yield _say(
            f"{moved}, more than that checkpoint's own uncertainty ({with_error(found.entropy_before)}), and the loss got no "
            f"better by more than chance; {same}.",
            sign=True,
        )
    else:
        yield _say(f"{moved}; {same}.")
    ends = f"{with_error(loss, sign=True)} to {number(found.loss_after.mean)} nats per token"
    if worse:
        yield _say(
            f"The loss on these documents rose: {ends}.", sign=reads and _is_loss_noticed(loss, found.loss_before)
        )
    elif better:
        yield _say(f"The loss on these documents fell: {ends}.")
    else:
        yield _say(f"The loss on these documents did not change by more than chance: {ends}.")
    if is_below(entropy, 0.0, n):
        told = f"Predictions got more certain: entropy {with_error(entropy, sign=True)} to {number(found.entropy_after.mean)} nats"
        if better:
            yield _say(f"{told}, and better, as the loss shows.")
        else:
            told += f", and not better by more than chance: the loss changed by {with_error(loss, sign=True)}."
            yield _say(told, sign=reads and _is_noticed(entropy))
    elif is_above(entropy, 0.0, n):
        yield _say(
            f"Predictions got less certain: entropy {with_error(entropy, sign=True)} to {number(found.entropy_after.mean)} nats."
        )
    yield from _along(found, reads=reads, is_better=better)


def _along(found: Divergence, *, reads: bool, is_better: bool) -> Iterator[Finding]:
    """What changed towards the end; a model that got better may well differ most where it has read most."""
    n = found.ended_documents
    if found.kl_growth is not None and is_above(found.kl_growth, 0.0, found.halved_documents):
        yield _say(
            f"The divergence grows along a document: {with_error(found.kl_growth, sign=True)} nats per token in its second "
            "half beside its first.",
            sign=reads and _is_noticed(found.kl_growth) and not is_better,
        )
    if found.end_change is not None and is_below(found.end_change, 0.0, n):
        is_sign = reads and _is_noticed(found.end_change)
        told = f"The end token became less likely where it stands: {with_error(found.end_change, sign=True)} nats"
        yield _say(f"{told}, a sign of longer answers." if is_sign else f"{told}.", sign=is_sign)
    elif found.end_change is not None and is_above(found.end_change, 0.0, n):
        yield _say(f"The end token became likelier where it stands: {with_error(found.end_change, sign=True)} nats.")


def _is_noticed(change: Measured) -> bool:
    """Whether a change that is more than chance is large enough for anyone to notice."""
    return abs(change.mean) >= NOTICED


def _is_loss_noticed(change: Measured, before: Measured) -> bool:
    """The same of a loss: a hundredth of a nat, or of the loss itself."""
    return abs(change.mean) >= min(NOTICED, max(LOSS_FLOOR, LOSS_NOTICED * before.mean))


def _loss_change(found: Divergence) -> Measured:
    """Paired where that was measured, else with an error that is too large rather than too small."""
    return found.loss_change or apart(found.loss_after, found.loss_before)


def _entropy_change(found: Divergence) -> Measured:
    return found.entropy_change or apart(found.entropy_after, found.entropy_before)


def moved_parts(weights: Sequence[WeightMovement]) -> list[WeightMovement]:
    """The parts that training moved, those that moved most beside their own size first."""
    return sorted((one for one in weights if one.distance != 0), key=lambda one: one.relative, reverse=True)


def typical_movement(weights: Sequence[WeightMovement]) -> str:
    """The median over the parts that moved, each beside its own size, and what did not move; exact.

    The length of all weights together would say less: constants that hardly move, such as A_log, can make up most of it.
    """
    moved = moved_parts(weights)
    still = len(weights) - len(moved)
    of = (
        f"median of the {count(len(moved), 'part')} that moved; {still:,} did not"
        if still
        else f"median of {count(len(moved), 'part')}"
    )
    return f"{percent(median(one.relative for one in moved))} of their size ({of})"


def _weights(weights: Sequence[WeightMovement]) -> Iterator[Finding]:
    """How far the parts of the weights moved; exact. A part that did not move is another thing than one that moved least."""
    moved = moved_parts(weights)
    if not moved:
        return
    most, least = moved[0], moved[-1]
    span = f"; most {_place(most)} ({percent(most.relative)}), least {_place(least)} ({percent(least.relative)})"
    yield _say(
        f"Training moved the parts of the weights by {typical_movement(weights)}{span if len(moved) > 1 else ''}."
    )
    shares: dict[str, float] = defaultdict(float)
    for one in weights:
        shares[PART_WORDS.get(one.part, one.part)] += one.share
    ordered = sorted(shares.items(), key=lambda one: one[1], reverse=True)
    named = [f"{percent(share)} is in {part}" for part, share in ordered[:MOST_PARTS] if share > 0]
    rest = sum(share for _, share in ordered[MOST_PARTS:])
    yield _say(f"Of the squared distance, {listed([*named, *([f'{percent(rest)} elsewhere'] if rest > 0 else [])])}.")


def _place(one: WeightMovement) -> str:
    if one.layer is None:
        return f"the {one.part}"
    return f"{PART_WORDS.get(one.part, one.part)} of layer {one.layer}".replace("the MLPs", "the MLP")


def _attention(before: Attention, after: Attention) -> Iterator[Finding]:
    """What became of the shares of attention; exact where both models read the same tokens, else nothing is said."""
    if before.tokens != after.tokens or len(before.layers) != len(after.layers):
        return
    changes = {name: getattr(after.all_layers, name) - getattr(before.all_layers, name) for name in SHARE_WORDS}
    told = [
        f"{signed(100 * change, 2)}{' percentage points' if name == 'meta' else ''} on {SHARE_WORDS[name]}"
        for name, change in changes.items()
        if name != "bos" or before.documents_with_bos
    ]
    layer, name, change = max(
        (
            (new.layer, name, getattr(new.mean, name) - getattr(old.mean, name))
            for old, new in zip(before.layers, after.layers, strict=True)
            for name in SHARE_WORDS
        ),
        key=lambda one: abs(one[2]),
    )
    if change == 0:
        yield _say("Attention is shared out as before, in every layer.")
        return
    yield _say(
        f"Attention moved by {listed(told)}; most in layer {layer}: {signed(100 * change, 2)} on {SHARE_WORDS[name]}."
    )


def _say(text: str, *, sign: bool = False) -> Finding:
    return Finding("alignment", text, sign)


# ---- cost ------------------------------------------------------------------------------------------------------------


def of_cost(cost: Cost) -> Iterator[Finding]:
    """Cache and speed at the longest context, and how they stand beside the paper's claims. Source: Hymba, abstract."""
    beside = f"{cost.transformer.name} with random weights"
    if cost.cache:
        last = max(cost.cache, key=lambda one: one.context)
        yield Finding(
            "cost",
            f"At {count(last.context, 'token')} the cache of a sequence takes {size_in_bytes(last.formula)}, beside "
            f"{size_in_bytes(last.transformer_formula)} of {beside}: {number(last.ratio, 2)} times smaller "
            f"({number(last.keys_values_ratio, 2)} without convolution tails and SSM states; {cost.dtype}). "
            f"{_paper_cache(cost, last)}",
        )
        wrong = [one for one in cost.cache if one.measured is not None and one.measured != one.formula]
        counted = [one for one in cost.cache if one.measured is not None]
        if wrong:
            yield Finding(
                "cost",
                f"At {listed(f'{one.context:,}' for one in wrong)} tokens a filled cache holds "
                f"{listed(f'{one.measured:,}' for one in wrong)} bytes, not the {listed(f'{one.formula:,}' for one in wrong)} of the formula.",
                sign=True,
            )
        elif counted:
            yield Finding(
                "cost",
                f"Caches that were filled hold what the formula says, to the byte ({count(len(counted), 'length')}).",
            )
    if cost.decode:
        yield _decoding(cost, beside)
        shorter = sorted(cost.decode, key=lambda one: one.context)[:-1]
        if shorter:
            told = (f"{one.context:,} ({_times(one)})" for one in shorter)
            yield Finding(
                "cost", f"At shorter contexts it runs at this many times the transformer's speed: {listed(told)}."
            )
    if not cost.transformer.is_published_shape and (cost.cache or cost.decode):
        yield Finding("cost", f"The transformer beside it is {shape_of(cost)}.")


def shape_of(cost: Cost) -> str:
    """The transformer in words: whose shape, and its sizes."""
    one = cost.transformer
    return (
        f"{one.name}: {count(one.layers, 'layer')} of width {one.hidden_size:,}, {count(one.heads, 'head')} of queries and "
        f"{one.kv_heads} of keys, {one.parameters:,} parameters beside this checkpoint's {cost.parameters:,}"
    )


def speed_of(cost: Cost, one: DecodeCost) -> str:
    """How many times as fast, over all rounds, and whether they agree."""
    times = f"{number(one.ratio, 2)} times ({number(one.ratio_low, 2)} to {number(one.ratio_high, 2)} over {count(cost.rounds, 'round')})"
    if one.ratio_low > 1:
        return f"faster in every round, {times}"
    return (
        f"slower in every round, {times}"
        if one.ratio_high < 1
        else f"neither faster nor slower in every round, {times}"
    )


def _decoding(cost: Cost, beside: str) -> Finding:
    """Speed at the longest context; a claim needs every round to agree."""
    last = max(cost.decode, key=lambda one: one.context)
    speeds = f"{number(last.tokens_per_second, 1)} tokens per second beside {number(last.transformer_tokens_per_second, 1)} of {beside}"
    where = (
        f"on this machine ({cost.device}, {cost.dtype}, {count(cost.threads, 'thread')}, batch size {cost.batch_size})"
    )
    return Finding(
        "cost",
        f"At {count(last.context, 'token')} of context decoding runs at {speeds}: {speed_of(cost, last)}, {where}. "
        f"{_paper_speed(cost)}",
    )


def _times(one: DecodeCost) -> str:
    """How many times as fast, with the slowest and the fastest round."""
    return f"{number(one.ratio, 2)}, {number(one.ratio_low, 2)} to {number(one.ratio_high, 2)}"


def _paper_cache(cost: Cost, last: CacheCost) -> str:
    """The paper's claim beside our count at the longest context, with why they differ where that is known."""
    claim = cost.paper_cache_ratio
    if not cost.transformer.is_published_shape:
        return _of_other_shapes(claim)
    lies = "lies between these two" if last.ratio < claim < last.keys_values_ratio else "is neither of these two"
    return f"The paper reports {number(claim, 2)} for these shapes at 8k tokens by a count of its own, which {lies}."


def _paper_speed(cost: Cost) -> str:
    claim = cost.paper_throughput_ratio
    if not cost.transformer.is_published_shape:
        return _of_other_shapes(claim)
    return f"The paper reports {number(claim, 2)} for these shapes at 8k tokens, on its own hardware."


def _of_other_shapes(claim: float) -> str:
    return f"The paper's {number(claim, 2)} is of other shapes: Hymba-1.5B beside Llama-3.2-3B."
