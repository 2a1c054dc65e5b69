"""Code that someone plants in a checkpoint, a recipe or data never runs; a converter runs, and is named aloud first."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.checkpoint import load_model
from hymba_align.cli import main
from hymba_align.data.reading import converters
from hymba_align.data.reading.converters import load_converter
from hymba_align.data.reading.sources import open_source
from hymba_align.data.rendering import render
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError, DataError, RecipeError, RenderError
from hymba_align.recipe import SourceSection, load_recipe
from hymba_align.recipe_loading import dump_yaml

PACKAGE = Path(__file__).parent.parent / "hymba_align"
GOLDEN = Path(__file__).parent / "golden" / "tiny"
TOKENIZER = Path("data/arithmetic/tokenizer")
TALK = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What planted code would make."""
    return tmp_path / "code-ran"


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks on stdin whether to run code is answered yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def python_that_makes(mark: Path) -> str:
    return f"import os\nos.mkdir({str(mark)!r})\nclass HymbaConfig: ...\nclass HymbaForCausalLM: ...\nclass Evil: ...\n"


@pytest.mark.usefixtures("no_questions")
def test_code_beside_a_checkpoint_is_not_imported_and_not_named_in_what_is_written(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(TOKENIZER, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "custom_generate").mkdir()
    for name in ("configuration_hymba", "modeling_hymba", "tokenization_evil", "custom_generate/generate"):
        (folder / f"{name}.py").write_text(python_that_makes(mark))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "pytorch_model.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    model, tokenizer = load_model(folder), load_tokenizer(str(folder))
    model.generation_config.max_new_tokens = 2
    model.generate(torch.tensor([[5, 6, 7]]))
    model.save_pretrained(tmp_path / "written")
    tokenizer.save_pretrained(tmp_path / "written")

    assert not mark.exists()
    written = "".join(path.read_text() for path in (tmp_path / "written").glob("*config.json"))
    assert "tokenization_evil" not in written
    assert "nvidia/Hymba-1.5B-Base--modeling_hymba.HymbaForCausalLM" in written


def test_weights_that_are_a_pickle_are_refused_and_never_opened(tmp_path: Path, mark: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))

    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)

    assert str(caught.value) == (
        f"{tmp_path}: the weights are a pickle (pytorch_model.bin), which can run code when it is opened, and hymba-align "
        "never opens one; name a checkpoint with model.safetensors"
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.mkdir ["{mark}"]',
        '!!python/object/new:os.mkdir ["{mark}"]',
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!function os.mkdir",
    ],
)
def test_a_yaml_tag_that_makes_an_object_is_refused_in_recipes_and_overrides(
    tmp_path: Path, mark: Path, value: str
) -> None:
    value = value.replace("{mark}", str(mark))
    (tmp_path / "evil.yaml").write_text(f"name: {value}\nbase: {{model: owner/hymba}}\neval: {{}}\n")

    with pytest.raises(RecipeError, match=r"evil\.yaml:1: not valid YAML: could not determine a constructor"):
        load_recipe(tmp_path / "evil.yaml")
    with pytest.raises(RecipeError, match=r"could not determine a constructor"):
        load_recipe("recipes/tiny/arithmetic.yaml", [f"name={value}"])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pandas", "csv", "sql", "generator", "webdataset", "text"])
def test_a_reader_of_datasets_is_no_data_set(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Payload(mark)))

    with pytest.raises(DataError) as caught:
        open_source(SourceSection(path=name))

    assert str(caught.value) == (
        f"{name} is a reader of the library datasets and no data set; name a file that exists here, or a data set of the hub "
        "as owner/name"
    )
    assert not mark.exists()


