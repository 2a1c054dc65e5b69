"""The run folder: whose it is, what its manifests say, what moves aside and comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hymba_align.environment import environment
from hymba_align.errors import RunFolderError
from hymba_align.files import write_json, write_text
from hymba_align.recipe import BaseSection, Recipe, load_recipe
from hymba_align.run.folder import RunFolder, open_run


def _recipe(root: Path, name: str = "demo") -> Recipe:
    base = BaseSection(model="owner/hymba")
    return Recipe.model_validate({"name": name, "output_dir": str(root), "base": base, "eval": {}})


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
    assert not folder.is_complete("eval/base", "a")
    assert [path.name for path in (tmp_path / "eval" / "base").iterdir()] == ["gsm8k.json"], "its own inputs may stand"
