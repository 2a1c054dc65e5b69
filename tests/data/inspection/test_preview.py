from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from hymba_align.data.inspection.preview import (
    Node,
    Part,
    Piece,
    Preview,
    Row,
    Shown,
    choose,
    first_words,
    html_page,
    last_question,
    pieces,
    print_preview,
    tree,
    visible,
)
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.rendering import Rendered, render_conversations

HOSTILE = "\x1b[31mred\x1b[0m [red]markup[/red] <script>alert(1)</script> </s>\u202e\x9b2J"
CHAT = [{"role": "user", "content": f"Say 日本 🎉 {HOSTILE}"}, {"role": "assistant", "content": "Yes.\nIt is"}]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Rendered:
    (one,) = render_conversations(tokenizer, [Conversation(messages)], **options)
    assert isinstance(one, Rendered), one
    return one


def part(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Part:
    one = rendered(tokenizer, messages, **options)
    return Part(pieces(tokenizer, one.input_ids, one.assistant_mask))


def preview(*parts: Part, rows: tuple[Row, ...] = (), facts: tuple[str, ...] = ()) -> Preview:
    return Preview("demo", facts, (), (Shown("my.jsonl:3", parts),), rows, ("fill rate 99 %",))


def printed(shown: Preview, *, colours: bool = False, width: int = 100, with_ids: bool = False) -> str:
    file = io.StringIO()
    options: dict[str, Any] = {"force_terminal": True, "color_system": "standard"} if colours else {}
    console = Console(file=file, width=width, highlight=False, no_color=not colours, **options)
    print_preview(shown, console, with_ids=with_ids)
    return file.getvalue()


class TextOf(HTMLParser):
    """The tags of a page, its text outside of <style>, and the token ids of its spans."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text, self.ids = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += f"{dict(attributes).get('data-ids', '')} "

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text += data


# --- tokens to texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "released"])
def test_pieces_hold_every_token_once_and_read_as_the_text(load: Any, name: str) -> None:
    tokenizer = load(name)
    one = rendered(tokenizer, CHAT)

    made = pieces(tokenizer, one.input_ids, one.assistant_mask)

    assert [token for piece in made for token in piece.ids] == one.input_ids
    text = "".join(piece.text for piece in made)
    assert text == f" {tokenizer.decode(one.input_ids)}"  # the space that these tokenizers begin with


@pytest.mark.parametrize("name", ["small", "released"])
@pytest.mark.parametrize("text", ["日本", "🎉👩‍👩‍👧", "a\ufffdb", "\ufffd\ufffd", "  two   three\n\n\n", "ÿ\u2060"])
def test_characters_of_several_tokens_are_whole(load: Any, name: str, text: str) -> None:
    tokenizer = load(name)
    ids = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"]

    made = pieces(tokenizer, ids, [1] * len(ids))

    assert "".join(piece.text for piece in made) == f" a{text}"
    assert sum(len(piece.ids) for piece in made) == len(ids)


def test_the_kind_of_a_token_is_its_mask(small: Any) -> None:
    one = rendered(small, CHAT)

    made = pieces(small, one.input_ids, one.assistant_mask)

    kinds = [piece.kind == "trained" for piece in made for _ in piece.ids]
    assert kinds == [bool(marked) for marked in one.assistant_mask]
    assert [piece.text for piece in made if piece.control] == ["</s>"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", "␛[31m"),
        ("a\r\nb\tc\x00", "a␍↵\nb⇥c␀"),
        ("\x7f\x9b\u202e\u2060\ufeff\u2028", "␡‹U+009B›‹U+202E›‹U+2060›‹U+FEFF›‹U+2028›"),
        ("é 日本 👩‍👩‍👧 [red] <b>", "é 日本 👩‍👩‍👧 [red] <b>"),
    ],
)
def test_characters_that_act_become_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_first_words_pass_over_turn_headers_and_tools() -> None:
    text = f"<extra_id_0>System\n<tool> {{}} </tool>\n<tool> {{}} </tool>\n\n<extra_id_1>User\nWhat is\n1+1? {'x' * 80}"

    words = first_words(text)

    assert words.startswith("What is 1+1? xxx")
    assert words.endswith("…")
    assert len(words) == 60


def test_a_conversation_is_named_by_what_was_asked_and_not_by_a_system_message_that_all_share() -> None:
    text = (
        "<extra_id_0>System\nYou are brief.\n\n<extra_id_1>User\nWhen do you open?\n<extra_id_1>Assistant\nAt nine.</s>\n"
        "<extra_id_1>User\nAnd on\nSundays?\n<extra_id_1>Assistant\n"
    )

    assert first_words(text) == "When do you open? At nine.</s> And on Sundays?"
    assert last_question(text) == "And on Sundays?"
    assert first_words("<extra_id_0>System\nYou are brief.\n\n") == last_question("You are brief.") == "You are brief."


@pytest.mark.parametrize(
    ("sources", "count", "chosen"),
    [
        (["a"] * 10, 3, [0, 3, 6]),
        (["a"] * 2, 5, [0, 1]),
        (["a"] * 6 + ["b"], 3, [0, 2, 6]),
        (["a", "b", "c", "d"], 2, [0, 1]),
        (["b", "a", "b", "a"], 4, [0, 1, 2, 3]),
        ([], 3, []),
    ],
)
def test_rows_shown_are_spread_and_every_source_has_one(sources: list[str], count: int, chosen: list[int]) -> None:
    assert choose(sources, count) == chosen


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_trained_tokens_are_green_on_a_terminal(small: Any) -> None:
    out = printed(preview(part(small, CHAT)), colours=True)

    green = "".join(re.findall(r"\x1b\[(?:4;)?32m([^\x1b]*)", out))
    assert "trained" in green  # the legend
    assert "Yes.↵" in green
    assert "Say" not in green
    assert "⟦" not in out
    assert re.search(r"\x1b\[1;7;32m</s>", out)


def test_without_colours_trained_spans_stand_between_brackets(small: Any) -> None:
    out = printed(preview(part(small, CHAT)))

    assert "\n⟦Yes.↵\nIt is</s>⟧\n" in out
    assert out.count("⟦") == out.count("⟧") == 2  # the legend's, and the answer's
    assert "\x1b" not in out


@pytest.mark.parametrize("length", [79, 200])
def test_a_long_line_in_a_file_is_neither_cut_nor_broken(length: int) -> None:
    text = ("word " * length)[:length]

    out = printed(preview(Part((Piece((5,), text),))), width=80)

    assert f"\n{text}\n" in out


def test_a_long_line_on_a_terminal_is_broken_at_words() -> None:
    text = " ".join(f"word{number}" for number in range(60))

    out = re.sub(r"\x1b\[[0-9;]*m", "", printed(preview(Part((Piece((5,), text),))), colours=True, width=80))

    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"word\d+", out) == text.split()


def test_brackets_in_a_text_are_not_taken_for_ours(small: Any) -> None:
    chat = [{"role": "user", "content": "⟦not trained⟧"}, {"role": "assistant", "content": "ok"}]

    out = printed(preview(part(small, chat)))

    assert "‹U+27E6›not trained‹U+27E7›" in out
    assert out.count("⟦") == 2


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("with_ids", [True, False])
def test_no_text_of_the_data_reaches_the_terminal_as_an_order(small: Any, colours: bool, with_ids: bool) -> None:
    shown = Preview(
        "demo",
        (f"fact {HOSTILE}",),
        (f"warning {HOSTILE}",),
        (Shown(f"{HOSTILE}.jsonl:1", (part(small, CHAT),)),),
        (Row("row", 4, (Node("document 1", 9, None, 4, place=HOSTILE, words=first_words(HOSTILE)),), 16),),
    )

    out = printed(shown, colours=colours, with_ids=with_ids, width=200)

    orders = set(re.findall(r"\x1b.?[^m]{0,12}m?", out))
    assert all(re.fullmatch(r"\x1b\[[0-9;]*m", order) for order in orders)
    assert not any("31" in order for order in orders)
    assert not {"\x9b", "\u202e", "\r"} & set(out)
    assert with_ids or "[red]markup[/red]" in re.sub(r"\x1b\[[0-9;]*m", "", out)


def test_ids_below_the_tokens_are_the_tokenizers(small: Any) -> None:
    one = rendered(small, CHAT)

    out = printed(preview(part(small, CHAT)), with_ids=True, width=60)

    body = out.split("trained (")[1].split("Packing")[0].splitlines()[1:]
    assert all(len(line) <= 60 for line in body)
    assert [int(token) for line in body[1::2] for token in line.split()] == one.input_ids


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        ({}, ["First</s>", "Last</s>"]),
        ({"loss_on": "last"}, ["Last</s>"]),
    ],
)
def test_the_mask_alone_decides_what_is_marked(small: Any, options: dict[str, Any], spans: list[str]) -> None:
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "First"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "Silent", "train": False},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "Last"},
    ]

    out = printed(preview(part(small, chat, **options)))

    assert re.findall("⟦([^⟧]*)⟧", out)[1:] == spans


def test_every_token_can_be_marked(small: Any) -> None:
    out = printed(preview(part(small, CHAT, loss_on="all")))

    (span,) = re.findall("⟦([^⟧]*)⟧", out)[1:]
    assert span.startswith(" <extra_id_0>System↵")
    assert span.endswith("It is</s>")


def test_both_answers_of_a_pair_are_coloured_apart(small: Any) -> None:
    parts = (
        Part((Piece((5,), "Why?"),), "prompt"),
        Part((Piece((6,), "good", "chosen"),), "chosen"),
        Part((Piece((7, 8), "bad", "rejected"),), "rejected"),
    )

    coloured, plain = printed(preview(*parts), colours=True), printed(preview(*parts))

    assert "\x1b[32mgood\x1b[0m" in coloured
    assert "\x1b[31mbad\x1b[0m" in coloured
    assert "rejected, 2 tokens\n⟦bad⟧\n" in plain
    assert "my.jsonl:3  4 tokens, 3 trained (75 %)" in plain


# --- the tree ---------------------------------------------------------------------------------------------------------


def pair_row() -> Row:
    nodes = (
        Node("prompt", 10, None, 128, words="Why?"),
        Node("chosen", 3, 0, 138, "chosen"),
        Node("rejected", 1, 0, 138, "rejected"),
    )
    return Row("The pair", 128, nodes, 64)


def test_the_tree_says_lengths_positions_and_parents() -> None:
    out = printed(preview(rows=(pair_row(),)))

    assert out.split("The pair\n")[1].split("\n\n")[0].splitlines() == [
        "128 meta tokens, positions 0 to 127",
        "└── prompt: 10 tokens, positions 128 to 137, continues the meta tokens",
        "    Why?",
        "    ├── chosen: 3 tokens, positions 138 to 140, continues prompt",
        "    └── rejected: 1 token, positions 138 to 138, continues prompt",
    ]


def test_a_row_of_many_documents_shows_the_first_the_last_and_those_shown_above() -> None:
    nodes = tuple(
        Node(f"document {number}", 100 - number, None, 4, shown_above=number == 20) for number in range(1, 41)
    )

    out = printed(preview(rows=(Row("The row", 4, nodes, 4096),)))

    assert [int(number) for number in re.findall(r"document (\d+)", out)] == [*range(1, 9), 20, 39, 40]
    assert "├── … 29 more, of 62 to 91 tokens" in out


def test_a_tree_in_a_file_is_not_cut() -> None:
    node = Node("document 1", 5, None, 4, place=f"{'folder/' * 30}my.jsonl:1", words="the end of the line")

    out = printed(preview(rows=(Row("The row", 4, (node,), 64),)), width=80)

    assert "my.jsonl:1  the end of the line\n" in out
    assert str(tree(pair_row()).label) == "128 meta tokens, positions 0 to 127"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_escapes_what_texts_hold(small: Any) -> None:
    row = Row(f"row {HOSTILE}", 4, (Node("document 1", 9, None, 4, place=HOSTILE, words=HOSTILE),), 16)
    shown = preview(part(small, CHAT), rows=(row,), facts=(HOSTILE,))

    page = TextOf(html_page([shown], f"Preview of {HOSTILE}"))

    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text


def test_the_page_fetches_nothing(small: Any) -> None:
    page = html_page([preview(part(small, CHAT), rows=(pair_row(),))], "Preview")

    assert not re.search(r"\b(src=|href|@import|url\()", page)
    assert not {"link", "img", "script", "iframe"} & set(TextOf(page).tags)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_holds_every_token_with_its_id(small: Any) -> None:
    one = rendered(small, CHAT)

    page = TextOf(html_page([preview(part(small, CHAT))], "Preview"))

    assert [int(token) for token in page.ids.split()] == one.input_ids
    assert "Yes.↵\nIt is</s>" in page.text


def test_the_page_draws_the_tree() -> None:
    page = TextOf(html_page([preview(rows=(pair_row(),))], "Preview"))

    for line in ("128 meta tokens, positions 0 to 127", "chosen: 3 tokens, positions 138 to 140, continues prompt"):
        assert line in page.text
