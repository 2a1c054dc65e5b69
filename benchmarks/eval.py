"""GSM8K and GPQA scored by this project's adapter, beside plain lm-evaluation-harness at batch size 1; CPU.

    python benchmarks/eval.py [--gsm8k FOLDER] [--gpqa ZIP] [--problems 200] [--batch-size 100] [--output benchmarks/eval.md]

FOLDER holds GSM8K's train.jsonl and test.jsonl, ZIP is GPQA's own encrypted archive, which is read in memory only. Without
them the shipped arithmetic set and invented questions are taken. Batch size 1 is what the released code allows. Both
sides run the harness's whole evaluation of this project's own tasks over the same model; every answer and score is
compared. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import statistics
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from measure import Table, add_options, alternate, finish, median_ratio
from transformers import PreTrainedTokenizerBase

from hymba_align.data.tokenizer_training import train_tokenizer
from hymba_align.eval import gpqa, gsm8k
from hymba_align.eval.answers import Answers, Processes
from hymba_align.eval.harness import HymbaLM
from hymba_align.eval.lm_tasks import quiet
from hymba_align.eval.redaction import private
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.recipe_eval import EvalSection

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "arithmetic"
VOCABULARY = 4096
NEW_TOKENS = 128
WANTED = {"gsm8k": 10, "gpqa": 3}
CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 model, sums over a few tokens; observed differences are in the table
PLAIN, OURS = "lm-eval, batch 1", "hymba-align"


@dataclass(frozen=True)
class Work:
    """A task over a model: what both sides do."""

    model: HymbaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    section: EvalSection
    name: str
    """gsm8k or gpqa"""

    def side(self, make: Callable[[Work], HFLM], kept: dict[str, Any], key: str) -> Callable[[], None]:
        """The harness's evaluation of the task; what it answered goes to `kept[key]`."""
        load = gsm8k.load_task if self.name == "gsm8k" else gpqa.load_task
        task = load(self.section)

        def run() -> None:
            if self.name == "gsm8k":
                task.set_fewshot_seed(gsm8k.FEWSHOT_SEED)  # the same examples again
            with private(), quiet():
                results = evaluate(
                    lm=make(self),
                    task_dict={"tasks": {task.task_name: task}},
                    limit=self.section.limit,
                    apply_chat_template=True,
                    fewshot_as_multiturn=True,
                )
            found = results["samples"][task.task_name]
            kept[key] = {"metrics": _metrics(results, task.task_name), "resps": [one["resps"] for one in found]}

        return run


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    return {key: value for key, value in results["results"][name].items() if isinstance(value, float)}


