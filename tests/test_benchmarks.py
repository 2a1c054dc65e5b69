"""What the benchmarks share, the guards of their ratios, and rows of growing length, at sizes of seconds."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import pytest
import quick
import row_length
import torch

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Time that only passes when a side runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.calls: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def side(self, name: str, *seconds: float) -> Callable[[], None]:
        remaining = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(remaining)

        return run


def test_sides_take_turns_and_every_second_round_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    sides = {name: clock.side(name, *[1.0] * 9) for name in "abc"}
    measure.alternate(sides, rounds=3, warmup=2)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "cba" + "abc"


def test_seconds_are_those_of_each_call_in_the_order_of_rounds_without_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    sides = {"slow": clock.side("slow", 99.0, 6.0, 8.0), "fast": clock.side("fast", 77.0, 1.0, 2.0)}
    assert measure.alternate(sides, rounds=2) == {"slow": [6.0, 8.0], "fast": [1.0, 2.0]}


def test_the_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    # The machine was three times slower in the second round, for both sides alike.
    assert measure.median_ratio([4.0, 12.0, 5.0], [1.0, 3.0, 1.0]) == 4.0
    assert measure.median_ratio([1.0, 10.0, 10.0], [1.0, 1.0, 10.0]) == 1.0  # the medians' ratio is 10


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 sides, 5 rounds"):
        measure.alternate({})
    with pytest.raises(ValueError, match="1 sides, 0 rounds"):
        measure.alternate({"a": lambda: None}, rounds=0)


def table() -> measure.Table:
    made = measure.Table("Some cost", "python benchmarks/some.py", ["what", "seconds"], ["Sizes.", "What limits it."])
    made.add("this", 2)
    return made


def test_a_page_names_command_date_hardware_and_versions_above_the_rows() -> None:
    title, _, header, *rest = table().markdown().splitlines()
    assert title == "# Some cost"
    assert header.startswith(f"`python benchmarks/some.py`, {datetime.date.today()}, {measure.processor()}, ")
    assert f"{torch.get_num_threads()} threads of torch" in header
    assert f"torch {torch.__version__}" in header
    assert rest == ["", "Sizes.", "", "What limits it.", "", "| what | seconds |", "|---|---|", "| this | 2 |"]


def test_a_row_with_a_missing_cell_is_an_error() -> None:
    with pytest.raises(ValueError, match="'Some cost' has 2 columns; the row \\('x',\\) has 1"):
        table().add("x")


def test_finish_prints_and_writes_the_page_and_names_what_was_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "some.md"
    measure.finish(table(), output, [])
    with pytest.raises(SystemExit) as ended:
        measure.finish(table(), output, ["1.2x, wanted 3x", "too much memory"])
    assert ended.value.code == "missed: 1.2x, wanted 3x; too much memory"
    assert output.read_text() == table().markdown()
    assert capsys.readouterr().out.count("# Some cost") == 2


def test_every_timed_benchmark_takes_the_same_options() -> None:
    parser = argparse.ArgumentParser()
    measure.add_options(parser)
    assert vars(parser.parse_args([])) == {"output": None, "rounds": 5, "threads": 2}
    assert parser.parse_args(["--output", "x.md"]).output == Path("x.md")


def test_measure_loads_nothing_heavy() -> None:
    code = (
        "import sys, measure; measure.hardware(), measure.versions(); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)


# ---- quick guards ----------------------------------------------------------------------------------------------------


def guard(least: float, ratio: float) -> Callable[[], quick.Guard]:
    return lambda: quick.Guard("some ratio", least, lambda rounds: ratio * rounds)


def test_all_guards_are_shown_before_one_that_fell_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unequal() -> quick.Guard:
        raise SystemExit("losses differ: 1 and 2")

    guards = {"fell": guard(2.0, 0.6), "broke": unequal, "nan": guard(0.1, float("nan")), "held": guard(2.0, 0.7)}
    monkeypatch.setattr(quick, "GUARDS", guards)
    monkeypatch.setattr("sys.argv", ["quick", "--rounds", "3", "--threads", str(torch.get_num_threads())])
    with pytest.raises(SystemExit) as ended:
        quick.main()
    assert ended.value.code == (
        "missed: fell: 1.80, at least 2; broke: SystemExit: losses differ: 1 and 2; nan: nan, at least 0.1"
    )
    printed = capsys.readouterr().out
    assert "| fell | some ratio | 1.80 | 2 |" in printed
    assert "| broke | broke | failed | – |" in printed
    assert "| held | some ratio | 2.10 | 2 |" in printed


def test_guards_that_hold_end_well() -> None:
    _, failed = quick.run({"held": guard(1.0, 1.0), "also": guard(0.5, 0.7)}, rounds=1)
    assert failed == []


def test_a_cache_that_grew_falls_below_its_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    import cache_bytes

    whole = quick.cache()
    assert 1.0 == whole.least <= whole.ratio(1) < 1.05
    reused = cache_bytes.HymbaConfig
    monkeypatch.setattr(cache_bytes, "HymbaConfig", lambda: reused(kv_reuse_group=[]))  # every layer has its own keys
    assert quick.cache().ratio(1) < 1.0


def test_ci_runs_the_guards_after_the_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line.partition(" #")[0] for line in lines if line.startswith("make ")]
    assert commands == ["make --jobs 2 lint bfcl", "make test", "make bench-quick"]


# ---- rows of growing length ------------------------------------------------------------------------------------------


def test_longer_rows_hold_the_same_documents_and_cost_is_per_token() -> None:
    model = row_length.build_model(2, [0], hidden=64)
    ids, tree = row_length.make_row(96, [8, 24])
    assert tree.lengths.tolist() == [8, 24, 8, 24, 8, 24]
    assert torch.equal(ids[0, :32], ids[0, 64:])
    costs = row_length.packed_costs(model, (32, 96), [8, 24], rounds=2)
    assert {tokens: len(values) for tokens, values in costs.items()} == {32: 2, 96: 2}
    assert all(0 < value < 1 for values in costs.values() for value in values)


def test_rows_that_leak_between_documents_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = row_length.build_model(2, [0], hidden=64)
    monkeypatch.setattr(row_length.SegmentTree, "from_lengths", lambda lengths: one_document(sum(lengths)))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        row_length.packed_costs(model, (32, 96), [8, 24], rounds=1)


def one_document(tokens: int) -> row_length.SegmentTree:
    return row_length.SegmentTree(torch.tensor([tokens]), torch.tensor([-1]))


def test_the_dearest_row_is_set_against_the_cheapest_by_medians() -> None:
    assert row_length.spread({1024: [2.0, 2.0, 9.0], 2048: [1.0, 1.5, 1.6], 4096: [3.0, 3.0, 0.1]}) == 2.0


def test_time_is_split_by_layer_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 1 and 2 take 10 s and 100 s forward, and twice as long backward, recomputation included."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(row_length.time, "perf_counter", lambda: clock.now)

    class Layer(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (Slow.apply(x, self.seconds),)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            clock.now += seconds
            return x + 1

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            clock.now += 2 * ctx.seconds
            return gradient, None

    layers = [Layer(1.0), Layer(10.0), Layer(100.0)]
    for timed, expected in (({1}, 30.0), ({0, 2}, 303.0), (set(), 0.0)):
        with row_length.LayerTimer(layers, timed.__contains__) as timer:
            x = torch.zeros(2, requires_grad=True) * 1
            for layer in layers:
                (x,) = layer(x)
            clock.now += 1000  # the head belongs to no layer
            x.sum().backward()
        assert timer.seconds == expected


def test_the_split_of_a_step_adds_up_with_recomputed_activations() -> None:
    model = row_length.build_model(3, [1], hidden=64)
    split = row_length.split_step(model, *row_length.make_row(64, [64]))
    assert split.in_global_layers > 0
    assert split.elsewhere > 0
    assert (split.in_global_layers + split.elsewhere) * 64 < 60
