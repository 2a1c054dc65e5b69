"""Runs the blocks of a page, each by a rule with a name; a block without a rule is an error.

| block | rule |
|---|---|
| `bash` | every line is a command of `PROGRAMS`: hymba-align runs in this process, made small; others are checked as far as they can be |
| `console` | lines that begin with `$ ` as above; what stands below must be what they print (`…` stands for any text, alone for any lines) |
| `python` | executed with the names of the page's earlier snippets |
| `yaml` | part of a recipe, laid over the tiny one, or a whole recipe: validated strictly |
| any language with a file's name after it | written to that file |
| `json` | must be JSON |
| `text`, `csv`, `html` and none | shown only |

Directives: `exit N` (the code of every command), `with WORDS` (appended to every hymba-align command), `stdin TEXT`, `setup
NAME`, `parse REASON` (for what cannot run here: options and recipe are checked), `foreign PROJECT` (another project's), `is
NAME` (the block is what a snippet's name holds).
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml
from document_blocks import ROOT, Block

from hymba_align.cli import cli, main
from hymba_align.errors import HymbaAlignError
from hymba_align.eval.bfcl.environment import bfcl_python
from hymba_align.recipe import Recipe, load_recipe

TINY = "recipes/tiny/arithmetic.yaml"
DIRECTIVES = {"exit", "foreign", "is", "parse", "setup", "stdin", "with"}
REASONS = {
    "gpus": "needs GPUs",
    "hub": "needs the network",
    "endless": "ends when it is stopped",
    "slurm": "needs Slurm",
    "interactive": "needs a terminal",
    "install": "installs a package",
}
SHOWN_ONLY = {"text", "csv", "html", ""}
# The tiny recipe at a size for tests: a few rows, two steps of SFT, one of DPO, two problems, a part of a look inside.
SMALL_BASE = ("hidden_size=32", "v_head_dim=16", "num_memory_tokens=4", "num_hidden_layers=2")
SMALL_BASE += ("global_attn_idx=[0]", "kv_reuse_group=[]")
SMALL = {
    "base": tuple(f"base.config.{change}" for change in SMALL_BASE),
    "data": ("data.max_rows=24",),
    "sft": ("sft.trainer.max_steps=2",),
    "dpo": ("dpo.data.max_rows=16", "dpo.trainer.max_steps=1"),
    "eval": ("eval.limit=2", "eval.max_new_tokens=4"),
    "inspect": ("inspect.documents=2", "inspect.max_length=96", "inspect.parts=[fusion]"),
}


class NoRule(Exception):
    """A block that no rule covers, so that nobody would notice when it is wrong."""


@dataclass
class Outcome:
    """What a command left: its exit code, and what it printed."""

    code: int
    output: str = ""
    stdout: str = ""


@dataclass
class Page:
    """The state between the blocks of a page: its folder, the names of its snippets, and what was replaced.

    `setups` make what a block asks for; a setup returns texts to replace in all later blocks.
    """

    folder: Path
    setups: Mapping[str, Callable[[Page], dict[str, str]]] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    replaced: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Runs a block in the page's folder. Raises: AssertionError, NoRule."""
        for name, value in block.directives:
            if name not in DIRECTIVES:
                raise NoRule(f"{block.place}: nobody knows the directive '{name}'")
            if name == "setup":
                if value not in self.setups:
                    raise NoRule(f"{block.place}: there is no setup '{value}'; setups: {', '.join(self.setups)}")
                self.replaced |= self.setups[value](self)
        if block.directive("foreign") is not None:
            return check_foreign(block)
        if block.is_file:
            return write_file(self.folder / block.name, block)
        if (name := block.directive("is")) is not None:
            assert block.text == f"{self.names[name]}\n", f"{block.place}: {name} is\n{self.names[name]}"
            return None
        if block.language in SHOWN_ONLY:
            looks_like = {line.split()[0] for line in block.text.splitlines() if line.split()} & {"hymba-align", "$"}
            if looks_like and block.language == "":
                raise NoRule(f"{block.place}: commands stand in a block without a language; write ```bash")
            return None
        rule = {
            "bash": self.bash,
            "console": self.console,
            "python": self.python,
            "yaml": check_recipe_part,
            "json": lambda block: json.loads(block.text),
        }.get(block.language)
        if rule is None:
            raise NoRule(f"{block.place}: no rule for blocks of the language '{block.language}'")
        rule(block)
        return None

    # ---- commands -----------------------------------------------------------------------------------------------------

    def bash(self, block: Block) -> None:
        """Runs every line; each ends with the exit code that the block expects."""
        for line in command_lines(block.text):
            self.command(line, block)

    def console(self, block: Block) -> None:
        """Runs the lines that begin with a dollar, and compares what they print with what stands below them."""
        session = re.split(r"^\$ (.*(?:(?<=\\)\n.*)*)\n?", block.text, flags=re.MULTILINE)
        assert not session[0].strip(), f"{block.place}: a console block begins with '$ '"
        for line, shown in zip(session[1::2], session[2::2], strict=True):
            for command in command_lines(line):
                printed = self.command(command, block).output
                assert matches(shown, printed), f"{block.place}: shown\n{shown}\nprinted\n{printed}"

    def command(self, line: str, block: Block) -> Outcome:
        """What a line of a shell did: pipes and redirections of one command are understood, nothing more."""
        for old, new in self.replaced.items():
            line = line.replace(old, new)
        parts = pipeline(line, block.place)
        keyboard = block.directive("stdin")
        typed = "" if keyboard is None else keyboard.replace("\\n", "\n") + "\n"
        outcome = Outcome(0)
        for part in parts:
            if part.reads is not None:
                typed = (self.folder / part.reads).read_text(encoding="utf-8")
            outcome = self.program(part, typed, block)
            typed = outcome.stdout
            if part.writes is not None:
                (self.folder / part.writes).write_text(outcome.stdout, encoding="utf-8")
        expected = int(block.directive("exit") or 0)
        assert outcome.code == expected, f"{block.place}: {line}\nended with {outcome.code}:\n{outcome.output}"
        self.outcomes.append(outcome)
        return outcome

    def program(self, part: Part, typed: str, block: Block) -> Outcome:
        """What one program did."""
        name, *arguments = part.words
        if part.words[:3] == ["python", "-m", "json.tool"] or name == "jq":
            json.loads(typed)  # what was printed is one value
            return Outcome(0)
        if name in ("accelerate", "torchrun"):
            assert "hymba_align" in arguments, f"{block.place}: {name} starts something else than hymba_align"
            check_options(arguments[arguments.index("hymba_align") + 1 :], block.place)
            return Outcome(0)
        with self.environment(part.variables):
            if name == "hymba-align":
                return self.hymba_align(arguments, typed, block)
            if name == "curl":
                assert self.replaced, f"{block.place}: curl needs <!-- test: setup server -->"
                return shell(["curl", "--fail-with-body", *arguments], self.folder, typed)
            if name in HARMLESS:
                return shell(part.words, self.folder, typed)
        rule = PROGRAMS.get(name)
        if rule is None:
            raise NoRule(f"{block.place}: no rule for the program '{name}'")
        rule(arguments, block.place)
        return Outcome(0)

    @contextlib.contextmanager
    def environment(self, variables: dict[str, str]) -> Iterator[None]:
        """The variables before a command, while it runs."""
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def hymba_align(self, arguments: list[str], typed: str, block: Block) -> Outcome:
        """Runs a command of ours in this process, at a size for tests; with `parse`, checks what it is given."""
        arguments = [*arguments, *shlex.split(block.directive("with") or "")]
        reason = block.directive("parse")
        if reason is not None:
            if reason not in REASONS:
                raise NoRule(f"{block.place}: '{reason}' is none of {', '.join(REASONS)}")
            check_options(arguments, block.place)
            if arguments[0] not in ("run", "sft", "dpo"):
                return Outcome(0)
            arguments = [*arguments, "--dry-run"]
        if arguments[0] == "install-bfcl":
            bfcl_python()  # complete: two pages at once would meet it half made, and no test takes packages from a network
        return in_process(made_small(arguments), typed)

    def python(self, block: Block) -> None:
        """Executes a snippet: our own document, not a model's output."""
        text = block.text
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, block.place, "exec"), self.names)
        self.outcomes.append(Outcome(0, printed.getvalue(), printed.getvalue()))


