"""What docs/scores.md shows is true: its commands run, its keys are those of a recipe, its tables name what there is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml

from hymba_align.cli import main
from hymba_align.recipe_eval import SUITES_FOLDER, EvalSection, Task

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
SMALL = ["base.config.hidden_size=32", "base.config.v_head_dim=16", "base.config.num_hidden_layers=2"]
SMALL += ["base.config.global_attn_idx=[0]", "base.config.kv_reuse_group=[]", "data.max_rows=8", "dpo.data.max_rows=8"]
SMALL += ["sft.trainer.max_steps=1", "dpo.trainer.max_steps=1", "eval=null"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_commands_run_on_what_the_tiny_recipe_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["run", "recipes/tiny/arithmetic.yaml", *SMALL]) == 0
    one, several = "".join(blocks("bash")).splitlines()
    assert main([*shlex.split(one)[1:], "limit=3", "max_new_tokens=4"]) == 0
    result = json.loads((tmp_path / "runs/eval/runs-arithmetic-dpo-final/gsm8k.json").read_text())
    assert result["suite"].startswith("quick, but")  # it names what the command changed
    assert main([*shlex.split(several)[1:], "limit=3", "max_new_tokens=4", "--output", "several"]) == 0
    beside = json.loads((tmp_path / "several/gsm8k.json").read_text())
    assert [(one["n"], one["partial"], one["processes"]) for one in (result, beside)] == [(3, True, 1), (3, True, 2)]
    assert "3 of 200" in capsys.readouterr().out


def test_the_keys_are_those_of_a_recipe() -> None:
    (text,) = blocks("yaml")
    section = EvalSection.model_validate(yaml.safe_load(text)["eval"])
    assert section.tasks == ("gsm8k", "gpqa", "bfcl")


def test_the_tables_have_every_suite_and_every_task() -> None:
    named = re.findall(r"^\| `([a-z0-9_]+)` \|", DOCUMENT, flags=re.MULTILINE)
    assert set(named) == {path.stem for path in SUITES_FOLDER.glob("*.yaml")} | set(get_args(Task))


def test_the_standard_errors_are_those_of_that_many_problems_at_half() -> None:
    said = re.search(
        r"100 problems at 50 % have ([\d.]+) points, GPQA's 448 have ([\d.]+), GSM8K's 1,319 have ([\d.]+)", DOCUMENT
    )
    assert said is not None
    assert [float(points) for points in said.groups()] == [round(50 / (n - 1) ** 0.5, 1) for n in (100, 448, 1319)]


def test_every_file_that_it_points_at_exists() -> None:
    for name in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", DOCUMENT):
        assert (ROOT / "docs" / name).exists(), name
