"""Batches whose loss or gradient is not finite: never applied, named, and left out on request."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hymba_align.data.template import load_tokenizer
from hymba_align.errors import HymbaAlignError
from hymba_align.recipe import Recipe
from hymba_align.run.metrics import read_metrics
from hymba_align.train import dpo as dpo_module
from hymba_align.train import sft as sft_module
from hymba_align.train.bad_batches import BadBatches
from hymba_align.train.guards import state_is_finite
from tests.forked import TwoProcesses

ROOT = Path(__file__).resolve().parents[2]
spoiling = runpy.run_path(str(Path(__file__).with_name("spoiling.py")))
TOKENIZER = ROOT / "data" / "arithmetic" / "tokenizer"
SOURCE = ROOT / "data" / "arithmetic" / "train.jsonl"
ROWS = 12
Spoil = Callable[..., tuple[list[list[int]], Callable[[], None]]]


@pytest.fixture
def recipe_of(make_recipe: Any, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over twelve rows, of which those in `marked` hold the mark; one row or pair a step unless told."""

    def make(marked: tuple[int, ...] = (), **given: Any) -> Recipe:
        path = tmp_path / f"rows-{'-'.join(map(str, marked))}.jsonl"
        spoiling["marked_data"](SOURCE, path, ROWS, marked)
        sections = {
            name: given.pop(name)
            for name in ("guard", "row_tokens", "streaming", "max_length", "lora")
            if name in given
        }
        settings = {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "weight_decay": 0.1, **given}
        recipe: Recipe = make_recipe(rows=ROWS, **settings)
        values = recipe.model_dump()
        values["data"] = {"path": str(path), "streaming": sections.get("streaming", False)}
        for stage in ("sft", "dpo"):
            values[stage]["guard"] = sections.get("guard", {})
            values[stage]["data"] = None
        values["dpo"]["row_tokens"] = sections.get("row_tokens")
        values["sft"]["max_length"] = sections.get("max_length", 96)  # one or two conversations a row
        values["lora"] = sections.get("lora")
        if sections.get("streaming"):
            values["dpo"] = None
        return Recipe.model_validate_json(json.dumps(values))

    return make


@pytest.fixture
def spoiled() -> Iterator[Spoil]:
    """Makes marked rows spoil training; gives a list that fills with the tokens of every micro-batch, and what ends it."""
    undo: list[Callable[[], None]] = []

    def begin(how: str = "loss") -> tuple[list[list[int]], Callable[[], None]]:
        seen: list[list[int]] = []
        undo.append(spoiling["spoil"](load_tokenizer(str(TOKENIZER)), how, seen))
        return seen, undo[-1]

    yield begin
    for one in reversed(undo):
        one()


def train(stage: str, recipe: Recipe, folder: Path, *callbacks: TrainerCallback) -> dict[str, float]:
    """Runs a stage, with further callbacks."""
    module: Any = sft_module if stage == "sft" else dpo_module
    whole = module.stage_callbacks
    module.stage_callbacks = lambda *given: [*whole(*given), *callbacks]
    try:
        summary: dict[str, float] = getattr(module, f"train_{stage}")(recipe, None, folder)
    finally:
        module.stage_callbacks = whole
    return summary


def stops(stage: str, recipe: Recipe, folder: Path, *callbacks: TrainerCallback) -> tuple[str, dict[str, Any]]:
    """The message and the record of a stage that stops."""
    with pytest.raises(HymbaAlignError) as raised:
        train(stage, recipe, folder, *callbacks)
    assert raised.value.exit_code == 1
    return str(raised.value), json.loads((folder / "bad_batch.json").read_text())


