"""Whether a recipe has room: memory of a device and of the disk, stage by stage, and whether what it names can be had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hymba_align import hub
from hymba_align.checkpoint import base_config, checkpoint_config
from hymba_align.doctor.findings import Finding
from hymba_align.errors import HymbaAlignError
from hymba_align.hardware import ROOM, Hardware
from hymba_align.memory import Adapters, Setting, Shape, estimate, gib
from hymba_align.model import HymbaConfig
from hymba_align.processes.engines import requested_engine
from hymba_align.recipe import Recipe, TrainingStage, is_local_path
from hymba_align.run.folder import run_root
from hymba_align.train.common import load_start_tokenizer
from hymba_align.train.settings import trainer_settings

MOMENT_BYTES = 8  # of AdamW's two, in float32, as checkpoints keep them
ADAPTER_BYTES = 4
ROWS_OF_TRAINER = 8  # transformers' default micro-batch


def room_findings(recipe: Recipe, hardware: Hardware) -> list[Finding]:
    """Memory of each training stage, disk of the whole run, and the hub where the recipe needs it.

    Of GPUs that are assumed, memory alone: hub and disk are those of another machine.
    """
    assumed = hardware.assumed is not None
    found = [] if assumed else hub_findings(recipe)
    recipe = _on_gpus(recipe) if assumed else recipe
    try:
        shape = Shape.of(_config(recipe))
    except HymbaAlignError as error:
        return [*found, Finding("base", "wrong", str(error))]
    for stage in recipe.training_stages:
        setting = stage_setting(recipe, stage, on_cpu=hardware.on_cpu)
        found.append(_memory_finding(stage, shape, setting, hardware))
    processes = recipe.launch.num_processes
    if processes > hardware.devices and hardware.gpus:
        found.append(
            Finding(
                "processes",
                "wrong",
                f"launch.num_processes is {processes}, and there "
                + ("is 1 GPU" if hardware.devices == 1 else f"are {hardware.devices} GPUs"),
                f"launch.num_processes={hardware.devices}, and as many times more gradient_accumulation_steps",
            )
        )
    return found if assumed else [*found, disk_finding(recipe, shape, hardware)]


def _on_gpus(recipe: Recipe) -> Recipe:
    """The recipe with what its trainers would take by default on GPUs with bfloat16, whatever is here."""
    changed: dict[str, Any] = {}
    for stage in recipe.training_stages:
        section = getattr(recipe, stage)
        trainer = {"use_cpu": False, "bf16": not section.trainer.get("fp16", False), **section.trainer}
        changed[stage] = section.model_copy(update={"trainer": trainer})
    return recipe.model_copy(update=changed)


def _config(recipe: Recipe) -> HymbaConfig:
    """The base's configuration; of a repository on the hub, whose file nobody fetches, that of the released model."""
    base = recipe.base
    if base.model is None:
        return base_config(base, load_start_tokenizer(recipe, None))
    return checkpoint_config(base.model) if is_local_path(base.model) else HymbaConfig()


def stage_setting(recipe: Recipe, stage: TrainingStage, *, on_cpu: bool) -> Setting:
    """What of a stage decides about memory; rows count as full, and all of their tokens as trained on."""
    settings: dict[str, Any] = trainer_settings(recipe, stage)
    section, lora = getattr(recipe, stage), recipe.lora_for(stage)
    row_tokens = getattr(section, "row_tokens", None)
    weight_bytes = 2 if recipe.base.dtype == "bfloat16" else 4
    has_reference = stage == "dpo" and lora is None and not settings["precompute_ref_log_probs"]
    engine: Any = requested_engine(recipe.launch)
    return Setting(
        batch=settings.get("per_device_train_batch_size", ROWS_OF_TRAINER),
        row_tokens=row_tokens or section.max_length * (2 if stage == "dpo" else 1),
        accumulation=settings.get("gradient_accumulation_steps", 1),
        references=int(has_reference),
        weight_bytes=weight_bytes,
        compute_bytes=2 if settings["bf16"] or settings.get("fp16") else weight_bytes,
        moments=0 if "sgd" in str(settings.get("optim", "")) else 2,
        checkpointing=bool(settings["activation_checkpointing"]),
        engine=engine,
        processes=recipe.launch.num_processes,
        on_cpu=on_cpu,
        pairs=stage == "dpo",
        rows_of_pairs=row_tokens is not None,
        adapters=Adapters.of(lora, frozen_bytes=weight_bytes) if lora is not None else None,
    )


