"""The data manual is true: its rows are prepared by its recipes and give what it shows.

A section's blocks are taken in order. `json NAME` (values, one row each where NAME ends in .jsonl), `python NAME` and any
other block with a file's name are files; `yaml` is part of a recipe; `text rendered`, `text pairs`, `text summary` and
`text error` are what must come out of the last recipe; `bash` holds commands.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.data.prepare import Prepared, prepare_preferences, prepare_sft
from hymba_align.data.reading.schemas import SCHEMAS
from hymba_align.data.rendering import render
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection, DPOSection, SFTSection
from hymba_align.recipe_loading import Section, load_section

ROOT = Path(__file__).resolve().parents[2]
MANUAL = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BETWEEN = "\n---\n"
WORD_JOINER = "\u2060"
SEED = 42


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands after it, and its text."""

    language: str
    name: str
    text: str


class Shown(Section):
    """The parts of a recipe that the manual shows."""

    data: DataSection
    sft: SFTSection = SFTSection()
    dpo: DPOSection | None = None


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
        section = shown.data.model_copy(update={"workers": 1})
        self.pairs = shown.dpo is not None
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


def sections() -> Iterator[tuple[str, list[Block]]]:
    """The headings of the manual with the blocks below each."""
    parts = re.split(r"^(#{1,3} .*)$", MANUAL, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        found = re.findall(r"^```(\w+)(?: ([\w./-]+))?\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        if found:
            yield heading.lstrip("# "), [Block(*parts) for parts in found]


SECTIONS = dict(sections())


def is_file(block: Block) -> bool:
    return "." in block.name


def content(block: Block) -> str:
    """The file's content; a JSON Lines file's rows are spread over lines in the manual only."""
    if block.language != "json" or not block.name.endswith(".jsonl"):
        return block.text
    decoder, text, lines = json.JSONDecoder(), block.text.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
        text = text[end:].strip()
    return "".join(lines)


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
        if is_file(block):
            Path(block.name).parent.mkdir(parents=True, exist_ok=True)
            Path(block.name).write_text(content(block), encoding="utf-8")
        elif block.language == "yaml":
            Path("shown.yaml").write_text(block.text, encoding="utf-8")
            run.prepare(Path("shown.yaml"))
        elif block.language == "bash":
            run_commands(block.text)
        else:
            assert run.shows(block.name) == block.text.rstrip("\n"), heading
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(work)):
            del sys.modules[name]


def run_commands(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "hymba-align"
            assert main(words[1:]) == 0, line


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


def test_every_file_the_manual_points_at_exists() -> None:
    for name in re.findall(r"`((?:tests|benchmarks|recipes|hymba_align|data|docs)/[\w./-]+\w)`", MANUAL):
        assert (ROOT / name).exists(), name
