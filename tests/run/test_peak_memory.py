"""Peak memory of a stretch of work in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hymba_align.run import peak_memory
from hymba_align.run.peak_memory import forget_peak, peak_bytes

MEBIBYTE = 2**20


def test_a_peak_is_counted_after_its_memory_is_free_again_and_forgotten_on_demand() -> None:
    forget_peak()
    before = peak_bytes()
    held = bytearray(b"x") * (200 * MEBIBYTE)
    del held

    assert 190 * MEBIBYTE < peak_bytes() - before < 230 * MEBIBYTE  # observed 200
    forget_peak()
    assert abs(peak_bytes() - before) < 30 * MEBIBYTE  # observed 0


def test_a_system_without_proc_gives_the_most_since_the_process_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = peak_bytes()
    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path / "absent")

    forget_peak()

    assert peak_bytes() >= known - MEBIBYTE


def test_what_computes_on_a_gpu_has_the_peak_of_its_tensors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("forgotten"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)

    forget_peak()

    assert (done, peak_bytes()) == (["forgotten"], 123)
