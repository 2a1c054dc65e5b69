"""Log-likelihoods of continuations, with everything that they share computed once.

Continuations of one context are the choices of a question, and contexts that begin alike are questions after the same
few-shot examples: a row of the model holds them as one tree (see `segments.py`), so that each distinct prefix is run
once per row. Where there are several rows, what all contexts have in common is run before, as a cache that starts every
row. Logits are formed only where a continuation's token is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba_align.model.decoding import Ids, Prefix, as_integer, run_prefix, token_sequences
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.model.segments import IdArray, common_tokens, share_prefixes

LOGITS_AT_ONCE = 1024
"""Positions whose logits are held at a time: 131 MB in float32 for a vocabulary of 32,000."""


class Scored(NamedTuple):
    """What a model thinks of one continuation."""

    log_likelihood: float
    """Sum over its tokens of their natural log-probabilities"""
    is_greedy: bool
    """Whether every token is the likeliest one"""


@dataclass(frozen=True)
class _Job:
    """One continuation with what comes before it."""

    number: int
    """Place in the caller's order"""
    context: tuple[int, ...]
    inputs: IdArray
    """Tokens that the model reads: all but the last one of the continuation"""
    targets: tuple[int, ...]
    """Tokens of the continuation"""

    def after(self, tokens: int) -> _Job:
        """The same without so many tokens at the beginning of the context."""
        return replace(self, context=self.context[tokens:], inputs=self.inputs[tokens:])


def score_continuations(
    model: HymbaForCausalLM,
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    tokens_per_row: int,
) -> list[Scored]:
    """One score per continuation, in the order given. The model's mode is left as it is; no gradient is kept.

    Args:
        model: a Hymba.
        contexts: token ids before each continuation, at least 1; give equal ones again for each choice of a question.
        continuations: token ids to score, at least 1 each.
        tokens_per_row: most tokens of a forward pass, meta tokens and common beginning not counted; a longer sequence has
            a row of its own.

    Raises:
        ValueError: a context or continuation that is empty or holds anything but the model's token ids, both together
            longer than its `max_position_embeddings` (the last token is predicted, not read), or not as many of both; the
            message names the entry.
    """
    scores: dict[int, Scored] = {}
    for numbers, scored in scored_rows(model, contexts, continuations, tokens_per_row=tokens_per_row):
        scores.update(zip(numbers, scored, strict=True))
    return [scores[number] for number in range(len(contexts))]


def scored_rows(
    model: HymbaForCausalLM,
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    tokens_per_row: int,
) -> Iterator[tuple[list[int], list[Scored]]]:
    """As `score_continuations`, row by row: the entries of a row and their scores, for progress bars and partial results."""
    tokens_per_row = as_integer(tokens_per_row, "tokens_per_row", least=1)
    before, after = (
        token_sequences(given, name, model.config.vocab_size)
        for name, given in (("contexts", contexts), ("continuations", continuations))
    )
    jobs = _jobs(before, after, model.config.max_position_embeddings)
    rows, prefix = list(_fill_rows(jobs, tokens_per_row)), None
    if len(rows) > 1:
        prefix = run_prefix(model, _common_start(jobs))
        rows = list(_fill_rows([job.after(len(prefix.tokens)) for job in jobs], tokens_per_row))
    for row in rows:
        yield [job.number for job in row], _score_row(model, row, prefix)


def _jobs(contexts: list[list[int]], continuations: list[list[int]], most: int) -> list[_Job]:
    """Sorted, so that contexts that begin alike stand together; none reads more than `most` tokens."""
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts but {len(continuations)} continuations; give one of each")
    jobs: list[_Job] = []
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        for name, tokens in (("contexts", context), ("continuations", continuation)):
            if not tokens:
                raise ValueError(f"{name}[{number}] is empty; it needs at least 1 token")
        inputs = np.array([*context, *continuation[:-1]], dtype=np.int64)
        if len(inputs) > most:
            raise ValueError(
                f"contexts[{number}] and continuations[{number}] have {len(inputs)} tokens before the last one, but the "
                f"model's context is {most} (max_position_embeddings); cut the beginning of the context"
            )
        jobs.append(_Job(number, tuple(context), inputs, tuple(continuation)))
    return sorted(jobs, key=lambda job: (job.context, job.targets))


