"""Cost as work grows: time per token of a training step on rows of 1k to 32k tokens.

    python benchmarks/row_length.py [--output benchmarks/row_length.md]

First, rows of ever more documents of the same lengths: the time per token must not grow with the row. Second, one
document that fills the row: there the attention of global layers grows with the document, as it must, so their time is
shown apart and that of everything else must not grow. Forward and backward, activations recomputed per layer in every
case, float32. Exits with 1 when the dearest row costs more than 1.3 times the cheapest per token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import Table, add_options, alternate, finish
from torch import Tensor, nn

from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree

WANTED_SPREAD = 1.3
ROWS = (1024, 4096, 32768)
DOCUMENTS = (128, 256, 640)  # tokens; together the shortest row, so that every row holds the same lengths
VOCABULARY = 4096


def build_model(layers: int = 8, global_layers: Sequence[int] = (0, 4, 7), hidden: int = 256) -> HymbaForCausalLM:
    """A model in training mode that recomputes activations; by default of about 10 M parameters."""
    torch.manual_seed(0)
    heads = hidden // 32
    config = HymbaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        v_head_dim=64,
        mamba_dt_rank=16,
        sliding_window=256,
        global_attn_idx=list(global_layers),
        kv_reuse_group=[[1, 2], [5, 6]] if layers == 8 else [],
        max_position_embeddings=ROWS[-1],
    )
    model: HymbaForCausalLM = HymbaForCausalLM(config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_row(tokens: int, documents: Sequence[int]) -> tuple[Tensor, SegmentTree]:
    """Token ids (1, T) and documents of a row: the same documents over and over.

    Args:
        tokens: T.
        documents: tokens of each document until they repeat; their sum divides T.
    """
    again, rest = divmod(tokens, sum(documents))
    assert not rest, f"documents of {sum(documents)} tokens do not fill a row of {tokens}"
    ids = torch.randint(0, VOCABULARY, (1, sum(documents)), generator=torch.Generator().manual_seed(1))
    return ids.repeat(1, again), SegmentTree.from_lengths([*documents] * again)


def train_step(model: HymbaForCausalLM, ids: Tensor, tree: SegmentTree) -> float:
    """Loss of one forward and backward pass."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, segments=tree).loss
    loss.backward()
    return float(loss.detach())


# ---- many documents --------------------------------------------------------------------------------------------------


def packed_costs(
    model: HymbaForCausalLM, rows: Sequence[int], documents: Sequence[int] = DOCUMENTS, *, rounds: int = 5
) -> dict[int, list[float]]:
    """Seconds per token of a training step, by tokens per row.

    Stops if rows of the same documents have different losses, because then they did not compute the same.
    """
    made = {tokens: make_row(tokens, documents) for tokens in rows}
    losses = torch.tensor([train_step(model, *row) for row in made.values()])
    torch.testing.assert_close(losses, losses[:1].expand_as(losses), atol=1e-4, rtol=0)  # float32, observed 2e-6
    sides = {str(tokens): partial(train_step, model, *row) for tokens, row in made.items()}
    seconds = alternate(sides, rounds=rounds, warmup=0)  # the check above was the warm-up
    return {tokens: [second / tokens for second in seconds[str(tokens)]] for tokens in rows}


def spread(costs: dict[int, list[float]]) -> float:
    """How many times dearer the dearest row is than the cheapest, by medians per token."""
    medians = [statistics.median(values) for values in costs.values()]
    return max(medians) / min(medians)


# ---- one document, global layers apart -------------------------------------------------------------------------------


