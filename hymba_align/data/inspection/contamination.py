"""Training rows that repeat what the test sets ask: runs of 13 words that a row shares with a test item.

Words are as ngrams.py defines them; GSM8K's calculator annotations (`<<48/2=24>>`) are left out on both sides. An item
with 8 to 12 words is looked for as a whole; one with fewer is not compared, and counted. Of a training row every message
and every tool call is compared, each by itself; the declarations of tools are not.

| benchmark | compared                                                  | found                                               |
|-----------|-----------------------------------------------------------|-----------------------------------------------------|
| GSM8K     | question and worked answer of the test set                | a JSON Lines file, else the cache's, else the hub's |
| GPQA      | question and explanation of all 546 items                 | its authors' dataset.zip                            |
| BFCL      | every user turn of the questions                          | the data of bfcl-eval, wherever it is installed     |

A run that several items share (BFCL asks some questions in several categories) counts for each of them. One shared run
makes a finding, and common phrases can cause one: it therefore says how much of the item's text was found.

Only hashes of the items are kept. GPQA's authors ask that no item ever lies in the open: it is decrypted in memory, and
neither an item's text nor an error about it leaves this file.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hymba_align.data.inspection.ngrams import Hashes, ngram_hashes, word_hashes
from hymba_align.data.reading.examples import Conversation, Example, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.messages import Message
from hymba_align.errors import DataError, ProblemsError

NGRAM_WORDS = 13
LEAST_WORDS = 8
LENGTHS = range(LEAST_WORDS, NGRAM_WORDS + 1)
ANNOTATION = re.compile(r"<<[^<>\n]*>>")

GSM8K_COLUMNS = ("question", "answer")
GSM8K_REPOSITORY, GSM8K_SUBSET = "openai/gsm8k", "main"
GPQA_MEMBER = "dataset/gpqa_extended.csv"  # holds the items of gpqa_main and gpqa_diamond too
GPQA_COLUMNS = ("Question", "Explanation")
# Published by the authors beside the file (github.com/idavidrein/gpqa): it keeps crawlers out, not readers.
GPQA_PASSWORD = b"deserted-untie-orchid"
BFCL_PACKAGE = "bfcl_eval"
READ_A_FILE = "name a file"
GSM8K_FIX = "set eval.gsm8k.test_path to GSM8K's test.jsonl"
GPQA_FIX = "get dataset.zip from github.com/idavidrein/gpqa and name it"
BFCL_FIX = "hymba-align install-bfcl"
BFCL_AGAIN = "pip install --no-deps bfcl-eval --force-reinstall"
PACKAGES = ("lib/python*/site-packages", "Lib/site-packages")  # of a Python environment, on Windows the latter


@dataclass(frozen=True)
class Item:
    """One item of a test set as read: its name and its texts by theirs; the texts stay out of every message."""

    name: str
    texts: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Item({self.name!r})"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A test set as the hashes of its items' runs of words.

    `too_short` of its `items` have no text of 8 words. Each text is a part, with a name, the number of its item and of its
    distinct runs. `runs` are the distinct ones of all parts, sorted; run i occurs in `parts_of[starts[i] : starts[i + 1]]`.
    `may_occur` tells by a hash's upper bits whether a lookup is worth while.
    """

    name: str
    items: int
    too_short: int
    part_names: tuple[str, ...]
    item_of: tuple[int, ...]
    sizes: tuple[int, ...]
    runs: Hashes
    starts: NDArray[np.int64]
    parts_of: NDArray[np.int64]
    may_occur: NDArray[np.bool_]

    def overlap(self, runs: Hashes) -> Overlap | None:
        """What a row with these runs of words (`example_runs`) shares with the items; None where it is nothing."""
        shift = np.uint64(64 - self.may_occur.size.bit_length() + 1)
        candidates = np.unique(runs[self.may_occur[runs >> shift]])
        if not len(candidates):
            return None
        places = np.minimum(np.searchsorted(self.runs, candidates), len(self.runs) - 1)
        found = places[self.runs[places] == candidates]
        shared: Counter[int] = Counter()
        for place in found.tolist():
            shared.update(self.parts_of[self.starts[place] : self.starts[place + 1]].tolist())
        if not shared:
            return None
        part = max(shared, key=lambda part: (shared[part] / self.sizes[part], shared[part], -part))
        items = {self.item_of[one] for one in shared}
        return Overlap(self.name, self.part_names[part], shared[part], self.sizes[part], len(items) - 1)


