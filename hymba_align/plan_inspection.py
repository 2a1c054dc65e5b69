"""What a recipe's section `inspect` comes to for a stage: what is compared, which data is read, which tasks are scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hymba_align.errors import RecipeError
from hymba_align.inspect_choices import is_text_file
from hymba_align.recipe import DataSection, Recipe, TrainingStage, resolved_eval, test_file_beside
from hymba_align.recipe_eval import EvalSection, Stage
from hymba_align.recipe_inspect import InspectSection
from hymba_align.recipe_loading import load_section
from hymba_align.secrets import shown, without_secrets

OF_ROWS = ("format", "columns", "roles", "convert", "examples_per_conversation", "question_format", "storage_options")
"""Keys of a source that say how its rows are read, whichever file they are in"""


def section_of(recipe: Recipe) -> InspectSection:
    """The section `inspect` of a recipe that has one."""
    assert recipe.inspect is not None, "the recipe has no section inspect"
    return recipe.inspect


def compared_with(recipe: Recipe, stage: Stage) -> Stage | None:
    """The stage whose checkpoint a stage's is compared with; None for no comparison.

    Raises: RecipeError where nothing but a comparison is asked for.
    """
    section = section_of(recipe)
    against = section.against
    if stage == "base" or against == "none":
        if set(section.parts) == {"alignment"}:
            raise RecipeError(_nothing_to_compare(stage))
        return None
    before: tuple[Stage, ...] = ("base", *recipe.training_stages[: recipe.training_stages.index(stage)])
    return before[0] if against == "base" else before[-1]


def _nothing_to_compare(stage: Stage) -> str:
    """Why a comparison alone cannot be had, and what to do."""
    asked = "inspect.parts asks for alignment alone, which compares with an earlier checkpoint"
    if stage == "base":
        return f"{asked}, and none is before base; ask for other parts, or name later stages with inspect.stages"
    return (
        f"{asked}, and inspect.against is none; set inspect.against to previous or base, or ask for other parts as well"
    )


def data_of(recipe: Recipe, stage: Stage) -> tuple[DataSection | None, bool]:
    """What an inspection of the stage reads, and whether only the rows that are kept for validation count.

    That is the file that is named; or what the stage's data keeps for validation; or the test.jsonl beside that data. None
    where costs alone are asked for, which takes no texts.

    Raises: RecipeError where there is none of them.
    """
    section, data = section_of(recipe), data_for(recipe, stage)
    if section.data is not None:
        return _like(data, section.data), False
    if set(section.parts) == {"cost"}:
        return None, False
    if data is not None and data.validation_fraction:
        return data, True
    test = test_file_beside(data) if data is not None else None
    if data is None or test is None or Path(test) == Path(data.path):
        raise RecipeError(_nothing_to_read(recipe, stage, data))
    return _like(data, test), False


def _nothing_to_read(recipe: Recipe, stage: Stage, data: DataSection | None) -> str:
    """Why there is nothing that an inspection could read, and what to do."""
    out = "leave the look inside out with inspect=null"
    if data is None:
        return (
            f"inspect.data is not set, and there is no other data to look at {stage} with; set it to a file, or {out}"
        )
    owner = stage if stage != "base" else "the recipe"
    beside = f" and no other test.jsonl lies beside {shown(data.path)}" if data.path else ""
    key = "data" if recipe.data is not None else f"{stage}.data"
    return (
        f"inspect.data is not set, {owner} keeps no rows for validation{beside}; set inspect.data to a file that is not "
        f"trained on, keep rows with {key}.validation_fraction=0.05, or {out}"
    )


def preferences_of(recipe: Recipe) -> DataSection | None:
    """Where pairs of answers are from; None where they are those of the data."""
    path = section_of(recipe).preferences
    if path is None:
        return None
    return _like(data_for(recipe, "dpo") if recipe.dpo is not None else None, path)


def tasks_of(recipe: Recipe) -> EvalSection | None:
    """How the tasks of the section are scored: as the recipe's section `eval` says; None where there are none."""
    tasks = section_of(recipe).tasks
    if not tasks:
        return None
    section = recipe.eval if recipe.eval is not None else EvalSection()
    return resolved_eval(recipe.model_copy(update={"eval": section.model_copy(update={"tasks": tasks})}))


