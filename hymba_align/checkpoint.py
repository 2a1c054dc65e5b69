"""The run folder, its manifests, and models read from checkpoints.

    runs/<name>/
      recipe.yaml  environment.json
      base/        only where the base is random weights: base/final, so that it can be scored
      sft/  dpo/   checkpoint-N/ while training, final/, manifest.json, metrics.jsonl
      <stage>.previous/  <stage>.interrupted/   what a stage had when its inputs changed, finished or not
      eval/        <stage>/<task>.json, <stage>.manifest.json

A manifest records which inputs (a fingerprint) a stage was started with and, at its end, completed with. Every file
written here appears whole or not at all: temporary name, fsync, rename.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hymba_align.environment import environment
from hymba_align.errors import CheckpointError, RecipeError, RunFolderError
from hymba_align.recipe import BaseSection, Recipe, is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaConfig, HymbaForCausalLM


ASIDE = ("previous", "interrupted")  # what a stage had finished, what it had not, when its inputs changed
MOVING = "moving"  # on its way back


# --- The run folder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes; stages are named `base`, `sft`, `dpo` and `eval/<stage>`."""

    root: Path

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage, made when absent."""
        folder = self.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def manifest_path(self, stage: str) -> Path:
        """`<stage>/manifest.json`; beside the folder for scores, whose folder holds one file per task and nothing else."""
        if stage.startswith("eval/"):
            return self.root / f"{stage}.manifest.json"
        return self.root / stage / "manifest.json"

    def read_manifest(self, stage: str) -> dict[str, Any]:
        """What the manifest holds; empty where there is none or it is not JSON."""
        try:
            return read_json(self.manifest_path(stage))
        except (OSError, ValueError):
            return {}

    def is_complete(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage finished with these inputs and its output is still there."""
        manifest = self.read_manifest(stage)
        if manifest.get("completed") != fingerprint:
            return False
        return all((self.root / stage / name).exists() for name in manifest.get("outputs", ()))

    def is_started(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage was started with these inputs, finished or not."""
        return bool(self.read_manifest(stage).get("started") == fingerprint)

    def mark_started(self, stage: str, fingerprint: str) -> Path | None:
        """Makes the folder ready for these inputs.

        Started with the same inputs before: it stays as it is, or comes back (`restore`), so that the stage can resume.
        Otherwise checkpoints of other inputs move aside, and what holds none is removed.

        Returns: the folder that checkpoints moved to, if any did.
        """
        if self.is_started(stage, fingerprint) or self.restore(stage, fingerprint) is not None:
            return None
        moved_to = self._set_aside(stage)
        self.stage_dir(stage)
        write_json(self.manifest_path(stage), {"stage": stage, "started": fingerprint})
        return moved_to

    def find_aside(self, stage: str, fingerprint: str) -> Path | None:
        """The folder beside the stage's that was started or finished with these inputs; None where none was."""
        for suffix in (*ASIDE, MOVING):
            folder = f"{stage}.{suffix}"
            if not self.is_started(stage, fingerprint) and self.is_started(folder, fingerprint):
                return self.root / folder
        return None

    def restore(self, stage: str, fingerprint: str) -> Path | None:
        """Exchanges the stage's folder for the one beside it with these inputs; that one's old path, if there is one.

        Through a third name, because both may want the same one; a move that was interrupted is finished first.
        """
        moving = self.root / f"{stage}.{MOVING}"
        if moving.is_dir():
            moving.rename(self._aside(stage, moving.name) if (self.root / stage).exists() else self.root / stage)
        found = self.find_aside(stage, fingerprint)
        if found is not None:
            found.rename(moving)
            self._set_aside(stage)
            moving.rename(self.root / stage)
        return found

    def _set_aside(self, stage: str) -> Path | None:
        """Moves a stage's checkpoints to where they are kept, over older ones of their kind; returns that folder."""
        folder = self.root / stage
        if not (folder / "final").is_dir() and not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        aside = self._aside(stage, stage)
        shutil.rmtree(aside, ignore_errors=True)
        return folder.rename(aside)

    def _aside(self, stage: str, folder: str) -> Path:
        """Where the contents of `folder` are kept: unfinished ones never take the place of finished ones."""
        finished = "completed" in self.read_manifest(folder) and (self.root / folder / "final").is_dir()
        return self.root / f"{stage}.{ASIDE[0 if finished else 1]}"

    def mark_complete(
        self,
        stage: str,
        fingerprint: str,
        details: Mapping[str, Any],
        outputs: tuple[str, ...] = ("final/config.json",),
    ) -> None:
        """Records that the stage finished with these inputs and wrote `outputs` (paths inside its folder)."""
        manifest = {
            "stage": stage,
            "started": fingerprint,
            "completed": fingerprint,
            "outputs": list(outputs),
            "details": dict(details),
        }
        write_json(self.manifest_path(stage), manifest)


def open_run(recipe: Recipe) -> RunFolder:
    """The run's folder with recipe.yaml and environment.json of this moment in it.

    Raises:
        RunFolderError: the folder belongs to another run, holds other things, or cannot be written.
    """
    folder = RunFolder(run_root(recipe))
    check_run_folder(recipe)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        write_text(folder.root / "recipe.yaml", recipe.dump_yaml())
        write_json(folder.root / "environment.json", environment())
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(f"{folder.root}: the run folder cannot be written ({reason}); set output_dir") from error
    return folder


def run_root(recipe: Recipe) -> Path:
    """`output_dir`, or else runs/<name>."""
    return Path(recipe.output_dir) if recipe.output_dir else Path("runs") / recipe.name


def check_run_folder(recipe: Recipe) -> None:
    """Raises RunFolderError unless the folder is absent, empty, or a run of the same name; writes nothing."""
    root = run_root(recipe)
    if not root.exists():
        return
    if not root.is_dir():
        raise RunFolderError(f"{root} is a file, and a run needs a folder there; set output_dir to another path")
    description = root / "recipe.yaml"
    if not description.exists():
        if any(root.iterdir()):
            raise RunFolderError(f"{root} is not empty and holds no run; set output_dir to another folder")
        return
    try:
        found = yaml.safe_load(description.read_text(encoding="utf-8"))
        name = found["name"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        raise RunFolderError(f"{description} is not a recipe; set output_dir to another folder") from None
    if name != recipe.name:
        raise RunFolderError(
            f"{root} belongs to the run '{name}', and this recipe's name is '{recipe.name}'; set output_dir to another folder"
        )


# --- Fingerprints and atomic writes -----------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value: equal for equal values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_digest(name: str | None) -> str | None:
    """A digest of what a local path holds now; for a hub name (and None) the name stands for itself.

    A folder counts with the files directly in it, as a checkpoint or tokenizer has them.
    """
    if name is None or not is_local_path(name):
        return name
    path = Path(name)
    if path.is_dir():
        return fingerprint({file.name: file_digest(file) for file in sorted(path.iterdir()) if file.is_file()})
    return file_digest(path) if path.is_file() else name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: OSError, or ValueError when it holds something else."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text that appears whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system lets a folder be opened for it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Models -----------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, *, revision: str | None = None, dtype: str = "float32") -> HymbaForCausalLM:
    """The Hymba in a checkpoint folder or hub repository, in `dtype` (a torch dtype's name), on the CPU.

    Raises:
        CheckpointError: it cannot be read, is another architecture, or does not hold exactly Hymba's tensors.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from hymba_align.model import HymbaForCausalLM

    check_is_hymba(path, revision)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of wrong tensors; the sentence below says the same
    try:
        loaded: Any = HymbaForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model: HymbaForCausalLM = loaded[0]
    found: dict[str, Any] = loaded[1]
    for kind, problem in (
        ("missing_keys", "lacks tensors"),
        ("mismatched_keys", "has tensors of a shape that its config.json does not give"),
        ("unexpected_keys", "has tensors that Hymba does not have"),
    ):
        if found[kind]:
            names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in found[kind])
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{path}: the checkpoint {problem}: {shown}; use a complete Hymba checkpoint")
    return model


def check_is_hymba(path: str | Path, revision: str | None) -> None:
    """Raises CheckpointError unless a config.json can be read there and says model_type hymba."""
    if is_local_path(str(path)):
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{path}: there is no such checkpoint folder; check the path")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{path}: the folder has no config.json, so it is no checkpoint{_inner_hint(folder)}")
        try:
            model_type = read_json(folder / "config.json").get("model_type")
        except ValueError as error:
            raise CheckpointError(f"{path}/config.json is not a JSON object: {_first_line(error)}") from error
    else:
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(str(path), revision=revision or "main")
        except OSError as error:
            raise CheckpointError(
                f"'{path}' is neither a folder here nor a checkpoint that the Hugging Face hub gives out: "
                f"{_first_line(error)}"
            ) from error
        model_type = config.get("model_type")
    if model_type != "hymba":
        raise CheckpointError(
            f"{path}: model_type in config.json is '{model_type}', not 'hymba'; hymba-align trains and scores Hymba only"
        )


def _inner_hint(folder: Path) -> str:
    inner = sorted(config.parent.name for config in folder.glob("*/config.json"))
    return f"; there is one in {folder / inner[-1]}" if inner else "; name the folder that holds config.json"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def build_base(base: BaseSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> HymbaForCausalLM:
    """The model that training starts from: `base.model` as loaded, or random weights of `base.config`.

    Random weights depend on `seed` alone, whatever random numbers were drawn before. Where `base.config` leaves them
    out, the vocabulary size and the special token ids are the tokenizer's.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or has fewer embeddings than the tokenizer has tokens.
        RecipeError: base.config is not a Hymba.
    """
    if base.model is not None:
        model = load_model(base.model, revision=base.revision, dtype=base.dtype)
        check_embeddings(base.model, model.config.vocab_size, tokenizer)
        return model

    import torch

    from hymba_align.model import HymbaForCausalLM

    config = base_config(base, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HymbaForCausalLM(config)
    return model.to(getattr(torch, base.dtype))


def check_embeddings(model: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CheckpointError where a model of that name has fewer embeddings (`rows`) than the tokenizer has tokens."""
    if rows < len(tokenizer):
        raise CheckpointError(
            f"{model}: the model has {rows} embeddings and the tokenizer {len(tokenizer)} tokens; "
            "set base.tokenizer to the model's own"
        )


def base_config(base: BaseSection, tokenizer: PreTrainedTokenizerBase) -> HymbaConfig:
    """The configuration that `base.config` describes, completed from the tokenizer.

    Raises:
        RecipeError: an unknown key, a value that Hymba cannot have, or too small a vocabulary.
    """
    from huggingface_hub.errors import StrictDataclassError

    from hymba_align.model import HymbaConfig

    given = base.config or {}
    known = HymbaConfig().to_dict().keys() | {"conv_dim", "layer_type", "seq_length", "torch_dtype"}
    for key in given.keys() - known:
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f"; the nearest is base.config.{near[0]}" if near else "; the keys are those of Hymba's config.json"
        raise RecipeError(f"base.config.{key} is not a key of HymbaConfig{hint}")
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **given,
    }
    try:
        config = HymbaConfig(**fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"base.config is not a Hymba: {' '.join(str(error).split())}") from error
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            f"base.config.vocab_size is {config.vocab_size}, below the tokenizer's {len(tokenizer)} tokens; "
            "raise it, or leave it out"
        )
    return config
