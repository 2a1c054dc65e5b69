"""The section `eval` of a recipe: which tasks are scored, on which stages, and how. A suite is such a section in a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from hymba_align.recipe_loading import Section, load_section

Task = Literal["gsm8k", "gsm8k_nvidia", "gpqa", "gpqa_generative", "bfcl"]
TASKS: tuple[Task, ...] = ("gsm8k", "gsm8k_nvidia", "gpqa", "gpqa_generative", "bfcl")
Stage = Literal["base", "sft", "dpo"]
Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Field(strict=False)]
"""A list in YAML. What a suite was merged into is plain Python, in which strict validation takes no list for a tuple."""
SUITES_FOLDER = Path(__file__).parent / "eval" / "suites"
"""A link to eval/suites/, whose files a wheel then holds"""


class GSM8KSection(Section):
    """Files of the GSM8K tasks in the official JSON Lines format; `gsm8k_paths` says what stands in for absent ones.

    `shots`: `drawn` are the harness's own, others for every problem; `first` are the first training rows for all
    problems, which are then run once.
    """

    train_path: str | None = None
    test_path: str | None = None
    num_fewshot: int = Field(default=5, ge=0)
    shots: Literal["drawn", "first"] = "drawn"
    max_new_tokens: int = Field(default=512, ge=1)


class GPQASection(Section):
    """The GPQA tasks: the subset, and the encrypted archive that its authors distribute (absent: the hub's)."""

    path: str | None = None
    subset: Literal["main", "diamond", "extended"] = "main"
    max_new_tokens: int = Field(default=1024, ge=1)


class BFCLSection(Section):
    """The BFCL task: categories by their names in bfcl-eval (empty: all that are run), and limits of a conversation."""

    categories: Several[str] = ()
    max_new_tokens: int = Field(default=512, ge=1)
    max_steps: int = Field(default=20, ge=1)


class Suite(Section):
    """Which tasks are scored, on which stages (None: on all that exist), and how: what a suite's file holds.

    `limit` problems of each task are scored. `max_new_tokens` replaces that of every task.
    """

    tasks: Several[Task] = Field(default=("gsm8k",), min_length=1)
    stages: Several[Stage] | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    num_processes: int | None = Field(default=None, ge=1)
    gsm8k: GSM8KSection = GSM8KSection()
    gpqa: GPQASection = GPQASection()
    bfcl: BFCLSection = BFCLSection()

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, values: Any) -> Any:
        """Refuses what belongs to the section of a recipe."""
        if isinstance(values, dict) and "suite" in values:
            raise ValueError(f"suite is {values['suite']!r:.300}, and a suite names no other; write its keys here")
        if isinstance(values, dict) and "eval" in values:
            raise ValueError("eval is a section of a recipe, and a suite has none; write its keys at the top level")
        return values


class EvalSection(Suite):
    """The section of a recipe.

    `suite` is a file of eval/suites/ by name, or a file of one's own: its keys apply where this section has none.
    """

    suite: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, values: Any) -> Any:
        """Merged with the suite's keys."""
        path = _suite_file(values.get("suite")) if isinstance(values, dict) else None
        return values if path is None else _merged(_read_suite(path), values)

    @field_validator("suite")
    @classmethod
    def _is_there(cls, name: str | None) -> str | None:
        if name is None or _suite_file(name) is not None:
            return name
        known = sorted(file.stem for file in SUITES_FOLDER.glob("*.yaml"))
        near = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), known, n=1)
        hint = f"the nearest is '{near[0]}'" if near else f"suites: {', '.join(known)}"
        raise ValueError(f"there is no suite '{name}', nor a file of that name; {hint}")

    def new_tokens(self, task: Task) -> int:
        """The most tokens that an answer of a task may have; 0 where choices are compared."""
        if task == "gpqa":
            return 0
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if task == "bfcl":
            return self.bfcl.max_new_tokens
        return self.gpqa.max_new_tokens if task == "gpqa_generative" else self.gsm8k.max_new_tokens


def _suite_file(name: Any) -> Path | None:
    """The file of a suite by its name, or at a path of one's own; None where there is neither."""
    if not isinstance(name, str):
        return None
    shipped = [SUITES_FOLDER / f"{name}.yaml"] if Path(name).name == name else []
    return next((path for path in (*shipped, Path(name).expanduser()) if path.is_file()), None)


def _read_suite(path: Path) -> dict[str, Any]:
    """Keys of a suite. Raises: RecipeError, which names the file, the line and the key."""
    suite = load_section(Suite, path, what="the suite", keys="tasks, limit")
    return suite.model_dump(mode="json", exclude_unset=True)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
