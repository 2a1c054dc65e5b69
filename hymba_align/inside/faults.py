"""What is wrong with what an inspection is to read, in the words of whoever asked: options of the command, or keys of a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from hymba_align.data.reading.schemas import MAPPING, MAPPING_ENDS
from hymba_align.errors import DataError

FORMAT = "; correct format, or map the columns in the recipe with columns"
ALONE = "; set it to 1"
OPENINGS = ("columns says that ", "columns names ", "format is ", "examples_per_conversation is ", "convert is ")
"""How errors begin that name a key of a source"""


@dataclass(frozen=True)
class Called:
    """What stands before the names of keys and options where they are written."""

    data: str | None = "data."
    """Before keys that say how rows of the data are read; None where no key does"""
    preferences: str | None = "preferences."
    option: str = "--"
    """Before what else can be asked for"""

    @property
    def in_recipe(self) -> bool:
        """Whether a recipe asks."""
        return self.option != "--"

    def named(self, option: str) -> str:
        """`--max-length`, or `inspect.max_length`."""
        return f"{self.option}{option if self.in_recipe else option.replace('_', '-')}"


COMMAND = Called()


@dataclass(frozen=True)
class Longest:
    """Most tokens of a document, and who says so."""

    tokens: int
    says: str | None = None
    """The option or key; None: the model, whose context it is"""

    def __str__(self) -> str:
        return f"{self.says} {self.tokens}" if self.says else f"the model's context of {self.tokens:,} tokens"


@contextlib.contextmanager
def in_words_of(keys: str | None, longest: Longest, *, of_training: bool = False) -> Iterator[None]:
    """Gives errors about a file anew, with keys and options as they are written where it was named.

    Args:
        keys: what stands before the keys that say how its rows are read; None where none do.
        of_training: whether a stage trains with these keys as well.
    """
    try:
        yield
    except DataError as error:
        raise type(error)(_in_words(str(error), keys, longest, of_training)) from error


def _in_words(text: str, keys: str | None, longest: Longest, of_training: bool) -> str:
    """The message with its keys as they are written."""
    what, unknown_columns, mapping = text.rpartition(f"; say which is which, {MAPPING}")
    if unknown_columns:
        if keys is None:
            return f"{what}; rename them in the file"
        example = f'{what}; say which is which, as in "{keys}columns={{{mapping.removesuffix(MAPPING_ENDS)}}}"'
        if of_training:
            return f"{example}, which holds for training too, or rename them in the file"
        return f"{example}, or name a function with {keys}convert"
    for opening in OPENINGS:
        where, there, rest = text.partition(opening)
        if there and keys is not None and (not where or where.endswith(": ")):
            text = f"{where}{keys}{opening}{rest}"
            break
    if keys is not None:
        text = text.replace(FORMAT, f"; correct {keys}format, or map the columns with {keys}columns")
        text = text.replace(ALONE, f"; set {keys}examples_per_conversation=1")
    text = text.replace(f"max_length={longest.tokens}", str(longest))
    return text.replace("; raise max_length or ", f"; raise {longest.says} or " if longest.says else "; ")
