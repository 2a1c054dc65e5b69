"""Checkpoints appear whole or not at all; what is torn, changed or of unknown origin is named and passed over."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hymba_align.checkpoint import load_model
from hymba_align.errors import CheckpointError, HymbaAlignError
from hymba_align.files import write_json
from hymba_align.run.manifest import MANIFEST, check_whole, find_damage, read_manifest, seal
from hymba_align.train import dpo as dpo_module
from hymba_align.train import sft as sft_module
from hymba_align.train.dpo import train_dpo
from hymba_align.train.saving import (
    SAVING,
    checkpoints,
    discard,
    find_problem,
    last_good_checkpoint,
    remove_leftovers,
    rotate,
)
from hymba_align.train.sft import train_sft

SETTINGS = {"rows": 24, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_steps": 2, "warmup_steps": 0}


class Stop(Exception):
    """Ends a run after a step, before anything of it is saved."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains until a step is over, and leaves what a killed run leaves."""

    def run(recipe: Any, folder: Path, step: int, stage: str = "sft") -> None:
        module, train = (sft_module, train_sft) if stage == "sft" else (dpo_module, train_dpo)
        callbacks = module.stage_callbacks
        with monkeypatch.context() as patch:
            patch.setattr(module, "stage_callbacks", lambda *given: [*callbacks(*given), StopAt(step)])
            with pytest.raises(Stop):
                train(recipe, None, folder)

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trained stage of `stage` lies, so that it is trained once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def stage(kept: Path, tmp_path: Path, make_recipe: Any, cut: Any) -> Path:
    """A copy of a stage that was cut off after step 5, with checkpoint-2 and checkpoint-4."""
    if not (kept / "stage").exists():
        cut(make_recipe(**SETTINGS), kept / "stage", 5)
    shutil.copytree(kept / "stage", tmp_path / "stage")
    return tmp_path / "stage"


