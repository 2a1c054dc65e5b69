"""One YAML file describes a run: base model, data, stages, scores.

Sections are frozen and strict: an unknown key, a wrong type or a value out of range is a `RecipeError` that names the
file, the key, the value and the nearest valid key. `key.path=value` overrides are applied before validation
(recipe_loading.py reads and reports; this file holds the schema and what follows from it).

Paths are relative to the directory in which the command runs, not to the recipe's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hymba_align import secrets
from hymba_align.errors import RecipeError
from hymba_align.recipe_eval import EvalSection, GSM8KSection, Stage
from hymba_align.recipe_inspect import InspectSection
from hymba_align.recipe_loading import Section, dump_yaml, load_section
from hymba_align.recipe_lora import LoraSection

TrainingStage = Literal["sft", "dpo"]
TRAINING_STAGES: tuple[TrainingStage, ...] = ("sft", "dpo")
STAGES: tuple[Stage, ...] = ("base", "sft", "dpo")
SchemaName = Literal[
    "preference", "ranked", "prompt_completion", "messages", "sharegpt", "alpaca", "question_answer", "text"
]
Launcher = Literal[
    "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2",
    "multi_node_ddp", "multi_node_zero2", "multi_node_zero3", "multi_node_fsdp2",
]  # fmt: skip
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
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


class SourceSection(Section):
    """One place that rows come from, and how they become conversations or preferences.

    `path`: a file, a folder, a glob, an fsspec URL, or a data set of the hub (`subset`, `split` and `revision` are its).
    `columns` names the file's column for each column of the schema, `roles` our role for each of the file's; `convert` is
    a function `package.module:name` that turns a row into one of a known schema. `keep_fraction` keeps about that share
    of the rows, chosen by their content and the seed; `repeat` takes the rows that many times; `max_rows` reads no more
    than the first so many. Rows of question and answer become user turns by `question_format`, and up to
    `examples_per_conversation` of them share a conversation, as many as fit.
    """

    path: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    storage_options: dict[str, Any] = Field(default_factory=dict)
    format: SchemaName | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    convert: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    max_rows: int | None = Field(default=None, ge=1)
    keep_fraction: float = Field(default=1.0, gt=0, le=1)
    repeat: int = Field(default=1, ge=1)
    examples_per_conversation: int = Field(default=1, ge=1)
    question_format: str = "{question}"

    @field_validator("question_format")
    @classmethod
    def _holds_the_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("it must contain {question}, where the row's question goes")
        return value


class DataSection(SourceSection):
    """One source, by its own keys, or several in `sources`; and what happens to their rows.

    `bad_rows` and `over_long` say whether a row that cannot be used, or does not fit in max_length, stops the run
    ("refuse") or is left out and counted ("drop"); over-long conversations can also be cut after an assistant's turn
    ("truncate") or continued in further conversations ("split"). `loss_on` names the turns that are trained on.
    `validation_fraction` of the rows, chosen by a hash of their content, are kept for validation. `seed` defaults to the
    recipe's. `workers` processes prepare (None: one per core); the result does not depend on their number.
    `streaming` prepares rows while training reads them, for sets larger than the disk.
    """

    path: str = ""
    sources: tuple[SourceSection, ...] = ()
    bad_rows: Literal["refuse", "drop"] = "refuse"
    over_long: Literal["refuse", "drop", "truncate", "split"] = "refuse"
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    seed: int | None = Field(default=None, ge=0)
    workers: int | None = Field(default=None, ge=1)
    streaming: bool = False

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> DataSection:
        if self.path and self.sources:
            raise ValueError("it holds both path and sources; put the path among the sources")
        fields = DataSection.model_fields
        of_one_source = [
            key
            for key in SourceSection.model_fields
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]
        if self.sources and of_one_source:
            raise ValueError(f"it holds sources, so {of_one_source[0]} belongs into one of them; move it there")
        self._check()
        return self

    def _check(self) -> None:
        if not self.path and not self.sources:
            raise ValueError("it holds neither path nor sources; set one of them")

    @property
    def all_sources(self) -> tuple[SourceSection, ...]:
        """The sources in order; a section with a path is its own only one."""
        if self.sources:
            return self.sources
        own = self.model_dump(include=set(SourceSection.model_fields), exclude_unset=True)
        return (SourceSection.model_validate(own),)


class StageDataSection(DataSection):
    """What a stage's data has otherwise than the recipe's `data`: only the keys that were set count."""

    def _check(self) -> None:
        """Neither path nor sources need be here."""


class GuardSection(Section):
    """What happens when training goes wrong.

    `on_nonfinite`: a batch whose loss or gradient is NaN or infinite is never applied. "stop" names its rows in
    bad_batch.json, saves the weights from before and ends the run; "skip" leaves out up to `max_skipped` such batches.
    `on_spike`: a loss more than `spike_deviations` robust standard deviations above the median of the last
    `spike_window` logged ones, in `spike_logs` log events in a row, is told ("warn"), stops ("stop") or is let pass
    ("ignore").
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = Field(default=10, ge=0)
    on_spike: Literal["warn", "stop", "ignore"] = "warn"
    spike_window: int = Field(default=20, ge=4)
    spike_deviations: float = Field(default=6.0, gt=0)
    spike_logs: int = Field(default=3, ge=1)


