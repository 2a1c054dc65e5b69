"""report.md read as Markdown: what others wrote is text in it and nothing else."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hymba_align.eval.report.contents import read_run
from hymba_align.eval.report.inert import block, code, words
from hymba_align.eval.report.markdown import markdown
from hymba_align.eval.result import TaskResult

hostile = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
HOSTILE = hostile["HOSTILE"]
Make = Callable[..., TaskResult]

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MORE = (
    "[click](javascript:alert(1)) ![x](http://evil/x.png) <http://evil>",
    "# Title\n\n- [ ] list\n> quote\n\n---\n\n    code\n\n<div>\n",
    "``` \n```\n~~~\n````text\n# out\n",
    "a | b \\| c \\\\| d `|` \n|---|---|\n| x | y |",
    "*a* **b** _c_ ~~d~~ `e` ``f`` \\` &copy; \\",
    '[x]: http://evil "t"\n\n[x]',
    "\u2028# Title\u2029\x0b\x0c\x85- x\r\n\r# y",
)
QUIET = {"text", "softbreak", "code_inline"}


def tokens_of(text: str) -> Iterator[Token]:
    for token in READER.parse(text):
        yield token
        yield from token.children or ()


def shape(folder: Path, text: str, make: Make) -> list[str]:
    """The kinds of what a report consists of; texts and code within a line count as nothing."""
    hostile["write_texts"](folder, text, make)
    found = [token.type for token in tokens_of(markdown(read_run(folder)))]
    assert not {"html_block", "html_inline", "link_open", "image"} & set(found), found
    return [kind for kind in found if kind not in QUIET]


@pytest.mark.parametrize("text", [*HOSTILE, *MORE])
def test_no_text_can_make_markup(tmp_path: Path, result_of: Make, text: str) -> None:
    assert shape(tmp_path, text, result_of) == shape(tmp_path, "plain", result_of)


MARKUP = st.text(st.sampled_from("`|\\*_[]()<>!#~-=&;: \nabx1."), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=MARKUP.filter(str.strip))
def test_no_text_at_all_can_make_markup(tmp_path: Path, result_of: Make, text: str) -> None:
    assert shape(tmp_path, f"a{text}", result_of) == shape(tmp_path, "plain", result_of)


@settings(max_examples=200, deadline=None)
@given(text=MARKUP)
def test_what_is_read_back_is_the_text(text: str) -> None:
    line = " ".join(text.split())
    if line:
        for written in (words(line), code(line)):
            [inline] = [token for token in READER.parse(f"x {written} x") if token.type == "inline"]
            assert "".join(child.content for child in inline.children or ()) == f"x {line} x"
    [fence] = READER.parse(block(text))
    assert (fence.type, fence.content) == ("fence", f"{text}\n")


def test_addresses_are_no_links_for_readers_that_make_some_of_bare_ones() -> None:
    assert words("see http://evil.example, www.evil.example and #12 of @you") == (
        "see http:\\//evil.example, www\\.evil.example and \\#12 of \\@you"
    )
