"""How far a part of an inspection is: a line that goes when the part ends, for `inspect` then says how long it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from hymba_align.inside.observing import hymba_in
from hymba_align.progress import Display, Field

BETWEEN_LINES_S = 30.0
"""Of progress in a log: as long as the whole step takes for a small model"""


def display(name: str, total: int, unit: str, *, done: int = 0) -> Display:
    """The progress of a part, to be closed when it ends. In a log a part shorter than `BETWEEN_LINES_S` shows none."""
    return Display(name, total, unit=unit, done=done, between_lines_s=BETWEEN_LINES_S, is_part=True, passing=True)


def one_more(shown: Display, *news: Field) -> None:
    """One unit more is done."""
    shown.advance(shown.done + 1)
    shown.tell(*news)


@contextmanager
def forward_passes(name: str, passes: int, model: nn.Module) -> Iterator[None]:
    """Within, the display shows how far so many forward passes of a model are, layer by layer.

    Args:
        model: a Hymba, with or without adapters around it.
    """
    layers = hymba_in(model).layers
    with display(name, passes * len(layers), "layers") as shown, ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda *_: one_more(shown)).remove)
        yield
