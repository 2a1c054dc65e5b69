"""Bytes of caches beside filled ones, and throughput on a clock and on models that are watched while they decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hymba_align.errors import UsageError
from hymba_align.inference.serving_memory import cache_bytes
from hymba_align.inside import cost as cost_module
from hymba_align.inside.cost import check_contexts, default_contexts, fill_cache, measure_cost, state_bytes
from hymba_align.inside.result import Cost
from hymba_align.inside.transformer import transformer_cache_bytes, transformer_config
from hymba_align.model import HymbaCache, HymbaConfig, HymbaForCausalLM

TINY = Path(__file__).parent.parent / "golden" / "tiny"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model() -> HymbaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def bf16_model() -> HymbaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=BF16).eval()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_the_cache_of_hymba_1_5b_is_10_92_times_smaller_than_that_of_llama_3_2_3b_and_11_91_times_without_states() -> (
    None
):
    config = HymbaConfig()
    ours = cache_bytes(config, 1, 8192, BF16)
    beside = transformer_cache_bytes(transformer_config(config), 1, 8192, BF16)
    assert beside == 28 * 8192 * 8 * (128 + 128) * 2
    # 3 global layers and 14 local key/value sets of 5 heads with 64 + 128 numbers; 32 layers with tails and float32 states.
    keys_values = (3 * (128 + 8192) + 14 * (128 + 1024)) * 5 * (64 + 128) * 2
    states = 32 * 3200 * (3 * 2 + 16 * 4)
    assert (ours, state_bytes(config, BF16)) == (keys_values + states, states)
    assert (round(beside / ours, 2), round(beside / keys_values, 2)) == (10.92, 11.91)


def test_the_papers_11_67_comes_out_of_8000_tokens_with_four_taps_and_no_ssm_states() -> None:
    beside = 28 * 8000 * 8 * (128 + 128) * 2
    keys_values = (3 * (128 + 8000) + 14 * (128 + 1024)) * 5 * (64 + 128) * 2
    taps = 32 * 3200 * 4 * 2
    assert round(beside / (keys_values + taps), 2) == Cost.paper_cache_ratio
    assert round(beside / keys_values, 2) == 11.80  # so neither the length alone
    assert round(beside / (keys_values + taps + 32 * 3200 * 16 * 2), 2) == 11.21  # nor SSM states in 16 bits explain it


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("tokens", [3, 40])  # within the window of 16, and beyond it
def test_a_filled_cache_is_built_as_that_of_a_prompt(
    tokens: int, dtype: torch.dtype, model: HymbaForCausalLM, bf16_model: HymbaForCausalLM
) -> None:
    one = model if dtype == torch.float32 else bf16_model
    with torch.no_grad():
        real = one(input_ids=torch.randint(3, 200, (2, tokens)), use_cache=True).past_key_values
    filled = fill_cache(one.model, 2, tokens)
    assert shapes(filled) == shapes(real)
    assert filled.num_bytes == real.num_bytes == cache_bytes(one.config, 2, tokens, dtype)
    assert (filled.lengths.tolist(), filled.columns) == (real.lengths.tolist(), real.columns)
    for mine, theirs in zip(filled.states, real.states, strict=True):
        if mine.key_values is not None and theirs.key_values is not None:
            # Meta keys of the two may differ by the order of sums; observed 0 in both.
            atol = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(mine.key_values.shared, theirs.key_values.shared, atol=atol, rtol=0)


def shapes(cache: HymbaCache) -> list[Any]:
    """Shape and type of every tensor."""
    tensors: list[Any] = []
    for state in cache.states:
        stored = state.key_values
        tensors += [state.conv_tail, state.ssm_state, *([stored.keys, stored.values, *stored.shared] if stored else [])]
    return [(tuple(one.shape), one.dtype) for one in tensors]


def test_measured_bytes_are_those_of_the_formulas(model: HymbaForCausalLM, bf16_model: HymbaForCausalLM) -> None:
    for one, size in ((model, 4), (bf16_model, 2)):
        found = measure_cost(one, contexts=(16, 512), batch_size=3, rounds=1, steps=1)
        assert [each.context for each in found.cache] == [16, 512]
        for each in found.cache:  # of one sequence, whatever the batch is
            assert each.measured == each.formula == cache_bytes(one.config, 1, each.context, one.dtype)
            # 5 of 6 layers have keys of their own, of 16 + 32 numbers: 3 global ones, 2 with a window of 16
            assert each.keys_values == (3 * (8 + each.context) + 2 * (8 + 16)) * 48 * size
            # 5 layers, 2 heads of 32
            assert each.transformer_measured == each.transformer_formula == 5 * each.context * 2 * 2 * 32 * size
        assert (found.dtype, found.batch_size) == (str(one.dtype).removeprefix("torch."), 3)


# ---- throughput ------------------------------------------------------------------------------------------------------


class Watched:
    """Notes how many tokens each forward pass of a model saw, itself included."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[list[int]] = []
        self.handle = model.register_forward_hook(self.note, with_kwargs=True)

    def note(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs["past_key_values"]
        lengths = cache.lengths.tolist() if isinstance(cache, HymbaCache) else [int(cache.get_seq_length())]
        assert kwargs["input_ids"].shape == (2, 1)
        self.seen.append(lengths)


@pytest.fixture
def watched(model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watched, list[Watched]]]:
    """The checkpoint, and the transformers that are built beside it."""
    transformers: list[Watched] = []
    build = cost_module.build_transformer

    def watch(*arguments: Any) -> nn.Module:
        built = build(*arguments)
        transformers.append(Watched(built))
        return built

    monkeypatch.setattr(cost_module, "build_transformer", watch)
    ours = Watched(model)
    yield ours, transformers
    ours.handle.remove()


