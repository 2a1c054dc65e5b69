"""The section `inspect` of a recipe: which stages are looked into after they were trained, and what is measured."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from hymba_align.inspect_choices import DOCUMENTS, DOMAIN_NAME, MAX_LENGTH, PARTS, Part
from hymba_align.recipe_eval import Several, Stage, Task
from hymba_align.recipe_loading import Section


class InspectSection(Section):
    """A step `inspect/<stage>` after a stage was trained and scored.

    `stages`: those that are inspected (None: the last one that is trained). `against`: with which checkpoint each is
    compared, the stage before it, the base, or none. `data`: a file whose rows are read as the stage's own data is (None:
    the rows that the stage keeps for validation); `preferences`: another file for the pairs of answers. `domains`: files by
    name, besides the texts that ship with this package and in the place of one of the same name. `tasks`: whose accuracy is
    measured with each branch of each layer removed, as the section `eval` scores them. `documents`: how many are read,
    chosen by their content. `layers`: of which maps of the attention are drawn (None: a few). `contexts` and `batch_size`:
    lengths at which decoding is timed (None: what the model can take), and how many sequences decode together.
    """

    stages: Several[Stage] | None = None
    against: Literal["previous", "base", "none"] = "previous"
    data: str | None = Field(default=None, min_length=1)
    preferences: str | None = Field(default=None, min_length=1)
    domains: dict[str, str] = Field(default_factory=dict)
    tasks: Several[Task] = ()
    parts: Several[Part] = Field(default=PARTS, min_length=1)
    documents: int = Field(default=DOCUMENTS, ge=1)
    max_length: int = Field(default=MAX_LENGTH, ge=8)
    layers: Several[int] | None = None
    contexts: Several[int] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=1, ge=1)

    @field_validator("domains")
    @classmethod
    def _are_named(cls, domains: dict[str, str]) -> dict[str, str]:
        for name, path in domains.items():
            if not re.fullmatch(DOMAIN_NAME, name):
                raise ValueError(f"the domain {name!r:.100} has a name that is no word; use letters, digits, - and _")
            if not path:
                raise ValueError(f"the domain {name} has no file; name one")
        return domains
