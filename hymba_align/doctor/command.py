"""What `hymba-align doctor` does: looks at everything, prints it, and says whether something in use is wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.doctor.findings import Finding
from hymba_align.doctor.kernels import WHAT, Kernel, look_at_kernels, result_words
from hymba_align.doctor.versions import version_findings
from hymba_align.hardware import Hardware, detect
from hymba_align.memory import gib
from hymba_align.recipe import Recipe
from hymba_align.terminal import open_console

if TYPE_CHECKING:
    from rich.console import Console

MARKS = {"ok": "ok", "note": "--", "wrong": "!!"}
STYLES = {"ok": "green", "note": "dim", "wrong": "bold red"}


@dataclass(frozen=True)
class Report:
    """All that was found."""

    hardware: Hardware
    sections: dict[str, list[Finding]]
    kernels: list[Kernel]
    seconds: float
    """That the self-test took, with building what had to be built"""

    @property
    def wrong(self) -> list[Finding]:
        """The findings that need something done."""
        return [finding for findings in self.sections.values() for finding in findings if finding.status == "wrong"]

    def plain(self) -> dict[str, Any]:
        """The report as one mapping of plain values, for --json."""
        return {
            "right": not self.wrong,
            "hardware": self.hardware,
            "sections": self.sections,
            "kernels": self.kernels,
            "self_test_seconds": self.seconds,
        }


def examine(recipe: Recipe | None = None, *, hardware: Hardware | None = None) -> Report:
    """Versions, devices, kernels with their self-test and, with a recipe, its room; prints all of it.

    Args:
        recipe: whose memory and disk are compared with what is there.
        hardware: the machine; None for this one.
    """
    from hymba_align.run.folder import run_root

    hardware = hardware if hardware is not None else detect(run_root(recipe) if recipe is not None else Path("runs"))
    console = open_console()
    sections: dict[str, list[Finding]] = {}
    for title, findings in (("Versions", version_findings()), ("Devices", device_findings(hardware))):
        sections[title.lower()] = findings
        _print(console, title, findings)
    start = time.perf_counter()
    kernels, findings = look_at_kernels()
    seconds = time.perf_counter() - start
    sections["kernels"] = findings
    _print(console, "Kernels in use, against float64 recurrences", findings)
    _print_others(console, kernels)
    if recipe is not None:
        from hymba_align.doctor.room import room_findings

        sections["recipe"] = room_findings(recipe, hardware)
        _print(console, f"Recipe {recipe.name}", sections["recipe"])
    report = Report(hardware, sections, kernels, seconds)
    _print_verdict(console, report)
    return report


def examine_room(recipe: Recipe, hardware: Hardware) -> Report:
    """Memory of a recipe on GPUs that are assumed; prints it. Nothing else of this machine is looked at."""
    from hymba_align.doctor.room import room_findings

    console = open_console()
    report = Report(hardware, {"recipe": room_findings(recipe, hardware)}, [], 0.0)
    gpus = f"{len(hardware.gpus)} GPUs" if len(hardware.gpus) > 1 else "1 GPU"
    title = f"Recipe {recipe.name} on {gpus} of {gib(hardware.device_bytes)} GiB, as --gpus {hardware.assumed} assumes"
    _print(console, title, report.sections["recipe"])
    _print_wrong(console, report, "Nothing is wrong.")
    return report


def device_findings(hardware: Hardware) -> list[Finding]:
    """Processors, memory, disk and graphics cards."""
    gpus = [
        Finding(f"GPU {index}", "ok", f"{gpu.name}, {gib(gpu.memory_bytes)} GiB, {'' if gpu.bf16 else 'no '}bfloat16")
        for index, gpu in enumerate(hardware.gpus)
    ]
    return [
        Finding("CPU", "ok", f"{hardware.cpus} cores, {gib(hardware.memory_bytes)} GiB"),
        Finding("disk", "ok", f"{gib(hardware.disk_free_bytes)} GiB free"),
        *(gpus or [Finding("GPU", "note", "none that torch can use: training is for small models", _why_no_gpu())]),
    ]


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "where there is one, a build of torch for it: https://pytorch.org/get-started/locally"
    return "'nvidia-smi' shows whether the driver sees one; CUDA_VISIBLE_DEVICES may hide it"


def _print(console: Console, title: str, findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(title, style="bold", markup=False)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(14, console.width // 3))
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text(f"  {MARKS[finding.status]}", style=STYLES[finding.status])
        value = Text(finding.value)
        if finding.fix and finding.status != "ok":
            value.append(f"\n-> {finding.fix}", style="bold" if finding.status == "wrong" else "")
        table.add_row(mark, Text(finding.name), value)
    console.print(table, soft_wrap=False)


def _print_others(console: Console, kernels: Sequence[Kernel]) -> None:
    """Kernels that are not in use: tested all the same where they can run, else what they lack."""
    console.print("Other kernels", style="bold", markup=False)
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(14, console.width // 3))
    table.add_column(overflow="fold")
    for kernel in kernels:
        if kernel.used:
            continue
        result = kernel.result
        status = "note" if result is None else "ok" if result.right else "wrong"
        tested = f"; {result_words(result)}" if result is not None else ""
        table.add_row(
            Text(f"  {MARKS[status]}", style=STYLES[status]),
            Text(f"{kernel.part}={kernel.backend}"),
            Text(f"{kernel.why}{tested}"),
        )
    console.print(table, soft_wrap=False)
    parts = "; ".join(f"{part} {what}" for part, what in WHAT.items())
    console.print(f"  {parts}", style="dim", markup=False, soft_wrap=False)


def _print_verdict(console: Console, report: Report) -> None:
    tested = sum(kernel.result is not None for kernel in report.kernels)
    console.print(f"{tested} kernels were tested in {report.seconds:.1f} s.", markup=False)
    _print_wrong(console, report, "Nothing in use is wrong.")


def _print_wrong(console: Console, report: Report, nothing: str) -> None:
    if not report.wrong:
        console.print(nothing, style="green", markup=False)
        return
    names = ", ".join(finding.name for finding in report.wrong)
    console.print(f"Wrong: {names} (the lines with !! above).", style="bold red", markup=False)