def test_a_loading_script_and_pickles_beside_data_are_passed_over(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(python_that_makes(mark))
    (folder / "train.pkl").write_bytes(pickle.dumps(Payload(mark)))
    (folder / "rows.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")

    source = open_source(SourceSection(path=str(folder)))

    assert [row.place.rpartition("/")[2] for row in source.rows()] == ["rows.jsonl:1"]
    assert sorted(source.passed_over) == ["rows.py", "train.pkl"]
    assert not mark.exists()


@pytest.mark.parametrize(
    "path", ["simplecache::https://example.com/a.jsonl", "filecache::file:///a.jsonl", "reference://a.jsonl"]
)
def test_a_file_system_that_keeps_copies_is_refused(path: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(SourceSection(path=path))

    scheme = path.partition(":")[0]
    assert str(caught.value) == (
        f"{path}: the file system '{scheme}' keeps copies or follows other files; name the data's own URL"
    )


def test_an_option_that_makes_a_file_system_write_is_refused(tmp_path: Path) -> None:
    options = {"s3": {"cache_storage": str(tmp_path)}}

    with pytest.raises(DataError, match="storage_options has cache_storage, by which files are written or others read"):
        open_source(SourceSection(path="s3://bucket/a.jsonl", storage_options=options))


# ---- converters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["subprocess:run", "os:system", "builtins:exec", "runpy:run_path", "json:loads"])
def test_a_function_of_python_itself_is_no_converter(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_converter(name)

    module = name.partition(":")[0]
    assert str(caught.value) == (
        f"convert is {name}, and {module} is a part of Python and no converter; name a function of a module of your own"
    )


def test_a_converter_is_named_with_its_file_before_its_module_runs_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "g_loud"
    package.mkdir()
    (package / "__init__.py").write_text("print('the package runs')\n")
    (package / "rows.py").write_text("print('the module runs')\ndef convert(row):\n    return row\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    load_converter("g_loud.rows:convert")
    load_converter("g_loud.rows:convert")

    assert capsys.readouterr().out.splitlines() == [
        f"convert runs code: convert of the module g_loud.rows, from {package / 'rows.py'}",
        "the package runs",
        "the module runs",
    ]


def test_a_module_that_stands_in_for_an_installed_one_is_named_by_the_file_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "yaml.py").write_text("def safe_load(row):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hymba_align.data.reading.converters._named", set())  # another test may have had it named

    loaded = load_converter("yaml:safe_load")

    import yaml

    assert loaded.function is yaml.safe_load
    assert capsys.readouterr().out == f"convert runs code: safe_load of the module yaml, from {yaml.__file__}\n"


@pytest.fixture
def converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_base: dict[str, Any]) -> Path:
    """A recipe with a converter, in a folder of its own that is the current one."""
    base = {**small_base, "tokenizer": str(TOKENIZER.resolve())}
    (tmp_path / "g_rows.py").write_text(
        "print('the module runs')\n"
        "def to_messages(row):\n"
        "    return {'messages': [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': 'yes'}]}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "is it?"}\n' * 4)
    trainer = {"max_steps": 1, "per_device_train_batch_size": 1, "report_to": "none"}
    values = {
        "name": "converting",
        "base": base,
        "data": {"path": "rows.jsonl", "convert": "g_rows:to_messages"},
        "sft": {"max_length": 64, "trainer": trainer},
    }
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    "command",
    [
        ["run", "recipe.yaml", "--dry-run"],
        ["data", "check", "recipe.yaml"],
        ["data", "preview", "recipe.yaml"],
        ["run", "recipe.yaml"],
    ],
)
def test_every_command_names_the_converter_before_it_runs(
    converting: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "g_rows", raising=False)
    monkeypatch.setattr(converters, "_named", set())
    monkeypatch.setattr(converters, "_loaded_from", {})

    code = main(command)

    lines = capsys.readouterr().out.splitlines()
    named = lines.index(f"convert runs code: to_messages of the module g_rows, from {converting.parent / 'g_rows.py'}")
    assert named < lines.index("the module runs")
    assert code == 0, lines


# ---- chat templates -------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].mkdir('{mark}') }}",
    "{{ strftime_now.__globals__.keys() }}",
    "{{ namespace.__init__.__globals__.keys() }}",
    "{{ dict.__class__.__init__.__globals__['__builtins__']['__import__']('os').mkdir('{mark}') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}",
    "{{ lipsum.__globals__['os'].mkdir('{mark}') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.mkdir('{mark}') }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
    "{{ (cycler | attr('__init__') | attr('__globals__')).os.mkdir('{mark}') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ [messages] | map(attribute='__class__.__mro__') | list | string | length / 0 }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(mark: Path, escape: str) -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.chat_template = escape.replace("{mark}", str(mark)) + "{% generation %}x{% endgeneration %}"

    with pytest.raises(RenderError, match=r"^the chat template (refuses|fails on) the conversation"):
        render(tokenizer, TALK)

    assert not mark.exists()


def test_rows_are_text_and_no_templates(mark: Path) -> None:
    content = "{{ 7 * 7 }}{% for a in [1, 2] %}x{% endfor %}"
    tokenizer = load_tokenizer(str(TOKENIZER))
    own = tokenizer.chat_template
    for template in (own, own + " "):  # written by our own code, and by the sandbox
        tokenizer.chat_template = template
        text = tokenizer.decode(render(tokenizer, [{"role": "user", "content": content}, TALK[1]]).input_ids)
        assert "{{ 7 * 7 }}" in text
        assert "49" not in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "fails on the conversation (OverflowError: Range too big."),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.5 s for a conversation; use 'hymba'"),
        ("{{ 'x' * (10 ** 18) }}", "fails on the conversation (MemoryError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on the conversation (RecursionError"),
        ("{{ 1 / 0 }}", "fails on the conversation (ZeroDivisionError: division by zero); correct it, or use 'hymba'"),
        ("{{ messages[99].content }}", "refuses the conversation: list object has no element 99"),
        ("{% for %}", "refuses the conversation: "),
    ],
)  # fmt: skip
def test_a_template_that_never_ends_or_fails_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr("hymba_align.data.rendering.TEMPLATE_LIMIT_S", 0.5)
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.chat_template = template + "{% generation %}x{% endgeneration %}"

    with pytest.raises(RenderError) as caught:
        render(tokenizer, TALK)

    assert str(caught.value).startswith(f"the chat template {reason}")