def final(folder: Path) -> dict[str, torch.Tensor]:
    (weights,) = (folder / "final").glob("*model.safetensors")  # of an adapter where one is trained
    return load_file(weights)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines_in(recipe: Recipe, ids: list[int]) -> set[str]:
    """Places of the data's rows whose question the tokens hold."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    assert recipe.data is not None
    text = "".join(tokenizer.decode(ids).split())
    rows = [json.loads(line) for line in Path(recipe.data.path).read_text().splitlines()]
    found = [number for number, row in enumerate(rows, start=1) if "".join(row["question"].split()) in text]
    return {f"{recipe.data.path}:{number}" for number in found}


# ---- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", {"per_device_train_batch_size": 2}),
        ("sft", {"packing": False, "per_device_train_batch_size": 2}),
        ("sft", {"streaming": True, "max_steps": 3, "max_length": 160}),
        ("dpo", {"per_device_train_batch_size": 2}),
        ("dpo", {"row_tokens": 210}),
    ],
    ids=["packed", "unpacked", "streamed", "pairs", "rows of pairs"],
)
def test_the_rows_that_are_named_are_those_whose_tokens_the_model_saw(
    recipe_of: Any, spoiled: Spoil, tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    seen, _ = spoiled()
    recipe = recipe_of((7,), gradient_accumulation_steps=2, save_strategy="no", **settings)
    message, record = stops(stage, recipe, tmp_path / "run")
    batches = record["stopped"]["batches"]
    assert len(batches) == 2
    for batch, ids in zip(batches, seen[-2:], strict=True):
        assert set(batch["rows"]) == lines_in(recipe, ids), batch["micro_batch"]
        assert batch["finite"] == (f"{recipe.data.path}:7" not in batch["rows"])
        assert (batch["loss"] == "nan") != batch["finite"]
    assert sum(batch["finite"] for batch in batches) == 1
    assert any(row in message for batch in batches if not batch["finite"] for row in batch["rows"])
    assert max(len(batch["rows"]) for batch in batches) > 1, "every micro-batch has one row, so order cannot be wrong"


# ---- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "how", "lora"),
    [
        *(("sft", "loss", None), ("sft", "gradient", None), ("dpo", "loss", None), ("dpo", "gradient", None)),
        ("sft", "gradient", {"r": 2, "dropout": 0.1}),
    ],
)
def test_a_stage_that_stopped_continues_from_the_weights_before_the_batch_to_those_of_one_that_never_met_it(
    recipe_of: Any, spoiled: Spoil, tmp_path: Path, stage: str, how: str, lora: dict[str, Any] | None
) -> None:
    recipe = recipe_of(
        (9,), lora=lora, train_sampling_strategy="sequential", save_strategy="no", gradient_accumulation_steps=2
    )
    train(stage, recipe, tmp_path / "whole")
    _, healed = spoiled(how)
    message, record = stops(stage, recipe, tmp_path / "run")
    stopped = record["stopped"]
    before = stopped["step"] - 1
    assert before >= 1, "the batch is the first, so nothing comes before it"
    assert stopped["checkpoint"] == f"checkpoint-{before}"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{before}"]
    assert not (tmp_path / "run" / "final").exists()
    what = "whose loss is nan in micro-batch" if how == "loss" else "whose gradient has the norm nan"
    assert message.startswith(f"{stage} stopped before step {before + 1}, {what}")
    assert message.endswith(
        f"the weights before it are in checkpoint-{before}; correct or remove the rows, or lower "
        f"{stage}.trainer.learning_rate, which is 0.01, or set {stage}.guard.on_nonfinite=skip to leave such batches out, "
        "and run again"
    )
    healed()
    train(stage, recipe, tmp_path / "run")
    assert same(final(tmp_path / "whole"), final(tmp_path / "run"))
    assert not (tmp_path / "run" / "bad_batch.json").exists(), "the stage is whole, so nothing is bad"
    losses = [
        {record["step"]: record["loss"] for record in read_metrics(tmp_path / run) if "loss" in record}
        for run in ("whole", "run")
    ]
    assert losses[0] == losses[1]


class SpoilWeights(TrainerCallback):
    """What memory that flips a bit does: a weight is NaN from the end of a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("nan")


