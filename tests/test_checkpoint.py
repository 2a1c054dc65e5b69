"""The run folder, its manifests, atomic writes, and checkpoints that are not what they should be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymba_align.checkpoint import (
    RunFolder,
    base_config,
    build_base,
    environment,
    file_digest,
    fingerprint,
    load_model,
    open_run,
    path_digest,
    write_json,
    write_text,
)
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError, RecipeError, RunFolderError
from hymba_align.recipe import BaseSection, Recipe, load_recipe

GOLDEN = Path("tests/golden/tiny")
TOKENIZER = "data/arithmetic/tokenizer"


def _recipe(root: Path, name: str = "demo") -> Recipe:
    base = BaseSection(model="owner/hymba")
    return Recipe.model_validate({"name": name, "output_dir": str(root), "base": base, "eval": {}})


# --- The run folder ---------------------------------------------------------------------------------------------------


def test_opening_a_run_writes_the_recipe_as_resolved_and_the_environment(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path / "run")

    folder = open_run(recipe)

    assert load_recipe(folder.root / "recipe.yaml") == recipe
    written = json.loads((folder.root / "environment.json").read_text())
    assert written == environment()
    assert written["versions"]["torch"].startswith("2.")
    assert set(written) == {"python", "platform", "cpu_count", "gpus", "git_revision", "versions"}


def test_the_environment_holds_no_paths_and_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")

    text = json.dumps(environment())

    assert "planted-secret" not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) + "/" not in text


def test_a_run_may_be_opened_again_with_changed_sections(tmp_path: Path) -> None:
    open_run(_recipe(tmp_path))
    changed = _recipe(tmp_path).model_copy(update={"seed": 7})

    open_run(changed)

    assert load_recipe(tmp_path / "recipe.yaml").seed == 7


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    open_run(_recipe(tmp_path, "first"))
    before = (tmp_path / "recipe.yaml").read_text()

    with pytest.raises(RunFolderError) as caught:
        open_run(_recipe(tmp_path, "second"))

    assert str(caught.value) == (
        f"{tmp_path} belongs to the run 'first', and this recipe's name is 'second'; set output_dir to another folder"
    )
    assert (tmp_path / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: write_text(root / "thesis.txt", "mine"), "{root} is not empty and holds no run; set output_dir to another folder"),
        (lambda root: write_text(root / "recipe.yaml", "- 3"), "{root}/recipe.yaml is not a recipe; set output_dir to another folder"),
        (lambda root: write_text(root / "recipe.yaml", "a: ["), "{root}/recipe.yaml is not a recipe; set output_dir to another folder"),
        (lambda root: write_text(root, "a file"), "{root} is a file, and a run needs a folder there; set output_dir to another path"),
        (lambda root: write_text(root.parent, "a file"), "{root}: the run folder cannot be written (Not a directory); set output_dir"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, prepare, message: str) -> None:
    root = tmp_path / "outer" / "run"
    prepare(root)

    with pytest.raises(RunFolderError) as caught:
        open_run(_recipe(root))

    assert str(caught.value) == message.format(root=root)


# --- Manifests --------------------------------------------------------------------------------------------------------


def _finish(folder: RunFolder, stage: str, inputs: str) -> None:
    folder.mark_started(stage, inputs)
    write_json(folder.stage_dir(stage) / "final" / "config.json", {"made of": inputs})
    folder.mark_complete(stage, inputs, {"loss": 1.5})


def test_a_stage_is_complete_only_for_the_inputs_it_finished_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    folder.mark_started("sft", "a")
    assert folder.is_started("sft", "a")
    assert not folder.is_complete("sft", "a")
    _finish(folder, "sft", "a")

    assert folder.is_complete("sft", "a")
    assert not folder.is_complete("sft", "b")
    assert not folder.is_complete("dpo", "a")
    assert folder.read_manifest("sft")["details"] == {"loss": 1.5}


def test_a_stage_whose_checkpoint_was_deleted_is_not_complete(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _finish(folder, "sft", "a")

    shutil.rmtree(tmp_path / "sft" / "final")

    assert not folder.is_complete("sft", "a")


def test_a_torn_manifest_counts_as_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.manifest_path("sft"), '{"completed": "a"')

    assert not folder.is_complete("sft", "a")


def test_an_interrupted_stage_keeps_its_files_for_the_same_inputs_and_they_move_aside_for_others(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_started("sft", "a")
    checkpoint = tmp_path / "sft" / "checkpoint-3"
    checkpoint.mkdir()

    assert folder.mark_started("sft", "a") is None
    assert checkpoint.exists()

    assert folder.mark_started("sft", "b") == tmp_path / "sft.interrupted"
    assert not checkpoint.exists()
    assert (tmp_path / "sft.interrupted" / "checkpoint-3").exists()
    assert folder.is_started("sft", "b")


def test_what_moved_aside_comes_back_for_its_inputs_and_the_two_change_places(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _finish(folder, "sft", "a")
    _finish(folder, "sft", "b")

    assert folder.find_aside("sft", "a") == tmp_path / "sft.previous"
    assert folder.restore("sft", "a") == tmp_path / "sft.previous"
    assert folder.is_complete("sft", "a")
    assert folder.is_complete("sft.previous", "b")

    assert folder.mark_started("sft", "b") is None
    assert folder.is_complete("sft", "b")
    assert folder.restore("sft", "b") is None
    assert folder.restore("sft", "c") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft", "sft.previous"]


def test_an_unfinished_stage_never_takes_the_place_of_a_finished_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _finish(folder, "sft", "a")
    for inputs in ("b", "c"):
        folder.mark_started("sft", inputs)
        (tmp_path / "sft" / f"checkpoint-{inputs}").mkdir()
    folder.mark_started("sft", "d")

    assert folder.is_complete("sft.previous", "a")
    assert (tmp_path / "sft.interrupted" / "checkpoint-c").exists()
    assert folder.mark_started("sft", "c") is None
    assert (tmp_path / "sft" / "checkpoint-c").exists()


@pytest.mark.parametrize("when", ["before the stage was moved", "after it was moved"])
def test_a_move_that_was_interrupted_is_finished_by_the_next(tmp_path: Path, when: str) -> None:
    folder = RunFolder(tmp_path)
    _finish(folder, "sft", "a")
    _finish(folder, "sft", "b")
    (tmp_path / "sft.previous").rename(tmp_path / "sft.moving")
    if when == "after it was moved":
        (tmp_path / "sft").rename(tmp_path / "sft.previous")

    folder.restore("sft", "a")

    assert folder.is_complete("sft", "a")
    assert folder.is_complete("sft.previous", "b")
    assert not (tmp_path / "sft.moving").exists()


def test_a_finished_checkpoint_moves_aside_when_its_inputs_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _finish(folder, "sft", "a")

    moved_to = folder.mark_started("sft", "b")

    assert moved_to == tmp_path / "sft.previous"
    assert json.loads((moved_to / "final" / "config.json").read_text()) == {"made of": "a"}
    assert not (tmp_path / "sft" / "final").exists()
    assert not folder.is_complete("sft", "a")


def test_scores_have_their_manifest_beside_their_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    folder.mark_started("eval/base", "a")
    write_json(folder.stage_dir("eval/base") / "gsm8k.json", {})
    folder.mark_complete("eval/base", "a", {}, ("gsm8k.json",))

    assert folder.is_complete("eval/base", "a")
    assert sorted(path.name for path in (tmp_path / "eval" / "base").iterdir()) == ["gsm8k.json"]
    folder.mark_started("eval/base", "b")
    assert list((tmp_path / "eval" / "base").iterdir()) == []


# --- Digests and writes -----------------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_a_digest_follows_the_bytes_of_files_and_the_names_of_repositories(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"one\n")
    assert file_digest(rows) == "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806"
    first, folder = path_digest(str(rows)), path_digest(str(tmp_path))

    rows.write_bytes(b"two\n")

    assert path_digest(str(rows)) != first
    assert path_digest(str(tmp_path)) != folder
    assert path_digest("owner/data") == "owner/data"
    assert path_digest(None) is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"old": True})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": True})

    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


# --- Models -----------------------------------------------------------------------------------------------------------


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
            "{path}/config.json is not a JSON object: {path}/config.json holds no JSON object",
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
            "{path}: the model cannot be loaded: HymbaConfig: num_experts is 8, which no released checkpoint uses; "
            "only 1 is supported",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_a_whole_hymba_is_one_sentence(checkpoint: Path, spoil, message: str) -> None:
    spoil(checkpoint)

    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)

    assert str(caught.value) == message.format(path=checkpoint)


def test_a_checkpoint_without_weights_is_a_checkpoint_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=rf"^{checkpoint}: the model cannot be loaded: "):
        load_model(checkpoint)


def test_a_torn_weights_file_is_a_checkpoint_error(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match=rf"^{checkpoint}: the model cannot be loaded: "):
        load_model(checkpoint)


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
