"""Checkpoints that fit any engine and any number of processes, and appear whole or not at all.

    checkpoint-N/  model.safetensors  config.json  tokenizer files
                   optimizer.safetensors   state by parameter name (optimizer_state.py)
                   scheduler.pt  rng_state*.pth  trainer_state.json
                   manifest.json           size and SHA-256 of every file, step, inputs of the stage, engine, processes
    .saving/       what is being written; whatever a crash left of it is removed at the next start

No pickle is read that could run code: safetensors, or torch's `weights_only`; and nothing without its manifest.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn

from hymba_align.errors import HymbaAlignError, WeightsError
from hymba_align.files import read_json, sync_folder
from hymba_align.run.manifest import MANIFEST, check_whole, find_damage, read_manifest, seal
from hymba_align.terminal import print_words
from hymba_align.train.engine import running_engine
from hymba_align.train.optimizer_state import OPTIMIZER_FILE, gather_state, load_state, load_weights

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

SAVING = ".saving"
SCHEDULER_FILE = "scheduler.pt"
STATE_FILE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# ---- checkpoints on disk ---------------------------------------------------------------------------------------------


def checkpoints(stage_dir: Path) -> list[Path]:
    """The folders checkpoint-N, newest first."""
    found = [path for path in stage_dir.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a folder `checkpoint-N`."""
    return int(checkpoint.name.split("-")[1])


def last_good_checkpoint(stage_dir: Path) -> Path | None:
    """The newest checkpoint that this run wrote and that is whole; those passed over are named on stderr with why."""
    for path in checkpoints(stage_dir):
        problem = find_problem(path, stage_inputs(stage_dir))
        if problem is None:
            return path
        print_words(f"{path} is passed over: {problem}", stderr=True)
    return None


def find_problem(checkpoint: Path, inputs: str | None) -> str | None:
    """Why a stage with these inputs cannot resume from a checkpoint; None where it can."""
    damage = find_damage(checkpoint)
    if damage is not None:
        return damage
    manifest = read_manifest(checkpoint) or {}
    if manifest.get("inputs") != inputs:
        return "its manifest belongs to a run with other inputs"
    if manifest.get("step") != step_of(checkpoint):
        return f"its manifest is of step {manifest.get('step')}"
    if OPTIMIZER_FILE not in manifest["files"]:
        return f"it has no {OPTIMIZER_FILE} (trainer.save_only_model)"
    best = best_of(checkpoint)
    if best is not None and best != checkpoint and find_damage(best) is not None:
        return f"the best model until then is in {best.name}, which is gone or damaged"
    return None


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint beside it that had the best model when it was saved, by name: folders may move; None where none is."""
    try:
        best = read_json(checkpoint / STATE_FILE).get("best_model_checkpoint")
    except (OSError, ValueError):
        return None
    return checkpoint.parent / Path(best).name if best is not None else None


def stage_inputs(stage_dir: Path) -> str | None:
    """The fingerprint of what entered the stage, from the stage's own manifest; None where training has none."""
    try:
        return read_json(stage_dir / MANIFEST).get("started")
    except (OSError, ValueError):
        return None


