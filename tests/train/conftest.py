"""A recipe that trains in seconds: the shipped data and tokenizer, a Hymba of two narrow layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's curves take as long as its training here; tests/run/test_curves.py and tests/pipeline draw them."""
    from hymba_align.run.curves import CURVES_FILE
    from hymba_align.train import stage_run

    def unpainted(stage_dir: Path) -> Path:
        (stage_dir / CURVES_FILE).touch()
        return stage_dir / CURVES_FILE

    monkeypatch.setattr(stage_run, "draw_curves", unpainted)


@pytest.fixture
def make_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_base: dict[str, Any]) -> MakeRecipe:
    """Builds the recipe; keyword arguments become trainer settings of both stages."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")  # no cached reference log-probs

    def make(rows: int = 12, *, share_prefix: bool = True, sft: bool = True, **trainer: Any) -> Recipe:
        settings = {"per_device_train_batch_size": 2, "logging_steps": 1, **trainer}
        unshown = {"samples": {"prompts": 0}, "max_length": 256}  # they take longer than training here
        return Recipe.model_validate(
            {
                "name": "tiny",
                "seed": 7,
                "base": {**small_base, "tokenizer": str(ROOT / small_base["tokenizer"])},
                "data": {"path": str(ROOT / "data" / "arithmetic" / "train.jsonl"), "max_rows": rows},
                **({"sft": {**unshown, "trainer": settings}} if sft else {}),
                "dpo": {**unshown, "share_prefix": share_prefix, "trainer": settings},
            }
        )

    return make


@pytest.fixture(scope="session")
def deepspeed_file() -> Callable[[Path, str | None], str | None]:
    """Writes the shipped file of a ZeRO engine into a folder; None for no engine."""

    def write(folder: Path, engine: str | None) -> str | None:
        if engine is None:
            return None
        content = json.loads((ROOT / "accelerate_configs" / "deepspeed" / f"{engine}.json").read_text())
        if content["zero_optimization"]["stage"] == 3:  # divide parameters of this size too
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def data_rows() -> Callable[[Recipe], list[dict[str, Any]]]:
    """The rows that a recipe trains on, as its file has them."""

    def read(recipe: Recipe) -> list[dict[str, Any]]:
        assert recipe.data is not None
        lines = Path(recipe.data.path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[: recipe.data.max_rows]]

    return read
