"""What training will see, drawn for a terminal or as an HTML page: tokens, loss mask, packed rows.

Texts come from anyone's data. They reach the terminal as `rich.text.Text` with control characters made visible, and the
page through jinja2's escaping, so that no text can colour, clear or script what shows it.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree
    from transformers import PreTrainedTokenizerBase

Kind = Literal["context", "trained", "chosen", "rejected"]
KIND_WORDS: dict[Kind, str] = {
    "context": "not trained",
    "trained": "trained",
    "chosen": "chosen: made more likely",
    "rejected": "rejected: made less likely",
}
STYLES: dict[Kind, str] = {"context": "", "trained": "green", "chosen": "green", "rejected": "red"}
EVERY_OTHER = "underline"  # so that tokens can be told apart
OPENING, CLOSING = "⟦", "⟧"  # around trained tokens where there are no colours
LINE_BREAK, SPACE = "↵", "␣"
REPLACEMENT = "\ufffd"
JOINERS = "\u200c\u200d"  # which emoji and several scripts are written with
DOCUMENTS_DRAWN, LAST_DRAWN = 8, 2
WORDS_CHARACTERS = 60
WIDE = 400  # columns of a tree that goes to a file
USER_HEADER = "<extra_id_1>User\n"
PAGE = Path(__file__).with_name("preview.html.jinja")


@dataclass(frozen=True)
class Piece:
    """A token's text; several tokens where only together they make a character."""

    ids: tuple[int, ...]
    text: str
    kind: Kind = "context"
    control: bool = False


@dataclass(frozen=True)
class Part:
    """A conversation's tokens, or those of a pair's prompt or of one of its answers (then with a title)."""

    pieces: tuple[Piece, ...]
    title: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens the part has."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        """How many of them are trained on."""
        return sum(len(piece.ids) for piece in self.pieces if piece.kind != "context")


@dataclass(frozen=True)
class Shown:
    """A conversation or a preference pair, and the place of the row that it comes from."""

    place: str
    parts: tuple[Part, ...]

    @property
    def counts(self) -> str:
        """Tokens and trained tokens, in words."""
        tokens, trained = sum(part.tokens for part in self.parts), sum(part.trained for part in self.parts)
        return f"{tokens:,} tokens, {trained:,} trained ({100 * trained / max(tokens, 1):.0f} %)"


@dataclass(frozen=True)
class Node:
    """A segment of a packed row. `parent` is a number in the row, None for the meta tokens; positions include them."""

    name: str
    length: int
    parent: int | None
    first_position: int
    kind: Kind = "context"
    place: str = ""
    words: str = ""
    shown_above: bool = False

    @property
    def last_position(self) -> int:
        """The position of its last token, meta tokens counted."""
        return self.first_position + self.length - 1


@dataclass(frozen=True)
class Row:
    """A packed row: its segments in row order, behind the meta tokens."""

    title: str
    meta_tokens: int
    nodes: tuple[Node, ...]
    max_length: int

    @property
    def tokens(self) -> int:
        """Text tokens of the row."""
        return sum(node.length for node in self.nodes)

    @property
    def root_label(self) -> str:
        """What is printed for the root of the tree."""
        return f"{self.meta_tokens} meta tokens, positions 0 to {self.meta_tokens - 1}"

    def label(self, node: Node) -> str:
        """The segment's name, length, positions and parent."""
        parent = "the meta tokens" if node.parent is None else self.nodes[node.parent].name
        tokens = "1 token" if node.length == 1 else f"{node.length:,} tokens"
        said = f"{node.name}: {tokens}, positions {node.first_position} to {node.last_position}, continues {parent}"
        return f"{said} (shown above)" if node.shown_above else said

    def children(self, parent: int | None) -> list[int]:
        """The numbers of the segments that continue `parent`."""
        return [number for number, node in enumerate(self.nodes) if node.parent == parent]


@dataclass(frozen=True)
class Preview:
    """All that one stage's preview shows. `facts` are sentences about the data, `warnings` about what goes wrong."""

    title: str
    facts: tuple[str, ...]
    warnings: tuple[str, ...]
    shown: tuple[Shown, ...]
    rows: tuple[Row, ...]
    packing: tuple[str, ...] = ()

    @property
    def legend(self) -> tuple[Kind, ...]:
        """The kinds of tokens that occur, in a fixed order."""
        kinds = {piece.kind for shown in self.shown for part in shown.parts for piece in part.pieces}
        return tuple(kind for kind in KIND_WORDS if kind in kinds)


