"""What docs/long_runs.md shows is true: its commands run, its keys are those of a recipe, its exit codes the program's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hymba_align.cli import INTERRUPTED, main
from hymba_align.errors import HymbaAlignError, Preempted, UsageError
from hymba_align.recipe import AnswersSection, DPOSection, LaunchSection, SFTSection
from hymba_align.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "long_runs.md").read_text(encoding="utf-8")
SMALL = ["base.config.hidden_size=32", "base.config.v_head_dim=16", "data.max_rows=24", "dpo.data.max_rows=16"]
SMALL += ["sft.trainer.max_steps=2", "dpo.trainer.max_steps=1", "eval.limit=2", "eval.max_new_tokens=4"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_commands_run_and_another_engine_finds_everything_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = "".join(blocks("bash")).splitlines()
    assert main([*shlex.split(first)[1:], *SMALL]) == 0
    assert "--nproc_per_node 2" in capsys.readouterr().out
    assert main([*shlex.split(second)[1:], *SMALL]) == 0
    assert capsys.readouterr().out.count("complete and unchanged, skipped") == 5


def test_the_recipe_with_answers_runs_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys on top of the demo's, on two processes, which the command starts."""
    for name in ("data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = yaml.safe_load(blocks("yaml")[0])
    keys = [f"data.validation_fraction={shown['data']['validation_fraction'] * 8}", "dpo=null", "eval=null"]
    keys += [
        f"sft.{part}.{key}={value}" for part in ("answers", "trainer") for key, value in shown["sft"][part].items()
    ]
    command = ["sft", "recipes/tiny/arithmetic.yaml", "--launcher", "ddp", "--num-processes", "2"]
    small = [each for each in SMALL if not each.startswith(("dpo", "eval"))]
    assert (
        main([*command, *small, *keys, "sft.trainer.per_device_train_batch_size=1", "sft.answers.max_new_tokens=4"])
        == 0
    )
    stage = tmp_path / "runs" / "arithmetic" / "sft"
    answered = [record for record in read_metrics(stage) if "eval_answers/exact" in record]
    assert [(record["step"], record["eval_answers/exact"]) for record in answered] == [(1, 0.0), (2, 0.0)]
    assert {record["eval_answers/cut_off"] for record in answered} == {1.0}
    metrics = json.loads((stage / "manifest.json").read_text())["details"]["metrics"]
    assert (metrics["answers/exact"], metrics["best_step"]) == (0.0, 2.0)


def test_the_table_of_answers_has_every_key_with_its_default() -> None:
    section = DOCUMENT.partition("## Answers while training")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w*) ?\|", section, flags=re.MULTILINE)
    defaults = AnswersSection(match="text").model_dump() | {"match": ""}
    assert dict(rows) == {key: str(value).lower() for key, value in defaults.items()}


def test_the_keys_are_those_of_a_recipe() -> None:
    _, text = blocks("yaml")
    shown = yaml.safe_load(text)
    for section, cls in (("sft", SFTSection), ("dpo", DPOSection)):
        assert cls.model_validate(shown[section]).guard.on_spike == "stop"
    assert LaunchSection().grace_s == 30


def test_the_table_of_guards_has_every_key_with_its_default() -> None:
    section = DOCUMENT.partition("## Training that goes wrong")[2]
    rows = re.findall(r"^\| `(\w+)`(?: \(DPO\))? \| `?([-\w.]+)`? \|", section, flags=re.MULTILINE)
    assert dict(rows) == {key: str(value) for key, value in DPOSection().guard.model_dump().items()}
    assert SFTSection().guard.model_dump().items() <= DPOSection().guard.model_dump().items()


def test_the_exit_codes_are_those_of_the_program() -> None:
    section = DOCUMENT.partition("## Stopping and going on")[2].partition("\n## ")[0]
    codes = [int(code) for code in re.findall(r"^\| [^|]+ \| (\d+) \|", section, flags=re.MULTILINE)]
    errors = [HymbaAlignError.exit_code, UsageError.exit_code, Preempted.exit_code]
    assert codes == [0, *errors, INTERRUPTED]


def test_every_file_that_it_points_at_exists() -> None:
    for name in re.findall(r"`((?:tests|recipes|hymba_align)/[\w./-]+)`", DOCUMENT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./]+)\)", DOCUMENT):
        assert (ROOT / "docs" / name).exists(), name