@pytest.fixture
def whole(kept: Path, make_recipe: Any) -> dict[str, torch.Tensor]:
    """The final weights of the same stage, trained without a stop."""
    if not (kept / "whole" / "final").exists():
        train_sft(make_recipe(**SETTINGS), None, kept / "whole")
    return load_file(kept / "whole" / "final" / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- what a checkpoint is --------------------------------------------------------------------------------------------


def test_a_checkpoint_has_whole_weights_state_by_parameter_name_and_a_manifest_and_no_pickle_that_needs_trust(
    stage: Path,
) -> None:
    checkpoint = stage / "checkpoint-4"
    names = {path.name for path in files_of(checkpoint)}
    assert {"model.safetensors", "optimizer.safetensors", "scheduler.pt", "rng_state.pth"} <= names
    assert {"trainer_state.json", MANIFEST, "config.json", "tokenizer.json"} <= names
    assert not names & {"training_args.bin", "optimizer.pt", "pytorch_model.bin"}
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert (manifest["step"], manifest["engine"], manifest["processes"]) == (4, "single", 1)
    assert manifest["files"].keys() == names - {MANIFEST}
    model = load_model(checkpoint)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = load_file(checkpoint / "optimizer.safetensors")
    assert state.keys() == {f"{key}:{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in shapes}
    for name, shape in shapes.items():
        assert state[f"exp_avg:{name}"].shape == shape
        assert state[f"step:{name}"].item() == 4
    assert not (stage / SAVING).exists()


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        seal(folder, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(folder)} == {0o640}


# ---- what is passed over ---------------------------------------------------------------------------------------------


def test_one_flipped_bit_or_a_lost_end_in_any_file_is_found_named_and_passed_over(
    stage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stage / "checkpoint-4"
    assert last_good_checkpoint(stage) == checkpoint
    assert capsys.readouterr().err == ""
    for path in files_of(checkpoint):
        content = path.read_bytes()
        for change in ("flip first", "flip middle", "flip last", "cut"):
            if change == "cut":
                path.write_bytes(content[:-1])
            else:
                flip(path, {"first": 0, "middle": len(content) * 4, "last": len(content) * 8 - 1}[change.split()[1]])
            assert last_good_checkpoint(stage) == stage / "checkpoint-2", (path, change)
            told = capsys.readouterr().err
            assert told.startswith(f"{checkpoint} is passed over: {path.name} "), told
            path.write_bytes(content)
    assert last_good_checkpoint(stage) == checkpoint


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    seal(folder, {"step": 12, "inputs": "0a", "engine": "zero3", "processes": 2})
    for byte in range(len((folder / MANIFEST).read_bytes())):
        bit = byte * 8 + byte % 8
        flip(folder / MANIFEST, bit)
        assert find_damage(folder) == f"{MANIFEST} is damaged", bit
        flip(folder / MANIFEST, bit)
    assert find_damage(folder) is None


def _remove(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()


def _add(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"weights of somebody else")


def _empty_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("")


def _no_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def _link(checkpoint: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint.parent / "elsewhere.json")
    (checkpoint / "config.json").symlink_to(checkpoint.parent / "elsewhere.json")


def _of_another_run(checkpoint: Path) -> None:
    write_json(checkpoint.parent / MANIFEST, {"stage": "sft", "started": "of this run"})


def _of_another_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.parent / "checkpoint-2", checkpoint)


def _model_alone(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, {"step": 4, "inputs": None})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_remove, "optimizer.safetensors is missing"),
        (_add, "pytorch_model.bin is not in its manifest.json"),
        (_empty_manifest, "manifest.json is damaged"),
        (_no_manifest, "manifest.json is missing, so nobody knows what wrote the folder"),
        (_link, "config.json is a link to something else"),
        (_of_another_run, "its manifest belongs to a run with other inputs"),
        (_of_another_step, "its manifest is of step 2"),
        (_model_alone, "it has no optimizer.safetensors (trainer.save_only_model)"),
    ],
)
def test_what_this_run_did_not_save_is_passed_over_with_the_reason(
    stage: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], why: str
) -> None:
    change(stage / "checkpoint-4")
    expected = None if change is _of_another_run else stage / "checkpoint-2"
    assert last_good_checkpoint(stage) == expected
    assert f"{stage / 'checkpoint-4'} is passed over: {why}\n" in capsys.readouterr().err


def test_checkpoints_of_a_run_with_the_same_inputs_are_its_own(stage: Path) -> None:
    assert find_problem(stage / "checkpoint-4", None) is None
    assert find_problem(stage / "checkpoint-4", "others") == "its manifest belongs to a run with other inputs"


