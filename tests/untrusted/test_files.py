"""Files of a checkpoint of strangers: parts, links, pipes and what lies beside the weights."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymba_align.checkpoint import load_model
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError
from tests.untrusted.checkpoints import GATE, INDEX, TOKENIZER, WEIGHTS, refusal, try_to_load, works


def shard(folder: Path) -> dict[str, Any]:
    """Divides the weights among two files with an index; returns the index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, places = sorted(weights), {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_a_checkpoint_in_several_files_loads_as_the_same_model(checkpoint: Path, original: Path) -> None:
    shard(checkpoint)

    state = load_model(checkpoint).state_dict()

    for name, weight in load_model(original).state_dict().items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 5, None])
def test_an_index_that_names_a_file_elsewhere_is_refused(checkpoint: Path, outside: object) -> None:
    shutil.copy(checkpoint / WEIGHTS, checkpoint.parent / WEIGHTS)
    index = shard(checkpoint)
    index["weight_map"][GATE] = outside
    (checkpoint / INDEX).write_text(json.dumps(index))

    assert refusal(checkpoint) == f"HERE/{INDEX} names the file {outside!r}, which is not a .safetensors file beside it"


def test_an_index_that_its_files_do_not_agree_with_is_refused(checkpoint: Path) -> None:
    index = shard(checkpoint)
    first, second = sorted(set(index["weight_map"].values()))
    other = next(name for name, file in index["weight_map"].items() if file == first)
    wrong = copy.deepcopy(index)
    wrong["weight_map"][other] = second
    (checkpoint / INDEX).write_text(json.dumps(wrong))
    assert refusal(checkpoint) == f"HERE/{INDEX} and its files disagree about the tensor {other}; copy them again"

    twice = load_file(checkpoint / second) | {other: load_file(checkpoint / first)[other]}
    save_file(twice, checkpoint / second, metadata={"format": "pt"})
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert refusal(checkpoint) == f"HERE: the tensor {other} is in {first} and in {second}; remove one"

    (checkpoint / second).unlink()
    assert refusal(checkpoint) == f"HERE/{INDEX} names the file {second}, which is missing; copy it again"

    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {}}))
    assert refusal(checkpoint) == f"HERE/{INDEX} lacks weight_map or metadata; name a complete Hymba checkpoint"


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    elsewhere = checkpoint.parent / "elsewhere"
    shutil.move(checkpoint / name, elsewhere)
    (checkpoint / name).symlink_to(elsewhere)

    assert refusal(checkpoint) == (
        f"HERE: {name} is a link that leads out of the folder, to {elsewhere}; put the file itself there"
    )


def test_links_inside_the_folder_and_into_the_hubs_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)

    assert works(load_model(snapshot))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    os.mkfifo(checkpoint / WEIGHTS)

    assert refusal(checkpoint) == f"HERE: the folder has no {WEIGHTS}; name a complete Hymba checkpoint"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_config.json", "the folder holds adapter_config.json and model.safetensors, so it is two models; remove one"),
        ("shard-00000-model-00001-of-00001.safetensors", "shard-00000-model-00001-of-00001.safetensors is one process's part of a distributed checkpoint; save it as one"),
    ],
)  # fmt: skip
def test_a_file_by_which_transformers_would_load_something_else_is_refused(
    checkpoint: Path, name: str, reason: str
) -> None:
    (checkpoint / name).write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))

    assert refusal(checkpoint) == f"HERE: {reason}"


@pytest.mark.parametrize(
    "content", ["{", '{"eos_token_id": {"a": 1}}', '{"max_length": "many"}', '{"cache_implementation": 7}']
)
def test_a_generation_configuration_is_refused_in_a_sentence_or_does_no_harm(checkpoint: Path, content: str) -> None:
    (checkpoint / "generation_config.json").write_text(content)

    model, message = try_to_load(checkpoint)

    assert works(model) if model is not None else message.startswith(f"{checkpoint}: the model cannot be loaded: ")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused_before_scoring(
    checkpoint: Path, tmp_path: Path
) -> None:
    from hymba_align.eval import evaluate
    from hymba_align.recipe_eval import EvalSection

    shutil.copytree(TOKENIZER, checkpoint, dirs_exist_ok=True)

    with pytest.raises(CheckpointError) as caught:
        evaluate(checkpoint, EvalSection(), tmp_path / "out")

    tokens = len(load_tokenizer(TOKENIZER))
    assert str(caught.value) == (
        f"{checkpoint}: the model has 61 embeddings and the tokenizer {tokens} tokens; set base.tokenizer to the model's own"
    )
