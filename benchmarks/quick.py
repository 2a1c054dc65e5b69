"""Guards the benchmarks' ratios at small sizes, so that a slow regression fails a build: under five minutes.

    python benchmarks/quick.py [--only NAME ...]

Every guard runs a benchmark's own functions, which compare what both sides compute before they are timed, and has a
least ratio. That is about half of what a quiet machine shows at this size, or, where a ratio is small, a margin that
noise does not reach; it is not the goal, which stands in the benchmark's own table. All guards run, then the table is
printed, then the run fails if one was below its least ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Table, add_options, alternate, finish, median_ratio


@dataclass(frozen=True)
class Guard:
    """A ratio that may not fall."""

    what: str
    least: float
    ratio: Callable[[int], float]
    """From the number of rounds."""


def scan() -> Guard:
    import scan_cpu

    def ratio(rounds: int) -> float:
        slow, fast = scan_cpu.compare(256, rounds)
        return statistics.median(slow) / statistics.median(fast)

    return Guard("SSM branch at 256 tokens, beside transformers' Mamba mixer", 15.0, ratio)


def sft() -> Guard:
    import gsm8k_training
    import sft_step

    def ratio(rounds: int) -> float:
        conversations = gsm8k_training.load_conversations(gsm8k_training.SHIPPED, 8)
        peer = "Falcon-H1, padded"
        _, seconds = sft_step.compare(peer, conversations, rounds)
        return median_ratio(seconds[peer], seconds[sft_step.OURS])

    return Guard("SFT step, 8 short conversations, beside Falcon-H1", 0.8, ratio)


def exact_packing() -> Guard:
    import exact_packing
    import gsm8k_training

    def ratio(rounds: int) -> float:
        conversations = gsm8k_training.load_conversations(gsm8k_training.SHIPPED, 40)
        model = gsm8k_training.build_hymba(len(conversations.tokenizer)).train()
        return median_ratio(*exact_packing.compare(model, exact_packing.pack_row(conversations, 1024), rounds))

    return Guard("packed row of 1k, beside one meta prefix per document", 1.7, ratio)


def memory() -> Guard:
    import gsm8k_training
    import sft_memory

    def ratio(rounds: int) -> float:
        given = 2048, torch.get_num_threads(), None
        neither, both = (sft_memory.measure_apart(gsm8k_training.SHIPPED, side, *given) for side in ("neither", "both"))
        if abs(neither["loss"] - both["loss"]) > sft_memory.LOSSES_WITHIN:
            raise SystemExit(f"losses differ: {neither['loss']} and {both['loss']}")
        return float(neither["bytes"] / both["bytes"])

    return Guard("peak memory of an SFT step in rows of 2k, over that with what saves memory", 1.5, ratio)


def dpo() -> Guard:
    import dpo_step

    def ratio(rounds: int) -> float:
        with dpo_step.trainer_for([(256, 64, 64)] * 2) as trainer:
            seconds = dpo_step.compare(trainer, dpo_step.shared_prompt_sides(trainer, 2), rounds)
        return median_ratio(seconds["without"], seconds["with"])

    return Guard("DPO step, prompts of 256 and answers of 64, beside prompts computed twice", 1.2, ratio)


def generate() -> Guard:
    import generation

    def ratio(rounds: int) -> float:
        model, work = generation.build_model(), generation.mixed_work(16, 8, 64, varied=False, new_tokens=16)
        sides = {f"{batch}": lambda batch=batch: generation.refilled(model, work, batch) for batch in (1, 16)}
        seconds = generation.compare(sides, rounds)
        return median_ratio(seconds["1"], seconds["16"])

    return Guard("generation, 16 prompts at once, beside one at a time", 2.5, ratio)


def shots() -> Guard:
    import shared_shots

    def ratio(rounds: int) -> float:
        tokenizer = shared_shots.train_tokenizer(shared_shots.SHIPPED / "train.jsonl", shared_shots.VOCABULARY)
        prompts = shared_shots.five_shot_prompts(shared_shots.SHIPPED, tokenizer, 8)
        with torch.no_grad():
            separate, shared = shared_shots.five_shot_sides(shared_shots.build_model(), prompts)
            seconds = alternate({"separate": separate, "shared": shared}, rounds=rounds)
        return median_ratio(seconds["separate"], seconds["shared"])

    return Guard("5-shot prefill of 8 questions, beside every prompt whole", 2.0, ratio)


def evaluation() -> Guard:
    import eval as scored

    def ratio(rounds: int) -> float:
        asked = argparse.Namespace(gsm8k=scored.SHIPPED, problems=8, batch_size=8, new_tokens=16)
        tokenizer = scored.train_tokenizer(scored.SHIPPED / "train.jsonl", scored.VOCABULARY)
        section = scored.section(asked, "first", scored.SHIPPED)
        seconds, _ = scored.compare(scored.Work(scored.build_model(tokenizer), tokenizer, section, "gsm8k"), rounds)
        return median_ratio(seconds[scored.PLAIN], seconds[scored.OURS])

    return Guard("8 problems scored, 5-shot, beside lm-eval at batch size 1", 2.0, ratio)


def row_length() -> Guard:
    import row_length

    def ratio(rounds: int) -> float:
        costs = row_length.packed_costs(row_length.build_model(4, [0]), (1024, 4096), rounds=rounds)
        return median_ratio(costs[1024], costs[4096])

    return Guard("time per token in rows of 1k, over that in rows of 4k", 0.75, ratio)


def cache() -> Guard:
    import cache_bytes

    def ratio(rounds: int) -> float:
        filled = cache_bytes.fill(cache_bytes.HymbaConfig(), cache_bytes.TOKENS, cache_bytes.TOKENS)
        return cache_bytes.PAPER_BYTES / cache_bytes.count(filled).keys_values

    return Guard("the paper's bytes of keys and values at 8,192 tokens, over the cache's", 1.0, ratio)


def inspection() -> Guard:
    import inspect_attention

    def ratio(rounds: int) -> float:
        found = inspect_attention.compare(2048, "global", 1, torch.get_num_threads())
        return float(found["dense"][0]["bytes"] / found["blocks"][0]["bytes"])

    return Guard("memory of 2,048 tokens' attention statistics, dense over in blocks", 2.5, ratio)


def startup() -> Guard:
    import startup

    def ratio(rounds: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            seconds = alternate(startup.help_sides(Path(folder), None), rounds=rounds)
        return median_ratio(seconds["trl"], seconds["hymba-align"])

    return Guard("`trl --help`, over `hymba-align --help`", 1.5, ratio)


GUARDS: dict[str, Callable[[], Guard]] = {
    "scan": scan,
    "sft": sft,
    "exact_packing": exact_packing,
    "memory": memory,
    "dpo": dpo,
    "generation": generate,
    "shots": shots,
    "evaluation": evaluation,
    "row_length": row_length,
    "cache": cache,
    "inspection": inspection,
    "startup": startup,
}


def run(guards: dict[str, Callable[[], Guard]], rounds: int) -> tuple[Table, list[str]]:
    """The table of all guards, and those that failed in words."""
    table = Table(
        "Quick guards of the benchmarks' ratios",
        "make bench-quick",
        ("guard", "what", "ratio", "least", "seconds in all"),
        "Small sizes on a machine that may be busy: least ratios are margins, not goals.",
    )
    failed = []
    for name, build in guards.items():
        start = time.perf_counter()
        what, shown, least = name, "failed", "–"
        try:
            guard = build()
            what, least = guard.what, f"{guard.least:g}"
            ratio = guard.ratio(rounds)
            shown = f"{ratio:.2f}"
            if not ratio >= guard.least:
                failed.append(f"{name}: {ratio:.2f}, at least {guard.least:g}")
        except (
            Exception,
            SystemExit,
        ) as error:  # a benchmark ends so when its sides differ; the others run all the same
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
        table.add(name, what, shown, least, f"{time.perf_counter() - start:.0f}")
    return table, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(rounds=3)  # guards with margins need less than tables
    parser.add_argument("--only", nargs="+", choices=GUARDS, default=list(GUARDS), help="guards to run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table, failed = run({name: GUARDS[name] for name in arguments.only}, arguments.rounds)
    finish(table, arguments.output, failed)


if __name__ == "__main__":
    main()
