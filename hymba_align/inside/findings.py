"""What an inspection shows, in sentences: each computed from its numbers, and gone when they no longer say it.

Attention, fusion and movements are exact for the texts that were read, so their sentences state them. Whatever is said
of a loss, a score, a divergence or a log-probability has to be more than chance (`evidence`), or is said to be within it.
Those of the importance are made in findings_importance.py, of alignment and cost in findings_training.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from statistics import fmean, median

from hymba_align.inside.evidence import FEWEST, LEAST_PREFERENCE, WORTH_TELLING
from hymba_align.inside.result import (
    Attention,
    Finding,
    Fusion,
    Inspection,
    MetaTokens,
)
from hymba_align.inside.wording import count, layers, listed, number, percent, ranges
from hymba_align.inspect_choices import Part

SPELLED = 2.0
"""Characters per token below which it is told that tokens are short: then many of them are single characters"""


def findings(inspection: Inspection) -> tuple[Finding, ...]:
    """Sentences by part, the most telling of each part first; those that the inspection holds already are not read."""
    from hymba_align.inside.findings_importance import of_importance
    from hymba_align.inside.findings_training import of_alignment, of_cost

    parts: list[Iterator[Finding]] = []
    if inspection.attention is not None:
        parts.append(of_attention(inspection.attention))
    parts += [of_importance(one) for one in inspection.importance]
    if inspection.fusion is not None:
        parts.append(of_fusion(inspection.fusion))
    if inspection.meta_tokens is not None:
        parts.append(of_meta_tokens(inspection.meta_tokens))
    if inspection.alignment is not None:
        parts.append(of_alignment(inspection.alignment, inspection.attention_compared, _chance(inspection)))
    if inspection.cost is not None:
        parts.append(of_cost(inspection.cost))
    return tuple(chain.from_iterable(parts))


def _chance(inspection: Inspection) -> float | None:
    """Loss of who knows nothing, in nats per token; None where the vocabulary is not known."""
    vocabulary = inspection.shape.get("vocabulary")
    return math.log(vocabulary) if isinstance(vocabulary, int) and vocabulary > 1 else None


# ---- attention -------------------------------------------------------------------------------------------------------


def of_attention(attention: Attention) -> Iterator[Finding]:
    """Where attention goes; exact for the tokens that were read."""
    say = _sayer("attention")
    shares = attention.all_layers
    begins = (
        f"{percent(shares.bos)} on the <s> that begins {attention.documents_with_bos:,} of {attention.documents:,} documents"
        if attention.documents_with_bos
        else "none on <s>, with which no document begins"
    )
    yield say(
        f"Text tokens put {percent(shares.meta)} of their attention on the meta tokens, {percent(shares.self)} on "
        f"themselves, {percent(shares.cross)} on other tokens and {begins} (mean over layers, heads and "
        f"{attention.tokens:,} tokens)."
    )
    if attention.global_layers is not None and attention.local_layers is not None:
        yield say(
            f"On meta tokens, global layers put {percent(attention.global_layers.meta)} and local ones "
            f"{percent(attention.local_layers.meta)}; on other tokens {percent(attention.global_layers.cross)} and "
            f"{percent(attention.local_layers.cross)}."
        )
    heads = [(layer.layer, at, head) for layer in attention.layers for at, head in enumerate(layer.heads)]
    if not heads:
        return
    most = max(heads, key=lambda one: one[2].meta)
    majority = sum(head.meta > 0.5 for _, _, head in heads)
    who = f"{majority:,} of {count(len(heads), 'head')}" if majority else f"None of {count(len(heads), 'head')}"
    who, half = (f"{who} put", "half of their attention") if majority > 1 else (f"{who} puts", "half of its attention")
    yield say(
        f"{who} more than {half} on meta tokens; head {most[1]} of layer {most[0]} puts the most there, "
        f"{percent(most[2].meta)}."
    )
    spread = [(head.entropy / head.even_entropy, layer, at) for layer, at, head in heads if head.even_entropy > 0]
    if spread and shares.even_entropy > 0:
        ratio, layer, at = min(spread)
        yield say(
            f"The entropy of attention is {number(shares.entropy, 2)} nats, {percent(shares.entropy / shares.even_entropy)} "
            f"of what even attention would have; most focused is head {at} of layer {layer} with {percent(ratio)}."
        )


# ---- fusion ----------------------------------------------------------------------------------------------------------


def of_fusion(fusion: Fusion) -> Iterator[Finding]:
    """How the branches are joined; exact for the tokens that were read. Source: Hymba, equation 3."""
    say = _sayer("fusion")
    if not fusion.layers:
        return
    for layer in fusion.layers:
        for branch, size in (("attention", layer.attention), ("ssm", layer.ssm)):
            if size.after == 0:
                yield say(
                    f"The {'SSM' if branch == 'ssm' else branch} branch of layer {layer.layer} adds nothing: it is 0 after its norm.",
                    sign=True,
                )
    shares = [layer.ssm_share for layer in fusion.layers]
    low, high = (pick(fusion.layers, key=lambda one: one.ssm_share) for pick in (min, max))
    each = (
        f", from {percent(low.ssm_share)} in layer {low.layer} to {percent(high.ssm_share)} in layer {high.layer}"
        if percent(low.ssm_share) != percent(high.ssm_share)
        else ", in every layer"
        if len(shares) > 1
        else ""
    )
    yield say(
        f"After norm and scale the SSM branch makes up {percent(fmean(shares))} of the squared size of both{each}."
    )
    silent = [layer.layer for layer in fusion.layers if layer.attention.before == 0]
    ratios = [layer.ssm.before / layer.attention.before for layer in fusion.layers if layer.attention.before > 0]
    larger = [layer.layer for layer in fusion.layers if layer.ssm.before > layer.attention.before > 0]
    if ratios:
        smaller = "smaller than attention in every layer" if max(ratios) < 1 else "nowhere larger than attention"
        told = f"larger than attention in {layers(larger)}" if larger else smaller
        are = "is" if len(silent) == 1 else "are"
        but = f"; attention is 0 in {layers(silent)}, which {are} left out here" if silent else ""
        yield say(
            f"Before the norms the SSM branch is {told}; its size is {number(min(ratios), 2)} to "
            f"{number(max(ratios), 2)} times attention's (median {number(median(ratios), 2)}){but}."
        )
    cosines = [layer.cosine for layer in fusion.layers if layer.attention.after > 0 and layer.ssm.after > 0]
    if cosines:
        yield say(
            f"The cosine between both branches is {number(fmean(cosines), 2)} on average, from {number(min(cosines), 2)} to "
            f"{number(max(cosines), 2)}{', where neither is 0' if len(cosines) < len(fusion.layers) else ''}."
        )


# ---- meta tokens -----------------------------------------------------------------------------------------------------


def of_meta_tokens(meta: MetaTokens) -> Iterator[Finding]:
    """What meta tokens draw attention for, and how far they moved.

    Preferences were tested, and the threshold corrected, where they were measured (`MetaTokens.threshold_z`).
    """
    say = _sayer("meta_tokens")
    if meta.domains:
        yield from _preferences(meta)
        yield from _spelled(meta)
        totals = sorted(((sum(domain.mass), domain.domain) for domain in meta.domains), reverse=True)
        yield say(
            f"Of the text's attention, all meta tokens together draw {listed(f'{percent(total)} in {_plain(name)}' for total, name in totals)} "
            f"({_cut(meta)})."
        )
        shares = sorted(
            (fmean(each) for each in zip(*(domain.share for domain in meta.domains), strict=True)), reverse=True
        )
        half = next((k for k in range(1, len(shares) + 1) if sum(shares[:k]) >= 0.5), len(shares))
        yield say(
            f"Half of the attention on meta tokens goes to {half} of {count(len(shares), 'token')} (mean over domains); "
            f"were it even, {math.ceil(len(shares) / 2)} would share it."
        )
    if meta.movement:
        most, least = (pick(meta.movement, key=lambda one: one.relative) for pick in (max, min))
        if most.distance == 0:
            yield say("Training left every meta token as it was, to the bit.")
        else:
            yield say(
                f"Training moved meta tokens by {percent(fmean(one.relative for one in meta.movement))} of their length on "
                f"average: token {most.token} most ({percent(most.relative)}), token {least.token} least "
                f"({percent(least.relative)})."
            )


def _cut(meta: MetaTokens) -> str:
    """How much of each text counts, and which domain's short texts decide it."""
    why = f", the median length in {_plain(meta.cut_by)}" if meta.cut_by else ""
    return f"the first {count(meta.first_tokens, 'token')} of each text{why}"