def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_ones_are_named(
    recipe_of: Any, tmp_path: Path
) -> None:
    message, record = stops("sft", recipe_of(save_steps=2), tmp_path, SpoilWeights(3))
    assert (record["stopped"]["step"], record["stopped"]["checkpoint"]) == (4, "checkpoint-2")
    assert "the weights before it are in checkpoint-2" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(HymbaAlignError) as raised:
        train("sft", recipe_of(save_steps=2), tmp_path, SpoilWeights(4))
    assert str(raised.value) == (
        "sft stopped at step 4: weights or optimizer state are no longer finite, although every loss and gradient was, so "
        "nothing was saved; run again to continue from checkpoint-2, and if it happens again lower "
        "sft.trainer.learning_rate, which is 0.01, or suspect the machine's memory"
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_first_batch_that_is_not_finite_blames_what_training_starts_from(
    recipe_of: Any, spoiled: Spoil, tmp_path: Path
) -> None:
    spoiled()
    recipe = recipe_of((1,), train_sampling_strategy="sequential", packing=False)
    message, record = stops("sft", recipe, tmp_path)
    assert record == {
        "stopped": {
            "step": 1,
            "loss": "nan",
            "gradient_norm": "nan",
            "learning_rate": 0.0,
            "batches": [
                {"process": 0, "micro_batch": 0, "finite": False, "loss": "nan", "rows": [f"{recipe.data.path}:1"]}
            ],
            "checkpoint": None,
        },
        "skipped": [],
    }
    assert message == (
        "sft stopped before step 1, whose loss is nan in micro-batch 0 of process 0; "
        f"the batch has {recipe.data.path}:1; {tmp_path / 'bad_batch.json'} names all its rows; no update came before it, "
        "so the starting weights or these rows are at fault: check base, or the stage before, and the rows"
    )


def test_only_finite_weights_and_moments_are_a_good_state() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert state_is_finite(model, optimizer)
    moments = optimizer.state[model.weight]["exp_avg"]
    moments[0, 0] = float("inf")
    assert not state_is_finite(model, optimizer)
    moments[0, 0] = 0.0
    model.bias.data[1] = float("nan")
    assert not state_is_finite(model, optimizer)


# ---- leaving out -----------------------------------------------------------------------------------------------------


class WithoutGradients(TrainerCallback):
    """Takes a step's gradients away before the optimizer sees them."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            model.zero_grad()


class Interrupt(TrainerCallback):
    """What Ctrl-C does, right after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("sft", {"packing": False, "gradient_accumulation_steps": 2}), ("dpo", {"per_device_train_batch_size": 2})],
    ids=["sft", "dpo"],
)
def test_a_batch_that_is_left_out_changes_nothing_and_a_resumed_run_leaves_out_the_same(
    recipe_of: Any,
    spoiled: Spoil,
    tmp_path: Path,
    stage: str,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Pairs 5 and 6 are the third step of six.
    recipe = recipe_of(
        (6,), train_sampling_strategy="sequential", guard={"on_nonfinite": "skip"}, save_steps=2, **settings
    )
    train(stage, recipe, tmp_path / "expected", WithoutGradients(3))
    spoiled()
    train(stage, recipe, tmp_path / "whole")
    for number, interrupted in enumerate((3, 4)):  # before the checkpoint of step 4, and after
        with pytest.raises(KeyboardInterrupt):
            train(stage, recipe, tmp_path / f"parts-{number}", Interrupt(interrupted + number))
        train(stage, recipe, tmp_path / f"parts-{number}")
    runs = [tmp_path / name for name in ("whole", "parts-0", "parts-1")]
    for run in runs:
        assert same(final(tmp_path / "expected"), final(run)), run.name
        records = json.loads((run / "bad_batch.json").read_text())
        assert records["stopped"] is None
        assert [(record["step"], rows(record)) for record in records["skipped"]] == [
            (3, [f"{recipe.data.path}:5", f"{recipe.data.path}:6"])
        ]
        metrics = read_metrics(run)
        expected = {record["step"]: record for record in read_metrics(tmp_path / "expected") if "loss" in record}
        found = {record["step"]: record for record in metrics if "loss" in record}
        assert sorted(found) == [1, 2, 4, 5, 6], "what was left out has no loss"
        for step, record in found.items():
            for key in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy"):
                assert record[key] == expected[step][key], (step, key)
        (told,) = [record for record in metrics if "skipped_rows" in record]
        assert (told["step"], told["skipped_rows"]) == (3, [f"{recipe.data.path}:5", f"{recipe.data.path}:6"])
    micro = "micro-batch 1" if stage == "sft" else "micro-batch 0"
    assert (
        f"{stage}: left out the batch of step 3, whose loss is nan in {micro} of process 0; its 2 rows "
        f"({recipe.data.path}:5, {recipe.data.path}:6) are in bad_batch.json, 1 of at most 10 batches\n"
    ) in capsys.readouterr().err


def rows(record: dict[str, Any]) -> list[str]:
    return [row for batch in record["batches"] for row in batch["rows"]]


def test_no_more_batches_are_left_out_than_the_recipe_allows(recipe_of: Any, spoiled: Spoil, tmp_path: Path) -> None:
    spoiled()
    settings = {"train_sampling_strategy": "sequential", "packing": False, "save_strategy": "no"}
    recipe = recipe_of((3, 5, 8), guard={"on_nonfinite": "skip", "max_skipped": 2}, **settings)
    message, record = stops("sft", recipe, tmp_path)
    assert [skipped["step"] for skipped in record["skipped"]] == [3, 5]
    assert record["stopped"]["step"] == 8
    assert "after 2 batches were left out (sft.guard.max_skipped)" in message
    assert message.endswith("or set sft.guard.max_skipped higher to leave more batches out, and run again")
    # Started again, it resumes from step 7, knows of both, and stops at the same batch.
    again, second = stops("sft", recipe, tmp_path)
    assert (again, second) == (message, record)


def test_a_resumed_run_forgets_what_it_is_about_to_repeat(tmp_path: Path) -> None:
    path = tmp_path / "bad_batch.json"
    BadBatches(path, [{"step": 3}, {"step": 8}], {"step": 9}).write()
    known = BadBatches.until(path, 7)
    assert (known.skipped, known.stopped) == ([{"step": 3}], None)
    BadBatches.until(path, 0).write()
    assert not path.exists()
    path.write_text("[]")
    with pytest.raises(HymbaAlignError, match=r"bad_batch.json is not what training wrote .*; remove it"):
        BadBatches.until(path, 7)


# ---- several processes -----------------------------------------------------------------------------------------------

ENGINES = ("ddp", "zero2", "zero3", "zero3_offload")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.timeout(600)  # DeepSpeed compiles its shared-memory operations on first use
def test_all_processes_of_every_engine_leave_a_batch_out_and_stop_before_the_next(
    small_base: dict[str, Any], tmp_path: Path, deepspeed_file: Any
) -> None:
    """One process meets a bad batch in step 1, the other in step 3; both act, with weights that neither step touched."""
    jobs = write_jobs(small_base, tmp_path, deepspeed_file)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    TwoProcesses(Path(__file__).with_name("guard_worker.py"), tmp_path / "jobs.json", tmp_path).wait()
    data = str(tmp_path / "marked.jsonl")
    expected = load_file(tmp_path / "ddp" / "checkpoint-2" / "model.safetensors")
    for engine in ENGINES:
        folder = tmp_path / engine
        observed = json.loads((folder / "observed.json").read_text())
        assert observed["class"] == ("DistributedDataParallel" if engine == "ddp" else "DeepSpeedEngine")
        assert observed.get("stage") == {"ddp": None, "zero2": 2}.get(engine, 3)
        records = json.loads((folder / "bad_batch.json").read_text())
        assert [micro_batches(record) for record in (*records["skipped"], records["stopped"])] == [
            (1, [(0, 0, True, [1]), (0, 1, True, [3]), (1, 0, True, [2]), (1, 1, False, [4])]),
            (3, [(0, 0, False, [9]), (0, 1, True, [11]), (1, 0, True, [10]), (1, 1, True, [12])]),
        ]
        errors = {(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)}
        assert len(errors) == 1, "processes say different things"
        (error,) = errors
        assert "sft stopped before step 3, whose loss is nan in micro-batch 0 of process 0" in error
        assert f"the batch has {data}:9;" in error
        assert "the weights before it are in checkpoint-2;" in error
        (logged,) = [record for record in read_metrics(folder) if "loss" in record]
        (theirs,) = [record for record in read_metrics(tmp_path / "ddp") if "loss" in record]
        assert logged["step"] == 2
        assert logged["loss"] == pytest.approx(theirs["loss"], abs=1e-5, rel=0)  # float32
        assert logged["learning_rate"] == theirs["learning_rate"] > 0, "the schedule stood still"
        found = load_file(folder / "checkpoint-2" / "model.safetensors")
        for name, weight in expected.items():
            assert (found[name] - weight).abs().max() < 2e-6, (engine, name)


def micro_batches(record: dict[str, Any]) -> tuple[int, list[tuple[int, int, bool, list[int]]]]:
    """The step, and of each micro-batch its process, number, whether it is finite, and its rows' lines."""
    batches = [
        (one["process"], one["micro_batch"], one["finite"], [int(row.rsplit(":")[-1]) for row in one["rows"]])
        for one in record["batches"]
    ]
    return record["step"], sorted(batches)


def write_jobs(
    small_base: dict[str, Any], folder: Path, deepspeed_file: Callable[[Path, str | None], str | None]
) -> list[dict[str, Any]]:
    """Three steps of two micro-batches of one row in two processes; a row of the first and of the last one is marked."""
    from hymba_align.checkpoint import build_base
    from hymba_align.recipe import BaseSection

    spoiling["marked_data"](SOURCE, folder / "marked.jsonl", ROWS, (4, 9))
    tokenizer = load_tokenizer(str(TOKENIZER))
    model = build_base(BaseSection(**{**small_base, "tokenizer": str(TOKENIZER)}), tokenizer, 3)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    jobs = []
    for engine in ENGINES:
        trainer = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "packing": False,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
        }
        guard = {"on_nonfinite": "skip", "max_skipped": 1}
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "seed": 7,
                "base": {"model": str(folder / "start")},
                "data": {"path": str(folder / "marked.jsonl"), "workers": 1},
                "sft": {"max_length": 256, "guard": guard, "trainer": trainer},
            }
        )
        (folder / f"{engine}.yaml").write_text(recipe.dump_yaml())
        jobs.append(
            {
                "stage": "sft",
                "recipe": str(folder / f"{engine}.yaml"),
                "start": str(folder / "start"),
                "folder": str(folder / engine),
                "cache": str(folder / "cache"),
                "deepspeed": deepspeed_file(folder, None if engine == "ddp" else engine),
                "how": "loss",
            }
        )
    return jobs
