"""The data manual is true: its rows are prepared by its recipes and give what it shows.

A section's blocks are taken in order. `json NAME` (values, one row each where NAME ends in .jsonl), `python NAME` and any
other block with a file's name are files; `yaml` is part of a recipe; `text rendered`, `text pairs`, `text summary` and
`text error` are what must come out of the last recipe; `bash` holds commands.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from document_blocks import ROOT, Block, blocks_of, text_of
from document_runner import Page, write_file

from hymba_align.data.prepare import Prepared, prepare_preferences, prepare_sft
from hymba_align.data.reading.schemas import SCHEMAS
from hymba_align.data.rendering import render
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError
from hymba_align.recipe import BaseSection, DataSection, Recipe, SFTSection
from hymba_align.recipe_loading import load_section

DOCUMENT = "docs/data.md"
MANUAL = text_of(DOCUMENT)
BETWEEN = "\n---\n"
WORD_JOINER = "\u2060"
SEED = 42


class Shown(Recipe):
    """The parts of a recipe that the manual shows; what it leaves out does not matter here."""

    name: str = "shown"
    base: BaseSection = BaseSection(model="owner/model")
    sft: SFTSection = SFTSection()


@dataclass
class Run:
    """The state between the blocks of a section: the last recipe, and what it prepared or why it could not."""

    tokenizer: Any
    prepared: Prepared | None = None
    pairs: bool = False
    error: DataError | None = None
    names: list[str] = field(default_factory=list)

    def prepare(self, recipe: Path) -> None:
        self.prepared, self.error = None, None
        shown = load_section(Shown, recipe)
        self.pairs = shown.dpo is not None
        section = shown.data_for("dpo" if self.pairs else "sft").model_copy(update={"workers": 1})
        try:
            if shown.dpo is not None:
                self.prepared = prepare_preferences(section, self.tokenizer, shown.dpo.max_length, seed=SEED)
            else:
                self.prepared = prepare_sft(section, self.tokenizer, shown.sft.max_length, seed=SEED)
        except DataError as error:
            self.error = error

    def shows(self, what: str) -> str:
        """What the manual shows under `what`."""
        if what == "error":
            return f"Error: {self.error}"
        assert self.prepared is not None, self.error
        if what == "summary":
            return self.prepared.summary()
        if what == "pairs":
            return BETWEEN.join(marked_pair(self.tokenizer, row) for row in self.prepared.dataset)
        dataset = {"rendered": self.prepared.dataset, "validation": self.prepared.validation}[what]
        return BETWEEN.join(marked(self.tokenizer, row["input_ids"], row["assistant_masks"]) for row in dataset)


def sections() -> dict[str, list[Block]]:
    """The headings of the manual with the blocks below each."""
    found: dict[str, list[Block]] = {}
    for block in blocks_of(DOCUMENT):
        found.setdefault(block.heading, []).append(block)
    return found


SECTIONS = sections()


@pytest.fixture(scope="session")
def small() -> Any:
    """The small tokenizer of data/arithmetic, with the project's template."""
    return load_tokenizer("data/arithmetic/tokenizer")


def marked(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    """The text of the tokens, the trained ones in ⟦ ⟧; a word joiner as \\u2060."""
    line_break = tokenizer.convert_tokens_to_ids("<0x0A>")
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            # Decoding drops a leading space piece, which only the first token may be.
            run = tokenizer.decode([line_break, *ids[start:end]] if start else ids[start:end])
            run = run.removeprefix("\n") if start else run
            text += f"⟦{run}⟧" if mask[start] else run
            start = end
    # The space that the released tokenizer's rules put after a control token.
    text = re.sub("(</s>⟧?) \n", r"\1\n", text)
    return text.replace(WORD_JOINER, "\\u2060")


def marked_pair(tokenizer: Any, row: dict[str, Any]) -> str:
    """The prompt, then both replies."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    prompt = render(tokenizer, row["prompt"], tools, add_generation_prompt=True)
    text = marked(tokenizer, prompt.input_ids, [0] * len(prompt.input_ids)).rstrip("\n")
    for reply in ("chosen", "rejected"):
        whole = render(tokenizer, [*row["prompt"], *row[reply]], tools)
        ids = whole.input_ids[len(prompt.input_ids) :]
        shown = marked(tokenizer, [tokenizer.convert_tokens_to_ids("<0x0A>"), *ids], [0] + [1] * len(ids))
        text += f"\n{reply}: {shown.strip()}"
    return text


@pytest.mark.parametrize("heading", SECTIONS)
def test_what_the_manual_shows_comes_out_of_its_rows_and_recipes(
    heading: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "data").symlink_to(ROOT / "data")
    (work / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    before = set(sys.modules)
    run = Run(small)
    for block in SECTIONS[heading]:
        if block.is_file:
            write_file(work / block.name, block)
        elif block.language == "yaml":
            Path("shown.yaml").write_text(block.text, encoding="utf-8")
            run.prepare(Path("shown.yaml"))
        elif block.language == "bash":
            Page(work).run(block)
        else:
            assert run.shows(block.name) == block.text.rstrip("\n"), heading
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(work)):
            del sys.modules[name]


def test_the_manual_has_an_example_for_every_schema() -> None:
    shown = {schema for schema in (one.name for one in SCHEMAS) if any(f"`{schema}`" in name for name in SECTIONS)}
    assert shown == {schema.name for schema in SCHEMAS}
    for heading, blocks in SECTIONS.items():
        if re.search(r"`\w+`$", heading):
            kinds = [block.name if block.language == "text" else block.language for block in blocks]
            assert {"yaml", "json"} <= {*kinds} or {"yaml", "csv"} <= {*kinds}, heading
            assert {"rendered", "pairs"} & {*kinds}, heading


def test_every_key_of_a_data_section_is_explained() -> None:
    for key in DataSection.model_fields:
        assert re.search(rf"`(?:\w+\.)*{key}`|\b{key}:", MANUAL), f"docs/data.md says nothing of {key}"
