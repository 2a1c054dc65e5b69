"""The files of accelerate_configs/ as accelerate itself understands them, and as hymba-align finds and applies them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from torch import nn

from hymba_align.processes import engines
from hymba_align.recipe import Launcher, LaunchSection

if TYPE_CHECKING:
    from hymba_align.model import HymbaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
NAMES = get_args(Launcher)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch):
    """Applies an engine to an environment that ends with the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return lambda name: engines.use_engine(LaunchSection(launcher=name))


def test_every_launcher_has_a_file_and_every_file_is_a_launcher() -> None:
    assert sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_file_ask_for_the_same_engine_and_decide_nothing_else(name: str) -> None:
    by_name = LaunchSection(launcher=name)  # type: ignore[arg-type]
    by_file = LaunchSection(accelerate_config=f"accelerate_configs/{name}.yaml")

    assert engines.requested_engine(by_name) == engines.requested_engine(by_file) == name.removeprefix("multi_node_")
    assert engines.settings_that_count(by_file) == {}
    assert engines.machines(by_name) == (2 if name.startswith("multi_node_") else 1)


@pytest.mark.parametrize("name", [name for name in NAMES if "zero" in name])
def test_accelerate_builds_the_deepspeed_plugin_that_a_name_says(name: str, applied) -> None:
    from accelerate.utils import DeepSpeedPlugin

    applied(name)
    plugin = DeepSpeedPlugin()

    assert plugin.zero_stage == int(name.removesuffix("_offload")[-1])
    assert plugin.is_zero3_init_enabled() is False
    for part in ("offload_optimizer", "offload_param"):
        device = plugin.hf_ds_config.get_value(f"zero_optimization.{part}.device")
        assert device == ("cpu" if name.endswith("offload") else None)


@pytest.mark.parametrize("name", [name for name in NAMES if "fsdp2" in name])
def test_accelerate_builds_the_fsdp_plugin_that_wraps_every_layer_of_the_model(
    name: str, applied, small_model: HymbaForCausalLM
) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import StateDictType

    applied(name)
    plugin = FullyShardedDataParallelPlugin()

    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(small_model)
    layers = small_model.model.layers
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {cls.__name__ for cls in wrapped} == set(small_model._no_split_modules or ())
    assert wrapped == {type(layer) for layer in layers}
    assert not isinstance(layers[0], nn.ModuleList)


@pytest.mark.parametrize("name", ["ddp", "multi_node_ddp", "single"])
def test_plain_engines_leave_no_other_engine_in_the_environment(name: str, applied) -> None:
    applied("zero3")
    applied(name)

    assert not [key for key in os.environ if key.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_"))]


def test_a_file_of_ones_own_names_its_deepspeed_file_from_the_directory_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate_configs").mkdir()
    own = tmp_path / "accelerate_configs" / "zero2.yaml"
    own.write_text((ROOT / "accelerate_configs" / "zero2.yaml").read_text())
    monkeypatch.chdir(tmp_path)

    found = engines.deepspeed_file(engines.read_engine_file(own), own)

    assert found == Path("accelerate_configs/deepspeed/zero2.json")
    shipped = engines.FOLDER / "zero2.yaml"
    assert engines.deepspeed_file(engines.read_engine_file(shipped), shipped) == engines.FOLDER / "deepspeed/zero2.json"


def test_the_files_come_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = ROOT / "hymba_align"
    shipped = {path for pattern in settings["package-data"]["hymba_align"] for path in package.glob(pattern)}

    assert (package / "accelerate_configs").resolve() == ROOT / "accelerate_configs"
    files = [path for path in (package / "accelerate_configs").glob("**/*") if path.suffix in (".yaml", ".json")]
    assert len(files) == len(NAMES) + 4
    assert set(files) <= shipped
