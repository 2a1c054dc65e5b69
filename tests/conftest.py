"""What holds in every test: no network, no colours, wide tables, and the repository as the current directory."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hymba_align.model import HymbaConfig, HymbaForCausalLM

# Before any test module imports transformers, datasets or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # tests share the cores, and a fork of a process with OpenMP threads hangs
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "160"

REPOSITORY = Path(__file__).resolve().parent.parent
# What DeepSpeed compiles on first use. In the folder that all environments of a machine share, each builds it again after
# another, for a minute, and whoever is killed meanwhile leaves a lock on which all wait for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPOSITORY / "build" / "torch_extensions"))


LONGEST = (
    "train/test_engines.py",
    "train/test_resume.py",
    "test_memory.py",
    "processes/test_slurm.py",
    "train/test_preemption.py",
    "docs/test_pages.py",
    "train/test_guards.py",
    "train/test_answers.py",
    "test_secrets.py",
    "model/test_triton_compiles.py",
    "train/test_adapter_engines.py",
    "processes/test_agent.py",
    "test_road.py",
    "model/test_triton_scan.py",
    "train/test_determinism.py",
    "processes/test_engine_choice.py",
    "test_kills.py",
)
"""Files that take a minute each go first: at the end, one of two workers would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the order within a file."""
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collectstart() -> None:
    """Nothing to free while half a million objects of libraries and tests are made."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leaves what was imported out of later collections: trainers ask for several, which were a third of their tests' time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extension modules report as leaked at exit what was never looked at


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Shared fixtures draw the same numbers whichever test asks for them first."""
    if fixturedef.scope != "function":
        _draw_from(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> None:
    """What a test draws from torch without a seed depends on its name, and not on the tests before it."""
    _draw_from(request.node.nodeid)


def _draw_from(name: str) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(zlib.crc32(name.encode()))


ONCE_PER_PROCESS = {
    "hymba_align.data.reading.converters": "_named",
    "hymba_align.model.kernels.choice": "_logged",
    "hymba_align.secrets": "_remembered",
}
"""Sets of what a process has said or learned, by module"""


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Puts back what outlives a test: which one runs next in this process depends on how long others took."""
    environment, path = dict(os.environ), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch = sys.modules.get("torch")
    numbers = (torch.get_num_threads(), torch.get_default_dtype()) if torch else None
    known = {module: set(getattr(sys.modules.get(module), name, ())) for module, name in ONCE_PER_PROCESS.items()}
    yield
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    sys.path[:] = path
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    if "hymba_align.processes.signals" in sys.modules:
        signals = sys.modules["hymba_align.processes.signals"]
        if signals.requested():
            signals._state = signals._State()
    if torch and numbers != (torch.get_num_threads(), torch.get_default_dtype()):
        torch.set_num_threads(numbers[0])
        torch.set_default_dtype(numbers[1])
    for module, name in ONCE_PER_PROCESS.items():
        getattr(sys.modules.get(module), name, set()).intersection_update(known[module])


@pytest.fixture(autouse=True)
def _in_repository(_as_it_was: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their files from here."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def withheld() -> Callable[[], AbstractContextManager[None]]:
    """A context in which real items of GPQA are handled: pytest shows the arguments of all functions that an error passed."""

    @contextlib.contextmanager
    def only_the_kind() -> Iterator[None]:
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:  # the latter: pytest-timeout
            said = f"{type(error).__name__}; the rest is withheld, for it could quote an item"
            raise pytest.fail.Exception(said, pytrace=False) from None

    return only_the_kind


@pytest.fixture
def small_base() -> dict[str, Any]:
    """A base section of random weights, small enough to train in seconds."""
    return {
        "tokenizer": "data/arithmetic/tokenizer",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "v_head_dim": 32,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "num_memory_tokens": 4,
            "sliding_window": 16,
            "global_attn_idx": [0],
            "kv_reuse_group": [],
        },
    }


@pytest.fixture
def small_config() -> HymbaConfig:
    """Two local layers that share keys between two global ones; a window that short texts already leave."""
    from hymba_align.model import HymbaConfig

    return HymbaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=1,
        v_head_dim=16,
        num_memory_tokens=5,
        sliding_window=6,
        global_attn_idx=[0, 4],
        kv_reuse_group=[[1, 2, 3]],
        mamba_d_state=4,
        mamba_dt_rank=3,
        max_position_embeddings=128,
        orig_max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture
def small_model(small_config: HymbaConfig) -> HymbaForCausalLM:
    import torch

    from hymba_align.model import HymbaForCausalLM

    torch.manual_seed(0)
    return HymbaForCausalLM(small_config).eval()
