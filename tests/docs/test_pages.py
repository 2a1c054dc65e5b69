"""Every command and snippet of the README and the documents runs, or is checked by a rule that says why it cannot.

docs/data.md has rules of its own (test_data_manual.py).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from document_blocks import ROOT, blocks_of, documents, parse_blocks
from document_runner import TINY, NoRule, Outcome, Page, made_small, matches, pipeline

from hymba_align.cli import main
from hymba_align.errors import GraderError
from hymba_align.inference.serving import ServeOptions, running
from hymba_align.model.decoding import Decoded
from hymba_align.run.metrics import read_metrics

MANUAL = "docs/data.md"
PAGES = [page for page in documents() if page != MANUAL]


@pytest.mark.parametrize("document", PAGES)
def test_the_blocks_of_a_page_run_one_after_another(
    document: str, reader: Path, with_adapter: Callable[[], None]
) -> None:
    blocks = blocks_of(document)
    if not blocks:
        return

    def adapter(_: Page) -> dict[str, str]:
        with_adapter()
        return {}

    def server(_: Page) -> dict[str, str]:
        options = ServeOptions("runs/arithmetic/dpo/final")
        return {"127.0.0.1:8000": urlsplit(until_the_end.enter_context(running(options))).netloc}

    with contextlib.ExitStack() as until_the_end:
        page = Page(reader, setups={"adapter": adapter, "server": server})
        for block in blocks:
            page.run(block)
        if document in CHECKS:
            CHECKS[document](page)


def check_readme(page: Page) -> None:
    """Its commands have left a report, and a model of the reader's own; its snippet answers with the result."""
    assert Path("runs/arithmetic/report.md").is_file()
    assert Path("runs/mine/sft/final/model.safetensors").is_file()
    assert type(page.names["model"]).__name__ == "HymbaForCausalLM"
    assert len(page.names["answers"]) == 2


def check_long_runs(page: Page) -> None:
    """Under other engines, on another number of processes, everything is found done."""
    runs = [outcome.output for outcome in page.outcomes]
    assert [output.count("complete and unchanged, skipped") for output in runs] == [6, 6]


def check_scores(page: Page) -> None:
    """A result names what the command changed in the suite, and the one before is kept beside it."""
    result = json.loads(Path("runs/eval/runs-arithmetic-dpo-final/gsm8k.json").read_text(encoding="utf-8"))
    assert (result["n"], result["partial"]) == (2, True)
    assert "2 of 200" in page.outcomes[-1].output
    before = json.loads(Path("runs/eval/runs-arithmetic-dpo-final/gsm8k.previous.json").read_text(encoding="utf-8"))
    assert before["suite"].startswith("quick, but")


def check_performance(page: Page) -> None:
    """Every snippet leaves what the text says that it does."""
    assert all(isinstance(answer, Decoded) for answer in page.names["answers"])
    assert page.names["best"] in range(4)
    question, *answers = page.names["tree"].lengths.tolist()
    assert page.names["output"].past_key_values.lengths.tolist() == [question + answer for answer in answers]


CHECKS: dict[str, Callable[[Page], None]] = {
    "README.md": check_readme,
    "docs/long_runs.md": check_long_runs,
    "docs/scores.md": check_scores,
    "docs/performance.md": check_performance,
}


def test_the_recipe_with_answers_trains_and_answers(reader: Path) -> None:
    """The keys of docs/long_runs.md on top of the demo's."""
    shown = yaml.safe_load(blocks_of("docs/long_runs.md", "yaml")[0].text)
    keys = [f"data.validation_fraction={shown['data']['validation_fraction'] * 8}", "dpo=null", "eval=null"]
    keys += [
        f"sft.{part}.{key}={value}" for part in ("answers", "trainer") for key, value in shown["sft"][part].items()
    ]
    keys += ["sft.trainer.per_device_train_batch_size=1", "sft.answers.max_new_tokens=4", "name=answering"]
    assert main(made_small(["sft", TINY, *keys])) == 0
    stage = reader / "runs" / "answering" / "sft"
    answered = [record for record in read_metrics(stage) if "eval_answers/exact" in record]
    assert [(record["step"], record["eval_answers/exact"]) for record in answered] == [(1, 0.0), (2, 0.0)]
    assert {record["eval_answers/cut_off"] for record in answered} == {1.0}
    metrics = json.loads((stage / "manifest.json").read_text())["details"]["metrics"]
    assert (metrics["answers/exact"], metrics["best_step"]) == (0.0, 2.0)


