"""Progress of the parts: what is counted comes to its end, and nothing stays in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hymba_align.inside import showing
from hymba_align.inside.inspecting import InspectSettings, inspect_checkpoint
from hymba_align.inside.showing import forward_passes
from hymba_align.model import HymbaForCausalLM
from hymba_align.progress import Display
from hymba_align.recipe import DataSection


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Display]:
    """The displays that are made."""
    made: list[Display] = []

    def make(*given: Any, **named: Any) -> Display:
        made.append(Display(*given, **named))
        return made[-1]

    monkeypatch.setattr(showing, "Display", make)
    return made


def test_forward_passes_are_counted_layer_by_layer_and_leave_no_hook(
    small_model: HymbaForCausalLM, shown: list[Display]
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), forward_passes("Looking", 2, nn.ModuleList([small_model])):
        small_model(ids)
        assert (shown[0].done, shown[0].total, shown[0].unit) == (5, 10, "layers")
        small_model(ids)
    assert shown[0].done == 10
    assert not any(module._forward_hooks for module in small_model.modules())


def test_every_part_that_may_take_long_is_shown_and_comes_to_its_end(
    checkpoint: Path, earlier: Path, shown: list[Display], capfd: pytest.CaptureFixture[str]
) -> None:
    data = DataSection(path="data/arithmetic/test.jsonl")
    settings = InspectSettings(
        str(checkpoint), str(earlier), data, contexts=(24,), documents=2, max_length=96, parts=(
            "attention", "importance", "meta_tokens", "alignment", "cost",
        ),
    )  # fmt: skip
    capfd.readouterr()
    inspect_checkpoint(settings, lambda line: None)

    assert {one.name: (one.total, one.unit) for one in shown} == {
        "Attention": (2, "layers"),
        "Loss without each branch": (5, "rows"),
        "Meta tokens": (8, "layers"),  # a row of each domain
        "Answers of pairs": (8, "answers"),
        "Attention before training": (2, "layers"),
        "Decoding beside a transformer": (12, "turns"),
    }
    assert [one.name for one in shown if one.done != one.total] == []
    assert capfd.readouterr().err == "", "what is short is not in a log"


def test_what_is_seen_in_one_pass_is_what_each_part_sees_alone(checkpoint: Path, earlier: Path) -> None:
    def look(*parts: Any, against: str | None = str(earlier)) -> Any:
        data = DataSection(path="data/arithmetic/test.jsonl")
        settings = InspectSettings(str(checkpoint), against, data, documents=2, max_length=96, parts=parts)
        return inspect_checkpoint(settings, said.append)

    said: list[str] = []
    together = look("attention", "fusion", "alignment")
    assert "fusion: seen with attention" in said
    assert together.fusion == look("fusion", against=None).fusion
    assert together.alignment.divergence == look("alignment").alignment.divergence