@dataclass(frozen=True)
class NotCompared:
    """A benchmark that is not at hand: why, and what to do."""

    name: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Overlap:
    """What a row shares with the part of a test item of which it holds most: `shared` of the part's `size` runs of words.

    It shares something with `other_items` besides.
    """

    benchmark: str
    part: str
    shared: int
    size: int
    other_items: int

    @property
    def share(self) -> float:
        """Of the part's runs, 0 to 1."""
        return self.shared / self.size


# ---- training rows ---------------------------------------------------------------------------------------------------


def example_runs(example: Example) -> Hashes:
    """The hashes of all runs of 8 to 13 words in an example; the same ones for every benchmark."""
    return ngram_hashes(word_hashes(map(_without_annotations, _texts(example))), LENGTHS)


def _texts(example: Example) -> Iterator[str]:
    match example:
        case PlainText(text):
            yield text
        case QuestionAnswer(question, answer, wrong_answer):
            yield from (question, answer, *([wrong_answer] if wrong_answer is not None else []))
        case Conversation(messages):
            yield from _said(messages)
        case Preference(prompt, chosen, rejected):
            yield from _said([*prompt, *chosen, *rejected])


def _said(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            yield f"{call['function']['name']} {arguments}"
            if "\\" in arguments:  # which separates or spells out what is in the texts
                yield from _texts_in(json.loads(arguments))


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(each)


def _without_annotations(text: str) -> str:
    return ANNOTATION.sub("", text) if "<<" in text else text


# ---- test sets -------------------------------------------------------------------------------------------------------


def make_benchmark(benchmark: str, items: Iterable[Item]) -> Benchmark:
    """The index of a test set's items."""
    names: list[str] = []
    item_of: list[int] = []
    runs_of: list[Hashes] = []
    read = 0
    for number, item in enumerate(items):
        read += 1
        for name, text in item.texts.items():
            found = _text_runs(text)
            if len(found):
                names.append(f"{item.name}, {name}")
                item_of.append(number)
                runs_of.append(found)
    sizes = [len(found) for found in runs_of]
    every = np.concatenate(runs_of) if runs_of else np.empty(0, np.uint64)
    order = np.argsort(every, kind="stable")
    runs, starts = np.unique(every[order], return_index=True)
    bits = max(16, (32 * len(runs)).bit_length())
    may_occur = np.zeros(1 << bits, dtype=np.bool_)
    may_occur[runs >> np.uint64(64 - bits)] = True
    return Benchmark(
        name=benchmark,
        items=read,
        too_short=read - len(set(item_of)),
        part_names=tuple(names),
        item_of=tuple(item_of),
        sizes=tuple(sizes),
        runs=runs,
        starts=np.append(starts, len(every)),
        parts_of=np.repeat(np.arange(len(names)), sizes)[order],
        may_occur=may_occur,
    )


def _text_runs(text: str) -> Hashes:
    """The distinct runs by which a test item's text is found: all of 13 words, or the text if it has 8 to 12."""
    hashed = word_hashes([_without_annotations(text)])
    if len(hashed) < LEAST_WORDS:
        return np.empty(0, dtype=np.uint64)
    return np.unique(ngram_hashes(hashed, (min(len(hashed), NGRAM_WORDS),)))


def find_benchmarks(
    gsm8k_test: str | Path | None = None, gpqa_zip: str | Path | None = None, bfcl_environment: Path | None = None
) -> tuple[Benchmark | NotCompared, ...]:
    """GSM8K, GPQA and BFCL: each as an index, or why it is not compared. Never raises for what is not at hand.

    Args:
        bfcl_environment: the folder of the Python environment that `install-bfcl` makes, there or not.
    """
    return (_gsm8k(gsm8k_test), _gpqa(gpqa_zip), _bfcl(bfcl_environment))


def _gsm8k(path: str | Path | None) -> Benchmark | NotCompared:
    try:
        items = list(gsm8k_items(Path(path)) if path is not None else _hub_gsm8k_items())
    except DataError as error:
        return NotCompared("GSM8K", str(error).removesuffix(f"; {READ_A_FILE}"), GSM8K_FIX)
    return make_benchmark("GSM8K", items)


def gsm8k_items(path: Path) -> Iterator[Item]:
    """The items of a file in GSM8K's own format. Raises: DataError."""
    for number, row in _json_lines(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in GSM8K_COLUMNS):
            raise ProblemsError(f"{path}:{number}: the row has no question and answer; name a file in GSM8K's format")
        yield Item(f"line {number}", {key: row[key] for key in GSM8K_COLUMNS})


def _hub_gsm8k_items() -> Iterator[Item]:
    from hymba_align.data.reading.sources import read_cached_or_hub

    rows = read_cached_or_hub(GSM8K_REPOSITORY, READ_A_FILE, name=GSM8K_SUBSET, split="test")
    for number, row in enumerate(rows, start=1):
        yield Item(f"row {number}", {key: row[key] for key in GSM8K_COLUMNS})


def _gpqa(path: str | Path | None) -> Benchmark | NotCompared:
    if path is None:
        return NotCompared("GPQA", "no file of it was named", GPQA_FIX)
    table = decrypt_gpqa(Path(path))
    if isinstance(table, DataError):
        return NotCompared("GPQA", str(table), GPQA_FIX)
    items = gpqa_items(table)
    if items is None:
        return NotCompared("GPQA", f"{path}: {GPQA_MEMBER} has no columns {' and '.join(GPQA_COLUMNS)}", GPQA_FIX)
    return make_benchmark("GPQA", items)


def decrypt_gpqa(path: Path, member: str = GPQA_MEMBER) -> str | DataError:
    """A table of GPQA's archive, in memory; or why it cannot be read, in an error that holds nothing decrypted.

    The error is returned and not raised, so that no traceback keeps what was decrypted alive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(member, pwd=GPQA_PASSWORD)
    except FileNotFoundError:
        return ProblemsError(f"{path}: no such file")
    except KeyError:
        return ProblemsError(f"{path}: the archive has no {member}")
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return ProblemsError(f"{path}: not GPQA's archive, or not with its authors' password")
    return content.decode("utf-8", errors="replace")


def gpqa_items(table: str) -> list[Item] | None:
    """The items of GPQA's CSV table, by their numbers from 1; None where it has not GPQA's columns."""
    try:
        rows = list(csv.DictReader(io.StringIO(table, newline="")))
    except csv.Error:
        return None
    if not rows or not set(GPQA_COLUMNS) <= rows[0].keys():
        return None
    return [
        Item(f"item {number}", {key.lower(): row[key] or "" for key in GPQA_COLUMNS})
        for number, row in enumerate(rows, start=1)
    ]


def _bfcl(environment: Path | None) -> Benchmark | NotCompared:
    folder, broken = _bfcl_data(environment)
    if folder is None:
        return NotCompared("BFCL", "its grader, which ships the data, is not installed", BFCL_FIX)
    try:
        items = [item for file in sorted(folder.glob("*.json")) for item in bfcl_items(file)]
    except DataError as error:
        return NotCompared("BFCL", str(error), broken)
    if not items:
        return NotCompared("BFCL", f"{folder} holds no questions", broken)
    return make_benchmark("BFCL", items)


def _bfcl_data(environment: Path | None) -> tuple[Path | None, str]:
    """The data of bfcl-eval in its own environment or in this one, and what to do where it is damaged; no code of it is run."""
    found = [path for each in PACKAGES for path in environment.glob(f"{each}/{BFCL_PACKAGE}")] if environment else []
    if found:
        return found[0] / "data", f"remove {environment}, and run '{BFCL_FIX}'"
    spec = importlib.util.find_spec(BFCL_PACKAGE)  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        return None, BFCL_FIX
    return Path(spec.submodule_search_locations[0]) / "data", BFCL_AGAIN


def bfcl_items(file: Path) -> Iterator[Item]:
    """The items of one category; none of a file that holds no questions (a list of other items' names, say).

    Raises: DataError.
    """
    with file.open(encoding="utf-8") as lines:
        if not lines.readline().startswith('{"id"'):
            return
    for number, row in _json_lines(file):
        try:
            said = [message for turn in row["question"] for message in turn]
            asked = [message["content"] for message in said if message["role"] == "user"]
            yield Item(str(row["id"]), {f"user turn {turn}": text for turn, text in enumerate(asked, start=1)})
        except (KeyError, TypeError) as error:
            raise ProblemsError(f"{file}:{number}: not an item of BFCL as bfcl-eval writes them") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemsError(f"{path}: the file cannot be read ({type(error).__name__})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ProblemsError(f"{path}:{number}: malformed JSON") from error


def describe(overlap: Overlap) -> str:
    """An overlap in words."""
    what = f"{overlap.shared} of the {overlap.size} runs of {NGRAM_WORDS} words in" if overlap.size > 1 else "all of"
    items = "item" if overlap.other_items == 1 else "items"
    others = f"; also parts of {overlap.other_items} other {items}" if overlap.other_items else ""
    share = f" ({100 * overlap.share:.3g} %)" if overlap.size > 1 else ""
    return f"it holds {what} {overlap.benchmark}'s test set, {overlap.part}{share}{others}"
