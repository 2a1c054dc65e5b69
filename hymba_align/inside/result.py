"""What an inspection measured, as inspect.json holds it: its parts from three files, by one name.

The heads' part is in result_heads.py, what lies between two checkpoints in result_training.py; meta tokens, costs and the
whole are here.

Every part may be None: not asked for, or not possible with what was given. Losses, entropies and divergences are in
nats. `stderr` is the standard error of a mean over documents (or answers, or pairs); None with fewer than two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hymba_align.inside.result_heads import (
    Attention,
    AttentionMap,
    Branch,
    BranchSize,
    Fusion,
    Importance,
    LayerAttention,
    LayerFusion,
    LayerImportance,
    Measured,
    Removal,
    Shares,
)
from hymba_align.inside.result_training import (
    Alignment,
    Divergence,
    PairChange,
    Pairs,
    PairText,
    Shift,
    WeightMovement,
)
from hymba_align.inspect_choices import Part

__all__ = [
    "Alignment",
    "Attention",
    "AttentionMap",
    "Branch",
    "BranchSize",
    "CacheCost",
    "Cost",
    "DecodeCost",
    "Divergence",
    "DomainAttention",
    "Finding",
    "Fusion",
    "Importance",
    "Inspection",
    "LayerAttention",
    "LayerFusion",
    "LayerImportance",
    "Measured",
    "MetaMovement",
    "MetaTokens",
    "PairChange",
    "PairText",
    "Pairs",
    "Preference",
    "Removal",
    "Shares",
    "Shift",
    "Transformer",
    "WeightMovement",
]

# ---- meta tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DomainAttention:
    """How much attention each meta token draws in texts of one domain."""

    domain: str
    source: str
    """The file, or what ships with the package"""
    documents: int
    tokens: int
    mass: tuple[float, ...]
    """(M,) share of attention, mean over layers, heads and text tokens, documents weighing alike"""
    stderr: tuple[float, ...] | None
    """(M,)"""
    by_layer: tuple[tuple[float, ...], ...]
    """(layers, M)"""
    share: tuple[float, ...]
    """(M,) part of the attention on meta tokens that each gets, documents weighing alike; adds up to 1"""
    unknown: float
    """Share of the tokens that are `<unk>`, or single bytes of a character that the tokenizer does not know"""
    characters_per_token: float
    """of the text; small where the tokenizer spells words in pieces"""


@dataclass(frozen=True)
class Preference:
    """A meta token that gets more of the attention on meta tokens in one domain than in the others, by more than chance."""

    token: int
    domain: str
    mass: float
    """of all attention"""
    elsewhere: float
    """mean over the other domains"""
    share: float
    """of the attention on meta tokens, which is what is compared: the rest falls with the length of texts"""
    share_elsewhere: float
    """mean over the other domains"""
    z: float
    """The difference of the shares in standard errors"""


@dataclass(frozen=True)
class MetaMovement:
    """How far training moved a meta token."""

    token: int
    distance: float
    """Norm of the difference"""
    relative: float
    """divided by the norm before"""
    cosine: float
    """between before and after"""


@dataclass(frozen=True)
class MetaTokens:
    """What meta tokens specialise in. Source: Hymba, meta tokens by domain."""

    domains: tuple[DomainAttention, ...]
    preferences: tuple[Preference, ...]
    """by domain, strongest first"""
    threshold_z: float | None
    """Above which a preference counts as one, corrected for the number of comparisons; None with fewer than two domains
    that have five documents; those that have fewer are not compared"""
    movement: tuple[MetaMovement, ...] | None
    """None without a checkpoint to compare with"""
    first_tokens: int
    """How many tokens of each text count, from its first: all domains are seen over the same distances from the meta tokens"""
    cut_by: str = ""
    """The domain whose median length that is; empty without domains"""


# ---- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheCost:
    """Bytes of the generation cache of one sequence at one length."""

    context: int
    """Text tokens"""
    formula: int
    keys_values: int
    """of `formula`, without convolution tails and SSM states, which do not grow with the text; a transformer has none"""
    measured: int | None
    """of the tensors that a cache holds; None where none was filled"""
    transformer_formula: int
    transformer_measured: int | None

    @property
    def ratio(self) -> float:
        """How many times smaller the checkpoint's is, by the formulas."""
        return self.transformer_formula / self.formula

    @property
    def keys_values_ratio(self) -> float:
        """The same of keys and values alone."""
        return self.transformer_formula / self.keys_values


@dataclass(frozen=True)
class DecodeCost:
    """Decoding at one context length: medians over rounds, both models in turn."""

    context: int
    """Text tokens that the last timed step sees"""
    tokens_per_second: float
    transformer_tokens_per_second: float
    ratio: float
    """Median of the rounds' ratios"""
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Transformer:
    """The model beside: Llama-3.2-3B's shape, or one as much smaller as the checkpoint is smaller than Hymba-1.5B."""

    name: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    is_published_shape: bool
    """Whether it is Llama-3.2-3B's own shape, beside which the paper's numbers stand"""


@dataclass(frozen=True)
class Cost:
    """What decoding takes, beside a transformer with random weights on the same machine."""

    dtype: str
    device: str
    threads: int
    batch_size: int
    rounds: int
    steps: int
    """Tokens decoded per round and sequence"""
    parameters: int
    transformer: Transformer
    cache: tuple[CacheCost, ...]
    decode: tuple[DecodeCost, ...]
    not_timed: str = ""
    """Contexts at which nothing was filled or timed, and why; empty where none is missing"""
    paper_cache_ratio: float = 11.67
    """Source: Hymba, abstract: Hymba-1.5B beside Llama-3.2-3B"""
    paper_throughput_ratio: float = 3.49


# ---- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A sentence that is true of these numbers."""

    part: Part
    text: str
    sign: bool = False
    """Whether it is a sign that something may be wrong"""


@dataclass(frozen=True)
class Inspection:
    """Everything."""

    checkpoint: str
    against: str | None
    created: str
    """UTC, ISO 8601"""
    data: str
    """What was read, in a line of words; below it one for each reason why rows are left out"""
    documents: int
    tokens: int
    shape: dict[str, int | str | bool]
    """Sizes of the model that a reader needs: layers, hidden size, heads, meta tokens, window, ..."""
    dtype: str
    device: str
    versions: dict[str, str]
    hardware: dict[str, int | float | str | None]
    seconds: dict[str, float]
    """of each part"""
    left_out: dict[str, str]
    """Parts that are not there, and why"""
    attention: Attention | None = None
    importance: tuple[Importance, ...] = ()
    fusion: Fusion | None = None
    meta_tokens: MetaTokens | None = None
    alignment: Alignment | None = None
    cost: Cost | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def attention_compared(self) -> Attention | None:
        """The checkpoint's attention, computed as that of the one it is compared with."""
        return (self.alignment.attention_after if self.alignment is not None else None) or self.attention
