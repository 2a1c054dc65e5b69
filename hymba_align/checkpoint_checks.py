"""What is known about a checkpoint before a weight of it is in memory: nothing that it holds is trusted.

A folder is read in this order, and each step trusts only what the one before it has checked: which files there are (none
by another name, none outside of the folder, no pickle), config.json (known keys, values within limits), the headers
of the safetensors files (exactly the tensors that the configuration gives, as real numbers, no larger than memory), and the
numbers themselves (finite). Of a repository on the hub only such files are fetched.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import CheckpointError, WeightsError
from hymba_align.files import checked_file
from hymba_align.recipe import is_local_path

if TYPE_CHECKING:
    from hymba_align.model import HymbaConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FETCHED = (
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("adapter_config.json", "quantization.json"),  # of an adapter (adapter_folder.py)
)
RANK_SHARD = re.compile(r"shard-\d+-model-")
LARGEST_JSON = 16 << 20
LARGEST_HEADER = 64 << 20
NUMBERS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes of each
TIED = ("lm_head.weight", "model.embed_tokens.weight")
NEUTRAL_ATTENTION = (None, "flex", "sdpa", "eager", "flash_attention_2")
SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a checkpoint, checked but not read; `name` is what messages call the checkpoint."""

    name: str
    files: tuple[Path, ...]


# ---- files ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(path: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint: a local one as it is, or what of a hub repository may be read, fetched now.

    Raises: CheckpointError.
    """
    if is_local_path(str(path)):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision or "main", allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub and its client raise many kinds, all about this repository
        raise CheckpointError(
            f"'{path}' is neither a folder here nor a checkpoint that the Hugging Face hub gives out: {first_line(error)}"
        ) from error


def read_object(file: Path, title: str | Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in a file. Raises: CheckpointError."""
    try:
        if file.stat().st_size > largest:
            raise CheckpointError(
                f"{title}/{file.name} has {file.stat().st_size:,} bytes, above {largest:,}; it is damaged"
            )
        value = _object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{title}/{file.name} is not a JSON object: {first_line(error)}") from error
    return value


def _object(text: str) -> dict[str, Any]:
    """A JSON object without a key that stands twice. Raises: ValueError, RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in made if keys.count(key) > 1)
            raise ValueError(f"{twice!r:.60} stands twice")
        return made

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError("it holds something else")
    return value


def find_weights(folder: Path, title: str | Path) -> Weights:
    """The checkpoint's safetensors files, from the one file or from the index of several. Raises: CheckpointError."""
    if os.path.lexists(folder / "adapter_config.json"):  # through which transformers would load something else
        raise CheckpointError(f"{title}: the folder holds adapter_config.json, so it is an adapter and no whole model")
    shards = sorted(file.name for file in folder.iterdir() if RANK_SHARD.match(file.name))
    if shards:
        raise WeightsError(f"{title}: {shards[0]} is one process's part of a distributed checkpoint; save it as one")
    single = checked_file(folder, WEIGHTS, title)
    if single is not None:
        return Weights(str(title), (single,))
    index = checked_file(folder, INDEX, title)
    if index is not None:
        return Weights(str(title), _shards(folder, index, title))
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise WeightsError(
            f"{title}: the weights are a pickle ({pickles[0]}), which can run code when it is opened, and hymba-align "
            f"never opens one; name a checkpoint with {WEIGHTS}"
        )
    raise WeightsError(f"{title}: the folder has no {WEIGHTS}; name a complete Hymba checkpoint")