def remove_leftovers(stage_dir: Path) -> None:
    """Removes what an interrupted save left; for the main process, before training."""
    shutil.rmtree(stage_dir / SAVING, ignore_errors=True)
    for path in stage_dir.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def rotate(stage_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Removes checkpoints until `limit` are left, but never `newest`, which was verified, nor the best model's.

    Those of later steps go first: training started before them, because they could not be used.
    """
    if not limit or limit < 1:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for path in checkpoints(stage_dir) if path.resolve() not in kept]
    for path in sorted(others, key=lambda path: (step_of(path) < step_of(newest), step_of(path))):
        if len(others) + len(kept) <= limit:
            break
        discard(path)
        others.remove(path)


def discard(folder: Path) -> None:
    """Removes a folder so that no half of it is ever found under its name."""
    aside = folder.parent / SAVING
    aside.mkdir(exist_ok=True)
    folder.rename(aside / folder.name)
    shutil.rmtree(aside, ignore_errors=True)


# ---- what a trainer adds ---------------------------------------------------------------------------------------------


class SavesState(Base):
    """Mixin for a trainer of transformers: how it writes checkpoints and what it resumes from.

    Every process takes part in saving; what goes wrong on one becomes an error on all.
    """

    _saving_in: Path | None = None
    _failure: Exception | None = None

    # ---- writing

    def save_whole(self, folder: Path, write: Callable[[Path], object], details: dict[str, Any]) -> None:
        """Writes a folder under a temporary name with all processes; the main one seals, checks and renames it.

        Args:
            write: gets the folder that holds the result's; writes `<that>/<folder.name>`.
        Raises: HymbaAlignError on every process, when any of them could not write.
        """
        inside = folder.parent / SAVING
        self._failure = None
        self._on_main(lambda: shutil.rmtree(inside, ignore_errors=True))
        self._saving_in = inside
        try:
            write(inside)
        except Exception as error:  # the other processes wait for this one below
            self._failure = self._failure or error
        finally:
            self._saving_in = None
        self._agree(folder)
        self._on_main(lambda: _put_in_place(inside / folder.name, folder, details))
        self._on_main(lambda: shutil.rmtree(inside, ignore_errors=True))
        self._agree(folder)

    def _on_main(self, act: Callable[[], object]) -> None:
        if self.is_main:
            try:
                act()
            except Exception as error:  # raised on all processes by `_agree`
                self._failure = self._failure or error
        self.accelerator.wait_for_everyone()

    def _agree(self, folder: Path) -> None:
        """Raises on every process what went wrong on any."""
        own = f"{type(self._failure).__name__}: {self._failure}" if self._failure is not None else None
        told = [failure for failure in gather_object([own]) if failure is not None]
        if told:
            if self.is_main:
                shutil.rmtree(folder.parent / SAVING, ignore_errors=True)
            raise cannot_save(folder, told[0]) from self._failure

    @property
    def _stage_dir(self) -> Path:
        assert self.args.output_dir is not None, "stages write into a folder"
        return Path(self.args.output_dir)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers puts a checkpoint: the temporary folder while one is written."""
        if self._saving_in is not None:
            return str(self._saving_in)
        folder: str = super()._get_output_dir(trial)
        return folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Transformers' checkpoint, whole or not at all, and the removal of old ones."""
        stage_dir = self._stage_dir
        folder = stage_dir / f"checkpoint-{self.state.global_step}"

        def write(inside: Path) -> None:
            super(SavesState, self)._save_checkpoint(model, trial)
            self._name_best_model(inside, stage_dir, folder.name)

        self.save_whole(folder, write, {"step": self.state.global_step, **self.description()})
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        self._on_main(lambda: rotate(stage_dir, folder, limit, best))
        self._agree(folder)

    def description(self) -> dict[str, Any]:
        """What manifests say of this run."""
        return {
            "inputs": stage_inputs(self._stage_dir),
            "engine": running_engine(self),
            "processes": self.accelerator.num_processes,
        }

    def _name_best_model(self, inside: Path, stage_dir: Path, name: str) -> None:
        """Gives the best model's checkpoint the name that it is about to have."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == inside:
            self.state.best_model_checkpoint = str(stage_dir / Path(best).name)
            if self.is_main:
                self.state.save_to_json(str(inside / name / STATE_FILE))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model's files, without training_args.bin: a pickle, with paths of this machine."""
        if state_dict is not None:
            state_dict = self._without_ties(state_dict)
        if self._saving_in is None:
            self._write_model(output_dir, state_dict)
            return
        assert output_dir is not None, "folders are saved by name"
        try:
            self._write_model(output_dir, state_dict)
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)
        except Exception as error:  # the others go on to put the optimizer's state together, with this process
            self._failure = self._failure or error

    def _write_model(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Transformers' files of a model and its tokenizer."""
        super()._save(output_dir, state_dict)

    def _without_ties(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The weights once each. Accelerate copies them for ZeRO-1 and 2, so that nobody sees which ones are tied."""
        model = self._unwrapped()
        once = {name for name, _ in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
        return {name: weight for name, weight in state_dict.items() if name not in tied}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's whole state by parameter name, and the scheduler's."""
        state = gather_state(self._unwrapped(), self.optimizer, keep=self.is_main)
        if self.is_main and self._failure is None:
            state.save(Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self._scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    # ---- reading

    def _init_training_state(self, *given: Any, **named: Any) -> Any:
        """Transformers', with the best checkpoint where the folder is now."""
        begun = super()._init_training_state(*given, **named)
        resumed = self._stage_dir / f"checkpoint-{self.state.global_step}"
        best = best_of(resumed) if self.state.global_step else None
        if best is not None:
            self.state.best_model_checkpoint = str(best)
        return begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: weights are loaded once every engine has its parts (`_prepare_for_training`)."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Transformers' preparation from nothing, and then the checkpoint's weights, optimizer and scheduler."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            load_weights(self._unwrapped(), self.optimizer, checkpoint)
            load_state(self._unwrapped(), self.optimizer, checkpoint)
            self._load_scheduler(checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_scheduler(self, checkpoint: Path) -> None:
        """The scheduler's place, and the learning rate that it had given; all else of a group is the recipe's."""
        with _numbers_only(checkpoint / SCHEDULER_FILE):
            self._scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_FILE, weights_only=True))
        assert self.optimizer is not None, "it was prepared"
        for group, rate in zip(self.optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    @property
    def _scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        assert self.lr_scheduler is not None, "it was prepared"
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Nothing; see `_prepare_for_training`."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This process's random numbers; those of the first where another number of processes wrote the checkpoint.

        All start from one seed, so it has no other claim on them than that; and it is the same at every resume.
        """
        if checkpoint is None:
            return
        processes = self.args.world_size
        written_by = (read_manifest(Path(checkpoint)) or {}).get("processes")
        own = "rng_state.pth" if processes == 1 else f"rng_state_{self.args.process_index}.pth"
        if written_by == processes:
            with _numbers_only(Path(checkpoint) / own):
                super()._load_rng_state(checkpoint)
            return
        first = Path(checkpoint) / ("rng_state.pth" if written_by == 1 else "rng_state_0.pth")
        with tempfile.TemporaryDirectory() as folder, _numbers_only(first):
            shutil.copyfile(first, Path(folder) / own)
            super()._load_rng_state(folder)

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint."""
        assert self.state.best_model_checkpoint is not None, "transformers asks only when there is one"
        best = Path(self.state.best_model_checkpoint)
        check_whole(best, "give the same command again, which trains from the last good checkpoint")
        load_weights(self._unwrapped(), self.optimizer, best)

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        """Transformers' 5.23 trains one step more than `max_steps` when it resumes from there within an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **named)

    def _unwrapped(self) -> nn.Module:
        """The model with its parameters as its files name them."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model


@contextlib.contextmanager
def _numbers_only(path: Path) -> Iterator[None]:
    """Turns what torch raises at a pickle that could run code into a CheckpointError; it never runs any."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than numbers and was not read; remove {path.parent}, which did not come from this program"
        ) from error


def _put_in_place(written: Path, folder: Path, details: dict[str, Any]) -> None:
    """Seals what was written and gives it its name, in the place of what had it."""
    if not any(path.name != OPTIMIZER_FILE for path in written.glob("*.safetensors")):
        raise HymbaAlignError(
            "the engine gave out no whole weights; set stage3_gather_16bit_weights_on_model_save: true in its DeepSpeed "
            "file, or fsdp_state_dict_type: FULL_STATE_DICT in launch.accelerate_config"
        )
    seal(written, details)
    if folder.exists():
        if CHECKPOINT.fullmatch(folder.name) and find_problem(folder, details["inputs"]) is None:
            return  # of this very step; two renames could lose both
        folder.rename(written.parent / "replaced")
    written.rename(folder)
    sync_folder(folder.parent)


def cannot_save(folder: Path, reason: str) -> HymbaAlignError:
    """The error of every process when one could not write a folder; `storage.writing` says it better where it was the disk."""
    return HymbaAlignError(
        f"{folder} could not be written ({reason}); earlier checkpoints are untouched, so cure that and run the same "
        "command again"
    )