def settings_that_count(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What an inspection depends on besides checkpoints and the contents of files."""
    from hymba_align.eval.inputs import grader, protocol

    data, held_out = data_of(recipe, stage)
    preferences, scoring = preferences_of(recipe), tasks_of(recipe)
    return {
        "section": section_of(recipe).model_dump(mode="json", exclude={"stages"}),
        "held_out": held_out,
        "data": [
            without_secrets(one.model_dump(mode="json", exclude={"workers"}))
            for one in (data, preferences)
            if one is not None
        ],
        "tasks": [[protocol(scoring, task), grader(task)] for task in scoring.tasks] if scoring is not None else [],
        "seed": recipe.seed,
        "chat_template": recipe.base.chat_template,
    }


def contents_of(recipe: Recipe, stage: Stage) -> Iterator[tuple[str, str | None]]:
    """Names of the files that an inspection reads besides checkpoints and tasks, and digests of what they hold."""
    from hymba_align.data.unchanged import contents
    from hymba_align.files import file_digest

    domains = (DataSection(path=path) for path in section_of(recipe).domains.values())
    for section in (data_of(recipe, stage)[0], preferences_of(recipe), *domains):
        if section is not None and is_text_file(section.path):
            yield section.path, file_digest(Path(section.path).expanduser())
        elif section is not None:
            yield from contents(section)


def in_words(recipe: Recipe, stage: Stage) -> str:
    """The data, and with what the stage is compared."""
    data, held_out = data_of(recipe, stage)
    names = ", ".join(shown(source.path) for source in data.all_sources) if data is not None else "no texts"
    other = compared_with(recipe, stage)
    return f"{'held-out rows of ' if held_out else ''}{names}{f', against {other}' if other is not None else ''}"


def keys_of_run(checkpoint: str, path: str, *, of_pairs: bool = False) -> tuple[dict[str, Any], str]:
    """How a run reads the rows of its data, for a checkpoint that is one of its `final`; and words about it for people.

    No function of the recipe is called: a converter is left out. Nothing, without words, where there is no recipe.

    Args:
        path: of the file that is to be read so.
        of_pairs: the keys of its DPO data, where it has any.
    """
    final = Path(checkpoint).expanduser()
    written = final.parent.parent / "recipe.yaml"
    if final.name != "final" or not written.is_file():
        return {}, ""
    prefix = "preferences" if of_pairs else "data"
    otherwise = f"rows of {path} are read by what they hold, and {prefix}.KEY=VALUE says otherwise"
    try:
        recipe = load_section(Recipe, written)
    except RecipeError as error:
        return {}, f"{written} cannot be read as a recipe ({error}): {otherwise}"
    stages = recipe.training_stages
    stage = "dpo" if of_pairs and "dpo" in stages else final.parent.name
    data = recipe.data_for(stage) if stage in stages else recipe.data
    if data is None:
        return {}, ""
    if data.sources:
        return {}, f"{written} has several sources of data: {otherwise}"
    keys = data.model_dump(
        mode="json", exclude_defaults=True, include={*OF_ROWS, "loss_on"} - {"convert", "storage_options"}
    )
    unused = f"; its converter {data.convert} is not called" if data.convert is not None else ""
    if not keys and not unused:
        return {}, ""
    names = f" ({', '.join(keys)})" if keys else ""
    return keys, f"Rows of {path} are read as {written} says{names}{unused}; {prefix}.KEY=VALUE says otherwise"


def data_for(recipe: Recipe, stage: Stage) -> DataSection | None:
    """The data of a stage; of the base, that of the first stage."""
    stages: tuple[TrainingStage, ...] = recipe.training_stages
    if stage != "base":
        return recipe.data_for(stage)
    return recipe.data_for(stages[0]) if stages else recipe.data


def _like(data: DataSection | None, path: str) -> DataSection:
    """A file whose rows are read as those of the data are, where that is one source."""
    if data is None:
        return DataSection(path=path)
    given = data.model_dump(exclude_unset=True, include={*OF_ROWS} if not data.sources else set())
    return DataSection.model_validate({**given, "path": path, "loss_on": data.loss_on, "over_long": data.over_long})
