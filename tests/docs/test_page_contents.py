"""What pages say in words and tables is what the program has: keys, defaults, exit codes, suites, kernels, files."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any, get_args

import collect
import pytest
import yaml
from document_blocks import ROOT, blocks_of, text_of
from document_runner import TINY, command_lines

from hymba_align import recipe, recipe_eval, recipe_inspect, recipe_lora
from hymba_align.cli import INTERRUPTED
from hymba_align.errors import HymbaAlignError, Preempted, UsageError
from hymba_align.memory import Adapters, Engine, Setting, Shape, estimate
from hymba_align.model import HymbaConfig, SegmentTree
from hymba_align.model.kernels import choice
from hymba_align.recipe import (
    AnswersSection,
    BaseSection,
    DataSection,
    DPOGuardSection,
    DPOSection,
    GuardSection,
    LaunchSection,
    Recipe,
    SamplesSection,
    SFTSection,
    SourceSection,
    StageDataSection,
)
from hymba_align.recipe_eval import (
    SUITES_FOLDER,
    BFCLSection,
    EvalSection,
    GPQASection,
    GSM8KSection,
    Suite,
    Task,
)
from hymba_align.recipe_inspect import InspectSection
from hymba_align.recipe_loading import Section
from hymba_align.recipe_lora import LoraSection
from hymba_align.train.settings import DEFAULTS, STAGE_DEFAULTS

README = text_of("README.md")
LONG_RUNS = text_of("docs/long_runs.md")
SCORES = text_of("docs/scores.md")
PERFORMANCE = text_of("docs/performance.md")


def commands(document: str) -> list[list[str]]:
    """The words of every command in the page's bash blocks."""
    lines = [line for block in blocks_of(document, "bash") for line in command_lines(block.text)]
    return [shlex.split(line, comments=True) for line in lines]


# ---- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_two_commands_and_make_knows_them() -> None:
    shown = [words for words in commands("README.md") if words[0] == "make"]
    assert shown == [["make", "demo"], ["make", "test"]]
    for target, expected in (("demo", "hymba-align run recipes/tiny/arithmetic.yaml"), ("test", "-m pytest")):
        printed = subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert expected in printed.splitlines()[-1]


def test_the_readme_shows_every_step_of_the_road() -> None:
    shown = {words[1] for words in commands("README.md") if words[0] == "hymba-align"}
    assert {"run", "sft", "dpo", "eval", "install-bfcl", "data"} <= shown
    assert len(blocks_of("README.md", "python")) == 1


def test_the_file_map_names_only_what_exists_and_every_module_of_the_top_level() -> None:
    (tree,) = re.findall(r"```\n(hymba_align/.*?)```", README, flags=re.DOTALL)
    top = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    assert all((ROOT / name).is_dir() for name in top)
    modules = {path.name for path in (ROOT / "hymba_align").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules == set(re.findall(r"\b\w+\.py\b", tree))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    folders = {f"{name.split('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= set(top) or not tracked


# ---- docs/recipes.md ------------------------------------------------------------------------------------------------

RECIPES = text_of("docs/recipes.md")
SECTION_TABLES: dict[str, tuple[type[Section], type[Section] | None]] = {
    "The whole recipe": (Recipe, None),
    "base": (BaseSection, None),
    "data: one source": (SourceSection, None),
    "data: all sources together": (DataSection, SourceSection),
    "sft": (SFTSection, None),
    "dpo": (DPOSection, None),
    "sft.guard and dpo.guard": (DPOGuardSection, None),
    "sft.answers and dpo.answers": (AnswersSection, None),
    "sft.samples and dpo.samples": (SamplesSection, None),
    "lora": (LoraSection, None),
    "eval": (EvalSection, None),
    "eval.gsm8k": (GSM8KSection, None),
    "eval.gpqa": (GPQASection, None),
    "eval.bfcl": (BFCLSection, None),
    "inspect": (InspectSection, None),
    "launch": (LaunchSection, None),
}


def sections_of(section: type[Section]) -> set[type[Section]]:
    """A section and all that its keys hold, at any depth."""
    found = {section}
    for field in section.model_fields.values():
        for inner in re.findall(r"\b(\w+Section)\b", str(field.annotation)):
            found |= sections_of(KNOWN_SECTIONS[inner]) if inner in KNOWN_SECTIONS else set()
    return found


KNOWN_SECTIONS = {
    cls.__name__: cls
    for module in (recipe, recipe_eval, recipe_inspect, recipe_lora)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Section)
}


def as_written(default: Any) -> str:
    """A default as the tables write it."""
    if default is None or default == "" or isinstance(default, Section):
        return ""
    if isinstance(default, tuple):
        return f"`[{', '.join(default)}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


@pytest.mark.parametrize("title", SECTION_TABLES)
def test_recipes_a_table_has_every_key_of_its_section_with_its_default(title: str) -> None:
    section, without = SECTION_TABLES[title]
    table = RECIPES.partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = {
        key: (default.strip(), meaning.strip())
        for key, default, meaning in re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|", table, flags=re.MULTILINE)
    }
    fields = {
        key: field for key, field in section.model_fields.items() if without is None or key not in without.model_fields
    }
    assert {key: default for key, (default, _) in rows.items()} == {
        key: "required" if field.is_required() else as_written(field.get_default(call_default_factory=True))
        for key, field in fields.items()
    }
    assert all(meaning for _, meaning in rows.values())


def test_recipes_every_section_has_a_table() -> None:
    tables = {section for section, _ in SECTION_TABLES.values()}
    implied = {StageDataSection, GuardSection, Suite}  # keys of data, of a guard without DPO's, of eval without suite
    assert sections_of(Recipe) - implied == tables - {SourceSection} | ({SourceSection} & sections_of(Recipe))


def test_recipes_the_defaults_that_the_text_names_are_those_of_the_program() -> None:
    assert (
        "one epoch, cosine, 5e-5 (DPO 3e-6), a tenth of the\nsteps as warmup, packing, a checkpoint after each fifth"
        in RECIPES
    )
    values = [DEFAULTS[key] for key in ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "save_steps")]
    assert values == [1.0, "cosine", 0.1, 0.2]
    assert [STAGE_DEFAULTS[stage]["learning_rate"] for stage in ("sft", "dpo")] == [5e-5, 3e-6]
    assert STAGE_DEFAULTS["sft"]["packing"] is True