def test_both_decode_the_last_tokens_up_to_the_context_in_every_round(
    model: HymbaForCausalLM, watched: tuple[Watched, list[Watched]]
) -> None:
    found = measure_cost(model, contexts=(40, 20), batch_size=2, rounds=2, steps=3)
    ours, (theirs,) = watched
    # Each context: a call that does not count and two rounds, of a step that nobody times and three that are.
    calls = [*[17, 18, 19, 20] * 3, *[37, 38, 39, 40] * 3]
    assert ours.seen == [[length, length] for length in calls]
    assert theirs.seen == [[length] for length in calls]
    assert [each.context for each in found.decode] == [20, 40]
    for each in found.decode:
        assert 0 < each.ratio_low <= each.ratio <= each.ratio_high
        assert min(each.tokens_per_second, each.transformer_tokens_per_second) > 0


def test_throughput_is_the_median_and_the_ratio_that_of_rounds(
    model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"ours": iter([99.0, 2.0, 4.0, 1.0]), "theirs": iter([99.0, 2.0, 20.0, 4.0])}  # the first is the warm-up
    turns = []

    def seconds(sides: Any, decoding: nn.Module, cache: object) -> float:
        side = "ours" if decoding is model else "theirs"
        turns.append(side)
        return next(clock[side])

    monkeypatch.setattr(cost_module._Sides, "_seconds", seconds)
    (found,) = measure_cost(model, contexts=(40,), batch_size=3, rounds=3, steps=8).decode
    assert turns == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (found.tokens_per_second, found.transformer_tokens_per_second) == (24 / 2, 24 / 4)
    assert (found.ratio_low, found.ratio, found.ratio_high) == (1, 4, 5)  # the medians' ratio is 2


