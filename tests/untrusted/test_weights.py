"""Weights of strangers: other tensors, types, numbers or sizes than the configuration gives are one clear sentence."""

from __future__ import annotations

import errno
import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hymba_align import checkpoint_checks
from hymba_align.checkpoint import check_is_hymba, load_model
from hymba_align.checkpoint_checks import check_numbers, find_weights, parse_config
from hymba_align.errors import CheckpointError
from hymba_align.model import HymbaForCausalLM
from tests.untrusted.checkpoints import GATE, WEIGHTS, change_weights, read_config, refusal, write_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(GATE), f"HERE: the checkpoint lacks tensors: {GATE}; use a complete Hymba checkpoint"),
        (
            lambda weights: weights.update({GATE: weights[GATE][:, :-1].contiguous()}),
            f"HERE: the checkpoint has tensors of a shape that its config.json does not give: {GATE}; use a complete Hymba checkpoint",
        ),
        (
            lambda weights: weights.update({"model.evil": torch.zeros(1)}),
            "HERE: the checkpoint has tensors that Hymba does not have: model.evil; use a complete Hymba checkpoint",
        ),
        (
            lambda weights: weights.update({GATE: weights[GATE].to(torch.int32)}),
            f"HERE: the checkpoint has weights of a type other than F16, BF16, F32, F64: {GATE} (I32); use a complete Hymba checkpoint",
        ),
        (
            lambda weights: weights.update({GATE: weights[GATE].to(torch.bool)}),
            f"HERE: the checkpoint has weights of a type other than F16, BF16, F32, F64: {GATE} (BOOL); use a complete Hymba checkpoint",
        ),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if ".layers.2." in name],
            "HERE: config.json gives 3 layers, and the weights have 2; use a complete Hymba checkpoint",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}),
            "HERE: lm_head.weight and model.embed_tokens.weight differ, and Hymba has one tensor for both; remove one of them",
        ),
    ],
)  # fmt: skip
def test_tensors_other_than_the_configuration_gives_are_refused(checkpoint: Path, change: Any, message: str) -> None:
    change_weights(checkpoint, change)

    assert refusal(checkpoint) == message


@pytest.mark.parametrize(("value", "dtype", "seen"), [
    (float("nan"), "float32", "nan"), (float("inf"), "float32", "inf"), (float("-inf"), "bfloat16", "-inf"),
    (3.4e38, "bfloat16", "3.4e+38"),  # a number of float32 alone
])  # fmt: skip
def test_a_weight_that_is_no_finite_number_is_refused(checkpoint: Path, value: float, dtype: str, seen: str) -> None:
    change_weights(checkpoint, lambda weights: weights[GATE].view(-1)[-1:].fill_(value))

    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint, dtype=dtype)

    assert str(caught.value) == (
        f"{checkpoint}: the tensor {GATE} holds {seen}, which is no number of {dtype} to train with; the checkpoint is "
        "damaged, or comes from a run that diverged; name another"
    )


def test_weights_are_looked_through_one_tensor_at_a_time(tmp_path: Path, original: Path) -> None:
    rows = 2_000_000  # 128 MB, of which one tensor is the half
    save_file({name: torch.ones(rows, 8) for name in ("a", "b")}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    weights = find_weights(tmp_path, tmp_path)
    tensors: list[int] = []

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, tensor in checkpoint_checks._tensors(weights):
        tensors.append(tensor.nbytes)
    check_numbers(weights, "float32")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    assert tensors == [64_000_000, 64_000_000]
    assert grown < 110_000_000, f"{grown / 1e6:.0f} MB for tensors of 64 MB each"  # mapped pages of one count too


def test_a_model_larger_than_memory_is_refused_by_its_headers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_checks, "memory_bytes", lambda: 10_000)

    message = refusal(checkpoint)

    assert message.startswith("HERE: the model has 1")
    assert message.endswith("GB of memory; use a smaller one")


def test_a_header_that_claims_terabytes_is_refused_though_the_file_has_them(checkpoint: Path) -> None:
    """The file is a hole: it takes no room on the disk, agrees with config.json, and would take 4 TB of memory."""
    rows, width = 1 << 22, 1 << 16
    write_config(checkpoint, vocab_size=rows, hidden_size=width, v_head_dim=width)
    with torch.device("meta"):
        shapes = {
            name: list(one.shape)
            for name, one in HymbaForCausalLM(parse_config(read_config(checkpoint), "")).state_dict().items()
        }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape, dtype=torch.float64).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (checkpoint / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + offset)
        except OSError:
            pytest.skip("this file system has no files of terabytes")

    message = refusal(checkpoint)

    assert "GB in float32, and this machine has" in message or "is not a whole safetensors file" in message


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (struct.pack("<Q", 1 << 62) + b"{}", "its header claims 4,611,686,018,427,387,904 bytes, more than the file or a header has"),
        (struct.pack("<Q", 2) + b"[]", "it holds something else"),
        (b"\x01", "its header claims 1 bytes, more than the file or a header has"),
        (b"", "its header claims 0 bytes, more than the file or a header has"),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(checkpoint: Path, header: bytes, reason: str) -> None:
    (checkpoint / WEIGHTS).write_bytes(header)

    assert refusal(checkpoint) == f"HERE: {WEIGHTS} is not a whole safetensors file: {reason}; copy it again"


def test_weights_that_this_user_may_not_read_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def open_if_permitted(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == WEIGHTS:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_if_permitted)

    assert refusal(checkpoint) == f"HERE: {WEIGHTS} may not be read by this user; change its mode or owner"


def test_a_tensor_that_stands_twice_in_a_header_is_refused(checkpoint: Path) -> None:
    data = (checkpoint / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode().rstrip()
    entry = json.dumps(json.loads(header)[GATE])
    longer = header[:-1] + f', "{GATE}": {entry}}}'
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(longer)) + longer.encode() + data[8 + length :])

    assert (
        refusal(checkpoint) == f"HERE: {WEIGHTS} is not a whole safetensors file: '{GATE}' stands twice; copy it again"
    )


def test_what_is_refused_on_loading_is_refused_by_the_check_before_training(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(GATE))

    with pytest.raises(CheckpointError, match="lacks tensors"):
        check_is_hymba(checkpoint, None)