def build_model(tokenizer: PreTrainedTokenizerBase) -> HymbaForCausalLM:
    """The shape of recipes/tiny/arithmetic.yaml, random weights, float32; answers end only by chance."""
    shape = yaml.safe_load((ROOT / "recipes" / "tiny" / "arithmetic.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = HymbaConfig(**{**shape["base"]["config"], "vocab_size": len(tokenizer), "initializer_range": 0.1})
    return HymbaForCausalLM(config).eval()


def plain(work: Work) -> HFLM:
    """The harness as it is, one prompt at a time."""
    return HFLM(
        pretrained=work.model,
        tokenizer=work.tokenizer,
        batch_size=1,
        add_bos_token=False,
        max_length=work.model.config.max_position_embeddings,
    )


def ours(work: Work) -> HFLM:
    """This project's adapter; nothing is kept between calls."""
    answers = Answers(
        work.model,
        work.tokenizer,
        processes=Processes.alone(),
        store=None,
        identity="",
        batch_size=work.section.batch_size,
        max_length=work.model.config.max_position_embeddings,
        terminal=io.StringIO(),
    )
    return HymbaLM(answers, name=work.name)


def section(arguments: argparse.Namespace, shots: str, archive: Path) -> EvalSection:
    return EvalSection(
        tasks=("gsm8k", "gpqa"),
        limit=arguments.problems,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.new_tokens,
        gsm8k={
            "train_path": str(arguments.gsm8k / "train.jsonl"),
            "test_path": str(arguments.gsm8k / "test.jsonl"),
            "shots": shots,
        },
        gpqa={"path": str(archive)},
    )


def invented_archive(folder: Path, questions: int) -> Path:
    """An archive like GPQA's, of questions of about 150 words that mean nothing."""
    draw = random.Random(0)
    words = ["the", "mass", "charge", "energy", "of", "a", "particle", "field", "cell", "rate", "wave", "in", "with"]
    table = io.StringIO()
    columns = ("Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))
    writer = csv.writer(table)
    writer.writerow(columns)
    for number in range(questions):
        choices = [" ".join(draw.choices(words, k=draw.randint(3, 15))) for _ in range(4)]
        writer.writerow([f"invented{number}", " ".join(draw.choices(words, k=draw.randint(80, 220))) + "?", *choices])
    archive = folder / "invented.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("dataset/gpqa_main.csv", table.getvalue())
    return archive


def compare(work: Work, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds per round of each side, and the largest difference of log-likelihoods; stops if answers or scores differ."""
    kept: dict[str, Any] = {}
    sides = {PLAIN: work.side(plain, kept, PLAIN), OURS: work.side(ours, kept, OURS)}
    seconds = alternate(sides, rounds=rounds, warmup=0)
    expected, found = kept[PLAIN], kept[OURS]
    if expected["metrics"] != found["metrics"]:
        raise SystemExit(f"{work.name}: the scores differ")
    if work.name == "gsm8k":
        if expected["resps"] != found["resps"]:
            raise SystemExit(f"{work.name}: the answers differ")
        return seconds, 0.0
    a, b = (
        torch.tensor([[float(one[0][0]) for one in resps] for resps in side["resps"]], dtype=torch.float64)
        for side in (expected, found)
    )
    difference = float((a - b).abs().max())
    if difference > CLOSE["atol"]:
        raise SystemExit(f"{work.name}: log-likelihoods differ by {difference:.1e}")
    return seconds, difference


def add_row(table: Table, what: str, seconds: dict[str, list[float]], problems: int, wanted: str) -> float:
    ratio = median_ratio(seconds[PLAIN], seconds[OURS])
    slow, fast = (statistics.median(seconds[side]) for side in (PLAIN, OURS))
    table.add(what, f"{problems / slow:.2f}", f"{problems / fast:.2f}", f"{ratio:.1f}", wanted)
    return ratio


def measure_all(arguments: argparse.Namespace, table: Table, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Fills the table; what was missed, in words."""
    model, missed = build_model(tokenizer), []
    with tempfile.TemporaryDirectory() as folder:
        archive = arguments.gpqa or invented_archive(Path(folder), arguments.problems)
        for name, shots, what in (
            ("gsm8k", "first", "GSM8K, 5-shot, the same examples for all (`shots: first`)"),
            ("gsm8k", "drawn", "GSM8K, 5-shot, other examples for each (`shots: drawn`)"),
            ("gpqa", "first", "GPQA main, multiple choice"),
        ):
            work = Work(model, tokenizer, section(arguments, shots, archive), name)
            seconds, difference = compare(work, arguments.rounds)
            goal = None if shots == "drawn" else WANTED[name]
            if name == "gpqa":
                what += f" (log-likelihoods within {difference:.0e})"
            wanted = "-" if goal is None else f"≥ {goal}"
            ratio = add_row(table, what, seconds, arguments.problems, wanted)
            if goal is not None and ratio < goal:
                missed.append(f"{name}: {ratio:.1f} times the problems per second, wanted {goal}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, default=SHIPPED, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--gpqa", type=Path, help="GPQA's archive dataset.zip")
    parser.add_argument("--problems", type=int, default=200, help="of each task (default 200)")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="of a GSM8K answer (default 128)")
    parser.add_argument("--batch-size", type=int, default=100, help="answers generated side by side (default 100)")
    add_options(parser)
    parser.set_defaults(rounds=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.gsm8k / "train.jsonl", VOCABULARY)
    millions = sum(one.numel() for one in build_model(tokenizer).parameters()) / 1e6
    problems = "GSM8K" if arguments.gsm8k != SHIPPED else "the shipped arithmetic set in place of GSM8K"
    questions = "GPQA's own archive" if arguments.gpqa else "invented questions in place of GPQA"
    options = ("" if arguments.gsm8k == SHIPPED else " --gsm8k FOLDER") + (" --gpqa ZIP" if arguments.gpqa else "")
    options += f" --rounds {arguments.rounds} --threads {arguments.threads}"
    table = Table(
        "Evaluation on the CPU",
        "python benchmarks/eval.py" + options,
        ("task", f"{PLAIN}, problems/s", f"{OURS}, problems/s", "times faster", "wanted"),
        [
            f"{arguments.problems} problems of each task, {problems}, {questions}; {arguments.new_tokens} new tokens per GSM8K "
            f"answer. {millions:.1f} million parameters in the shape of recipes/tiny, random weights, float32; a tokenizer of "
            f"{len(tokenizer):,} pieces trained on the training file. Medians of {arguments.rounds} rounds. Both sides are the harness's "
            "whole evaluation of the same tasks; answers are identical and scores equal. Ours generates "
            f"{arguments.batch_size} answers side by side.",
            "What limits it: with other examples for each problem nothing is shared, so every prompt is read whole on both "
            "sides; with the same examples the steps of generation are what remains.",
        ],
    )
    finish(table, arguments.output, measure_all(arguments, table, tokenizer))


if __name__ == "__main__":
    main()
