"""A model whose loss or gradient is not finite where a batch holds a marked row; for tests, in this and other processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "zebra"


def marked_data(source: Path, target: Path, rows: int, marked: tuple[int, ...]) -> None:
    """Writes the first rows of a data file; the questions in these lines (from 1) hold the mark."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:rows]]
    for line in marked:
        lines[line - 1]["question"] += f" {MARK}"
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def spoil(tokenizer: Any, how: str, seen: list[list[int]] | None = None) -> Callable[[], None]:
    """Makes every HymbaModel of this process spoil marked batches while it trains; the function undoes it.

    It looks at tokens alone, so it knows nothing of how rows are named.

    Args:
        how: "loss" for a loss of NaN, "gradient" for a finite loss whose gradient is NaN, "nothing" to look only.
        seen: takes the tokens of every micro-batch that is trained on.
    """
    from hymba_align.model.modeling import HymbaModel

    mark = torch.tensor(tokenizer(MARK, add_special_tokens=False)["input_ids"][-5:])
    whole = HymbaModel.forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        outputs = whole(self, *given, **named)
        if not self.training or not torch.is_grad_enabled():
            return outputs
        ids = named["input_ids"].cpu()
        if seen is not None:
            seen.append(ids.flatten().tolist())
        if not bool((ids.unfold(1, len(mark), 1) == mark).all(-1).any()):
            return outputs
        if how == "gradient":
            outputs.last_hidden_state.register_hook(lambda gradient: gradient * float("nan"))
        elif how == "loss":
            outputs.last_hidden_state = outputs.last_hidden_state * float("nan")
        return outputs

    HymbaModel.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        HymbaModel.forward = whole  # type: ignore[method-assign]

    return undo
