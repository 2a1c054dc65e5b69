"""Plots of what heads do: where attention goes, what each branch is worth, how the branches are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hymba_align.inside import plot_canvas as canvas
from hymba_align.inside.evidence import of_problems
from hymba_align.inside.plot_canvas import Plot
from hymba_align.inside.result import Attention, AttentionMap, Fusion, Importance, LayerAttention, Removal, Shares
from hymba_align.inside.wording import count, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GLOBAL = "Global layers are on grey."
EVEN = "entropy, of even"
HEADS_PER_INCH = 12.0
ASINH_FROM = 12.0
"""How many times the largest change exceeds the median one from which on a linear axis would hide most of them"""


def draw_attention(attention: Attention) -> list[Plot]:
    """Shares by layer, shares by head, and the maps."""
    maps = [draw_map(one, name) for one, name in zip(attention.maps, _map_names(attention.maps), strict=True)]
    return [_by_layer(attention), _by_head(attention), *maps]


def _categories(attention: Attention) -> list[str]:
    """What attention is split into; <s> only where a document begins with it."""
    return [name for name in canvas.SHARES if name != "bos" or attention.documents_with_bos]


def _by_layer(attention: Attention) -> Plot:
    figure = canvas.new_figure(3.3)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = attention.layers
    _axis(left, layers)
    bottom = np.zeros(len(layers))
    for name in _categories(attention):
        height = np.array([getattr(layer.mean, name) for layer in layers])
        colour = canvas.SHARE_COLOURS[name]
        left.bar(range(len(layers)), height, 0.78, bottom, color=colour, label=canvas.SHARES[name], zorder=2)
        bottom += height
    left.set_ylim(0, 1)
    left.yaxis.set_major_formatter(canvas.percent_tick)
    left.set_title("Where attention goes")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.34), ncols=4, handlelength=1.0, columnspacing=1.2)
    _axis(right, layers)
    for values, style, title in (
        ([layer.mean.even_entropy for layer in layers], {"color": canvas.GREY, "linestyle": "--"}, "even attention"),
        ([layer.mean.entropy for layer in layers], {"color": canvas.BLUE, "marker": "o"}, "measured"),
    ):
        right.plot(range(len(layers)), values, label=title, **style)
    right.set_ylim(bottom=0)
    right.set_ylabel("nats")
    right.set_title("Entropy of attention")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, -0.34), ncols=2)
    caption = (
        "Left: the share of text tokens' attention that falls on meta tokens, on the token itself and on other tokens"
        f"{', and on the <s> that begins a document' if attention.documents_with_bos else ''}, mean over heads. "
        f"Right: how spread out it is, beside attention that falls evenly on all that a token sees. {GLOBAL}"
    )
    alt = f"Stacked bars of attention shares in {count(len(layers), 'layer')}: {_span(layers, 'meta', 'on meta tokens')}, "
    alt += f"{_span(layers, 'self', 'on the token itself')}, {_span(layers, 'cross', 'on other tokens')}."
    return canvas.finished(figure, "attention_layers", "attention", "Attention by layer", caption, alt)


def _by_head(attention: Attention) -> Plot:
    layers = attention.layers
    heads = len(layers[0].heads)
    names = _categories(attention)
    height = min(8.0, max(2.9, 1.5 + len(layers) / HEADS_PER_INCH * 2))
    figure = canvas.new_figure(height)
    panels = list(figure.subplots(1, len(names) + 1, sharey=True))
    drawn: list[tuple[str, Callable[[Shares], float]]] = [(canvas.SHARES[name], _share(name)) for name in names]
    drawn.append((EVEN, lambda one: one.entropy / one.even_entropy if one.even_entropy else float("nan")))
    for axes, (title, value) in zip(panels, drawn, strict=True):
        values = np.array([[value(head) for head in layer.heads] for layer in layers])
        shown = canvas.image(axes, values, low=0, high=canvas.highest(values))
        if values.size <= canvas.WRITTEN_IN_CELLS:
            canvas.write_in_cells(axes, 100 * values)
        axes.set_title(title)
        canvas.colour_bar(figure, shown, axes, "", percent=True, below=True)
        axes.set_xticks(ticks := canvas.thinned(heads, 8), [str(at) for at in ticks])
        axes.set_xlabel("head")
    panels[0].set_ylabel("layer (G: global)")
    ticks = canvas.thinned(len(layers), 32)
    panels[0].set_yticks(ticks, [f"{'G ' if layers[at].is_global else ''}{layers[at].layer}" for at in ticks])
    caption = (
        "Each square is a head: the share of its attention on each kind of token, and, last, its entropy as a share of "
        "what even attention would have, in percent. Each panel has a scale of its own."
    )
    most = max(((head.meta, layer.layer, at) for layer in layers for at, head in enumerate(layer.heads)))
    alt = f"Heat maps over {count(len(layers), 'layer')} and {count(heads, 'head')}; most on meta tokens: "
    alt += f"{percent(most[0])}, head {most[2]} of layer {most[1]}."
    return canvas.finished(figure, "attention_heads", "attention", "Attention by head", caption, alt)


def draw_map(one: AttentionMap, name: str) -> Plot:
    """Attention of one layer within a text: each row a token that looks, each column what it looks at."""
    size = len(one.queries)
    side = min(8.2, max(3.0, 1.3 + 0.155 * size))
    figure = canvas.new_figure(side + 0.9, min(canvas.WIDTH, side + 2.2))
    top, axes = figure.subplots(2, 1, height_ratios=(0.8, side))
    top.bar(range(len(one.meta)), one.meta, 0.8, color=canvas.BLUE)
    top.set_xlim(-0.6, len(one.meta) - 0.4)
    top.set_xticks(ticks := canvas.thinned(len(one.meta), 24), [str(at) for at in ticks])
    top.tick_params(axis="x", length=0, labelsize=8)
    top.set_title("on each meta token, mean over the text")
    top.locator_params(axis="y", nbins=2)
    top.yaxis.set_major_formatter(canvas.percent_tick)
    weights = np.array(one.weights, dtype=float)
    weights[np.triu_indices(size, k=2, m=size + 1)] = np.nan  # what comes later is not seen
    shown = canvas.image(axes, weights, low=0, high=canvas.highest(weights))
    words = [canvas.label(word) for word in one.queries]
    axes.set_xticks(range(size + 1), ["meta tokens", *words], rotation=90, fontsize=8)
    axes.set_yticks(range(size), words, fontsize=8)
    axes.axvline(0.5, color=canvas.SOFT, linewidth=1)
    axes.set_title("of the row's token on the column's")
    canvas.colour_bar(figure, shown, axes, "", percent=True)
    kind = "global" if one.is_global else "local"
    caption = (
        f"Attention of layer {one.layer} ({kind}) within the first {count(size, 'token')} of {one.document}, mean over its heads; "
        "every row adds up to 100 %. Another text: hymba-align inspect --text FILE."
    )
    if any(
        canvas.MISSING in word_shown and canvas.MISSING not in word
        for word_shown, word in zip(words, one.queries, strict=True)
    ):
        caption += f" A {canvas.MISSING} is a character that the plot's font lacks."
    rows = np.array(one.weights, dtype=float)
    alt = (
        f"Heat map of {count(size, 'token')} by what they look at; on meta tokens {percent(float(rows[:, 0].mean()))} "
    )
    alt += f"on average, from {percent(float(rows[:, 0].min()))} to {percent(float(rows[:, 0].max()))}."
    return canvas.finished(figure, name, "attention", f"Attention map of layer {one.layer}", caption, alt)


def _map_names(maps: Sequence[AttentionMap]) -> list[str]:
    """A file name for each map, by layer; more of a layer are numbered."""
    names: list[str] = []
    for one in maps:
        name = f"map_layer_{one.layer}"
        again = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{again + 1}" if again else name)
    return names


# ---- importance ------------------------------------------------------------------------------------------------------


def draw_importance(importance: Importance) -> Plot:
    """What removing each branch of each layer does to one score."""
    layers, is_loss = importance.layers, importance.metric == "loss"
    figure = canvas.new_figure(3.4)
    axes: Axes = figure.subplots()
    canvas.layer_axis(axes, [layer.layer for layer in layers], [layer.is_global for layer in layers])
    axes.axhline(0, color=canvas.INK, linewidth=0.8)
    kinds = (
        ("without attention heads", canvas.ATTENTION, "o", -0.13, [layer.attention for layer in layers]),
        ("without SSM heads", canvas.SSM, "s", 0.13, [layer.ssm for layer in layers]),
    )
    for title, colour, marker, shift, removals in kinds:
        changes = [one.change if is_loss else of_problems(one.change, importance.documents) for one in removals]
        errors = [change.stderr or 0.0 for change in changes]
        places = [at + shift for at in range(len(layers))]
        axes.errorbar(
            places, [one.change.mean for one in removals], errors, fmt=marker, color=colour, capsize=2, label=title
        )
    if importance.chance is not None:
        level = importance.chance - importance.whole.mean
        axes.axhline(level, color=canvas.INK, linewidth=1, linestyle=":", label="random guessing")
    is_bent = _bend(axes, [removal for kind in kinds for removal in kind[4]])
    axes.set_title(f"Change of {_metric(importance)}", pad=24)
    axes.set_ylabel(f"{'percentage points' if importance.unit.startswith('%') else importance.unit}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.5)
    worse = "higher" if importance.lower_is_better else "lower"
    caption = (
        f"How {_metric(importance)} changes when one layer's attention heads or SSM heads are removed: {worse} is worse; "
        f"bars are one standard error. {GLOBAL}{' The axis is bent so that small changes show.' if is_bent else ''}"
    )
    largest = max(kinds, key=lambda kind: max(abs(one.change.mean) for one in kind[4]))
    at = max(range(len(layers)), key=lambda index: abs(largest[4][index].change.mean))
    alt = f"Points with error bars for {count(len(layers), 'layer')}; the largest change, "
    alt += f"{signed(largest[4][at].change.mean)}, is {largest[0]} of layer {layers[at].layer}."
    title = "Loss without a branch" if is_loss else f"{importance.metric} without a branch"
    return canvas.finished(figure, f"importance_{_file_word(importance.metric)}", "importance", title, caption, alt)


def _bend(axes: Axes, removals: Sequence[Removal]) -> bool:
    """Bends an axis (asinh) on which one change would hide the others."""
    from matplotlib.ticker import NullLocator

    sizes = np.abs([removal.change.mean for removal in removals])
    middle = float(np.median(sizes))
    if not np.isfinite(sizes).all() or middle == 0 or sizes.max() < ASINH_FROM * middle:
        return False
    axes.set_yscale("asinh", linear_width=middle)
    low, high = (1.5 * float(end) for end in axes.get_ylim())
    steps = [step * 10.0**power for power in range(-8, 9) for step in (1, 3)]
    shown = [step for step in steps if middle <= step <= max(-low, high)][-6:]
    axes.set_yticks([-step for step in shown if -step >= low] + [0.0] + [step for step in shown if step <= high])
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(canvas.plain_tick)
    return True


def _metric(importance: Importance) -> str:
    return "the loss" if importance.metric == "loss" else f"the score on {canvas.label(importance.metric, 40)}"


def _file_word(name: str) -> str:
    """A name that a file may have."""
    return "".join(one if one.isascii() and one.isalnum() else "_" for one in name)[:60].lower()


# ---- fusion ----------------------------------------------------------------------------------------------------------


def draw_fusion(fusion: Fusion) -> Plot:
    """Sizes of both branches before and behind their norms, learned scales, and how alike they are."""
    from matplotlib.ticker import LogLocator, NullLocator

    layers = fusion.layers
    figure = canvas.new_figure(4.8)
    panels = figure.subplots(2, 2, sharex=True)
    places = range(len(layers))
    for row in panels:
        for axes in row:
            numbers, shaded = [one.layer for one in layers], [one.is_global for one in layers]
            canvas.layer_axis(axes, numbers, shaded, name=axes in panels[1], most=16)
    (before, after), (scale, alike) = panels
    for name, colour, marker in (("attention", canvas.ATTENTION, "o"), ("ssm", canvas.SSM, "s")):
        sizes = [getattr(layer, name) for layer in layers]
        style = {"color": colour, "marker": marker}
        shown = "attention heads" if name == "attention" else "SSM heads"
        before.plot(places, [size.before for size in sizes], label=shown, **style)
        after.plot(places, [size.after for size in sizes], **style)
        scale.plot(places, [size.scale for size in sizes], **style)
        low, high = [size.scale_min for size in sizes], [size.scale_max for size in sizes]
        scale.fill_between(places, low, high, color=colour, alpha=0.14, linewidth=0)
    if min(min(layer.attention.before, layer.ssm.before) for layer in layers) > 0:
        before.set_yscale("log")
        before.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        before.yaxis.set_major_formatter(canvas.plain_tick)
        before.yaxis.set_minor_locator(NullLocator())
    alike.plot(places, [layer.cosine for layer in layers], color=canvas.GREEN, marker="D", label="cosine")
    alike.plot(places, [layer.ssm_share for layer in layers], color=canvas.SSM, marker="s", label="SSM share of size")
    alike.axhline(0, color=canvas.INK, linewidth=0.8)
    after.set_ylim(0, 1.2 * canvas.highest([(layer.attention.after, layer.ssm.after) for layer in layers]))
    for axes, title in zip(
        (before, after, scale, alike),
        ("Size before the norm", "Size behind norm and scale", "Learned scale", "How alike they are"),
        strict=True,
    ):
        axes.set_title(title)
    before.legend(loc="best", ncols=2)
    alike.legend(loc="best", ncols=2)
    caption = (
        "Root mean square of each branch's output per channel before and behind its norm and learned scale; the scale "
        "itself, with its smallest and largest channel as a band; the cosine between both branches, and how much of "
        f"their squared size is the SSM's. {GLOBAL}"
    )
    shares = [layer.ssm_share for layer in layers]
    ratios = sorted(layer.ssm.before / layer.attention.before for layer in layers if layer.attention.before)
    middle = number(ratios[len(ratios) // 2], 2) if ratios else "not a number"
    alt = f"Lines over {count(len(layers), 'layer')}. Before the norm the SSM branch is {middle} times as large as "
    alt += f"attention in the middle layer by that ratio; behind it, its share is {percent(min(shares))} to {percent(max(shares))}."
    return canvas.finished(figure, "fusion", "fusion", "How the branches are joined", caption, alt)


# ---- axes ------------------------------------------------------------------------------------------------------------


def _axis(axes: Axes, layers: Sequence[LayerAttention]) -> None:
    canvas.layer_axis(axes, [layer.layer for layer in layers], [layer.is_global for layer in layers], most=16)


def _share(name: str) -> Callable[[Shares], float]:
    return lambda shares: float(getattr(shares, name))


def _span(layers: Sequence[LayerAttention], name: str, words: str) -> str:
    values = [getattr(layer.mean, name) for layer in layers]
    return f"{percent(min(values))} to {percent(max(values))} {words}"
