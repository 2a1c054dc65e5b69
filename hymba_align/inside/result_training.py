"""What an inspection measured between two checkpoints: weights moved, answers whose probability changed, divergence."""

from __future__ import annotations

from dataclasses import dataclass

from hymba_align.inside.result_heads import Attention, Measured


@dataclass(frozen=True)
class WeightMovement:
    """How far training moved one part of the weights."""

    layer: int | None
    """None for what belongs to no layer"""
    part: str
    """attention, ssm, fusion, mlp, norms; embeddings, meta tokens, final norm"""
    parameters: int
    distance: float
    """Frobenius norm of the difference"""
    relative: float
    """divided by the norm before"""
    share: float
    """of the squared distance of all weights"""


@dataclass(frozen=True)
class PairChange:
    """One pair of answers, before and after; log-probabilities of whole answers and their tokens."""

    name: str
    chosen_tokens: int
    rejected_tokens: int
    chosen_before: float
    chosen_after: float
    rejected_before: float
    rejected_after: float


@dataclass(frozen=True)
class PairText:
    """A pair as it reads, to see what was compared."""

    name: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Pairs:
    """What became of chosen and rejected answers."""

    source: str
    pairs: tuple[PairChange, ...]
    chosen_change: Measured
    """per token"""
    rejected_change: Measured
    """per token"""
    margin_change: Measured
    """of log-probability(chosen) - log-probability(rejected), whole answers"""
    preferred_before: float
    """Share of pairs whose chosen answer was the likelier one"""
    preferred_after: float
    chosen_fell: float
    """Share of pairs whose chosen answer became less likely"""
    made_rejected: int = 0
    """Pairs whose rejected answer was made from the right one, as for DPO, because the row has none"""
    examples: tuple[PairText, ...] = ()
    """The first few of the pairs"""


@dataclass(frozen=True)
class Shift:
    """A token at which both models differ much."""

    document: str
    before: str
    """The text that leads up to it"""
    token: str
    """What stands there"""
    kl: float
    was_likeliest: str
    is_likeliest: str


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distributions have moved over held-out data."""

    source: str
    documents: int
    tokens: int
    kl: Measured
    """KL(checkpoint || against) per token"""
    reverse_kl: Measured
    """KL(against || checkpoint) per token"""
    loss_before: Measured
    loss_after: Measured
    entropy_before: Measured
    entropy_after: Measured
    same_likeliest: float
    """Share of tokens at which the likeliest token is the same"""
    by_position: tuple[tuple[int, int, float], ...]
    """(first, last position in the document, mean KL)"""
    largest: tuple[Shift, ...]
    loss_change: Measured | None = None
    """After minus before, paired over documents"""
    entropy_change: Measured | None = None
    """After minus before, paired over documents"""
    kl_growth: Measured | None = None
    """KL per token in a document's second half minus that in its first, over the documents that have two halves"""
    halved_documents: int = 0
    """Documents with two scored tokens or more"""
    end_change: Measured | None = None
    """Log-probability of the end token where an answer ends, after minus before; None where no document has one"""
    ended_documents: int = 0
    """Documents in which an answer ends"""


@dataclass(frozen=True)
class Alignment:
    """What lies between two checkpoints."""

    against: str
    weights: tuple[WeightMovement, ...]
    whole: WeightMovement
    """All weights together"""
    attention_before: Attention | None
    pairs: Pairs | None
    divergence: Divergence | None
    attention_after: Attention | None = None
    """Computed as `attention_before` was; None where `Inspection.attention` was too"""
    dtype: str = "float32"
    """In which both models were computed here, and their weights compared"""
