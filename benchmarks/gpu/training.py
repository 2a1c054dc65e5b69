"""Training steps at 8k packed rows: SFT with AdamW, packed rows beside one sequence at a time, DPO with shared prompts.

Weights, gradients and AdamW's states are in the sizes' dtype (bfloat16 on a GPU).
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import alternate, median_ratio
from torch import Tensor

from gpu.device import measure_rates, synchronise, waited
from gpu.findings import Finding, judged
from gpu.flops import training_flops
from gpu.sizes import Sizes
from hymba_align.model import HymbaForCausalLM, SegmentTree

SFT, PACKED, DPO = "SFT", "packing", "DPO"
WANTED_UTILISATION = 0.4
WANTED_PEAK_GB = 80
WANTED_PACKED = 3.06  # PackMamba, arXiv 2408.03865, a 1.4B Mamba on A100
WANTED_SHARED = 1.6  # the best published for attention-only models
BETA = 0.1


class Trainer:
    """The model with its optimizer."""

    def __init__(self, sizes: Sizes, *, checkpointing: bool) -> None:
        torch.manual_seed(0)
        with sizes.device:
            self.model: HymbaForCausalLM = HymbaForCausalLM(sizes.config)
        self.model.to(sizes.dtype).train()
        if checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, *losses: Callable[[], Tensor]) -> list[Tensor]:
        """One optimizer step on the gradients of all losses; their values."""
        values = []
        for make_loss in losses:
            loss = make_loss()
            loss.backward()
            values.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values


def released(sizes: Sizes) -> None:
    """Gives the last trainer's memory back and starts counting peaks anew."""
    gc.collect()
    if sizes.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_ids(sizes: Sizes, tokens: int) -> Tensor:
    return torch.randint(3, sizes.config.vocab_size, (1, tokens), device=sizes.device)


# ---- SFT -------------------------------------------------------------------------------------------------------------


def sft_loss(model: HymbaForCausalLM, ids: Tensor, lengths: tuple[int, ...]) -> Callable[[], Tensor]:
    """The mean loss of documents in a row, every token trained on; no logits are kept."""
    tree = SegmentTree.from_lengths(lengths)
    return lambda: model(input_ids=ids, labels=ids, segments=tree, return_logits=False).loss


def sft(sizes: Sizes) -> Iterator[Finding]:
    """Tokens per second, utilisation and peak memory, with activations recomputed and kept."""
    rates = measure_rates(sizes)
    ids = random_ids(sizes, sizes.row_tokens)
    tree = SegmentTree.from_lengths(sizes.documents)
    for checkpointing in (True, False):
        released(sizes)
        how = "activations recomputed" if checkpointing else "activations kept"
        try:
            trainer = Trainer(sizes, checkpointing=checkpointing)
            loss = sft_loss(trainer.model, ids, sizes.documents)
            step = waited(lambda trainer=trainer, loss=loss: trainer.step(loss), sizes.device)
            spent = statistics.median(alternate({"step": step}, rounds=sizes.rounds, warmup=2)["step"])
        except torch.OutOfMemoryError as error:
            yield Finding(SFT, f"step, {how}", f"out of memory: {str(error).partition('.')[0]}", met=False)
            continue
        needed = training_flops(trainer.model, tree, sizes.row_tokens - len(sizes.documents))
        share = needed / spent / rates.multiplied
        yield judged(
            SFT,
            f"utilisation of the measured matrix rate, {how}",
            share,
            f"{share:.1%}: {sizes.row_tokens / spent:,.0f} tokens/s, {1e3 * spent:.0f} ms per step",
            least=WANTED_UTILISATION,
            smoke=sizes.smoke,
            numbers={"seconds": spent, "flops": needed, "tokens_per_second": sizes.row_tokens / spent},
        )
        yield peak_memory(sizes, how, is_judged=checkpointing)
        del trainer, loss, step


def peak_memory(sizes: Sizes, how: str, *, is_judged: bool) -> Finding:
    """Largest memory in use during the steps before."""
    what = f"peak memory, {how}"
    if sizes.device.type != "cuda":
        return Finding(SFT, what, "not measured: a CPU keeps no such count", f"≤ {WANTED_PEAK_GB} GB")
    peak = torch.cuda.max_memory_allocated() / 1e9
    if not is_judged:
        return Finding(SFT, what, f"{peak:.1f} GB", numbers={"value": peak})
    return judged(SFT, what, peak, f"{peak:.1f} GB", most=WANTED_PEAK_GB, unit=" GB", smoke=False)


# ---- packed rows beside one sequence at a time -----------------------------------------------------------------------


def packing(sizes: Sizes) -> Iterator[Finding]:
    """An optimizer step on the same documents in one row and one after the other."""
    released(sizes)
    trainer = Trainer(sizes, checkpointing=False)
    ids = random_ids(sizes, sizes.row_tokens)
    alone = [sft_loss(trainer.model, part, (part.shape[1],)) for part in ids.split(list(sizes.documents), dim=1)]
    together = sft_loss(trainer.model, ids, sizes.documents)
    with torch.no_grad():  # the mean over a row's scored tokens is the documents' means, weighted
        weights = torch.tensor([length - 1.0 for length in sizes.documents], device=sizes.device)
        expected = torch.stack([loss().float() for loss in alone]) @ weights / weights.sum()
        torch.testing.assert_close(together().float(), expected, atol=0.02, rtol=0)
    sides = {
        "alone": waited(lambda: trainer.step(*alone), sizes.device),
        "together": waited(lambda: trainer.step(together), sizes.device),
    }
    spent = alternate(sides, rounds=sizes.rounds, warmup=2)
    ratio = median_ratio(spent["alone"], spent["together"])
    yield judged(
        PACKED,
        f"{len(sizes.documents)} documents in one row beside one at a time",
        ratio,
        f"{ratio:.2f}x: {1e3 * statistics.median(spent['together']):.0f} ms beside {1e3 * statistics.median(spent['alone']):.0f} ms",
        least=WANTED_PACKED,
        unit="x",
        smoke=sizes.smoke,
    )


