"""How much memory a stage's training takes on one device, part by part, and which settings would take less.

Legend: D hidden size, I inner size, F width of the MLP, H query heads, G key/value heads, d and e their key and value
head sizes, N SSM state size, R rank of the step size, V vocabulary, M meta tokens, L layers, P parameters, n processes.

Weights, gradients and AdamW's two moments are P numbers each. Trained in bfloat16 beside float32 weights (`bf16: true`),
the weights are there once more in 2 bytes. ZeRO-1 divides the optimizer's state by n, ZeRO-2 the gradients too, ZeRO-3
the weights too (those of the layer at work are whole); offload puts the optimizer's state, and float32 weights where
training is in 16 bits, into the host's memory. DDP keeps a second copy of the gradients in its buckets.

Activations are what autograd saves. A layer saves, per token (counted off its saved tensors):

    in_proj's output  H d + (G d + G e, unless it reuses keys and values) + 2 I      rotated queries and keys  D + G d
    five of width I   attention, convolution, step size, scan, their mean            five of width D  norms and residuals
    MLP               4 F: gate, its activation, up, their product                   x_proj, norms  2 R + 4 N
    scan              I N / 32: one state per chunk of 32 tokens                      statistics  2 H + 8

With recomputation (`activation_checkpointing`) a layer saves its input (D) alone, and the layer that is at work all of
it. In the backward pass of a layer, gradients of its widest tensors are alive beside what it saved.

The head works on labelled positions in tiles of 4,096 by V: one at a time on a GPU, where a kernel overwrites it; several
float32 copies on a CPU. Its gradient of the weights is V D in float32.

Measured on the CPU (tests/test_memory.py); what is said here of GPUs and 16 bits follows from shapes and was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]

TILE = 4096  # positions of the head's tile. Source: TRL 1.16, kernels/chunked_logprob.py
TILE_COPIES_ON_CPU = 8  # float32 copies of a tile in its backward pass; observed in benchmarks/sft_memory.md
SCAN_CHUNK = 32
ALLOCATOR = 0.05  # of all parts: blocks that are free but too small, and gradients on their way; observed 4 to 12 %
ZERO_STAGE: dict[Engine, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "fsdp2": 3}


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as HymbaConfig has them."""

    hidden: int
    inner: int
    mlp: int
    layers: int
    heads: int
    groups: int
    key_size: int
    value_size: int
    state: int
    rank: int
    taps: int
    vocabulary: int
    meta_tokens: int
    own_keys: int
    """Layers with keys and values of their own."""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a HymbaConfig."""
        layers = range(config.num_hidden_layers)
        return cls(
            hidden=config.hidden_size,
            inner=config.inner_size,
            mlp=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            key_size=config.head_dim,
            value_size=config.v_head_dim,
            state=config.mamba_d_state,
            rank=config.mamba_dt_rank,
            taps=config.mamba_d_conv,
            vocabulary=config.vocab_size,
            meta_tokens=config.num_memory_tokens,
            own_keys=sum(config.kv_source(layer) == layer for layer in layers),
        )

    @property
    def keys_and_values(self) -> int:
        """Numbers per token of a layer's keys and values."""
        return self.groups * (self.key_size + self.value_size)

    @property
    def layer_parameters(self) -> int:
        """Of a layer with keys and values of its own."""
        D, inner, N, R = self.hidden, self.inner, self.state, self.rank
        mixer = D * (self.heads * self.key_size + self.keys_and_values + 2 * inner)
        scan = inner * (self.taps + 1) + inner * (R + 2 * N) + R * inner + inner + inner * N + inner + R + 2 * N
        return mixer + scan + 2 * inner + inner * D + 3 * D * self.mlp + 2 * D

    @property
    def parameters(self) -> int:
        """P; the head is tied to the embeddings."""
        reused = (self.layers - self.own_keys) * self.hidden * self.keys_and_values
        whole = self.layers * self.layer_parameters - reused
        return whole + (self.vocabulary + self.meta_tokens + 1) * self.hidden

    @property
    def saved_per_token(self) -> float:
        """Numbers that a layer saves per token, on average over layers."""
        keys = self.own_keys / self.layers * self.keys_and_values
        projected = self.heads * self.key_size + keys + 2 * self.inner
        rotated = self.hidden + self.own_keys / self.layers * self.groups * self.key_size
        small = 2 * self.rank + 4 * self.state + 2 * self.heads + 8 + self.inner * self.state / SCAN_CHUNK
        return projected + rotated + 5 * self.inner + 4 * self.hidden + 4 * self.mlp + small

    @property
    def working_per_token(self) -> float:
        """Numbers per token that a layer's backward pass needs beside what it saved: its widest gradients."""
        return max(3 * self.mlp + 2 * self.hidden, 5 * self.inner + 2 * self.hidden)


