"""What can be known about a recipe's inputs before a stage runs, and before anything of an earlier run is touched.

Data is prepared here already: preparation is the check that finds a malformed line, and the stage finds its result
in the cache.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hymba_align.adapters import check_adapters
from hymba_align.checkpoint import base_config, check_embeddings, check_is_hymba, checkpoint_config
from hymba_align.errors import DataFileError, Faults, LaunchError, RecipeError, TrainerError
from hymba_align.processes.engines import engine_name, machines, requested_engine, written_elsewhere
from hymba_align.processes.launch import check_gpus, inside_launcher, needs_launch, rank, scoring_processes
from hymba_align.processes.slurm import slurm_step
from hymba_align.recipe import Recipe, TrainingStage, is_local_path, resolved_eval
from hymba_align.run.folder import check_run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.data.prepare import Prepared
    from hymba_align.model import HymbaConfig

# Values that TRL 1.16 refuses only while it trains; delete a key when its configuration class refuses them.
CHOICES = {
    "sft.trainer.loss_type": ("nll", "dft"),
    "dpo.trainer.loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "dpo.trainer.f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}


def check_inputs(
    recipe: Recipe, stages: Sequence[TrainingStage], *, scores: bool, ask_hub: bool, whole: bool = True
) -> dict[TrainingStage, int]:
    """About how many text tokens each of the stages trains on, as far as that is known; writes nothing to the run folder.

    Raises the UsageError of whatever is wrong with the recipe or with what it names; of what several checks find that do
    not depend on each other, SeveralErrors. Data is read whole only where nothing else is wrong.

    Args:
        stages: those about to be trained, whose data is read.
        scores: whether anything is about to be scored.
        ask_hub: whether what is on the hub is fetched, and so checked too, and a grader has to be installed already.
        whole: False where something is known to be wrong already: of data only the first rows are read.
    """
    if rank() == 0:  # others could find the folder half made
        check_run_folder(recipe)
    check_sources(recipe, stages)
    faults = Faults()
    if scores:
        _check_test_files(recipe, faults)
    with faults.gathered():
        from hymba_align.model.kernels.choice import check_request

        check_request()
    tokenizer = context = None
    with faults.gathered():
        tokenizer = _base_tokenizer(recipe, ask_hub=ask_hub)
        context = _checked_context(recipe, tokenizer)
        _check_lengths(recipe, context)
    with faults.gathered():
        _check_launch(recipe, stages)
        check_adapters(recipe, _base_config(recipe, tokenizer), requested_engine(recipe.launch))
        for stage in recipe.training_stages:
            _check_settings(recipe, stage)
    if scores and not faults.errors:
        with faults.gathered():
            _check_eval(recipe, context, ask_hub=ask_hub)
    # One process reads the data for all.
    read = {}
    for stage in stages if rank() == 0 else ():
        with faults.gathered():
            if faults.errors or not whole:
                _check_columns(recipe, stage, ask_hub=ask_hub)
            else:
                read[stage] = _check_data(recipe, stage, tokenizer, ask_hub=ask_hub)
    if faults.errors:
        raise faults.together()
    return {stage: tokens for stage, tokens in read.items() if tokens is not None}


def check_sources(recipe: Recipe, stages: Sequence[TrainingStage]) -> None:
    """Raises the DataFileError of data that is not there, of all sources at once; what else is wrong may follow from it."""
    faults = Faults()
    for stage in stages:
        for place, source in enumerate(recipe.data_for(stage).all_sources):
            with faults.gathered():
                _check_exists(_source_key(recipe, stage, place), source.path)
    if faults.errors:
        raise faults.together()


def _check_test_files(recipe: Recipe, faults: Faults) -> None:
    """Gathers which files of the tasks are not there."""
    section = resolved_eval(recipe)
    for key, path in (
        ("gsm8k.test_path", section.gsm8k.test_path),
        ("gsm8k.train_path", section.gsm8k.train_path),
        ("gpqa.path", section.gpqa.path),
    ):
        if key.split(".")[0] in {task.split("_")[0] for task in section.tasks}:
            with faults.gathered():
                _check_exists(f"eval.{key}", path)


def _source_key(recipe: Recipe, stage: TrainingStage, place: int) -> str:
    """The key of the recipe that names a stage's source."""
    data = recipe.data_for(stage)
    general = recipe.data
    shared = general is not None and (general.path, general.sources) == (data.path, data.sources)
    key = f"sources[{place}].path" if data.sources else "path"
    return f"data.{key}" if shared else f"{stage}.data.{key}"


