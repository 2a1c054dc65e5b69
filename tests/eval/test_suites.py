"""The suites of eval/suites/: what each means, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_align.errors import RecipeError
from hymba_align.recipe import load_recipe
from hymba_align.recipe_eval import SUITES_FOLDER, TASKS, EvalSection
from hymba_align.recipe_loading import load_section


def suite(name: str, *overrides: str) -> EvalSection:
    return load_section(EvalSection, None, [f"suite={name}", *overrides], "eval.")


def test_these_suites_are_there_and_each_can_be_read() -> None:
    names = sorted(file.stem for file in SUITES_FOLDER.glob("*.yaml"))
    assert names == ["full", "published", "quick"]
    for name in names:
        assert suite(name).suite == name


def test_quick_is_the_first_hundred_problems_of_one_task_of_each_benchmark_with_the_same_shots_for_all() -> None:
    quick = suite("quick")
    assert quick.tasks == ("gsm8k", "gpqa", "bfcl")
    assert quick.limit == 100
    assert quick.gsm8k.shots == "first"
    assert quick.bfcl.categories == ()


def test_published_is_the_protocol_of_the_published_scores() -> None:
    published = suite("published")
    assert published.tasks == ("gsm8k", "gpqa", "bfcl")
    assert published.limit is None
    assert (published.gsm8k.num_fewshot, published.gsm8k.shots, published.gsm8k.max_new_tokens) == (5, "drawn", 256)
    assert published.gpqa.subset == "main"
    assert published.bfcl.categories == (
        "live_simple",
        "live_multiple",
        "live_parallel",
        "live_parallel_multiple",
        "live_relevance",
    )


def test_full_is_every_task_on_all_its_problems() -> None:
    full = suite("full")
    assert full.tasks == TASKS
    assert (full.limit, full.max_new_tokens) == (None, None)
    assert (full.gsm8k.shots, full.gpqa.subset, full.bfcl.categories) == ("drawn", "main", ())


def test_keys_of_the_section_come_before_those_of_the_suite_key_by_key() -> None:
    section = suite("published", "limit=7", "gsm8k.num_fewshot=2", "tasks=[gsm8k]")
    assert (section.limit, section.tasks) == (7, ("gsm8k",))
    assert (section.gsm8k.num_fewshot, section.gsm8k.max_new_tokens) == (2, 256)
    assert section.gpqa.subset == "main"


def test_a_suite_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tasks: [gpqa, gsm8k]\nstages: [dpo]\nlimit: 3\n", encoding="utf-8")
    section = suite(str(file))
    assert (section.tasks, section.stages, section.limit) == (("gpqa", "gsm8k"), ("dpo",), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tasks: [gsm8k]\ngsm8k:\n  shotz: first\n",
            "{file}:3: gsm8k.shotz is not a key of a suite; the nearest is gsm8k.shots",
        ),
        ("limitt: 3\n", "{file}:1: limitt is not a key of a suite; the nearest is limit"),
        (
            "x: 3\ny: 1\n",
            "{file}:1: x is not a key of a suite; valid here: tasks, stages, limit, batch_size, max_new_tokens, "
            "num_processes, gsm8k, gpqa, bfcl (1 more problem in this suite)",
        ),
        (
            "eval:\n  limit: 3\n",
            "{file}: eval is a section of a recipe, and a suite has none; write its keys at the top level",
        ),
        ("limit: 0\n", "{file}:1: limit is 0; it must be greater than or equal to 1"),
        (
            "tasks: [gsm9k]\n",
            "{file}:1: tasks.0 is 'gsm9k'; it must be 'gsm8k', 'gsm8k_nvidia', 'gpqa', 'gpqa_generative' or 'bfcl'; the "
            "nearest is 'gsm8k'",
        ),
        ("suite: quick\n", "{file}: suite is 'quick', and a suite names no other; write its keys here"),
        ("suite: {file}\n", "{file}: suite is '{file}', and a suite names no other; write its keys here"),
        ("- gsm8k\n", '{file}: the suite is ["gsm8k"]; it must be a mapping with the keys tasks, limit, ...'),
        ("", "{file}: the suite is null; it must be a mapping with the keys tasks, limit, ..."),
    ],
)
def test_a_wrong_suite_is_one_sentence_that_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text.format(file=file), encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        suite(str(file))
    assert str(raised.value) == message.format(file=file)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quik", "the nearest is 'quick'"),
        ("quick.yaml", "the nearest is 'quick'"),
        ("../suites/quick", "the nearest is 'quick'"),
        ("zzz", "suites: full, published, quick"),
    ],
)
def test_a_suite_that_is_not_there_is_told_with_the_nearest_or_those_that_are(name: str, hint: str) -> None:
    with pytest.raises(RecipeError) as raised:
        suite(name)
    sentence = f"eval.suite: there is no suite '{name}', nor a file of that name; {hint}"
    assert str(raised.value) == f"override 'suite={name}': {sentence}"


def test_a_recipe_is_told_the_line_of_a_suite_that_is_not_there(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\nbase: {model: x}\neval:\n  limit: 3\n  suite: quik\n", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe)
    sentence = "eval.suite: there is no suite 'quik', nor a file of that name; the nearest is 'quick'"
    assert str(raised.value) == f"{recipe}:5: {sentence}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bfcl.categories=live_simple", "eval.bfcl.categories is 'live_simple'; it must be a list, such as [live_simple]"),
        ("tasks=null", "eval.tasks is null; it must be a list, such as [a, b]"),
        ("tasks={a: 1}", 'eval.tasks is {"a": 1}; it must be a list, such as [a, b]'),
    ],
)  # fmt: skip
def test_what_must_be_a_list_is_shown_as_one(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_section(EvalSection, None, [override], "eval.")
    assert str(raised.value) == f"override '{override}': {message}"


def test_a_task_s_length_of_answers_is_its_own_unless_the_section_has_one_for_all() -> None:
    own = EvalSection()
    assert [own.new_tokens(task) for task in TASKS] == [512, 512, 0, 1024, 512]
    assert [EvalSection(max_new_tokens=9).new_tokens(task) for task in TASKS] == [9, 9, 0, 9, 9]
