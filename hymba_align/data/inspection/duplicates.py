"""Rows that are there more than once: with equal content, or with nearly the same words.

Near duplicates share at least 80 % of their runs of five words (the Jaccard similarity of the two sets, words as
ngrams.py defines them). Candidates come from MinHash sketches whose bands agree (LSH: 21 bands of 6 values, by which a
pair of similarity 0.8 is met in 998 cases of 1,000, and a more similar one in more); the rows of candidates are then
read again and compared in full, so no pair is reported that is not one. System messages and tools are left out of this
comparison, since many conversations share them.

In memory stay the place, the digest and the bands of every row (measured: 0.45 kB a row, and up to 0.9 kB while candidates
are looked for), never the texts. The runs of words of rows that others are compared with take no more than KEPT_BYTES: where
that is too little, the rows are read again, and those that found no room are compared then.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hymba_align.data.inspection.ngrams import MULTIPLIER, Hashes, ngram_hashes, word_hashes
from hymba_align.data.reading.examples import Conversation, Example, Located, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.messages import Message

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_WORDS = 5
THRESHOLD = 0.8
BANDS, BAND_VALUES = 21, 6
SEED = 1
SHINGLES_AT_ONCE = 8192
# How many earlier rows a row is compared with in full: those that share the most bands. Without a bound, rows that are
# all a little less alike than the threshold would be compared each with each.
MOST_COMPARED = 32
# Of the rows that later ones are compared with, so much is kept at a time; what finds no room waits for another reading.
KEPT_BYTES = 128 << 20
BUCKET_BYTES = 160  # about what a row costs in a bucket


@dataclass(frozen=True)
class DuplicateGroup:
    """Places of rows that say the same: the first one, and the others with their similarity to it (1 where equal)."""

    first: str
    others: tuple[str, ...]
    similarities: tuple[float, ...]


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal and of nearly equal rows, by their first places in order; a row is in one group at most.

    `compared` rows were looked at; `short` of them have fewer than five words and were compared for equality only.
    """

    exact: tuple[DuplicateGroup, ...]
    near: tuple[DuplicateGroup, ...]
    compared: int
    short: int


def find_duplicates(read: Callable[[], Iterable[Located[Example]]]) -> Duplicates:
    """The duplicates among the rows that `read` gives; it is called again where candidates are to be compared."""
    finder = DuplicateFinder()
    for row in read():
        finder.add(row)
    return finder.find(read)


@dataclass
class DuplicateFinder:
    """Takes the rows one by one, then finds the duplicates among them."""

    _places: list[str] = field(default_factory=list)
    _first_of: dict[bytes, int] = field(default_factory=dict)  # digest of a row: number of the first such row
    _equal: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    _sketched: list[int] = field(default_factory=list)  # the rows that have bands, by number
    _bands: list[Hashes] = field(default_factory=list)
    _short: int = 0

    def add(self, row: Located[Example]) -> None:
        """Remembers a row by its digest and, where no equal row came before, by the bands of its sketch."""
        number = len(self._places)
        self._places.append(row.place)
        shingles = shingle_hashes(row.value)
        self._short += not len(shingles)
        first = self._first_of.setdefault(content_digest(row.value), number)
        if first != number:
            self._equal[first].append(number)
        elif len(shingles):
            self._sketched.append(number)
            self._bands.append(_bands(shingles))

    def find(self, read: Callable[[], Iterable[Located[Example]]]) -> Duplicates:
        """All duplicates; `read` gives the same rows in the same order once more."""
        exact = tuple(
            DuplicateGroup(self._places[first], tuple(self._places[other] for other in others), (1.0,) * len(others))
            for first, others in sorted(self._equal.items())
        )
        return Duplicates(exact, self._near(read), len(self._places), self._short)

    def _near(self, read: Callable[[], Iterable[Located[Example]]]) -> tuple[DuplicateGroup, ...]:
        buckets = self._shared_buckets()
        found: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
        waiting = set(buckets)
        while waiting:
            waiting = self._compare(read(), buckets, waiting, found)
        return tuple(
            DuplicateGroup(
                self._places[first],
                tuple(self._places[number] for number, _ in sorted(others)),
                tuple(alike for _, alike in sorted(others)),
            )
            for first, others in sorted(found.items())
        )

    def _compare(
        self,
        rows: Iterable[Located[Example]],
        buckets: Mapping[int, Sequence[int]],
        waiting: set[int],
        found: defaultdict[int, list[tuple[int, float]]],
    ) -> set[int]:
        """Compares each waiting row with the earlier ones that are kept; gives those that found no room to be kept."""
        kept: dict[int, Hashes] = {}
        room = KEPT_BYTES
        with_bucket: defaultdict[int, list[int]] = defaultdict(list)  # those of a bucket, at most MOST_COMPARED
        left: set[int] = set()
        for number, row in enumerate(rows):
            if number not in waiting:
                continue
            shingles = shingle_hashes(row.value)
            met = Counter(first for bucket in buckets[number] for first in with_bucket.get(bucket, ()))
            nearest = sorted(met, key=lambda first: (-met[first], first))[:MOST_COMPARED]
            alike = {first: similarity(shingles, kept[first]) for first in nearest}
            best = max(alike, key=lambda first: (alike[first], -first), default=None)
            if best is not None and alike[best] >= THRESHOLD:
                found[best].append((number, alike[best]))
                continue
            takers = [bucket for bucket in buckets[number] if len(with_bucket.get(bucket, ())) < MOST_COMPARED]
            size = shingles.nbytes + BUCKET_BYTES * len(takers)
            if takers and kept and size > room:
                left.add(number)
            elif takers:
                kept[number] = shingles
                room -= size
                for bucket in takers:
                    with_bucket[bucket].append(number)
        return left

    def _shared_buckets(self) -> dict[int, array[int]]:
        """For every row that shares a band with another row: the buckets, one per band's value, that it shares."""
        if not self._bands:
            return {}
        shared: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))
        buckets = 0
        for band in np.stack(self._bands).T:
            _, bucket_of, sizes = np.unique(band, return_inverse=True, return_counts=True)
            for index in np.flatnonzero(sizes[bucket_of] > 1).tolist():
                shared[self._sketched[index]].append(buckets + int(bucket_of[index]))
            buckets += len(sizes)
        return dict(shared)


