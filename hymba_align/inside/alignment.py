"""What lies between two checkpoints: answers that became more or less likely, and next-token distributions that moved.

A loss curve of DPO shows the margin between both answers alone. It may grow while both lose, while the model moves far
from where it started, or while its answers grow longer; these are the numbers that tell.

Legend: T tokens of a row's text, n of them that are scored, N in all rows, V vocabulary, S documents of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hymba_align.errors import DataError, TokenizerError
from hymba_align.inference.token_texts import TokenTexts
from hymba_align.inside.importance import measured
from hymba_align.inside.movement import causal_in, check_comparable
from hymba_align.inside.passes import PredictingStates, run_rows, scored_places
from hymba_align.inside.result import Divergence, Measured, PairChange, Pairs, PairText, Shift
from hymba_align.inside.rows import Document, Row
from hymba_align.inside.showing import display
from hymba_align.inside.texts import Pair
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.model.scoring import scored_rows
from hymba_align.progress import Display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PAIR_TOKENS_PER_ROW = 4096
LOGITS_AT_ONCE = 2**22
"""Logits of each model that exist at a time: 34 MB in float64, in which they are compared; 131 positions of 32,001 tokens."""
PAIRS_SHOWN = 2
SHOWN_CHARACTERS = 600
"""Of each text of a pair that is shown"""
SHIFTS = 10
"""The tokens that moved most, that are named"""
SHIFT_CONTEXT = 16
"""Tokens of the text before each"""
RANGES = 8
"""Into which positions are divided, about as many tokens in each"""


# ---- pairs -----------------------------------------------------------------------------------------------------------


def measure_pairs(
    before: nn.Module,
    after: nn.Module,
    pairs: Sequence[Pair],
    *,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens_per_row: int = PAIR_TOKENS_PER_ROW,
) -> Pairs:
    """The log-probabilities of both answers of each pair under both models, in nats.

    They are those that DPO computes: the sum over an answer's tokens, its end token included, after the prompt. What the
    prompts and answers have in common is run once. Changes per token are sums over all answers divided by their tokens;
    standard errors are between pairs.

    Args:
        before: a Hymba with its head, with or without adapters around it.
        after: the one that training made of it.
        pairs: at least one.
        source: where they come from.
        tokenizer: that made their tokens, to show a few of them as they read; None shows none.
        tokens_per_row: most tokens of a forward pass.

    Raises:
        CheckpointError: models of different shapes.
        ValueError: no pair, or one that the model cannot take.
    """
    if not pairs:
        raise ValueError("there is no pair to measure")
    models = causal_in(before), causal_in(after)
    check_comparable(models[0].config, models[1].config)
    with display("Answers of pairs", len(models) * 2 * len(pairs), "answers") as shown:
        before_N2, after_N2 = (_answer_logps(model, pairs, tokens_per_row, shown) for model in models)
    changes = [
        PairChange(
            pair.name,
            len(pair.chosen_ids),
            len(pair.rejected_ids),
            chosen_before=float(old[0]),
            chosen_after=float(new[0]),
            rejected_before=float(old[1]),
            rejected_after=float(new[1]),
        )
        for pair, old, new in zip(pairs, before_N2, after_N2, strict=True)
    ]
    change_N2 = after_N2 - before_N2
    tokens_N2 = np.array([[one.chosen_tokens, one.rejected_tokens] for one in changes], dtype=np.float64)
    return Pairs(
        source,
        tuple(changes),
        chosen_change=measured(change_N2[:, 0], tokens_N2[:, 0]),
        rejected_change=measured(change_N2[:, 1], tokens_N2[:, 1]),
        margin_change=mean_of(change_N2[:, 0] - change_N2[:, 1]),
        preferred_before=float((before_N2[:, 0] > before_N2[:, 1]).mean()),
        preferred_after=float((after_N2[:, 0] > after_N2[:, 1]).mean()),
        chosen_fell=float((change_N2[:, 0] < 0).mean()),
        made_rejected=sum(pair.is_made for pair in pairs),
        examples=() if tokenizer is None else tuple(_as_read(pair, tokenizer) for pair in pairs[:PAIRS_SHOWN]),
    )


def _as_read(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> PairText:
    """The texts of a pair; the end of a prompt and the beginnings of answers."""
    prompt, chosen, rejected = (
        str(tokenizer.decode(list(ids))) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return PairText(pair.name, prompt[-SHOWN_CHARACTERS:], chosen[:SHOWN_CHARACTERS], rejected[:SHOWN_CHARACTERS])


def _answer_logps(model: HymbaForCausalLM, pairs: Sequence[Pair], tokens_per_row: int, shown: Display) -> Floats:
    """(N, 2) log-probabilities of the chosen and the rejected answers; each row's are told when they are there."""
    found_N2 = np.empty((len(pairs), 2))
    rows = scored_rows(
        model,
        [pair.prompt_ids for pair in pairs for _ in range(2)],
        [answer for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)],
        tokens_per_row=tokens_per_row,
    )
    for numbers, scores in rows:
        found_N2.flat[numbers] = [score.log_likelihood for score in scores]
        shown.advance(shown.done + len(numbers))
        shown.tell()
    return found_N2


