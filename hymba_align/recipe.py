"""One YAML file describes a run: base model, data, stages, scores.

Sections are frozen and strict: an unknown key, a wrong type or a value out of range is a `RecipeError` that names the
file, the key, the value and the nearest valid key. `key.path=value` overrides are applied before validation
(recipe_loading.py reads and reports). Here is the whole recipe and what follows from it; its larger sections have files
of their own (recipe_data.py, recipe_training.py, ...), and those names are offered here too.

Paths are relative to the directory in which the command runs, not to the recipe's own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hymba_align import secrets
from hymba_align.errors import RecipeError
from hymba_align.recipe_data import (
    COMPRESSION_SUFFIXES,
    DATA_SUFFIXES,
    DataSection,
    SchemaName,
    SourceSection,
    StageDataSection,
    has_data_suffix,
    is_local_path,
)
from hymba_align.recipe_eval import EvalSection, GSM8KSection, Stage
from hymba_align.recipe_inspect import InspectSection
from hymba_align.recipe_loading import Section, dump_yaml, load_section
from hymba_align.recipe_lora import LoraSection
from hymba_align.recipe_training import (
    AnswersSection,
    DPOGuardSection,
    DPOSection,
    GuardSection,
    SamplesSection,
    SFTSection,
)

__all__ = [
    "COMPRESSION_SUFFIXES",
    "DATA_SUFFIXES",
    "RUN_NAME",
    "STAGES",
    "TRAINING_STAGES",
    "AnswersSection",
    "BaseSection",
    "DPOGuardSection",
    "DPOSection",
    "DataSection",
    "GuardSection",
    "LaunchSection",
    "Launcher",
    "Recipe",
    "SFTSection",
    "SamplesSection",
    "SchemaName",
    "SourceSection",
    "StageDataSection",
    "TrainingStage",
    "gsm8k_paths",
    "is_local_path",
    "load_recipe",
    "resolved_eval",
    "test_file_beside",
]

TrainingStage = Literal["sft", "dpo"]
TRAINING_STAGES: tuple[TrainingStage, ...] = ("sft", "dpo")
STAGES: tuple[Stage, ...] = ("base", "sft", "dpo")
Launcher = Literal[
    "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2",
    "multi_node_ddp", "multi_node_zero2", "multi_node_zero3", "multi_node_fsdp2",
]  # fmt: skip
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class BaseSection(Section):
    """The model that training starts from: a checkpoint (`model`), or random weights of a given shape (`config`)."""

    model: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str = "hymba"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_source(self) -> BaseSection:
        if self.model is None and self.config is None:
            raise ValueError("it holds neither model (a checkpoint) nor config (random weights); set one of them")
        if self.model is not None and self.config is not None:
            raise ValueError("it holds both model and config; remove one of them")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config makes random weights, which come without a tokenizer; set base.tokenizer")
        if self.config is not None and self.revision is not None:
            raise ValueError("revision names a version of model, and there is no model; remove it")
        return self


class LaunchSection(Section):
    """How many processes train, on all machines together, and which engine joins them.

    `launcher` is a file of accelerate_configs/ by name; `accelerate_config` a file of one's own, in its place. Neither:
    this process trains alone. `grace_s` is the time from SIGTERM to SIGKILL on the cluster: two thirds of it for the step
    under way, the rest for its checkpoint.
    """

    launcher: Launcher | None = None
    accelerate_config: str | None = None
    num_processes: int = Field(default=1, ge=1)
    grace_s: float = Field(default=30.0, ge=5)

    @model_validator(mode="after")
    def _one_engine_for_all_processes(self) -> LaunchSection:
        if self.launcher is not None and self.accelerate_config is not None:
            raise ValueError("it holds both launcher and accelerate_config; remove one of them (or set it to null)")
        if self.num_processes > 1 and self.launcher is None and self.accelerate_config is None:
            raise ValueError(
                f"num_processes is {self.num_processes}, and nothing says how they work together; "
                "set launch.launcher (ddp, zero2, ...: accelerate_configs/README.md says which)"
            )
        if self.launcher == "single" and self.num_processes > 1:
            raise ValueError(
                f"launcher is single and num_processes is {self.num_processes}; set num_processes to 1, or launcher to ddp"
            )
        return self


class Recipe(Section):
    """A whole run. A stage's `data` holds what differs from the recipe's `data`; every other key of it applies."""

    name: str = Field(pattern=RUN_NAME)
    output_dir: str | None = None
    seed: int = Field(default=42, ge=0)
    base: BaseSection
    data: DataSection | None = None
    sft: SFTSection | None = None
    dpo: DPOSection | None = None
    lora: LoraSection | None = None
    eval: EvalSection | None = None
    inspect: InspectSection | None = None
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if not self.training_stages and self.eval is None and self.inspect is None:
            raise ValueError("the recipe has none of the sections sft, dpo, eval and inspect; add at least one")
        for stage in self.training_stages:
            own = self._stage_section(stage).data
            if self.data is None and own is None:
                raise ValueError(f"{stage} has no data; add a section data, or {stage}.data")
            if self.data is None and own is not None and not own.path and not own.sources:
                raise ValueError(f"{stage}.data has no path, and there is no section data; add {stage}.data.path")
            if self.data is not None and self.data.sources and own is not None and not own.path and not own.sources:
                for key in sorted(SourceSection.model_fields.keys() & own.model_fields_set - {"path"}):
                    raise ValueError(
                        f"{stage}.data.{key} is of one source, and data has several; give {stage}.data a path or sources of "
                        f"its own, which then replace those, or move {key} into one of data.sources"
                    )
        for adapted in (self.lora.stages or ()) if self.lora else ():
            if adapted not in self.training_stages:
                raise ValueError(
                    f"lora.stages names {adapted}, and there is no section {adapted}; add it or remove the name"
                )
        for scored in (self.eval.stages or ()) if self.eval else ():
            if scored not in ("base", *self.training_stages):
                raise ValueError(
                    f"eval.stages names {scored}, and there is no section {scored}; add it or remove the name"
                )
        for inspected in (self.inspect.stages or ()) if self.inspect else ():
            if inspected not in ("base", *self.training_stages):
                raise ValueError(
                    f"inspect.stages names {inspected}, and there is no section {inspected}; add it or remove the name"
                )
        return self

    def _stage_section(self, stage: TrainingStage) -> SFTSection | DPOSection:
        section = self.sft if stage == "sft" else self.dpo
        assert section is not None, f"the recipe has no section {stage}"
        return section

    @property
    def training_stages(self) -> tuple[TrainingStage, ...]:
        """The training stages that the recipe has, in the order in which they run."""
        return tuple(stage for stage in TRAINING_STAGES if getattr(self, stage) is not None)

    @property
    def scored_stages(self) -> tuple[Stage, ...]:
        """The stages to score, in the order in which they run; empty without a section `eval`."""
        if self.eval is None:
            return ()
        wanted = self.eval.stages if self.eval.stages is not None else ("base", *self.training_stages)
        return tuple(stage for stage in STAGES if stage in wanted)

    @property
    def inspected_stages(self) -> tuple[Stage, ...]:
        """The stages to inspect, in the order in which they run; empty without a section `inspect`."""
        if self.inspect is None:
            return ()
        last = ("base", *self.training_stages)[-1:]
        wanted = self.inspect.stages if self.inspect.stages is not None else last
        return tuple(stage for stage in STAGES if stage in wanted)

    def lora_for(self, stage: TrainingStage) -> LoraSection | None:
        """The adapters that a stage trains; None where it trains all parameters."""
        return self.lora if self.lora is not None and self.lora.adapts(stage) else None

    def data_for(self, stage: TrainingStage) -> DataSection:
        """The stage's data: the recipe's, with what the stage has otherwise."""
        own = self._stage_section(stage).data
        general = self.data.model_dump(exclude_unset=True) if self.data else {}
        special = own.model_dump(exclude_unset=True) if own else {}
        if special.get("sources"):  # they replace the one source that the recipe's data describes, and the reverse
            general = {key: value for key, value in general.items() if key not in SourceSection.model_fields}
        elif special.get("path"):
            general.pop("sources", None)
        return DataSection.model_validate({**general, **special})

    def dump_yaml(self) -> str:
        """The recipe as resolved, overrides included, as YAML that `load_recipe` reads back to an equal recipe.

        Passwords, tokens and keys are masked; processes of this run get them by `secrets.secrets_variable`.
        """
        values = self.model_dump()
        for stage in self.training_stages:
            own = self._stage_section(stage).data
            if own is not None:  # what it inherits stays out, so that an override of `data` still reaches it
                values[stage]["data"] = own.model_dump(exclude_unset=True)
        return dump_yaml(secrets.without_secrets(values))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe in `path`, after `key.path=value` overrides.

    Raises:
        RecipeError: the file is missing, data or not YAML, or a key or value is invalid.
    """
    _check_is_no_data(Path(path))
    recipe = load_section(Recipe, path, overrides)
    values = recipe.model_dump(mode="json", exclude_unset=True)
    whole = secrets.with_secrets(values)
    masked = secrets.first_mask(whole)
    if masked is not None:
        raise RecipeError(
            f"{path}: {masked} holds {secrets.MASK}, which stands for a secret that run folders leave out; start from the "
            f"recipe that has it, or give it as an override"
        )
    if whole == values:
        return recipe
    secrets.remember(whole)
    return Recipe.model_validate_json(json.dumps(whole))