def similarity(left: Hashes, right: Hashes) -> float:
    """The Jaccard similarity of two sets of distinct hashes."""
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / (len(left) + len(right) - both)


def shingle_hashes(example: Example) -> Hashes:
    """The distinct runs of five words of an example, sorted; none where it has fewer words."""
    hashed = word_hashes(compared_texts(example))
    return np.unique(ngram_hashes(hashed, (SHINGLE_WORDS,)))


def compared_texts(example: Example) -> Iterator[str]:
    """The texts by which near duplicates are found: all that is said, without system messages and tools."""
    match example:
        case PlainText(text):
            yield text
        case QuestionAnswer(question, answer):
            yield from (question, answer)
        case Conversation(messages):
            yield from _said(messages)
        case Preference(prompt, chosen, rejected):
            for part in (prompt, chosen, rejected):
                yield from _said(part)


def _said(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message["role"] != "system":
            yield message["content"]
        for call in message.get("tool_calls") or ():
            yield f"{call['function']['name']} {call['function']['arguments']}"


def content_digest(example: Example) -> bytes:
    """16 bytes that are equal for rows of equal content, whatever schema they came in."""
    text = json.dumps(_content(example), ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _content(example: Example) -> Any:
    match example:
        case PlainText(text):
            return text
        case QuestionAnswer(question, answer, wrong_answer):
            asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            return [[asked, answered], [], *([wrong_answer] if wrong_answer is not None else [])]
        case Conversation(messages, tools):
            return [list(messages), list(tools)]
        case Preference(prompt, chosen, rejected, tools):
            return [list(prompt), list(chosen), list(rejected), list(tools)]


def _bands(shingles: Hashes) -> Hashes:
    """One hash per band of the sketch of a set of shingles."""
    from datasketch import MinHash

    prototype = _prototype()
    sketch = MinHash(
        num_perm=prototype.num_perm,
        seed=SEED,
        hashfunc=int,
        permutations=prototype.permutations,
        scheme="affine32",
    )
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):  # a matrix of that many rows is made
        sketch.update_batch((shingles[start : start + SHINGLES_AT_ONCE] >> np.uint64(32)).tolist())
    values = sketch.hashvalues.reshape(BANDS, BAND_VALUES).astype(np.uint64)
    powers = np.array([pow(MULTIPLIER, n, 1 << 64) for n in range(1, BAND_VALUES + 1)], dtype=np.uint64)
    return (values * powers).sum(axis=1, dtype=np.uint64)


@lru_cache(maxsize=1)
def _prototype() -> MinHash:
    """A sketch whose permutations all others share; making them takes longer than using them."""
    from datasketch import MinHash

    return MinHash(num_perm=BANDS * BAND_VALUES, seed=SEED, hashfunc=int, scheme="affine32")
