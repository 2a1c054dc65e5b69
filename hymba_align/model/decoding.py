"""Batched generation: prompts of any length share their common beginning, and slots refill as sequences end.

What all prompts have in common is run once, as a cache of one row that starts every sequence. Prompts are prefilled
several at a time, as a tree where they have more in common, and put into free rows of the decoding batch; each step
then adds one token to every row.

    prefix = run_prefix(model, shared_tokens)      # or leave it to decode
    for answer in decode(model, prompts, max_new_tokens=256, stop_ids=[eos]): ...

B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from hymba_align.model.cache import HymbaCache
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.model.segments import common_tokens, share_prefixes

REFILL_SHARE = 8
"""Free rows are refilled once they are this part of the batch, so that several prompts are run together."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that prompts start with, already run."""

    tokens: tuple[int, ...]
    cache: HymbaCache
    """One row: the state after the meta tokens and `tokens`. Every use starts from it and leaves it as it is."""


@dataclass(frozen=True)
class Decoded:
    """What was generated for one prompt."""

    tokens: list[int]
    """New tokens; the last one is the stop id where one ended the sequence"""
    ended: bool
    """Whether a stop id or `stop` ended it; False where the number of new tokens ran out"""


@torch.no_grad()
def run_prefix(model: HymbaForCausalLM, tokens: Sequence[int]) -> Prefix:
    """The meta tokens and `tokens` (which may be empty), run once to start many sequences."""
    if tokens:
        ids = torch.tensor([list(tokens)], device=model.device)
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
    else:
        cache = model.model.meta_cache()
    cache.fold()
    return Prefix(tuple(tokens), cache)


@torch.no_grad()
def decode(
    model: HymbaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    on_end: Callable[[int], None] | None = None,
    batch_size: int = 32,
    prefix: Prefix | None = None,
    prefill_tokens: int = 8192,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Decoded]:
    """The continuation of each prompt, in the order given; greedy unless `temperature` is above 0.

    In float32 greedy continuations are those of each prompt alone, token for token.

    Args:
        model: a Hymba.
        prompts: token ids, at least one each, as the tokenizer gives them (with its first token, if it has one).
        max_new_tokens: at most so many new tokens, for all prompts or one number per prompt; at least 1.
        stop_ids: a sequence ends with the first of these that it generates (the end-of-text id goes here).
        stop: called with a sequence's new tokens after each one; True ends the sequence (for stop strings: decode the
            tail and look). Not called after a stop id.
        on_end: called with the number of each prompt once its continuation is complete (for progress bars).
        batch_size: sequences that decode side by side.
        prefix: what the prompts start with, if it was run before; by default what they have in common is run once.
        prefill_tokens: most prompt tokens that are run at once, unless a single prompt has more: bounds memory.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: samples from the smallest set of tokens whose probabilities reach this sum.
        generator: of random numbers for sampling, on the model's device.

    Raises:
        ValueError: an empty prompt, a prompt that does not start with `prefix`, or one that with its new tokens is longer
            than the model's `max_position_embeddings`; the message names the prompt.
    """
    if batch_size < 1 or prefill_tokens < 1:
        raise ValueError(
            f"decode: batch_size is {batch_size}, prefill_tokens {prefill_tokens}; both must be at least 1"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"decode: temperature is {temperature}, top_p {top_p}; they must be at least 0, and above 0 and at most 1"
        )
    limits = _check_lengths(prompts, max_new_tokens, model.config.max_position_embeddings)
    if not prompts:
        return []
    if prefix is None:
        prefix = run_prefix(model, _common_start(prompts))
    _check_prefix(prompts, prefix)
    draft = [
        _Sequence(number, list(prompt[len(prefix.tokens) :]), limit)
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    ending = _Ending(frozenset(stop_ids), stop, on_end)
    _run(model, prefix, draft, ending, _Sampler.build(temperature, top_p, generator), batch_size, prefill_tokens)
    return [Decoded(one.tokens, one.ended) for one in draft]


@dataclass(eq=False)
class _Sequence:
    """One prompt on its way."""

    number: int
    prompt: list[int]
    """What follows the prefix"""
    limit: int
    """new tokens at most"""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class _Ending:
    """When a sequence ends."""

    ids: frozenset[int]
    stop: Callable[[list[int]], bool] | None
    on_end: Callable[[int], None] | None

    def take(self, sequence: _Sequence, token: int) -> bool:
        """Whether the sequence goes on after this new token."""
        sequence.tokens.append(token)
        sequence.ended = token in self.ids or (self.stop is not None and self.stop(sequence.tokens))
        goes_on = not sequence.ended and len(sequence.tokens) < sequence.limit
        if not goes_on and self.on_end is not None:
            self.on_end(sequence.number)
        return goes_on


@dataclass(frozen=True)
class _Sampler:
    """Picks the next token."""

    warpers: LogitsProcessorList | None
    """None for the likeliest token"""
    generator: torch.Generator | None

    @classmethod
    def build(cls, temperature: float, top_p: float, generator: torch.Generator | None) -> _Sampler:
        if temperature == 0:
            return cls(None, generator)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        return cls(warpers, generator)

    def pick(self, logits_BV: Tensor) -> list[int]:
        if self.warpers is None:
            return logits_BV.argmax(dim=-1).tolist()
        before = cast(torch.LongTensor, torch.empty(len(logits_BV), 0, dtype=torch.int64))  # not looked at
        scores = self.warpers(before, cast(torch.FloatTensor, logits_BV.float()))
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0].tolist()


