"""Preparing conversations for SFT: bare tokenization, this project cold and cached, and TRL's own preparation.

    python benchmarks/data.py [--conversations 200000] [--tokenizer FOLDER] [--rounds 1] [--output benchmarks/data.md]

Conversations of two to six turns are written to a temporary folder as JSON Lines. Each way of preparing them runs in a
process of its own, with caches of its own; the memory of it and of all its children is sampled ten times a second. All
must find the same tokens. Exits with 1 when a target is missed at 200,000 conversations or more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from measure import Table, cores, finish

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MAX_LENGTH = 8192
TEXTS_TOGETHER = 1000
SAMPLES_PER_SECOND = 10
WANTED_FROM = 200_000  # conversations; fewer finish before processes have started
WANTED_SPEED = 0.5  # of the bare tokenizer's
WANTED_PEAK_MB = 2000
WANTED_FILL = 0.98
# Characters of a conversation are log-normal; with the released tokenizer about 400 tokens in the mean.
MU, SIGMA = 6.4, 0.7


# ---- the conversations -----------------------------------------------------------------------------------------------


def write_conversations(folder: Path, count: int, tokenizer: Any) -> None:
    """Writes `rows.jsonl` (messages) and `texts.jsonl` (the same, rendered by the tokenizer's chat template)."""
    rng = random.Random(0)
    questions, sentences = sample_texts()
    with (folder / "rows.jsonl").open("w") as rows, (folder / "texts.jsonl").open("w") as texts:
        for _ in range(count):
            messages = make_conversation(rng, questions, sentences)
            rows.write(json.dumps({"messages": messages}) + "\n")
            texts.write(json.dumps(tokenizer.apply_chat_template(messages, tokenize=False)) + "\n")


def sample_texts() -> tuple[list[str], list[str]]:
    """Questions, and the sentences of answers: GSM8K's and LLaMA-Factory's, else those of the shipped arithmetic set."""
    gsm8k, pairs = SHARED / "data" / "gsm8k" / "train.jsonl", SHARED / "data" / "llamafactory" / "dpo_en_demo.json"
    path = gsm8k if gsm8k.is_file() else ROOT / "data" / "arithmetic" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    questions, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    if pairs.is_file():
        preferences = json.loads(pairs.read_text())
        questions += [row["conversations"][-1]["value"] for row in preferences]
        answers += [row["chosen"]["value"] for row in preferences]
    sentences = [part for answer in answers for part in re.split(r"(?<=[.!?\n]) *(?=\S)", answer)]
    return [question for question in questions if question.strip()], [part for part in sentences if part.strip()]


def make_conversation(rng: random.Random, questions: list[str], sentences: list[str]) -> list[dict[str, str]]:
    """One to three questions with answers, and in a fifth of the conversations a system message."""
    exchanges = rng.randint(1, 3)
    characters = rng.lognormvariate(MU, SIGMA) / exchanges
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.2 else []
    for _ in range(exchanges):
        question, answer = rng.choice(questions), rng.choice(sentences)
        place = rng.randrange(len(sentences))
        while len(question) + len(answer) < characters:
            answer = f"{answer.rstrip()} {sentences[place]}"
            place = (place + 1) % len(sentences)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# ---- the ways of preparing them --------------------------------------------------------------------------------------


class Spent:
    """Seconds that the blocks under it took, by the clock and by all cores together (of processes that have ended, too)."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= sum(os.times()[:4])

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += sum(os.times()[:4])


def tokenize_bare(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's own batch encoding of the rendered texts; reading them is not timed."""
    spent, tokens = Spent(), 0
    with (folder / "texts.jsonl").open() as lines:
        while texts := [json.loads(line) for line in islice(lines, TEXTS_TOGETHER)]:
            with spent:
                batch = tokenizer(texts, add_special_tokens=False)["input_ids"]
            tokens += sum(map(len, batch))
    return {**vars(spent), "tokens": tokens}


def prepare_ours(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """From the file to packed rows with labels, by this project."""
    import trl.data_utils  # noqa: F401  (what is imported when it is first used would be timed)

    from hymba_align.data.packing import pack
    from hymba_align.data.prepare import prepare_sft
    from hymba_align.recipe import DataSection

    preparing, packing = Spent(), Spent()
    with preparing:
        prepared = prepare_sft(DataSection(path=str(folder / "rows.jsonl")), tokenizer, MAX_LENGTH, seed=0)
    with packing:
        rows = pack(prepared.dataset, MAX_LENGTH)
    return {
        "seconds": preparing.seconds + packing.seconds,
        "cpu_seconds": preparing.cpu_seconds + packing.cpu_seconds,
        "packing": packing.seconds,
        **packed_counts(rows),
    }


def prepare_trl(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """From the file to packed rows with labels, by the method that TRL's SFTTrainer calls when it is built."""
    from types import SimpleNamespace

    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        dataset_num_proc=cores(),
        use_cpu=True,
        bf16=False,
    )
    # All that the method reads of a trainer; a real one would want a model.
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    spent = Spent()
    with spent:
        table = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        rows = SFTTrainer._prepare_dataset(trainer, table, tokenizer, arguments, True, None, "train")
    return {**vars(spent), **packed_counts(rows)}


def packed_counts(rows: Any) -> dict[str, Any]:
    """What there is to compare in packed rows, read a few at a time."""
    import pyarrow.compute as pc

    tokens = trained = 0
    for batch in rows.with_format("arrow").iter(batch_size=100):
        labels = pc.list_flatten(batch["labels"])
        tokens += len(labels)
        trained += pc.sum(pc.not_equal(labels, -100)).as_py()
    return {"rows": len(rows), "tokens": tokens, "trained": trained}


CASES: dict[str, tuple[str, Callable[[Path, Any], dict[str, Any]]]] = {
    "bare": ("bare `tokenizer(texts)`, 1,000 at a time", tokenize_bare),
    "ours": ("hymba-align, nothing cached", prepare_ours),
    "cached": ("hymba-align again, cached", prepare_ours),
    "trl": ("TRL's SFTTrainer, nothing cached", prepare_trl),
}


# ---- processes and their memory --------------------------------------------------------------------------------------


def process_tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may itself hold brackets and spaces.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def tree_memory(root: int) -> tuple[int, int]:
    """Proportional set size of the process tree in bytes, and the part of it that is not pages of files."""
    total = anonymous = 0
    for process in process_tree(root):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                total += int(value.split()[0]) * 1024 if name == "Pss" else 0
                anonymous += int(value.split()[0]) * 1024 if name in ("Pss_Anon", "Pss_Shmem") else 0
    return total, anonymous


def run_case(name: str, folder: Path, tokenizer: str) -> dict[str, Any]:
    """What the case found, and its peak memory, from a process of its own."""
    cache = folder / ("cache-ours" if name == "cached" else f"cache-{name}")
    if name != "cached":
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, __file__, "--case", name, "--folder", str(folder), "--tokenizer", tokenizer]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(cache),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    peak = peak_anonymous = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            total, anonymous = tree_memory(process.pid)
            peak, peak_anonymous = max(peak, total), max(peak_anonymous, anonymous)
            time.sleep(1 / SAMPLES_PER_SECOND)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the case {name!r} ended with {process.returncode}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**result, "peak": peak, "peak_anonymous": peak_anonymous}


