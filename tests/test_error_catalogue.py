"""docs/errors.md and the command that reads it out: every error has its topic there, in the words that the program uses."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_align import errors
from hymba_align.cli import main
from hymba_align.cli.explain import CATALOGUE, as_text, topics

PACKAGE = Path(errors.__file__).parent
SECTIONS = topics(CATALOGUE.read_text(encoding="utf-8"))
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.HymbaAlignError)
}


@functools.cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]


def messages(topic: str) -> Iterator[str]:
    """Patterns of the texts with which the package raises a topic's errors; any text stands where they have a value."""
    names = {name for name, kind in CLASSES.items() if kind.topic == topic}
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                yield from patterns(node.args[0])


def patterns(text: ast.expr) -> Iterator[str]:
    """The pattern of a text, or those of the texts that a function of the package returns."""
    if isinstance(text, ast.Call) and isinstance(text.func, ast.Name):
        for tree in trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name == text.func.id:
                    yield from (
                        pattern(one.value) for one in ast.walk(node) if isinstance(one, ast.Return) and one.value
                    )
    else:
        yield pattern(text)


def pattern(text: ast.expr) -> str:
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        return re.escape(text.value)
    if isinstance(text, ast.JoinedStr):
        return "".join(pattern(part) if isinstance(part, ast.Constant) else ".+" for part in text.values)
    return r"\Z."  # made elsewhere: matches nothing


def test_every_class_of_error_has_a_topic_of_its_own_and_its_section() -> None:
    assert sorted(kind.topic for kind in CLASSES.values()) == sorted(SECTIONS)


@pytest.mark.parametrize("topic", SECTIONS)
def test_a_section_begins_with_a_sentence_and_says_what_to_do(topic: str) -> None:
    meaning, *rest = SECTIONS[topic].split("\n\n")

    assert meaning.endswith(".")
    assert not meaning.startswith(("-", "`", "#"))
    assert "\n- " in "\n".join(["", *rest])


@pytest.mark.parametrize("topic", [topic for topic, text in SECTIONS.items() if "```text" in text])
def test_a_message_that_no_command_shows_here_is_one_that_the_package_raises(topic: str) -> None:
    (shown,) = re.findall(r"```text\n(.*?)\n```", SECTIONS[topic], flags=re.DOTALL)

    assert any(re.fullmatch(text, shown) for text in messages(topic))


def test_a_topic_is_read_out_as_the_page_has_it_without_what_only_its_test_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", "trainer"]) == 0

    assert capsys.readouterr().out == f"trainer\n\n{as_text(SECTIONS['trainer'])}\n"
    assert all("<!--" not in section for section in SECTIONS.values())


def test_a_topic_is_read_out_without_fences_and_without_targets_of_links(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_text("See [data](data.md#rows).\n\n```console\n$ run\n…\n\nError\n```\n\nOr `x`.") == (
        "See data.\n\n    $ run\n    …\n\n    Error\n\nOr `x`."
    )
    assert main(["explain", "rows"]) == 0

    out = capsys.readouterr().out
    assert "\n    More: hymba-align explain rows\n" in out
    assert "```" not in out
    assert "](" not in out


def test_without_a_topic_all_are_listed_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SECTIONS)
    assert (
        f"{'storage':<13}  Something cannot be written: a full disk, a quota, or a file system that turned read-only."
        in lines
    )


def test_a_topic_that_is_none_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "colums"]) == 2

    assert capsys.readouterr().err.splitlines()[-1] == (
        "Error: Invalid value for '[TOPIC]': 'colums' is no topic; the nearest is columns"
    )


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "rows", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == {"topic": "rows", "text": SECTIONS["rows"]}