def _run(
    model: HymbaForCausalLM,
    prefix: Prefix,
    sequences: list[_Sequence],
    ending: _Ending,
    sampler: _Sampler,
    batch_size: int,
    prefill_tokens: int,
) -> None:
    """Generates every sequence's tokens. Long prompts go first: prompts run together are then about as long."""
    waiting = deque(sorted(sequences, key=lambda one: -len(one.prompt)))
    rows: list[_Sequence | None] = [None] * min(batch_size, len(sequences))
    cache = prefix.cache.expanded(len(rows))
    while waiting or any(rows):
        free = rows.count(None)
        if waiting and free >= max(1, len(rows) // REFILL_SHARE):
            _refill(model, prefix, cache, rows, waiting, ending, sampler, prefill_tokens)
            continue
        if not waiting and 4 * free >= len(rows):  # nothing comes after these: the others go on as a smaller batch
            live = [row for row, one in enumerate(rows) if one is not None]
            cache.batch_select_indices(torch.tensor(live))
            rows = [rows[row] for row in live]
        ids = torch.tensor([[0 if one is None else one.tokens[-1]] for one in rows], device=model.device)
        hidden_BTD = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
        for row, token in enumerate(sampler.pick(model.lm_head(hidden_BTD[:, -1]))):
            one = rows[row]
            if one is None or not ending.take(one, token):
                rows[row] = None
                cache.lengths[row] = len(prefix.tokens)  # a free row runs along without growing


def _refill(
    model: HymbaForCausalLM,
    prefix: Prefix,
    cache: HymbaCache,
    rows: list[_Sequence | None],
    waiting: deque[_Sequence],
    ending: _Ending,
    sampler: _Sampler,
    prefill_tokens: int,
) -> None:
    """Runs as many waiting prompts as there are free rows and tokens allow, and puts those that go on into the rows."""
    free = [row for row, one in enumerate(rows) if one is None]
    group = [waiting.popleft()]
    tokens = len(group[0].prompt)
    while waiting and len(group) < len(free) and tokens + len(waiting[0].prompt) <= prefill_tokens:
        tokens += len(waiting[0].prompt)
        group.append(waiting.popleft())
    shared = share_prefixes([one.prompt for one in group])
    last = (shared.tree.offsets + shared.tree.lengths - 1)[shared.ends]
    fresh = prefix.cache.expanded(1)
    hidden = model.model(
        input_ids=shared.token_ids[None].to(model.device),
        segments=shared.tree,
        past_key_values=fresh,
        cache_segments=shared.ends,
        positions_to_keep=last,
    ).last_hidden_state
    picked = sampler.pick(model.lm_head(hidden[0]))
    going = [number for number, token in enumerate(picked) if ending.take(group[number], token)]
    if going:
        fresh.batch_select_indices(torch.tensor(going))
        cache.put(torch.tensor(free[: len(going)]), fresh)
        for row, number in zip(free, going, strict=False):
            rows[row] = group[number]


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], context: int) -> list[int]:
    """New tokens that each prompt may get."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(
            f"decode: max_new_tokens has {len(limits)} entries for {len(prompts)} prompts; give one of each"
        )
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise ValueError(f"decode: prompts[{number}] is empty; it needs at least one token, such as the first one")
        if limit < 1:
            raise ValueError(f"decode: max_new_tokens of prompts[{number}] is {limit}; it must be at least 1")
        if len(prompt) + limit > context:
            raise ValueError(
                f"decode: prompts[{number}] has {len(prompt)} tokens and may get {limit} new ones, but the model's "
                f"context is {context} (max_position_embeddings); shorten the prompt or lower max_new_tokens"
            )
    return limits


def _common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts start with, at least one token short of each."""
    first, last = list(min(prompts, key=list)), list(max(prompts, key=list))
    most = min(map(len, prompts)) - 1
    return first[: min(most, common_tokens(np.array(first), np.array(last)))]


def _check_prefix(prompts: Sequence[Sequence[int]], prefix: Prefix) -> None:
    size = len(prefix.tokens)
    for number, prompt in enumerate(prompts):
        if tuple(prompt[:size]) != prefix.tokens:
            raise ValueError(f"decode: prompts[{number}] does not start with the {size} tokens of the prefix")
        if len(prompt) == size:
            raise ValueError(
                f"decode: prompts[{number}] is the prefix of {size} tokens and nothing else; run a shorter prefix"
            )
