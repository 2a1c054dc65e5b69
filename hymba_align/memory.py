"""How much memory a stage's training takes on one device, part by part, and which settings would take less.

Legend: D hidden size, I inner size, F width of the MLP, H query heads, G key/value heads, d and e their key and value
head sizes, N SSM state size, R rank of the step size, V vocabulary, M meta tokens, L layers, P parameters, A trained
parameters (P, or those of adapters of rank r), n processes.

Weights and gradients are P and A numbers, AdamW's two moments 2 A. Trained in bfloat16 beside float32 weights
(`bf16: true`), the weights are there once more in 2 bytes; DeepSpeed instead has them in 2 bytes, and in float32 as a part
of the optimizer's state. ZeRO-1 divides that state by n, ZeRO-2 the gradients too, ZeRO-3 the weights too; offload puts
state and weights into the host's memory. DDP keeps a second copy of the gradients in its buckets. ZeRO-1 and 2 gather
gradients in a bucket of up to 500,000,000 numbers, of which a copy is flattened to be sent; on a GPU there are two buckets,
whole from the start. ZeRO-3 keeps weights that it has put together for their next use, up to 1,000,000,000 numbers.

Activations are what autograd saves. A layer saves, per token (counted off its saved tensors):

    in_proj's output  H d + (G d + G e, unless it reuses keys and values) + 2 I      rotated queries and keys  D + G d
    five of width I   attention, convolution, step size, scan, their mean            five of width D  norms and residuals
    MLP               4 F: gate, its activation, up, their product                   x_proj, norms  2 R + 4 N
    scan              I N / 32: one state per chunk of 32 tokens                      statistics  2 H + 8

A frozen layer saves no input of its linear layers, of which 2 D + I + F + R are saved for nothing else; an adapter saves its
input again and r numbers, and with dropout a copy of the input and its noise. DoRA also saves what its layer and its
adapter gave, twice the layer's width, and makes weights of one layer at a time: an identity and three products.

With recomputation (`activation_checkpointing`) a layer saves its input (D) alone, and the layer that is at work all of
it. Keys and values that later layers reuse are kept to the backward pass, as copies of their own (G d + G e). In the
backward pass of a layer, gradients of its widest tensors are alive beside what it saved.

The head works on labelled positions in tiles of 4,096 by V: one at a time on a GPU, where a kernel overwrites it; several
float32 copies on a CPU. Its gradient of the weights is V D in float32, unless they are frozen.

Measured on the CPU (tests/test_memory.py: one process, adapters, pairs, DDP and ZeRO in two processes); what is said here
of GPUs, 16 bits, 4 bits, offload and FSDP2 follows from shapes and from the libraries' code, and was not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hymba_align.recipe_lora import LoraSection

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]

TILE = 4096  # positions of the head's tile. Source: TRL 1.16, kernels/chunked_logprob.py
TILE_COPIES_ON_CPU = 8  # float32 copies of a tile in its backward pass; observed in benchmarks/sft_memory.md
SCAN_CHUNK = 32
ALLOCATOR = 0.05  # of all parts: blocks that are free but too small, and gradients on their way; observed 4 to 12 %
ADAPTER_BYTES = 4  # adapters are float32, whatever the base is
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # with quantised scales. Source: arXiv 2305.14314, section 3
QUANTIZED = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
BUCKET = 500_000_000  # numbers. Source: DeepSpeed 0.19, runtime/zero/config.py, reduce_bucket_size
LIVE = 1_000_000_000  # numbers. Source: the same, max_live_parameters and max_reuse_distance
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
    lenders: int
    """Layers whose keys and values others reuse."""

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
            lenders=len({config.kv_source(layer) for layer in layers if config.kv_source(layer) != layer}),
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
    def linears(self) -> dict[str, tuple[int, float]]:
        """Inputs and outputs of a layer's linear layers by name; of in_proj the outputs are an average over layers."""
        keys = self.own_keys / self.layers * self.keys_and_values
        return {
            "in_proj": (self.hidden, self.heads * self.key_size + keys + 2 * self.inner),
            "out_proj": (self.inner, self.hidden),
            "x_proj": (self.inner, self.rank + 2 * self.state),
            "dt_proj": (self.rank, self.inner),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    @property
    def quantizable(self) -> int:
        """Numbers of the matrices that are kept in 4 bits."""
        return round(self.layers * sum(math.prod(self.linears[name]) for name in QUANTIZED))

    @property
    def saved_per_token(self) -> float:
        """Numbers that a layer saves per token, on average over layers, when all of it is trained."""
        projected = self.linears["in_proj"][1]
        rotated = self.hidden + self.own_keys / self.layers * self.groups * self.key_size
        small = 2 * self.rank + 4 * self.state + 2 * self.heads + 8 + self.inner * self.state / SCAN_CHUNK
        return projected + rotated + 5 * self.inner + 4 * self.hidden + 4 * self.mlp + small

    @property
    def working_per_token(self) -> float:
        """Numbers per token that a layer's backward pass needs beside what it saved: its widest gradients."""
        return max(3 * self.mlp + 2 * self.hidden, 5 * self.inner + 2 * self.hidden)


@dataclass(frozen=True)
class Adapters:
    """Adapters beside frozen weights.

    Args:
        rank: r.
        targets: linear layers that have one, by the names of `Shape.linears`.
        dora: whether they learn lengths apart from directions.
        dropout: whether their input is dropped out.
        frozen_bytes: of a number of the frozen weights.
        quantized: whether the large matrices are in 4 bits instead.
    """

    rank: int = 16
    targets: tuple[str, ...] = ("in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")
    dora: bool = False
    dropout: bool = False
    frozen_bytes: int = 4
    quantized: bool = False

    @classmethod
    def of(cls, section: LoraSection, *, frozen_bytes: int) -> Adapters:
        """Those of a recipe's section `lora`; targets that are no layer by themselves are left out."""
        named = {target.removesuffix(".0").rpartition(".")[2] for target in section.target_modules}
        return cls(
            rank=section.r,
            targets=tuple(name for name in cls.targets if name in named),
            dora=section.dora,
            dropout=section.dropout > 0,
            frozen_bytes=frozen_bytes,
            quantized=section.quantize is not None,
        )

    def parameters(self, shape: Shape) -> int:
        """A: of all adapters."""
        sizes = [shape.linears[target] for target in self.targets]
        each = sum(self.rank * (inputs + outputs) + self.dora * outputs for inputs, outputs in sizes)
        return round(shape.layers * each)

    def frozen(self, shape: Shape) -> float:
        """Bytes of the frozen weights."""
        quantized = shape.quantizable if self.quantized else 0
        return quantized * NF4_BYTES + (shape.parameters - quantized) * self.frozen_bytes

    def saved_per_token(self, shape: Shape) -> float:
        """Numbers that a layer saves per token; the inputs that only a trained weight or an adapter needs, by group."""
        inputs = {
            frozenset({"in_proj"}): shape.hidden,
            frozenset({"out_proj"}): shape.inner,
            frozenset({"gate_proj", "up_proj"}): shape.hidden,
            frozenset({"down_proj"}): shape.mlp,
            frozenset({"dt_proj"}): shape.rank,
        }
        needed = 0 if self.dropout else sum(size for names, size in inputs.items() if names & set(self.targets))
        saved = shape.saved_per_token - sum(inputs.values()) + needed + self.rank * len(self.targets)
        for target in self.targets:
            taken, given = shape.linears[target]
            saved += 2 * taken * self.dropout + 2 * given * self.dora
        return saved

    def working(self, shape: Shape, setting: Setting) -> float:
        """Bytes of weights that the layer at work makes: DoRA's products, copies in 16 bits, matrices out of 4 bits."""
        sizes = [shape.linears[target] for target in self.targets]
        made = 4 * max((taken**2 + 3 * taken * given for taken, given in sizes), default=0.0) if self.dora else 0.0
        if self.quantized:
            made += setting.compute_bytes * max(taken * given for taken, given in shape.linears.values())
        if setting.compute_bytes < self.frozen_bytes:
            # Autocast keeps copies of trained weights only; those of frozen ones are saved by each layer for its backward pass.
            layers = 1 if setting.checkpointing else shape.layers
            kept = shape.layer_parameters - self.quantized * shape.quantizable / shape.layers
            made += layers * kept * setting.compute_bytes
        return made


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
    adapters: Adapters | None = None
    """What is trained in place of all parameters."""

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed is the engine."""
        return self.engine.startswith("zero")


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device at the peak of a step, by part; `head` is what else is at work then: the head, or a layer."""

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

    @property
    def parts(self) -> dict[str, int]:
        """All parts by name, the allocator's last; they add up to the total."""
        return {**vars(self), "allocator": self.total - sum(vars(self).values())}

    def parts_in_words(self) -> str:
        """For people, in GiB and without what is nothing, e.g. `weights 5.7, gradients 5.7, allocator 0.57`."""
        return ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size)

    def line(self) -> str:
        """For people, e.g. `18.1 GiB: weights 5.7, gradients 5.7, optimizer 5.7, activations 0.10, allocator 0.86`."""
        return f"{gib(self.total)} GiB: {self.parts_in_words()}"


