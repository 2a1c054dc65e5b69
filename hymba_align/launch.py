"""Processes: which one this is, how a stage gets several, and what a single one may use of the machine."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

from hymba_align.errors import HymbaAlignError
from hymba_align.recipe import Recipe
from hymba_align.run_folder import run_root

STARTED_BY_US = "HYMBA_ALIGN_LAUNCHED"
STOP_CHILDREN_S = 60.0


def inside_launcher() -> bool:
    """Whether torchrun, accelerate or DeepSpeed started this process (clusters set WORLD_SIZE on their own)."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """This process's number among those of its launcher; 0 without one."""
    return int(os.environ.get("RANK", "0")) if inside_launcher() else 0


def needs_launch(recipe: Recipe) -> bool:
    """Whether training stages run in processes that this one has to start."""
    return recipe.launch.accelerate_config is not None and not inside_launcher()


def launch_command(recipe: Recipe, stage: str) -> list[str]:
    """The command that starts a training stage with `launch.num_processes` processes."""
    return [
        "accelerate",
        "launch",
        "--config_file",
        str(recipe.launch.accelerate_config),
        "--num_processes",
        str(recipe.launch.num_processes),
        "-m",
        "hymba_align",
        stage,
        str(run_root(recipe) / "recipe.yaml"),
    ]


def launch(recipe: Recipe, stage: str) -> None:
    """Runs a stage in processes of its own. Raises: HymbaAlignError with their exit code when they fail."""
    command = launch_command(recipe, stage)
    # accelerate of this very interpreter, whatever `accelerate` the shell would find.
    command[:2] = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    with subprocess.Popen(command, env={**os.environ, STARTED_BY_US: "1"}) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal interrupted the whole group; killing the launcher at once would orphan its workers.
            process.wait(timeout=STOP_CHILDREN_S)
            raise
    if code != 0:
        error = HymbaAlignError(f"{stage} failed in its processes (exit code {code}); their messages are above")
        error.exit_code = code if code > 0 else 128 - code
        raise error


def use_one_gpu() -> None:
    """Hides all GPUs but the first: transformers would wrap the model in DataParallel, which is not what one process means.

    To be called before anything initialises CUDA, which reads the variable once.
    """
    import torch

    if torch.cuda.device_count() > 1 and not torch.cuda.is_initialized():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def free_gpu_memory() -> None:
    """Gives back what finished work of this process holds, for the processes about to start."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
