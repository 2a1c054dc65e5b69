"""The whole road on the real parts: data through SFT, DPO and scores, by the command that users run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import hymba_align.model  # noqa: F401  registers "hymba"
from hymba_align.cli import main
from hymba_align.inside.stored import read
from hymba_align.inside.summary import summary

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
RECIPE = "recipes/tiny/arithmetic.yaml"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_recipe_learns_what_it_is_given_and_dpo_prefers_the_right_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve problems, learned by heart: the score on them rises from nothing in SFT and stays in DPO."""
    rows = Path("data/arithmetic/train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    overrides = [
        f"data.path={tmp_path / 'train.jsonl'}",
        f"output_dir={run}",
        "data.examples_per_conversation=1",
        "eval.gsm8k.num_fewshot=0",
        "sft.trainer.num_train_epochs=50",
        "sft.trainer.per_device_train_batch_size=1",
        "dpo.trainer.num_train_epochs=5",
        "dpo.trainer.per_device_train_batch_size=4",
        "eval.max_new_tokens=64",
        "inspect.documents=6",
        "inspect.contexts=[64,256]",
    ]
    assert main(["run", RECIPE, *overrides]) == 0
    scores = {stage: read_json(run / "eval" / stage / "gsm8k.json")["scores"] for stage in ("base", "sft", "dpo")}
    strict = {stage: score["strict_match"]["value"] for stage, score in scores.items()}
    assert strict["base"] == 0
    assert strict["sft"] >= 0.75
    assert strict["dpo"] >= strict["sft"]

    metrics = [json.loads(line) for line in (run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    margins = [record["rewards/margins"] for record in metrics if "rewards/margins" in record]
    assert margins[-1] > max(margins[0], 0.01)
    weights = [AutoModelForCausalLM.from_pretrained(run / stage / "final").state_dict() for stage in ("sft", "dpo")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    printed = capsys.readouterr().out
    assert "Report:" in printed
    report = (run / "report.md").read_text(encoding="utf-8")
    assert f"{100 * strict['sft']:.1f}" in report

    inside = read(run / "inspect" / "dpo" / "inspect.json")
    assert (inside.left_out, inside.against) == ({}, f"{run}/sft/final")
    assert inside.data.startswith(f"6 documents chosen from 12 rows of {tmp_path}/test.jsonl; 6 pairs")
    (loss,) = inside.importance
    assert loss.chance is not None
    assert loss.whole.mean < 0.1 * loss.chance
    assert loss.layers[0].ssm.score > 5 * loss.whole.mean
    assert inside.alignment is not None
    assert inside.alignment.whole.distance > 0
    assert all(finding.text.split(",")[0] in report.replace("\\", "") for finding in summary(inside).findings)

    assert main(["run", RECIPE, *overrides]) == 0
    assert capsys.readouterr().out.count("complete and unchanged, skipped") == 6


def test_dpo_with_and_without_sharing_prompts_trains_the_same_model(tmp_path: Path) -> None:
    small = [
        "base.config.hidden_size=32",
        "base.config.v_head_dim=16",
        "dpo.data.max_rows=12",
        "dpo.trainer.per_device_train_batch_size=4",
        "dpo.trainer.learning_rate=1e-4",
    ]
    for name, share in (("shared", "true"), ("apart", "false")):
        overrides = [f"output_dir={tmp_path / name}", f"dpo.share_prefix={share}", "sft=null", *small]
        assert main(["dpo", RECIPE, *overrides]) == 0
    shared, apart = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "dpo" / "final").state_dict()
        for name in ("shared", "apart")
    )
    for name, weight in apart.items():
        assert_close(shared[name], weight, atol=1e-5, rtol=0)  # three AdamW steps of 1e-4


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not at hand")
def test_real_gsm8k_goes_down_the_whole_road_with_one_override_of_the_data_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = [  # less of everything, for the time of a test
        "base.config.hidden_size=64",
        "base.config.v_head_dim=32",
        "data.max_rows=60",
        "dpo.data.max_rows=8",
        "sft.trainer.num_train_epochs=1",
        "dpo.trainer.per_device_train_batch_size=4",
        "eval.limit=3",
        "eval.max_new_tokens=16",
        "inspect.documents=2",
        "inspect.parts=[alignment]",
    ]
    data_path = f"data.path={GSM8K / 'train.jsonl'}"
    assert main(["run", RECIPE, data_path, f"output_dir={tmp_path / 'run'}", *size]) == 0
    printed = capsys.readouterr().out
    assert "of 60 rows kept" in printed
    result = read_json(tmp_path / "run" / "eval" / "dpo" / "gsm8k.json")
    assert result["n"] == 3
    assert result["total"] == 1319
    inside = read_json(tmp_path / "run" / "inspect" / "dpo" / "inspect.json")
    assert inside["data"].startswith(f"2 documents chosen from 1,319 rows of {GSM8K / 'test.jsonl'}")
    assert result["truncated_prompts"] == 0
    assert result["partial"]
    first = json.loads((GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert result["samples"][0]["question"] == first["question"]