# ---- DPO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceRow:
    """Pairs in one row, with the answers' tokens and where they are predicted."""

    ids: Tensor
    tree: SegmentTree
    predicting: Tensor
    """(A,) positions whose logits predict an answer's token"""
    targets: Tensor
    """(A,) these tokens"""
    answers: Tensor
    """(A,) the answer of each: chosen and rejected of the first pair, of the second, ..."""

    @classmethod
    def build(cls, prompts: list[Tensor], answers: list[tuple[Tensor, Tensor]], *, shared: bool) -> PreferenceRow:
        """Pairs with the prompt once, or before each of its answers."""
        pieces: list[Tensor] = []
        is_answer: list[Tensor] = []
        lengths: list[int] = []
        parents: list[int] = []
        for prompt, pair in zip(prompts, answers, strict=True):
            if shared:
                root = len(lengths)
                parts = [(prompt, 0, -1), *((answer, len(answer), root) for answer in pair)]
            else:
                parts = [(torch.cat([prompt, answer]), len(answer), -1) for answer in pair]
            for tokens, scored, parent in parts:
                pieces.append(tokens)
                is_answer.append(torch.arange(len(tokens)) >= len(tokens) - scored)
                lengths.append(len(tokens))
                parents.append(parent)
        tree = SegmentTree(torch.tensor(lengths), torch.tensor(parents))
        ids = torch.cat(pieces)
        places = torch.cat(is_answer).nonzero().flatten()
        sizes = torch.tensor([len(answer) for pair in answers for answer in pair])
        return cls(
            ids[None],
            tree,
            tree.predecessors()[places].to(ids.device),
            ids[places.to(ids.device)],
            torch.arange(len(sizes)).repeat_interleave(sizes).to(ids.device),
        )

    def loss(self, model: HymbaForCausalLM) -> Tensor:
        """Summed DPO loss; the reference's log-probabilities are 0. Source: DPO (arXiv 2305.18290), equation 7."""
        hidden = model.model(
            input_ids=self.ids, segments=self.tree, positions_to_keep=self.predicting, use_cache=False
        ).last_hidden_state[0]
        scores = -F.cross_entropy(model.lm_head(hidden).float(), self.targets, reduction="none")
        sums = scores.new_zeros(int(self.answers[-1]) + 1).index_add(0, self.answers, scores)
        chosen, rejected = sums.view(-1, 2).unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).sum()


def dpo(sizes: Sizes) -> Iterator[Finding]:
    """Pairs with shared prompts in one row, beside one pair at a time with the prompt before each answer."""
    released(sizes)
    rates = measure_rates(sizes)
    trainer = Trainer(sizes, checkpointing=False)
    prompts = [random_ids(sizes, sizes.prompt)[0] for _ in range(sizes.pairs)]
    answers = [(random_ids(sizes, sizes.answer)[0], random_ids(sizes, sizes.answer)[0]) for _ in range(sizes.pairs)]
    shared = PreferenceRow.build(prompts, answers, shared=True)
    apart = PreferenceRow.build(prompts, answers, shared=False)
    singles = [
        PreferenceRow.build([prompt], [pair], shared=False) for prompt, pair in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        losses = [sum(row.loss(trainer.model) for row in rows) for rows in ([shared], [apart], singles)]
        torch.testing.assert_close(losses[1:], [losses[0]] * 2, atol=0.1 * sizes.pairs, rtol=0.02)
    sides = {
        name: waited(
            lambda rows=rows: trainer.step(*(lambda row=row: row.loss(trainer.model) for row in rows)), sizes.device
        )
        for name, rows in {"shared": [shared], "apart": [apart], "single": singles}.items()
    }
    spent = alternate(sides, rounds=sizes.rounds, warmup=2)
    synchronise(sizes.device)
    own = statistics.median(spent["shared"])
    needed = training_flops(trainer.model, shared.tree, len(shared.targets))
    trained = sizes.pairs * 2 * (sizes.prompt + sizes.answer)
    share = needed / own / rates.multiplied
    yield judged(
        DPO,
        f"utilisation of the measured matrix rate, {sizes.pairs} pairs of {sizes.prompt} + 2 x {sizes.answer} tokens in a row",
        share,
        f"{share:.1%}: {shared.tree.num_tokens / own:,.0f} tokens/s run, {trained / own:,.0f} tokens/s with prompts "
        f"counted for each answer, {1e3 * own:.0f} ms per step",
        least=WANTED_UTILISATION,
        smoke=sizes.smoke,
        numbers={"seconds": own, "flops": needed},
    )
    ratio = median_ratio(spent["single"], spent["shared"])
    yield judged(
        DPO,
        "shared prompts and packing beside one pair at a time with the prompt twice",
        ratio,
        f"{ratio:.2f}x",
        least=WANTED_SHARED,
        unit="x",
        smoke=sizes.smoke,
    )
    alone = median_ratio(spent["apart"], spent["shared"])
    most = apart.tree.num_tokens / shared.tree.num_tokens
    yield Finding(
        DPO,
        "shared prompts beside the same pairs in one row with the prompt twice",
        f"{alone:.2f}x; {most:.2f}x fewer tokens",
        numbers={"value": alone},
    )
