"""Loss spikes and collapsing rewards: told, or a stop; quiet on curves of healthy runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_align.errors import HymbaAlignError
from hymba_align.recipe import DPOGuardSection, GuardSection, Recipe, TrainingStage
from hymba_align.run.metrics import read_metrics
from hymba_align.train import dpo as dpo_module
from hymba_align.train import sft as sft_module
from hymba_align.train.spikes import SpikeWatch

# What recipes/tiny/arithmetic.yaml logged every 5 steps in SFT, and every 5 of DPO at a higher rate (loss, rewards/chosen).
DEMO_SFT = [
    *(6.173, 5.322, 4.426, 3.215, 2.157, 1.572, 1.226, 1.12, 1.009, 0.914, 0.871, 0.76, 0.678, 0.622, 0.562, 0.521),
    *(0.474, 0.486, 0.485, 0.453, 0.456, 0.44, 0.412, 0.413, 0.404, 0.41, 0.435, 0.406, 0.411, 0.352, 0.376, 0.364),
    *(0.373, 0.33, 0.339, 0.289, 0.331, 0.312, 0.311, 0.284, 0.285, 0.29, 0.283, 0.274, 0.263, 0.277, 0.247, 0.247),
    *(0.25, 0.234, 0.227, 0.225, 0.216, 0.23, 0.209, 0.217, 0.223, 0.203, 0.179, 0.188, 0.179, 0.175, 0.17, 0.158),
    *(0.16, 0.151, 0.148, 0.149, 0.138, 0.144, 0.147, 0.13, 0.134, 0.135, 0.129, 0.122, 0.122, 0.124, 0.117, 0.104),
    *(0.111, 0.12, 0.115, 0.113, 0.113, 0.112, 0.117, 0.125),
]
DEMO_DPO = [
    *((0.6888, 0.0), (0.6681, 0.0002), (0.6204, 0.0011), (0.6202, -0.0015), (0.5637, -0.0008), (0.579, -0.0031)),
    *((0.5959, -0.0035), (0.5518, -0.0052), (0.5608, -0.0291), (0.5139, 0.0005), (0.5908, -0.022), (0.5928, -0.0203)),
]


class Curve:
    """A watch that is fed log events, five steps apart."""

    def __init__(self, folder: Path, section: GuardSection, stage: TrainingStage = "sft") -> None:
        self.folder, self.step = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, learning_rate=3e-6, report_to="none")
        self.watch = SpikeWatch(section, stage, folder)

    def log(self, loss: float, chosen: float | None = None) -> None:
        self.step += 5
        logs = {"loss": loss, **({"rewards/chosen": chosen} if chosen is not None else {})}
        state = TrainerState(global_step=self.step)
        self.watch.on_log(self.arguments, state, TrainerControl(), logs=logs)

    def told(self) -> list[tuple[int, str]]:
        return [(record["step"], record["warning"]) for record in read_metrics(self.folder)]


def test_the_demos_own_curves_are_quiet(tmp_path: Path) -> None:
    sft = Curve(tmp_path / "sft", GuardSection(on_spike="stop"))
    for loss in DEMO_SFT:
        sft.log(loss)
    dpo = Curve(tmp_path / "dpo", DPOGuardSection(on_spike="stop"), "dpo")
    for loss, chosen in DEMO_DPO:
        dpo.log(loss, chosen)


@pytest.mark.parametrize("seed", range(8))
def test_noise_of_small_batches_and_single_outliers_are_quiet(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    curve = Curve(tmp_path, GuardSection(on_spike="stop"))
    for event in range(400):
        outlier = 3.0 if event % 29 == 28 else 1.0
        curve.log(float(outlier * (0.5 + 1.5 * np.exp(-event / 80)) * rng.lognormal(0, 0.15)))


def test_a_spike_is_told_once_on_the_terminal_and_in_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = Curve(tmp_path / "run", GuardSection())
    for loss in [*DEMO_SFT, 2.5, 2.6, 2.4, *([2.5] * 15)]:
        curve.log(loss)
    # The median of the last 20 is 0.122, and a twentieth of it the least noise; with six of those it is 0.1586.
    told = (
        "sft: the loss spiked, at 2.4 or more in the last 3 log events up to step 455, above 0.1586; lower "
        "sft.trainer.learning_rate, which is 3e-06, or raise warmup_steps"
    )
    ((step, warning),) = curve.told()
    assert step == 455
    assert warning == told
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{warning}; sft.guard.on_spike=stop would stop here"]


@pytest.mark.parametrize("at", [30, 50, 80])
@pytest.mark.parametrize("height", [2.0, 10.0])
def test_a_loss_that_doubles_for_three_log_events_is_a_spike_once_the_first_fall_is_over(
    tmp_path: Path, at: int, height: float
) -> None:
    curve = Curve(tmp_path, GuardSection(on_spike="stop"))
    for loss in DEMO_SFT[:at]:
        curve.log(loss)
    level = height * DEMO_SFT[at - 1]
    curve.log(level)
    curve.log(level)
    with pytest.raises(
        HymbaAlignError, match=rf"sft: the loss spiked, .* up to step {5 * (at + 3)}, .*on_spike=warn goes on"
    ):
        curve.log(level)


def test_chosen_answers_that_lose_probability_are_told_although_the_margin_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = Curve(tmp_path, DPOGuardSection(), "dpo")
    for loss, chosen in DEMO_DPO:
        curve.log(loss, chosen)
    for event in range(40):  # the loss falls, because rejected answers lose even more
        curve.log(0.55 * 0.95**event, -0.2 * event)
    (first,) = [told for _, told in curve.told()]
    assert first.startswith(
        "dpo: rewards/chosen collapsed to -3.4 at step 150, 3.4 below its highest of the last 20 log events, more than "
        "dpo.guard.max_chosen_fall, which is 3: chosen answers lose probability too; lower dpo.trainer.learning_rate"
    )
    assert first.endswith("which is 3e-06, or raise warmup_steps, or raise dpo.trainer.beta")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rewards_below_the_bound_stop_when_asked(tmp_path: Path) -> None:
    curve = Curve(tmp_path, DPOGuardSection(on_spike="stop", min_chosen_reward=-1.0), "dpo")
    for event in range(51):
        curve.log(0.5, -0.02 * event)
    curve.log(0.5, -1.02)
    curve.log(0.5, -1.04)
    with pytest.raises(HymbaAlignError) as raised:
        curve.log(0.5, -1.06)
    assert str(raised.value) == (
        "dpo: rewards/chosen collapsed to -1.06 at step 270, below dpo.guard.min_chosen_reward, which is -1: chosen answers "
        "lose probability too; lower dpo.trainer.learning_rate, which is 3e-06, or raise warmup_steps, or raise "
        "dpo.trainer.beta; dpo.guard.on_spike=warn goes on"
    )


def test_a_resumed_run_knows_the_curve_before_it_and_ignored_spikes_are_ignored(tmp_path: Path) -> None:
    history = [{"step": 5 * event, "loss": loss} for event, loss in enumerate(DEMO_SFT, start=1)]
    for on_spike in ("stop", "ignore"):
        curve = Curve(tmp_path / on_spike, GuardSection.model_validate({"on_spike": on_spike}))
        state = TrainerState(global_step=440, log_history=history)
        curve.watch.on_train_begin(curve.arguments, state, TrainerControl())
        curve.step = 440
        curve.log(3.0)
        curve.log(3.0)
        if on_spike == "stop":
            with pytest.raises(HymbaAlignError, match="the loss spiked"):
                curve.log(3.0)
        else:
            curve.log(3.0)
            assert not curve.told()


# ---- a real stage ----------------------------------------------------------------------------------------------------


class Jump(TrainerCallback):
    """A learning rate far too high for one step: the loss is finite and far above what it was, and stays there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for group in optimizer.param_groups:
                group["lr"] = 10.0  # a step later the schedule sets it back


