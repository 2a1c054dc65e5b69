"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hymba_align.errors import RecipeError
from hymba_align.recipe import Recipe, gsm8k_paths, is_local_path, load_recipe, resolved_eval
from hymba_align.recipe_eval import GSM8KSection
from hymba_align.recipe_loading import dump_yaml, load_section

BASE = "name: demo\nbase: {model: owner/hymba}\n"


def test_a_stage_takes_the_keys_of_data_that_it_does_not_set(write) -> None:
    recipe = load_recipe(
        write(BASE + "data: {path: a.jsonl, examples_per_conversation: 3}\nsft: {}\ndpo: {data: {max_rows: 9}}\n"),
        ["data.path=b.jsonl"],
    )
    assert recipe.data_for("sft").model_dump() == recipe.data.model_dump()
    assert recipe.data_for("dpo") == recipe.data.model_copy(update={"max_rows": 9})
    assert recipe.data_for("dpo").path == "b.jsonl"
    dumped = write(recipe.dump_yaml())
    assert load_recipe(dumped) == recipe
    again = load_recipe(dumped, ["data.path=c.jsonl"])
    assert [again.data_for(stage).path for stage in again.training_stages] == ["c.jsonl", "c.jsonl"]
    assert again.data_for("dpo").max_rows == 9


def test_a_path_of_a_stage_stands_in_the_place_of_several_sources_and_the_reverse(write) -> None:
    general = BASE + "data: {sources: [{path: a.jsonl, max_rows: 3}, {path: b.jsonl}], bad_rows: drop}\nsft: {}\n"
    recipe = load_recipe(write(general + "dpo: {data: {path: pairs.csv, columns: {prompt: question}}}\n"))

    assert [source.path for source in recipe.data_for("sft").all_sources] == ["a.jsonl", "b.jsonl"]
    (source,) = recipe.data_for("dpo").all_sources
    assert (source.path, source.columns, source.max_rows) == ("pairs.csv", {"prompt": "question"}, None)
    assert recipe.data_for("dpo").bad_rows == "drop"
    assert load_recipe(write(recipe.dump_yaml())).data_for("dpo").all_sources == (source,)
    one = BASE + "data: {path: a.jsonl, columns: {question: q}}\nsft: {}\ndpo: {data: {sources: [{path: b.jsonl}]}}\n"
    (source,) = load_recipe(write(one)).data_for("dpo").all_sources
    assert (source.path, source.columns) == ("b.jsonl", {})


def test_a_stage_can_undo_a_limit_of_data(write) -> None:
    recipe = load_recipe(write(BASE + "data: {path: a.jsonl, max_rows: 3}\nsft: {}\ndpo: {data: {max_rows: null}}\n"))

    assert (recipe.data_for("sft").max_rows, recipe.data_for("dpo").max_rows) == (3, None)
    assert load_recipe(write(recipe.dump_yaml())).data_for("dpo").max_rows is None


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return "recipe.yaml"

    return write