def test_time_is_that_of_the_steps_without_the_first(model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def step(decoding: nn.Module, cache: object, ids: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 7.0 if now == 0 else 0.5
        return ids

    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: now)
    monkeypatch.setattr(cost_module._Sides, "_step", staticmethod(step))
    sides = cost_module._Sides(model, model.model, transformer_config(model.config), 0, 1, 6)
    assert sides._seconds(model, None) == 6 * 0.5


def test_adapters_that_are_not_merged_are_timed_and_counted(model: HymbaForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(TINY).eval()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj"])).eval()
    found = measure_cost(adapted, contexts=(20,), rounds=1, steps=1)
    whole = measure_cost(model, contexts=(20,), rounds=1, steps=1)
    outputs = sum(layer.mamba.in_proj.out_features for layer in base.model.layers)
    assert found.parameters == whole.parameters + 2 * (6 * 80 + outputs)
    assert found.cache == whole.cache
    assert len(found.decode) == 1


def test_neither_the_model_nor_random_numbers_are_touched(model: HymbaForCausalLM) -> None:
    before = {name: one.clone() for name, one in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measure_cost(model, contexts=(20,), rounds=1, steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_model_without_a_hymba_in_it_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^a Linear holds no Hymba$"):
        measure_cost(nn.Linear(2, 2))


# ---- what cannot be measured -----------------------------------------------------------------------------------------


def test_hymba_1_5b_where_memory_is_short_has_formulas_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        released = HymbaForCausalLM(HymbaConfig()).to(BF16)
    monkeypatch.setattr(cost_module, "free_bytes", lambda device: 5 * 2**20)  # not even for a cache
    found = measure_cost(released)
    assert (found.parameters, found.transformer.parameters) == (1_522_797_824, 3_212_749_824)
    assert found.decode == ()
    assert found.not_timed == (
        "At 512, 2,048, 8,192 tokens nothing was timed: the transformer's weights (6.0 GiB) and both caches take at least "
        "6.7 GiB, but 0.00 GiB are free on meta."
    )
    assert [(each.context, each.measured, each.transformer_measured) for each in found.cache] == [
        (context, None, None) for context in (512, 2048, 8192)
    ]
    assert round(found.cache[-1].ratio, 2) == 10.92
    assert round(found.cache[-1].keys_values_ratio, 2) == 11.91


def test_caches_are_measured_where_only_the_transformers_weights_find_no_room(
    model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(cost_module, "build_transformer", lambda *arguments: pytest.fail("there is no room for it"))
    found = measure_cost(model, contexts=(20, 128, 512))
    assert found.decode == ()
    assert [each.measured is not None for each in found.cache] == [True, True, False]


def test_contexts_with_enough_memory_are_timed_all_the_same(
    model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "free_bytes", lambda device: 6_000_000)
    found = measure_cost(model, contexts=(512, 20), rounds=1, steps=1)
    assert [each.context for each in found.decode] == [20]
    assert found.not_timed.startswith("At 512 tokens nothing was timed: ")


def test_free_memory_is_less_than_the_machines_own() -> None:
    free = cost_module.free_bytes(torch.device("cpu"))
    assert 0 < free < cost_module.machine_bytes()


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (
            (128, 513),
            "--contexts names 513, but the checkpoint's context is 512 (max_position_embeddings); name none above 512",
        ),
        ((9,), "--contexts names 9, but 8 tokens are decoded up to it, behind at least two; name none below 10"),
        ((64, 128, 64), "--contexts names 64 twice; name it once"),
    ],
)
def test_contexts_that_cannot_be_measured_are_refused(
    contexts: tuple[int, ...], message: str, model: HymbaForCausalLM
) -> None:
    with pytest.raises(UsageError) as error:
        measure_cost(model, contexts=contexts)
    assert str(error.value) == message


def test_the_least_and_the_longest_context_can_be_measured(model: HymbaForCausalLM) -> None:
    check_contexts(model.config, (10, 512))
    found = measure_cost(model, contexts=(10, 512), rounds=1)
    assert [each.context for each in found.decode] == [10, 512]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(8192, (512, 2048, 8192)), (32768, (512, 2048, 8192)), (3000, (512, 2048, 3000)), (512, (512,)), (64, (64,))],
)
def test_contexts_by_default_end_at_the_models_own(most: int, expected: tuple[int, ...]) -> None:
    config = HymbaConfig(max_position_embeddings=most, orig_max_position_embeddings=min(most, 2048))
    assert default_contexts(config) == expected
