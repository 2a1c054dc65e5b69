"""Versions of what is installed, beside the ranges that this package was made for."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import hymba_align
from hymba_align.doctor.findings import Finding

PACKAGE = "hymba-align"
MATTER = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "lm-eval")
"""Shown even where they are as they should be"""
INSTALL_BFCL = "hymba-align install-bfcl"
OPTIONAL = {
    "triton": ("the fast kernels on GPUs", "pip install triton"),
    "bitsandbytes": ("QLoRA", "in the clone: pip install -e '.[quantized]'"),
    "mamba-ssm": ("another decoding step on GPUs", "in the clone: pip install --no-build-isolation -e '.[cuda]'"),
    "causal-conv1d": ("another convolution on GPUs", "in the clone: pip install --no-build-isolation -e '.[cuda]'"),
    "flash-attn": ("another attention on GPUs", "in the clone: pip install --no-build-isolation -e '.[cuda]'"),
}


def version_findings() -> list[Finding]:
    """Python, this package, what it needs, and what it can use."""
    found = [Finding("python", "ok", platform.python_version()), Finding(PACKAGE, "ok", hymba_align.__version__)]
    needed, optional = requirements()
    if not needed:
        found.append(
            Finding(
                "requirements",
                "note",
                "this package is not installed, so no ranges are known",
                "in the clone: pip install -e .",
            )
        )
    for name in dict.fromkeys([*MATTER, *needed]):
        finding = _required(name, needed.get(name))
        if finding.status != "ok" or name in MATTER:
            found.append(finding)
    return [*found, *(_optional(name, optional.get(name)) for name in OPTIONAL), bfcl_finding()]


def requirements() -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """What the installed package requires, and what its extras do, by name, where the markers hold here."""
    try:
        given = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return {}, {}
    needed: dict[str, Requirement] = {}
    optional: dict[str, Requirement] = {}
    for requirement in given:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed[requirement.name] = requirement
        else:
            optional.setdefault(requirement.name, requirement)
    return needed, optional


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str, requirement: Requirement | None) -> Finding:
    version = _version(name)
    wanted = str(requirement.specifier) if requirement is not None else ""
    if version is None:
        return Finding(name, "wrong", "not installed", f"pip install '{name}{wanted}'")
    # Local parts such as +cu130 say how torch was built.
    if requirement is None or requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return Finding(name, "ok", f"{version} (made for {wanted})" if wanted else version)
    return Finding(name, "wrong", f"{version}, and this package is made for {wanted}", f"pip install '{name}{wanted}'")


def _optional(name: str, requirement: Requirement | None) -> Finding:
    what, command = OPTIONAL[name]
    version = _version(name)
    if version is None:
        return Finding(name, "note", f"not installed: {what}", command)
    wanted = str(requirement.specifier) if requirement is not None else ""
    if not wanted or requirement is None or requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return Finding(name, "ok", f"{version}: {what}")
    return Finding(name, "note", f"{version}, and this package is made for {wanted}", f"pip install '{name}{wanted}'")


def bfcl_finding() -> Finding:
    """Whether the grader of function calls is installed, in the folder of its own."""
    from hymba_align.errors import GraderError
    from hymba_align.eval.bfcl.environment import bfcl_python

    try:
        bfcl_python()
    except GraderError as error:
        return Finding("bfcl-eval", "note", f"{str(error).partition(';')[0]}: scores of function calls", INSTALL_BFCL)
    return Finding("bfcl-eval", "ok", "installed: scores of function calls")


def compiler_finding() -> Finding:
    """The C++ compiler, which builds the native kernels at first use."""
    from hymba_align.errors import KernelError
    from hymba_align.model.kernels.native import find_compiler

    try:
        command, _ = find_compiler()
    except KernelError as error:
        install = "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"
        return Finding("C++ compiler", "note", str(error), install)
    return Finding("C++ compiler", "ok", f"{Path(command[0]).name}: builds the native kernels at first use")
