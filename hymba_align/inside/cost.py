"""What decoding costs: bytes of the cache and tokens per second over context length, beside a transformer.

Bytes come from a formula, and from the tensors of a cache that was filled. Throughput at a context is that of the last
`steps` tokens up to it: both models decode greedily from filled caches, by turns, on the same device, with the same
number type, threads and batch. A prompt of 8,192 tokens takes a large model minutes on a CPU, and what a step costs does
not depend on values: so both caches are filled with random keys and values, behind the checkpoint's real meta tokens.

What the paper's 11.67 counts does not follow from its abstract. For Hymba-1.5B at 8,192 tokens in bfloat16 our cache
is 10.92 times smaller than Llama-3.2-3B's, because it also holds convolution tails and SSM states (float32); 11.91 times
in keys and values alone. A count that gives 11.67 has 8,000 tokens, keys and values, and four taps of convolution input
per channel in place of tails and states (tests/inside/test_cost.py); that the paper counts so is a guess.
Its 3.49 was measured on other hardware with other software.
Source: Hymba (arXiv 2411.13676), abstract.

B sequences, L tokens of all sequences, G key/value heads, d query/key head size, e value head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hymba_align.errors import UsageError
from hymba_align.hardware import ROOM, machine_bytes
from hymba_align.inference.serving_memory import cache_bytes
from hymba_align.inside.result import CacheCost, Cost, DecodeCost
from hymba_align.inside.showing import display, one_more
from hymba_align.inside.transformer import (
    build_transformer,
    describe,
    fill_transformer_cache,
    held_bytes,
    rewind,
    transformer_cache_bytes,
    transformer_config,
)
from hymba_align.memory import gib
from hymba_align.model.cache import HymbaCache, LayerUpdate
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.modeling import HymbaModel
from hymba_align.model.segments import SegmentTree
from hymba_align.progress import Display

CONTEXTS = (512, 2048, 8192)
STEPS = 8
ROUNDS = 5


def default_contexts(config: HymbaConfig) -> tuple[int, ...]:
    """`CONTEXTS`, those above the model's own context replaced by it."""
    return tuple(sorted({min(context, config.max_position_embeddings) for context in CONTEXTS}))


def check_contexts(config: HymbaConfig, contexts: Sequence[int], *, steps: int = STEPS) -> None:
    """Refuses contexts that cannot be measured.

    Raises:
        UsageError: one that the model does not take, that has no room for the steps, or that is named twice.
    """
    most, least = config.max_position_embeddings, steps + 2
    for context in contexts:
        if context > most:
            raise UsageError(
                f"--contexts names {context}, but the checkpoint's context is {most} (max_position_embeddings); "
                f"name none above {most}"
            )
        if context < least:
            raise UsageError(
                f"--contexts names {context}, but {steps} tokens are decoded up to it, behind at least two; "
                f"name none below {least}"
            )
        if list(contexts).count(context) > 1:
            raise UsageError(f"--contexts names {context} twice; name it once")


