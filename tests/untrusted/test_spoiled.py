"""A thousand spoiled configurations and a thousand spoiled headers: each is refused in a sentence, or makes a model that works."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hymba_align import checkpoint_checks
from hymba_align.checkpoint_checks import parse_config
from hymba_align.errors import CheckpointError
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from tests.untrusted.checkpoints import WEIGHTS, read_config, try_to_load, works

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 64, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.0, 1e-45, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), "", "0", "16", "silu", "ntk", "x" * 5000, "\x00", "\ud800", "../..", "__import__('os')",
    [], [0], [[0]], [[1, 2]], [[2, 1]], [[0, 1], [1, 2]], [[[[]]]], [None], ["h"] * 3, list(range(1000)), {}, {"a": {"b": []}}, {"0": 0},
]  # fmt: skip


def try_to_parse(file: Path) -> tuple[HymbaConfig | None, str]:
    """The configuration in a file, or the sentence with which it is refused."""
    try:
        return parse_config(checkpoint_checks.read_object(file, file.parent), file.parent), ""
    except CheckpointError as error:
        return None, str(error)


def spoiled_values(original: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The configuration with one to three things wrong, or only different."""
    config = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(sorted(config))
        kind = rng.random()
        if kind < 0.55:
            config[key] = rng.choice(NASTY)
        elif kind < 0.75 and isinstance(original.get(key), (int, float)):
            config[key] = original[key] * rng.choice((0.5, 2, -1, 3)) + rng.choice((0, 0, 1, -1))
            config[key] = int(config[key]) if isinstance(original[key], int) and rng.random() < 0.9 else config[key]
        elif kind < 0.85:
            del config[key]
        elif kind < 0.95:
            other = rng.choice(sorted(original))
            config[key] = copy.deepcopy(original[other])
        else:
            config[rng.choice((key.upper(), key + "s", "to_dict", "quantization_config", "\u202e"))] = rng.choice(NASTY)
    return config


def test_a_thousand_spoiled_configurations_are_refused_in_a_sentence_or_make_a_model_that_works(
    original: Path, tmp_path: Path
) -> None:
    rng, good, outcomes = random.Random(5), read_config(original), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = tmp_path / "config.json"
    for number in range(1000):
        text = json.dumps(spoiled_values(good, rng))
        if number % 10 == 0:  # as text, too
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(("", "\x00", "{", "]", '"', "1e9999", text[:place])) + text[place + 1 :]
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        config, message = try_to_parse(file)
        if config is None:
            assert "\n" not in message, text
            assert len(message) < 1000, text
            outcomes["refused"] += 1
            continue
        if config.num_hidden_layers > 8:
            outcomes["refused by the weights' layers"] += 1
            continue
        shapes = checkpoint_checks.expected_shapes(config)
        if sum(torch.Size(shape).numel() for shape in shapes.values()) > 3_000_000:
            outcomes["too large to try here"] += 1
            continue
        torch.manual_seed(number)
        assert works(HymbaForCausalLM(config).eval()), text
        outcomes["works"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MB more than before"
    assert outcomes["refused"] > 400, outcomes
    assert outcomes["works"] > 100, outcomes


def spoiled_weights(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with something wrong in its header, or in the length of one."""
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:  # the length
        length = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)))
        return struct.pack("<Q", length) + data[8:]
    if kind == 1:  # bytes of the header
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            changed[8 + rng.randrange(length)] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:  # the file's end
        return data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(rng.randrange(1, 99))
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == 3:  # one field of one tensor
        field = rng.choice(("dtype", "shape", "data_offsets"))
        header[name][field] = rng.choice(
            (
                *NASTY, "F32", "F16", "BF16", "I32", "F64", "F8_E4M3", "BOOL", [2**62, 4], [-1, 4], header[rng.choice(names)][field],
                list(reversed(header[name][field])), [0, 2**63],
            )
        )  # fmt: skip
    elif kind == 4:  # names
        other = rng.choice(
            (rng.choice(names), "__metadata__", "", "x" * 10_000, "../../x", "model.layers.99.x", name + "\x00")
        )
        header[other] = header.pop(name)
    else:  # the whole entry, or what stands beside the tensors
        header[rng.choice((name, "__metadata__"))] = rng.choice(
            (*NASTY, {"format": "tf"}, {"format": 5}, {"format": "x"})
        )
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + tensors


def test_a_thousand_spoiled_headers_are_refused_in_a_sentence_or_make_a_model_that_works(checkpoint: Path) -> None:
    rng, good, outcomes = random.Random(11), (checkpoint / WEIGHTS).read_bytes(), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1000):
        (checkpoint / WEIGHTS).write_bytes(spoiled_weights(good, rng))
        model, message = try_to_load(checkpoint)
        assert "\n" not in message, number
        assert len(message) < 1000, number
        assert model is None or works(model), number
        outcomes["refused" if model is None else "works"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MB more than before"
    assert outcomes["refused"] > 800, outcomes
    assert outcomes["works"] >= 1, outcomes