@pytest.mark.parametrize("on_spike", ["warn", "stop"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_whose_weights_jump_is_told_and_goes_on_or_stops_when_asked(
    make_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    on_spike: str,
) -> None:
    module: Any = sft_module if stage == "sft" else dpo_module
    settings = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_steps": 4, "max_steps": 12}
    values = make_recipe(rows=30, **settings).model_dump()
    for name in ("sft", "dpo"):
        values[name]["guard"] = {"on_spike": on_spike, "spike_window": 8, "spike_logs": 2}
    whole = module.stage_callbacks
    recipe = Recipe.model_validate_json(json.dumps(values))
    train = getattr(module, f"train_{stage}")

    if on_spike == "stop":  # without the jump it is quiet
        train(recipe, None, tmp_path / "quiet")
        assert not [record for record in read_metrics(tmp_path / "quiet") if "warning" in record]

    monkeypatch.setattr(module, "stage_callbacks", lambda *given: [*whole(*given), Jump(8)])
    folder = tmp_path / "run"
    what = "the loss spiked, at " if stage == "sft" else "rewards/chosen collapsed to "
    if on_spike == "stop":
        with pytest.raises(HymbaAlignError) as raised:
            train(recipe, None, folder)
        assert raised.value.exit_code == 1
        assert what in str(raised.value)
        assert str(raised.value).endswith(f"{stage}.guard.on_spike=warn goes on")
        assert not (folder / "final").exists()
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    else:
        train(recipe, None, folder)
        assert (folder / "final").exists()
        assert f"{stage}.guard.on_spike=stop would stop here" in capsys.readouterr().err
    told = [record for record in read_metrics(folder) if "warning" in record]
    assert told[0]["step"] == 10, "the jump is in the weights of step 9, and two log events in a row make it count"
    assert any(what in record["warning"] for record in told)
