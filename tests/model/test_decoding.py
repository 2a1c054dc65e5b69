"""Batched decoding with refilled slots equals decoding each prompt alone, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding

from hymba_align.model import HymbaCache, HymbaConfig, HymbaForCausalLM
from hymba_align.model.decoding import Decoded, decode, run_prefix

VOCABULARY = 61


def alone(model: HymbaForCausalLM, prompt: Sequence[int], limit: int, stop_ids: Sequence[int] = ()) -> Decoded:
    """The prompt's continuation, run from the start for every token, without any cache."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < limit and not (tokens and tokens[-1] in stop_ids):
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return Decoded(tokens, tokens[-1] in stop_ids)


def ids(seed: int, count: int, vocabulary: int = VOCABULARY) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_prompts_in_any_batch_get_the_tokens_that_each_gets_alone(
    small_model: HymbaForCausalLM, data: st.DataObject
) -> None:
    common = ids(1, data.draw(st.sampled_from([0, 1, 5, 9, 30])))  # the window is 6
    vocabulary = data.draw(st.sampled_from([2, VOCABULARY]))  # with 2, prompts share more than their beginning
    count = data.draw(st.integers(1, 7))
    prompts = [common + ids(seed, data.draw(st.integers(1, 12)), vocabulary) for seed in range(count)]
    limits = [data.draw(st.integers(1, 16)) for _ in prompts]
    stop_ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=4))
    found = decode(
        small_model,
        prompts,
        max_new_tokens=limits,
        stop_ids=stop_ids,
        batch_size=data.draw(st.integers(1, 8)),
        prefill_tokens=data.draw(st.sampled_from([1, 20, 8192])),
    )
    assert found == [alone(small_model, *one, stop_ids) for one in zip(prompts, limits, strict=True)]


@pytest.mark.parametrize(
    "kinds",
    [
        {"global_attn_idx": [], "kv_reuse_group": [[0, 1, 2], [3, 4]]},
        {"global_attn_idx": [0, 1, 2, 3, 4], "kv_reuse_group": [[1, 2]]},
    ],
    ids=["all local", "all global"],
)
@pytest.mark.parametrize("common", [0, 3, 20])  # the window is 6
def test_models_with_one_kind_of_layers_decode_as_others_do(
    small_config: HymbaConfig, kinds: dict[str, Any], common: int
) -> None:
    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig(**{**small_config.to_dict(), **kinds})).eval()
    prompts = [ids(9, common) + ids(seed, length) for seed, length in enumerate([1, 4, 9, 4])]
    found = decode(model, prompts, max_new_tokens=[12, 1, 9, 12], batch_size=2)
    assert found == [alone(model, prompt, limit) for prompt, limit in zip(prompts, [12, 1, 9, 12], strict=True)]


def test_a_stop_id_in_the_prompt_ends_nothing_and_one_that_comes_first_ends_before_any_step(
    small_model: HymbaForCausalLM,
) -> None:
    steps = watch_steps(small_model)
    prompts = [ids(seed, 5) for seed in range(3)]
    firsts = [alone(small_model, prompt, 1).tokens[0] for prompt in prompts]
    steps.clear()
    assert decode(small_model, prompts, max_new_tokens=9, stop_ids=firsts) == [
        Decoded([first], ended=True) for first in firsts
    ]
    assert not steps
    unused = next(token for token in range(VOCABULARY) if token not in alone(small_model, prompts[0], 9).tokens)
    prompt = [unused, *prompts[0]]
    found = decode(small_model, [prompt], max_new_tokens=3, stop_ids=[unused])
    assert found == [alone(small_model, prompt, 3, [unused])]
    assert len(found[0].tokens) == 3