@torch.no_grad()
def measure_cost(
    model: nn.Module,
    *,
    contexts: Sequence[int] = (),
    batch_size: int = 1,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> Cost:
    """Cache and throughput of a Hymba at each context, shortest first, beside a transformer.

    A context for which the memory does not suffice has its formulas only, and `not_timed` says why.

    Args:
        model: a Hymba, or one with adapters.
        contexts: text tokens; none of them for `default_contexts`.
        batch_size: B, of the throughput; bytes are those of one sequence.
        rounds: timed turns of each model, at least one.
        steps: tokens per turn and sequence, at least one.

    Raises:
        UsageError: as `check_contexts`.
    """
    body = _body(model)
    dtype, device = body.memory_tokens.dtype, body.memory_tokens.device
    contexts = tuple(sorted(contexts)) or default_contexts(body.config)
    check_contexts(body.config, contexts, steps=steps)
    beside = transformer_config(body.config)
    transformer = describe(beside)
    sides = _Sides(model, body, beside, transformer.parameters * dtype.itemsize, batch_size, steps)
    room = free_bytes(device)
    held, timed = (tuple(c for c in contexts if need(c) <= room) for need in (sides.held_bytes, sides.timed_bytes))
    return Cost(
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        rounds=rounds,
        steps=steps,
        parameters=sum(one.numel() for one in model.parameters()),
        transformer=transformer,
        cache=tuple(sides.cache_cost(context, context in held) for context in contexts),
        decode=sides.decode_costs(timed, rounds),
        not_timed=_not_timed([c for c in contexts if c not in timed], sides, room),
    )


def _not_timed(contexts: Sequence[int], sides: _Sides, room: int) -> str:
    if not contexts:
        return ""
    at_least = "at least " if len(contexts) > 1 else ""
    return (
        f"At {', '.join(f'{one:,}' for one in contexts)} tokens nothing was timed: the transformer's weights "
        f"({gib(sides.weights)} GiB) and both caches take {at_least}{gib(sides.timed_bytes(min(contexts)))} GiB, "
        f"but {gib(room)} GiB are free on {sides.device}."
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can be used beside what is in use already."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(ROOM * (torch.cuda.mem_get_info(device)[0] + kept))
    own = psutil.Process().memory_info().rss
    return int(min(ROOM * machine_bytes() - own, ROOM * psutil.virtual_memory().available))


@dataclass(frozen=True)
class _Sides:
    """Both models, and what they are measured with."""

    model: nn.Module
    body: HymbaModel
    beside: LlamaConfig
    weights: int
    """Bytes of the transformer's"""
    batch_size: int
    steps: int

    @property
    def dtype(self) -> torch.dtype:
        return self.body.memory_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.body.memory_tokens.device

    def cache_bytes(self, rows: int, tokens: int) -> tuple[int, int]:
        """By the formulas, the checkpoint's and the transformer's."""
        ours = cache_bytes(self.body.config, rows, tokens, self.dtype)
        return ours, transformer_cache_bytes(self.beside, rows, tokens, self.dtype)

    def held_bytes(self, context: int) -> int:
        """Memory in which a cache of each can be filled, one after the other, from one layer's keys and values."""
        layer = 2 * self.cache_bytes(1, context)[1] // self.beside.num_hidden_layers
        return max(self.cache_bytes(1, context)) + layer

    def timed_bytes(self, context: int) -> int:
        """Memory in which both decode: the transformer's weights, both caches, and a copy of the checkpoint's.

        For a moment the transformer's head is there too, before it is tied to the embeddings.
        """
        ours, theirs = self.cache_bytes(self.batch_size, context)
        head = self.beside.vocab_size * self.beside.hidden_size * self.dtype.itemsize
        return self.weights + max(head, 2 * ours + theirs + theirs // self.beside.num_hidden_layers)

    def cache_cost(self, context: int, filled: bool) -> CacheCost:
        """Bytes of one sequence; measured ones of caches that are filled here, one after the other."""
        config = self.body.config
        ours, theirs = self.cache_bytes(1, context)
        measured = transformer_measured = None
        if filled:
            measured = fill_cache(self.body, 1, context).num_bytes
            transformer_measured = held_bytes(
                fill_transformer_cache(self.beside, 1, context, context, self.dtype, self.device)
            )
        return CacheCost(
            context=context,
            formula=ours,
            keys_values=ours - state_bytes(config, self.dtype),
            measured=measured,
            transformer_formula=theirs,
            transformer_measured=transformer_measured,
        )

    def decode_costs(self, contexts: Sequence[int], rounds: int) -> tuple[DecodeCost, ...]:
        """Throughput at each context."""
        if not contexts:
            return ()
        turns = 2 * len(contexts) * (1 + rounds)  # and one that does not count
        with display("Decoding beside a transformer", turns, "turns") as shown:
            transformer = build_transformer(self.beside, self.dtype, self.device)
            return tuple(self._decode_cost(transformer, context, rounds, shown) for context in contexts)

    def _decode_cost(self, transformer: nn.Module, context: int, rounds: int, shown: Display) -> DecodeCost:
        tokens = context - self.steps - 1  # then a step that nobody times, and those that are timed
        rows = torch.arange(self.batch_size)
        filled = fill_cache(self.body, self.batch_size, tokens)
        beside = fill_transformer_cache(self.beside, self.batch_size, tokens, context, self.dtype, self.device)

        def ours() -> float:
            return self._seconds(self.model, filled.selected(rows))

        def theirs() -> float:
            rewind(beside, tokens)
            return self._seconds(transformer, beside)

        seconds = _take_turns((ours, theirs), rounds, partial(one_more, shown))
        rates = [[self.batch_size * self.steps / one for one in side] for side in seconds]
        ratios = [one / other for one, other in zip(*rates, strict=True)]
        return DecodeCost(
            context=context,
            tokens_per_second=statistics.median(rates[0]),
            transformer_tokens_per_second=statistics.median(rates[1]),
            ratio=statistics.median(ratios),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
        )

    def _seconds(self, model: nn.Module, cache: object) -> float:
        """Time of the steps, after one more."""
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else lambda: None
        ids_B1 = self._step(model, cache, torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.device))
        wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            ids_B1 = self._step(model, cache, ids_B1)
        wait()
        return time.perf_counter() - start

    @staticmethod
    def _step(model: nn.Module, cache: object, ids_B1: Tensor) -> Tensor:
        """The likeliest next token of each sequence."""
        logits: Tensor = model(input_ids=ids_B1, past_key_values=cache, use_cache=True).logits
        return logits.argmax(-1)


def _take_turns(
    sides: Sequence[Callable[[], float]], rounds: int, ended: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """What each side gives in each round, after a call that does not count; every second round runs backwards.

    Args:
        ended: called after each turn, between what is timed.
    """
    for side in sides:
        side()
        ended()
    given: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        order = range(len(sides))
        for number in reversed(order) if turn % 2 else order:
            given[number].append(sides[number]())
            ended()
    return given


# ---- the checkpoint's cache ------------------------------------------------------------------------------------------


def state_bytes(config: HymbaConfig, dtype: torch.dtype) -> int:
    """Memory of one sequence's convolution tails and SSM states, which does not grow with the text."""
    tail = (config.mamba_d_conv - 1) * dtype.itemsize
    return config.num_hidden_layers * config.inner_size * (tail + config.mamba_d_state * torch.float32.itemsize)


@torch.no_grad()
def fill_cache(body: HymbaModel, rows: int, tokens: int) -> HymbaCache:
    """A cache of so many sequences of so many tokens with random keys and values, taken in as a forward pass would.

    Meta tokens, convolution tails and SSM states are those of a sequence that stands behind the meta tokens.
    """
    config, meta = body.config, body.memory_tokens
    cache = body.meta_cache().expanded(rows)
    generator = torch.Generator(meta.device).manual_seed(0)
    k_LGd, v_LGe = (
        torch.randn(
            rows * tokens,
            config.num_key_value_heads,
            size,
            generator=generator,
            dtype=meta.dtype,
            device=meta.device,
        )
        for size in (config.head_dim, config.v_head_dim)
    )
    updates = [LayerUpdate(k_LGd, v_LGe, state.conv_tail, state.ssm_state) for state in cache.states]
    cache.commit(updates, SegmentTree.from_lengths([tokens] * rows), torch.arange(rows), tokens)
    return cache


def _body(model: nn.Module) -> HymbaModel:
    """The layers behind the meta tokens, wherever in the model they are."""
    found = next((module for module in model.modules() if isinstance(module, HymbaModel)), None)
    if found is None:
        raise ValueError(f"a {type(model).__name__} holds no Hymba")
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
