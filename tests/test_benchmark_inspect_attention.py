"""The benchmark of attention statistics: both of its sides compute the same, and a difference stops it."""

from __future__ import annotations

import inspect_attention as benchmark
import pytest
import torch


@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_blocks_and_dense_have_the_same_sums(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(benchmark, "WINDOW", 16)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(benchmark.META + 40, many, benchmark.SIZE, generator=generator) for many in (25, 5))
    sums = {side: run(q, k, 40, benchmark.KINDS[kind]) for side, run in benchmark.SIDES.items()}

    benchmark.check_sums({side: [{"sums": found.tolist()}] for side, found in sums.items()})

    assert (sums["blocks"][:, :4].sum(1) - 40).abs().max() <= 1e-4  # float32, observed 2e-6
    assert sums["dense"][:, 1].min() > 0  # the first token stands for `<s>`


def test_sums_that_differ_stop_the_benchmark() -> None:
    given = {"blocks": [{"sums": [[1.0] * 6] * 25}], "dense": [{"sums": [[1.0, 1.0, 1.0001, 1.0, 1.0, 1.0]] * 25}]}
    with pytest.raises(SystemExit, match=r"^sums of column 2 differ by 1.0e-04, of 1.0e\+00$"):
        benchmark.check_sums(given)
