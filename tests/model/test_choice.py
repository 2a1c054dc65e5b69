"""Which backend runs where, and what is said about it."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from hymba_align.errors import KernelError
from hymba_align.eval import evaluate
from hymba_align.model.kernels import choice
from hymba_align.model.kernels.choice import VARIABLE, choose_kernels
from hymba_align.pipeline import run_recipe
from hymba_align.recipe import load_recipe
from hymba_align.recipe_eval import EvalSection

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_logged", set())
    choice._choose.cache_clear()


def backend(monkeypatch: pytest.MonkeyPatch, part: str, name: str, reason: str | None) -> None:
    """Puts a backend in place whose module says `reason` when asked whether it can run."""
    module = types.ModuleType("stand_in_backend")
    module.unavailable = lambda device, dtype: reason  # type: ignore[attr-defined]
    module.Row = type("Row", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_backend", module)
    monkeypatch.setitem(choice.BACKENDS[part], name, "stand_in_backend:Row")


def test_a_backend_that_cannot_run_is_passed_over_and_that_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("scan", "conv"):
        backend(monkeypatch, part, "fast", "fast is not installed: pip install fast")
    monkeypatch.setitem(choice.DEFAULTS, "cpu", {"scan": ("fast", "torch"), "conv": ("fast", "torch")})
    with caplog.at_level(logging.WARNING):
        assert choose_kernels(CPU, torch.float32).scan == "torch"
        assert choose_kernels(CPU, torch.bfloat16).scan == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "scan, conv: slower kernels run in plain torch; fast is not installed: pip install fast"
    ]


def test_the_first_backend_that_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, "scan", "fast", None)
    monkeypatch.setitem(choice.DEFAULTS, "cpu", {"scan": ("fast", "torch")})
    kernels = choose_kernels(CPU, torch.float32)
    assert kernels.scan == "fast"
    assert kernels.scan_row is sys.modules["stand_in_backend"].Row


def test_float64_always_runs_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, "scan", "fast", None)
    monkeypatch.setitem(choice.DEFAULTS, "cpu", {"scan": ("fast", "torch")})
    monkeypatch.setenv(VARIABLE, "scan=fast")
    assert choose_kernels(CPU, torch.float64).scan == "torch"


def test_a_backend_asked_for_that_cannot_run_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, "scan", "fast", "fast is not installed: pip install fast")
    monkeypatch.setenv(VARIABLE, "scan=fast")
    with pytest.raises(KernelError) as caught:
        choose_kernels(CPU, torch.float32)
    assert str(caught.value) == (
        "HYMBA_ALIGN_KERNELS asks for scan=fast, which cannot run: fast is not installed: pip install fast"
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("sacn=torch", "HYMBA_ALIGN_KERNELS has 'sacn=torch'; write PART=BACKEND, where PART is one of scan, conv,"),
        ("scan", "HYMBA_ALIGN_KERNELS has 'scan'; write one of scan=torch, scan=native, scan=triton"),
        ("scan=cuda", "HYMBA_ALIGN_KERNELS has 'scan=cuda'; write one of scan=torch, scan=native, scan=triton"),
        (
            "scan=torch,scan=native",
            "HYMBA_ALIGN_KERNELS asks for scan=torch and scan=native; keep one of them",
        ),
    ],
)
def test_an_unknown_request_names_what_there_is(monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    monkeypatch.setenv(VARIABLE, wanted)
    with pytest.raises(KernelError) as caught:
        choose_kernels(CPU, torch.float32)
    assert str(caught.value).startswith(message)


def test_several_requests_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "scan = torch, attention=sdpa,")
    kernels = choose_kernels(CPU, torch.float32)
    assert (kernels.scan, kernels.attention) == ("torch", "sdpa")


@pytest.mark.parametrize("part", list(choice.BACKENDS))
def test_every_backend_is_there_with_a_word_on_where_it_runs(part: str) -> None:
    for name in choice.BACKENDS[part]:
        assert callable(choice._load(part, name))
        reason = choice._unavailable(part, name, CPU, torch.float32)
        assert reason is None or reason.strip()


def test_libraries_are_no_defaults_as_long_as_nobody_has_measured_them() -> None:
    for parts in choice.DEFAULTS.values():
        for candidates in parts.values():
            assert not {"causal-conv1d", "flash-attn", "mamba-ssm"} & set(candidates)


def test_inside_autocast_its_dtype_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, "scan", "fast", None)
    seen: list[torch.dtype] = []
    module = sys.modules["stand_in_backend"]
    monkeypatch.setattr(module, "unavailable", lambda device, dtype: seen.append(dtype))
    monkeypatch.setenv(VARIABLE, "scan=fast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choose_kernels(CPU, torch.float32)
    assert seen == [torch.bfloat16]


def test_a_malformed_request_is_found_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "scan=cuda")
    with pytest.raises(KernelError, match="write one of scan=torch"):
        evaluate("absent", EvalSection(), Path("absent"))
    with pytest.raises(KernelError, match="write one of scan=torch"):
        run_recipe(load_recipe("recipes/tiny/arithmetic.yaml"), dry_run=True)