class Attack:
    """A pickle that creates a file when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("file", ["scheduler.pt", "rng_state.pth", "optimizer.pt", "training_args.bin"])
def test_a_pickle_that_would_run_code_is_never_run_even_under_a_manifest_that_names_it(
    stage: Path, tmp_path: Path, make_recipe: Any, file: str, whole: dict[str, torch.Tensor]
) -> None:
    proof, checkpoint = tmp_path / "proof", stage / "checkpoint-4"
    torch.save(Attack(proof), checkpoint / file)
    with (checkpoint / file).open("rb") as planted:
        torch.load(planted, weights_only=False)
    assert proof.exists(), "the attack itself does not work"
    proof.unlink()
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, {key: value for key, value in manifest.items() if key != "files"})
    assert last_good_checkpoint(stage) == checkpoint, "the forged manifest is not even believed"
    if file in ("scheduler.pt", "rng_state.pth"):
        with pytest.raises(CheckpointError, match=rf"checkpoint-4/{file} holds more than numbers .* remove "):
            train_sft(make_recipe(**SETTINGS), None, stage)
    else:
        train_sft(make_recipe(**SETTINGS), None, stage)
        assert same(load_file(stage / "final" / "model.safetensors"), whole)
    assert not proof.exists(), f"{file} was run"


# ---- what a run makes of it ------------------------------------------------------------------------------------------


def test_a_stage_resumes_behind_a_torn_checkpoint_and_what_an_interrupted_save_left(
    stage: Path, make_recipe: Any, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = stage / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (stage / SAVING / "checkpoint-6").mkdir(parents=True)
    (stage / SAVING / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    train_sft(make_recipe(**SETTINGS), None, stage)
    told = capsys.readouterr()
    assert "checkpoint-4 is passed over: model.safetensors has 1,000 bytes where its manifest.json says " in told.err
    assert "resuming from checkpoint-2\n" in told.out
    assert same(load_file(stage / "final" / "model.safetensors"), whole)
    assert not (stage / SAVING).exists()


def test_a_stage_that_goes_on_tells_of_steps_that_changed_and_not_of_shares_that_come_to_the_same(
    stage: Path, make_recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {**SETTINGS, "save_steps": 0.3, "logging_steps": 3}  # of six steps, two
    compares = logging.getLogger("transformers.trainer_utils")
    compares.addHandler(caplog.handler)
    try:
        train_sft(make_recipe(**asked), None, stage)
    finally:
        compares.removeHandler(caplog.handler)
    assert {*caplog.messages} == {
        "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint "
        "directory: \n\tlogging_steps: 3 (from args) != 1.0 (from trainer_state.json)"
    }


def test_a_stage_whose_checkpoints_are_all_bad_says_so_and_starts_afresh(
    stage: Path, make_recipe: Any, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in checkpoints(stage):
        flip(checkpoint / "optimizer.safetensors", 4000)
    train_sft(make_recipe(**SETTINGS), None, stage)
    told = capsys.readouterr()
    assert told.err.count("is passed over: optimizer.safetensors has other contents than its manifest.json says") == 2
    assert f"no checkpoint in {stage} can be used, so training starts afresh\n" in told.err
    assert "resuming" not in told.out
    assert same(load_file(stage / "final" / "model.safetensors"), whole)


def test_a_save_that_fails_is_an_error_and_leaves_the_checkpoints_before_it(
    stage: Path, make_recipe: Any, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hymba_align.train.saving.seal", full)
        with pytest.raises(HymbaAlignError, match=r"the disk is full|could not be written"):
            train_sft(make_recipe(**SETTINGS), None, stage)
    assert [path.name for path in checkpoints(stage)] == ["checkpoint-4", "checkpoint-2"]
    assert not (stage / SAVING).exists()
    train_sft(make_recipe(**SETTINGS), None, stage)
    assert same(load_file(stage / "final" / "model.safetensors"), whole)


# ---- rotation --------------------------------------------------------------------------------------------------------


def fake(stage_dir: Path, step: int, *, good: bool = True) -> Path:
    folder = stage_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.safetensors").write_bytes(b"state")
    seal(folder, {"step": step, "inputs": None})
    if not good:
        flip(folder / "optimizer.safetensors", 3)
    return folder


def names(stage_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(stage_dir)]


def test_rotation_keeps_the_newest_good_one_and_not_a_torn_one_of_a_later_step(tmp_path: Path) -> None:
    fake(tmp_path, 10)
    fake(tmp_path, 20, good=False)
    newest = fake(tmp_path, 12)
    rotate(tmp_path, newest, 1, None)
    assert names(tmp_path) == ["checkpoint-12"]
    assert last_good_checkpoint(tmp_path) == newest


def test_rotation_keeps_the_best_model_and_as_many_as_asked(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        fake(tmp_path, step)
    newest = fake(tmp_path, 8)
    rotate(tmp_path, newest, None, None)
    assert len(names(tmp_path)) == 4
    rotate(tmp_path, newest, 3, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-6", "checkpoint-2"]
    rotate(tmp_path, newest, 1, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-2"]


def test_a_removed_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake(tmp_path, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed just before
    discard(folder)
    assert names(tmp_path) == []
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_kept_checkpoint_outlives_a_torn_newer_one(
    stage: Path, make_recipe: Any, whole: dict[str, torch.Tensor]
) -> None:
    flip(stage / "checkpoint-4" / "model.safetensors", 90000)
    train_sft(make_recipe(**SETTINGS, save_total_limit=1), None, stage)
    assert len(names(stage)) == 1
    assert last_good_checkpoint(stage) is not None
    assert same(load_file(stage / "final" / "model.safetensors"), whole)


# ---- final -----------------------------------------------------------------------------------------------------------


def test_final_loads_has_a_manifest_and_is_refused_once_it_changed(stage: Path, make_recipe: Any) -> None:
    train_sft(make_recipe(**SETTINGS), None, stage)
    final = stage / "final"
    manifest = read_manifest(final)
    assert manifest is not None
    assert (
        manifest["step"] == json.loads((final.parent / names(stage)[0] / "trainer_state.json").read_text())["max_steps"]
    )
    assert not (final / "training_args.bin").exists()
    check_whole(final, "train again")
    saved = load_file(stage / names(stage)[0] / "model.safetensors")
    assert same({name: weight.data for name, weight in load_model(final).state_dict().items() if name in saved}, saved)
    flip(final / "model.safetensors", 70000)
    with pytest.raises(
        CheckpointError,
        match=rf"^{final} is not what was saved there: model.safetensors has other contents than its manifest.json says "
        r"\(SHA-256\); remove that folder, and train again$",
    ):
        check_whole(final, "train again")
    before = (final / "model.safetensors").read_bytes()
    train_sft(make_recipe(**SETTINGS), None, stage)  # the same command: written again from the last checkpoint
    assert find_damage(final) is None
    assert (final / "model.safetensors").read_bytes() != before


def test_the_best_model_is_known_by_its_checkpoint_and_becomes_final(make_recipe: Any, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the first one stays the best
    recipe = make_recipe(**SETTINGS, **best)
    assert recipe.data is not None
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_fraction": 0.2})})
    train_sft(recipe, None, tmp_path)
    state = json.loads((checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert names(tmp_path)[-1] == "checkpoint-2"
    weights = load_file(tmp_path / "final" / "model.safetensors")
    assert same(weights, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


# ---- other data, other optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_optimizers_with_less_state_or_other_state_resume_to_the_same_weights(
    make_recipe: Any, tmp_path: Path, cut: Any, optim: str
) -> None:
    recipe = make_recipe(**SETTINGS, optim=optim)
    train_sft(recipe, None, tmp_path / "whole")
    cut(recipe, tmp_path / "cut", 5)
    with safe_open(tmp_path / "cut" / "checkpoint-4" / "optimizer.safetensors", framework="pt") as file:
        keys = {name.split(":")[0] for name in file.keys()}  # noqa: SIM118  # no dictionary
        values = json.loads(file.metadata()["values"])
    assert keys == (set() if optim == "sgd" else {"exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_row", "RMS"})
    assert {key.split(":")[0] for key in values} == (set() if optim == "sgd" else {"step"})
    train_sft(recipe, None, tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("cut", "whole"))
    assert same(ours, theirs)


def test_a_stream_resumes_to_the_same_weights(make_recipe: Any, tmp_path: Path, cut: Any) -> None:
    recipe = make_recipe(**{**SETTINGS, "rows": 100, "max_steps": 7})
    assert recipe.data is not None
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": True})})
    train_sft(recipe, None, tmp_path / "whole")
    cut(recipe, tmp_path / "cut", 5)
    train_sft(recipe, None, tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("cut", "whole"))
    assert same(ours, theirs)


def test_dpo_resumes_with_the_references_of_its_start_though_their_cache_is_gone(
    make_recipe: Any, tmp_path: Path, cut: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(**{**SETTINGS, "rows": 7})
    train_dpo(recipe, None, tmp_path / "whole")
    cut(recipe, tmp_path / "cut", 5, "dpo")
    shutil.rmtree(tmp_path / "datasets")
    capsys.readouterr()
    train_dpo(recipe, None, tmp_path / "cut")
    assert "reference log-probabilities: computed 7 pairs" in capsys.readouterr().out
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("cut", "whole"))
    assert same(ours, theirs)