class DPOGuardSection(GuardSection):
    """The same for DPO, where chosen answers must not lose probability either.

    `on_spike` also happens where `rewards/chosen` is below `min_chosen_reward`, or has fallen by more than
    `max_chosen_fall` within the last `spike_window` log events, in `spike_logs` of them in a row. Rewards are beta times
    nats: at beta 0.1 a reward of -5 makes a chosen answer e^50 times less probable than the reference has it.
    """

    min_chosen_reward: float = -5.0
    max_chosen_fall: float = Field(default=3.0, gt=0)


class AnswersSection(Section):
    """Answers to held-out conversations, generated and compared whenever validation runs (`trainer.eval_strategy`).

    Of `data.validation_fraction`, up to `problems` conversations, chosen by their content: the last reply is the
    reference, what precedes it the prompt (DPO: the chosen reply). `match` is what has to be the same: the last `number`,
    the `strict_number` after ####, the `text` but for white space, or the tool `calls` in any order. With `keep_best`,
    `final` holds the weights of the highest share, of equal ones the latest; each new best one is saved as a checkpoint.
    """

    match: Literal["number", "strict_number", "text", "calls"]
    problems: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    keep_best: bool = False


class SamplesSection(Section):
    """What the model writes after held-out prompts, kept in `samples.jsonl` whenever validation runs.

    Of `data.validation_fraction`, up to `prompts` conversations (0: none), chosen by their content; each is continued
    greedily by up to `max_new_tokens`. Where the stage has `answers`, they are the first of its problems, and nothing is
    generated besides. No weight depends on them.
    """

    prompts: int = Field(default=4, ge=0, le=64)
    max_new_tokens: int = Field(default=128, ge=1)


class SFTSection(Section):
    """Supervised fine-tuning. `trainer` holds fields of `trl.SFTConfig`, `guard` what happens when it goes wrong.

    `answers`: held-out conversations are answered while training, and the answers compared. None: only the loss is known.
    `samples`: what the model writes after some of them. None: four, unless the engine divides the weights (ZeRO-3, FSDP) and
    there are no `answers`: then generating takes a copy of all weights in every process.
    """

    data: StageDataSection | None = None
    max_length: int = Field(default=8192, ge=8)
    guard: GuardSection = GuardSection()
    answers: AnswersSection | None = None
    samples: SamplesSection | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


class DPOSection(Section):
    """Direct preference optimisation. `trainer` holds fields of `trl.DPOConfig`.

    `row_tokens` packs several pairs into a row of up to so many tokens (prompt once, chosen, rejected), so that every
    batch of every process has about as many; a longer pair has a row of its own. `trainer.per_device_train_batch_size`
    then counts rows. None: it counts pairs. `answers` and `samples` as for SFT.
    """

    data: StageDataSection | None = None
    max_length: int = Field(default=2048, ge=8)
    share_prefix: bool = True
    row_tokens: int | None = Field(default=None, ge=8)
    guard: DPOGuardSection = DPOGuardSection()
    answers: AnswersSection | None = None
    samples: SamplesSection | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


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
        RecipeError: the file is missing or not YAML, or a key or value is invalid.
    """
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


def is_local_path(name: str) -> bool:
    """Whether `name` means a file or folder here rather than a repository on the hub.

    Something that exists is local. So is what no repository can be called: a data file's suffix, a leading dot or slash,
    more than one slash. Saying so before anything is opened turns a mistyped path into an error about that path, where
    the hub's client would report a repository that does not exist.
    """
    if "://" in name:
        return False
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    while suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    if suffixes and suffixes[-1] in DATA_SUFFIXES:
        return True
    return Path(name).expanduser().exists() or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None


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
