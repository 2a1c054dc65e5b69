"""Trains a few jobs one after the other as processes of torchrun: `engine_choices.py JOBS OUTCOMES`.

A job is what a recipe asks for and what the environment holds. Written down is the engine that its trainer recorded, what
wraps the model, or the error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def run_job(recipe_file: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What came of one stage of SFT."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from hymba_align.errors import HymbaAlignError
    from hymba_align.processes.launch import use_what_is_there
    from hymba_align.recipe import load_recipe
    from hymba_align.train import sft
    from hymba_align.train.engine import running_engine

    unset_hf_deepspeed_config()
    seen: dict[str, Any] = {}
    run_stage = sft.run_stage

    def watched(trainer: Any, *given: Any) -> dict[str, float]:
        try:
            return run_stage(trainer, *given)
        finally:
            seen.update(wrapped=type(trainer.model_wrapped).__name__, read=running_engine(trainer))
            if seen["wrapped"] == "DeepSpeedEngine":
                trainer.model_wrapped.destroy()
            trainer.accelerator.free_memory()

    sft.run_stage = watched
    os.environ.update(job["environment"])
    try:
        sft.train_sft(use_what_is_there(load_recipe(recipe_file, job["overrides"])), None, folder)
        seen["record"] = json.loads((folder / "engine.json").read_text())
    except HymbaAlignError as error:
        seen["error"] = str(error)
    finally:
        sft.run_stage = run_stage
        for name in job["environment"]:
            del os.environ[name]
    gc.collect()
    return seen


def main() -> None:
    """Runs the jobs, in both processes alike."""
    import datasets
    import torch

    recipe_file, jobs, outcomes = sys.argv[1:]
    work = Path(outcomes).parent
    datasets.config.HF_DATASETS_CACHE = work / "cache"
    done = [
        run_job(recipe_file, job, work / f"job-{number}")
        for number, job in enumerate(json.loads(Path(jobs).read_text()))
    ]
    if os.environ["RANK"] == "0":
        Path(outcomes).write_text(json.dumps(done))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
