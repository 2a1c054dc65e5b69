"""Prompts that begin alike, run once for what they share, beside every prompt run whole; CPU, about 10 M parameters.

    python benchmarks/shared_shots.py [--data FOLDER] [--questions 32] [--output benchmarks/shared_shots.md]

FOLDER holds GSM8K's train.jsonl and test.jsonl; without it the shipped arithmetic set is taken. The same model runs the
same tokens on both sides, in rows of at most 8,192 tokens without padding, so that sharing alone is measured. Logits
are compared before anything is timed. Exits with 1 when a wanted ratio is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from measure import Table, add_options, alternate, finish, median_ratio
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hymba_align.data.tokenizer_training import ASKED, train_tokenizer
from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree
from hymba_align.model.decoding import decode
from hymba_align.model.scoring import score_continuations
from hymba_align.model.segments import share_prefixes

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "arithmetic"
VOCABULARY = 4096
ROW = 8192
SHOTS = 5
WANTED = 5
QUESTION, CHOICES, CHOICE = 200, 4, 20
CLOSE = {"atol": 2e-4, "rtol": 0}  # float32, logits up to 1.4 and sums near -170; observed 2.2e-5


def build_model(hidden_size: int = 256) -> HymbaForCausalLM:
    """A random Hymba, in float32, of about 10 M parameters unless a smaller hidden size is asked for."""
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        v_head_dim=hidden_size // 4,
        mamba_d_state=16,
        mamba_dt_rank=16,
        num_memory_tokens=128,
        sliding_window=256,
        global_attn_idx=[0, 4, 7],
        kv_reuse_group=[[1, 2], [5, 6]],
    )
    return HymbaForCausalLM(config).eval()


def five_shot_prompts(folder: Path, tokenizer: PreTrainedTokenizerBase, questions: int) -> list[list[int]]:
    """Token ids of GSM8K prompts as chats, all with the first training rows as shots."""
    train, test = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()[:count]]
        for name, count in (("train.jsonl", SHOTS), ("test.jsonl", questions))
    )
    messages = []
    for shot in train:
        messages.append({"role": "user", "content": ASKED.format(question=shot["question"])})
        messages.append({"role": "assistant", "content": shot["answer"]})
    prompts = []
    for row in test:
        asked = [*messages, {"role": "user", "content": ASKED.format(question=row["question"])}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def rows_of(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The prompts in order, in rows of at most `ROW` tokens."""
    row: list[Sequence[int]] = []
    for prompt in prompts:
        if row and sum(map(len, row)) + len(prompt) > ROW:
            yield row
            row = []
        row = [*row, prompt]
    yield row


