"""What a recipe comes to: its steps in order, each with a fingerprint of all that enters it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import hymba_align
from hymba_align import plan_inspection
from hymba_align.adapter_folder import digests_below
from hymba_align.files import fingerprint, path_digest
from hymba_align.processes.engines import settings_that_count
from hymba_align.recipe import Recipe, TrainingStage, resolved_eval
from hymba_align.recipe_eval import EvalSection, Stage
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
# Where the rows of a task come from that reads no local file.
WITHOUT_FILES = {"bfcl": "in bfcl-eval"}
BATCH_SIZE_OF_TRAINER = 8  # transformers' default; a test compares


@dataclass(frozen=True)
class Step:
    """One unit of work: a training stage, its scoring (`name` is then `eval/<stage>`) or a look inside (`inspect/<stage>`)."""

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
    against: Stage | None = None
    """The stage with whose checkpoint an inspection compares"""

    @property
    def kind(self) -> Literal["train", "score", "inspect"]:
        """What is done with the stage."""
        if self.name.startswith("eval/"):
            return "score"
        return "inspect" if self.name.startswith("inspect/") else "train"

    @property
    def trains(self) -> bool:
        """Whether the step trains; if not, it scores or inspects."""
        return self.kind == "train"

    @property
    def title(self) -> str:
        """`sft`, `score sft`, `inspect sft`."""
        return self.stage if self.trains else f"{self.kind} {self.stage}"


def plan(recipe: Recipe) -> list[Step]:
    """The recipe's steps in order, each with the fingerprint of all that enters it."""
    from hymba_align.data.unchanged import contents

    root = run_root(recipe)
    previous = base_fingerprint(recipe)
    start: str | None = None
    steps = []
    made: dict[Stage, tuple[str | None, str]] = {"base": (start, previous)}
    if "base" in recipe.scored_stages:
        steps.append(_scoring_step(recipe, "base", start, previous))
    if "base" in recipe.inspected_stages:
        steps.append(_inspecting_step(recipe, "base", made))
    for stage in recipe.training_stages:
        data = recipe.data_for(stage)
        rows = tuple(contents(data))
        made_from = fingerprint({"previous": previous, "contents": rows, **_stage_inputs(recipe, stage)})
        names = ", ".join(shown(source.path) for source in data.all_sources)
        steps.append(Step(stage, stage, names, start, made_from, rows, previous))
        previous = made_from
        start = str(root / stage / "final")
        made[stage] = (start, previous)
        if stage in recipe.scored_stages:
            steps.append(_scoring_step(recipe, stage, start, previous))
        if stage in recipe.inspected_stages:
            steps.append(_inspecting_step(recipe, stage, made))
    return steps


def base_fingerprint(recipe: Recipe) -> str:
    """Of all that the model which training starts from depends on."""
    base = recipe.base
    return fingerprint(
        {
            "version": hymba_align.__version__,
            "seed": recipe.seed,
            "base": base.model_dump(mode="json"),
            "files": [
                *(path_digest(name) for name in (base.model, base.tokenizer, base.chat_template)),
                *digests_below(base.model),
            ],
        }
    )


def _stage_inputs(recipe: Recipe, stage: TrainingStage) -> dict[str, Any]:
    """What a training stage's weights depend on, besides the rows and the checkpoint that it starts from.

    Not the guard: a stage that it stopped continues from its checkpoint with another one. What "skip" left out of a complete
    stage is told whenever that is skipped. Answers count where they choose the weights (`keep_best`); samples never do.
    """
    data, section = recipe.data_for(stage), getattr(recipe, stage)
    without: dict[str, Any] = {"data": True, "guard": True, "samples": True, "trainer": COSMETIC | BATCH}
    if section.answers is None or not section.answers.keep_best:
        without["answers"] = True
    lora = recipe.lora_for(stage)
    return {
        **({"lora": lora.model_dump(mode="json", exclude={"stages"})} if lora is not None else {}),
        "section": section.model_dump(mode="json", exclude=without),
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
    """Its fingerprint leaves out what changes no score: the batch size and the number of processes."""
    from hymba_align.eval.inputs import grader, protocol

    section = resolved_eval(recipe)
    files = file_contents(section)
    inputs = {
        "checkpoint": checkpoint,
        "suite": section.suite,
        "tasks": [protocol(section, task) for task in section.tasks],
        "graders": [grader(task) for task in section.tasks],
        "files": [digest for _, digest in files],
    }
    return Step(f"eval/{stage}", stage, _data_in_words(section), start, fingerprint(inputs), files, checkpoint)


def _data_in_words(section: EvalSection) -> str:
    """What each task is scored on: its last file, which holds the test; and the limit."""
    from hymba_align.eval.inputs import data_files

    words = []
    for task in section.tasks:
        files = data_files(section, task)
        words.append(f"{task}: {files[-1] if files else WITHOUT_FILES.get(task, 'from the hub')}")
    return ", ".join(words) + (f" (limit {section.limit:,})" if section.limit is not None else "")


def file_contents(section: EvalSection) -> tuple[tuple[str, str | None], ...]:
    """The local files that scoring reads, with digests of what they hold now."""
    from hymba_align.eval.inputs import data_files

    paths = {str(path) for task in section.tasks for path in data_files(section, task)}
    return tuple((path, path_digest(path)) for path in sorted(paths))


def _inspecting_step(recipe: Recipe, stage: Stage, made: Mapping[Stage, tuple[str | None, str]]) -> Step:
    """A step that looks into a stage's checkpoint.

    Args:
        made: of every stage so far, in order, its checkpoint and the fingerprint of what that was made from.
    """
    start, made_from = made[stage]
    other, files = plan_inspection.compared_with(recipe, stage), inspected_contents(recipe, stage)
    inputs = {
        "checkpoint": made_from,
        "against": made[other][1] if other is not None else None,
        "settings": plan_inspection.settings_that_count(recipe, stage),
        "files": files,
    }
    words = plan_inspection.in_words(recipe, stage)
    return Step(f"inspect/{stage}", stage, words, start, fingerprint(inputs), files, made_from, other)


def inspected_contents(recipe: Recipe, stage: Stage) -> tuple[tuple[str, str | None], ...]:
    """The files that an inspection reads, besides checkpoints, with digests of what they hold now."""
    scoring = plan_inspection.tasks_of(recipe)
    files = [*plan_inspection.contents_of(recipe, stage), *(file_contents(scoring) if scoring is not None else ())]
    return tuple(dict.fromkeys(files))