# ---- a line of a shell ----------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One command of a pipeline."""

    words: list[str]
    variables: dict[str, str]
    reads: str | None = None
    writes: str | None = None


def command_lines(text: str) -> list[str]:
    """The commands of a block, with lines that go on after a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def pipeline(line: str, place: str) -> list[Part]:
    """A line's commands, divided at pipes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>&;")
    lexer.whitespace_split = True
    parts, words = list[Part](), iter([*lexer, "|"])
    current = Part([], {})
    for word in words:
        if word == "|":
            assert current.words, f"{place}: a pipe without a command"
            parts.append(current)
            current = Part([], {})
        elif word == "<":
            current.reads = next(words)
        elif word == ">":
            current.writes = next(words)
        elif set(word) <= set("|<>&;"):
            raise NoRule(f"{place}: no rule for '{word}' between commands")
        elif not current.words and re.fullmatch(r"[A-Z_]+=.*", word):
            key, _, value = word.partition("=")
            current.variables[key] = value
        else:
            current.words.append(word)
    return parts


def in_process(arguments: list[str], typed: str = "") -> Outcome:
    """Runs hymba-align here; its standard output, and that together with its standard error."""
    both = io.StringIO()

    class Out(io.StringIO):
        """Standard output, which is also part of what a terminal shows."""

        def write(self, text: str) -> int:
            both.write(text)
            return super().write(text)

    out, keyboard = Out(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(both):
            code = main(arguments)
    finally:
        sys.stdin = keyboard
    return Outcome(code, both.getvalue(), out.getvalue())


def shell(words: list[str], folder: Path, typed: str) -> Outcome:
    """Runs another program."""
    done = subprocess.run(words, cwd=folder, input=typed, capture_output=True, text=True, check=False, timeout=60)
    return Outcome(done.returncode, done.stdout + done.stderr, done.stdout)


def matches(shown: str, printed: str) -> bool:
    """Whether the printed text is the shown one, where `…` stands for any text, and alone in a line for any lines."""
    pattern = ""
    for line in shown.strip("\n").splitlines():
        one = re.escape(line.rstrip()).replace("…", ".+")
        pattern += "(?:.*\n)*?" if line.strip() == "…" else f"{one} *\n"
    return re.fullmatch(pattern, printed.strip("\n") + "\n" if printed.strip("\n") else "") is not None


# ---- what a command is given ----------------------------------------------------------------------------------------


def check_options(arguments: list[str], place: str) -> None:
    """Asserts that click takes every option and argument of a command line."""
    command: click.Command = cli
    context, name = None, "hymba-align"
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=context)
        except click.ClickException as error:
            raise AssertionError(f"{place}: {error.format_message()}") from None
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        found, inner, arguments = command.resolve_command(context, rest)
        assert inner is not None, place
        command, name = inner, str(found)