@dataclass(frozen=True)
class Setting:
    """What of a stage's settings decides about memory.

    Args:
        batch: rows of a micro-batch; of DPO, pairs, or rows of pairs where `row_tokens` is set.
        row_tokens: text tokens of a row, or of a pair (both answers, and the prompt once or twice).
        labelled: share of the tokens that are trained on; 1 is the most that can be.
        accumulation: micro-batches of a step.
        references: further models in memory (DPO without `precompute_ref_log_probs`).
        weight_bytes: of a number of the weights that the optimizer updates.
        compute_bytes: of a number while computing: 2 with bf16 or fp16.
        moments: numbers that the optimizer keeps per parameter.
        on_cpu: whether this is a CPU, whose head keeps copies of its tile.
        pairs: whether a row is a pair of full length on both sides.
        rows_of_pairs: whether a row holds several pairs, up to `row_tokens`.
    """

    batch: int
    row_tokens: int
    labelled: float = 1.0
    accumulation: int = 1
    references: int = 0
    weight_bytes: int = 4
    compute_bytes: int = 4
    moments: int = 2
    checkpointing: bool = False
    engine: Engine = "single"
    processes: int = 1
    on_cpu: bool = False
    pairs: bool = False
    rows_of_pairs: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device at the peak of a step, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    reference: int

    @property
    def total(self) -> int:
        """All parts, and what the allocator needs beside them."""
        return int((1 + ALLOCATOR) * sum(vars(self).values()))

    def line(self) -> str:
        """For people, e.g. `17.2 GiB: weights 5.7, gradients 5.7, optimizer 5.7, activations 0.1`."""
        parts = [f"{name} {gib(size)}" for name, size in vars(self).items() if size]
        return f"{gib(self.total)} GiB: {', '.join(parts)}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """The most memory that a device holds while it trains; see the top of this file for the derivation."""
    P, n = shape.parameters, setting.processes
    stage = ZERO_STAGE.get(setting.engine, 0)
    tokens = setting.batch * setting.row_tokens + shape.meta_tokens
    mixed = setting.compute_bytes < setting.weight_bytes
    offload = setting.engine == "zero3_offload"

    weights = P * setting.weight_bytes
    if stage == 3:
        weights = (0 if offload and mixed else weights // n) + shape.layer_parameters * setting.compute_bytes
    if mixed:
        weights += P * setting.compute_bytes // (n if stage == 3 else 1)
    gradients = P * (setting.compute_bytes if stage and mixed else setting.weight_bytes)
    if stage >= 2:
        gradients //= n
    elif setting.engine == "ddp":
        gradients *= 2
    optimizer = 0 if offload else P * 4 * setting.moments // (n if stage else 1)

    saved = shape.saved_per_token * setting.compute_bytes * tokens
    if setting.checkpointing:
        inputs = shape.hidden + (shape.layers - shape.own_keys) / shape.layers * shape.keys_and_values
        activations = shape.layers * inputs * setting.compute_bytes * tokens + saved
    else:
        activations = shape.layers * saved
    working = shape.working_per_token * setting.compute_bytes * tokens
    head = _head(shape, setting)
    together = max(head, working)  # the head is done when the layers' backward pass begins
    if setting.accumulation == 1 and setting.engine == "single":
        # Gradients come as activations go: the most is there at one end of the backward pass or at the other.
        at_start, at_end = activations + together, gradients + saved + working
        if at_end > at_start:
            activations, together = saved, working
        else:
            gradients = shape.vocabulary * shape.hidden * setting.weight_bytes
    references = setting.references * P * setting.compute_bytes // (n if stage == 3 else 1)
    return Estimate(weights, gradients, optimizer, int(activations), int(together), references)


def _head(shape: Shape, setting: Setting) -> float:
    """Bytes of the language-model head's work: tiles of logits, and gradients of its input and weights."""
    positions = setting.labelled * setting.batch * setting.row_tokens
    tile = min(positions, TILE) * shape.vocabulary
    tiles = tile * 4 * TILE_COPIES_ON_CPU if setting.on_cpu else tile * setting.compute_bytes
    return tiles + 4 * shape.vocabulary * shape.hidden + positions * shape.hidden * (4 + setting.compute_bytes)
