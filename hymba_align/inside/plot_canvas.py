"""What all plots share: fonts, colours, axes over layers, texts that act nowhere, and the PNG at the end.

matplotlib's object-oriented interface alone: no window, no figure that outlives its drawing, no settings of a user.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hymba_align.eval.report.words import seen
from hymba_align.inside.wording import number, significant
from hymba_align.inspect_choices import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
WIDTH = 9.0  # inches; the page is as wide as 8.6 of them at 130 dots
# Okabe and Ito's colours, told apart by the colour-blind, and by brightness.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#b86a98",
    "#8a9097",
)
ATTENTION, SSM = BLUE, VERMILION
INK, SOFT, LINE, SHADE = "#1c2024", "#5b6168", "#d9dce0", "#eceef1"
SHARES = {"meta": "meta tokens", "bos": "<s>", "self": "itself", "cross": "other tokens"}
SHARE_COLOURS = {"meta": BLUE, "bos": ORANGE, "self": GREEN, "cross": "#c9ccd1"}
SEQUENTIAL, DIVERGING = "Blues", "RdBu_r"  # light is little: so they stay readable turned around for the dark page
MISSING = "□"
WRITTEN_IN_CELLS = 40
"""Squares of a heat map at most in which numbers still read well"""
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a token is a `$`
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.interpolation": "nearest",
}


@dataclass(frozen=True)
class Plot:
    """A picture, and what is to be said of it."""

    name: str
    """Of its file, without `.png`"""
    part: Part
    title: str
    caption: str
    """What is drawn, in a sentence"""
    alt: str
    """What is seen, for who does not see it"""
    png: bytes
    width: int
    """dots"""
    height: int


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """A context in which figures have this page's style, whatever a user has set in matplotlib, and their settings after it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, STYLE))  # its keys are typed one by one
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of so many inches whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finished(figure: Figure, name: str, part: Part, title: str, caption: str, alt: str) -> Plot:
    """The figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        # One panel too small for its labels: matplotlib then leaves the layout as it is, which is what we want of it.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    width, height = (round(size * DPI) for size in figure.get_size_inches())
    return Plot(name, part, title, caption, alt, file.getvalue(), width, height)


def label(text: str, most: int = 14) -> str:
    """A text of others as a label: in one line, no character that acts, a box for each that the font lacks."""
    shown = seen(text).replace("\n", "↵")
    if not shown.strip():
        shown = "␣" * len(shown) or "(empty)"
    shown = shown.strip()
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return "".join(one if ord(one) in _glyphs() else MISSING for one in shown)


@functools.cache
def _glyphs() -> frozenset[int]:
    """Characters of the font that every matplotlib has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())


def layer_axis(
    axes: Axes, layers: Sequence[int], is_global: Sequence[bool], *, name: bool = True, most: int = 32
) -> None:
    """Layers from left to right, global ones on grey, at most so many of them named."""
    for at, shaded in enumerate(is_global):
        if shaded:
            axes.axvspan(at - 0.5, at + 0.5, color=SHADE, zorder=0, linewidth=0)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    ticks = thinned(len(layers), most)
    axes.set_xticks(ticks, [str(layers[at]) for at in ticks])
    axes.tick_params(axis="x", length=0)
    if name:
        axes.set_xlabel("layer")


def thinned(size: int, most: int) -> list[int]:
    """Positions to label so that at most so many labels stand side by side: every one, every second, fifth, tenth, ..."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if size <= most * step)
    return list(range(0, size, step))


def image(axes: Axes, values: Any, *, low: float, high: float, colours: str = SEQUENTIAL) -> Any:
    """A heat map; what was not measured (NaN) is grey."""
    import matplotlib
    import numpy as np

    coloured = matplotlib.colormaps[colours].with_extremes(bad=SHADE)
    axes.grid(False)
    shown = axes.imshow(np.asarray(values, dtype=float), vmin=low, vmax=high, cmap=coloured, aspect="auto")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return shown


def colour_bar(
    figure: Figure, shown: Any, axes: Any, title: str, *, percent: bool = False, below: bool = False
) -> None:
    """The scale of a heat map, at its right or below it."""
    if below:
        bar = figure.colorbar(shown, ax=axes, location="bottom", fraction=0.04, pad=0.02, aspect=18)
        bar.ax.locator_params(nbins=3)
    else:
        bar = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.015, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=8.5)
    (bar.ax.xaxis if below else bar.ax.yaxis).set_major_formatter(percent_tick if percent else plain_tick)
    bar.set_label(title)


def highest(values: Any) -> float:
    """The largest size of what was measured, as the end of a scale: 1 where all is 0 or not a number."""
    import numpy as np

    return float(np.nanmax(np.abs(values), initial=0.0)) or 1.0


def where_highest(values: Any) -> tuple[int, int]:
    """Row and column of the largest value of a table."""
    import numpy as np

    row, column = np.unravel_index(np.nan_to_num(values, nan=-np.inf).argmax(), values.shape)
    return int(row), int(column)


def write_in_cells(axes: Axes, values: Any) -> None:
    """The numbers of a small heat map, on its squares."""
    import numpy as np

    high = highest(values)
    for row, column in np.ndindex(values.shape):
        if np.isfinite(values[row, column]):
            colour = "white" if values[row, column] > 0.6 * high else INK
            text = number(float(values[row, column]), 1) if high >= 10 else significant(float(values[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)


def percent_tick(value: float, _: object = None) -> str:
    """A share as a tick in percent."""
    return f"{plain_tick(round(100 * value, 10))} %"


def plain_tick(value: float, _: object = None) -> str:
    """A tick's number without an exponent where it can do without."""
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif value == 0 or abs(value) >= 1e-4:
        text = f"{value:.6g}"
    elif abs(value) >= 1e-7:
        text = f"{value:.9f}".rstrip("0")
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−")