def made_small(arguments: list[str]) -> list[str]:
    """The same command with few rows, steps and problems, where it does not say otherwise."""
    given = {argument.partition("=")[0] for argument in arguments}
    if arguments[:1] == ["eval"]:
        # One process: that several find the same is held by tests/eval/test_processes.py, at 8 s for each of them.
        small = ("limit=2", "max_new_tokens=4", "num_processes=1")
        return [*arguments, *(each for each in small if each.partition("=")[0] not in given)]
    if arguments[:1] == ["inspect"]:
        small = {"--documents": "4", "--contexts": "24"}
        if given & {"--data", "--text"}:  # without, it has no effect, and the command says so
            small["--max-length"] = "96"
        return [*arguments, *(word for name, value in small.items() if name not in given for word in (name, value))]
    if arguments[:1] not in (["run"], ["sft"], ["dpo"]) or "--dry-run" in arguments:
        return arguments
    with contextlib.suppress(click.ClickException, HymbaAlignError):  # the command itself says what is wrong
        command = cli.commands[arguments[0]]
        context = command.make_context(arguments[0], list(arguments[1:]))
        recipe = load_recipe(context.params["recipe"], context.params["overrides"])
        changes = [change for change in small_settings(recipe) if change.partition("=")[0] not in given]
        return [*arguments, *changes]
    return arguments


def small_settings(recipe: Recipe) -> list[str]:
    """Overrides that make a recipe small, for the sections that it has."""
    base = recipe.base.config is not None and "hidden_size" in recipe.base.config
    has = {
        "base": base,
        "data": recipe.data is not None and not recipe.data.sources,
        "sft": recipe.sft is not None,
        "dpo": recipe.dpo is not None,
        "eval": recipe.eval is not None,
        "inspect": recipe.inspect is not None,
    }
    return [change for section, changes in SMALL.items() if has[section] for change in changes]


# ---- rules for other blocks -----------------------------------------------------------------------------------------


def write_file(path: Path, block: Block) -> None:
    """Writes a named block; rows of JSON Lines may be spread over lines in the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file_content(block), encoding="utf-8")


def file_content(block: Block) -> str:
    """The file's content, a JSON Lines file's rows on one line each."""
    if not block.name.endswith(".jsonl") or block.language not in ("json", "jsonl"):
        return block.text
    decoder, text, lines = json.JSONDecoder(), block.text.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
        text = text[end:].strip()
    return "".join(lines)


def check_foreign(block: Block) -> None:
    """Asserts that another project's block can be read at all."""
    assert block.directive("foreign"), f"{block.place}: whose is it? <!-- test: foreign NAME -->"
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict), block.place
    elif block.language == "python":
        ast.parse(block.text)
    elif block.language == "bash":
        assert all(shlex.split(line) for line in command_lines(block.text)), block.place
    else:
        raise NoRule(f"{block.place}: no rule for another project's {block.language}")