def gib(size: float) -> str:
    """Bytes in GiB, with two digits below one and one above."""
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """The most memory that a device holds while it trains; see the top of this file for the derivation."""
    tokens = setting.batch * setting.row_tokens + shape.meta_tokens
    adapters = setting.adapters
    saved = adapters.saved_per_token(shape) if adapters is not None else shape.saved_per_token
    saved *= setting.compute_bytes * tokens
    working = shape.working_per_token * setting.compute_bytes * tokens
    head = _head(shape, setting)
    if setting.checkpointing:
        activations, together = _recomputed(shape, setting.compute_bytes * tokens, saved, working, head)
    else:
        activations, together = shape.layers * saved, max(head, working)  # the head is done when the layers begin
    weights, gradients, optimizer = _weights(shape, setting), _gradients(shape, setting), _optimizer(shape, setting)
    at_end_only = setting.deepspeed and setting.accumulation == 1 and ZERO_STAGE[setting.engine] < 3
    if adapters is None and (at_end_only or (setting.engine == "single" and setting.accumulation == 1)):
        # Gradients come as activations go: the most is there at one end of the backward pass or at the other.
        first = shape.vocabulary * shape.hidden * setting.weight_bytes
        if gradients + saved + working > activations + together + (first if setting.engine == "single" else 0):
            activations, together = saved, working
        else:
            gradients = first
    references = setting.references * shape.parameters * _weight_bytes(setting)
    references //= setting.processes if ZERO_STAGE.get(setting.engine) == 3 else 1
    return Estimate(int(weights), int(gradients), int(optimizer), int(activations), int(together), int(references))


