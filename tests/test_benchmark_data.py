from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "data" / "arithmetic" / "tokenizer"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("data_benchmark", ROOT / "benchmarks" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("benchmark")
    benchmark.write_conversations(made, 300, benchmark.load(str(SMALL)))
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_benchmarked_ways_find_the_same_tokens(
    benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "cores", lambda: None)  # TRL in this process: forks of a test run cost seconds
    tokenizer = benchmark.load(str(SMALL))
    bare, ours, trl = (
        way(folder, tokenizer) for way in (benchmark.tokenize_bare, benchmark.prepare_ours, prepare(benchmark))
    )
    assert bare["tokens"] == ours["tokens"] == trl["tokens"] > 300 * 100
    assert 0 < ours["trained"] == trl["trained"] < ours["tokens"]
    assert ours["rows"] <= trl["rows"]
    assert ours["seconds"] > ours["packing"] > 0


def prepare(benchmark: Any) -> Any:
    def quietly(*arguments: Any) -> Any:
        with pytest.warns(FutureWarning, match="gradient_checkpointing"):
            return benchmark.prepare_trl(*arguments)

    return quietly


def test_conversations_have_two_to_six_turns_and_are_the_same_every_time(
    benchmark: Any, folder: Path, tmp_path: Path
) -> None:
    import json

    rows = [json.loads(line)["messages"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    turns = {sum(message["role"] != "system" for message in messages) for messages in rows}
    assert turns == {2, 4, 6}
    benchmark.write_conversations(tmp_path, 20, benchmark.load(str(SMALL)))
    assert [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows[:20]


def test_a_process_of_its_own_is_measured_with_its_children(benchmark: Any, folder: Path) -> None:
    result = benchmark.run_case("bare", folder, str(SMALL))
    assert result["tokens"] > 0
    assert result["peak"] >= result["peak_anonymous"] > 20e6
    assert os.getpid() in benchmark.process_tree(os.getppid())


def test_missed_targets_are_named(benchmark: Any) -> None:
    ours = {"seconds": 30.0, "peak": 3e9, "tokens": 8192, "rows": 2}
    assert benchmark.missed_targets({"bare": {"seconds": 9.0}, "ours": ours}) == [
        "0.30 of the bare tokenizer's speed, wanted 0.5",
        "a peak of 3,000 MB, wanted under 2,000",
        "50.00% of the row tokens filled, wanted 98%",
    ]
