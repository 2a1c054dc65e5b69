"""What an inspection measured of the heads: where attention goes, what each branch is worth, how both are joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Branch = Literal["attention", "ssm"]


@dataclass(frozen=True)
class Measured:
    """A mean and how well it is known."""

    mean: float
    stderr: float | None = None


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Where the attention of text tokens goes; the four shares add up to 1. Source: Hymba (arXiv 2411.13676), its attention map
    categories."""

    meta: float
    """on meta tokens"""
    bos: float
    """on the document's first token where that is `<s>`, from other tokens"""
    self: float
    """on the token itself"""
    cross: float
    """on other tokens"""
    entropy: float
    """of a token's attention, mean"""
    even_entropy: float
    """what it would be if a token attended evenly to all that it sees, mean"""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer."""

    layer: int
    is_global: bool
    kv_source: int
    """Layer whose keys and values it reads"""
    mean: Shares
    heads: tuple[Shares, ...]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one layer within the beginning of one document, mean over its heads."""

    layer: int
    is_global: bool
    document: str
    queries: tuple[str, ...]
    """The text's tokens, as they read"""
    meta: tuple[float, ...]
    """(M,) mass on each meta token, mean over the queries"""
    weights: tuple[tuple[float, ...], ...]
    """(Q, 1 + Q) mass of each query on all meta tokens together, then on each text token; rows add up to 1"""


@dataclass(frozen=True)
class Attention:
    """The attention of all layers."""

    tokens: int
    """Text tokens whose attention was averaged"""
    documents: int
    longest: int
    """Tokens of the longest document"""
    documents_with_bos: int
    """Documents that begin with `<s>`; without any, `bos` is 0 because there is none"""
    all_layers: Shares
    global_layers: Shares | None
    local_layers: Shares | None
    layers: tuple[LayerAttention, ...]
    maps: tuple[AttentionMap, ...] = ()


# ---- importance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """The score of a model without one branch of one layer."""

    score: float
    change: Measured
    """Score minus the whole model's, over the same documents or problems"""


@dataclass(frozen=True)
class LayerImportance:
    """What a layer's two branches are worth."""

    layer: int
    is_global: bool
    attention: Removal
    ssm: Removal
    difference: Measured
    """Change without the SSM heads minus change without the attention heads"""


@dataclass(frozen=True)
class Importance:
    """A score with each branch of each layer removed. Source: Hymba, head importance
    analysis."""

    metric: str
    """"loss", or a task's name"""
    unit: str
    """"nats per token", or "% correct" """
    lower_is_better: bool
    whole: Measured
    """Score of the whole model"""
    chance: float | None
    """Score of who knows nothing: log of the vocabulary for the loss; None for a task"""
    n: int
    """Tokens under the loss, or problems"""
    documents: int
    """Documents, or problems"""
    layers: tuple[LayerImportance, ...]


# ---- fusion ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BranchSize:
    """One branch at the fusion: root mean square per channel, mean over text tokens."""

    before: float
    """of what the branch computed"""
    after: float
    """behind its norm and learned scale, as it enters the mean"""
    scale: float
    """Root mean square of the learned scale. Source: Hymba, equation 3 (beta)"""
    scale_min: float
    scale_max: float


@dataclass(frozen=True)
class LayerFusion:
    """How a layer joins its branches."""

    layer: int
    is_global: bool
    attention: BranchSize
    ssm: BranchSize
    cosine: float
    """between both branches behind their norms, mean over text tokens"""
    ssm_share: float
    """of the SSM branch in the squared size of both behind their norms, mean over text tokens"""


@dataclass(frozen=True)
class Fusion:
    """The fusion of all layers."""

    tokens: int
    layers: tuple[LayerFusion, ...]