def mean_of(values: Floats) -> Measured:
    """The mean of independent values and its standard error."""
    return measured(values, np.ones(len(values)))


# ---- distributions ---------------------------------------------------------------------------------------------------


def check_same_vocabulary(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, before_name: str, after_name: str
) -> None:
    """Raises TokenizerError, naming a token, where a token id does not mean the same to both checkpoints."""
    old, new = before.get_vocab(), after.get_vocab()
    different = sorted(token for token in old.keys() | new.keys() if old.get(token) != new.get(token))
    if different:
        token = min(different, key=lambda one: (min(old.get(one, math.inf), new.get(one, math.inf)), one))
        ids = [str(vocabulary.get(token, "missing")) for vocabulary in (new, old)]
        raise TokenizerError(
            f"{after_name} and {before_name} cannot be compared: their tokenizers differ in {len(different):,} "
            f"token{'s' if len(different) > 1 else ''}, such as {token[:40]!r} ({ids[0]} in the one, {ids[1]} in the other); "
            "compare checkpoints with one vocabulary"
        )


@dataclass(frozen=True, eq=False)
class _Scored:
    """What both models say at n scored tokens; `document` counts over all rows."""

    document: Ints
    position: Ints
    """in the document, from 0"""
    target: Ints
    kl: Floats
    reverse_kl: Floats
    loss_before: Floats
    loss_after: Floats
    entropy_before: Floats
    entropy_after: Floats
    likeliest_before: Ints
    likeliest_after: Ints

    @classmethod
    def joined(cls, parts: Sequence[_Scored]) -> _Scored:
        """All of them, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@torch.no_grad()
def measure_divergence(
    before: nn.Module,
    after: nn.Module,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    states: tuple[Iterable[Tensor], Iterable[Tensor]] | None = None,
) -> Divergence:
    """How far the distributions over all V tokens have moved, at every token under the loss, in nats.

    Computed in float64 from the logits that each model gives in its own dtype: in bfloat16 their rounding alone makes two
    models differ that were almost equal. Source of the divergence: Kullback and Leibler, On Information and Sufficiency
    (1951).
    Means are over all tokens, with standard errors between documents, save for `kl_growth` and `end_change`, which are
    means over documents.

    Args:
        before: a Hymba with its head, with or without adapters around it.
        after: the one that training made of it.
        rows: of documents that neither was trained on, else it is memory that is measured.
        tokenizer: of both.
        source: where the documents come from.
        states: what `PredictingStates` kept of both over these rows; None runs them.

    Raises:
        CheckpointError: models of different shapes.
        DataError: no token is under the loss.
    """
    models = causal_in(before), causal_in(after)
    check_comparable(models[0].config, models[1].config)
    documents: list[Document] = []
    parts: list[_Scored] = []
    rows = list(rows)
    for row, *hidden in zip(rows, *(states or map(partial(_states, rows=rows), models)), strict=True):
        parts += _scored(models, row, hidden, len(documents))
        documents += row.documents
    if not parts:
        raise DataError(
            f"{source}: none of the {len(documents)} documents has a token under the loss behind its first one; give "
            "documents with text of the assistant, or plain text"
        )
    found = _Scored.joined(parts)
    sums, tokens = _by_document(found, len(documents))
    ends = found.target == tokenizer.eos_token_id
    return Divergence(
        source,
        documents=len(tokens),
        tokens=len(found.target),
        kl=measured(sums["kl"], tokens),
        reverse_kl=measured(sums["reverse_kl"], tokens),
        loss_before=measured(sums["loss_before"], tokens),
        loss_after=measured(sums["loss_after"], tokens),
        entropy_before=measured(sums["entropy_before"], tokens),
        entropy_after=measured(sums["entropy_after"], tokens),
        same_likeliest=float((found.likeliest_before == found.likeliest_after).mean()),
        by_position=_by_position(found),
        largest=_largest(found, documents, tokenizer),
        loss_change=measured(sums["loss_after"] - sums["loss_before"], tokens),
        entropy_change=measured(sums["entropy_after"] - sums["entropy_before"], tokens),
        kl_growth=_kl_growth(found),
        halved_documents=int((tokens >= 2).sum()),
        end_change=_document_means((found.loss_before - found.loss_after)[ends], found.document[ends]),
        ended_documents=len(np.unique(found.document[ends])),
    )


def _scored(
    models: tuple[HymbaForCausalLM, HymbaForCausalLM], row: Row, hidden: Sequence[Tensor], first_document: int
) -> Iterator[_Scored]:
    """What both models say at a row's scored tokens, tile by tile, from the (n, D) states that predict them."""
    chosen_n, _ = scored_places(row)
    documents_T = torch.arange(row.tree.num_segments).repeat_interleave(row.tree.lengths)
    positions_T = torch.arange(len(documents_T)) + (row.tree.ancestor_tokens - row.tree.offsets)[documents_T]
    at_once = max(1, LOGITS_AT_ONCE // models[0].config.vocab_size)
    for start in range(0, len(chosen_n), at_once):
        tile = slice(start, start + at_once)
        at = chosen_n[tile]
        old, new = (_log_probs(model, states[tile]) for model, states in zip(models, hidden, strict=True))
        compared = _compare(old, new.to(old.device), row.input_ids[at].to(old.device))
        yield _Scored(
            (first_document + documents_T[at]).numpy(),
            positions_T[at].numpy(),
            row.input_ids[at].numpy(),
            *(values.cpu().numpy() for values in compared),
        )


def _states(model: HymbaForCausalLM, rows: Sequence[Row]) -> Iterator[Tensor]:
    """(n, D) last hidden states of the tokens that predict, of one row after another."""
    for row in rows:
        watcher = PredictingStates()
        run_rows(model, [row], [watcher])
        yield from watcher.states


def _log_probs(model: HymbaForCausalLM, hidden_nD: Tensor) -> Tensor:
    """(n, V) in float64."""
    return torch.log_softmax(model.lm_head(hidden_nD.to(model.lm_head.weight.device)).double(), dim=-1)


def _compare(old_nV: Tensor, new_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, ...]:
    """The fields of `_Scored` from `kl` on, (n,) each, of two sets of log-probabilities."""
    old_probs, new_probs = old_nV.exp(), new_nV.exp()
    losses = [-values.gather(1, targets_n[:, None])[:, 0] for values in (old_nV, new_nV)]
    return (
        (new_probs * (new_nV - old_nV)).sum(-1),
        (old_probs * (old_nV - new_nV)).sum(-1),
        *losses,
        -(old_probs * old_nV).sum(-1),
        -(new_probs * new_nV).sum(-1),
        old_nV.argmax(-1),
        new_nV.argmax(-1),
    )


# ---- over documents and positions ------------------------------------------------------------------------------------


def _by_document(found: _Scored, documents: int) -> tuple[dict[str, Floats], Floats]:
    """Sums over each document's tokens, and how many these are; of documents that have some."""
    tokens = np.bincount(found.document, minlength=documents)
    present = tokens > 0
    names = ("kl", "reverse_kl", "loss_before", "loss_after", "entropy_before", "entropy_after")
    sums: dict[str, Floats] = {}
    for name in names:
        sums[name] = np.zeros(documents)
        np.add.at(sums[name], found.document, getattr(found, name))
        sums[name] = sums[name][present]
    return sums, tokens[present].astype(np.float64)


def _document_means(values: Floats, document: Ints) -> Measured | None:
    """The mean over documents of their tokens' mean; None without any."""
    if not len(values):
        return None
    _, places = np.unique(document, return_inverse=True)
    return mean_of(np.bincount(places, values) / np.bincount(places))


def _kl_growth(found: _Scored) -> Measured | None:
    """Mean over documents: KL per token in the second half of the scored tokens minus that in the first.

    A document of one token has no halves; None where no other is there.
    """
    growths = []
    for document in np.unique(found.document):
        kl = found.kl[found.document == document]
        half = len(kl) // 2
        if half:
            growths.append(kl[-half:].mean() - kl[:half].mean())
    return mean_of(np.array(growths)) if growths else None


def _by_position(found: _Scored) -> tuple[tuple[int, int, float], ...]:
    """The mean KL in up to `RANGES` ranges of positions, about as many tokens in each; a position is in one range."""
    order = np.sort(found.position)
    starts = sorted({int(order[len(order) * part // RANGES]) for part in range(RANGES)})
    ranges = []
    for start, end in zip(starts, [*starts[1:], int(order[-1]) + 1], strict=True):
        inside = (found.position >= start) & (found.position < end)
        ranges.append((start, int(found.position[inside].max()), float(found.kl[inside].mean())))
    return tuple(ranges)


def _largest(found: _Scored, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> tuple[Shift, ...]:
    """The tokens with the largest KL, largest first; none where the models are equal."""
    texts = TokenTexts(tokenizer)
    order = np.argsort(-found.kl, kind="stable")[:SHIFTS]
    shifts = []
    for place in order[found.kl[order] > 0].tolist():
        document, position = documents[int(found.document[place])], int(found.position[place])
        context = document.token_ids[max(0, position - SHIFT_CONTEXT) : position]
        shifts.append(
            Shift(
                document.name,
                before=str(tokenizer.decode(list(context), clean_up_tokenization_spaces=False)),
                token=texts.of(int(found.target[place]))[0],
                kl=float(found.kl[place]),
                was_likeliest=texts.of(int(found.likeliest_before[place]))[0],
                is_likeliest=texts.of(int(found.likeliest_after[place]))[0],
            )
        )
    return tuple(shifts)
