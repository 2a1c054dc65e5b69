"""Importance by a task: the eval package's own scores, of every removal as of a checkpoint whose scale is really zero."""

from __future__ import annotations

import math
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hymba_align.checkpoint import base_config, load_model
from hymba_align.cli import main
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import ProblemsError
from hymba_align.eval import TaskResult, answers, evaluate
from hymba_align.eval.answer_store import AnswerStore
from hymba_align.eval.result import Sample, Score
from hymba_align.inside.importance import scorings
from hymba_align.inside.output import KEPT
from hymba_align.inside.result import Measured
from hymba_align.inside.stored import read
from hymba_align.inside.task_importance import Kept, measure_task_importance
from hymba_align.model import HymbaForCausalLM
from hymba_align.recipe import BaseSection
from hymba_align.recipe_eval import EvalSection, GPQASection, GSM8KSection

ROOT = Path(__file__).resolve().parents[2]
invented = runpy.run_path(str(ROOT / "tests" / "eval" / "invented_gpqa.py"))
NORMS = {"attention": "pre_avg_layernorm1", "ssm": "pre_avg_layernorm2"}
REMOVALS: list[Any] = [None, (0, "attention"), (0, "ssm"), (1, "attention"), (1, "ssm")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(ROOT / "data" / "arithmetic" / "tokenizer"))


@pytest.fixture
def checkpoint(tokenizer: Any, small_base: dict[str, Any], tmp_path: Path) -> Path:
    """Two layers with weights so large that answers are not all the same."""
    config = base_config(BaseSection(**small_base), tokenizer)
    config.initializer_range = 0.6
    torch.manual_seed(0)
    return saved(HymbaForCausalLM(config), tokenizer, tmp_path / "whole")