def _check_exists(key: str, path: str | None) -> None:
    if path is None or not is_local_path(path) or has_magic(path):
        return
    if not Path(path).expanduser().exists():
        raise DataFileError(f"{key} is {path}, which does not exist (looked for {Path(path).absolute()}); correct it")


def _base_tokenizer(recipe: Recipe, *, ask_hub: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of all stages; None where it is on the hub and nobody is to ask."""
    from hymba_align.train.common import load_start_tokenizer

    base = recipe.base
    if base.model is not None and (ask_hub or is_local_path(base.model)):
        check_is_hymba(base.model, base.revision)  # says more than a folder's missing tokenizer would
    name = base.tokenizer or base.model
    if not ask_hub and (name is None or not is_local_path(name)):
        return None
    return load_start_tokenizer(recipe, None)


def _checked_context(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The base model's context in text tokens, after checking its vocabulary; None where its configuration is on the hub."""
    base = recipe.base
    if base.model is None:
        return int(base_config(base, tokenizer).max_position_embeddings) if tokenizer is not None else None
    if not is_local_path(base.model):
        return None
    config = checkpoint_config(base.model)
    if tokenizer is not None:
        check_embeddings(base.model, config.vocab_size, tokenizer)
    return int(config.max_position_embeddings)


def _base_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> HymbaConfig | None:
    """The base model's configuration; None where it is on the hub."""
    base = recipe.base
    if base.model is not None:
        return checkpoint_config(base.model) if is_local_path(base.model) else None
    return base_config(base, tokenizer) if tokenizer is not None else None


def _check_lengths(recipe: Recipe, context: int | None) -> None:
    if context is None:
        return
    for stage in recipe.training_stages:
        max_length = getattr(recipe, stage).max_length
        if max_length > context:
            raise RecipeError(f"{stage}.max_length is {max_length}, above the model's context of {context}; lower it")


def _check_launch(recipe: Recipe, stages: Sequence[TrainingStage]) -> None:
    """Raises where another engine, or another number of processes, would train than the recipe asks for."""
    launch, engine = recipe.launch, requested_engine(recipe.launch)
    written = written_elsewhere(launch)
    if written is not None:
        raise LaunchError(
            f"{engine_name(launch)}, which sets {written}: it writes outside of the run folder; remove it"
        )
    if engine == "single" and launch.num_processes > 1:
        raise LaunchError(
            f"{engine_name(launch)}, which is one process (distributed_type NO), and launch.num_processes is "
            f"{launch.num_processes}; choose another file, or launch.launcher"
        )
    if stages and machines(launch) > 1 and not inside_launcher() and slurm_step() is None:
        raise LaunchError(
            f"{engine_name(launch)}, which is made for several machines; in Slurm submit recipes/hymba-1.5b/slurm.sh, "
            "elsewhere start on each machine 'torchrun --nnodes MACHINES --nproc_per_node GPUS --rdzv_backend c10d "
            "--rdzv_endpoint HOST_0:29500 -m hymba_align sft RECIPE' (then dpo)"
        )
    for stage in recipe.training_stages if engine.startswith("fsdp") else ():
        if getattr(recipe, stage).trainer.get("use_cpu", not torch.cuda.is_available()):
            raise LaunchError(
                f"{engine_name(launch)}, and {stage} computes on the CPU, where accelerate trains with plain DDP instead, or "
                "with processes that never meet; take a machine with GPUs, or launch.launcher=zero3"
            )


def _check_settings(recipe: Recipe, stage: TrainingStage) -> None:
    """Builds the stage's TRL configuration, which refuses what `trainer_settings` lets pass."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    from hymba_align.train.common import quiet_libraries
    from hymba_align.train.settings import trainer_arguments, trainer_settings

    settings = trainer_settings(recipe, stage)
    _check_choices(settings, stage)
    if inside_launcher():
        return  # building it would already connect the processes; the stage does so in a moment
    if needs_launch(recipe):
        # For processes on another device than this one, which only plans and must not take memory of the first GPU.
        section = getattr(recipe, stage)
        section = section.model_copy(update={"trainer": {**section.trainer, "use_cpu": True}})
        recipe = recipe.model_copy(update={stage: section})
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        trainer_arguments(recipe, stage, SFTConfig if stage == "sft" else DPOConfig, Path(folder))


def _check_choices(settings: Mapping[str, Any], stage: TrainingStage) -> None:
    for key, choices in CHOICES.items():
        name = key.removeprefix(f"{stage}.trainer.")
        given = settings.get(name, [])
        for value in given if isinstance(given, list) else [given]:
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"the nearest is '{near[0]}'" if near else f"it knows {', '.join(choices)}"
                raise TrainerError(f"{key} has the value '{value}', which TRL does not know; {hint}")
    if settings.get("fp16") and settings["use_cpu"]:
        raise TrainerError(f"{stage}.trainer.fp16 is true, and float16 training needs a GPU; remove it")


def _check_eval(recipe: Recipe, context: int | None, *, ask_hub: bool) -> None:
    from hymba_align.eval.inputs import check_tasks

    section = resolved_eval(recipe)
    check_gpus(scoring_processes(recipe))
    check_tasks(section, section.tasks, context=context, ask_hub=ask_hub)


def _check_columns(recipe: Recipe, stage: TrainingStage, *, ask_hub: bool) -> None:
    """Raises where the first rows of a stage's data show that it cannot be trained on."""
    from hymba_align.data.prepare import check_first_rows
    from hymba_align.train.common import quiet_libraries

    data = recipe.data_for(stage)
    if ask_hub or all(is_local_path(source.path) for source in data.all_sources):
        with quiet_libraries():
            check_first_rows(data, stage)


def _check_data(
    recipe: Recipe, stage: TrainingStage, tokenizer: PreTrainedTokenizerBase | None, *, ask_hub: bool
) -> int | None:
    """About how many tokens the stage trains on; None where the data is not read, or is a stream."""
    from hymba_align.data.prepare import prepare_preferences, prepare_sft
    from hymba_align.data.reading.sources import open_source
    from hymba_align.train.common import quiet_libraries

    data = recipe.data_for(stage)
    if not ask_hub and not all(is_local_path(source.path) for source in data.all_sources):
        return None
    with quiet_libraries():
        if tokenizer is None:
            for source in data.all_sources:
                next(open_source(source).chunks())
            return None
        prepare = prepare_sft if stage == "sft" else prepare_preferences
        prepared = prepare(data, tokenizer, getattr(recipe, stage).max_length, seed=recipe.seed)
        if data.streaming:
            next(iter(prepared.dataset))  # a stream is made only as far as it is read, and has a row or raises
        answers = getattr(recipe, stage).answers
        if answers is not None:
            from hymba_align.eval.matching import matcher
            from hymba_align.train.problems import choose_problems

            assert prepared.validation is not None, "the stage's settings were checked before"
            choose_problems(prepared.validation, tokenizer, answers, matcher(answers.match), stage)
        return None if data.streaming else _planned_tokens(recipe, stage, prepared)


def _planned_tokens(recipe: Recipe, stage: TrainingStage, prepared: Prepared) -> int:
    """Of all epochs, or of `max_steps`: then a row is taken to be full where rows are packed, else to be of mean length."""
    from hymba_align.train.settings import trainer_settings

    settings, section = trainer_settings(recipe, stage), getattr(recipe, stage)
    if settings.get("max_steps", -1) < 1:
        return round(prepared.total_tokens * settings["num_train_epochs"])
    full = section.max_length if settings.get("packing") else getattr(section, "row_tokens", None)
    row = full or prepared.total_tokens / max(len(prepared.dataset), 1)
    rows = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
    return round(settings["max_steps"] * rows * recipe.launch.num_processes * row)
