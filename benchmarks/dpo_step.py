"""DPO step on the CPU: each pair's prompt once, and several pairs per row, beside the same model without.

    python benchmarks/dpo_step.py [--output benchmarks/dpo_step.md]

Through this project's trainer on TRL's: `training_step`, which is forward, loss, metrics and backward, with reference
log-probabilities computed before. First, pairs of 512 prompt tokens and answers of 128, with and without
`shared_prefix_lengths`: same trainer, same weights, same pairs. Second, the pairs that this project makes of GSM8K, as
one optimizer step: in batches of a fixed number of pairs and in rows of a number of tokens. Each side's losses and
gradients are compared before anything is timed. Exits with 1 when the wanted ratio is missed.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gsm8k_training
import torch
from measure import Table, alternate, finish, median_ratio
from torch import Tensor

from hymba_align.train.common import quiet_libraries
from hymba_align.train.dpo_trainer import HymbaDPOTrainer
from hymba_align.train.preference_rows import PairCollator, best_fit_rows, pair_tokens

WANTED = 1.5
VOCABULARY = 4096
PROMPT, ANSWER, PAIRS = 512, 128, 4
ROW_TOKENS, GSM8K_PAIRS, PROCESSES = 2048, 32, 8
Lengths = tuple[int, int, int]
Batch = dict[str, Any]


def build_trainer(
    lengths: Sequence[Lengths], folder: Path, *, vocabulary: int = VOCABULARY, **changes: Any
) -> HymbaDPOTrainer:
    """A trainer over pairs with so many tokens in prompt, chosen and rejected; its policy is not its reference.

    Args:
        lengths: of each pair; the tokens themselves are random.
        changes: of the model's configuration.
    """
    from datasets import Dataset
    from trl import DPOConfig

    generator = torch.Generator().manual_seed(0)
    texts = [[_words(count, vocabulary, generator) for count in of_pair] for of_pair in lengths]
    tokenizer = _word_tokenizer(vocabulary)
    with quiet_libraries():
        trainer = HymbaDPOTrainer(
            model=gsm8k_training.build_hymba(vocabulary, **changes),
            args=DPOConfig(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
                max_length=None,
                activation_checkpointing=False,
                precompute_ref_log_probs=True,
                per_device_train_batch_size=4,
            ),
            data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [prompt for prompt, _, _ in texts],
                    "chosen": [f" {chosen}" for _, chosen, _ in texts],
                    "rejected": [f" {rejected}" for _, _, rejected in texts],
                }
            ),
            processing_class=tokenizer,
        )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    trainer.model.train()
    return trainer


def _words(count: int, vocabulary: int, generator: torch.Generator) -> str:
    """Numbers as words, of which the last ends as TRL wants a reply to end."""
    words = [str(word) for word in torch.randint(3, vocabulary - 1, (count,), generator=generator).tolist()]
    return " ".join([*words[:-1], "2"])


def _word_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({str(word): word for word in range(vocabulary)}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", pad_token="1", unk_token="0")


def make_batch(trainer: HymbaDPOTrainer, pairs: Sequence[int], *, share_prefix: bool = True) -> Batch:
    """TRL's batch of these pairs of the trainer's data; without `share_prefix` every prompt is computed twice."""
    examples = trainer.train_dataset
    batch: Batch = trainer.data_collator([examples[index] for index in pairs])
    return batch if share_prefix else {name: value for name, value in batch.items() if name != "shared_prefix_lengths"}


def train_step(trainer: HymbaDPOTrainer, batches: Sequence[Batch]) -> Tensor:
    """Loss of an optimizer step over the batches; the gradients are left in the model."""
    trainer.model.zero_grad()
    pairs = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batches))
    losses = [trainer.training_step(trainer.model, dict(batch), pairs) for batch in batches]
    trainer._metrics["train"].clear()  # `log` would take them, every few steps
    return torch.stack(losses).sum()


def check_equal(trainer: HymbaDPOTrainer, sides: dict[str, list[Batch]]) -> float:
    """The loss that all sides have. Stops where losses or gradients differ."""
    found = []
    for batches in sides.values():
        loss = train_step(trainer, batches)
        found.append((loss, [parameter.grad.clone() for parameter in trainer.model.parameters()]))
    expected, gradients = found[0]
    for loss, others in found[1:]:
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)  # float32
        for gradient, wanted in zip(others, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)
    return float(expected)


def compare(trainer: HymbaDPOTrainer, sides: dict[str, list[Batch]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each side, in turn, after checking that they compute the same."""
    check_equal(trainer, sides)
    return alternate(
        {name: partial(train_step, trainer, batches) for name, batches in sides.items()}, rounds=rounds, warmup=0
    )


def shared_prompt_sides(trainer: HymbaDPOTrainer, pairs: int) -> dict[str, list[Batch]]:
    """One batch of the first pairs, without and with the prompt's length."""
    return {
        name: [make_batch(trainer, range(pairs), share_prefix=share)]
        for name, share in (("without", False), ("with", True))
    }


# ---- rows of GSM8K's pairs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSides:
    """The same pairs in batches of a fixed number and in rows, by name, and how unequal each leaves the processes."""

    batches: dict[str, list[Batch]]
    unequal: dict[str, float]
    pairs_per_row: float