def test_half_precision_takes_tokens_that_are_the_likeliest_up_to_rounding(small_model: HymbaForCausalLM) -> None:
    model = small_model.to(torch.bfloat16)
    prompts = [ids(19, 8) + ids(seed, length) for seed, length in enumerate([1, 7, 12, 1, 7, 12], start=5)]
    for prompt, answer in zip(prompts, decode(model, prompts, max_new_tokens=20, batch_size=2), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        taken = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        below = (logits.max(dim=1).values - taken).float() / logits.float().std()
        assert below.max() < 0.1  # of the logits' standard deviation; observed 0.025


def test_tokens_are_those_of_transformers_generate(small_model: HymbaForCausalLM) -> None:
    prompts = [ids(seed, length) for seed, length in enumerate([3, 17, 8])]
    found = decode(small_model, prompts, max_new_tokens=20, batch_size=2)
    for prompt, answer in zip(prompts, found, strict=True):
        output = small_model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert answer.tokens == output[0, len(prompt) :].tolist()


def watch_steps(model: HymbaForCausalLM) -> list[tuple[int, HymbaCache]]:
    """Rows and cache of every step of one token per row, as they happen."""
    steps: list[tuple[int, HymbaCache]] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if "past_key_values" in inputs and inputs["input_ids"].shape[1] == 1:
            steps.append((len(inputs["input_ids"]), inputs["past_key_values"]))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return steps


def test_a_slot_takes_the_next_prompt_as_soon_as_its_sequence_ends(small_model: HymbaForCausalLM) -> None:
    steps = watch_steps(small_model)
    limits = [21, 6, 6, 6, 6]  # the first token comes from the prompt: 20 steps, and 4 times 5
    ended: list[int] = []
    complete: dict[int, Decoded] = {}
    answers = decode(
        small_model,
        [[7, n, 2] for n in range(5)],
        max_new_tokens=limits,
        batch_size=2,
        on_end=lambda number, answer: (ended.append(number), complete.update({number: answer})),
    )
    assert [rows for rows, _ in steps] == [
        2
    ] * 20  # both slots busy until the end: not one step more than the work needs
    assert sorted(ended) == [0, 1, 2, 3, 4]
    assert [complete[number] for number in range(5)] == answers
    assert ended[:3] == [1, 2, 3], "each is handed over when it ends"


def test_what_all_prompts_begin_with_runs_once_and_what_some_share_runs_once_per_group(
    small_model: HymbaForCausalLM,
) -> None:
    run: list[int] = []
    small_model.model.layers[0].register_forward_pre_hook(lambda _, inputs: run.append(len(inputs[0])))
    shots, group = ids(0, 40), ids(1, 10)
    prompts = [[*shots, 1, *group, 3, 5], [*shots, 1, *group, 4], [*shots, 2, 6]]
    decode(small_model, prompts, max_new_tokens=1)
    meta = small_model.config.num_memory_tokens
    assert run == [meta + 40, 11 + 2 + 1 + 2]


def test_prompts_run_longest_first_and_together_only_up_to_a_number_of_tokens(small_model: HymbaForCausalLM) -> None:
    run: list[int] = []
    small_model.model.layers[0].register_forward_pre_hook(lambda _, inputs: run.append(len(inputs[0])))
    prompts = [[number, *ids(number, length - 1)] for number, length in enumerate([3, 9, 5, 12, 4])]
    decode(small_model, prompts, max_new_tokens=1, prefill_tokens=10)
    assert run[1:] == [12, 9, 5 + 4, 3]  # after the meta tokens; one prompt alone may have more


def test_prompts_that_share_most_stay_together_and_what_they_share_counts_once(small_model: HymbaForCausalLM) -> None:
    run: list[int] = []
    small_model.model.layers[0].register_forward_pre_hook(lambda _, inputs: run.append(len(inputs[0])))
    long, short = [1, *ids(0, 29)], [2, *ids(1, 19)]
    prompts = [[*block, *[n] * n] for n in (1, 2, 3) for block in (short, long)]
    decode(small_model, [[8], *prompts, [9, 9, 9]], max_new_tokens=1, prefill_tokens=36)
    assert run[1:] == [30 + 1 + 2 + 3, 20 + 1 + 2 + 3 + 3 + 1]  # after the meta tokens


def test_a_prefix_is_reused_and_left_as_it_is(small_model: HymbaForCausalLM) -> None:
    shots = ids(0, 25)
    prefix = run_prefix(small_model, shots)
    prompts = [[*shots, 3], [*shots, *ids(2, 9)]]
    expected = [alone(small_model, prompt, 12) for prompt in prompts]
    held = [tensor.clone() for tensor in tensors_of(prefix.cache)]
    for _ in range(2):
        assert decode(small_model, prompts, max_new_tokens=12, prefix=prefix) == expected
    assert prefix.cache.lengths.tolist() == [25]
    assert all(torch.equal(*pair) for pair in zip(held, tensors_of(prefix.cache), strict=True))


def tensors_of(cache: HymbaCache) -> list[Tensor]:
    tensors = []
    for state in cache.states:
        tensors += [state.conv_tail, state.ssm_state]
        if state.key_values is not None:
            tensors += [*state.key_values.shared, state.key_values.keys, state.key_values.values]
    return tensors


def test_a_stop_function_sees_the_new_tokens_and_ends_its_sequence_alone(small_model: HymbaForCausalLM) -> None:
    prompts = [ids(seed, 6) for seed in range(4)]
    whole = [alone(small_model, prompt, 15).tokens for prompt in prompts]
    pair = whole[0][4:6]
    first = next(n for n in range(2, 16) if whole[0][n - 2 : n] == pair)
    found = decode(small_model, prompts, max_new_tokens=15, stop=lambda tokens: tokens[-2:] == pair)
    assert found[0] == Decoded(whole[0][:first], True)
    for answer, tokens in zip(found, whole, strict=True):
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert answer.ended == (answer.tokens[-2:] == pair)


def test_a_free_row_neither_grows_the_cache_nor_stays_to_the_end(small_model: HymbaForCausalLM) -> None:
    steps = watch_steps(small_model)
    decode(small_model, [[1, 2], [1, 3], [1, 4], [1, 5], [1, 6]], max_new_tokens=[40, 40, 40, 40, 2])
    rows, cache = steps[-1]
    assert rows == 5  # one row in five is free: not worth a copy
    assert cache.lengths.tolist().count(1) == 5  # all that ended stand after the shared token again
    decode(small_model, [[1, 2], [1, 3], [1, 4]], max_new_tokens=[40, 2, 2])
    assert steps[-1][0] == 1


def test_sampling_at_a_tiny_temperature_or_from_the_likeliest_token_is_greedy_and_seeds_repeat(
    small_model: HymbaForCausalLM,
) -> None:
    prompts = [ids(seed, 5) for seed in range(3)]
    greedy = decode(small_model, prompts, max_new_tokens=10)
    assert decode(small_model, prompts, max_new_tokens=10, temperature=1e-6) == greedy
    assert decode(small_model, prompts, max_new_tokens=10, temperature=1.0, top_p=1e-6) == greedy
    drawn = [
        decode(
            small_model,
            prompts,
            max_new_tokens=10,
            temperature=2.0,
            top_p=0.95,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != greedy


def test_nothing_in_nothing_out(small_model: HymbaForCausalLM) -> None:
    assert decode(small_model, [], max_new_tokens=3) == []


def test_what_cannot_be_decoded_is_refused_by_the_prompts_number(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty; it needs at least one token"):
        decode(small_model, [[1], []], max_new_tokens=3)
    with pytest.raises(
        ValueError, match=r"prompts\[1\] has 120 tokens and may get 9 new ones, but the model's context is 128"
    ):
        decode(small_model, [[1], [2] * 120], max_new_tokens=9)
    with pytest.raises(ValueError, match=r"max_new_tokens of prompts\[1\] is 0; it must be at least 1"):
        decode(small_model, [[1], [2]], max_new_tokens=[1, 0])
    with pytest.raises(ValueError, match="max_new_tokens has 1 entries for 2 prompts"):
        decode(small_model, [[1], [2]], max_new_tokens=[1])
    prefix = run_prefix(small_model, [4, 5])
    with pytest.raises(ValueError, match=r"prompts\[1\] does not start with the 2 tokens of the prefix"):
        decode(small_model, [[4, 5, 6], [4, 6, 6]], max_new_tokens=1, prefix=prefix)
    with pytest.raises(ValueError, match=r"prompts\[0\] is the prefix of 2 tokens and nothing else"):
        decode(small_model, [[4, 5]], max_new_tokens=1, prefix=prefix)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        decode(small_model, [[4]], max_new_tokens=1, batch_size=0)
    with pytest.raises(ValueError, match=r"temperature is -1.0"):
        decode(small_model, [[4]], max_new_tokens=1, temperature=-1.0)


SEVERAL = "give a list, a tuple, or a 1-D tensor or array of integers"
KINDS = [
    list,
    tuple,
    torch.tensor,
    np.array,
    lambda values: np.array(values, np.uint16),
    lambda values: list(np.array(values)),
]
NAMES = ["list", "tuple", "tensor", "array", "uint16", "numpy's integers"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_token_ids_and_limits_may_come_in_any_kind_of_sequence(small_model: HymbaForCausalLM, kind: Any) -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 9]]
    prefix = run_prefix(small_model, kind([5, 6]))
    assert prefix.tokens == (5, 6)
    found = decode(small_model, [kind(prompt) for prompt in prompts], max_new_tokens=kind([4, 7]), prefix=prefix)
    assert found == [alone(small_model, prompt, limit) for prompt, limit in zip(prompts, [4, 7], strict=True)]
    assert all(type(token) is int for token in prefix.tokens)


@pytest.mark.parametrize(
    "kind", [*KINDS, set, frozenset, lambda ids: ids[0], lambda ids: np.int64(ids[0]), lambda ids: torch.tensor(ids[0])],
    ids=[*NAMES, "set", "frozenset", "one int", "one of numpy's", "one tensor without axes"],
)  # fmt: skip
def test_a_stop_id_ends_a_sequence_whatever_kind_of_integers_it_comes_in(
    small_model: HymbaForCausalLM, kind: Any
) -> None:
    prompt = ids(3, 6)
    stop_id = alone(small_model, prompt, 9).tokens[2]
    expected = alone(small_model, prompt, 9, [stop_id])
    assert expected.ended
    assert decode(small_model, [prompt], max_new_tokens=9, stop_ids=kind([stop_id])) == [expected]


@pytest.mark.parametrize(
    ("stop_ids", "message"),
    [
        (None, "decode: stop_ids is None (NoneType); it must be an integer"),
        ([None], "decode: stop_ids[0] is None (NoneType); it must be an integer"),
        ([2, "</s>"], "decode: stop_ids[1] is '</s>' (str); it must be an integer"),
        ("</s>", f"decode: stop_ids is '</s>' (str); {SEVERAL}"),
        (2.0, "decode: stop_ids is 2.0 (float); it must be an integer"),
        ({True}, "decode: stop_ids[0] is True (bool); it must be an integer"),
        (torch.tensor([True]), "decode: stop_ids[0] is True (bool); it must be an integer"),
        (torch.tensor(True), "decode: stop_ids is tensor(True) (Tensor); it must be an integer"),
        (torch.tensor([2.0]), "decode: stop_ids[0] is 2.0 (float); it must be an integer"),
        (torch.tensor([[2]]), f"decode: stop_ids is a tensor of shape (1, 1); {SEVERAL}"),
        ([torch.tensor([2])], "decode: stop_ids[0] is a tensor of shape (1,); it must be an integer"),
    ],
)
def test_stop_ids_that_are_no_integers_are_refused(small_model: HymbaForCausalLM, stop_ids: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        decode(small_model, [[4]], max_new_tokens=1, stop_ids=stop_ids)
    assert str(raised.value) == message


UNKNOWN = "but the model's token ids are 0 to 60; use the model's own tokenizer, and no padding or label values"
LIST = "give a list with one sequence of token ids per entry, unpadded"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[4], [5, -100]], f"prompts[1][1] is -100, {UNKNOWN}"),
        ([[4], [61]], f"prompts[1][0] is 61, {UNKNOWN}"),
        ([[4], np.array([60, 2**40])], f"prompts[1][1] is {2**40}, {UNKNOWN}"),
        ([[4], [5, 6.0]], "prompts[1][1] is 6.0 (float); it must be an integer"),
        ([[4], torch.tensor([5.0])], "prompts[1][0] is 5.0 (float); it must be an integer"),
        ([[4], [[5]]], "prompts[1][0] is [5] (list); it must be an integer"),
        ([[4], "Hello"], f"prompts[1] is 'Hello' (str); {SEVERAL}"),
        ([4, 5], f"prompts[0] is 4 (int); {SEVERAL}"),
        ([[4], torch.tensor([[5, 6]])], f"prompts[1] is a tensor of shape (1, 2); {SEVERAL}"),
        ([[4], np.array([[5, 6]])], f"prompts[1] is an array of shape (1, 2); {SEVERAL}"),
        ([[4], {5, 6}], f"prompts[1] is {{5, 6}} (set); {SEVERAL}"),
        (torch.tensor([[4, 5]]), f"prompts is a tensor of shape (1, 2); {LIST}"),
        (torch.tensor([4, 5]), f"prompts is a tensor of shape (2,); {LIST}"),
        ("Hello", f"prompts is 'Hello' (str); {LIST}"),
        (BatchEncoding({"input_ids": [[4]]}), f"prompts is {{'input_ids': [[4]]}} (BatchEncoding); {LIST}"),
        ([BatchEncoding({"input_ids": [4]})], f"prompts[0] is {{'input_ids': [4]}} (BatchEncoding); {SEVERAL}"),
    ],
)
def test_prompts_that_are_no_token_ids_of_the_model_are_refused_by_their_entry(
    small_model: HymbaForCausalLM, prompts: Any, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        decode(small_model, prompts, max_new_tokens=1)
    assert str(raised.value) == f"decode: {message}"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 61], f"tokens[1] is 61, {UNKNOWN}"),
        (torch.tensor([[5, 6]]), f"tokens is a tensor of shape (1, 2); {SEVERAL}"),
        ("Hello", f"tokens is 'Hello' (str); {SEVERAL}"),
        (5, f"tokens is 5 (int); {SEVERAL}"),
        (
            [5] * 129,
            "tokens has 129 entries, but the model's context is 128 (max_position_embeddings); run a shorter prefix",
        ),
    ],
)
def test_a_prefix_of_anything_but_the_models_token_ids_within_its_context_is_refused(
    small_model: HymbaForCausalLM, tokens: Any, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        run_prefix(small_model, tokens)
    assert str(raised.value) == f"run_prefix: {message}"


def test_a_prefix_may_fill_the_context(small_model: HymbaForCausalLM) -> None:
    assert run_prefix(small_model, [5] * 128).cache.lengths.tolist() == [128]


def test_a_prefix_that_was_not_run_is_refused(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError) as raised:
        decode(small_model, [[4, 5, 6]], max_new_tokens=1, prefix=[4, 5])  # type: ignore[arg-type]
    assert str(raised.value) == "decode: prefix is [4, 5] (list); give what run_prefix(model, tokens) returns"


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_sizes_may_be_any_integers(small_model: HymbaForCausalLM, kind: Any) -> None:
    prompts = [ids(seed, 5) for seed in range(3)]
    sizes = {"max_new_tokens": 4, "batch_size": 2, "prefill_tokens": 9}
    found = decode(small_model, prompts, **{name: kind(size) for name, size in sizes.items()})
    assert found == decode(small_model, prompts, **sizes)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5 (float); it must be an integer"),
        ({"max_new_tokens": [2.5]}, "max_new_tokens[0] is 2.5 (float); it must be an integer"),
        ({"max_new_tokens": None}, "max_new_tokens is None (NoneType); it must be an integer"),
        ({"batch_size": 2.5}, "batch_size is 2.5 (float); it must be an integer"),
        ({"batch_size": "8"}, "batch_size is '8' (str); it must be an integer"),
        ({"prefill_tokens": np.float32(2.5)}, "prefill_tokens is np.float32(2.5) (float32); it must be an integer"),
        ({"prefill_tokens": 0}, "prefill_tokens is 0; it must be at least 1"),
    ],
)
def test_sizes_that_are_no_positive_integers_are_refused(
    small_model: HymbaForCausalLM, size: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        decode(small_model, [[4]], **{"max_new_tokens": 1, **size})
    assert str(raised.value) == f"decode: {message}"
