"""Models read from checkpoints, or made as a recipe's base section describes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import CheckpointError, RecipeError
from hymba_align.files import read_json
from hymba_align.recipe import BaseSection, is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaConfig, HymbaForCausalLM


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