def saved(model: HymbaForCausalLM, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def choices(tmp_path: Path) -> EvalSection:
    """Sixteen invented problems, in which the likelihoods of four choices are compared."""
    archive = invented["write_archive"](tmp_path / "gpqa.zip", {"main": invented["table"](range(16))})
    return EvalSection(tasks=("gpqa",), gpqa=GPQASection(path=str(archive)))


@pytest.fixture
def generated(tmp_path: Path) -> EvalSection:
    """Four questions without shots, and answers of at most 6 tokens."""
    lines = (ROOT / "data" / "arithmetic" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = GSM8KSection(test_path=str(tmp_path / "test.jsonl"), num_fewshot=0)
    return EvalSection(batch_size=3, max_new_tokens=6, gsm8k=files)


def scored_apart(
    checkpoint: Path, section: EvalSection, tokenizer: Any, task: str, removals: list[Any]
) -> dict[Any, TaskResult]:
    """What `hymba-align eval` gives for the checkpoint and for copies of it whose scale of a branch is zero."""
    results = {}
    for number, removed in enumerate(removals):
        folder = checkpoint
        if removed is not None:
            model = load_model(checkpoint)
            nn.init.zeros_(getattr(model.model.layers[removed[0]].mamba, NORMS[removed[1]]).weight)
            folder = saved(model, tokenizer, checkpoint.with_name(f"zero-{number}"))
        results[removed] = evaluate(folder, section, checkpoint.with_name(f"out-{number}"))[task]
    return results


def assert_change(found: Measured, after: list[bool], before: list[bool]) -> None:
    """The mean difference of single problems in points, and the standard error of that mean."""
    each = [100 * (now - was) for now, was in zip(after, before, strict=True)]
    assert found.mean == pytest.approx(statistics.mean(each))
    assert found.stderr == pytest.approx(statistics.stdev(each) / math.sqrt(len(each)))


def test_scores_of_the_whole_model_and_of_every_removal_are_those_of_hymba_align_eval(
    checkpoint: Path, choices: EvalSection, tokenizer: Any
) -> None:
    apart = scored_apart(checkpoint, choices, tokenizer, "gpqa", REMOVALS)
    right = {removed: [one.correct["acc"] for one in result.samples] for removed, result in apart.items()}
    assert len({tuple(one) for one in right.values()}) == 4, "removals that change nothing would show nothing"

    found = measure_task_importance(load_model(checkpoint).eval(), tokenizer, choices, "gpqa")

    whole = apart[None].scores["acc"]
    assert whole.stderr is not None
    assert found.whole == Measured(100 * whole.value, 100 * whole.stderr)
    assert (found.metric, found.unit, found.lower_is_better, found.chance) == ("gpqa", "% correct", False, None)
    assert (found.n, found.documents, len(found.layers)) == (16, 16, 2)
    assert [layer.is_global for layer in found.layers] == [True, False]
    for removed in REMOVALS[1:]:
        removal = getattr(found.layers[removed[0]], removed[1])
        assert removal.score == 100 * apart[removed].scores["acc"].value
        assert_change(removal.change, right[removed], right[None])
    for layer in found.layers:
        assert_change(layer.difference, right[layer.layer, "ssm"], right[layer.layer, "attention"])


def test_every_removal_generates_all_its_answers_itself(
    checkpoint: Path, generated: EvalSection, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apart = scored_apart(checkpoint, generated, tokenizer, "gsm8k", [None, (1, "ssm")])  # the first and the last
    wanted = [[sample.response for sample in result.samples] for result in apart.values()]
    decode, found = answers.decode, []

    def listening(model: Any, prompts: Any, **settings: Any) -> Any:
        decoded = decode(model, prompts, **settings)
        found.append([tokenizer.decode(one.tokens, skip_special_tokens=True) for one in decoded])
        return decoded

    monkeypatch.setattr(answers, "decode", listening)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    model = load_model(checkpoint).eval()
    importance = measure_task_importance(model, tokenizer, generated, "gsm8k")
    assert [sorted(texts) for texts in (found[0], found[-1])] == [sorted(texts) for texts in wanted]
    assert len({tuple(texts) for texts in found}) == 5
    assert [len(texts) for texts in found] == [4] * 5
    assert scorings(model) == 5
    assert importance.whole == Measured(0.0, 0.0), "nobody knows the answers"
    assert list((tmp_path / "tmp").iterdir()) == [], "answers are gone"
    assert not any(module._forward_hooks for module in model.modules())


class Stopped:
    """Notes the key of each answer that is kept, and interrupts before the one of this number, from 1; 0 never does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.at = 0
        add = AnswerStore.add

        def noting(store: AnswerStore, key: str, record: dict[str, Any]) -> None:
            if len(self.keys) + 1 == self.at:
                raise KeyboardInterrupt
            self.keys.append(key)
            add(store, key, record)

        monkeypatch.setattr(AnswerStore, "add", noting)


def test_an_interrupted_inspection_goes_on_asks_nothing_twice_and_finds_the_same(
    checkpoint: Path,
    generated: EvalSection,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = measure_task_importance(load_model(checkpoint).eval(), tokenizer, generated, "gsm8k")
    stopped, out = Stopped(monkeypatch), tmp_path / "out"
    words = ["inspect", str(checkpoint), "--parts", "importance", "--data", "data/arithmetic/test.jsonl", "--documents"]
    words += ["2", "--tasks", "gsm8k", "batch_size=3", "max_new_tokens=6", "gsm8k.num_fewshot=0"]
    words += [f"gsm8k.test_path={generated.gsm8k.test_path}", "--output", str(out)]
    stopped.at = 11  # of 20 answers, the third of the third scoring
    assert main(words) == 130
    assert sorted(path.name for path in (out / KEPT).iterdir()) == [
        "gsm8k.0-attention.json", "gsm8k.answers-0.jsonl", "gsm8k.whole.json",
    ]  # fmt: skip
    told = "gsm8k: 5 scorings, of the whole model and without each branch of each layer"
    again = "; after an interruption the same command goes on where it stopped"
    assert f"{told}{again}\n" in capsys.readouterr().out

    stopped.at = 0
    assert main(words) == 0

    assert len(stopped.keys) == len(set(stopped.keys)) == 20
    assert read(out / "inspect.json").importance[1] == whole
    assert f"{told}, of which 2 are there from an interrupted inspection{again}\n" in capsys.readouterr().out
    assert not (out / KEPT).exists()


def test_nothing_is_used_that_is_of_another_removal_checkpoint_or_setting(
    checkpoint: Path, generated: EvalSection, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stopped, lines = load_model(checkpoint).eval(), Stopped(monkeypatch), list[str]()

    def measure(kept: str, most: int) -> tuple[Any, int]:
        """What is found, and how many answers were asked for."""
        stopped.keys.clear()
        section = generated.model_copy(update={"max_new_tokens": most})
        one = Kept(tmp_path / "kept", kept)
        return measure_task_importance(model, tokenizer, section, "gsm8k", kept=one, say=lines.append), len(
            stopped.keys
        )

    found, asked = measure("a checkpoint", 6)
    assert (measure("a checkpoint", 6), asked) == ((found, 0), 20)
    files = [tmp_path / "kept" / f"gsm8k.{name}.json" for name in ("0-ssm", "whole")]
    texts = [file.read_text() for file in files]
    for file, text in zip(files, reversed(texts), strict=True):
        file.write_text(text)
    lines.clear()
    assert measure("a checkpoint", 6) == (found, 8)
    assert lines[0] == (
        "gsm8k: 2 scorings of an interrupted inspection are made again: they are of another checkpoint, other settings or "
        "other data"
    )
    assert measure("another checkpoint", 6) == (found, 20)
    assert measure("another checkpoint", 5)[1] == 20
    (tmp_path / "kept" / "gsm8k.whole.json").write_text("{}")
    lines.clear()
    assert measure("another checkpoint", 5)[1] == 4
    assert lines[0] == (f"{files[1]} has the format 1 of another version of hymba-align, not 2; it is made again")


def graded(groups: tuple[str, ...], right: tuple[bool, ...], **scores: Score) -> TaskResult:
    """A result of these problems, each of a group."""
    pairs = enumerate(zip(groups, right, strict=True))
    samples = [Sample(str(number), "", "", "", {}, {group: one}, group=group) for number, (group, one) in pairs]
    return TaskResult(
        task="bfcl", checkpoint="", suite=None, n=3, total=3, limit=None, partial=False, scores=scores, settings={},
        generation={}, chat_template={}, first_prompt=None, seed=None, versions={}, hardware={}, processes=1,
        wall_s=0, new_tokens=0, tokens_per_second=None, samples=samples,
    )  # fmt: skip


def test_a_task_whose_headline_is_no_mean_of_problems_is_measured_by_its_first_score_that_is(
    small_model: HymbaForCausalLM, tokenizer: Any, generated: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities, verdicts = [], iter([(True, True, True), (True, True, False), *[(False, False, True)] * 9])

    def score(run: Any) -> TaskResult:
        identities.append(run.identity)
        right = next(verdicts)
        return graded(("simple",) * 3, right, overall=Score(0.9, None, 3), simple=Score(sum(right) / 3, None, 3))

    monkeypatch.setattr("hymba_align.eval.inputs.scorer", lambda task: score)

    found = measure_task_importance(small_model, tokenizer, generated, "bfcl")

    assert (found.metric, found.whole) == ("bfcl simple", Measured(100.0, None))
    assert_change(found.layers[0].attention.change, [True, True, False], [True] * 3)
    assert_change(found.layers[0].difference, [False, False, True], [True, True, False])
    assert len(set(identities)) == scorings(small_model), "an answer of one removal could pass for another's"


def test_a_score_over_some_of_the_problems_is_named_as_bfcl_s_first_category_is(
    small_model: HymbaForCausalLM, tokenizer: Any, generated: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = graded(("simple", "simple", "parallel"), (True, False, True), simple=Score(0.5, 0.5, 2))
    monkeypatch.setattr("hymba_align.eval.inputs.scorer", lambda task: lambda run: result)

    found = measure_task_importance(small_model, tokenizer, generated, "bfcl")

    assert (found.metric, found.n, found.whole) == ("bfcl simple", 2, Measured(50.0, 50.0))


def test_a_wrapped_model_answers_with_its_adapters(checkpoint: Path, choices: EvalSection, tokenizer: Any) -> None:
    few = choices.model_copy(update={"limit": 6})
    torch.manual_seed(2)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    wrapped = get_peft_model(load_model(checkpoint), lora).eval()
    found = measure_task_importance(wrapped, tokenizer, few, "gpqa")
    merged = measure_task_importance(wrapped.merge_and_unload().eval(), tokenizer, few, "gpqa")
    assert found == merged
    assert found != measure_task_importance(load_model(checkpoint).eval(), tokenizer, few, "gpqa")


def test_nothing_is_shown_and_problems_that_cannot_be_read_are_the_scorer_s_error(
    checkpoint: Path, generated: EvalSection, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(checkpoint).eval()
    capfd.readouterr()
    missing = generated.model_copy(update={"gsm8k": GSM8KSection(test_path="no.jsonl", num_fewshot=0)})
    with pytest.raises(ProblemsError) as caught:
        measure_task_importance(model, tokenizer, missing, "gsm8k")
    assert str(caught.value) == "no.jsonl: no such file; correct eval.gsm8k.test_path"
    short = generated.model_copy(update={"limit": 1, "max_new_tokens": 2})
    measure_task_importance(model, tokenizer, short, "gsm8k")
    assert capfd.readouterr() == ("", "")


def test_what_is_stopped_before_an_answer_leaves_no_folder(
    checkpoint: Path, generated: EvalSection, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Stopped(monkeypatch).at = 1

    with pytest.raises(KeyboardInterrupt):
        measure_task_importance(
            load_model(checkpoint).eval(), tokenizer, generated, "gsm8k", kept=Kept(tmp_path / "kept", "of this one")
        )

    assert not (tmp_path / "kept").exists()
