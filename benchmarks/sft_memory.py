"""Peak memory of a step of supervised fine-tuning at 8k tokens per row, with and without what saves memory.

Label-only logits: only positions that predict a label are projected; without, TRL scores every position, in tiles of
4,096. Checkpointing: activations are recomputed layer by layer (`activation_checkpointing: true`). Each of the four
combinations makes one step, optimizer included, in a process of its own; measured is the highest resident memory of that
process minus its resident memory before the step. Neither and both run in every round, the two alone once; neither and
both run once more with the released vocabulary.

    python benchmarks/sft_memory.py [--output benchmarks/sft_memory.md] [--gsm8k FOLDER]

Linux only. Exits with 1 when both together need more than the wanted share.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gsm8k_training import build_hymba, describe, load_conversations, options
from measure import Table, finish

ROW_TOKENS = 8192
CONVERSATIONS = 500
WANTED = 0.5
# Their loss in the first step must agree: float32.
LOSSES_WITHIN = 1e-5
# glibc otherwise keeps freed blocks, so that resident memory shows its reserve as well as what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
SIDES = {
    "neither": (False, False),
    "label-only logits": (True, False),
    "checkpointing": (False, True),
    "both": (True, True),
}
COMPARED = ("neither", "both")
RELEASED_VOCABULARY = 32_001


def measure_step(folder: Path, side: str, tokens: int, threads: int, vocabulary: int | None = None) -> dict[str, Any]:
    """Bytes that one step adds at its peak to this process, its seconds and its loss.

    Args:
        vocabulary: of the model, where it is not the tokenizer's.
    """
    import torch
    from gsm8k_training import batch_of, labels_in, trainer_of, training_step
    from trl import SFTTrainer

    from hymba_align.data.packing import add_labels, pack
    from hymba_align.train.sft import HymbaSFTTrainer

    torch.set_num_threads(threads)
    label_only, checkpointing = SIDES[side]
    conversations = load_conversations(folder, CONVERSATIONS, max_length=tokens)
    rows = sorted(pack(add_labels(conversations.dataset), tokens), key=lambda row: len(row["seq_lengths"]))
    row = type(conversations.dataset).from_list([rows[len(rows) // 2]])
    trainer = trainer_of(
        HymbaSFTTrainer if label_only else SFTTrainer,
        build_hymba(vocabulary or len(conversations.tokenizer)),
        row,
        conversations,
        packing=True,
        max_length=tokens,
        activation_checkpointing=checkpointing,
    )
    if checkpointing:  # as `Trainer.train` does
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(trainer)
    step = training_step(trainer, batch)
    before = resident_bytes()
    forget_highest()  # making the tokenizer may have needed more than a small step does
    start = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    return {
        "bytes": highest_bytes() - before,
        "seconds": seconds,
        "loss": loss,
        "tokens": batch["input_ids"].numel(),
        "trained": labels_in(batch),
        "lengths": rows[len(rows) // 2]["seq_lengths"],
        "origin": conversations.origin,
    }


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_highest() -> None:
    """Starts `highest_bytes` afresh. Source: Linux's proc_pid_clear_refs(5), 5."""
    Path("/proc/self/clear_refs").write_text("5")


def highest_bytes() -> int:
    """The most resident memory that this process has had since `forget_highest`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def measure_apart(*given: object) -> dict[str, Any]:
    """`measure_step` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        json.dumps([str(each) if isinstance(each, Path) else each for each in given]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        folder, *rest = json.loads(sys.argv[2])
        print(json.dumps(measure_step(Path(folder), *rest)))
        return
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=ROW_TOKENS, help="tokens per row (default 8,192)")
    parser.add_argument("--vocabulary", type=int, help="entries of the model's vocabulary (default: the tokenizer's)")
    arguments = parser.parse_args()
    given = arguments.tokens, arguments.threads
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(arguments.rounds):
        for side in COMPARED if turn else SIDES:
            found[side].append(measure_apart(arguments.gsm8k, side, *given, arguments.vocabulary))
    check_losses(found)
    table = make_table(found["both"][0], arguments.vocabulary)
    share = add_rows(table, found)
    if arguments.vocabulary is None:
        wide = {side: [measure_apart(arguments.gsm8k, side, *given, RELEASED_VOCABULARY)] for side in COMPARED}
        check_losses(wide)
        add_rows(table, wide, f", vocabulary {RELEASED_VOCABULARY:,}")
    finish(table, arguments.output, [f"both: {share:.2f}, wanted <= {WANTED}"] if share > WANTED else [])


def check_losses(found: dict[str, list[dict[str, Any]]]) -> None:
    """Stops unless all runs have the same loss."""
    losses = [each["loss"] for runs in found.values() for each in runs]
    if max(losses) - min(losses) > LOSSES_WITHIN:
        raise SystemExit(f"losses differ: {min(losses)} to {max(losses)}")


def make_table(run: dict[str, Any], vocabulary: int | None) -> Table:
    """The empty table, described by one of the runs."""
    return Table(
        "Peak memory of a step of supervised fine-tuning, CPU",
        "python benchmarks/sft_memory.py" + (f" --vocabulary {vocabulary}" if vocabulary else ""),
        ("with", "peak above the loaded model, MB", "share", "wanted", "s per step"),
        f"One packed row of {run['tokens']:,} tokens, {run['trained']:,} of them trained, from {run['origin']} "
        f"({describe(run['lengths'])}); the 10-million-parameter model, vocabulary "
        f"{vocabulary or 4096:,}, float32; TRL's SFTTrainer, one step with gradients and AdamW's state. Medians over "
        "the processes of neither and both, one process of the others; all of one vocabulary have the same loss. With "
        "the released vocabulary TRL's loss is what is left: on a CPU its backward pass holds several float32 copies "
        "of a tile of 4,096 positions by the whole vocabulary. In all of them glibc gives freed blocks back at once ("
        f"MALLOC_MMAP_THRESHOLD_={GIVE_BACK['MALLOC_MMAP_THRESHOLD_']}); by default it keeps a reserve.",
    )


def add_rows(table: Table, found: dict[str, list[dict[str, Any]]], aside: str = "") -> float:
    """Adds a row per side; the share of both together comes back. Rows with `aside` behind their names have no goal."""
    peaks = {side: statistics.median(run["bytes"] for run in runs) for side, runs in found.items()}
    for side, runs in found.items():
        table.add(
            side + aside,
            f"{peaks[side] / 1e6:,.0f}",
            f"{peaks[side] / peaks['neither']:.2f}",
            f"<= {WANTED}" if side == "both" and not aside else "",
            f"{statistics.median(run['seconds'] for run in runs):.1f}",
        )
    return peaks["both"] / peaks["neither"]


if __name__ == "__main__":
    main()