def _memory_finding(stage: TrainingStage, shape: Shape, setting: Setting, hardware: Hardware) -> Finding:
    """Pairs of a batch are seldom all as long as they may be, so that too many for that are only a note."""
    device = "this machine" if hardware.on_cpu else "a GPU"
    needed, one = (estimate(shape, each) for each in (setting, replace(setting, batch=1)))
    # Processes of one machine without GPUs share its memory.
    shared = setting.processes if hardware.on_cpu else 1
    room = ROOM * hardware.device_bytes
    taken = (
        f"{shared} processes x {gib(needed.total)} = {gib(shared * needed.total)}" if shared > 1 else gib(needed.total)
    )
    value = f"about {taken} of {gib(hardware.device_bytes)} GiB of {device}"
    parts = f"({'each: ' if shared > 1 else ''}{needed.parts_in_words()})"
    if shared * needed.total <= room:
        return Finding(f"{stage}: memory", "ok", f"{value} {parts}")
    if setting.pairs and not setting.rows_of_pairs and shared * one.total <= room:
        value = f"{value} if all {setting.batch} pairs of a batch are as long as max_length {parts}"
        fix = f"{stage}.row_tokens bounds a batch's tokens, {stage}.max_length a pair's"
        return Finding(f"{stage}: memory", "note", value, fix)
    fix = (
        f"{stage}.trainer.per_device_train_batch_size, {stage}.max_length, lora or launch: see 'hymba-align init NAME'"
    )
    return Finding(f"{stage}: memory", "wrong", f"{value} {parts}", fix)


def disk_finding(recipe: Recipe, shape: Shape, hardware: Hardware) -> Finding:
    """Checkpoints (one more than are kept, while it is written), the final weights of each stage, and a random base."""
    weight_bytes = 2 if recipe.base.dtype == "bfloat16" else 4
    parts: dict[str, float] = {}
    if recipe.base.model is None:
        parts["base"] = shape.parameters * weight_bytes
    for stage in recipe.training_stages:
        settings, lora = trainer_settings(recipe, stage), recipe.lora_for(stage)
        trained = shape.parameters
        weights = trained * weight_bytes
        if lora is not None:
            trained = Adapters.of(lora, frozen_bytes=weight_bytes).parameters(shape)
            weights = trained * ADAPTER_BYTES
        state = 0 if settings.get("save_only_model") else trained * MOMENT_BYTES
        kept = 0 if settings["save_strategy"] == "no" else (settings["save_total_limit"] or 5) + 1
        parts[f"{stage} checkpoints"] = kept * (weights + state)
        parts[f"{stage}/final"] = weights
    needed = sum(parts.values())
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    value = f"about {gib(needed)} of {gib(hardware.disk_free_bytes)} GiB free for {run_root(recipe)} ({listed})"
    if needed <= hardware.disk_free_bytes:
        return Finding("disk", "ok", value)
    return Finding("disk", "wrong", value, "output_dir=FOLDER on another disk, or trainer.save_total_limit=1")


def hub_findings(recipe: Recipe) -> list[Finding]:
    """One for each thing that the recipe takes from the hub: in the cache, within reach, or neither."""
    found = []
    for what, name, kind in _on_hub(recipe):
        if hub.is_cached(name, kind):
            found.append(Finding(f"{what}: {name}", "ok", "in the cache"))
        elif hub.is_forbidden():
            fix = "unset HF_HUB_OFFLINE, or name a folder that is here"
            found.append(
                Finding(f"{what}: {name}", "wrong", "not in the cache, and HF_HUB_OFFLINE forbids to fetch it", fix)
            )
        else:
            problem = hub.hub_problem(name, kind)
            status: Any = "ok" if problem is None else "wrong"
            found.append(Finding(f"{what}: {name}", status, problem or "on the hub, which answers"))
    return found


def _on_hub(recipe: Recipe) -> list[tuple[str, str, hub.Kind]]:
    names: list[tuple[str, str | None, hub.Kind]] = [
        ("base.model", recipe.base.model, "model"),
        ("base.tokenizer", recipe.base.tokenizer, "model"),
    ]
    for stage in recipe.training_stages:
        for source in recipe.data_for(stage).all_sources:
            if "://" not in source.path:
                names.append((f"{stage}.data", source.path, "dataset"))
    return [(what, name, kind) for what, name, kind in names if name is not None and not is_local_path(name)]