def _preferences(meta: MetaTokens) -> Iterator[Finding]:
    say = _sayer("meta_tokens")
    size = len(meta.domains[0].mass)
    named = [_plain(domain.domain) for domain in meta.domains if domain.documents >= FEWEST]
    least = f"at least {number(1 + LEAST_PREFERENCE, 2)} times as much of the attention on meta tokens in one domain"
    if meta.threshold_z is None:
        yield say(
            f"Which meta token prefers which domain cannot be told: that takes two domains with {FEWEST} documents each."
        )
        return
    if not meta.preferences:
        yield say(
            f"No meta token gets {least} ({listed(named)}) as in the mean of the others by more than chance (over {number(meta.threshold_z, 1)} standard errors)."
        )
        return
    by_domain: dict[str, list[int]] = {}
    for one in meta.preferences:
        by_domain.setdefault(one.domain, []).append(one.token)
    tokens = {one.token for one in meta.preferences}
    told = listed(f"{len(found)} in {_plain(name)} ({ranges(found)})" for name, found in by_domain.items())
    yield say(
        f"{len(tokens)} of {count(size, 'meta token')} get {least} as in the mean of the others, by over {number(meta.threshold_z, 1)} standard errors: {told}."
    )
    top = max(meta.preferences, key=lambda one: one.z)
    yield say(
        f"The clearest is token {top.token} for {_plain(top.domain)}: {percent(top.share)} of the attention on meta tokens "
        f"there, {percent(top.share_elsewhere)} elsewhere ({number(top.z, 1)} standard errors)."
    )


