"""Bad input from end to end: exit code 2, one sentence and its topic on stderr, no traceback, and an existing run left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.files import file_digest, write_json
from hymba_align.recipe import load_recipe
from hymba_align.run.folder import open_run

ROW = {"question": "What is 1+1?", "answer": "<<1+1=2>>2\n#### 2", "wrong_answer": "<<1+1=3>>3\n#### 3"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]}
SILENT = {"messages": [{"role": "user", "content": "Hello"}]}
FILES = {
    "train.jsonl": json.dumps(ROW) + "\n",
    "test.jsonl": json.dumps(ROW) + "\n",
    "bad.jsonl": json.dumps(ROW) + '\n{"question": \n',
    "empty.jsonl": "",
    "chat.jsonl": json.dumps(CHAT) + "\n",
    "silent.jsonl": json.dumps(SILENT) + "\n",
    "llama/config.json": '{"model_type": "llama"}',
}


@pytest.fixture
def folder(tmp_path: Path, small_base: dict[str, Any]) -> Path:
    """A recipe beside good and bad files, and a finished run of it."""
    from hymba_align.data.template import load_tokenizer

    load_tokenizer("data/arithmetic/tokenizer").save_pretrained(tmp_path / "llama")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    sections = {
        "name": "demo",
        "output_dir": str(tmp_path / "run"),
        "base": small_base,
        "data": {"path": str(tmp_path / "train.jsonl")},
        "sft": {"max_length": 64},
        "dpo": {"max_length": 64},
        "eval": {"gsm8k": {"num_fewshot": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections))
    run = open_run(load_recipe(tmp_path / "recipe.yaml"))
    for stage in ("sft", "dpo"):
        run.mark_started(stage, "earlier inputs")
        write_json(run.stage_dir(stage) / "final" / "config.json", {})
        run.mark_complete(stage, "earlier inputs", {})
    return tmp_path


def digests(root: Path) -> dict[str, str]:
    return {str(path): file_digest(path) if path.is_file() else "" for path in sorted(root.rglob("*"))}


CASES = {
    "an unknown recipe key": (
        "run {at}/recipe.yaml sft.max_lenght=3",
        "override 'sft.max_lenght=3': sft.max_lenght is not a key of a recipe; the nearest is sft.max_length",
    ),
    "a missing data file": ("run {at}/recipe.yaml data.path={at}/absent.jsonl", "data.path is {at}/absent.jsonl, which does not exist"),
    "a malformed JSON line": ("sft {at}/recipe.yaml data.path={at}/bad.jsonl", "{at}/bad.jsonl:2: malformed JSON, "),
    "a malformed line of a later stage": ("run {at}/recipe.yaml dpo.data.path={at}/bad.jsonl", "{at}/bad.jsonl:2: malformed JSON, "),
    "an empty data set": ("run {at}/recipe.yaml data.path={at}/empty.jsonl eval=null", "{at}/empty.jsonl: holds no rows"),
    "a conversation without an assistant turn": (
        "sft {at}/recipe.yaml sft.data.path={at}/silent.jsonl",
        "{at}/silent.jsonl:1: the conversation has no assistant turn",
    ),
    "a checkpoint of another architecture to score": ("eval {at}/llama", "{at}/llama: model_type in config.json is 'llama', not 'hymba'"),
    "a base of another architecture": ("run {at}/recipe.yaml base={{model: {at}/llama}}", "{at}/llama: model_type in config.json is 'llama', not 'hymba'"),
    "a tokenizer of another model": (
        "run {at}/recipe.yaml base={{model: tests/golden/tiny, tokenizer: data/arithmetic/tokenizer}}",
        "tests/golden/tiny: the model has 257 embeddings and the tokenizer ",
    ),
    "an output folder of another run": ("run {at}/recipe.yaml name=other", "{at}/run belongs to the run 'demo', and this recipe's name is 'other'"),
    "a data set of the hub, offline": ("sft {at}/recipe.yaml data.path=nobody/rows eval=null", "nobody/rows"),
    "a base of the hub, offline": ("sft {at}/recipe.yaml base={{model: nobody/hymba}}", "'nobody/hymba' is neither a folder here nor a checkpoint"),
    "a checkpoint of the hub, offline": ("eval nobody/hymba --output {at}/scores", "nobody/hymba"),
    "test problems of the hub, offline": ("run {at}/recipe.yaml data.path={at}/chat.jsonl dpo=null", "openai/gsm8k"),
    "a setting that TRL refuses": ("sft {at}/recipe.yaml sft.trainer.lr_scheduler_type=foo", "sft.trainer is refused by SFTConfig: foo is not"),
}  # fmt: skip


def arguments(line: str, folder: Path) -> list[str]:
    """The words of a case's command; an override with spaces is in braces."""
    words, _, braced = line.partition(" base=")
    return [*words.format(at=folder).split(), *([f"base={braced.format(at=folder)}"] if braced else [])]


@pytest.mark.parametrize(("line", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_one_sentence_and_nothing_is_lost(
    folder: Path, line: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digests(folder)

    code = main(arguments(line, folder))

    lines = capfd.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 2, lines
    assert lines[0].startswith("Error: ")
    assert lines[1].startswith("More: hymba-align explain ")
    assert message.format(at=folder) in lines[0]
    assert digests(folder) == before


IN_TURN = """
import json, sys
from hymba_align.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    print("code", code, file=sys.stderr)
"""


def test_the_process_itself_prints_that_sentence_and_nothing_else(folder: Path) -> None:
    """One process for two commands: the first imports everything, the second asks the hub's library."""
    cases = [CASES["a malformed line of a later stage"], CASES["a base of the hub, offline"]]
    before = digests(folder)
    commands = json.dumps([arguments(line, folder) for line, _ in cases])

    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, commands],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    told = done.stderr.splitlines()
    assert done.returncode == 0, told
    assert len(told) == 6, told
    for (_, message), lines in zip(cases, (told[:3], told[3:]), strict=True):
        assert lines[0].startswith("Error: ")
        assert message.format(at=folder) in lines[0]
        assert lines[1].startswith("More: hymba-align explain ")
        assert lines[2] == "code 2"
    assert digests(folder) == before