def _recomputed(shape: Shape, column: int, saved: float, working: float, head: float) -> tuple[float, float]:
    """Bytes kept between layers, and of what is at work where most is: in the forward pass, the head or a layer's backward.

    Args:
        column: bytes of one number per token.
    """
    projected = shape.heads * shape.key_size + shape.keys_and_values + 2 * shape.inner
    kept = (shape.layers * shape.hidden + shape.lenders * shape.keys_and_values) * column
    forward = column * max(4 * shape.mlp + 2 * shape.hidden, projected + 3 * shape.inner)
    if forward > max(head, saved + working):
        return kept, forward
    return (kept, head) if head > saved + working else (kept + saved, working)


def _trained(shape: Shape, setting: Setting) -> int:
    """A"""
    return shape.parameters if setting.adapters is None else setting.adapters.parameters(shape)


def _weight_bytes(setting: Setting) -> int:
    """Of a number of the weights, which DeepSpeed casts to what it computes in."""
    return setting.compute_bytes if setting.deepspeed else setting.weight_bytes


def _weights(shape: Shape, setting: Setting) -> float:
    """Bytes of all weights, and of copies to compute with."""
    adapters, n = setting.adapters, setting.processes
    each, computing = _weight_bytes(setting), setting.compute_bytes
    mixed = computing < each
    if adapters is None:
        whole = float(shape.parameters * (each + computing if mixed else each))
        made = 0.0
    else:
        whole = adapters.frozen(shape) + adapters.parameters(shape) * ADAPTER_BYTES
        made = adapters.working(shape, setting)
    if ZERO_STAGE.get(setting.engine) != 3:
        return whole + made
    if setting.engine == "fsdp2":
        together = shape.layer_parameters * computing
        return shape.parameters * each // n + together + made if adapters is None else whole / n + together + made
    kept = 0 if setting.engine == "zero3_offload" else whole / n
    return kept + min(shape.parameters, LIVE) * computing + made


def _gradients(shape: Shape, setting: Setting) -> float:
    """Bytes of gradients, and of what they are sent with."""
    trained, n = _trained(shape, setting), setting.processes
    each = ADAPTER_BYTES if setting.adapters is not None else _weight_bytes(setting)
    stage = ZERO_STAGE.get(setting.engine, 0)
    if stage == 3:
        return trained * each / n
    if stage == 0:
        return trained * each * (2 if setting.engine == "ddp" else 1)
    bucket = min(trained, BUCKET)
    staged = 4 if stage == 1 else each
    buckets = bucket * staged if setting.on_cpu else 2 * BUCKET * staged
    if stage == 1 and setting.accumulation > 1:
        rest = float((trained - bucket) * each)  # whole until the last micro-batch, and freed as they are sent
    else:
        rest = (trained - bucket * (setting.accumulation == 1)) * each / n
    return buckets + bucket * staged + rest


def _optimizer(shape: Shape, setting: Setting) -> float:
    """Bytes of the moments and, of DeepSpeed, of the float32 weights that it updates."""
    if setting.engine == "zero3_offload":
        return 0
    numbers = setting.moments + (1 if setting.deepspeed else 0)
    return _trained(shape, setting) * 4 * numbers / (setting.processes if setting.engine in ZERO_STAGE else 1)


def _head(shape: Shape, setting: Setting) -> float:
    """Bytes of the language-model head's work: tiles of logits, and gradients of its input and weights."""
    positions = setting.labelled * setting.batch * setting.row_tokens
    tile = min(positions, TILE) * shape.vocabulary
    tiles = tile * 4 * TILE_COPIES_ON_CPU if setting.on_cpu else tile * setting.compute_bytes
    of_weights = 4 * shape.vocabulary * shape.hidden if setting.adapters is None else 0
    return tiles + of_weights + positions * shape.hidden * (4 + setting.compute_bytes)
