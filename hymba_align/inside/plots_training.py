"""Plots of meta tokens, of what training changed, and of what decoding takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hymba_align.inside import plot_canvas as canvas
from hymba_align.inside.evidence import LEAST_PREFERENCE
from hymba_align.inside.plot_canvas import Plot
from hymba_align.inside.result import (
    Alignment,
    Attention,
    Cost,
    Divergence,
    DomainAttention,
    MetaMovement,
    MetaTokens,
    Pairs,
    WeightMovement,
)
from hymba_align.inside.wording import count, number, percent, signed, size_in_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("attention", "ssm", "fusion", "mlp", "norms")
PART_WORDS = {"ssm": "SSM", "mlp": "MLP"}


# ---- meta tokens -----------------------------------------------------------------------------------------------------


def draw_meta_tokens(meta: MetaTokens) -> list[Plot]:
    """Which meta tokens draw attention in which domain and layer, and how far training moved each."""
    plots = [_domains(meta), _by_layer(meta.domains)] if meta.domains else []
    return [*plots, *([_movement(meta.movement)] if meta.movement else [])]


def _domains(meta: MetaTokens) -> Plot:
    names = [domain.domain for domain in meta.domains]
    mass = np.array([domain.mass for domain in meta.domains])
    several = len(names) > 1
    figure = canvas.new_figure((0.9 + 0.3 * len(names)) * (2 if several else 1) + 0.5)
    panels = list(figure.subplots(2 if several else 1, 1, squeeze=False)[:, 0])
    shown = canvas.image(panels[0], mass, low=0, high=canvas.highest(mass))
    panels[0].set_title("share of all attention")
    canvas.colour_bar(figure, shown, panels[0], "", percent=True)
    if several:
        share = np.array([domain.share for domain in meta.domains])
        difference = share - (share.sum(0, keepdims=True) - share) / (len(names) - 1)
        high = canvas.highest(difference)
        shown = canvas.image(panels[1], difference, low=-high, high=high, colours=canvas.DIVERGING)
        panels[1].set_title(
            "share of the attention on meta tokens: more (red) or less (blue) than in the other domains"
        )
        canvas.colour_bar(figure, shown, panels[1], "", percent=True)
        dots = [(one.token, names.index(one.domain)) for one in meta.preferences if one.domain in names]
        places = [x for x, _ in dots], [y for _, y in dots]
        panels[1].plot(*places, "o", color=canvas.INK, markersize=5, markeredgecolor="white", markeredgewidth=1)
    for axes in panels:
        axes.set_yticks(range(len(names)), [canvas.label(name.replace("_", " "), 18) for name in names])
        axes.set_xticks(ticks := canvas.thinned(mass.shape[1], 24), [str(at) for at in ticks])
    panels[-1].set_xlabel("meta token")
    caption = (
        "How much of the text's attention each meta token draws in texts of each domain, mean over layers, heads and "
        f"tokens.{_domains_differ(meta) if several else ''}"
    )
    row, token = canvas.where_highest(mass)
    alt = f"Heat map of {count(len(names), 'domain')} by {count(mass.shape[1], 'meta token')}; most, "
    alt += f"{percent(float(mass[row, token]))}, on token {token} in {canvas.label(names[row], 40)}; "
    alt += f"{count(len(meta.preferences), 'dot')}."
    return canvas.finished(figure, "meta_domains", "meta_tokens", "Meta tokens by domain", caption, alt)


def _domains_differ(meta: MetaTokens) -> str:
    """What the second panel shows, and what a dot is."""
    told = " Below: how the way it is split among them differs from the other domains"
    if meta.threshold_z is None:
        return f"{told}."
    least = f"at least {number(1 + LEAST_PREFERENCE, 2)} times as much"
    return f"{told}, in percentage points; a dot is a token that gets {least}, by over {number(meta.threshold_z, 1)} standard errors."


def _by_layer(domains: Sequence[DomainAttention]) -> Plot:
    mass = np.mean([domain.by_layer for domain in domains], axis=0)
    layers, tokens = mass.shape
    figure = canvas.new_figure(min(4.8, 1.3 + 0.13 * layers + 0.06 * max(0, 12 - layers)))
    axes: Axes = figure.subplots()
    shown = canvas.image(axes, mass, low=0, high=canvas.highest(mass))
    axes.set_xticks(ticks := canvas.thinned(tokens, 24), [str(at) for at in ticks])
    axes.set_yticks(ticks := canvas.thinned(layers, 16), [str(at) for at in ticks])
    axes.set_xlabel("meta token")
    axes.set_ylabel("layer")
    axes.set_title("Attention on each meta token, mean over domains")
    canvas.colour_bar(figure, shown, axes, "", percent=True)
    caption = "The share of attention on each meta token in each layer, mean over heads, tokens and domains."
    layer, token = canvas.where_highest(mass)
    alt = f"Heat map of {count(layers, 'layer')} by {count(tokens, 'meta token')}; most, {percent(float(mass[layer, token]))}, "
    alt += f"on token {token} in layer {layer}."
    return canvas.finished(figure, "meta_layers", "meta_tokens", "Meta tokens by layer", caption, alt)


def _movement(movement: Sequence[MetaMovement]) -> Plot:
    figure = canvas.new_figure(2.3)
    axes: Axes = figure.subplots()
    axes.bar([one.token for one in movement], [one.relative for one in movement], 0.8, color=canvas.BLUE)
    axes.set_xlim(-0.6, len(movement) - 0.4)
    axes.set_xticks(ticks := canvas.thinned(len(movement), 24), [str(at) for at in ticks])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("meta token")
    axes.set_title("How far training moved each meta token, of its length")
    axes.yaxis.set_major_formatter(canvas.percent_tick)
    most = max(movement, key=lambda one: one.relative)
    caption = "How far training moved each meta token, as a share of its length before."
    alt = f"Bars for {count(len(movement), 'meta token')}; token {most.token} moved most, {percent(most.relative)}."
    return canvas.finished(figure, "meta_movement", "meta_tokens", "How far meta tokens moved", caption, alt)


# ---- alignment -------------------------------------------------------------------------------------------------------


def draw_alignment(alignment: Alignment, after: Attention | None) -> list[Plot]:
    """Movement of the weights, attention before and after, pairs, and the divergence by position."""
    plots = [_weights(alignment.weights)] if any(one.layer is not None for one in alignment.weights) else []
    if after is not None and alignment.attention_before is not None:
        plots.append(_attention_change(alignment.attention_before, after))
    if alignment.pairs is not None and alignment.pairs.pairs:
        plots.append(_pairs(alignment.pairs))
    if alignment.divergence is not None and alignment.divergence.by_position:
        plots.append(_positions(alignment.divergence))
    return plots


def _weights(weights: Sequence[WeightMovement]) -> Plot:
    layers = sorted({one.layer for one in weights if one.layer is not None})
    of = {(one.layer, one.part): one for one in weights}
    found = [part for part in PARTS if any((layer, part) in of for layer in layers)]
    outside = [one for one in weights if one.layer is None]
    moved = np.array([[_relative(of.get((layer, part))) for layer in layers] for part in found])
    figure = canvas.new_figure(0.9 + 0.36 * max(len(found), len(outside) + 1))
    axes, beside = figure.subplots(1, 2, width_ratios=(3.4, 1))
    shown = canvas.image(axes, moved, low=0, high=canvas.highest(moved))
    axes.set_yticks(range(len(found)), [PART_WORDS.get(part, part) for part in found])
    axes.set_xticks(ticks := canvas.thinned(len(layers), 24), [str(layers[at]) for at in ticks])
    axes.set_xlabel("layer")
    axes.set_title("in layers, %")
    canvas.colour_bar(figure, shown, axes, "", percent=True)
    if moved.size <= canvas.WRITTEN_IN_CELLS:
        canvas.write_in_cells(axes, 100 * moved)
    beside.barh([one.part for one in outside], [one.relative for one in outside], 0.6, color=canvas.BLUE)
    beside.invert_yaxis()
    beside.grid(axis="x")
    beside.grid(False, axis="y")
    beside.set_title("outside layers")
    beside.locator_params(axis="x", nbins=3)
    beside.xaxis.set_major_formatter(canvas.percent_tick)
    caption = (
        "How far training moved each part of the weights: the length of the difference as a share of the part's length "
        "before. Fusion is the two branch norms and the projection behind them."
    )
    most = max((one for one in weights if one.layer is not None), key=lambda one: one.relative)
    alt = f"Heat map of {count(len(found), 'part')} by {count(len(layers), 'layer')}; most, {percent(most.relative)}: "
    alt += f"{PART_WORDS.get(most.part, most.part)} of layer {most.layer}."
    return canvas.finished(figure, "weights", "alignment", "How far weights moved", caption, alt)


def _attention_change(before: Attention, after: Attention) -> Plot:
    figure = canvas.new_figure(2.9)
    axes: Axes = figure.subplots()
    pairs = list(zip(before.layers, after.layers, strict=True))
    canvas.layer_axis(axes, [layer.layer for layer in after.layers], [layer.is_global for layer in after.layers])
    axes.axhline(0, color=canvas.INK, linewidth=0.8)
    markers = {"meta": "o", "bos": "^", "self": "D", "cross": "s"}
    largest = (0.0, "", 0)
    for name in canvas.SHARES:
        if name == "bos" and not (before.documents_with_bos or after.documents_with_bos):
            continue
        changes = [getattr(new.mean, name) - getattr(old.mean, name) for old, new in pairs]
        colour = canvas.GREY if name == "cross" else canvas.SHARE_COLOURS[name]
        axes.plot(range(len(changes)), changes, color=colour, marker=markers[name], label=canvas.SHARES[name])
        for layer, change in zip(after.layers, changes, strict=True):
            largest = max(largest, (change, canvas.SHARES[name], layer.layer), key=lambda one: abs(one[0]))
    axes.yaxis.set_major_formatter(lambda value, _: canvas.plain_tick(round(100 * value, 9)))
    axes.set_ylabel("percentage points")
    axes.set_title("Change of the attention that falls on", pad=24)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    caption = f"How the shares of attention changed, in percentage points, mean over heads; same texts. {'Global layers are on grey.'}"
    alt = f"Lines over {count(len(pairs), 'layer')}; the largest change is {signed(100 * largest[0], 1)} percentage points on "
    alt += f"{largest[1]} in layer {largest[2]}." if largest[1] else "nothing."
    return canvas.finished(figure, "attention_change", "alignment", "Attention before and after", caption, alt)


def _pairs(pairs: Pairs) -> Plot:
    chosen = np.array([(one.chosen_after - one.chosen_before) / max(1, one.chosen_tokens) for one in pairs.pairs])
    rejected = np.array(
        [(one.rejected_after - one.rejected_before) / max(1, one.rejected_tokens) for one in pairs.pairs]
    )
    figure = canvas.new_figure(4.0)
    axes, histogram = figure.subplots(1, 2, width_ratios=(1, 1))
    axes.grid(True, axis="both")
    axes.axhline(0, color=canvas.INK, linewidth=0.8)
    axes.axvline(0, color=canvas.INK, linewidth=0.8)
    axes.scatter(chosen, rejected, s=16, color=canvas.BLUE, alpha=0.6, linewidths=0)
    axes.plot([pairs.chosen_change.mean], [pairs.rejected_change.mean], "D", color=canvas.VERMILION, label="all tokens")
    axes.set_xlabel("chosen answer, nats per token")
    axes.set_ylabel("rejected answer, nats per token")
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("Change of log-probability")
    axes.legend(loc="best")
    margins = np.array([_margin_change(one) for one in pairs.pairs])
    histogram.hist(margins[np.isfinite(margins)], bins=min(24, max(6, len(margins) // 3)), color=canvas.SKY)
    histogram.axvline(0, color=canvas.INK, linewidth=0.8)
    histogram.axvline(pairs.margin_change.mean, color=canvas.VERMILION, linestyle="--", label="mean")
    histogram.set_xlabel("margin, nats per pair")
    histogram.set_ylabel("pairs")
    histogram.set_title("Change of the margin")
    histogram.legend(loc="best")
    caption = (
        "Left: each point is a pair; left of the upright line its chosen answer became less likely, below the level one "
        "its rejected answer did; the diamond is the change per token over all answers, in which long ones weigh more. Right: how much the margin, chosen minus rejected, grew over whole answers."
    )
    alt = f"{count(len(margins), 'pair')}: chosen answers {signed(pairs.chosen_change.mean)} and rejected "
    alt += f"{signed(pairs.rejected_change.mean)} nats per token over all answers; the margin grew in {int((margins > 0).sum())}."
    return canvas.finished(figure, "pairs", "alignment", "Chosen and rejected answers", caption, alt)


def _positions(divergence: Divergence) -> Plot:
    figure = canvas.new_figure(2.7)
    axes: Axes = figure.subplots()
    edges = [first for first, _, _ in divergence.by_position] + [divergence.by_position[-1][1] + 1]
    means = [mean for _, _, mean in divergence.by_position]
    widths = np.diff(edges)
    axes.bar(edges[:-1], means, widths, align="edge", color=canvas.SKY, edgecolor="white", linewidth=0.8)
    axes.axhline(divergence.kl.mean, color=canvas.INK, linewidth=1, linestyle=":", label="mean")
    axes.set_xlabel("token of the document")
    axes.set_title("KL by position in the document")
    axes.set_ylabel("KL, nats per token")
    axes.yaxis.set_major_formatter(canvas.plain_tick)
    axes.set_xlim(edges[0], edges[-1])
    axes.legend(loc="best")
    caption = "How far the next-token distribution has moved from the other checkpoint's, by position in the document."
    top = max(divergence.by_position, key=lambda one: one[2])
    alt = f"Bars over {count(len(means), 'range')} of positions; highest, {number(top[2])} nats, at tokens {top[0]} to {top[1]}."
    return canvas.finished(figure, "divergence", "alignment", "KL by position", caption, alt)


# ---- cost ------------------------------------------------------------------------------------------------------------


def draw_cost(cost: Cost) -> list[Plot]:
    """Cache and speed over the context, beside the transformer."""
    both = [bool(cost.cache), bool(cost.decode)]
    if not any(both):
        return []
    figure = canvas.new_figure(3.4)
    panels = list(figure.subplots(1, sum(both), squeeze=False)[0])
    said = []
    if cost.cache:
        _cache(panels[0], cost)
        last = cost.cache[-1]
        said.append(
            f"{size_in_bytes(last.formula)} beside {size_in_bytes(last.transformer_formula)} at {last.context:,} tokens"
        )
    if cost.decode:
        _speed(panels[-1], cost)
        slow = cost.decode[-1]
        said.append(
            f"{number(slow.tokens_per_second, 1)} beside {number(slow.transformer_tokens_per_second, 1)} tokens per "
            f"second at {slow.context:,} tokens"
        )
    for axes in panels:
        axes.set_xlabel("tokens of context")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    caption = (
        "Bytes of one sequence's generation cache by formula (crosses: counted in a filled cache), and tokens decoded per "
        f"second on this machine, beside {cost.transformer.name} with random weights."
    )
    return [canvas.finished(figure, "cost", "cost", "Cache and decoding", caption, f"Lines: {'; '.join(said)}.")]


def _cache(axes: Axes, cost: Cost) -> None:
    contexts = [one.context for one in cost.cache]
    kinds: tuple[tuple[str, str, str, list[int], list[int | None]], ...] = (
        ("this checkpoint", canvas.BLUE, "o", [c.formula for c in cost.cache], [c.measured for c in cost.cache]),
        (
            "transformer",
            canvas.GREY,
            "s",
            [c.transformer_formula for c in cost.cache],
            [c.transformer_measured for c in cost.cache],
        ),
    )
    for title, colour, marker, formula, measured in kinds:
        axes.plot(contexts, formula, color=colour, marker=marker, label=title)
        found = [(x, y) for x, y in zip(contexts, measured, strict=True) if y is not None]
        axes.plot([x for x, _ in found], [y for _, y in found], "x", color=canvas.INK, markersize=7)
    axes.yaxis.set_major_formatter(lambda value, _: size_in_bytes(value).replace(".0 ", " ") if value else "0")
    axes.set_title(f"Cache of one sequence, {cost.dtype}")
    _contexts(axes, contexts)


def _speed(axes: Axes, cost: Cost) -> None:
    contexts = [one.context for one in cost.decode]
    ours = [one.tokens_per_second for one in cost.decode]
    theirs = [one.transformer_tokens_per_second for one in cost.decode]
    axes.plot(contexts, ours, color=canvas.BLUE, marker="o", label="this checkpoint")
    axes.plot(contexts, theirs, color=canvas.GREY, marker="s", label="transformer")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"Decoding, batch size {cost.batch_size}")
    _contexts(axes, contexts)


def _contexts(axes: Axes, contexts: Sequence[int]) -> None:
    axes.set_xlim(0, 1.06 * max(contexts))
    apart = [x for at, x in enumerate(contexts) if at == 0 or x - contexts[at - 1] > 0.1 * max(contexts)]
    axes.set_xticks(apart, [f"{context:,}" for context in apart])


# ---- axes ------------------------------------------------------------------------------------------------------------


def _relative(movement: WeightMovement | None) -> float:
    return float("nan") if movement is None else movement.relative


def _margin_change(pair: Any) -> float:
    return float(pair.chosen_after - pair.rejected_after - pair.chosen_before + pair.rejected_before)