def test_a_recipe_keeps_what_it_says_and_fills_in_the_rest(write) -> None:
    recipe = load_recipe(
        write(BASE + "data: {path: rows.jsonl}\nsft: {trainer: {learning_rate: 5e-5}}\neval: {limit: 3}\n")
    )

    assert recipe.sft is not None
    assert recipe.sft.trainer == {"learning_rate": 5e-5}
    assert recipe.sft.max_length == 8192
    assert recipe.seed == 42
    assert recipe.training_stages == ("sft",)
    assert recipe.scored_stages == ("base", "sft")
    assert recipe.data_for("sft").path == "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("12", 12),
        ("0x1f", 31),
        ("true", True),
        ("~", None),
        ("", None),
        ("no", "no"),  # save_strategy: no
        ("off", "off"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2026-11-21", "2026-11-21"),
        ("'5e-5'", "5e-5"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(write, text: str, value: object) -> None:
    recipe = load_recipe(write(BASE + f"data: {{path: a.jsonl}}\nsft: {{trainer: {{key: {text}}}}}\n"))

    assert recipe.sft is not None
    assert recipe.sft.trainer["key"] == value
    assert type(recipe.sft.trainer["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BASE + "sft:\n  max_lenght: 3\n",
            "recipe.yaml:4: sft.max_lenght is not a key of a recipe; the nearest is sft.max_length",
        ),
        (
            "nam: demo\nbase: {model: m}\neval: {}\n",
            "recipe.yaml:1: nam is not a key of a recipe; the nearest is name (1 more problem in this recipe)",
        ),
        (
            BASE + "eval: {}\nmax_new_tokens: 3\n",
            "recipe.yaml:4: max_new_tokens is not a key of a recipe; the nearest is eval.max_new_tokens",
        ),
        (
            BASE + "eval: {}\nx: 3\n",
            "recipe.yaml:4: x is not a key of a recipe; valid here: name, output_dir, seed, base, data, sft, dpo, lora, eval, inspect, launch",
        ),
        (
            BASE + "data: {path: a.jsonl}\nsft:\n  max_length: long\n",
            "recipe.yaml:5: sft.max_length is 'long'; it must be a valid integer",
        ),
        (
            BASE + "data: {path: a.jsonl}\nsft:\n  max_length: 3\n",
            "recipe.yaml:5: sft.max_length is 3; it must be greater than or equal to 8",
        ),
        (BASE + "sft: 3\n", "recipe.yaml:3: sft is 3; it must be a section with keys of its own"),
        (BASE + "data: {path: 3}\n", "recipe.yaml:3: data.path is 3; it must be a string, so put it in quotes"),
        ("name: a b\nbase: {model: m}\neval: {}\n", "recipe.yaml:1: name is 'a b'; use letters, digits, '.', '_' and '-', with a letter or digit first"),
        ("base: {model: m}\neval: {}\n", "recipe.yaml: name is missing; add it"),
        (
            BASE + "eval: {stages: [bass]}\n",
            "recipe.yaml:3: eval.stages.0 is 'bass'; it must be 'base', 'sft' or 'dpo'; the nearest is 'base'",
        ),
        (BASE + "eval: {tasks: [gsm9k]}\n", "recipe.yaml:3: eval.tasks.0 is 'gsm9k'; it must be 'gsm8k', 'gsm8k_nvidia', 'gpqa', 'gpqa_generative' or 'bfcl'; the nearest is 'gsm8k'"),
        (
            BASE + "data: {path: a.jsonl, max_rows: 0}\nsft: {data: {split: x}}\ndpo: {data: {split: y}}\n",
            "recipe.yaml:3: data.max_rows is 0; it must be greater than or equal to 1",
        ),
        (BASE + "seed: 1\nseed: 2\n", "recipe.yaml:4: seed stands twice, first in line 3; remove one of them"),
        (BASE + "sft:\n  trainer: {a: 1, a: 2}\n", "recipe.yaml:4: sft.trainer.a stands twice, first in line 4; remove one of them"),
        ("name: [\n", "recipe.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        (
            "name: demo\nbase:\n  model: m\n dtype: float32\n",
            "recipe.yaml:4: not valid YAML: expected <block end>, but found '<block mapping start>'; check the indentation of "
            "lines 3 and 4",
        ),
        (
            "name: demo\n\n  seed: 1\n",
            "recipe.yaml:3: not valid YAML: mapping values are not allowed here; check the indentation of lines 1 and 3",
        ),
        (
            "name: a: b\n",
            "recipe.yaml:1: not valid YAML: mapping values are not allowed here; put a value that holds a colon and a space in "
            "quotes",
        ),
        (
            "base:\n\tmodel: m\n",
            "recipe.yaml:2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not with tabs",
        ),
        ("base\nseed: 1\n", "recipe.yaml:2: not valid YAML: mapping values are not allowed here; put a colon behind the key in line 1"),
        ("name: demo\nbase\nseed: 1\n", "recipe.yaml:3: not valid YAML: could not find expected ':'; put a colon behind the key in line 2"),
        ("name: 'x\nseed: 1\n", "recipe.yaml:3: not valid YAML: found unexpected end of stream; close the quotes that open in line 1"),
        ("name: {a: 1\nb: 2\n", "recipe.yaml:2: not valid YAML: expected ',' or '}', but got ':'; close the bracket that opens in line 1"),
        (
            BASE + "sft: {}\ndata:\n  sources:\n    - {path: a, max_row: 3}\n",
            "recipe.yaml:6: data.sources.0.max_row is not a key of a recipe; the nearest is data.sources.0.max_rows",
        ),
        ("a: &x [*x]\n", "recipe.yaml: a YAML alias refers to itself; remove it"),
        ("a: !!python/object:os.system {}\n", "recipe.yaml:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("- a\n", 'recipe.yaml: the recipe is ["a"]; it must be a mapping with the keys name, base, ...'),
        ("", "recipe.yaml: the recipe is null; it must be a mapping with the keys name, base, ..."),
    ],
)  # fmt: skip
def test_a_malformed_recipe_is_one_sentence_with_file_line_key_and_value(write, text: str, message: str) -> None:
    path = write(text)

    with pytest.raises(RecipeError) as caught:
        load_recipe(path)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "recipe.yaml: the recipe has none of the sections sft, dpo, eval and inspect; add at least one"),
        (BASE + "dpo: {}\n", "recipe.yaml: dpo has no data; add a section data, or dpo.data"),
        (
            BASE + "dpo: {data: {max_rows: 3}}\n",
            "recipe.yaml: dpo.data has no path, and there is no section data; add dpo.data.path",
        ),
        (
            BASE + "eval: {stages: [sft]}\n",
            "recipe.yaml: eval.stages names sft, and there is no section sft; add it or remove the name",
        ),
        (
            "name: demo\nbase: {}\neval: {}\n",
            "recipe.yaml:2: base: it holds neither model (a checkpoint) nor config (random weights); set one of them",
        ),
        (
            "name: demo\nbase: {model: m, config: {}}\neval: {}\n",
            "recipe.yaml:2: base: it holds both model and config; remove one of them",
        ),
        (
            "name: demo\nbase: {config: {}}\neval: {}\n",
            "recipe.yaml:2: base: config makes random weights, which come without a tokenizer; set base.tokenizer",
        ),
        (
            "name: demo\nbase: {config: {}, tokenizer: t, revision: r}\neval: {}\n",
            "recipe.yaml:2: base: revision names a version of model, and there is no model; remove it",
        ),
        (
            BASE + "data: {sources: [{path: a}, {path: b}]}\ndpo: {data: {roles: {a: user}, columns: {prompt: q}}}\n",
            "recipe.yaml: dpo.data.columns is of one source, and data has several; give dpo.data a path or sources of its own, "
            "which then replace those, or move columns into one of data.sources",
        ),
        (
            BASE + "eval: {}\nlaunch: {num_processes: 2}\n",
            "recipe.yaml:4: launch: num_processes is 2, and nothing says how they work together; "
            "set launch.launcher (ddp, zero2, ...: accelerate_configs/README.md says which)",
        ),
        (
            BASE + "eval: {}\nlaunch: {num_processes: 2, launcher: single}\n",
            "recipe.yaml:4: launch: launcher is single and num_processes is 2; set num_processes to 1, or launcher to ddp",
        ),
        (
            BASE + "eval: {}\nlaunch: {launcher: ddp, accelerate_config: my.yaml}\n",
            "recipe.yaml:4: launch: it holds both launcher and accelerate_config; remove one of them (or set it to null)",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(write, text: str, message: str) -> None:
    path = write(text)

    with pytest.raises(RecipeError) as caught:
        load_recipe(path)

    assert str(caught.value) == message


def test_a_missing_recipe_is_named_with_its_neighbours(write) -> None:
    write(BASE)

    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes.yaml")

    assert str(caught.value) == "recipes.yaml: there is no such recipe file; there is recipe.yaml"


def test_a_folder_in_place_of_a_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder; name a recipe file in it$"):
        load_recipe(tmp_path)


def test_overrides_are_applied_before_validation_and_may_add_sections(write) -> None:
    path = write(BASE + "eval: {limit: 3}\n")

    recipe = load_recipe(
        path,
        [
            "eval.limit=null",
            "data.path=rows.jsonl",
            "dpo.trainer.learning_rate=1e-6",
            "dpo.trainer.accelerator_config.even_batches=false",
            "base={config: {hidden_size: 8}, tokenizer: t}",
            "eval.stages=[dpo]",
        ],
    )

    assert recipe.eval is not None
    assert recipe.dpo is not None
    assert recipe.eval.limit is None
    assert recipe.data_for("dpo").path == "rows.jsonl"
    assert recipe.dpo.trainer == {"learning_rate": 1e-6, "accelerator_config": {"even_batches": False}}
    assert recipe.base.config == {"hidden_size": 8}
    assert recipe.base.model is None
    assert recipe.scored_stages == ("dpo",)


def test_an_override_can_remove_a_section(write) -> None:
    path = write(BASE + "data: {path: a.jsonl}\nsft: {}\ndpo: {}\n")

    assert load_recipe(path, ["dpo=null"]).training_stages == ("sft",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limit", "override 'limit' is not of the form key.path=value, for instance sft.max_length=1024"),
        (".limit=3", "override '.limit=3' is not of the form key.path=value, for instance sft.max_length=1024"),
        ("limit=3", "override 'limit=3': limit is not a key of a recipe; the nearest is eval.limit"),
        (
            "sft.guard.x=3",
            "override 'sft.guard.x=3': sft.guard.x is not a key of a recipe; valid here: on_nonfinite, max_skipped, on_spike, "
            "spike_window, spike_deviations, spike_logs",
        ),
        ("data.pth=a", "override 'data.pth=a': data.pth is not a key of a recipe; the nearest is data.path"),
        ("eval.limit.x=3", "override 'eval.limit.x=3': eval.limit is a value and has no keys; write eval.limit=value"),
        (
            "data.sources.0.max_rows=12",
            "override 'data.sources.0.max_rows=12': data.sources is a list and is given whole, as in data.sources=[{path: ...}, ...]",
        ),
        ("eval.tasks.0=gsm8k", "override 'eval.tasks.0=gsm8k': eval.tasks is a list and is given whole, as in eval.tasks=[value, ...]"),
        ("eval.limit=few", "override 'eval.limit=few': eval.limit is 'few'; it must be a valid integer"),
        ("eval.limit=[", "override 'eval.limit=[': not valid YAML: expected the node content, but found '<stream end>'"),
        ("eval={limit: 1, limit: 2}", "override 'eval={limit: 1, limit: 2}': eval.limit stands twice, first in line 1; remove one of them"),
        ("sft.trainer.a.b=3", "override 'sft.trainer.a.b=3': sft.trainer.a is 1, which has no keys; override sft.trainer.a itself"),
    ],
)  # fmt: skip
def test_a_malformed_override_is_one_sentence_that_quotes_it(write, override: str, message: str) -> None:
    path = write(BASE + "data: {path: a.jsonl}\nsft: {trainer: {a: 1}}\neval: {}\n")

    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])

    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.CSV", "rows.json.gz"])
