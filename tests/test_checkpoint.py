"""Models read from checkpoints or made of random weights; every way in which a checkpoint can be none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymba_align.checkpoint import base_config, build_base, load_model
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError, RecipeError
from hymba_align.files import write_json, write_text
from hymba_align.recipe import BaseSection

GOLDEN = Path("tests/golden/tiny")
TOKENIZER = "data/arithmetic/tokenizer"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be spoiled."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def test_a_checkpoint_is_loaded_with_its_weights_in_the_dtype_asked_for(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")

    model = load_model(checkpoint, dtype="bfloat16")

    state = model.state_dict()
    assert state["model.embed_tokens.weight"].dtype == torch.bfloat16
    for name, weight in weights.items():
        assert torch.equal(state[name], weight.to(torch.bfloat16)), name


def _spoil_config(**changes: object):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**config, **changes})

    return spoil


def _spoil_weights(change):
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "{path}: there is no such checkpoint folder; check the path"),
        (
            lambda folder: [shutil.rmtree(folder), folder.write_text("")],
            "{path} is a file; name the folder of the checkpoint",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            "{path}: the folder has no config.json, so it is no checkpoint; name the folder that holds config.json",
        ),
        (
            lambda folder: folder.rename(folder.parent / "moved") and (folder.mkdir(), (folder.parent / "moved").rename(folder / "final")),
            "{path}: the folder has no config.json, so it is no checkpoint; there is one in {path}/final",
        ),
        (
            _spoil_config(model_type="llama"),
            "{path}: model_type in config.json is 'llama', not 'hymba'; hymba-align trains and scores Hymba only",
        ),
        (
            lambda folder: write_text(folder / "config.json", "[]"),
            "{path}/config.json is not a JSON object: it holds something else",
        ),
        (
            _spoil_weights(lambda weights: weights.pop("model.layers.0.mamba.A_log.0")),
            "{path}: the checkpoint lacks tensors: model.layers.0.mamba.A_log.0; use a complete Hymba checkpoint",
        ),
        (
            _spoil_weights(lambda weights: weights.update({"model.layers.0.mamba.A_log.0": torch.zeros(3, 16)})),
            "{path}: the checkpoint has tensors of a shape that its config.json does not give: "
            "model.layers.0.mamba.A_log.0; use a complete Hymba checkpoint",
        ),
        (
            _spoil_weights(lambda weights: weights.update({f"extra.{i}": torch.zeros(1) for i in range(5)})),
            "{path}: the checkpoint has tensors that Hymba does not have: extra.0, extra.1, extra.2 and 2 more; "
            "use a complete Hymba checkpoint",
        ),
        (
            _spoil_config(num_experts=8),
            "{path}/config.json is not a Hymba's: HymbaConfig: num_experts is 8, which no released checkpoint uses; "
            "only 1 is supported",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_a_whole_hymba_is_one_sentence(checkpoint: Path, spoil, message: str) -> None:
    spoil(checkpoint)

    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)

    assert str(caught.value) == message.format(path=checkpoint)


def test_a_recipe_in_the_place_of_a_checkpoint_is_told_the_command_for_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine")

    with pytest.raises(CheckpointError) as caught:
        load_model(recipe)

    told = f"{recipe} is a recipe and no checkpoint; 'hymba-align run {recipe}' trains and scores it"
    assert str(caught.value) == told


def test_a_run_folder_in_the_place_of_a_checkpoint_is_told_those_in_it(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("dpo", "sft", "sft.previous"):
        shutil.copytree(checkpoint, run / stage / "final")

    with pytest.raises(CheckpointError) as caught:
        load_model(run)

    told = f"below it are {run}/sft/final, {run}/dpo/final"
    assert str(caught.value) == f"{run}: the folder has no config.json, so it is no checkpoint; {told}"


def test_a_checkpoint_without_weights_is_a_checkpoint_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)

    assert str(caught.value) == f"{checkpoint}: the folder has no model.safetensors; name a complete Hymba checkpoint"


def test_a_torn_weights_file_is_a_checkpoint_error(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)

    assert str(caught.value) == (
        f"{checkpoint}: model.safetensors is not a whole safetensors file: its header claims {length:,} bytes, more than the "
        "file or a header has; copy it again"
    )


def test_a_repository_that_the_hub_does_not_give_out_is_named() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model("nobody/hymba")

    assert str(caught.value).startswith(
        "'nobody/hymba' is neither a folder here nor a checkpoint that the Hugging Face hub gives out: "
    )


def test_random_weights_depend_on_the_seed_alone(small_base: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    base = BaseSection(**small_base)

    first = build_base(base, tokenizer, 1)
    torch.rand(3)
    state = torch.random.get_rng_state()
    again = build_base(base, tokenizer, 1)
    other = build_base(base, tokenizer, 2)

    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.state_dict()["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_what_base_config_leaves_out_comes_from_the_tokenizer(small_base: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(TOKENIZER)

    config = base_config(BaseSection(**small_base), tokenizer)

    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.hidden_size == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sizes": 3}, "base.config.hidden_sizes is not a key of HymbaConfig; the nearest is base.config.hidden_size"),
        ({"qqq": 3}, "base.config.qqq is not a key of HymbaConfig; the keys are those of Hymba's config.json"),
        ({"v_head_dim": 8}, "base.config is not a Hymba: HymbaConfig: v_head_dim is 8; with mamba_expand 2 and hidden_size 32 it must be 32"),
        ({"vocab_size": 8}, "base.config.vocab_size is 8, below the tokenizer's {tokens} tokens; raise it, or leave it out"),
    ],
)  # fmt: skip
def test_a_base_that_is_no_hymba_is_one_sentence(
    small_base: dict[str, Any], change: dict[str, object], message: str
) -> None:
    small_base["config"] |= change
    tokenizer = load_tokenizer(TOKENIZER)

    with pytest.raises(RecipeError) as caught:
        build_base(BaseSection(**small_base), tokenizer, 0)

    assert str(caught.value) == message.format(tokens=len(tokenizer))


def test_a_checkpoint_with_fewer_embeddings_than_tokens_is_refused(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)

    with pytest.raises(CheckpointError) as caught:
        build_base(BaseSection(model=str(checkpoint), tokenizer=TOKENIZER), tokenizer, 0)

    assert str(caught.value) == (
        f"{checkpoint}: the model has 257 embeddings and the tokenizer {len(tokenizer)} tokens; "
        "set base.tokenizer to the model's own"
    )
