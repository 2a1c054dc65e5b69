"""The GPU benchmark where there is no GPU: its smoke run, its counts against others', and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import correctness, device, findings, flops, kernels, references, run, sizes
from gpu.findings import Finding
from torch.utils.flop_counter import FlopCounterMode

from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree
from hymba_align.model.kernels.choice import BACKENDS
from hymba_align.model.kernels.scan import ChunkedScan

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def model() -> HymbaForCausalLM:
    return HymbaForCausalLM(HymbaConfig(**sizes.tiny_shape()))


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import sys

    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=variables)


# ---- the smoke run ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_the_smoke_run_reports_from_every_section_and_claims_no_gpu_number(tmp_path: Path) -> None:
    done = shell("--smoke", "--output", str(tmp_path), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    page, content = (tmp_path / "smoke.md").read_text(), json.loads((tmp_path / "smoke.json").read_text())
    assert "**GPU numbers are not measured yet.**" in page
    assert content["smoke"] is True
    found = [Finding(**one) for one in content["findings"]]
    assert list(dict.fromkeys(one.section for one in found)) == list(run.SECTIONS)
    goals = [one for one in found if one.section != "correctness"]
    assert goals
    assert all(one.met is None for one in goals), "a smoke run judges no speed"
    checked = {one.what: one for one in found if one.section == "correctness" and one.met}
    for part in ("scan", "conv"):
        for dtype in ("float32", "bfloat16"):
            assert checked[f"{part}=triton, {dtype}"].numbers["gradient of u"] > 0, "computed, not claimed"


@NO_GPU
def test_without_a_gpu_nothing_is_measured_and_the_message_says_what_to_run(tmp_path: Path) -> None:
    done = shell("--output", str(tmp_path))
    assert done.returncode == 1
    assert "nothing was measured; --smoke shows on the CPU that all sections work" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_committed_result_claims_a_gpu_that_was_not_there() -> None:
    for path in (ROOT / "benchmarks" / "gpu" / "results").glob("*.json"):
        content = json.loads(path.read_text())
        assert not content["smoke"]
        assert content["environment"]["gpus"]
    readme = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    measured = (ROOT / "benchmarks" / "gpu" / "results" / "results.md").is_file()
    assert ("not measured yet" in readme) != measured


# ---- how it fails ----------------------------------------------------------------------------------------------------


def broken(_: sizes.Sizes) -> Iterator[Finding]:
    yield Finding("broken", "first", "1")
    raise RuntimeError("illegal access\nand a long trace")


def endless(_: sizes.Sizes) -> Iterator[Finding]:
    yield Finding("endless", "first", "1")
    while True:
        time.sleep(0.01)


def working(_: sizes.Sizes) -> Iterator[Finding]:
    yield Finding("working", "only", "1")


def test_a_section_that_fails_or_hangs_keeps_what_it_found_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"broken": (broken, 30), "endless": (endless, 0.2), "working": (working, 30)}
    monkeypatch.setattr(run, "SECTIONS", sections)
    found, took = run.run_all(list(sections), sizes.in_smoke())
    assert [(one.section, one.what, one.measured, one.met) for one in found] == [
        ("broken", "first", "1", None),
        ("broken", "section", "failed: RuntimeError: illegal access", False),
        ("endless", "first", "1", None),
        ("endless", "section", "stopped after 0 s, what follows is missing", False),
        ("working", "only", "1", None),
    ]
    assert 0.2 <= took["endless"] < 5
    assert "and a long trace" in capsys.readouterr().err


def test_the_run_ends_with_1_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "SECTIONS", {"broken": (broken, 30), "working": (working, 30)})
    monkeypatch.setattr("sys.argv", ["run", "--smoke", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="missed") as ended:
        run.main()
    assert ended.value.code == "missed:\nbroken: section: failed: RuntimeError: illegal access"
    assert json.loads((tmp_path / "smoke.json").read_text())["findings"][-1]["section"] == "working"
    monkeypatch.setattr("sys.argv", ["run", "--smoke", "--sections", "working"])
    run.main()


def test_on_a_gpu_a_section_is_a_process_that_is_stopped_when_its_time_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(command: list[str], timeout: float) -> None:
        findings.append(Path(command[-1]), Finding("card", "first", "1"))
        assert command[1:5] == ["-m", "gpu.run", "--worker", "card"]
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", hang)
    run.run_within("card", sizes.on_gpu(), tmp_path / "found", 7)
    first, last = findings.read(tmp_path / "found")
    assert first.measured == "1"
    assert (last.measured, last.met) == ("stopped after 7 s, what follows is missing", False)


def test_what_a_stopped_section_wrote_half_is_left_out(tmp_path: Path) -> None:
    findings.append(tmp_path / "found", Finding("card", "first", "1"))
    with (tmp_path / "found").open("a") as file:
        file.write('{"section": "card", "wh')
    assert [one.what for one in findings.read(tmp_path / "found")] == ["first"]


def test_all_sections_together_stay_below_nine_minutes() -> None:
    assert sum(limit for _, limit in run.SECTIONS.values()) <= run.TOTAL_S < 9 * 60


def test_a_goal_is_judged_on_a_gpu_only() -> None:
    def judge(value: float, *, smoke: bool) -> bool | None:
        return findings.judged("s", "w", value, "shown", least=0.7, smoke=smoke).met

    assert [judge(0.7, smoke=False), judge(0.69, smoke=False), judge(0.0, smoke=True)] == [True, False, None]
    assert findings.judged("s", "w", 81, "81 GB", most=80, unit=" GB", smoke=False) == Finding(
        "s", "w", "81 GB", "≤ 80 GB", False, {"value": 81}
    )


# ---- correctness -----------------------------------------------------------------------------------------------------


class ForgetfulScan(ChunkedScan):
    """Right but for one thing: a segment starts from zeros instead of its parent's final state."""

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], initial: list[int], device: torch.device) -> Any:
        return ChunkedScan.build(lengths, [-1] * len(parents), initial, device)