@torch.no_grad()
def separate_logits(model: HymbaForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """(N, V) logits after each prompt, every prompt run whole."""
    found = []
    for row in rows_of(prompts):
        tree = SegmentTree.from_lengths([len(prompt) for prompt in row])
        ids = torch.tensor([[token for prompt in row for token in prompt]])
        last = tree.lengths.cumsum(0) - 1
        found.append(model(ids, segments=tree, logits_to_keep=last, use_cache=False).logits[0])
    return torch.cat(found)


@torch.no_grad()
def shared_logits(model: HymbaForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """(N, V) logits after each prompt, what they have in common run once, in one row."""
    row = share_prefixes(prompts)
    last = (row.tree.offsets + row.tree.lengths - 1)[row.ends]
    return model(row.token_ids[None], segments=row.tree, logits_to_keep=last, use_cache=False).logits[0]


@torch.no_grad()
def separate_scores(
    model: HymbaForCausalLM, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihood of each continuation, every question run whole for each of its choices."""
    inputs = [[*context, *one[:-1]] for context, one in zip(contexts, continuations, strict=True)]
    targets = iter(continuations)
    found: list[float] = []
    for row in rows_of(inputs):
        tree = SegmentTree.from_lengths([len(sequence) for sequence in row])
        ids = torch.tensor([[token for sequence in row for token in sequence]])
        wanted = [next(targets) for _ in row]
        ends = (tree.offsets + tree.lengths).tolist()
        places = torch.cat([torch.arange(end - len(one), end) for end, one in zip(ends, wanted, strict=True)])
        log_probs = model(ids, segments=tree, logits_to_keep=places, use_cache=False).logits[0].log_softmax(-1)
        tokens = torch.tensor([token for one in wanted for token in one])
        scored = log_probs.gather(1, tokens[:, None])[:, 0].split([len(one) for one in wanted])
        found += [float(one.sum()) for one in scored]
    return found


def choices_of_questions(questions: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random questions of 200 tokens, each with four choices of 20: as many contexts as continuations."""
    generator = torch.Generator().manual_seed(1)
    contexts, continuations = [], []
    for _ in range(questions):
        question = torch.randint(3, VOCABULARY, (QUESTION,), generator=generator).tolist()
        for _ in range(CHOICES):
            contexts.append(question)
            continuations.append(torch.randint(3, VOCABULARY, (CHOICE,), generator=generator).tolist())
    return contexts, continuations


def five_shot_sides(
    model: HymbaForCausalLM, prompts: Sequence[Sequence[int]]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Prefill without and with shared shots; stops if their logits, or evaluation's first tokens, differ."""
    separate, shared = separate_logits(model, prompts), shared_logits(model, prompts)
    torch.testing.assert_close(shared, separate, **CLOSE)
    first = [one.tokens[0] for one in decode(model, prompts, max_new_tokens=1, batch_size=len(prompts))]
    assert first == separate.argmax(-1).tolist(), "decode starts with other tokens"
    return lambda: separate_logits(model, prompts), lambda: shared_logits(model, prompts)


def choice_sides(
    model: HymbaForCausalLM, contexts: list[list[int]], continuations: list[list[int]]
) -> tuple[Callable[[], list[float]], Callable[[], list[float]]]:
    """Scores of multiple choice with the question run for each choice and for all; stops if they differ."""

    def shared() -> list[float]:
        scored = score_continuations(model, contexts, continuations, tokens_per_row=ROW)
        return [one.log_likelihood for one in scored]

    def separate() -> list[float]:
        return separate_scores(model, contexts, continuations)

    torch.testing.assert_close(shared(), separate(), **CLOSE)
    return separate, shared


def measure_five_shots(table: Table, folder: Path, questions: int, rounds: int) -> float:
    """Adds prefill by one row and by evaluation's own cached prefill; returns how many times faster the first is."""
    tokenizer = train_tokenizer(folder / "train.jsonl", VOCABULARY)
    model = build_model()
    prompts = five_shot_prompts(folder, tokenizer, questions)
    separate, shared = five_shot_sides(model, prompts)
    seconds = alternate(
        {
            "separate": separate,
            "tree": shared,
            "cache": lambda: decode(model, prompts, max_new_tokens=1, batch_size=questions),
        },
        rounds=rounds,
    )
    total, distinct = sum(map(len, prompts)), share_prefixes(prompts).tree.num_tokens
    for name, side, wanted in (
        (f"{SHOTS}-shot prefill of {questions} questions, one row", "tree", f"{WANTED}"),
        ("the same, shots as a cache (`decode`)", "cache", "-"),
    ):
        _add(table, name, total, distinct, seconds["separate"], seconds[side], wanted)
    return median_ratio(seconds["separate"], seconds["tree"])


def measure_choices(table: Table, questions: int, rounds: int) -> None:
    model = build_model()
    contexts, continuations = choices_of_questions(questions)
    separate, shared = choice_sides(model, contexts, continuations)
    seconds = alternate({"separate": separate, "shared": shared}, rounds=rounds)
    total = questions * CHOICES * (QUESTION + CHOICE - 1)
    distinct = questions * (QUESTION + CHOICES * (CHOICE - 1))
    name = f"{questions} questions of {QUESTION} tokens, {CHOICES} choices of {CHOICE}"
    _add(table, name, total, distinct, seconds["separate"], seconds["shared"], "-")


def _add(
    table: Table, name: str, total: int, distinct: int, slow: Sequence[float], fast: Sequence[float], wanted: str
) -> None:
    table.add(
        name,
        f"{total:,}",
        f"{distinct:,}",
        f"{total / distinct:.1f}",
        f"{statistics.median(slow):.2f}",
        f"{statistics.median(fast):.3f}",
        f"{median_ratio(list(slow), list(fast)):.1f}",
        wanted,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHIPPED, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--questions", type=int, default=32, help="prompts of each kind (default 32)")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = "the shipped arithmetic set" if options.data == SHIPPED else "GSM8K"
    table = Table(
        "What shared beginnings save",
        "python benchmarks/shared_shots.py" + ("" if options.data == SHIPPED else " --data FOLDER"),
        [
            "what",
            "tokens, each sequence whole",
            "distinct prefixes",
            "ratio of tokens",
            "whole, s",
            "shared, s",
            "times faster",
            "wanted",
        ],
        [
            f"Prompts of {source}, the first {SHOTS} training rows as shots of every question, a tokenizer of up to {VOCABULARY:,} "
            "pieces trained on the same file; random weights, float32. Both sides run the same tokens through the same "
            f"model without padding, in rows of at most {ROW:,} tokens; logits and scores agree to 2e-4. Choices are random tokens.",
            "What limits it: the ratio of tokens grows with the number of questions up to that of a prompt to its own question, "
            "and in the global layers every question still attends to all shots.",
        ],
    )
    reached = measure_five_shots(table, options.data, options.questions, options.rounds)
    measure_choices(table, options.questions, options.rounds)
    finish(table, options.output, [] if reached >= WANTED else [f"{reached:.1f}x at 5 shots, wanted {WANTED}x"])


if __name__ == "__main__":
    main()
