"""Everything the README shows runs: commands (made small), the Python snippet, the file map."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hymba_align.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# The tiny recipe at a size for tests: a few rows, two steps per stage, two problems.
SMALL = [
    "base.config.hidden_size=32",
    "base.config.v_head_dim=16",
    "base.config.num_memory_tokens=4",
    "data.max_rows=24",
    "dpo.data.max_rows=16",
    "sft.trainer.max_steps=2",
    "dpo.trainer.max_steps=1",
    "eval.limit=2",
    "eval.max_new_tokens=4",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


def test_the_readme_shows_the_two_commands_and_make_knows_them() -> None:
    assert commands("make") == [["make", "demo"], ["make", "test"]]
    for target, expected in (("demo", "hymba-align run recipes/tiny/arithmetic.yaml"), ("test", "-m pytest")):
        printed = subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert expected in printed.splitlines()[-1]


def test_every_command_and_the_python_snippet_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = commands("hymba-align")
    assert [words[1] for words in shown] == [
        "run",
        "sft",
        "dpo",
        "eval",
        "install-bfcl",
        "run",
        "data",
        "data",
        "run",
        "run",
    ]
    for name in ("data", "recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    (tmp_path / "my.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 3, encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # so that `runs/` is not the developer's own
    for words in shown:
        changes = SMALL
        if "--dry-run" in words or words[1] in ("data", "eval", "install-bfcl"):
            changes = ["max_new_tokens=4"] if words[1] == "eval" else []
        elif "dpo=null" in words:
            changes = [change for change in SMALL if not change.startswith(("dpo.", "eval."))]
        assert main([*words[1:], *changes]) == 0, words
    assert (tmp_path / "runs" / "arithmetic" / "report.md").is_file()
    assert (tmp_path / "runs" / "mine" / "sft" / "final" / "model.safetensors").is_file()

    (snippet,) = blocks("python")  # which loads what those commands left
    scope: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert type(scope["model"]).__name__ == "HymbaForCausalLM"
    assert len(scope["answers"]) == 2


def test_the_file_map_names_only_what_exists_and_every_module_of_the_top_level() -> None:
    (tree,) = re.findall(r"```\n(hymba_align/.*?)```", README, flags=re.DOTALL)
    top = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    assert all((ROOT / name).is_dir() for name in top)
    modules = {path.name for path in (ROOT / "hymba_align").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules == set(re.findall(r"\b\w+\.py\b", tree))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    folders = {f"{name.split('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= set(top) or not tracked


def test_every_file_the_readme_points_at_exists() -> None:
    for name in re.findall(r"`((?:tests|benchmarks|recipes|hymba_align|data)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