def row_sides(trainer: HymbaDPOTrainer, row_tokens: int, processes: int = PROCESSES) -> RowSides:
    """All pairs of the trainer as one optimizer step."""
    lengths = pair_tokens(trainer.train_dataset, share_prefix=True)
    rows = best_fit_rows(lengths, row_tokens)
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    per_row = max(1, round(len(order) / len(rows)))
    chosen = {
        "one pair per batch": [[index] for index in order],
        f"{per_row} pairs per batch": [order[first : first + per_row] for first in range(0, len(order), per_row)],
        f"rows of {row_tokens:,} tokens": rows,
    }
    return RowSides(
        {name: [make_batch(trainer, batch) for batch in batches] for name, batches in chosen.items()},
        {name: unequal_work(batches, lengths, processes) for name, batches in chosen.items()},
        len(order) / len(rows),
    )


def unequal_work(batches: Sequence[Sequence[int]], lengths: Sequence[int], processes: int, draws: int = 200) -> float:
    """Tokens of the process that has most, over the mean: what the others wait for at every optimizer step.

    Each process is given an equal number of these batches at random, 8 per step; the mean over many draws.
    """
    tokens = [sum(lengths[index] for index in batch) for batch in batches]
    rng, shares = random.Random(0), []
    for _ in range(draws):
        loads = [sum(rng.choices(tokens, k=8)) for _ in range(processes)]
        shares.append(max(loads) / statistics.mean(loads))
    return statistics.mean(shares)


def gsm8k_pairs(folder: Path, count: int) -> tuple[list[Lengths], str]:
    """Tokens of prompt, chosen and rejected of pairs that this project makes of GSM8K's answers, and what they are."""
    from hymba_align.data.prepare import prepare_preferences
    from hymba_align.data.rendering import render
    from hymba_align.data.tokenizer_training import train_tokenizer
    from hymba_align.recipe import DataSection

    file, name = folder / "train.jsonl", "GSM8K"
    if not file.is_file():
        file, name = gsm8k_training.SHIPPED / "train.jsonl", "the shipped arithmetic problems, as GSM8K was not found"
    tokenizer = train_tokenizer(file, VOCABULARY)
    section = DataSection(path=str(file), max_rows=count, workers=1)
    found = []
    for row in prepare_preferences(section, tokenizer, 4096, seed=0).dataset:
        prompt = len(render(tokenizer, row["prompt"], add_generation_prompt=True).input_ids)
        chosen, rejected = (
            len(render(tokenizer, row["prompt"] + row[side]).input_ids) - prompt for side in ("chosen", "rejected")
        )
        found.append((prompt, chosen, rejected))
    return found, f"{len(found)} pairs of {name}"


@contextmanager
def trainer_for(lengths: Sequence[Lengths], **changes: Any) -> Iterator[HymbaDPOTrainer]:
    """A trainer whose files, the cached reference among them, are gone afterwards."""
    from datasets import config

    usual = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        config.HF_DATASETS_CACHE = Path(folder) / "cache"
        try:
            yield build_trainer(lengths, Path(folder), **changes)
        finally:
            config.HF_DATASETS_CACHE = usual


def main() -> None:
    arguments = gsm8k_training.options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)

    with trainer_for([(PROMPT, ANSWER, ANSWER)] * PAIRS) as trainer:
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        prompts = compare(trainer, shared_prompt_sides(trainer, PAIRS), arguments.rounds)
    ratio = median_ratio(prompts["without"], prompts["with"])
    lengths, origin = gsm8k_pairs(arguments.gsm8k, GSM8K_PAIRS)
    with trainer_for(lengths) as trainer:
        sides = row_sides(trainer, ROW_TOKENS)
        rows = compare(trainer, sides.batches, arguments.rounds)
    *fixed, packed = rows

    table = Table(
        "DPO step on the CPU",
        "python benchmarks/dpo_step.py",
        ("what", "tokens computed", "without, s", "with, s", "times faster", "wanted"),
        [
            f"Hymba with random weights, {parameters / 1e6:.1f} M parameters, 128 meta tokens, {VOCABULARY:,} tokens in "
            "the vocabulary, float32. Forward, loss, metrics and backward of an optimizer step; medians, the sides taking "
            "turns in one process. Losses are equal within 1e-5, and so are gradients.",
            f"First row: {PAIRS} pairs, prompts of {PROMPT} and answers of {ANSWER} tokens, without and with "
            f"`shared_prefix_lengths`. Tokens alone would give {2 * (PROMPT + ANSWER) / (PROMPT + 2 * ANSWER):.2f}.",
            f"Other rows: {origin} in one step, {sides.pairs_per_row:.1f} per row on average, prompts shared on every side. "
            "The model computes no padding, so on one process rows gain by larger batches alone. With several processes "
            f"they gain by waiting less: of {PROCESSES} with 8 batches each, the slowest has "
            + ", ".join(f"{share:.2f} ({name})" for name, share in sides.unequal.items())
            + " times the mean's tokens (counted, not timed).",
        ],
    )
    without, shared = 2 * PAIRS * (PROMPT + ANSWER), PAIRS * (PROMPT + 2 * ANSWER)
    table.add(
        "prompt once per pair",
        f"{without:,} and {shared:,}",
        f"{statistics.median(prompts['without']):.3f}",
        f"{statistics.median(prompts['with']):.3f}",
        f"{ratio:.2f}",
        f"{WANTED}",
    )
    total = sum(map(sum, lengths))
    for name in fixed:
        table.add(
            f"{packed}, beside {name}",
            f"{total:,}",
            f"{statistics.median(rows[name]):.3f}",
            f"{statistics.median(rows[packed]):.3f}",
            f"{median_ratio(rows[name], rows[packed]):.2f}",
            "",
        )
    finish(table, arguments.output, [f"prompt once per pair: {ratio:.2f} of {WANTED}"] if ratio < WANTED else [])


if __name__ == "__main__":
    main()