def _shards(folder: Path, index: Path, title: str | Path) -> tuple[Path, ...]:
    """The files that an index names, each with exactly the tensors that the index says."""
    content = read_object(index, title)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(content.get("metadata"), dict):
        raise WeightsError(f"{title}/{INDEX} lacks weight_map or metadata; name a complete Hymba checkpoint")
    files: dict[str, Path] = {}
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{title}/{INDEX} names the file {name!r:.80}, which is not a .safetensors file beside it"
            )
        if name not in files:
            file = checked_file(folder, name, title)
            if file is None:
                raise WeightsError(f"{title}/{INDEX} names the file {name}, which is missing; copy it again")
            files[name] = file
    found: dict[str, str] = {}
    for name, file in files.items():
        for tensor in tensor_headers(file, title):
            if tensor in found:
                raise WeightsError(f"{title}: the tensor {tensor} is in {found[tensor]} and in {name}; remove one")
            found[tensor] = name
    if found != places:
        tensor = next(iter(sorted(tensor for tensor in {**found, **places} if found.get(tensor) != places.get(tensor))))
        raise WeightsError(f"{title}/{INDEX} and its files disagree about the tensor {tensor:.80}; copy them again")
    return tuple(files.values())


# ---- configuration --------------------------------------------------------------------------------------------------


def parse_config(values: dict[str, Any], title: str | Path) -> HymbaConfig:
    """The configuration in a config.json's values. Raises: CheckpointError for what no Hymba has."""
    from huggingface_hub.errors import StrictDataclassError

    from hymba_align.model import HymbaConfig

    check_model_type(values, title)
    unknown = unknown_key(values, "")
    if unknown is not None:
        raise CheckpointError(f"{title}/config.json: {unknown}; remove it")
    attention = values.get("attn_implementation")
    if attention not in NEUTRAL_ATTENTION:
        raise CheckpointError(
            f"{title}/config.json: attn_implementation is {attention!r:.80}, which Hymba does not have"
        )
    given = {key: value for key, value in values.items() if key not in ("attn_implementation", "model_type")}
    try:
        return HymbaConfig(**given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{title}/config.json is not a Hymba's: {one_line(error)}") from error


def check_model_type(values: dict[str, Any], title: str | Path) -> None:
    """Raises CheckpointError for another architecture."""
    if values.get("model_type") != "hymba":
        raise CheckpointError(
            f"{title}: model_type in config.json is '{values.get('model_type')!s:.80}', not 'hymba'; hymba-align trains and "
            "scores Hymba only"
        )


def unknown_key(values: dict[str, Any], prefix: str) -> str | None:
    """A sentence about the first key that a Hymba's configuration does not have; None where all are known."""
    from hymba_align.model.configuration import CONFIG_KEYS

    for key in sorted(values.keys() - CONFIG_KEYS):
        near = difflib.get_close_matches(key[:80], sorted(CONFIG_KEYS), n=1)
        hint = f"the nearest is {prefix}{near[0]}" if near else "the keys are those of Hymba's config.json"
        return f"{prefix}{key:.80} is not a key of HymbaConfig; {hint}"
    return None


# ---- tensors --------------------------------------------------------------------------------------------------------


def check_tensors(weights: Weights, config: HymbaConfig, dtype: str) -> None:
    """Raises CheckpointError unless the files hold exactly the configuration's tensors, as numbers that fit in memory.

    Only headers are read.
    """
    title = weights.name
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weights.files:
        found |= tensor_headers(file, title)
    layers = len({name.split(".")[2] for name in found if name.startswith("model.layers.")})
    if layers != config.num_hidden_layers:  # before a skeleton of so many is made
        raise WeightsError(
            f"{title}: config.json gives {config.num_hidden_layers} layers, and the weights have {layers}; "
            "use a complete Hymba checkpoint"
        )
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - found.keys() - {TIED[0]})  # for which the embeddings stand
    if missing:
        _refuse(title, "lacks tensors", missing)
    wrong = sorted(name for name, (_, shape) in found.items() if name in expected and shape != expected[name])
    if wrong:
        _refuse(title, "has tensors of a shape that its config.json does not give", wrong)
    extra = sorted(found.keys() - expected.keys())
    if extra:
        _refuse(title, "has tensors that Hymba does not have", extra)
    no_numbers = sorted(f"{name} ({kind})" for name, (kind, _) in found.items() if kind not in NUMBERS)
    if no_numbers:
        _refuse(title, f"has weights of a type other than {', '.join(NUMBERS)}", no_numbers)
    fits = too_large(expected, dtype)
    if fits is not None:
        raise WeightsError(f"{title}: {fits}")


