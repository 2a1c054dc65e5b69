"""Pairs as training takes them: several in a row up to a number of tokens, and rows as TRL's preference batch.

Tensor legend: B rows of a batch, chosen then rejected, so B/2 pairs; T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hymba_align.data.packing import PLACE, PLACES
from hymba_align.train.row_places import places_of

Pair = dict[str, Any]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
OF_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
LENGTH = "length"
"""Column with the tokens that a pair takes; transformers' strategies of sampling by length read it."""


def pair_tokens(pairs: Dataset, *, share_prefix: bool) -> list[int]:
    """Tokens that each pair takes in a row: prompt (twice where it is not shared), chosen and rejected."""
    prompts, chosen, rejected = (pc.list_value_length(pairs.with_format("arrow")[:][name]).to_numpy() for name in IDS)
    tokens: list[int] = ((1 if share_prefix else 2) * prompts + chosen + rejected).tolist()
    return tokens


def best_fit_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of the pairs of each row; each goes, longest first, into the fullest row that still has room for it.

    Every index is in exactly one row. A pair longer than `row_tokens` has a row of its own. The same on every call.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the tokens that are still free
    free: list[int] = []  # the keys above, in order
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(free, lengths[index])
        if place == len(free):
            row, left = len(rows), row_tokens
            rows.append([])
        else:
            left = free[place]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], free[place]
        rows[row].append(index)
        left -= lengths[index]
        if left > 0:
            if left not in open_rows:
                insort(free, left)
            open_rows.setdefault(left, []).append(row)
    return rows


@dataclass(frozen=True)
class RowsReport:
    """How full rows of pairs are; for data.json, and as a line for people."""

    rows: int
    pairs: int
    tokens: int
    row_tokens: int
    fewest_pairs: int
    most_pairs: int
    longer: int
    """Pairs longer than `row_tokens`; each has a row of its own."""
    fill_rate: float
    """tokens / room, where a row has room for `row_tokens`, or for its one longer pair."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> RowsReport:
        """The report of rows of pairs with these lengths."""
        filled = [sum(lengths[index] for index in row) for row in rows]
        counts = [len(row) for row in rows]
        return cls(
            rows=len(rows),
            pairs=len(lengths),
            tokens=sum(filled),
            row_tokens=row_tokens,
            fewest_pairs=min(counts),
            most_pairs=max(counts),
            longer=sum(length > row_tokens for length in lengths),
            fill_rate=sum(filled) / sum(max(row_tokens, tokens) for tokens in filled),
        )

    def line(self) -> str:
        """One line, e.g. `rows: 480 pairs in 61 rows of up to 2,048 tokens, 7.9 per row (5 to 12), fill 97.31 %`."""
        longer = f"; {self.longer:,} longer, each in a row of its own" if self.longer else ""
        return (
            f"rows: {self.pairs:,} pairs in {self.rows:,} rows of up to {self.row_tokens:,} tokens, "
            f"{self.pairs / self.rows:.1f} per row ({self.fewest_pairs} to {self.most_pairs}), "
            f"fill {100 * self.fill_rate:.2f} %{longer}"
        )


class TokenBalance(BatchRebalanceSampler):
    """Batches of one process, each step's balanced by tokens: what a batch costs here is the sum of its lengths.

    Transformers' own cost is that of padded rows and of attention over all of them, which the model does not compute.
    """

    @classmethod
    def like(cls, sampler: BatchRebalanceSampler, seed: int) -> TokenBalance:
        """The same pairs and numbers as transformers' sampler has; it always shuffles by seed 42."""
        return cls(
            lengths=sampler.lengths,
            effective_batch_size=sampler.effective_batch_size,
            dp_size=sampler.dp_size,
            grad_accum=sampler.grad_accum,
            seed=seed,
            rank=sampler.rank,
            drop_last=sampler.drop_last,
        )

    def _group_cost(self, group: Sequence[tuple[int, int]]) -> float:
        return float(sum(length for _, length in group))


class PreferenceRows(TorchDataset[list[Pair]]):
    """Rows of pairs: an item is the list of a row's pairs, so that one row is one element of a batch."""

    def __init__(self, pairs: Dataset, rows: Sequence[Sequence[int]]) -> None:
        wanted = [name for name in (*IDS, *OF_REFERENCE, PLACE) if name in pairs.column_names]
        self.pairs, self.rows = pairs.select_columns(wanted), rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Pair]:
        columns = self.pairs[list(self.rows[row])]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's preference batch of pairs, or of all pairs of several rows, plus `shared_prefix_lengths` (B/2,) int64.

    And `places`, where each pair was read, if pairs have a `place`.

    Rows i and i + B/2 of the batch begin with that many equal tokens, the pair's prompt. The model reads the key and
    computes them once, and padding never; TRL passes the key on to the model, also for the reference log-probabilities.
    The tensor has half as many rows as the rest of the batch: processes build their own batches, so accelerate never
    slices it (`dispatch_batches`, which would, is refused because it separates chosen from rejected in the first place).
    """

    share_prefix: bool = True
    row_tokens: int | None = None
    """The budget of a row where rows hold several pairs; the reference's batches keep to it too."""

    def torch_call(self, examples: Sequence[Pair | list[Pair]]) -> dict[str, Any]:
        pairs = [pair for example in examples for pair in (example if isinstance(example, list) else [example])]
        batch: dict[str, Any] = super().torch_call(pairs)
        places = places_of(pairs)
        if places:
            batch[PLACES] = places  # the trainer takes them out before the model sees the batch
        if self.share_prefix:
            batch["shared_prefix_lengths"] = torch.tensor([self.shared_length(pair) for pair in pairs])
        return batch

    def shared_length(self, pair: Pair) -> int:
        """Prompt tokens that both rows still start with after truncation."""
        prompt = len(pair["prompt_ids"])
        if self.max_length is None:
            return prompt
        if self.truncation_mode == "keep_start":
            return min(prompt, self.max_length)
        cut_chosen, cut_rejected = (
            max(0, prompt + len(pair[key]) - self.max_length) for key in ("chosen_ids", "rejected_ids")
        )
        return max(0, prompt - cut_chosen) if cut_chosen == cut_rejected else 0
