"""Packed training rows whose meta tokens run once, beside the straightforward exact way: once per document.

Both sides are this project's model on the same packed rows of GSM8K conversations, exact for every document, forward and
backward to all weights, through the same kernels. The straightforward way puts a copy of the meta tokens in front of
every document, as its own first tokens, and shares nothing: exact too, and all that a packer can do that knows no tree.

    python benchmarks/exact_packing.py [--output benchmarks/exact_packing.md] [--gsm8k FOLDER]

Stops where losses or gradients of the two differ. Exits with 1 when the wanted ratio is missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gsm8k_training import Conversations, build_hymba, describe, load_conversations, options
from measure import Table, alternate, finish, median_ratio
from torch import Tensor

from hymba_align.data.packing import add_labels, pack
from hymba_align.model import HymbaForCausalLM, SegmentTree
from hymba_align.model.kernels.choice import choose_kernels
from hymba_align.model.plan import ForwardPlan, rotary_angles

CONVERSATIONS = 500
ROW_TOKENS = (2048, 8192)  # the published blocks
WANTED = 1.5
LOSS_WITHIN = 2e-6  # float32
GRADIENTS_WITHIN = 1e-4  # of the largest entry of each


@dataclass(frozen=True)
class Row:
    """One packed row: its tokens, what is trained, and its documents."""

    input_ids: Tensor
    """(1, T)"""
    labels: Tensor
    """(1, T)"""
    lengths: list[int]


def pack_row(conversations: Conversations, tokens: int) -> Row:
    """Of the rows that packing makes of the conversations, the one in the middle by its number of documents."""
    rows = sorted(pack(add_labels(conversations.dataset), tokens), key=lambda row: len(row["seq_lengths"]))
    middle = rows[len(rows) // 2]
    ids, labels = torch.tensor([middle["input_ids"]]), torch.tensor([middle["labels"]])
    return Row(ids, labels, middle["seq_lengths"])


def loss_of_tree(model: HymbaForCausalLM, row: Row) -> Tensor:
    """The mean loss as the model computes it: meta tokens once, documents as their children."""
    tree = SegmentTree.from_lengths(torch.tensor(row.lengths))
    return model(input_ids=row.input_ids, labels=row.labels, segments=tree, return_logits=False).loss


def loss_of_copies(model: HymbaForCausalLM, row: Row) -> Tensor:
    """The same loss from independent documents, each of which starts with the meta tokens.

    No document may reach beyond the window: then plain causal attention per document is exact, as fast as it can be.
    """
    config = model.config
    meta = config.num_memory_tokens
    lengths = [meta + length for length in row.lengths]
    if max(lengths) > config.sliding_window:
        raise ValueError(f"a document of {max(lengths) - meta} tokens leaves the window of {config.sliding_window}")
    roots = [-1] * len(lengths)
    cpu, kernels = torch.device("cpu"), choose_kernels(torch.device("cpu"), torch.float32)
    cos, sin = rotary_angles(config, torch.cat([torch.arange(length) for length in lengths]))
    plan = ForwardPlan(
        meta_tokens=0,
        cos_L1d=cos[:, None],
        sin_L1d=sin[:, None],
        conv=kernels.conv_row.build(lengths, roots, roots, config.mamba_d_conv, cpu),
        scan=kernels.scan_row.build(lengths, roots, roots, cpu),
        attention=kernels.attention_row.build(lengths, roots, config.sliding_window, cpu),
    )
    documents = model.model.embed_tokens(row.input_ids[0]).split(row.lengths)
    x_LD = torch.cat([part for document in documents for part in (model.model.memory_tokens, document)])
    x_LD, _ = model.model._run_layers(x_LD, plan, None, None)
    x_LD = model.model.final_layernorm(x_LD)
    labels = torch.cat(
        [torch.cat([torch.full((meta + 1,), -100), each[1:]]) for each in row.labels[0].split(row.lengths)]
    )
    predicting = (labels[1:] != -100).nonzero().flatten()
    targets = labels[predicting + 1]
    return model._summed_loss(x_LD[predicting], targets) / len(targets)


def check_equal(model: HymbaForCausalLM, row: Row) -> None:
    """Stops unless both ways give the same loss and the same gradients."""
    losses, gradients = [], []
    for loss_of in (loss_of_tree, loss_of_copies):
        model.zero_grad()
        loss = loss_of(model, row)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    if abs(losses[0] - losses[1]) > LOSS_WITHIN:
        raise SystemExit(f"losses differ: {losses}")
    for name, gradient in gradients[0].items():
        error = float((gradients[1][name] - gradient).abs().max() / gradient.abs().max())
        if error > GRADIENTS_WITHIN:
            raise SystemExit(f"gradients of {name} differ by {error:.1e}")


def compare(model: HymbaForCausalLM, row: Row, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a forward and backward pass: one meta prefix per document, and one per row."""

    def step(loss_of: Callable[[HymbaForCausalLM, Row], Tensor]) -> None:
        model.zero_grad()
        loss_of(model, row).backward()

    check_equal(model, row)
    sides = {"copies": lambda: step(loss_of_copies), "tree": lambda: step(loss_of_tree)}
    seconds = alternate(sides, rounds=rounds)
    return seconds["copies"], seconds["tree"]


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    conversations = load_conversations(arguments.gsm8k, CONVERSATIONS)
    model = build_hymba(len(conversations.tokenizer)).train()
    table = Table(
        "Exact packing: meta tokens once per row",
        "python benchmarks/exact_packing.py",
        (
            "row",
            "its documents",
            "tokens, once per document",
            "tokens, once per row",
            "ratio",
            "once per document, s",
            "once per row, s",
            "times faster",
            "wanted",
        ),
        f"Packed rows of {conversations.origin}, 128 meta tokens, 10 million parameters, float32, loss of labelled "
        "positions, forward and backward. Losses and all gradients agree. Medians; ratios are medians over the rounds. The "
        "gain is bounded by the ratio of the tokens, for the head and attention to the meta keys are needed in both ways; a "
        "row of 2,048 cannot reach the goal with conversations of this length.",
    )
    missed, meta = [], model.config.num_memory_tokens
    for tokens in ROW_TOKENS:
        row = pack_row(conversations, tokens)
        slow, fast = compare(model, row, arguments.rounds)
        faster = median_ratio(slow, fast)
        apart, together = sum(row.lengths) + meta * len(row.lengths), sum(row.lengths) + meta
        table.add(
            f"{tokens:,}",
            describe(row.lengths),
            f"{apart:,}",
            f"{together:,}",
            f"{apart / together:.2f}",
            f"{statistics.median(slow):.2f}",
            f"{statistics.median(fast):.2f}",
            f"{faster:.2f}",
            f">= {WANTED}",
        )
        if faster < WANTED:
            missed.append(f"row of {tokens:,}: {faster:.2f}, wanted >= {WANTED}")
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
