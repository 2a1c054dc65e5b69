"""Models read from checkpoints, or made as a recipe's base section describes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.adapter_config import ADAPTER_CONFIG
from hymba_align.adapter_fit import check_fits
from hymba_align.adapter_folder import Chain, follow, is_adapter
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
from hymba_align.errors import CheckpointError, RecipeError, TokenizerError
from hymba_align.files import checked_file
from hymba_align.recipe import BaseSection, is_local_path
from hymba_align.terminal import print_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.adapter_merge import Merged
    from hymba_align.model import HymbaConfig, HymbaForCausalLM


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Loaded:
    """A model, the adapters that were merged into it (none where it was a checkpoint), and what merging each did."""

    model: HymbaForCausalLM
    chain: Chain
    merged: tuple[Merged, ...]


def load_model(
    path: str | Path, *, revision: str | None = None, dtype: str = "float32", base: str | Path | None = None
) -> HymbaForCausalLM:
    """The Hymba in a checkpoint folder or hub repository, in `dtype` (a torch dtype's name), on the CPU.

    An adapter of PEFT (LoRA, rsLoRA, DoRA) is merged into its base, in float32, and so are those below it. Which base is
    read is said on stderr. Nothing in a checkpoint or adapter is trusted: what it holds is checked before it is loaded
    (checkpoint_checks.py, adapter_folder.py).

    Args:
        base: the model under an adapter, in place of the one that its configuration names.
    Raises:
        CheckpointError: it cannot be read, is another architecture, or does not hold exactly Hymba's tensors; an adapter
            of another kind, or that does not fit its base.
    """
    return load_merged(path, revision=revision, dtype=dtype, base=base).model


def load_merged(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    base: str | Path | None = None,
    compare: bool = False,
) -> Loaded:
    """As `load_model`, with what was merged.

    Args:
        compare: also computes logits with each adapter beside the model and merged into it.
    Raises: CheckpointError.
    """
    chain = chain_of(path, revision, base=base)
    if not chain.adapters:
        return Loaded(_load_whole(path, revision, dtype), chain, ())
    for adapter in chain.adapters:
        _say(f"{adapter.name} is an adapter ({adapter.kind}); its base is read from {adapter.base}")
    model, merged = merge_chain(chain, compare=compare)
    _to_dtype(model, dtype, path)
    model.config.name_or_path = str(path)
    return Loaded(model, chain, tuple(merged))


def chain_of(path: str | Path, revision: str | None = None, *, base: str | Path | None = None) -> Chain:
    """The adapters between a path and the checkpoint under them; none where it is a checkpoint. Raises: CheckpointError."""
    if is_local_path(str(path)):
        _check_folder(path)
    chain = follow(path, revision, base)
    if chain.adapters and is_local_path(chain.base):
        _check_folder(chain.base)
    return chain


def merge_chain(chain: Chain, *, compare: bool = False) -> tuple[HymbaForCausalLM, list[Merged]]:
    """The float32 model of a chain of adapters, and what merging each did, from the first adapter on. Raises: CheckpointError."""
    from hymba_align.adapter_merge import merge_adapter

    _check_chain(chain)
    model = _load_whole(chain.base, chain.base_revision, "float32")
    merged: list[Merged] = []
    for adapter in reversed(chain.adapters):
        model, done = merge_adapter(model, adapter, compare=compare)
        merged.insert(0, done)
    return model, merged


def _check_chain(chain: Chain) -> HymbaConfig:
    """The base's configuration, once its files' headers and those of the adapters above it fit. Raises: CheckpointError."""
    folder = checkpoint_folder(chain.base, chain.base_revision)
    config, _ = _checked(folder, chain.base, "float32")
    shapes = expected_shapes(config)
    for adapter in chain.adapters:
        check_fits(adapter, shapes)
    return config


def _to_dtype(model: HymbaForCausalLM, dtype: str, path: str | Path) -> None:
    """Casts a merged model in place. Raises: CheckpointError where a number does not fit."""
    import torch

    torch.nn.Module.to(model, getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{path}: with the adapter merged, the tensor {name} holds a number that {dtype} does not have; use float32"
            )


def _say(line: str) -> None:
    """Tells on stderr, from one of several processes, what is read besides what was named."""
    if os.environ.get("RANK", "0") == "0":
        from hymba_align.data.inspection.preview import visible

        print_words(visible(line), stderr=True)


def _load_whole(path: str | Path, revision: str | None, dtype: str) -> HymbaForCausalLM:
    """The model of a checkpoint that is no adapter."""
    import torch
    import transformers

    from hymba_align.model import HymbaForCausalLM

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
    """Raises CheckpointError unless a Hymba can be read there, or an adapter over one.

    Of local folders the headers of the weights are read too, on the hub config.json alone (an adapter is fetched).
    """
    if is_local_path(str(path)):
        chain = chain_of(path)
        if not chain.adapters:
            _checked(Path(path), path, "bfloat16")
        elif is_local_path(chain.base):
            _check_chain(chain)
        else:
            hub_config(chain.base, chain.base_revision)
        return
    hub_config(path, revision)


def hub_config(path: str | Path, revision: str | None) -> HymbaConfig:
    """The configuration of a checkpoint on the hub, or of the one under an adapter there. Raises: CheckpointError."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(str(path), "config.json", revision=revision or "main")
    except OSError as error:
        if _adapter_on_hub(str(path), revision):
            return checkpoint_config(path, revision)
        raise CheckpointError(
            f"'{path}' is neither a folder here nor a checkpoint that the Hugging Face hub gives out: {first_line(error)}"
        ) from error
    return parse_config(read_object(Path(str(file)), path), path)


def _adapter_on_hub(path: str, revision: str | None) -> bool:
    from transformers.utils.hub import cached_file

    try:
        return cached_file(path, ADAPTER_CONFIG, revision=revision or "main") is not None
    except OSError:
        return False


def checkpoint_config(path: str | Path, revision: str | None = None) -> HymbaConfig:
    """The configuration of a checkpoint, of an adapter that of the checkpoint under it. Raises: CheckpointError."""
    if is_local_path(str(path)) and not is_adapter(path):
        _check_folder(path)
        return parse_config(read_object(Path(path) / "config.json", path), path)
    if not is_local_path(str(path)) and not _adapter_on_hub(str(path), revision):
        return hub_config(path, revision)
    chain = follow(path, revision)
    folder = checkpoint_folder(chain.base, chain.base_revision)
    return parse_config(read_object(folder / "config.json", chain.base), chain.base)


def tokenizer_place(path: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a checkpoint lies (a path or hub id, and its revision): of an adapter without one, at its base.

    Raises: CheckpointError.
    """
    name = str(path)
    if is_local_path(name):
        if not is_adapter(path):
            return name, revision
    elif not _adapter_on_hub(name, revision):
        return name, revision
    chain = follow(path, revision)
    for adapter in chain.adapters:
        if any((adapter.folder / file).is_file() for file in TOKENIZER_FILES):
            return str(adapter.folder), None
    return chain.base, chain.base_revision


def take_token_ids(model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts a tokenizer's special tokens into the model's configurations, so that generation stops where a turn ends."""
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.use_cache = True  # the released file says false, which makes decoding quadratic


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        raise CheckpointError(f"{path} is a recipe and no checkpoint; 'hymba-align run {path}' trains and scores it")
    if folder.is_file():
        raise CheckpointError(f"{path} is a file; name the folder of the checkpoint")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder; check the path")
    if checked_file(folder, "config.json", path) is None and not is_adapter(folder):
        raise CheckpointError(f"{path}: the folder has no config.json, so it is no checkpoint{_inner_hint(folder)}")


def _inner_hint(folder: Path) -> str:
    inner = sorted(config.parent.name for config in folder.glob("*/config.json"))
    names = ("config.json", ADAPTER_CONFIG)
    finals = [
        stage for stage in ("base", "sft", "dpo") if any((folder / stage / "final" / name).is_file() for name in names)
    ]
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
        raise TokenizerError(
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
