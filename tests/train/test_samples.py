"""What the model writes while it trains: kept and shown, and without a trace in the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hymba_align.checkpoint import load_model
from hymba_align.data.template import load_tokenizer
from hymba_align.eval.matching import matcher
from hymba_align.eval.report import write_report
from hymba_align.plan import plan
from hymba_align.recipe import LaunchSection, Recipe, SamplesSection
from hymba_align.run.metrics import SAMPLES_FILE, append_metrics, read_metrics
from hymba_align.train import answers as answers_module
from hymba_align.train.dpo import train_dpo
from hymba_align.train.samples import SamplesFile, section_of
from hymba_align.train.sft import train_sft

TOKENIZER = Path(__file__).resolve().parents[2] / "data/arithmetic/tokenizer"


def with_samples(recipe: Recipe, stage: str = "sft", **section: Any) -> Recipe:
    """The recipe with validation, and these keys in a stage's section."""
    assert recipe.data is not None
    data = recipe.data.model_copy(update={"validation_fraction": 0.3})
    made = getattr(recipe, stage).model_copy(update=section)
    return recipe.model_copy(update={"data": data, stage: made})


@pytest.fixture
def validated(make_recipe: Any) -> Callable[..., Recipe]:
    """A recipe that validates twice."""

    def make(stage: str = "sft", **section: Any) -> Recipe:
        settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-2}
        return with_samples(make_recipe(rows=24, sft=stage == "sft", **settings), stage, **section)

    return make


def test_training_is_bitwise_the_same_with_and_without_samples_and_they_are_what_the_weights_generate(
    validated: Any, tmp_path: Path
) -> None:
    shown = SamplesSection(prompts=3, max_new_tokens=6)
    for name, samples in (("with", shown), ("without", SamplesSection(prompts=0))):
        train_sft(validated(samples=samples), None, tmp_path / name)
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        ours, theirs = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("with", "without"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), folder
    assert not (tmp_path / "without" / SAMPLES_FILE).exists()

    records = read_metrics(tmp_path / "with", SAMPLES_FILE)
    assert [record["step"] for record in records] == [2, 2, 2, 4, 4, 4]
    assert len({record["prompt"] for record in records}) == 3
    tokenizer = load_tokenizer(str(TOKENIZER))
    for record in records:
        model = load_model(tmp_path / "with" / f"checkpoint-{record['step']}").eval()
        ids = tokenizer(record["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert record["text"] == tokenizer.decode(made, skip_special_tokens=True)
        assert record["cut_off"] == (made[-1] != tokenizer.eos_token_id)
        assert record["right"] is None

    write_report(tmp_path)  # whose stages are sft and dpo
    (tmp_path / "with").rename(tmp_path / "sft")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "What SFT wrote while it trained <small>3 held-out prompts</small>" in page
    assert page.count("<h5>Step 2") == page.count("<h5>Step 4") == 3


def test_answers_and_samples_share_one_generation(
    validated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = answers_module.judge

    def counting(model: Any, tokenizer: Any, problems: Any, judging: Any, most: int) -> Any:
        asked.append(len(problems))
        return real(model, tokenizer, problems, judging, most)

    monkeypatch.setattr(answers_module, "judge", counting)
    section = {"match": "number", "problems": 5, "max_new_tokens": 4}
    recipe = validated().model_dump(mode="json", exclude_unset=True)
    recipe["sft"] |= {"answers": section, "samples": {"prompts": 2}}
    train_sft(Recipe.model_validate(recipe), None, tmp_path, matcher("number"))

    assert asked == [5, 5]
    records = read_metrics(tmp_path, SAMPLES_FILE)
    assert [record["step"] for record in records] == [2, 2, 4, 4]
    assert {record["right"] for record in records} <= {True, False}
    assert all(record["cut_off"] for record in records), "of 4 tokens, and not of the 128 of samples"


def test_dpo_continues_the_prompts_of_its_pairs(validated: Any, tmp_path: Path) -> None:
    recipe = validated("dpo", samples=SamplesSection(prompts=2, max_new_tokens=4))
    train_dpo(recipe, None, tmp_path)
    rows = [json.loads(line) for line in Path(recipe.data.path).read_text().splitlines()[:24]]
    records = read_metrics(tmp_path, SAMPLES_FILE)
    assert [record["step"] for record in records] == [2, 2, 4, 4]
    assert {record["reference"] for record in records} < {row["answer"] for row in rows}


def test_a_resumed_stage_drops_the_samples_that_it_makes_again(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for step in (2, 4, 6):
        append_metrics(tmp_path, {"step": step, "text": "x"}, SAMPLES_FILE)
    SamplesFile(tmp_path).on_train_begin(arguments, TrainerState(global_step=4), TrainerControl())
    assert [record["step"] for record in read_metrics(tmp_path, SAMPLES_FILE)] == [2, 4]
    SamplesFile(tmp_path).on_train_begin(arguments, TrainerState(global_step=0), TrainerControl())
    assert read_metrics(tmp_path, SAMPLES_FILE) == []


def test_no_stage_trains_again_because_of_samples(validated: Any) -> None:
    prints = {
        step.fingerprint
        for samples in (None, SamplesSection(prompts=9))
        for step in plan(validated(samples=samples))[:1]
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("launcher", "answers", "prompts"), [(None, False, 4), ("ddp", False, 4), ("zero3", False, 0), ("zero3", True, 4)]
)
def test_by_default_there_are_four_unless_they_would_cost_a_copy_of_divided_weights(
    validated: Any, launcher: str | None, answers: bool, prompts: int
) -> None:
    from hymba_align.recipe import AnswersSection

    recipe = validated(samples=None, answers=AnswersSection(match="number") if answers else None)
    recipe = recipe.model_copy(update={"launch": LaunchSection(launcher=launcher, num_processes=1)})
    assert section_of(recipe, "sft").prompts == prompts
    chosen = with_samples(recipe, samples=SamplesSection(prompts=7))
    assert section_of(chosen, "sft").prompts == 7
