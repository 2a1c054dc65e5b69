"""A run that was killed in every phase and given again each time ends with the bits of a run that nobody killed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hymba_align.eval import read_result
from hymba_align.run.metrics import read_metrics
from tests.forked import Forked, run_script

ROOT = Path(__file__).resolve().parents[1]
PHASES = ["data preparation", "a step", "a save", "between stages", "answers", "a result"]
TIMES = ("runtime", "per_second", "seconds", "peak_memory")
"""Parts of the names of metrics that are about time and memory."""
OF_THE_MOMENT = (
    *("wall_s", "earlier_s", "finished", "tokens_per_second", "new_tokens", "reused_tokens", "reused_answers"),
    *("peak_memory_bytes", "inputs"),
)
"""What in a result is about a session; `inputs` has the digest of a manifest, which names the session that trained"""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="runs are forked from a process that has threads"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the runs `whole` and `killed`, and what was printed."""
    folder = tmp_path_factory.mktemp("kills")
    script = partial(run_script, ROOT / "tests" / "killed_run.py", folder)
    killing = Forked(script, folder / "log", errors=folder / "errors")
    assert killing.wait(580) == 0, killing.told()
    return folder, killing.log.read_text()


def test_the_run_was_killed_once_in_every_phase_and_resumed(runs: tuple[Path, str]) -> None:
    out = runs[1].splitlines()
    assert json.loads(out[-1]) == PHASES
    resumed = [line for line in out if line.startswith("resuming from")]
    assert resumed == ["resuming from checkpoint-2", "resuming from checkpoint-4"]
    assert sum("SFT: done" in line for line in out) == 2  # of the run that nobody killed, and once of the other
    assert sum("DPO: done" in line for line in out) == 2


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_its_final_weights_are_those_of_a_run_that_nobody_killed_bit_for_bit(
    runs: tuple[Path, str], stage: str
) -> None:
    whole, killed = (
        (runs[0] / run / stage / "final" / "model.safetensors").read_bytes() for run in ("whole", "killed")
    )
    assert whole == killed


def test_its_stages_did_train(runs: tuple[Path, str]) -> None:
    sft, dpo = ((runs[0] / "whole" / stage / "final" / "model.safetensors").read_bytes() for stage in ("sft", "dpo"))
    assert len(sft) == len(dpo)
    assert sft != dpo


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_its_metrics_have_every_step_once(runs: tuple[Path, str], stage: str) -> None:
    def told(run: str) -> list[dict[str, Any]]:
        records = [record for record in read_metrics(runs[0] / run / stage) if "loss" in record]
        return [
            {key: value for key, value in each.items() if not any(part in key for part in TIMES)} for each in records
        ]

    assert [record["step"] for record in told("killed")] == [1, 2, 3, 4, 5]
    assert told("killed") == told("whole")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_its_scores_are_the_same(runs: tuple[Path, str], stage: str) -> None:
    whole, killed = (asdict(read_result(runs[0] / run / "eval" / stage / "gsm8k.json")) for run in ("whole", "killed"))
    for result in (whole, killed):
        assert result["samples"]
        assert result.pop("checkpoint").endswith(f"{stage}/final")
        assert [result.pop(name) for name in OF_THE_MOMENT]
    assert whole == killed


def test_scoring_continued_from_the_answers_of_the_killed_one(runs: tuple[Path, str]) -> None:
    assert "gsm8k: continues with the 2 answers that an interrupted run left" in runs[1]
    sft, dpo = (read_result(runs[0] / "killed" / "eval" / stage / "gsm8k.json") for stage in ("sft", "dpo"))
    assert (sft.reused_answers, dpo.reused_answers) == (2, 0)


def test_a_result_that_was_written_before_the_kill_is_not_scored_again(runs: tuple[Path, str]) -> None:
    assert runs[1].count("gsm8k: complete and unchanged, not scored again") == 1


def test_nothing_of_the_kills_is_left(runs: tuple[Path, str]) -> None:
    def names(run: str) -> list[str]:
        return sorted(path.relative_to(runs[0] / run).as_posix() for path in (runs[0] / run).rglob("*"))

    assert names("killed") == names("whole")
    left = [path.name for path in (runs[0] / "cache of killed" / "hymba_align").iterdir() if path.name.startswith(".")]
    assert left == []