def test_recipes_the_walk_through_the_demo_is_the_demos_recipe() -> None:
    shown: dict[str, Any] = {}
    for block in blocks_of("docs/recipes.md", "yaml"):
        if block.heading == "The demo's recipe":
            shown = {**yaml.safe_load(block.text), **shown}  # the first of two bases counts
    assert shown == yaml.safe_load((ROOT / TINY).read_text(encoding="utf-8"))


# ---- docs/packing.md ------------------------------------------------------------------------------------------------


def test_packing_the_drawn_masks_are_what_a_packed_row_sees() -> None:
    """Three meta tokens, documents of four and three, a window of two; meta tokens are always in sight."""
    drawing = (ROOT / "docs" / "packing_mask.svg").read_text(encoding="utf-8")
    cells = re.findall(r'<rect class="(\w+)" x="(\d+)" y="(\d+)" width="26"', drawing)
    for left, window in ((60, None), (400, 2)):
        seen = {
            ((int(y) - 70) // 26, (int(x) - left) // 26): kind in ("meta", "one", "two")
            for kind, x, y in cells
            if 0 <= int(x) - left < 260
        }
        tree = SegmentTree.from_lengths([4, 3])
        document = [segment for segment, length in enumerate(tree.lengths.tolist()) for _ in range(length)]
        for query in range(7):
            for key in range(10):
                text = key - 3
                expected = text < 0 or (
                    text <= query and document[text] == document[query] and (window is None or query - text <= window)
                )
                assert seen[query, key] == expected, (window, query, key)


def test_recipes_the_learning_rates_of_adapters_are_the_defaults() -> None:
    from hymba_align.train.settings import ADAPTER_RATES

    told = re.search(r"a stage with adapters takes (\S+) \(SFT\) or (\S+) \(DPO\)", text_of("docs/recipes.md"))
    assert told is not None
    assert {"sft": float(told[1]), "dpo": float(told[2])} == ADAPTER_RATES


# ---- docs/hardware.md -----------------------------------------------------------------------------------------------

HARDWARE = text_of("docs/hardware.md")
ENGINES: tuple[tuple[Engine, int], ...] = (
    ("single", 1),
    ("ddp", 8),
    ("zero1", 8),
    ("zero2", 8),
    ("zero3", 8),
    ("zero3_offload", 8),
)
WITH_ADAPTERS = {
    "LoRA": Adapters(frozen_bytes=2),
    "DoRA": Adapters(frozen_bytes=2, dora=True),
    "QLoRA": Adapters(frozen_bytes=2, quantized=True),
}


def estimated(**settings: Any) -> str:
    """GiB of Hymba-1.5B at the peak of a step in bfloat16, one row per micro-batch, activations recomputed."""
    setting = Setting(batch=1, compute_bytes=2, accumulation=8, checkpointing=True, **settings)
    return f"{estimate(Shape.of(HymbaConfig()), setting).total / 2**30:.1f}"


def table_rows(heading: str) -> dict[str, list[str]]:
    """The table below a heading, by its first cell."""
    lines = HARDWARE.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0].strip("`"): cells[1:] for cells in rows[2:]}


def test_hardware_the_table_of_engines_is_what_the_estimate_says() -> None:
    expected = {
        engine: [str(n), *(estimated(row_tokens=tokens, engine=engine, processes=n) for tokens in (2048, 8192))]
        for engine, n in ENGINES
    }
    assert table_rows("All parameters") == expected


def test_hardware_the_table_of_adapters_is_what_the_estimate_says() -> None:
    shape = Shape.of(HymbaConfig())
    expected = {
        name: [
            f"{adapters.parameters(shape) / 1e6:.1f} M",
            *(estimated(row_tokens=tokens, adapters=adapters) for tokens in (2048, 8192)),
        ]
        for name, adapters in WITH_ADAPTERS.items()
    }
    assert table_rows("Adapters") == expected


