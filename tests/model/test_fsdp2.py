"""The model sharded by FSDP2 over two processes computes what the whole model computes.

accelerate falls back to plain DDP on a CPU, so the worker calls the function with which it shards, and no trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import TwoProcesses

CASES = (
    "packed row",
    "packed row, recomputed",
    "packed row, TRL's head",
    "tree",
    "preferences, TRL's head",
    "preferences, TRL's head, recomputed",
)
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker measured, by case."""
    results = tmp_path_factory.mktemp("fsdp2") / "results.json"
    TwoProcesses(Path(__file__).with_name("fsdp2_worker.py"), results, results.parent).wait(240)
    return dict(json.loads(results.read_text()))


def test_every_case_was_run(found: dict[str, Any]) -> None:
    assert tuple(found) == CASES


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_sharded_and_layers_apart_from_the_rest(found: dict[str, Any], case: str) -> None:
    assert found[case]["sharded"] == found[case]["parameters"]
    assert found[case]["share"] == pytest.approx(0.5, abs=0.01)
    assert "FSDPHymbaDecoderLayer" in found[case]["classes"]
    assert "FSDPHymbaForCausalLM" in found[case]["classes"]


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_are_those_of_the_whole_model(found: dict[str, Any], case: str) -> None:
    first, second = found[case]["steps"]
    assert abs(second["losses"][0] - first["losses"][0]) > 1e-3, "the step did not move"
    for step in (first, second):
        # float32 on the CPU; observed 1.2e-7, 5e-7, 1.5e-8 and 6e-8
        assert step["losses"][1] == pytest.approx(step["losses"][0], abs=1e-5, rel=0)
        assert step["norms"][1] == pytest.approx(step["norms"][0], abs=1e-5, rel=0)
        for name, difference in step["gradients"].items():
            assert difference < 1e-6, name
        for name, difference in step["weights"].items():
            assert difference < 1e-6, name
