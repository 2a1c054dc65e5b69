from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.template import load_tokenizer

pytest.register_assert_rewrite("tests.data.what_holds")

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SMALL = ROOT / "data" / "arithmetic" / "tokenizer"
RELEASED = SHARED / "hymba_1_5b"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps datasets' files out of the user's cache and the tests apart from each other."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def load() -> Callable[[str], Any]:
    """Tokenizers by name, "small" or "released", with our template; the released one is skipped where absent."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name == "released" and not RELEASED.is_dir():
            pytest.skip("the released tokenizer is not beside the repository")
        if name not in loaded:
            loaded[name] = load_tokenizer(str(SMALL if name == "small" else RELEASED))
        return loaded[name]

    return get


@pytest.fixture
def small(load: Callable[[str], Any]) -> Any:
    return load("small")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared files are not beside the repository")
    return SHARED


@pytest.fixture
def released_template(shared: Path) -> str:
    return str(load_tokenizer(str(shared / "hymba_1_5b"), chat_template="released").chat_template)