def test_a_file_of_rows_in_the_place_of_a_recipe_is_told_what_makes_a_recipe(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"messages": []}\n{"messages": []}\n')

    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / name)

    path = tmp_path / name
    told = f"{path} is data and no recipe; 'hymba-align init NAME --data {path}' writes a recipe that trains on it"
    assert str(caught.value) == told


def test_yaml_anchors_and_merges_work(write) -> None:
    recipe = load_recipe(
        write(BASE + "data: {path: a.jsonl}\nsft: &stage {max_length: 64}\ndpo: {<<: *stage, share_prefix: false}\n")
    )

    assert recipe.dpo is not None
    assert (recipe.dpo.max_length, recipe.dpo.share_prefix) == (64, False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc-.:#5e", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@given(value=values)
@example(value="\x85")  # a line break to YAML, which reads it back as a space unless it is escaped
def test_every_trainer_value_survives_the_run_folders_recipe(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    sections = {"name": "demo", "base": {"model": "m"}, "data": {"path": "a.jsonl"}, "sft": {"trainer": {"key": value}}}
    recipe = Recipe.model_validate_json(json.dumps(sections))

    path.write_text(recipe.dump_yaml(), encoding="utf-8")

    assert load_recipe(path) == recipe


def test_words_that_look_like_numbers_are_quoted_when_written() -> None:
    assert dump_yaml({"a": "5e-5", "b": 5e-5, "c": "no", "d": ("x",)}) == "a: '5e-5'\nb: 5.0e-05\nc: 'no'\nd:\n- x\n"


def test_a_section_alone_is_read_from_overrides() -> None:
    section = load_section(GSM8KSection, None, ["num_fewshot=2"], prefix="eval.gsm8k.")

    assert section.num_fewshot == 2


def test_an_unknown_key_of_a_section_alone_is_named_with_its_prefix() -> None:
    with pytest.raises(RecipeError) as caught:
        load_section(GSM8KSection, None, ["num_fewshots=2"], prefix="eval.gsm8k.")

    assert str(caught.value) == (
        "override 'num_fewshots=2': eval.gsm8k.num_fewshots is not a key of a recipe; "
        "the nearest is eval.gsm8k.num_fewshot"
    )


# --- Files that follow from data.path ---------------------------------------------------------------------------------


def _gsm8k_recipe(path: Path, **gsm8k: str) -> Recipe:
    sections = {"name": "d", "base": {"model": "m"}, "data": {"path": str(path)}, "sft": {}, "eval": {"gsm8k": gsm8k}}
    return Recipe.model_validate_json(json.dumps(sections))


def test_gsm8k_files_default_to_local_question_answer_data(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"question": "q", "answer": "a"}\n')
    test.write_text("")

    assert gsm8k_paths(_gsm8k_recipe(train)) == GSM8KSection(train_path=str(train), test_path=str(test))
    assert gsm8k_paths(_gsm8k_recipe(train, test_path="t")) == GSM8KSection(train_path=str(train), test_path="t")
    assert resolved_eval(_gsm8k_recipe(train)).gsm8k.test_path == str(test)


@pytest.mark.parametrize("row", ['{"messages": []}', "not json", "", "[]"])
def test_gsm8k_files_stay_the_hubs_where_the_data_is_something_else(tmp_path: Path, row: str) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(row + "\n")
    (tmp_path / "test.jsonl").write_text("")

    assert gsm8k_paths(_gsm8k_recipe(train)) == GSM8KSection()
    assert gsm8k_paths(_gsm8k_recipe(tmp_path / "absent.jsonl")) == GSM8KSection()


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("nvidia/Hymba-1.5B-Base", False),
        ("gsm8k", False),
        ("rows.jsonl", True),
        ("data/rows.parquet", True),
        ("./model", True),
        ("/models/hymba", True),
        ("runs/demo/sft/final", True),
        ("tests", True),  # it exists
    ],
)
def test_what_looks_like_a_path_is_one(name: str, local: bool) -> None:
    assert is_local_path(name) is local