@dataclass
class LayerTimer:
    """Seconds that some layers of a model take in a training step, forward and backward.

    A layer's backward pass lasts from when the gradient of its output is complete until that of its input is; the
    recomputation of its activations falls in between.
    """

    layers: Sequence[nn.Module]
    is_timed: Callable[[int], bool]
    """Whether the layer of this index counts."""
    seconds: float = 0.0
    _handles: list[Any] = field(default_factory=list)
    _started: float = 0.0
    _forward: bool = True

    def __enter__(self) -> LayerTimer:
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_pre_hook(lambda _, inputs, i=index: self._before(i, inputs[0])))
            self._handles.append(layer.register_forward_hook(lambda _, inputs, out, i=index: self._after(i, out[0])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: int, x: Tensor) -> None:
        if not self._forward:  # the recomputation inside a backward pass, which is timed as a whole
            return
        if layer == 0:
            x.register_hook(lambda _: self._gradient_ready(0))
        self._started = time.perf_counter()

    def _after(self, layer: int, x: Tensor) -> None:
        if not self._forward:
            return
        if self.is_timed(layer):
            self.seconds += time.perf_counter() - self._started
        x.register_hook(lambda _: self._gradient_ready(layer + 1))

    def _gradient_ready(self, boundary: int) -> None:
        """The gradient between layers `boundary - 1` and `boundary` is complete."""
        now = time.perf_counter()
        self._forward = False
        if boundary < len(self.layers) and self.is_timed(boundary):
            self.seconds += now - self._started
        self._started = now


@dataclass(frozen=True)
class Split:
    """Seconds per token of one training step."""

    in_global_layers: float
    elsewhere: float


def split_step(model: HymbaForCausalLM, ids: Tensor, tree: SegmentTree) -> Split:
    """Where the time of one step goes."""
    with LayerTimer(list(model.model.layers), model.config.is_global) as timer:
        start = time.perf_counter()
        train_step(model, ids, tree)
        total = time.perf_counter() - start
    return Split(timer.seconds / ids.numel(), (total - timer.seconds) / ids.numel())


def document_costs(model: HymbaForCausalLM, rows: Sequence[int], *, rounds: int = 5) -> dict[int, list[Split]]:
    """Time of steps on one document that fills the row, by tokens per row; rows take turns within each round."""
    made = {tokens: make_row(tokens, [tokens]) for tokens in rows}
    for ids, tree in list(made.values())[:2]:
        train_step(model, ids, tree)
    splits: dict[int, list[Split]] = {tokens: [] for tokens in rows}
    for turn in range(rounds):
        for tokens in reversed(rows) if turn % 2 else rows:
            splits[tokens].append(split_step(model, *made[tokens]))
    return splits


# ---- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens per row, multiples of 1,024")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Half the layers and one global one: what is asked is how they grow, and three at 32k would take half an hour.
    model = build_model(4, [0])
    packed = packed_costs(model, arguments.rows, rounds=arguments.rounds)
    splits = document_costs(model, arguments.rows, rounds=arguments.rounds)
    elsewhere = {tokens: [split.elsewhere for split in values] for tokens, values in splits.items()}
    in_global = {tokens: [split.in_global_layers for split in values] for tokens, values in splits.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    table = Table(
        "Cost as work grows: tokens per row",
        "python benchmarks/row_length.py",
        ["row", *(f"{tokens:,}" for tokens in arguments.rows), "dearest / cheapest", "wanted"],
        f"Microseconds per token of a training step (forward and backward, activations recomputed per layer) of a model "
        f"of {parameters:.1f} M parameters with a global and 3 local layers, a window of 256 and 128 meta tokens, "
        f"float32. Medians of {arguments.rounds} rounds in one process. Documents of {', '.join(map(str, DOCUMENTS))} "
        "tokens, as often as the row holds them, behind one run of the meta tokens; all rows have the same mean loss. Then "
        "one document that fills the row: the attention of a global layer grows with a document by its nature, so that "
        "layer is timed apart.",
    )
    wanted = f"≤ {WANTED_SPREAD}"
    for name, costs, goal in (
        ("documents of the same lengths", packed, wanted),
        ("one document: all but the global layer", elsewhere, wanted),
        ("one document: the global layer", in_global, "–"),
    ):
        medians = [f"{1e6 * statistics.median(values):.0f}" for values in costs.values()]
        table.add(name, *medians, f"{spread(costs):.2f}", goal)
    missed = [
        f"{name}: {spread(costs):.2f} between the cheapest and the dearest row, wanted {WANTED_SPREAD}"
        for name, costs in (("documents of the same lengths", packed), ("one document, global layer apart", elsewhere))
        if spread(costs) > WANTED_SPREAD
    ]
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
