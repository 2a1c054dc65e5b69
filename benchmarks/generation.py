"""Generation on the CPU: batched with refilled slots, beside the same model one sequence at a time.

    python benchmarks/generation.py [--output benchmarks/generation.md]

One sequence at a time is what the released code allows. Both sides are `decode`, greedy and in float32, so both run the
meta tokens once for all prompts and carry the same cache; the tokens they generate are compared before anything is
timed. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Table, add_options, alternate, finish, median_ratio

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.decoding import Decoded, decode

WANTED = 6
NEW_TOKENS = 128


@dataclass(frozen=True)
class Work:
    """Prompts with the number of new tokens of each."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def total(self) -> int:
        return sum(self.new_tokens)


def build_model(hidden_size: int = 256, layers: int = 8) -> HymbaForCausalLM:
    """About 10 million parameters at the default size, random weights."""
    torch.manual_seed(0)
    return HymbaForCausalLM(
        HymbaConfig(
            vocab_size=4096,
            hidden_size=hidden_size,
            intermediate_size=11 * hidden_size // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            v_head_dim=hidden_size // 4,
            mamba_dt_rank=16,
            sliding_window=256,
            global_attn_idx=[0, layers // 2, layers - 1],
            kv_reuse_group=[[1, 2], [5, 6]] if layers == 8 else [],
            max_position_embeddings=2048,
        )
    ).eval()


def mixed_work(prompts: int, shortest: int, longest: int, *, varied: bool, new_tokens: int = NEW_TOKENS) -> Work:
    """Random prompts of `shortest` to `longest` tokens; with `varied`, an eighth of `new_tokens` up to all of them."""
    generator = random.Random(0)
    return Work(
        [[generator.randrange(4096) for _ in range(generator.randint(shortest, longest))] for _ in range(prompts)],
        [generator.randint(new_tokens // 8, new_tokens) if varied else new_tokens for _ in range(prompts)],
    )


def refilled(model: HymbaForCausalLM, work: Work, batch_size: int) -> list[Decoded]:
    """All prompts through so many slots."""
    return decode(model, work.prompts, max_new_tokens=work.new_tokens, batch_size=batch_size)


def in_groups(model: HymbaForCausalLM, work: Work, size: int) -> list[Decoded]:
    """Groups of so many prompts, each of which waits for its longest answer."""
    answers = []
    for first in range(0, len(work.prompts), size):
        group = slice(first, first + size)
        answers += decode(model, work.prompts[group], max_new_tokens=work.new_tokens[group], batch_size=size)
    return answers


def compare(sides: dict[str, Callable[[], list[Decoded]]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round of each side, after a first call of each that must give the same tokens."""
    answers = {name: side() for name, side in sides.items()}
    expected = next(iter(answers.values()))
    for name, found in answers.items():
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one.tokens != other.tokens:
                raise SystemExit(f"{name!r} generates other tokens for prompt {number} than {next(iter(sides))!r}")
    return alternate(sides, rounds=rounds, warmup=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build_model()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    table = Table(
        "Generation on the CPU",
        "python benchmarks/generation.py",
        ("work", "batch 1, tokens/s", "side", "tokens/s", "times faster", "wanted"),
        f"{millions:.1f} million parameters, random weights, float32, greedy; prompts of 16 to 256 random tokens. Tokens per "
        "second count new tokens; time includes the prompts. Text is identical on all sides. The baseline is `decode` "
        "with a batch of 1, which already runs the meta tokens once for all prompts.",
    )
    missed = []
    whole = mixed_work(32, 16, 256, varied=False)
    varied = mixed_work(64, 16, 256, varied=True)
    works = [
        (f"32 prompts, {NEW_TOKENS} new tokens each", whole, {"batch 32": lambda: refilled(model, whole, 32)}),
        (
            f"64 prompts, {NEW_TOKENS // 8} to {NEW_TOKENS} new tokens",
            varied,
            {
                "batch 8, refilled": lambda: refilled(model, varied, 8),
                "batch 8, in groups": lambda: in_groups(model, varied, 8),
            },
        ),
    ]
    for name, work, sides in works:
        single = {"batch 1": lambda work=work: refilled(model, work, 1)}
        seconds = compare(single | sides, arguments.rounds)
        slow = seconds.pop("batch 1")
        for side, fast in seconds.items():
            ratio = median_ratio(slow, fast)
            wanted = f"≥ {WANTED}" if side == "batch 32" else ""
            if wanted and ratio < WANTED:
                missed.append(f"{ratio:.1f} times the tokens per second of batch 1 at batch 32, wanted {WANTED}")
            rates = (work.total / statistics.median(times) for times in (slow, fast))
            table.add(name, f"{next(rates):.0f}", side, f"{next(rates):.0f}", f"{ratio:.1f}", wanted)
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