def run(text: str, folder: Path) -> Page:
    page = Page(folder)
    for block in parse_blocks(text, "page.md"):
        page.run(block)
    return page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```rust\nfn main() {}\n```", "page.md:1: no rule for blocks of the language 'rust'"),
        ("```bash\nwget example.org\n```", "page.md:1: no rule for the program 'wget'"),
        ("```bash\nls && ls\n```", "page.md:1: no rule for '&&' between commands"),
        ("<!-- test: skip -->\n```bash\nls\n```", "page.md:2: nobody knows the directive 'skip'"),
        (
            "<!-- test: parse later -->\n```bash\nhymba-align run x.yaml\n```",
            "page.md:2: 'later' is none of gpus, hub, endless, slurm, interactive, install",
        ),
        ("```\nhymba-align run x.yaml\n```", "page.md:1: commands stand in a block without a language; write ```bash"),
        ("<!-- test: setup moon -->\n```bash\nls\n```", "page.md:2: there is no setup 'moon'; setups: "),
    ],
)
def test_a_block_that_no_rule_covers_fails(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(NoRule) as caught:
        run(text, tmp_path)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nhymba-align data check nowhere.jsonl\n```",  # ends with 2
        "<!-- test: exit 2 -->\n```bash\nhymba-align --help\n```",  # ends with 0
        "```console\n$ echo one\ntwo\n```",
        "```yaml\nsft:\n  trainer:\n    learning_rat: 1\n```",
        "```yaml\nsft:\n  max_lenght: 1\n```",
        "```python\nassert 1 == 2\n```",
        "```json\n{]\n```",
        "<!-- test: parse gpus -->\n```bash\nhymba-align run recipes/tiny/arithmetic.yaml --lancher ddp\n```",
        "<!-- test: parse gpus -->\n```bash\nhymba-align run recipes/tiny/arithmetic.yaml sft.max_lenght=1\n```",
        "```bash\nmake lunch\n```",
        "```bash\npip install 'hymba-align[moon]'\n```",
        "<!-- test: foreign TRL -->\n```python\ndef:\n```",
        "```bash\ntorchrun -m hymba_align sft RECIPE --lancher ddp\n```",
        "```bash\necho no JSON | python -m json.tool\n```",
    ],
)
def test_a_block_that_is_wrong_fails(text: str, reader: Path) -> None:
    with pytest.raises(Exception) as caught:
        run(text, reader)
    assert not isinstance(caught.value, NoRule)


def test_a_page_installs_no_grader_that_another_page_would_find_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = tmp_path / "absent"
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(absent))
    with pytest.raises(GraderError) as caught:
        run("```bash\nhymba-align install-bfcl\n```", tmp_path)
    told = f"BFCL's grader is not installed in {absent}; run 'hymba-align install-bfcl --output {absent}' once"
    assert str(caught.value) == told
    assert not any(tmp_path.iterdir())


def test_what_a_console_block_shows_is_compared_with_what_is_printed() -> None:
    assert matches("loss …\n…\ndone", "loss 0.5\na\nb\ndone\n")
    assert matches("…\ndone", "done\n")
    assert not matches("loss …", "loss \n")
    assert not matches("done", "done\nand more\n")
    assert matches("", "")
    assert not matches("", "something\n")


def test_a_line_is_divided_into_programs_files_and_variables() -> None:
    first, second = pipeline("A=1 echo 'a | b' | hymba-align chat x < in.txt > out.txt  # why", "page.md:1")
    assert (first.words, first.variables) == (["echo", "a | b"], {"A": "1"})
    assert (second.words, second.reads, second.writes) == (["hymba-align", "chat", "x"], "in.txt", "out.txt")


def test_named_blocks_are_files_for_the_commands_below_and_stdin_is_what_they_read(tmp_path: Path) -> None:
    text = (
        '```json rows.jsonl\n{"a":\n 1}\n{"a": 2}\n```\n<!-- test: stdin one\\ntwo -->\n```console\n$ wc -l\n2\n```\n'
    )
    page = run(text + "```console\n$ cat rows.jsonl\n…1}\n…2}\n```\n", tmp_path)
    assert page.outcomes[-1] == Outcome(0, '{"a": 1}\n{"a": 2}\n', '{"a": 1}\n{"a": 2}\n')


def test_the_install_says_what_it_does_before_each_step_that_takes_long() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    slow = [number for number, line in enumerate(lines) if line.startswith("\t") and re.search("-m (venv|pip) ", line)]
    assert len(slow) == 3
    assert all(lines[number - 1].startswith('\t@echo "') for number in slow)
