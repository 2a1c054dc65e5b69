"""What docs/performance.md shows is true: its snippets run, its tables are the committed ones, its kernels are the defaults."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import collect
import pytest

from hymba_align.data.template import load_tokenizer
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.decoding import Decoded
from hymba_align.model.kernels import choice

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_snippets_run_one_after_another(small_config: HymbaConfig) -> None:
    tokenizer = load_tokenizer("data/arithmetic/tokenizer")
    small_config.vocab_size = len(tokenizer)
    names: dict[str, Any] = {
        "model": HymbaForCausalLM(small_config).eval(),
        "tokenizer": tokenizer,
    }
    snippets = blocks("python")
    for snippet in snippets:
        exec(snippet, names)  # our own document, not a model's output
    assert len(snippets) == 4
    assert all(isinstance(answer, Decoded) for answer in names["answers"])
    assert names["best"] in range(4)
    question, *answers = names["tree"].lengths.tolist()
    assert names["output"].past_key_values.lengths.tolist() == [question + answer for answer in answers]


def test_the_commands_run() -> None:
    for line in "".join(blocks("bash")).splitlines():
        variable, *words = shlex.split(line)
        name, _, value = variable.partition("=")
        command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        subprocess.run(command, env={**os.environ, name: value}, check=True, capture_output=True)


def test_the_tables_are_the_committed_ones() -> None:
    assert collect.collected(DOCUMENT) == DOCUMENT, "run: python benchmarks/collect.py"
    shown = set(re.findall(r"\(\.\./benchmarks/(\w+)\.md\)", DOCUMENT))
    assert shown == {page.stem for page in (ROOT / "benchmarks").glob("*.md")} & set(collect.TABLES)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("selective scan", "scan"),
        ("convolution", "conv"),
        ("attention", "attention"),
        ("RMS norm", "norm"),
        ("one step of the scan, in generation", "scan_step"),
        ("one step of the convolution", "conv_step"),
    ],
)
def test_the_kernels_that_the_document_names_are_the_defaults(row: str, part: str) -> None:
    cells = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| {row} |")).split("|")[2:5]
    shown = [re.findall(r"`([\w-]+)`", cell) for cell in cells]
    defaults = [list(choice.DEFAULTS[device].get(part, (choice.PLAIN[part],))) for device in ("cpu", "cuda")]
    assert shown[:2] == defaults
    assert set(shown[2]) == set(choice.BACKENDS[part]) - {name for names in defaults for name in names}


def test_the_document_links_to_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
