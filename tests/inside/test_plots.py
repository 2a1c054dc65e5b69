"""Plots: one for all that was measured, pictures that open, labels that act nowhere, no setting that stays changed."""

from __future__ import annotations

import io
import math
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hymba_align.inside import plot_canvas
from hymba_align.inside.plot_canvas import MISSING, label, styled, thinned
from hymba_align.inside.plots import Plot, draw
from hymba_align.inside.plots_heads import draw_map
from hymba_align.inside.result import Inspection

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
filled: Callable[[Inspection, float], Inspection] = MADE_UP["filled"]
HOSTILE = (
    "$\\x{$",
    "$x^{",
    "$\\frac{a}{b}$",
    "\u202eevil",
    "\x1b[31m",
    "中文",
    "\U0001f600",
    "<b>",
    "\ud83d",
    "",
    "   ",
    "\n",
)


@pytest.fixture(scope="module")
def plots() -> tuple[Plot, ...]:
    return draw(make())


def size_of(png: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image.size


def test_everything_that_was_measured_is_drawn(plots: tuple[Plot, ...]) -> None:
    assert [plot.name for plot in plots] == [
        "attention_layers",
        "attention_heads",
        "map_layer_0",
        "map_layer_3",
        "importance_loss",
        "importance_gsm8k",
        "fusion",
        "meta_domains",
        "meta_layers",
        "meta_movement",
        "weights",
        "attention_change",
        "pairs",
        "divergence",
        "cost",
    ]


def test_every_picture_opens_with_its_size_and_has_words(plots: tuple[Plot, ...]) -> None:
    for plot in plots:
        assert size_of(plot.png) == (plot.width, plot.height)
        assert plot.caption.endswith(".")
        assert plot.alt.endswith(".")
        assert len(plot.png) < 150_000  # bytes: the page holds all of them


def test_nothing_is_drawn_of_what_was_not_measured() -> None:
    bare = replace(make(), attention=None, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None)
    assert draw(bare) == ()


def test_an_alternative_text_says_what_is_seen() -> None:
    fusion = make().fusion
    assert fusion is not None
    sized = (0.25, 0.5, 0.75, 0.5)
    layers = tuple(replace(layer, ssm_share=share) for layer, share in zip(fusion.layers, sized, strict=True))
    bare = replace(make(), attention=None, importance=(), meta_tokens=None, alignment=None, cost=None)
    (plot,) = draw(replace(bare, fusion=replace(fusion, layers=layers)))
    assert "its share is 25.0 % to 75.0 %." in plot.alt


def test_tokens_of_others_and_numbers_that_are_none_are_drawn_without_a_warning() -> None:
    """pytest makes errors of warnings: of glyphs that the font lacks, formulas in labels, logarithms and means of nothing."""
    inspection = filled(make(2, 2, 4, words=HOSTILE), math.inf)
    attention = inspection.attention
    assert attention is not None
    loss, task = inspection.importance
    named = replace(
        inspection,
        importance=(loss, replace(task, metric="$\\x{ 中/../")),
        attention=replace(attention, maps=attention.maps[:1] * 2),
    )
    names = [plot.name for plot in draw(named)]
    assert names[2:6] == ["map_layer_0", "map_layer_0_2", "importance_loss", "importance___x_______"]
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Mia", "Mia"),
        (" has", "has"),
        ("$x", "$x"),
        ("  ", "␣␣"),
        ("\n", "↵"),
        ("", "(empty)"),
        ("中", MISSING),
        ("\u202e", "‹U+202E›"),
        ("\x07", MISSING),
        ("abcdefghijklmnopq", "abcdefghijklm…"),
    ],
)
def test_a_label_is_one_line_of_characters_that_the_font_has(text: str, shown: str) -> None:
    assert label(text) == shown


def test_what_a_token_cannot_see_is_left_out_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = plot_canvas.image
    monkeypatch.setattr(
        plot_canvas, "image", lambda axes, values, **how: drawn.append(values) or original(axes, values, **how)
    )
    attention = make(2, 2, 4, words=("a", "b", "c")).attention
    assert attention is not None
    draw_map(attention.maps[0], "map")
    (values,) = drawn
    # meta tokens, then the tokens up to the one that looks
    assert [[math.isnan(value) for value in row] for row in values] == [
        [False, False, True, True],
        [False, False, False, True],
        [False, False, False, False],
    ]


def test_a_map_says_that_its_font_lacks_a_character_where_it_does() -> None:
    for words, is_said in ((("中", "a"), True), (("a", MISSING), False)):
        attention = make(2, 2, 4, words=words).attention
        assert attention is not None
        plot = draw_map(attention.maps[0], "map")
        assert plot.caption.endswith("is a character that the plot's font lacks.") == is_said


def test_a_large_model_is_drawn_too() -> None:
    inspection = make(32, 25, 128)
    assert inspection.attention is not None
    attention = replace(inspection.attention, maps=())
    bare = replace(inspection, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None)
    plots = draw(replace(bare, attention=attention))
    assert [plot.name for plot in plots] == ["attention_layers", "attention_heads"]
    assert all(size_of(plot.png)[1] <= 8 * 130 for plot in plots)


def test_at_most_so_many_positions_are_labelled() -> None:
    assert thinned(4, 32) == [0, 1, 2, 3]
    assert thinned(128, 32) == list(range(0, 128, 4))
    assert thinned(0, 32) == []


def test_a_users_settings_neither_enter_the_plots_nor_are_lost() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 33.0, "text.usetex": True}):
        with styled():
            assert matplotlib.rcParams["font.size"] == 9.5
            assert not matplotlib.rcParams["text.usetex"]
        assert matplotlib.rcParams["font.size"] == 33.0


def test_no_window_is_prepared(plots: tuple[Plot, ...]) -> None:
    assert plots
    assert "matplotlib.backends.backend_tkagg" not in sys.modules