def _check_is_no_data(path: Path) -> None:
    """Raises RecipeError for a file of rows; a `.json` may be a recipe, because JSON is YAML."""
    if path.suffix.lower() != ".json" and has_data_suffix(str(path)) and path.exists():
        raise RecipeError(
            f"{path} is data and no recipe; 'hymba-align init NAME --data {shlex.quote(str(path))}' writes a recipe that trains "
            "on it"
        )


def gsm8k_paths(recipe: Recipe) -> GSM8KSection:
    """The recipe's GSM8K section with absent files filled in from the training data.

    Where `data.path` is a local file of question/answer rows, `train_path` (from which few-shot examples are drawn)
    defaults to it, and `test_path` to the `test.jsonl` beside it. So the one override
    `data.path=gsm8k/train.jsonl` moves training, few-shot examples and test together. Otherwise the
    paths stay as they are, and the hub's own files are used for those not given.
    """
    assert recipe.eval is not None, "the recipe has no section eval"
    section = recipe.eval.gsm8k
    data = recipe.data
    if data is None or not data.path or not _holds_questions_and_answers(Path(data.path)):
        return section
    return section.model_copy(
        update={
            "train_path": section.train_path or str(Path(data.path)),
            "test_path": section.test_path or test_file_beside(data),
        }
    )


def test_file_beside(data: DataSection) -> str | None:
    """The `test.jsonl` in the folder of the one local file that is the data; None where there is none."""
    if not data.path or not Path(data.path).is_file():
        return None
    test = Path(data.path).with_name("test.jsonl")
    return str(test) if test.is_file() else None


def resolved_eval(recipe: Recipe) -> EvalSection:
    """The eval section as the scorers receive it: with the files that `gsm8k_paths` chose."""
    assert recipe.eval is not None, "the recipe has no section eval"
    return recipe.eval.model_copy(update={"gsm8k": gsm8k_paths(recipe)})


def _holds_questions_and_answers(path: Path) -> bool:
    """Whether the first row of a local JSON Lines file has a question and an answer; a malformed one has not."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            row = json.loads(file.readline())
        except json.JSONDecodeError:  # the data stage reads the whole file, and reports the line
            return False
    return isinstance(row, dict) and {"question", "answer"} <= row.keys()
