"""BFCL's grader as a process, shared by a module's tests, and answers that are right by its ground truth."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hymba_align.eval.bfcl.client import BFCLClient


@pytest.fixture(scope="module")
def client() -> Iterator[BFCLClient]:
    with BFCLClient() as started:
        yield started


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """oracle.py, beside this file."""
    return load(Path(__file__).with_name("oracle.py"))


@pytest.fixture(scope="session")
def players() -> ModuleType:
    """players.py, beside this file."""
    return load(Path(__file__).with_name("players.py"))


@pytest.fixture(scope="session")
def snippets() -> ModuleType:
    """snippets.py, beside this file."""
    return load(Path(__file__).with_name("snippets.py"))


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """worker.py as a module; what it imports of bfcl_eval is not there."""
    import hymba_align.eval.bfcl.client

    return load(hymba_align.eval.bfcl.client.WORKER)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_bfcl_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