def _spelled(meta: MetaTokens) -> Iterator[Finding]:
    """Domains that the tokenizer hardly knows: what is said of them is about pieces of words."""
    say, domains = _sayer("meta_tokens"), meta.domains
    for domain in domains:
        if domain.unknown > 0:
            yield say(
                f"{percent(domain.unknown)} of the tokens in {_plain(domain.domain)} are unknown to the tokenizer, or single "
                "bytes of characters for which it has no piece.",
                sign=domain.unknown >= WORTH_TELLING,
            )
    letters = [one for one in domains if one.characters_per_token < SPELLED]
    if letters:
        lengths = [number(one.characters_per_token, 1) for one in letters]
        preferred = {one.domain for one in meta.preferences}.intersection(one.domain for one in letters)
        follows = ", so what prefers them prefers pieces as small as that" if preferred else ""
        span = min(lengths) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
        yield say(
            f"In {listed(_plain(one.domain) for one in letters)} a token is {span} characters long on average{follows}."
        )
    longest = max(domains, key=lambda one: one.characters_per_token)
    short = [one for one in domains if one.characters_per_token < 0.5 * longest.characters_per_token]
    for domain in short:
        yield say(
            f"Tokens are less than half as long in {_plain(domain.domain)} as in {_plain(longest.domain)} "
            f"({number(domain.characters_per_token, 1)} and {number(longest.characters_per_token, 1)} characters): the tokenizer "
            "may hardly know it.",
            sign=True,
        )


def _plain(domain: str) -> str:
    return domain.replace("_", " ")


def _sayer(part: Part) -> Callable[..., Finding]:
    def say(text: str, *, sign: bool = False) -> Finding:
        return Finding(part, text, sign)

    return say