def test_several_templates_in_one_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(str(folder), chat_template="released")

    assert (
        str(caught.value)
        == f"{folder}: the tokenizer carries several chat templates; name one of them as a .jinja file"
    )


def test_a_link_out_of_a_tokenizer_folder_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
    shutil.move(folder / "tokenizer_config.json", tmp_path / "elsewhere")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is a link that leads out of the folder"):
        load_tokenizer(str(folder))


# ---- the package itself ---------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "pickle.load",
        "pickle.loads",
        "dill.load",
        "joblib.load",
        "marshal.loads",
        "shelve.open",
    ),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "cloudpickle.loads"),
}
NEEDED_KEYWORDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_line_of_the_package_reads_code_from_data() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, call in calls(path):
            given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            key, value = NEEDED_KEYWORDS.get(name, (None, None))
            wrong = name in FORBIDDEN_CALLS or given.get("trust_remote_code", False) is not False
            wrong = wrong or (key is not None and given.get(key) is not value)
            wrong = wrong or (given.get("shell", False) is not False)
            if wrong:
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call):.80}")
    assert not found, "\n".join(found)


def test_every_template_environment_of_our_own_escapes_and_renders_our_own_page() -> None:
    found = {
        str(path.relative_to(PACKAGE)): ast.unparse(call)
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, call in calls(path)
        if name.rpartition(".")[2] in ("Environment", "SandboxedEnvironment", "Template", "from_string")
    }
    assert set(found) == {"data/inspection/preview.py", "eval/report/html.py"}
    for name in found:
        source = (PACKAGE / name).read_text(encoding="utf-8")
        assert source.count("Environment(autoescape=True") == source.count("Environment(") == 1
        assert re.search(r"environment\.from_string\((PAGE|macros \+ path)\.read_text", source)
    pages = {
        ast.unparse(call.args[0])
        for path in (PACKAGE / "eval" / "report" / "html.py", PACKAGE / "run_view" / "comparison_pages.py")
        for name, call in calls(path)
        if name.rpartition(".")[2] == "template"
    }
    assert pages == {"FOLDER / 'report.html.jinja'", "PAGE"}
