"""The step `inspect/<stage>` of a run: checked before the first stage, and done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hymba_align.checkpoint import base_config, checkpoint_config
from hymba_align.data.unchanged import changed
from hymba_align.errors import ChangedDataError, DataFileError
from hymba_align.inside.faults import Called
from hymba_align.inside.inspecting import inspect_checkpoint
from hymba_align.inside.output import NUMBERS, PAGE, write
from hymba_align.inside.result import Inspection
from hymba_align.inside.settings import READS_TEXTS, InspectSettings, check_settings, read_texts_for
from hymba_align.inside.texts import rows_fit
from hymba_align.plan import Step, inspected_contents
from hymba_align.plan_inspection import compared_with, data_for, data_of, preferences_of, section_of, tasks_of
from hymba_align.recipe import DataSection, Recipe, is_local_path
from hymba_align.recipe_eval import Stage
from hymba_align.run.folder import RunFolder

if TYPE_CHECKING:
    from hymba_align.model import HymbaConfig


def settings_of(recipe: Recipe, stage: Stage, checkpoint: str, against: str | None = None) -> InspectSettings:
    """What the section `inspect` asks of a stage's checkpoint. Raises: RecipeError where no data is left for it."""
    section = section_of(recipe)
    data, held_out = data_of(recipe, stage)
    return InspectSettings(
        checkpoint=checkpoint,
        against=against,
        data=data if held_out else _joined_where_they_can_be(data),
        held_out=held_out,
        preferences=_joined_where_they_can_be(preferences_of(recipe)),
        domains=section.domains,
        scoring=tasks_of(recipe),
        parts=section.parts,
        documents=section.documents,
        max_length=section.max_length,
        layers=section.layers,
        contexts=section.contexts,
        batch_size=section.batch_size,
        seed=recipe.seed,
        chat_template=recipe.base.chat_template,
        called=called_in(recipe, stage),
    )


def _joined_where_they_can_be(data: DataSection | None) -> DataSection | None:
    """A file whose rows are joined to conversations as the stage's are, unless they are no questions and answers."""
    if data is None or data.examples_per_conversation == 1 or not is_local_path(data.path) or rows_fit(data):
        return data
    alone = data.model_copy(update={"examples_per_conversation": 1})
    return alone if rows_fit(alone) else data


def called_in(recipe: Recipe, stage: Stage) -> Called:
    """What an inspection of the stage calls the keys by which its files are read."""
    stages = recipe.training_stages
    owner = stage if stage != "base" else next(iter(stages), None)
    return Called(
        data=_keys_of(data_for(recipe, stage), owner),
        preferences=_keys_of(recipe.data_for("dpo"), "dpo") if recipe.dpo is not None else None,
        option="inspect.",
    )


def _keys_of(data: DataSection | None, stage: Stage | None) -> str | None:
    """What stands before the keys by which a file is read as a stage's data is; None where none are, as in `_like`."""
    if data is None or data.sources:
        return None
    return f"{stage}.data." if stage is not None else "data."


def check_inspection(recipe: Recipe, stage: Stage, *, ask_hub: bool) -> None:
    """Raises the UsageError of what is wrong with the section `inspect`, as far as that can be known before training.

    Args:
        ask_hub: whether what is on the hub is fetched, and so checked too.
    """
    from hymba_align.train.common import load_start_tokenizer, quiet_libraries

    against, base = compared_with(recipe, stage), recipe.base
    other = f"the {against} checkpoint" if against is not None else None
    settings = settings_of(recipe, stage, f"the {stage} checkpoint", other)
    for key, data in (("data", settings.data), ("preferences", settings.preferences)):
        path = getattr(section_of(recipe), key)
        if path is not None and data is not None and not _is_there(data):
            raise DataFileError(f"inspect.{key} is {path}, which does not exist; correct it")
    names = [name for name in (base.model, base.tokenizer or base.model) if name is not None]
    if not ask_hub and not all(map(is_local_path, names)):
        return
    with quiet_libraries():
        tokenizer = load_start_tokenizer(recipe, None)
        config: HymbaConfig = (
            base_config(base, tokenizer) if base.model is None else checkpoint_config(base.model, base.revision)
        )
        check_settings(settings, config)
        sections = [section for section in (settings.data, settings.preferences) if section is not None]
        here = all(is_local_path(source.path) for section in sections for source in section.all_sources)
        if READS_TEXTS.intersection(settings.parts) and (ask_hub or here):
            read_texts_for(settings, config, tokenizer)
    if settings.scoring is not None:
        from hymba_align.eval.inputs import check_tasks

        check_tasks(settings.scoring, settings.scoring.tasks, context=config.max_position_embeddings, ask_hub=ask_hub)


def _is_there(data: DataSection) -> bool:
    from glob import has_magic
    from pathlib import Path

    return all(
        not is_local_path(source.path) or has_magic(source.path) or Path(source.path).expanduser().exists()
        for source in data.all_sources
    )


def inspect_stage(
    recipe: Recipe, folder: RunFolder, step: Step, checkpoint: str, against: str | None, say: Callable[[str], None]
) -> Inspection:
    """The inspection of a step, written to the run folder with a manifest that holds its summary.

    Raises: UsageError, as `inspect_checkpoint`; ChangedDataError where a file changed since the step was planned.
    """
    folder.mark_started(step.name, step.fingerprint)
    output = folder.stage_dir(step.name)
    settings = settings_of(recipe, step.stage, checkpoint, against)
    for given, read in (
        (data_of(recipe, step.stage)[0], settings.data),
        (preferences_of(recipe), settings.preferences),
    ):
        if given is not None and given != read:
            say(
                f"examples_per_conversation is left out: the rows of {given.path} are no questions and answers to be joined"
            )
    inspection = inspect_checkpoint(replace(settings, output=output), say)
    for begun_with, now in zip(step.contents, inspected_contents(recipe, step.stage), strict=True):
        if now != begun_with:
            raise ChangedDataError(changed(begun_with[0]))
    write(inspection, output)
    details = {
        "checkpoint": checkpoint,
        "against": against,
        "inputs": step.start_fingerprint,
        "seconds": sum(inspection.seconds.values()),
        "summary": summary_values(inspection),
    }
    folder.mark_complete(step.name, step.fingerprint, details, (PAGE, NUMBERS))
    return inspection


def summary_values(inspection: Inspection) -> dict[str, Any]:
    """The summary as the manifest of the step has it, for the run's report."""
    from hymba_align.inside.summary import summary

    return asdict(summary(inspection))
