"""A step of supervised fine-tuning on the CPU, beside the nearest architectures in transformers.

Each side is TRL's SFTTrainer with its own `training_step`, then clipping and AdamW, on the same conversations with the
same tokens trained. hymba-align packs them into a row and gives logits to labelled positions; the others are padded, as
stock TRL does it, because Jamba and Falcon-H1 leak state across packed documents or refuse them. The sides alternate.

    python benchmarks/sft_step.py [--output benchmarks/sft_step.md] [--gsm8k FOLDER]

A step of Jamba takes about half a minute. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gsm8k_training import (
    Conversations,
    batch_of,
    build_falcon,
    build_hymba,
    build_jamba,
    describe,
    labels_in,
    load_conversations,
    options,
    parameters_of,
    shares_of_time,
    trainer_of,
    training_step,
)
from measure import Table, alternate, finish, median_ratio
from trl import SFTTrainer

from hymba_align.train.sft import HymbaSFTTrainer, training_rows

JAMBA = "Jamba without experts, padded"
PEERS = {
    JAMBA: build_jamba,
    "Falcon-H1, padded": build_falcon,
}
OURS = "hymba-align, packed"
EVERY_LOGIT = "hymba-align, packed, logits of every position"
COMPARISONS = (
    # peer, conversations per step (8 is TRL's default), wanted ratio
    (JAMBA, 8, 15.0),
    ("Falcon-H1, padded", 8, 1.0),
    ("Falcon-H1, padded", 16, 1.0),
    (EVERY_LOGIT, 8, None),
)
SAME_SIZE = 0.02


@dataclass(frozen=True)
class Side:
    """What is timed of one model."""

    step: Callable[[], float]
    parameters: int
    trained: int
    """Trained tokens per step."""
    shape: tuple[int, int]
    """The batch's rows and columns."""


def build_side(name: str, conversations: Conversations) -> Side:
    """A trainer on its first batch, which holds all of the conversations."""
    packing = name in (OURS, EVERY_LOGIT)
    vocabulary = len(conversations.tokenizer)
    model = build_hymba(vocabulary) if packing else PEERS[name](vocabulary)
    length = sum(conversations.lengths)
    trainer = trainer_of(
        HymbaSFTTrainer if name == OURS else SFTTrainer,
        model,
        training_rows(conversations.dataset, max_length=length, packing=packing),
        conversations,
        packing=packing,
        max_length=length,
    )
    batch = batch_of(trainer)
    return Side(training_step(trainer, batch), parameters_of(model), labels_in(batch), tuple(batch["input_ids"].shape))


def compare(peer: str, conversations: Conversations, rounds: int) -> tuple[dict[str, Side], dict[str, list[float]]]:
    """Both sides and their seconds per step; stops where sizes or trained tokens differ, or a loss does not fall."""
    sides = {name: build_side(name, conversations) for name in (OURS, peer)}
    ours, theirs = sides.values()
    if abs(ours.parameters / theirs.parameters - 1) > SAME_SIZE:
        raise SystemExit(f"{peer} has {theirs.parameters:,} parameters, hymba-align {ours.parameters:,}")
    if ours.trained != theirs.trained:
        raise SystemExit(f"{peer} trains {theirs.trained} tokens per step, hymba-align {ours.trained}")
    losses: dict[str, list[float]] = {name: [] for name in sides}
    steps = {name: lambda name=name: losses[name].append(sides[name].step()) for name in sides}
    if peer == JAMBA:  # half a minute each: its first step is not set apart, the median of five leaves it out
        steps[OURS]()
    seconds = alternate(steps, rounds=rounds, warmup=int(peer != JAMBA))
    for name, seen in losses.items():
        if not seen[-1] < seen[0]:
            raise SystemExit(f"the loss of {name} went from {seen[0]} to {seen[-1]}")
    if peer == EVERY_LOGIT and abs(losses[OURS][0] - losses[peer][0]) > 1e-5:
        raise SystemExit(f"losses differ: {losses[OURS][0]} and {losses[peer][0]}")
    return sides, seconds


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(
        "Step of supervised fine-tuning, CPU",
        "python benchmarks/sft_step.py",
        ("beside", "parameters", "conversations", "its rows", "trained tokens per s", "ours", "times faster", "wanted"),
        [],
    )
    notes, missed, sets = [], [], {}
    for peer, count, wanted in COMPARISONS:
        if count not in sets:
            sets[count] = load_conversations(arguments.gsm8k, count)
        conversations = sets[count]
        sides, seconds = compare(peer, conversations, arguments.rounds)
        ours, theirs = sides.values()
        faster = median_ratio(seconds[peer], seconds[OURS])
        rates = [side.trained / statistics.median(seconds[name]) for name, side in sides.items()]
        rows, columns = theirs.shape
        table.add(
            peer,
            f"{theirs.parameters / 1e6:.2f} M (ours {ours.parameters / 1e6:.2f} M)",
            count,
            f"{rows} x {columns}",
            f"{rates[1]:,.1f}",
            f"{rates[0]:,.1f}",
            f"{faster:.2f}",
            "" if wanted is None else f"> {wanted:g}",
        )
        if wanted is not None and not faster > wanted:
            missed.append(f"{peer}, {count} conversations: {faster:.2f}, wanted > {wanted:g}")
        if peer != JAMBA:  # one operator after another for every token: too many to profile
            notes.append(f"Time of a step, {peer}, {count} conversations: {_shares(theirs)}.")
        if (peer, count) == COMPARISONS[1][:2]:
            notes.insert(0, f"Time of a step of ours, {count} conversations: {_shares(ours)}.")
    table.notes = [_about(sets), *notes]
    finish(table, arguments.output, missed)


def _shares(side: Side) -> str:
    shares = shares_of_time(side.step)
    return ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items() if share >= 0.01)


def _about(sets: dict[int, Conversations]) -> str:
    described = "; ".join(f"{each.origin}: {describe(each.lengths)}" for each in sets.values())
    return (
        f"{described}. Float32, random weights, vocabulary {len(next(iter(sets.values())).tokenizer):,}. TRL's SFTTrainer on "
        "every side: loss, gradients, clipping, AdamW; a step takes all conversations, one padded batch of theirs, one "
        "packed row of ours, with 128 meta tokens in front. Medians; ratios are medians over the rounds."
    )


if __name__ == "__main__":
    main()