# ---- the table -------------------------------------------------------------------------------------------------------


def measure(count: int, tokenizer: str, rounds: int) -> dict[str, dict[str, Any]]:
    """For each case the median seconds and the highest peaks of all rounds, with what it found."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_conversations(folder, count, load(tokenizer))
        runs = [{name: run_case(name, folder, tokenizer) for name in CASES} for _ in range(rounds)]
    results = {}
    for name in CASES:
        own = [run[name] for run in runs]
        seconds = {key: statistics.median(run[key] for run in own) for key in ("seconds", "cpu_seconds")}
        peaks = {key: max(run[key] for run in own) for key in ("peak", "peak_anonymous")}
        results[name] = {**own[0], **seconds, **peaks}
    for key, names in {"tokens": CASES.keys(), "trained": ("ours", "cached", "trl")}.items():
        assert len({results[name][key] for name in names}) == 1, f"they differ in {key}: {results}"
    return results


COLUMNS = (
    "",
    "seconds",
    "CPU seconds",
    "conversations/s",
    "tokens/s",
    "speed of the bare tokenizer",
    "rows",
    "fill",
    "peak, MB",
    "not files, MB",
)


def table_rows(results: dict[str, dict[str, Any]], count: int) -> Iterator[list[str]]:
    """The rows of the table."""
    bare = results["bare"]["seconds"]
    for name, (title, _) in CASES.items():
        one = results[name]
        rows = one.get("rows")
        yield [
            title,
            f"{one['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            *(f"{amount / one['seconds']:,.0f}" for amount in (count, one["tokens"])),
            f"{bare / one['seconds']:.2f}",
            *((f"{rows:,}", f"{100 * fill_rate(one):.2f} %") if rows else ("–", "–")),
            *(f"{one[key] / 1e6:,.0f}" for key in ("peak", "peak_anonymous")),
        ]


def fill_rate(result: dict[str, Any]) -> float:
    """tokens / (rows * MAX_LENGTH)."""
    return float(result["tokens"] / (result["rows"] * MAX_LENGTH))


def missed_targets(results: dict[str, dict[str, Any]]) -> list[str]:
    """The targets that our cold run misses, in words."""
    ours, bare = results["ours"], results["bare"]
    speed, peak, fill = bare["seconds"] / ours["seconds"], ours["peak"] / 1e6, fill_rate(ours)
    return [
        words
        for words, missed in {
            f"{speed:.2f} of the bare tokenizer's speed, wanted {WANTED_SPEED}": speed < WANTED_SPEED,
            f"a peak of {peak:,.0f} MB, wanted under {WANTED_PEAK_MB:,}": peak >= WANTED_PEAK_MB,
            f"{fill:.2%} of the row tokens filled, wanted {WANTED_FILL:.0%}": fill < WANTED_FILL,
        }.items()
        if missed
    ]


def report(results: dict[str, dict[str, Any]], count: int, rounds: int, tokenizer: str) -> Table:
    """The page that is committed."""
    import trl.data_utils  # noqa: F401  (the cases load it in processes of their own; the header names what is loaded)

    ours = results["ours"]
    in_rounds = "one round" if rounds == 1 else f"{rounds} rounds (median seconds, highest peaks)"
    table = Table("Preparing conversations for SFT", "python benchmarks/data.py", COLUMNS)
    table.notes = (
        f"{count:,} conversations of two to six turns, {ours['tokens'] / count:.0f} tokens in the mean "
        f"({Path(tokenizer).name} tokenizer), {ours['trained']:,} of {ours['tokens']:,} tokens trained on, rows of "
        f"{MAX_LENGTH:,}. Each way in a process of its own, {in_rounds}. Seconds are from the file to packed rows with "
        "labels, without imports; for the bare tokenizer those of encoding alone; CPU seconds are those of all cores "
        "together. All find the same tokens, and ours and TRL the same trained ones. Peak: the proportional set size of "
        f"all processes together, sampled {SAMPLES_PER_SECOND} times a second, imports included; 'not files' leaves out "
        "pages of mapped files, which the system takes back when it needs them.",
        f"Packing is {ours['packing']:.1f} s of the uncached run. Wanted of it at {WANTED_FROM:,} conversations: at least "
        f"{WANTED_SPEED} of the bare tokenizer's speed, a peak under {WANTED_PEAK_MB:,} MB, {WANTED_FILL:.0%} filled.",
    )
    for row in table_rows(results, count):
        table.add(*row)
    return table


def load(tokenizer: str) -> Any:
    """The tokenizer of a folder, with this project's chat template."""
    from hymba_align.data.template import load_tokenizer

    return load_tokenizer(tokenizer)


def main() -> None:
    released, small = SHARED / "hymba_1_5b", ROOT / "data" / "arithmetic" / "tokenizer"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=WANTED_FROM)
    parser.add_argument("--tokenizer", default=str(released if released.is_dir() else small), help="a folder")
    parser.add_argument("--rounds", type=int, default=1, help="how often every case runs, in turn")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case][1](arguments.folder, load(arguments.tokenizer))))
        return
    results = measure(arguments.conversations, arguments.tokenizer, arguments.rounds)
    table = report(results, arguments.conversations, arguments.rounds, arguments.tokenizer)
    finish(table, arguments.output, missed_targets(results) if arguments.conversations >= WANTED_FROM else [])


if __name__ == "__main__":
    main()