def check_recipe_part(block: Block) -> None:
    """Validates a recipe, or a part of one laid over the tiny recipe; a trainer's keys are those of TRL."""
    from trl import DPOConfig, SFTConfig

    shown = yaml.safe_load(block.text)
    assert isinstance(shown, dict), f"{block.place}: not a mapping"
    whole = shown if {"name", "base"} <= shown.keys() else overlaid(shown)
    written = Path("shown.yaml")
    written.write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML, and has one way to write a number
    recipe = load_recipe(written)
    for stage, config in ((recipe.sft, SFTConfig), (recipe.dpo, DPOConfig)):
        unknown = set(stage.trainer if stage else ()) - set(config.__dataclass_fields__)
        assert not unknown, f"{block.place}: {config.__name__} has no {', '.join(sorted(unknown))}"


def overlaid(shown: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with the shown sections: a stage's keys join its own, other sections take its place."""
    whole = yaml.safe_load((ROOT / TINY).read_text(encoding="utf-8"))
    for section, value in shown.items():
        if section in ("sft", "dpo") and isinstance(value, dict):
            own = whole.get(section) or {}
            trainer = {**own.get("trainer", {}), **value.get("trainer", {})}
            whole[section] = {**own, **value, "trainer": trainer}
        else:
            whole[section] = value
    if "data" in shown and "path" not in (shown["data"] or {}) and "sources" not in (shown["data"] or {}):
        whole["data"] = {"path": "data/arithmetic/train.jsonl", **shown["data"]}
    return whole


# ---- rules for other programs ---------------------------------------------------------------------------------------


def check_make(arguments: list[str], place: str) -> None:
    """make knows the target."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}: {done.stderr}"


def check_pip(arguments: list[str], place: str) -> None:
    """pip installs this project, with extras that it has."""
    assert arguments[0] == "install", place
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [word for word in arguments[1:] if not word.startswith("-") and word not in ("constraints.txt", "torch")]
    for word in wanted:
        named = re.fullmatch(r"(?:hymba-align|\.)(?:\[([\w,]+)\])?", word)
        assert named, f"{place}: {word} is not this project"
        missing = set(filter(None, (named[1] or "").split(","))) - set(project["optional-dependencies"])
        assert not missing, f"{place}: there is no extra {', '.join(missing)}"


def check_python(arguments: list[str], place: str) -> None:
    """A script of the repository, or one of the modules that set an environment up."""
    if arguments[0] == "-m":
        assert arguments[1] in ("venv", "pip", "pytest", "hymba_align"), f"{place}: python -m {arguments[1]}"
        if arguments[1] == "pip":
            check_pip(arguments[2:], place)
        elif arguments[1] == "hymba_align":
            check_options(arguments[2:], place)
        return
    script = ROOT / arguments[0]
    compile(script.read_text(encoding="utf-8"), str(script), "exec")


def check_sbatch(arguments: list[str], place: str) -> None:
    """The script is a valid one; what follows it are a recipe and its overrides."""
    script = next(position for position, word in enumerate(arguments) if word.endswith(".sh"))
    subprocess.run(["bash", "-n", ROOT / arguments[script]], check=True)
    recipe, *overrides = arguments[script + 1 :]
    assert main(["run", recipe, *overrides, "--dry-run"]) == 0, place


def check_tensorboard(arguments: list[str], place: str) -> None:
    """It looks into a folder of the page."""
    assert Path(arguments[arguments.index("--logdir") + 1]).is_dir(), place


def check_source(arguments: list[str], place: str) -> None:
    """It reads what the Makefile installs, or a completion."""
    assert arguments in ([".venv/bin/activate"], ["~/.bashrc"], ["~/.zshrc"]), place


def check_clone(arguments: list[str], place: str) -> None:
    """git clones one address."""
    assert arguments[0] == "clone", place
    assert len(arguments) == 2, place


def check_folder(arguments: list[str], place: str) -> None:
    """cd goes into the clone."""
    assert arguments == ["hymba-align"], place


HARMLESS = {"cat", "cp", "echo", "head", "ls", "mkdir", "printf", "tail", "wc"}
PROGRAMS: dict[str, Callable[[list[str], str], None]] = {
    "cd": check_folder,
    "git": check_clone,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "sbatch": check_sbatch,
    "source": check_source,
    "tensorboard": check_tensorboard,
}