def _refuse(title: str, problem: str, names: Sequence[str]) -> None:
    shown = ", ".join(f"{name:.120}" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise WeightsError(f"{title}: the checkpoint {problem}: {shown}{more}; use a complete Hymba checkpoint")


def expected_shapes(config: HymbaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, without memory for any."""
    import torch

    from hymba_align.model import HymbaForCausalLM

    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def too_large(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> str | None:
    """A sentence where a model with tensors of these shapes is larger than this machine's memory; None where it fits."""
    import torch

    numbers = sum(functools.reduce(int.__mul__, shape, 1) for name, shape in shapes.items() if name != TIED[0])
    needed, memory = numbers * getattr(torch, dtype).itemsize, memory_bytes()
    if needed <= memory:
        return None
    return (
        f"the model has {numbers:,} parameters, {needed / 1e9:,.0f} GB in {dtype}, and this machine has "
        f"{memory / 1e9:,.0f} GB of memory; use a smaller one"
    )


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensor_headers(file: Path, title: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor in a safetensors file, whose library checks offsets and sizes.

    The library takes the last of two tensors of one name, so that is looked for here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if length > min(LARGEST_HEADER, file.stat().st_size - 8):
                raise ValueError(f"its header claims {length:,} bytes, more than the file or a header has")
            header = _object(content.read(length).decode("utf-8"))
        for tensor in header:
            if not tensor or len(tensor) > 1000:
                raise ValueError("a tensor's name is empty or endless")
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            return {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
    except PermissionError as error:
        raise WeightsError(f"{title}: {file.name} may not be read by this user; change its mode or owner") from error
    except (OSError, ValueError, RecursionError, RuntimeError, SafetensorError) as error:  # torch's where mapping fails
        raise WeightsError(
            f"{title}: {file.name} is not a whole safetensors file: {first_line(error)}; copy it again"
        ) from error


def check_numbers(weights: Weights, dtype: str) -> None:
    """Raises CheckpointError where a weight is not finite in `dtype`; reads one tensor at a time."""
    import torch

    largest = torch.finfo(getattr(torch, dtype)).max
    for name, tensor in _tensors(weights):
        low, high = (float(number) for number in torch.aminmax(tensor))
        if not (-largest <= low and high <= largest):  # also where either is NaN
            seen = next(number for number in (low, high) if not abs(number) <= largest)
            raise WeightsError(
                f"{weights.name}: the tensor {name} holds {seen:g}, which is no number of {dtype} to train with; "
                "the checkpoint is damaged, or comes from a run that diverged; name another"
            )
    _check_tied(weights)


def _tensors(weights: Weights) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in weights.files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                yield name, opened.get_tensor(name)


def _check_tied(weights: Weights) -> None:
    """Raises CheckpointError where the head, of which the embeddings are read alone, has other weights than they."""
    import torch

    both = dict(_tied_tensors(weights))
    if len(both) == len(TIED) and not torch.equal(both[TIED[0]], both[TIED[1]]):
        raise WeightsError(
            f"{weights.name}: {TIED[0]} and {TIED[1]} differ, and Hymba has one tensor for both; remove one of them"
        )


def _tied_tensors(weights: Weights) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in weights.files:
        with safe_open(file, framework="pt") as opened:
            for name in set(TIED).intersection(opened.keys()):
                yield name, opened.get_tensor(name)


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 500 characters."""
    line = " ".join(str(error).split())
    return line if len(line) <= 500 else f"{line[:499]}…"


def first_line(error: BaseException) -> str:
    """What an error says, as far as its first line goes and 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 300 else f"{line[:299]}…"