# --- From tokens to texts ---------------------------------------------------------------------------------------------


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[int], kind: Kind = "trained"
) -> tuple[Piece, ...]:
    """The texts of tokens, in order; those with a 1 in the mask are of the given kind. No token is left out."""
    control = set(tokenizer.all_special_ids)
    anchor: Any = tokenizer.convert_tokens_to_ids("a")  # decoders take the space off a first token
    before = len(_decoded(tokenizer, [anchor]))
    made: list[Piece] = []
    waiting: list[int] = []  # bytes of a character that is not complete
    for place, (token, marked) in enumerate(zip(ids, mask, strict=True)):
        waiting.append(token)
        text = _decoded(tokenizer, [anchor, *waiting])[before:]
        unfinished = text == REPLACEMENT * len(waiting) and tokenizer.convert_ids_to_tokens(token) != REPLACEMENT
        last_of_its_kind = place + 1 == len(ids) or mask[place + 1] != marked
        if unfinished and len(waiting) < 4 and not last_of_its_kind:
            continue
        made.append(Piece(tuple(waiting), text, kind if marked else "context", token in control))
        waiting = []
    return tuple(made)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """The text with every character that would act instead of being seen replaced; line breaks are marked and stay."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character == "\n":
        return LINE_BREAK + "\n"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS:
        return f"‹U+{code:04X}›"
    return character


def first_words(text: str) -> str:
    """The beginning of what a text says, from the user's first turn on where it has one, on one line.

    The template's turn headers and tools are left out, and so is the system message, which all rows of a set may share.
    """
    return _on_a_line(text.partition(USER_HEADER)[2] or text)


def last_question(text: str) -> str:
    """The beginning of the user's last turn, on one line; of a text without one, its first words."""
    return _on_a_line(text.rpartition(USER_HEADER)[2])


def _on_a_line(text: str) -> str:
    without_tools = re.sub(r"<tool> .*? </tool>\n", " ", text)
    said = " ".join(re.sub(r"<extra_id_\d>(System|User|Assistant|Tool)?\n?", " ", without_tools).split())
    return said if len(said) <= WORDS_CHARACTERS else f"{said[: WORDS_CHARACTERS - 1].rstrip()}…"