def _common_start(jobs: list[_Job]) -> list[int]:
    """What the sorted jobs' contexts all start with, at least one token short of each."""
    first, last = np.array(jobs[0].context), np.array(jobs[-1].context)
    most = min(len(job.context) for job in jobs) - 1
    return list(jobs[0].context[: min(most, common_tokens(first, last))])


def _fill_rows(jobs: list[_Job], tokens_per_row: int) -> Iterator[list[_Job]]:
    """The sorted jobs in rows of at most so many distinct prefixes.

    Contexts that begin alike stand together, and the continuations of one context share a row if any row can hold them.
    """
    row: list[_Job] = []
    filled = 0
    for group in _groups(jobs, tokens_per_row):
        added = _added_tokens(row[-1:], group)
        if row and filled + added > tokens_per_row:
            yield row
            row, filled = [], 0
            added = _added_tokens([], group)
        row = row + group
        filled += added
    if row:
        yield row


def _groups(jobs: list[_Job], tokens_per_row: int) -> Iterator[list[_Job]]:
    """What stays together: the continuations of a context, or each alone where they exceed a row."""
    for _, same in groupby(jobs, key=lambda job: job.context):
        group = list(same)
        if _added_tokens([], group) <= tokens_per_row:
            yield group
        else:
            yield from ([job] for job in group)


def _added_tokens(before: list[_Job], group: list[_Job]) -> int:
    """Tokens of a group that the job before it does not already hold; no less than what the row grows by."""
    chain = [*before, *group]
    shared = sum(common_tokens(one.inputs, other.inputs) for one, other in pairwise(chain))
    return sum(len(job.inputs) for job in group) - shared


@torch.no_grad()
def _score_row(model: HymbaForCausalLM, row: list[_Job], prefix: Prefix | None) -> list[Scored]:
    """Scores of a row, whose inputs continue the prefix if there is one."""
    shared = share_prefixes([torch.from_numpy(job.inputs) for job in row])
    device = model.model.embed_tokens.weight.device
    hidden_TD = model.model(
        input_ids=shared.token_ids[None].to(device),
        segments=shared.tree,
        use_cache=prefix is not None,
        past_key_values=None if prefix is None else prefix.cache.expanded(1),
        cache_segments=None if prefix is None else torch.tensor([0]),  # nothing reads what the cache takes in
    ).last_hidden_state[0]

    # A continuation's tokens are predicted at the last tokens of its inputs; choices share the first of these places.
    sizes = [len(job.targets) for job in row]
    predicting = torch.cat([shared.tokens_of(entry)[-size:] for entry, size in enumerate(sizes)])
    targets = torch.tensor([token for job in row for token in job.targets])
    log_probs, is_best = _log_probabilities(model, hidden_TD, predicting.to(device), targets.to(device))
    return [
        Scored(float(one.double().sum()), bool(best.all()))
        for one, best in zip(log_probs.cpu().split(sizes), is_best.cpu().split(sizes), strict=True)
    ]


def _log_probabilities(
    model: HymbaForCausalLM, hidden_TD: Tensor, predicting: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability (n,) of each target and whether it is the likeliest token (n,), in float32 at least.

    Args:
        model: its head.
        hidden_TD: last hidden states of the row.
        predicting: (n,) index in the row of the token that predicts each target; indices repeat.
        targets: (n,) token ids.
    """
    places, place_of = predicting.unique(return_inverse=True)
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    log_probs = torch.empty(len(targets), dtype=dtype, device=hidden_TD.device)
    is_best = torch.empty_like(log_probs, dtype=torch.bool)
    for start in range(0, len(places), LOGITS_AT_ONCE):
        logits = model.lm_head(hidden_TD[places[start : start + LOGITS_AT_ONCE]])
        here = ((place_of >= start) & (place_of < start + LOGITS_AT_ONCE)).nonzero().flatten()
        at = place_of[here] - start
        log_probs[here] = torch.log_softmax(logits.to(dtype), dim=-1)[at, targets[here]]
        is_best[here] = logits.argmax(dim=-1)[at] == targets[here]
    return log_probs, is_best
