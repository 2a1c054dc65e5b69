"""What an inspection measured, as inspect.json holds it.

Every part may be None: not asked for, or not possible with what was given. Losses, entropies and divergences are in
nats. `stderr` is the standard error of a mean over documents (or answers, or pairs); None with fewer than two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hymba_align.inspect_choices import Part

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


# ---- alignment -------------------------------------------------------------------------------------------------------


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
    """What was read, in words"""
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