# ---- docs/long_runs.md ----------------------------------------------------------------------------------------------


def test_long_runs_the_table_of_answers_has_every_key_with_its_default() -> None:
    section = LONG_RUNS.partition("## Answers while training")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w*) ?\|", section, flags=re.MULTILINE)
    defaults = AnswersSection(match="text").model_dump() | {"match": ""}
    assert dict(rows) == {key: str(value).lower() for key, value in defaults.items()}


def test_long_runs_the_keys_are_those_of_a_recipe() -> None:
    _, shown = (yaml.safe_load(block.text) for block in blocks_of("docs/long_runs.md", "yaml"))
    for section, cls in (("sft", SFTSection), ("dpo", DPOSection)):
        assert cls.model_validate(shown[section]).guard.on_spike == "stop"
    assert LaunchSection().grace_s == 30


def test_long_runs_the_table_of_guards_has_every_key_with_its_default() -> None:
    section = LONG_RUNS.partition("## Training that goes wrong")[2]
    rows = re.findall(r"^\| `(\w+)`(?: \(DPO\))? \| `?([-\w.]+)`? \|", section, flags=re.MULTILINE)
    assert dict(rows) == {key: str(value) for key, value in DPOSection().guard.model_dump().items()}
    assert SFTSection().guard.model_dump().items() <= DPOSection().guard.model_dump().items()


def test_long_runs_the_exit_codes_are_those_of_the_program() -> None:
    section = LONG_RUNS.partition("## Stopping and going on")[2].partition("\n## ")[0]
    codes = [int(code) for code in re.findall(r"^\| [^|]+ \| (\d+) \|", section, flags=re.MULTILINE)]
    errors = [HymbaAlignError.exit_code, UsageError.exit_code, Preempted.exit_code]
    assert codes == [0, *errors, INTERRUPTED]


# ---- docs/scores.md -------------------------------------------------------------------------------------------------


def test_scores_the_keys_are_those_of_a_recipe() -> None:
    (block,) = blocks_of("docs/scores.md", "yaml")
    section = EvalSection.model_validate(yaml.safe_load(block.text)["eval"])
    assert section.tasks == ("gsm8k", "gpqa", "bfcl")


def test_scores_the_tables_have_every_suite_and_every_task() -> None:
    named = re.findall(r"^\| `([a-z0-9_]+)` \|", SCORES, flags=re.MULTILINE)
    assert set(named) == {path.stem for path in SUITES_FOLDER.glob("*.yaml")} | set(get_args(Task))


def test_scores_the_standard_errors_are_those_of_that_many_problems_at_half() -> None:
    said = re.search(
        r"100 problems at 50 % have ([\d.]+) points, GPQA's 448 have ([\d.]+), GSM8K's 1,319 have ([\d.]+)", SCORES
    )
    assert said is not None
    assert [float(points) for points in said.groups()] == [round(50 / (n - 1) ** 0.5, 1) for n in (100, 448, 1319)]


# ---- docs/inside.md -------------------------------------------------------------------------------------------------


def test_inside_decoding_at_the_real_shape_is_the_committed_table() -> None:
    table = (ROOT / "benchmarks/inspect_cost.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| 1\.5B, bfloat16 \| ([\d,]+) .* ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|$", table, flags=re.MULTILINE
    )
    ratios = {context: ratio for context, ratio, *_ in found}
    low, high = next(bounds for context, _, *bounds in found if context == "8,192")
    assert (
        f"decoded {ratios['8,192']} times as fast as Llama-3.2-3B's at 8,192 tokens (median; {low} to {high} over 5 rounds, so not "
        f"faster in every one), {ratios['2,048']} times at 2,048 and {ratios['512']} times at 512 tokens, there in every round"
    ) in " ".join(text_of("docs/inside.md").split())


# ---- docs/performance.md --------------------------------------------------------------------------------------------


def test_performance_the_tables_are_the_committed_ones() -> None:
    assert collect.collected(PERFORMANCE) == PERFORMANCE, "run: python benchmarks/collect.py"
    shown = set(re.findall(r"\(\.\./benchmarks/(\w+)\.md\)", PERFORMANCE))
    assert shown == {page.stem for page in (ROOT / "benchmarks").glob("*.md")} & set(collect.TABLES)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("selective scan", "scan"),
        ("convolution", "conv"),
        ("attention", "attention"),
        ("RMS norm", "norm"),
        ("one step of the scan, in generation", "scan_step"),
        ("one step of the convolution", "conv_step"),
    ],
)
def test_performance_the_kernels_that_the_document_names_are_the_defaults(row: str, part: str) -> None:
    cells = next(line for line in PERFORMANCE.splitlines() if line.startswith(f"| {row} |")).split("|")[2:5]
    shown = [re.findall(r"`([\w-]+)`", cell) for cell in cells]
    defaults = [list(choice.DEFAULTS[device].get(part, (choice.PLAIN[part],))) for device in ("cpu", "cuda")]
    assert shown[:2] == defaults
    assert set(shown[2]) == set(choice.BACKENDS[part]) - {name for names in defaults for name in names}