def choose(sources: Sequence[str], count: int) -> list[int]:
    """Which `count` rows to show, in order, where `sources` names each row's source.

    The first row of every source, as far as the count allows, and the others evenly spaced over all rows.
    """
    count = min(count, len(sources))
    chosen = [sources.index(source) for source in dict.fromkeys(sources)][:count]
    even = [number * len(sources) // count for number in range(count)] if count else []
    for number in (*even, *range(len(sources))):
        if len(chosen) < count and number not in chosen:
            chosen.append(number)
    return sorted(chosen)


# --- The terminal -----------------------------------------------------------------------------------------------------


def print_preview(preview: Preview, console: Console, *, with_ids: bool = False) -> None:
    """Prints a stage's preview, coloured on a terminal, else with the trained tokens between ⟦ and ⟧."""
    from rich.text import Text

    coloured = has_colours(console)
    console.print(Text(visible(preview.title), style="bold"))
    _print_lines(console, preview.facts)
    _print_lines(console, preview.warnings, style="yellow")
    console.print(_legend(preview.legend, coloured), soft_wrap=True)
    for shown in preview.shown:
        console.print()
        console.print(Text.assemble((visible(shown.place), "bold"), f"  {shown.counts}"), soft_wrap=True)
        for part in shown.parts:
            if part.title:
                console.print(Text(f"{part.title}, {part.tokens:,} tokens", style="bold"))
            for line in _id_lines(part, console.width, coloured) if with_ids else [_flow(part, coloured)]:
                console.print(line, soft_wrap=with_ids or not console.is_terminal)
    for row in preview.rows:
        console.print()
        console.print(Text(visible(row.title), style="bold"), soft_wrap=not console.is_terminal)
        console.print(tree(row) if console.is_terminal else _as_lines(tree(row)), soft_wrap=not console.is_terminal)
    if preview.packing:
        console.print()
        console.print(Text("Packing", style="bold"))
        _print_lines(console, preview.packing)


def has_colours(console: Console) -> bool:
    """Whether the console shows colours."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def _print_lines(console: Console, lines: Iterable[str], style: str = "") -> None:
    from rich.text import Text

    for line in lines:
        console.print(Text(visible(line), style=style), soft_wrap=not console.is_terminal)


def _legend(kinds: Sequence[Kind], coloured: bool) -> Text:
    from rich.text import Text

    words = Text()
    for kind in kinds:
        if coloured:
            words.append(KIND_WORDS[kind], style=STYLES[kind]).append("  ")
        elif kind != "context":
            words.append(f"{OPENING}{KIND_WORDS[kind]}{CLOSING}  ")
    words.append(f"{LINE_BREAK} line break", style="dim")
    if coloured:
        words.append("  every other token is underlined", style="dim")
    return words


def _labelled(part: Part, coloured: bool) -> Iterator[tuple[Piece, str, str]]:
    """Each piece with its visible text, marked as trained where there are no colours, and its style."""
    number = 0
    for _, run in groupby(part.pieces, key=lambda piece: piece.kind):
        together = list(run)
        for place, piece in enumerate(together):
            text = visible(piece.text)
            if not coloured:
                text = text.replace(OPENING, "‹U+27E6›").replace(CLOSING, "‹U+27E7›")
                if piece.kind != "context":
                    text = (OPENING if place == 0 else "") + text
                    text += CLOSING if place == len(together) - 1 else ""
            other = EVERY_OTHER if number % 2 else ""
            yield piece, text, f"{STYLES[piece.kind]} {'bold reverse' if piece.control else other}".strip()
            number += 1


def _flow(part: Part, coloured: bool) -> Text:
    """A part as running text."""
    from rich.text import Text

    flow = Text()
    for _, text, style in _labelled(part, coloured):
        flow.append(text, style=style)
    return flow


def _id_lines(part: Part, width: int, coloured: bool) -> Iterator[Text]:
    """Lines in pairs: pieces, and below each its token ids. Spaces are shown as ␣."""
    from rich.cells import cell_len
    from rich.text import Text

    above, below = Text(), Text()
    for piece, text, style in _labelled(part, coloured):
        label, ids = text.replace("\n", "").replace(" ", SPACE), " ".join(map(str, piece.ids))
        cells = max(cell_len(label), len(ids))
        if above and above.cell_len + 1 + cells > width:
            yield from (above, below)
            above, below = Text(), Text()
        gap = " " if above else ""
        above.append(gap).append(label, style=style).append(" " * (cells - cell_len(label)))
        below.append(f"{gap}{ids:<{cells}}", style="dim")
        if piece.text.endswith("\n"):
            yield from (above, below)
            above, below = Text(), Text()
    if above:
        yield from (above, below)


def tree(row: Row) -> Tree:
    """The row's segments below what each continues; of many, the first, the last and those shown above."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(row.root_label), guide_style="dim")
    _grow(root, row, None)
    return root


def _as_lines(drawn: Tree) -> Text:
    """The tree for a file, where no line need be broken."""
    from rich.console import Console
    from rich.text import Text

    lines = io.StringIO()
    Console(file=lines, width=WIDE, no_color=True, color_system=None, force_terminal=False).print(drawn)
    return Text(lines.getvalue().rstrip("\n"))


def _grow(branch: Tree, row: Row, parent: int | None) -> None:
    from rich.text import Text

    numbers = row.children(parent)
    middle = numbers[DOCUMENTS_DRAWN:-LAST_DRAWN] if len(numbers) > DOCUMENTS_DRAWN + LAST_DRAWN + 2 else []
    hidden = [number for number in middle if not row.nodes[number].shown_above]
    for number in numbers:
        if number in hidden:
            if number == hidden[0]:
                lengths = [row.nodes[one].length for one in hidden]
                said = f"{len(hidden)} more, of {min(lengths):,} to {max(lengths):,} tokens"
                branch.add(Text(f"… {said}", style="dim"))
            continue
        node = row.nodes[number]
        label = Text(row.label(node), style=STYLES[node.kind])
        about = "  ".join(visible(text) for text in (node.place, node.words) if text)
        if about:
            label.append(f"\n{about}", style="dim")
        _grow(branch.add(label), row, number)


# --- The page ---------------------------------------------------------------------------------------------------------


def html_page(previews: Sequence[Preview], title: str) -> str:
    """A page that holds all it needs: no script, nothing fetched."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(title=title, previews=previews, kind_words=KIND_WORDS)