def test_a_wrong_kernel_is_found_and_the_right_one_is_not() -> None:
    small = sizes.in_smoke()
    lengths, parents = correctness.random_tree(small.checked_lengths, seed=3)
    for backend, met in ((ForgetfulScan, False), (ChunkedScan, True)):
        errors = correctness.check_scan(backend, lengths, parents, small, torch.float32)
        assert correctness.from_errors("scan", errors, correctness.BOUNDS[torch.float32]).met is met


def test_every_part_of_a_layer_that_has_backends_is_checked() -> None:
    assert set(correctness.CHECKS) == set(BACKENDS)


def test_a_result_that_is_no_number_is_wrong() -> None:
    finding = correctness.from_errors("scan", {"output": 1e-9, "gradient of u": float("nan")}, 1e-3)
    assert (finding.met, finding.measured) == (False, "nan (gradient of u)")


def test_trees_are_new_every_time_and_reach_deep() -> None:
    trees = [correctness.random_tree((1, 2, 3, 127, 128, 129), seed) for seed in range(5)]
    assert len({tuple(parents) for _, parents in trees}) == 5
    for lengths, parents in trees:
        assert {1, 2, 3, 127, 128, 129} < set(lengths)
        assert parents[0] == -1
        assert all(0 <= parent < segment for segment, parent in enumerate(parents) if segment)


# ---- counts ----------------------------------------------------------------------------------------------------------

TREE = SegmentTree(torch.tensor([20, 9, 1, 30, 3]), torch.tensor([-1, 0, 0, -1, 1]))


@pytest.mark.parametrize("window", [None, 4, 100])
def test_visible_pairs_are_those_of_the_mask(window: int | None) -> None:
    lengths, parents = [8, *TREE.lengths.tolist()], [-1, *(TREE.parents + 1).tolist()]
    assert flops.visible_pairs(TREE, 8, window) == references.visible(lengths, parents, window).sum()


def test_matrix_operations_are_those_that_torch_counts(model: HymbaForCausalLM) -> None:
    ids = torch.randint(0, 97, (1, TREE.num_tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, segments=TREE)
    counted = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    ours = flops.matrix_flops(model, TREE) + flops.head_flops(model.config, TREE.num_tokens)
    assert ours == counted["aten.mm"]


def test_operations_of_one_document_are_those_counted_by_hand(model: HymbaForCausalLM) -> None:
    # D 64, I 128, N 16, R 8, H 4, G 2, d 16, e 32, F 96, M 8, window 16, V 97; layers 0, 1, 3 have keys and values.
    projections = 3 * 64 * (64 + 32 + 64 + 128 + 128) + 1 * 64 * (64 + 128 + 128)
    others = 4 * (128 * (8 + 2 * 16) + 8 * 128 + 128 * 64 + 3 * 64 * 96)
    pairs_meta, pairs_global, pairs_local = (
        36,
        sum(8 + i + 1 for i in range(20)),
        sum(8 + min(i, 16) + 1 for i in range(20)),
    )
    attention = 2 * 4 * (16 + 32) * (4 * pairs_meta + 2 * pairs_global + 2 * pairs_local)
    by_hand = 2 * 28 * (projections + others) + attention + 2 * 19 * 64 * 97
    tree = SegmentTree.from_lengths([20])
    assert flops.forward_flops(model, tree, scored=19) == by_hand
    assert flops.training_flops(model, tree, scored=19) == 3 * by_hand


def test_bytes_of_a_kernel_count_each_tensor_once() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)
    assert device.moved_bytes(a, None, b) == 3 * 5 * 4 + 7 * 2


def test_the_gated_scan_moves_what_its_inputs_and_outputs_hold() -> None:
    small = sizes.in_smoke()
    scan = next(kernels.kernels(small))
    _, _, moved, operations = next(kernels.passes(scan, scan.build(ChunkedScan)))
    tokens, inner, state, segments = 8 + 32, 128, 16, 4
    assert moved == 4 * (4 * tokens * inner + 2 * tokens * state + inner * state + inner + segments * inner * state)
    assert operations == 0


def test_rows_on_a_gpu_hold_8192_tokens_of_pairs_and_documents() -> None:
    real = sizes.on_gpu()
    assert real.row_tokens == 8192
    assert real.pairs * (real.prompt + 2 * real.answer) <= 8192
    steps = 2 * real.rounds * real.decode_steps  # more than are run, warm-up included
    assert real.context + steps // real.rounds <= real.config.max_position_embeddings


@NO_GPU
def test_a_torch_that_sees_no_gpu_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run"])
    with pytest.raises(SystemExit, match="torch sees no GPU: nothing was measured; --smoke shows"):
        run.main()


def test_an_unknown_section_is_named_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--smoke", "--sections", "card,speed"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert "--sections: speed; the sections are card, correctness, roofline" in capsys.readouterr().err
