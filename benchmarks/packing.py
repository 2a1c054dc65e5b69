"""Fill rate of packed rows by how many documents are packed at a time, on several length distributions.

    python benchmarks/packing.py [--documents 50000] [--output benchmarks/packing.md]

Lengths are log-normal, exp(N(mu, sigma)) rounded up and clipped to the row, and those of GSM8K's training conversations
where ../shared/data is beside the repository. Exits with 1 when the chosen size fills less than 98 % of the row tokens,
except where two documents fill a row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import Table, finish
from trl.data_utils import _pack_bfd

from hymba_align.data import packing

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MAX_LENGTH = 8192
WANTED = 0.98
TRL_BATCH = 1000
SIZES = (TRL_BATCH, 5_000, packing.PACKED_TOGETHER)
LOG_NORMAL = {
    "short answers": (4.5, 0.6),
    "chat": (5.6, 0.8),
    "chat, wide": (5.6, 1.4),
    "long": (7.0, 1.0),
    "long, wide": (7.5, 1.5),
    "half a row": (8.3, 0.3),
}
HARD = "half a row"  # a third document seldom fits, so no order of filling rows can be good; shown, not judged


def log_normal(mu: float, sigma: float, documents: int) -> np.ndarray:
    """Lengths from 1 to MAX_LENGTH."""
    drawn = np.exp(np.random.default_rng(0).normal(mu, sigma, documents))
    return np.ceil(drawn).clip(1, MAX_LENGTH).astype(np.int64)


def gsm8k_lengths() -> np.ndarray | None:
    """Tokens of the training questions with their answers, one per conversation; None where they are absent."""
    from hymba_align.data.template import load_tokenizer

    path = SHARED / "data" / "gsm8k" / "train.jsonl"
    if not path.is_file():
        return None
    tokenizer = load_tokenizer(str(SHARED / "hymba_1_5b"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows
    ]
    return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])


def packed_rows(lengths: np.ndarray, together: int) -> tuple[int, float]:
    """Rows that the documents take when so many are packed at a time, and the seconds that packing takes."""
    rows, start = 0, time.perf_counter()
    for first in range(0, len(lengths), together):
        some = lengths[first : first + together]
        offsets = pa.array(np.concatenate([[0], np.cumsum(some)]), type=pa.int32())
        ids = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(some.sum(), dtype=np.int32)))
        table = pa.table({"input_ids": ids, "labels": ids})
        rows += _pack_bfd(table, MAX_LENGTH).num_rows
    return rows, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    sets = {
        f"{name}: mu {mu}, sigma {sigma}": log_normal(mu, sigma, arguments.documents)
        for name, (mu, sigma) in LOG_NORMAL.items()
    }
    gsm8k = gsm8k_lengths()
    if gsm8k is not None:
        sets["GSM8K train, released tokenizer"] = gsm8k
    table = Table(
        "Packing: fill rate by documents packed at a time",
        "python benchmarks/packing.py",
        ["lengths", "documents", "mean", *(f"{size:,}" for size in SIZES[:-1]), "ours", "possible", "seconds"],
        f"Rows of {MAX_LENGTH:,} tokens; fill = tokens / (rows * {MAX_LENGTH:,}). TRL's own call packs {TRL_BATCH:,} at a "
        f"time; ours {packing.PACKED_TOGETHER:,}, fewer where these have more than {packing.TOKENS_PACKED_TOGETHER:,} "
        "tokens. 'possible' is one batch of all documents with no room lost but in the last row. Seconds are those of ours.",
    )
    missed = []
    for name, lengths in sets.items():
        ours = packing._documents_together(lengths)
        counted = [packed_rows(lengths, size) for size in (*SIZES[:-1], ours)]
        fills = [lengths.sum() / (rows * MAX_LENGTH) for rows, _ in counted]
        best = lengths.sum() / (-(-lengths.sum() // MAX_LENGTH) * MAX_LENGTH)
        if fills[-1] < min(WANTED, best) and not name.startswith(HARD):
            missed.append(name)
        shown = [f"{100 * fill:.2f} %" for fill in (*fills, best)]
        table.add(name, f"{len(lengths):,}", f"{lengths.mean():.0f}", *shown, f"{counted[-1][1]:.1f}")
    below = f"less than {WANTED:.0%} filled: {', '.join(missed)}"
    finish(table, arguments.output, [below] if missed else [])


if __name__ == "__main__":
    main()
