"""What can be known of the Triton kernels without a GPU: they compile to machine code for two, and keep to registers.

Every launch of a forward and backward pass at the sizes of the 1.5B model is recorded instead of run, and compiled with
the types, alignments and constants that Triton would compile it for on a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hymba_align.model.kernels.triton_conv import TritonConv
from hymba_align.model.kernels.triton_scan import TritonScan

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

CPU = torch.device("cpu")
CHANNELS, STATE, TAPS = 3200, 16, 4
Tree = tuple[list[int], list[int], list[int]]
TREE: Tree = ([128, 300, 7], [-1, 0, 0], [-1, -1, -1])
DTYPES = [torch.float32, torch.bfloat16]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
OPTIONS = ("num_warps", "enable_fp_fusion")


class Launch(NamedTuple):
    """A kernel and all that Triton compiles it for."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    """Arguments that are multiples of 16."""
    options: tuple[tuple[str, Any], ...]


def describe(kernel: Any, arguments: dict[str, Any]) -> Launch:
    """A launch as `triton.runtime.jit` specialises it: by type, by being a multiple of 16, and by being 1."""
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(index)
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        else:
            signature.append((parameter.name, "i32"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(index)
    options = tuple((name, arguments[name]) for name in OPTIONS)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """Fills with what is launched, instead of launching it."""
    recorded: set[Launch] = set()

    def record(kernel: Any, *values: Any, grid: tuple[int], warmup: bool, **named: Any) -> None:
        assert grid[0] > 0
        names = [parameter.name for parameter in kernel.params]
        assert set(named) <= {*names, *OPTIONS}
        recorded.add(describe(kernel, {**dict(zip(names, values, strict=False)), **named}))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    return recorded


def run_all(tree: Tree, dtype: torch.dtype) -> None:
    """Every kernel of a layer, as the model calls it: u and z are halves of a projection, dt is float32."""
    total = sum(tree[0])
    projected = torch.zeros(total, 2 * CHANNELS, dtype=dtype, requires_grad=True)
    u, z = projected.split(CHANNELS, dim=1)
    weight, bias = torch.zeros(CHANNELS, TAPS, dtype=dtype), torch.zeros(CHANNELS, dtype=dtype)
    y, tails = TritonConv.build(*tree, TAPS, CPU).run(u, weight, bias, silu=True)
    (y.sum() + tails.sum()).backward(retain_graph=True)
    y.sum().backward()
    dt = torch.zeros(total, CHANNELS, requires_grad=True)
    A, D = torch.zeros(CHANNELS, STATE), torch.zeros(CHANNELS, dtype=dtype)
    B, C = (torch.zeros(total, STATE, dtype=dtype) for _ in range(2))
    plan = TritonScan.build(*tree, CPU)
    for out, final in (plan.gated(y.detach(), dt, A, B, C, D, z, None), plan.run(y.detach(), dt, A, B, C)):
        torch.autograd.grad([out, final], [dt], [torch.zeros_like(out), torch.zeros_like(final)], retain_graph=True)
        torch.autograd.grad([out], [dt], [torch.zeros_like(out)])
    with torch.no_grad():
        plan.gated(y, dt, A, B, C, D, z)


KERNELS = {
    "run_chunks", "hand_down", "finish_chunks", "run_chunks_back", "hand_up", "gradients",
    "convolve", "copy_tails", "convolve_back", "join_segments",
}  # fmt: skip


def resources(launch: Launch, capability: int, folder: Path) -> tuple[int, int, int]:
    """Registers per thread, bytes of stack per thread, and loads and stores of it, of the machine code."""
    source = triton.compiler.ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage, code = (
        subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    assert "EXIT" in code
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:LDL|STL)\b", code))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_compiles_without_a_gpu_and_spills_no_register(
    launches: set[Launch], dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    run_all(TREE, dtype)
    assert {launch.kernel.__name__ for launch in launches} == KERNELS
    for launch in sorted(launches, key=lambda launch: (launch.kernel.__name__, launch.constants)):
        registers, stack, spills = resources(launch, capability, tmp_path)
        print(f"sm_{capability} {dtype} {launch.kernel.__name__} {dict(launch.constants)}: {registers} registers")
        assert (stack, spills) == (0, 0), launch


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_need_no_compilation(launches: set[Launch], dtype: torch.dtype) -> None:
    run_all(TREE, dtype)
    first = set(launches)
    for tree in (([128, 1, 2, 3, 5], [-1, 0, 0, 0, 3], [-1] * 5), ([2049, 33], [-1, 0], [-1, -1])):
        run_all(tree, dtype)
    assert launches == first
