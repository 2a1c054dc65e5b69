"""Runs all sections, each within its time, and writes what they found.

    benchmarks/gpu/run.sh [--smoke] [--output FOLDER] [--sections card,correctness]

On a GPU every section runs in a process of its own: one that runs out of memory, fails or hangs takes nothing else
with it, and what it found before is kept. The smoke run stays in one process. Ends with 1 when a section failed or ran
out of time, a kernel was wrong, or a goal was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import measure
import torch

from gpu import correctness, device, findings, generation, kernels, training
from gpu.findings import Finding
from gpu.sizes import Sizes, in_smoke, on_gpu
from hymba_align.environment import environment
from hymba_align.model.kernels.choice import DEFAULTS, choose_kernels

HERE = Path(__file__).resolve().parent
TOTAL_S = 525  # below nine minutes with the start of the first process and the writing of results
SECTIONS: dict[str, tuple[Callable[[Sizes], Iterator[Finding]], int]] = {
    "card": (device.run, 25),
    "correctness": (correctness.run, 130),
    "roofline": (kernels.run, 75),
    "SFT": (training.sft, 80),
    "packing": (training.packing, 60),
    "DPO": (training.dpo, 60),
    "generation": (generation.run, 55),
    "libraries": (kernels.beside_libraries, 40),
}
"""In order, with the seconds that each may take, its start included."""


class TimeUp(BaseException):
    """A section of the smoke run used up its time. No Exception, so that nothing on the way takes it for its own."""


def run_here(name: str, sizes: Sizes, path: Path) -> None:
    """Runs a section in this process and appends what it finds; a failure is a finding, too."""
    try:
        for finding in SECTIONS[name][0](sizes):
            findings.append(path, finding)
    except Exception as error:  # the other sections run all the same; the table and the exit show this one
        traceback.print_exc()
        findings.append(path, findings.failed(name, "section", error))


def run_within(name: str, sizes: Sizes, path: Path, limit_s: float) -> None:
    """Runs a section and stops it when its time is up."""
    if sizes.smoke:
        with contextlib.suppress(TimeUp), alarm(limit_s):
            run_here(name, sizes, path)
            return
    else:
        command = [sys.executable, "-m", "gpu.run", "--worker", name, "--findings", str(path)]
        try:
            done = subprocess.run(command, timeout=limit_s)
        except subprocess.TimeoutExpired:
            pass
        else:
            if done.returncode:
                findings.append(path, Finding(name, "section", f"its process ended with {done.returncode}", met=False))
            return
    findings.append(
        path, Finding(name, "section", f"stopped after {limit_s:.0f} s, what follows is missing", met=False)
    )


@contextlib.contextmanager
def alarm(limit_s: float) -> Iterator[None]:
    """Raises TimeUp in the block once its time is up."""

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    others, _ = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, others)
        signal.signal(signal.SIGALRM, before)


def run_all(names: list[str], sizes: Sizes) -> tuple[list[Finding], dict[str, float]]:
    """What all sections found, and the seconds that each took."""
    found: list[Finding] = []
    took: dict[str, float] = {}
    end = time.monotonic() + TOTAL_S
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            start = time.monotonic()
            limit = min(SECTIONS[name][1], end - start)
            path = Path(folder) / f"{name}.jsonl"
            if limit > 0:
                run_within(name, sizes, path, limit)
            own = list(findings.read(path)) or [Finding(name, "section", "no time was left for it", met=False)]
            took[name] = time.monotonic() - start
            print(f"{name}: {len(own)} findings in {took[name]:.0f} s", flush=True)
            found += own
    return found, took


def write(folder: Path, page: str, found: list[Finding], took: dict[str, float], sizes: Sizes) -> None:
    """The page and the same as JSON, with hardware, versions and date."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "smoke" if sizes.smoke else "results"
    (folder / f"{stem}.md").write_text(page)
    content = {
        "date": str(datetime.date.today()),
        "smoke": sizes.smoke,
        "hardware": measure.hardware(),
        "environment": environment(),
        "seconds_per_section": took,
        "findings": [asdict(finding) for finding in found],
    }
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every section at toy size on the CPU; measures nothing")
    parser.add_argument(
        "--output", type=Path, help="folder for the results (default: $OUT, else benchmarks/gpu/results)"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names, separated by commas")
    parser.add_argument("--worker", choices=SECTIONS, help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    if unknown := sorted(set(names) - SECTIONS.keys()):
        parser.error(f"--sections: {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}")
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: nothing was measured; --smoke shows on the CPU that all sections work")
    sizes = in_smoke() if arguments.smoke else on_gpu()
    if arguments.worker:
        run_here(arguments.worker, sizes, arguments.findings)
        return
    found, took = run_all(names, sizes)
    notes = ["Seconds per section: " + ", ".join(f"{name} {spent:.0f}" for name, spent in took.items()) + "."]
    if sizes.smoke:
        used, meant = choose_kernels(sizes.device, sizes.dtype), DEFAULTS["cuda"]
        stand_ins = ", ".join(f"{part} {getattr(used, part)} for {names[0]}" for part, names in meant.items())
        notes.append(f"Timed kernels are those of the CPU, in place of those that a GPU would use: {stand_ins}.")
    command = f"benchmarks/gpu/run.sh{' --smoke' if sizes.smoke else ''}"
    page = findings.page(found, smoke=sizes.smoke, command=command, notes=notes)
    print(page)
    folder = arguments.output or (Path(os.environ["OUT"]) if "OUT" in os.environ else None)
    if folder or not sizes.smoke:
        write(folder or HERE / "results", page, found, took, sizes)
    if missed := [f"{one.section}: {one.what}: {one.measured}" for one in found if one.met is False]:
        raise SystemExit("missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
