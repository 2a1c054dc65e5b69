"""Every plot of an inspection, in the order of its page."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

from hymba_align.inside.plot_canvas import Plot, styled
from hymba_align.inside.result import Inspection

__all__ = ["Plot", "draw"]
BEYOND = 1e30
"""A diverged model's numbers; matplotlib computes with squares of what it draws"""


def draw(inspection: Inspection) -> tuple[Plot, ...]:
    """A picture of everything that was measured; no file is written, and no setting of matplotlib stays changed.

    Names are unique, and made of lower-case letters, digits and `_`.
    """
    # matplotlib takes a second to import, which `inspect --help` need not wait for.
    from hymba_align.inside import plots_heads, plots_training

    inspection = _finite(inspection)
    plots: list[Plot] = []
    with styled():
        if inspection.attention is not None and inspection.attention.layers:
            plots += plots_heads.draw_attention(inspection.attention)
        plots += [plots_heads.draw_importance(one) for one in inspection.importance if one.layers]
        if inspection.fusion is not None and inspection.fusion.layers:
            plots.append(plots_heads.draw_fusion(inspection.fusion))
        if inspection.meta_tokens is not None:
            plots += plots_training.draw_meta_tokens(inspection.meta_tokens)
        if inspection.alignment is not None:
            plots += plots_training.draw_alignment(inspection.alignment, inspection.attention_compared)
        if inspection.cost is not None:
            plots += plots_training.draw_cost(inspection.cost)
    return tuple(plots)


def _finite(value: Any) -> Any:
    """The value with NaN, which is left out of a drawing, for what no axis has room for."""
    if isinstance(value, float):
        return value if abs(value) < BEYOND else math.nan
    if isinstance(value, tuple):
        return tuple(map(_finite, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _finite(getattr(value, field.name)) for field in fields(value)})
    return value
