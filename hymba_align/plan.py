"""What a recipe comes to: its steps in order, each with a fingerprint of all that enters it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import hymba_align
from hymba_align.files import fingerprint, path_digest
from hymba_align.processes.engines import settings_that_count
from hymba_align.recipe import EvalSection, Recipe, Stage, TrainingStage, resolved_eval
from hymba_align.run.folder import run_root
from hymba_align.secrets import shown, without_secrets

# Trainer settings that no weight depends on (but for rounding), so that changing one does not train again, and a stage that
# ran out of memory or time continues with it. Not `use_cpu`: on a machine with a GPU it also decides whether bf16 trains.
COSMETIC = frozenset(
    {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "activation_offloading",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_bucket_cap_mb",
        "ddp_timeout",
        "disable_tqdm",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "project",
        "report_to",
        "run_name",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "torch_empty_cache_steps",
    }
)
# Settings that say how the global batch is divided.
BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
BATCH_SIZE_OF_TRAINER = 8  # transformers' default; a test compares


@dataclass(frozen=True)
class Step:
    """One unit of work: a training stage, or the scoring of one (`name` is then `eval/<stage>`)."""

    name: str
    stage: Stage
    data: str
    start: str | None
    """Checkpoint that the step reads; None for the recipe's base section."""
    fingerprint: str
    contents: tuple[tuple[str, str | None], ...]
    """Names of what it reads besides, and digests of what they held at planning"""
    start_fingerprint: str
    """Of what the checkpoint that it reads was made from"""

    @property
    def trains(self) -> bool:
        return not self.name.startswith("eval/")


def plan(recipe: Recipe) -> list[Step]:
    """The recipe's steps in order, each with the fingerprint of all that enters it."""
    from hymba_align.data.unchanged import contents

    root = run_root(recipe)
    base = recipe.base
    previous = fingerprint(
        {
            "version": hymba_align.__version__,
            "seed": recipe.seed,
            "base": base.model_dump(mode="json"),
            "files": [path_digest(base.model), path_digest(base.tokenizer), path_digest(base.chat_template)],
        }
    )
    start: str | None = None
    steps = []
    if "base" in recipe.scored_stages:
        steps.append(_scoring_step(recipe, "base", start, previous))
    for stage in recipe.training_stages:
        data = recipe.data_for(stage)
        rows = tuple(contents(data))
        made_from = fingerprint({"previous": previous, "contents": rows, **_stage_inputs(recipe, stage)})
        names = ", ".join(shown(source.path) for source in data.all_sources)
        steps.append(Step(stage, stage, names, start, made_from, rows, previous))
        previous = made_from
        start = str(root / stage / "final")
        if stage in recipe.scored_stages:
            steps.append(_scoring_step(recipe, stage, start, previous))
    return steps


def _stage_inputs(recipe: Recipe, stage: TrainingStage) -> dict[str, Any]:
    """What a training stage's weights depend on, besides the rows and the checkpoint that it starts from.

    Not the guard: a stage that it stopped continues from its checkpoint with another one. What "skip" left out of a complete
    stage is told whenever that is skipped.
    """
    data, section = recipe.data_for(stage), getattr(recipe, stage)
    return {
        "section": section.model_dump(mode="json", exclude={"data": True, "guard": True, "trainer": COSMETIC | BATCH}),
        "data": without_secrets(data.model_dump(mode="json", exclude={"workers"})),
        "batch": _global_batch(recipe, stage),
        "launch": settings_that_count(recipe.launch),
    }


def _global_batch(recipe: Recipe, stage: TrainingStage) -> int | list[Any]:
    """How many rows a step takes from all processes together. Only the product counts: it may be divided anew.

    Where what a process gets depends on what the others get (`batch_rebalance`), every factor counts.
    """
    trainer = getattr(recipe, stage).trainer
    per_step = trainer.get("gradient_accumulation_steps", 1)
    factors = [recipe.launch.num_processes, trainer.get("per_device_train_batch_size", BATCH_SIZE_OF_TRAINER), per_step]
    divisible = trainer.get("train_sampling_strategy", "random") in ("random", "sequential")
    if divisible and all(isinstance(factor, int) for factor in factors):
        return prod(factors)
    return factors


def _scoring_step(recipe: Recipe, stage: Stage, start: str | None, checkpoint: str) -> Step:
    section = resolved_eval(recipe)
    files = file_contents(section)
    inputs = {
        "checkpoint": checkpoint,
        "section": section.model_dump(mode="json", exclude={"stages"}),
        "files": [digest for _, digest in files],
    }
    data = ", ".join(f"{task}: {section.gsm8k.test_path or 'from the hub'}" for task in section.tasks)
    return Step(f"eval/{stage}", stage, data, start, fingerprint(inputs), files, checkpoint)


def file_contents(section: EvalSection) -> tuple[tuple[str, str | None], ...]:
    """The files that scoring reads, with digests of what they hold now."""
    paths = (section.gsm8k.train_path, section.gsm8k.test_path)
    return tuple((str(path), path_digest(path)) for path in paths)
