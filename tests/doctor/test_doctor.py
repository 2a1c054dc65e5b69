"""What doctor finds: wrong versions, kernels that compute wrong or are missing, recipes without room."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_align import hub
from hymba_align.cli import main
from hymba_align.doctor import versions
from hymba_align.doctor.command import examine
from hymba_align.doctor.findings import Finding
from hymba_align.doctor.kernels import look_at_kernels
from hymba_align.doctor.room import disk_finding, hub_findings, room_findings, stage_setting
from hymba_align.doctor.self_test import check_kernel
from hymba_align.doctor.versions import version_findings
from hymba_align.errors import UsageError
from hymba_align.hardware import GPU, Hardware, with_gpus
from hymba_align.memory import Shape, estimate, gib
from hymba_align.model import HymbaConfig
from hymba_align.model.kernels import choice, native
from hymba_align.model.kernels.conv import GatherConv
from hymba_align.model.kernels.scan import ChunkedScan
from hymba_align.recipe import Recipe, load_recipe
from hymba_align.train import sft
from hymba_align.train.out_of_memory import setting_of

GIB = 2**30
CPU = torch.device("cpu")
LARGE = Hardware((GPU("a card", 80 * GIB, True),) * 8, 64, 512 * GIB, 2000 * GIB)
TINY = "recipes/tiny/arithmetic.yaml"


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    choice._choose.cache_clear()
    yield
    choice._choose.cache_clear()


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.parametrize(
    ("part", "backend"), [(part, name) for part, names in choice.BACKENDS.items() for name in names]
)
def test_every_kernel_that_runs_here_computes_what_the_recurrence_does(part: str, backend: str) -> None:
    if choice._unavailable(part, backend, CPU, torch.float32) is not None:
        pytest.skip("it does not run on this machine")
    for dtype in (torch.float32, torch.bfloat16):  # observed: at most 3e-7 and 5e-3, of 1e-5 and 3e-2
        result = check_kernel(part, backend, CPU, dtype)
        assert result.right, result
        assert (result.backward is None) == part.endswith("_step")


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_kernel_that_computes_wrong_in_one_pass_is_found(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y * 1.001 if pass_ == "forward" else y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 1.001 if pass_ == "backward" else dy

    right = ChunkedScan.run
    monkeypatch.setattr(
        ChunkedScan, "run", lambda self, *given: (Wrong.apply(right(self, *given)[0]), right(self, *given)[1])
    )
    result = check_kernel("scan", "torch", CPU, torch.float32)
    assert not result.right
    assert (result.forward > 1e-4) == (pass_ == "forward")
    assert result.backward is not None
    assert (result.backward > 1e-4) == (pass_ == "backward")


def test_a_wrong_kernel_in_use_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "conv=torch")
    right = GatherConv.run
    monkeypatch.setattr(GatherConv, "run", lambda self, u, *given, **named: right(self, u + 0.01, *given, **named))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "Wrong: conv (the lines with !! above)." in said
    assert "-> export HYMBA_ALIGN_KERNELS=conv=torch" not in said, "that is the one that is wrong"
    right = "native" if choice._unavailable("conv", "native", CPU, torch.float32) is None else None
    advice = f"-> export HYMBA_ALIGN_KERNELS=conv={right}" if right else "-> no kernel of this part computes right here"
    assert advice in said


def test_what_a_kernel_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *given: Any, **named: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(GatherConv, "run", fails)
    result = check_kernel("conv", "torch", CPU, torch.float32)
    assert not result.right
    assert result.problem == "RuntimeError: no such instruction"


def test_without_a_compiler_the_slower_kernels_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no C++ compiler (c++, g++, clang++): install one"
    monkeypatch.setattr(native, "why_not", lambda name: reason)
    kernels, findings = look_at_kernels()
    assert named(findings, "scan").status == "note"
    assert named(findings, "scan").value.startswith("torch (those before it cannot run); float32, error ")
    assert named(findings, "scan").fix == reason
    assert [kernel.result for kernel in kernels if kernel.backend == "native"] == [None] * 4


def test_a_missing_compiler_comes_with_the_command_that_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    found = versions.compiler_finding()
    assert found.status == "note"
    assert found.fix.startswith("apt install g++")


def test_a_request_that_cannot_be_met_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "conv_step=causal-conv1d")
    _, findings = look_at_kernels()
    wrong = [finding for finding in findings if finding.status == "wrong"]
    assert [finding.name for finding in wrong] == [choice.VARIABLE]
    assert "causal-conv1d runs on CUDA only" in wrong[0].value


@pytest.mark.parametrize(
    ("version", "value"), [("2.1.0", "2.1.0, and this package is made for "), (None, "not installed")]
)
def test_a_library_of_another_version_or_none_is_wrong(
    version: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = metadata.version

    def changed(name: str) -> str:
        if name != "torch":
            return right(name)
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", changed)
    found = named(version_findings(), "torch")
    assert found.status == "wrong"
    assert found.value.startswith(value)
    assert found.fix.startswith("pip install 'torch<")


def test_the_versions_of_this_environment_are_those_that_the_package_is_made_for() -> None:
    assert [finding for finding in version_findings() if finding.status == "wrong"] == []


def released(**changes: Any) -> Recipe:
    recipe = load_recipe("recipes/hymba-1.5b/instruct.yaml")
    return recipe.model_copy(update=changes)


def test_a_recipe_without_room_is_wrong_and_with_room_is_not() -> None:
    small, middle = (
        Hardware((GPU("a card", gib * GIB, True),) * 8, 64, 512 * GIB, free * GIB)
        for gib, free in ((8, 10), (32, 2000))
    )
    expected = ((LARGE, ("ok", "ok", "ok")), (middle, ("ok", "note", "ok")), (small, ("wrong", "wrong", "wrong")))
    for hardware, statuses in expected:
        found = room_findings(released(), hardware)
        assert tuple(named(found, name).status for name in ("sft: memory", "dpo: memory", "disk")) == statuses
    assert (
        " if all 8 pairs of a batch are as long as max_length ("
        in named(room_findings(released(), middle), "dpo: memory").value
    )
    few = room_findings(released(), Hardware(LARGE.gpus[:2], 64, 512 * GIB, 2000 * GIB))
    assert named(few, "processes").value == "launch.num_processes is 8, and there are 2 GPUs"


def test_several_processes_on_one_machine_are_counted_in_words_that_multiply_out() -> None:
    found = named(room_findings(released(), Hardware((), 2, 24 * GIB, 2000 * GIB)), "sft: memory")

    each = estimate(Shape.of(HymbaConfig()), stage_setting(released(), "sft", on_cpu=True))
    assert found.value == (
        f"about 8 processes x {gib(each.total)} = {gib(8 * each.total)} of 24.0 GiB of this machine (each: "
        f"{each.parts_in_words()})"
    )


def test_a_recipe_is_compared_with_gpus_that_are_not_here_by_what_it_would_take_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", TINY, "--gpus", "1x80", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["sections"]["recipe"]] == [
        "sft: memory", "dpo: memory",
    ]  # fmt: skip
    recipe = load_recipe("recipes/hymba-1.5b/instruct.yaml", ["launch.launcher=null", "launch.num_processes=1"])
    assert recipe.sft is not None
    said_nothing = {
        key: value for key, value in recipe.sft.trainer.items() if key not in ("bf16", "gradient_checkpointing")
    }
    silent = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"trainer": said_nothing})})
    assumed = with_gpus(Hardware((), 2, 24 * GIB, 2000 * GIB), "1x80")
    assert room_findings(silent, assumed)[0] == room_findings(recipe, assumed)[0]


def test_gpus_without_a_recipe_or_of_no_size_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpus", "8x80"]) == 2
    told = capsys.readouterr().err
    assert "Error: --gpus is about the memory that a recipe needs; name the recipe\n" in told
    for described in ("8*80", "0x80", "8x", "x80", "8x80GB"):
        with pytest.raises(UsageError) as caught:
            with_gpus(LARGE, described)
        assert str(caught.value) == (
            f"--gpus is '{described}'; write how many and the GiB of each, such as 8x80 for eight of 80 GiB"
        )


def test_no_text_sends_anybody_to_a_package_index_for_hymba_align() -> None:
    root = Path(__file__).resolve().parents[2]
    texts = [
        *root.glob("hymba_align/**/*.py"),
        *root.glob("docs/**/*.md"),
        *root.glob("recipes/**/*"),
        root / "README.md",
    ]
    read = {path: path.read_text(encoding="utf-8") for path in texts if path.is_file()}
    found = {path: re.findall(r"pip install[^\n`]*?['\"\s]hymba-align\b", text) for path, text in read.items()}
    assert {path: one for path, one in found.items() if one} == {}, "no such distribution is published"


def test_disk_counts_checkpoints_final_weights_and_a_random_base() -> None:
    P = Shape.of(HymbaConfig()).parameters
    found = disk_finding(released(), Shape.of(HymbaConfig()), LARGE)
    # Two stages: three checkpoints of 4 bytes and two moments of 4 each, and the final weights.
    assert found.value.startswith(
        f"about {2 * (3 * 12 + 4) * P / GIB:.1f} of 2000.0 GiB free for runs/hymba-1.5b-instruct ("
    )
    assert "base" in disk_finding(load_recipe(TINY), Shape.of(HymbaConfig()), LARGE).value


@pytest.mark.parametrize("lora", ["null", "{r: 4, targets: [mixer], dora: true}"])
def test_a_stage_is_estimated_as_its_trainer_will_be(
    lora: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def watched(trainer: Any, stage_dir: Path) -> dict[str, float]:
        seen.append(setting_of(trainer))
        return {}

    monkeypatch.setattr(sft, "run_stage", watched)
    recipe = load_recipe(TINY, [f"lora={lora}", "data.max_rows=24"])
    sft.train_sft(recipe, None, tmp_path / "sft")
    assert seen == [stage_setting(recipe, "sft", on_cpu=True)]


def test_what_the_hub_has_is_looked_up_in_the_cache_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--nvidia--Hymba-1.5B-Base" / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached, data = hub_findings(released(dpo=None))
    assert (cached.name, cached.status, cached.value) == ("base.model: nvidia/Hymba-1.5B-Base", "ok", "in the cache")
    assert (data.status, data.value) == ("wrong", "not in the cache, and HF_HUB_OFFLINE forbids to fetch it")

    def slow(self: Any, *given: Any, timeout: float, **named: Any) -> None:
        assert timeout == hub.TIMEOUT_S
        raise httpx.ConnectTimeout("slow")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", slow)
    assert hub_findings(released(dpo=None))[1].value == "the hub does not answer within 3 s: ConnectTimeout"
    assert hub_findings(load_recipe(TINY)) == []
    sources = [{"path": "someone/rows"}, {"path": "data/arithmetic/train.jsonl"}]
    several = load_recipe(TINY, [f"data={{sources: {json.dumps(sources)}}}", "dpo=null"])
    assert [finding.name for finding in hub_findings(several)] == ["sft.data: someone/rows"]


def test_json_is_one_object_with_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", TINY, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["right"] is True
    assert list(said["sections"]) == ["versions", "devices", "kernels", "recipe"]
    assert {finding["status"] for findings in said["sections"].values() for finding in findings} <= {"ok", "note"}
    used = [kernel for kernel in said["kernels"] if kernel["used"]]
    assert [kernel["part"] for kernel in used] == list(choice.BACKENDS)
    assert all(kernel["result"]["forward"] <= kernel["result"]["tolerance"] for kernel in used)


def test_in_a_narrow_terminal_no_line_is_wider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    report = examine()
    assert not report.wrong
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 50
