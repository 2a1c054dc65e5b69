"""Texts as words and runs of words, both as 64-bit hashes; duplicates.py and contamination.py compare with them.

A word is a longest run of letters and digits, in lower case; a Chinese character or Japanese kana is a word of its own.
Everything else (spaces, punctuation, symbols, underscores) only separates words. Numbers are kept as they are written:
"1,000" is the two words 1 and 000.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORD = re.compile(r"[^\W_]+")
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# Odd, so that multiplying by its powers loses no bits.
MULTIPLIER = 0x9E3779B97F4A7C15
WORDS_REMEMBERED = 1 << 19


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", text)
    return WORD.findall(text.lower())


@lru_cache(maxsize=WORDS_REMEMBERED)
def word_hash(word: str) -> int:
    """64 bits that depend on the word alone, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(texts: Iterable[str]) -> Hashes:
    """The hashes of the words of all texts in order, with one between two texts that is no word's.

    So a run of words across two texts (two messages, say) equals no run within a text.
    """
    hashes: list[int] = []
    for text in texts:
        if hashes:
            hashes.append(word_hash(" "))
        hashes += map(word_hash, words(text))
    return np.array(hashes, dtype=np.uint64)


def ngram_hashes(words_hashed: Hashes, lengths: Collection[int]) -> Hashes:
    """The hashes of all runs of n words, for every n of `lengths`: shortest runs first, repeated ones repeated."""
    found = []
    runs = np.zeros(len(words_hashed), dtype=np.uint64)
    for n in range(1, min(max(lengths), len(words_hashed)) + 1):
        power = np.uint64(pow(MULTIPLIER, n, 1 << 64))
        runs = runs[: len(words_hashed) - n + 1] + words_hashed[n - 1 :] * power
        if n in lengths:
            found.append(runs)
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)
