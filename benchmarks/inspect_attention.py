"""Memory and time of the attention statistics of one document: in blocks as `hymba-align inspect`, and dense.

Both get the queries and keys of one layer of Hymba-1.5B's shape (25 heads, 128 meta tokens, window 1,024), random, in
float32, and take the same statistics per head. Dense forms the weights of all heads at once; softmax and entropy in
place, so that there is one matrix and no copy of it. Each runs in a process of its own; measured is the highest resident
memory of that process minus its resident memory before. Last, a whole forward pass of two layers is measured without and
with `measure_attention`.

    python benchmarks/inspect_attention.py [--output benchmarks/inspect_attention.md]

Linux only. Exits with 1 when blocks need more than the wanted share of one dense matrix at 8,192 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Table, add_options, finish
from sft_memory import GIVE_BACK, forget_highest, highest_bytes, resident_bytes

TOKENS = (1024, 2048, 4096, 8192)
HEADS, GROUPS, SIZE, META, WINDOW = 25, 5, 64, 128, 1024
KINDS = {"global": True, "local": False}
WANTED = 0.05
# Sums over tokens of both sides must agree, relative to the largest of a kind: float32.
WITHIN = 1e-5


def statistics_in_blocks(q: Any, k: Any, tokens: int, is_global: bool) -> Any:
    """Sums (H, 6) over all text tokens, as `measure_attention` takes them."""
    import torch

    from hymba_align.inside.attention import head_sums
    from hymba_align.inside.weights import AttentionBlocks
    from hymba_align.model import SegmentTree

    sums = torch.zeros(HEADS, 6, dtype=torch.float64)
    blocks = AttentionBlocks.build(SegmentTree.from_lengths([tokens]), META, WINDOW, q.device)
    for block in blocks.weights(q, k, is_global=is_global):
        sums[block.heads.start : block.heads.stop] += head_sums(block, META, META)
    return sums


def statistics_of_dense(q: Any, k: Any, tokens: int, is_global: bool) -> Any:
    """The same sums from one matrix of all heads' weights."""
    import torch

    from hymba_align.inside.attention import head_sums
    from hymba_align.inside.weights import WeightBlock

    place = torch.arange(META + tokens)
    distance = place[META:, None] - place
    sees = distance >= 0
    if not is_global:
        sees &= (distance <= WINDOW) | (place < META)
    del distance
    keys = k.repeat_interleave(HEADS // GROUPS, 1).permute(1, 2, 0)
    weights = q[META:].transpose(0, 1) @ keys
    weights.mul_(SIZE**-0.5).masked_fill_(~sees, -torch.inf)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    weights.div_(weights.sum(-1, keepdim=True))
    return head_sums(WeightBlock(0, range(HEADS), place[META:], place, sees, weights), META, META)


SIDES = {"blocks": statistics_in_blocks, "dense": statistics_of_dense}


def measure_layer(side: str, tokens: int, kind: str, threads: int) -> dict[str, Any]:
    """Bytes that the statistics of a layer add at their peak to this process, their seconds and the sums."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(META + tokens, many, SIZE, generator=generator) for many in (HEADS, GROUPS))

    def run() -> list[list[float]]:
        return SIDES[side](q, k, tokens, KINDS[kind]).tolist()

    return measured(run, warmup=lambda: SIDES[side](q[: META + 8], k[: META + 8], 8, KINDS[kind]))


def measure_pass(side: str, tokens: int, threads: int) -> dict[str, Any]:
    """The same of a forward pass of two layers, one of each kind; with `measure_attention` where the side is "blocks"."""
    import torch

    from hymba_align.inside.attention import measure_attention
    from hymba_align.inside.rows import Document, pack_rows
    from hymba_align.model import HymbaConfig, HymbaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = HymbaConfig(vocab_size=512, num_hidden_layers=2, global_attn_idx=[0], kv_reuse_group=[])
    model: HymbaForCausalLM = HymbaForCausalLM(config).eval()

    def run(count: int = tokens) -> list[list[float]]:
        ids = torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(1)).tolist()
        if side == "blocks":
            measure_attention(model, pack_rows([Document("", tuple(ids), (True,) * count)], count), bos_token_id=None)
        else:
            with torch.no_grad():
                model.model(input_ids=torch.tensor([ids]), use_cache=False)
        return []

    return measured(run, warmup=lambda: run(8))


def measured(run: Callable[[], list[list[float]]], warmup: Callable[[], object]) -> dict[str, Any]:
    """Peak bytes, seconds and what comes back of one call, after another that loads libraries."""
    import torch

    with torch.no_grad():
        warmup()
        before = resident_bytes()
        forget_highest()
        start = time.perf_counter()
        sums = run()
        seconds = time.perf_counter() - start
    return {"bytes": highest_bytes() - before, "seconds": seconds, "sums": sums}


def measure_apart(*given: object) -> dict[str, Any]:
    """`measure_layer` of (side, tokens, kind, threads), or `measure_pass` of (side, tokens, threads), in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def matrix_bytes(tokens: int) -> int:
    """Bytes of the weights of all heads in float32."""
    return 4 * HEADS * tokens * (META + tokens)


def fits(tokens: int) -> bool:
    """Whether dense matrices of so many tokens fit into the memory that this machine has left now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1.3 * matrix_bytes(tokens) < free


def check_sums(found: dict[str, list[dict[str, Any]]]) -> None:
    """Stops unless both sides found the same."""
    blocks, dense = (found[side][0]["sums"] for side in ("blocks", "dense"))
    for column in range(6):
        largest = max(abs(head[column]) for head in dense)
        error = max(abs(one[column] - other[column]) for one, other in zip(blocks, dense, strict=True))
        if error > WITHIN * largest:
            raise SystemExit(f"sums of column {column} differ by {error:.1e}, of {largest:.1e}")


def compare(tokens: int, kind: str, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of each side, in turn in every round; dense only where it fits."""
    sides = ["blocks", "dense"] if fits(tokens) else ["blocks"]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in reversed(sides) if turn % 2 else sides:
            found[side].append(measure_apart(side, tokens, kind, threads))
    if "dense" in found:
        check_sums(found)
    return found


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def add_row(table: Table, tokens: int, kind: str, found: dict[str, list[dict[str, Any]]]) -> float:
    """Adds a row; the share of blocks in the bytes of one dense matrix comes back."""
    matrix, peak = matrix_bytes(tokens), median(found["blocks"], "bytes")
    dense, slow, faster = "does not fit", "", ""
    if "dense" in found:
        dense, slow = f"{median(found['dense'], 'bytes') / 1e6:,.0f}", f"{median(found['dense'], 'seconds'):.2f}"
        pairs = zip(found["dense"], found["blocks"], strict=True)
        faster = f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.1f}"
    table.add(
        f"{tokens:,}",
        kind,
        f"{matrix / 1e6:,.0f}",
        dense,
        f"{peak / 1e6:,.0f}",
        f"{peak / matrix:.3f}",
        f"<= {WANTED}" if tokens == TOKENS[-1] else "",
        slow,
        f"{median(found['blocks'], 'seconds'):.2f}",
        faster,
    )
    return peak / matrix


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        given = json.loads(sys.argv[2])
        print(json.dumps(measure_layer(*given) if len(given) == 4 else measure_pass(*given)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="lengths of the document")
    arguments = parser.parse_args()
    threads, missed = arguments.threads, []
    import torch

    torch.set_num_threads(threads)  # for the header
    table = Table(
        "Attention statistics of one document: in blocks, and dense",
        "python benchmarks/inspect_attention.py",
        (
            "tokens",
            "layer",
            "one dense matrix, MB",
            "dense, peak MB",
            "blocks, peak MB",
            "share of the matrix",
            "wanted",
            "dense, s",
            "blocks, s",
            "times faster",
        ),
    )
    for tokens in arguments.tokens:
        for kind in KINDS:
            share = add_row(table, tokens, kind, compare(tokens, kind, arguments.rounds, threads))
            if tokens == TOKENS[-1] and share > WANTED:
                missed.append(f"{kind} layer at {tokens:,} tokens: {share:.3f}, wanted <= {WANTED}")
    tokens = arguments.tokens[-1]
    plain, observed = (
        [measure_apart(side, tokens, threads) for _ in range(arguments.rounds)] for side in ("forward", "blocks")
    )
    table.notes = (
        "One layer of Hymba-1.5B's shape: 25 heads of 64, 5 key heads, 128 meta tokens, window of 1,024; random queries "
        "and keys in float32. Shares, `<s>` and entropies of every head, the same from both within "
        f"{WITHIN:.0e}. Peaks are above queries and keys, each in a process of its own; rounds: "
        f"{arguments.rounds}, medians. Dense is one matrix for all heads, in place. glibc gives freed blocks back at once.",
        f"A forward pass of two such layers (one global, one local) over {tokens:,} tokens peaks at "
        f"{median(plain, 'bytes') / 1e6:,.0f} MB above its weights and takes {median(plain, 'seconds'):.1f} s; with "
        f"`measure_attention` {median(observed, 'bytes') / 1e6:,.0f} MB and {median(observed, 'seconds'):.1f} s.",
    )
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
