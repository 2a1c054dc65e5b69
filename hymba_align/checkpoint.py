"""Models read from checkpoints, or made as a recipe's base section describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.checkpoint_checks import (
    Weights,
    check_numbers,
    check_tensors,
    checkpoint_folder,
    expected_shapes,
    find_weights,
    first_line,
    one_line,
    parse_config,
    read_object,
    too_large,
    unknown_key,
)
from hymba_align.errors import CheckpointError, RecipeError
from hymba_align.files import checked_file
from hymba_align.recipe import BaseSection, is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaConfig, HymbaForCausalLM


def load_model(path: str | Path, *, revision: str | None = None, dtype: str = "float32") -> HymbaForCausalLM:
    """The Hymba in a checkpoint folder or hub repository, in `dtype` (a torch dtype's name), on the CPU.

    Nothing in the checkpoint is trusted: what it holds is checked before it is loaded (checkpoint_checks.py).

    Raises:
        CheckpointError: it cannot be read, is another architecture, or does not hold exactly Hymba's tensors.
    """
    import torch
    import transformers

    from hymba_align.model import HymbaForCausalLM

    if is_local_path(str(path)):
        _check_folder(path)
    folder = checkpoint_folder(path, revision)
    config, weights = _checked(folder, path, dtype)
    check_numbers(weights, dtype)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports a head that is not stored apart from the embeddings
    try:
        loaded: Any = HymbaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of generation_config.json too, in which transformers expects no surprises
        raise CheckpointError(f"{path}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model: HymbaForCausalLM = loaded[0]
    wrong = {kind: names for kind, names in loaded[1].items() if names}
    assert not wrong, f"{path}: checked, and yet loaded with {wrong}"
    model.config.name_or_path = str(path)
    return model


def _checked(folder: Path, path: str | Path, dtype: str) -> tuple[HymbaConfig, Weights]:
    """Configuration and weight files of a folder; of the latter only the headers were read. Raises: CheckpointError."""
    config = parse_config(read_object(folder / "config.json", path), path)
    weights = find_weights(folder, path)
    check_tensors(weights, config, dtype)
    checked_file(folder, "generation_config.json", path)
    return config, weights


def check_is_hymba(path: str | Path, revision: str | None) -> None:
    """Raises CheckpointError unless a Hymba's config.json can be read there and, of a local folder, its files' headers too."""
    if is_local_path(str(path)):
        _check_folder(path)
        _checked(Path(path), path, "bfloat16")
        return
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(str(path), "config.json", revision=revision or "main")
    except OSError as error:
        raise CheckpointError(
            f"'{path}' is neither a folder here nor a checkpoint that the Hugging Face hub gives out: {first_line(error)}"
        ) from error
    parse_config(read_object(Path(str(file)), path), path)


def checkpoint_config(path: str | Path) -> HymbaConfig:
    """The configuration of a local checkpoint. Raises: CheckpointError."""
    return parse_config(read_object(Path(path) / "config.json", path), path)


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        raise CheckpointError(f"{path} is a recipe and no checkpoint; 'hymba-align run {path}' trains and scores it")
    if folder.is_file():
        raise CheckpointError(f"{path} is a file; name the folder of the checkpoint")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder; check the path")
    if checked_file(folder, "config.json", path) is None:
        raise CheckpointError(f"{path}: the folder has no config.json, so it is no checkpoint{_inner_hint(folder)}")


def _inner_hint(folder: Path) -> str:
    inner = sorted(config.parent.name for config in folder.glob("*/config.json"))
    finals = [stage for stage in ("base", "sft", "dpo") if (folder / stage / "final" / "config.json").is_file()]
    if finals and not inner:
        return f"; below it are {', '.join(str(folder / stage / 'final') for stage in finals)}"
    return f"; there is one in {folder / inner[-1]}" if inner else "; name the folder that holds config.json"


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
    reason = too_large(expected_shapes(config), "float32")
    if reason is not None:
        raise RecipeError(f"base.config: {reason}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HymbaForCausalLM(config)
    return model.to(getattr(torch, base.dtype))


def check_embeddings(model: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CheckpointError where a model of that name has fewer embeddings (`rows`) than the tokenizer has tokens."""
    needed = vocabulary_size(tokenizer)
    if rows < needed:
        raise CheckpointError(
            f"{model}: the model has {rows} embeddings and the tokenizer {needed} tokens; "
            "set base.tokenizer to the model's own"
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The embeddings that a tokenizer's ids need, which may leave some out."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def base_config(base: BaseSection, tokenizer: PreTrainedTokenizerBase) -> HymbaConfig:
    """The configuration that `base.config` describes, completed from the tokenizer.

    Raises:
        RecipeError: an unknown key, a value that Hymba cannot have, or too small a vocabulary.
    """
    from huggingface_hub.errors import StrictDataclassError

    from hymba_align.model import HymbaConfig

    given = base.config or {}
    unknown = unknown_key(given, "base.config.")
    if unknown is not None:
        raise RecipeError(unknown)
    needed = vocabulary_size(tokenizer)
    rows = given.get("vocab_size", needed)
    if isinstance(rows, int) and rows < needed:
        raise RecipeError(
            f"base.config.vocab_size is {rows}, below the tokenizer's {needed} tokens; raise it, or leave it out"
        )
    fields: dict[str, Any] = {
        "vocab_size": needed,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **given,
    }
    try:
        return HymbaConfig(**fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"base.config is not a Hymba: {one_line(error)}") from error
