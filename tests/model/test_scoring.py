"""Continuations scored on trees get the log-likelihoods of each alone, and what they share runs once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hymba_align.model import HymbaConfig, HymbaForCausalLM, scoring
from hymba_align.model.scoring import Scored, score_continuations, scored_rows

CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 logits against float32 logits, sums of up to 20 tokens; observed 3.8e-6
META = 5
"""Meta tokens of the small models"""
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "v_head_dim": 16,
    "num_memory_tokens": META,
    "sliding_window": 3,
    "global_attn_idx": [1],
    "kv_reuse_group": [],
    "mamba_d_state": 4,
    "mamba_dt_rank": 3,
    "initializer_range": 0.2,
}


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(f"{seed} {place}").randrange(61) for place in range(count)]


def alone(model: HymbaForCausalLM, context: list[int], continuation: list[int]) -> Scored:
    """The plain way: one sequence, all its logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    log_probs = logits.log_softmax(-1).gather(1, wanted[:, None])
    return Scored(float(log_probs.sum()), bool((logits.argmax(-1) == wanted).all()))


def check(
    model: HymbaForCausalLM, contexts: list[list[int]], continuations: list[list[int]], tokens_per_row: int
) -> None:
    found = score_continuations(model, contexts, continuations, tokens_per_row=tokens_per_row)
    expected = [alone(model, *pair) for pair in zip(contexts, continuations, strict=True)]
    assert_close([one.log_likelihood for one in found], [one.log_likelihood for one in expected], **CLOSE)
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]


@pytest.fixture
def run_tokens(small_model: HymbaForCausalLM) -> Iterator[list[int]]:
    """Tokens of each forward pass, meta tokens included, counted at the first layer."""
    counts: list[int] = []
    handle = small_model.model.layers[0].register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    yield counts
    handle.remove()


def four_choices(questions: int) -> tuple[list[list[int]], list[list[int]]]:
    """Shots of 30 tokens, questions of 10 and choices of 4: as many rows as requests, in no order that helps."""
    pairs = [
        ([*tokens(30, 0), *tokens(10, 1 + question)], tokens(4, 100 * (question + 1) + choice))
        for question in range(questions)
        for choice in range(4)
    ]
    random.Random(0).shuffle(pairs)
    contexts, continuations = zip(*pairs, strict=True)
    return list(contexts), list(continuations)


@pytest.mark.parametrize("tokens_per_row", [1, 60, 130, 10_000])
def test_four_choices_score_as_each_alone_whatever_the_row_holds(
    small_model: HymbaForCausalLM, tokens_per_row: int
) -> None:
    check(small_model, *four_choices(3), tokens_per_row)


def test_shots_run_once_for_all_questions_and_a_question_once_for_all_choices(
    small_model: HymbaForCausalLM, run_tokens: list[int]
) -> None:
    score_continuations(small_model, *four_choices(5), tokens_per_row=10_000)
    assert run_tokens == [META + 30 + 5 * (10 + 4 * 3)]  # the last token of a choice is only predicted


def test_rows_stay_within_their_tokens_never_split_a_question_and_start_from_shots_run_once(
    small_model: HymbaForCausalLM, run_tokens: list[int]
) -> None:
    contexts, continuations = four_choices(5)
    rows = scored_rows(small_model, contexts, continuations, tokens_per_row=2 * (10 + 4 * 3) + 5)
    asked = [{tuple(contexts[number]) for number in numbers} for numbers, _ in rows]
    assert run_tokens == [META + 30, 44, 44, 22]
    assert [len(of_row) for of_row in asked] == [2, 2, 1]


def test_a_context_with_more_continuations_than_a_row_holds_is_spread_over_rows(
    small_model: HymbaForCausalLM, run_tokens: list[int]
) -> None:
    contexts, continuations = [[5]] * 7, [tokens(12, seed) for seed in range(7)]
    check(small_model, contexts, continuations, tokens_per_row=40)
    first, *rows = run_tokens[:-7]  # the last seven are those of each alone
    assert first <= META + 1
    assert max(rows) <= 40
    assert sum(rows) < 7 * 12


def test_logits_are_formed_only_where_a_continuation_is_predicted(
    small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 6)
    formed: list[int] = []
    small_model.lm_head.register_forward_pre_hook(lambda _, args: formed.append(len(args[0])))
    contexts, continuations = four_choices(2)
    expected = [alone(small_model, *pair) for pair in zip(contexts, continuations, strict=True)]
    formed.clear()
    found = score_continuations(small_model, contexts, continuations, tokens_per_row=10_000)
    assert sum(formed) == 2 * (1 + 4 * 3)  # the first token of all choices is predicted at one place
    assert max(formed) == 6
    assert_close([one.log_likelihood for one in found], [one.log_likelihood for one in expected], **CLOSE)


def test_log_probabilities_of_a_half_precision_model_are_not_rounded_to_its_precision(
    small_model: HymbaForCausalLM,
) -> None:
    model = small_model.to(torch.bfloat16)
    pair = tokens(6, 1), tokens(3, 2)
    with torch.no_grad():
        logits = model(torch.tensor([pair[0] + pair[1]])).logits[0, 5:-1]
    expected = logits.float().log_softmax(-1).gather(1, torch.tensor(pair[1])[:, None]).double().sum()
    [found] = score_continuations(model, [pair[0]], [pair[1]], tokens_per_row=99)
    assert found.log_likelihood == pytest.approx(float(expected), abs=1e-6)  # the same pass; bfloat16 has steps of 0.06


def test_the_greedy_continuation_is_recognised(small_model: HymbaForCausalLM) -> None:
    prompt = tokens(9, 3)
    greedy = small_model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    best = greedy[0, len(prompt) :].tolist()
    found = score_continuations(small_model, [prompt] * 2, [best, [*best[:-1], (best[-1] + 1) % 61]], tokens_per_row=99)
    assert [one.is_greedy for one in found] == [True, False]
    assert found[0].log_likelihood > found[1].log_likelihood


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_set_of_requests_scores_as_each_alone(data: st.DataObject) -> None:
    """Equal requests, contexts that begin others, one token of context: with two token ids all of it is common."""
    model = HymbaForCausalLM(HymbaConfig(**SHAPE)).eval()
    ids = st.lists(st.integers(0, 1), min_size=1, max_size=6)
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=8))
    check(model, [pair[0] for pair in pairs], [pair[1] for pair in pairs], data.draw(st.integers(1, 40)))


@pytest.mark.parametrize(
    ("contexts", "continuations", "budget", "message"),
    [
        ([[1], []], [[1], [2]], 9, r"contexts\[1\] is empty; it needs at least 1 token"),
        ([[1], [1]], [[], [2]], 9, r"continuations\[0\] is empty; it needs at least 1 token"),
        ([[1]], [[1], [2]], 9, "1 contexts but 2 continuations; give one of each"),
        ([[1]], [[1]], 0, "tokens_per_row is 0; it must be at least 1"),
        ([[1]], [[1]], 2.5, r"tokens_per_row is 2.5 \(float\); it must be an integer"),
        (
            [[1], [-1]],
            [[1], [2]],
            9,
            r"contexts\[1\]\[0\] is -1, but the model's token ids are 0 to 60; use the model's own",
        ),
        (
            [[1], [1]],
            [[1], [2, 61]],
            9,
            r"continuations\[1\]\[1\] is 61, but the model's token ids are 0 to 60; use the",
        ),
        ([[1], [1.0]], [[1], [2]], 9, r"contexts\[1\]\[0\] is 1.0 \(float\); it must be an integer"),
        (
            [1, 2],
            [[1], [2]],
            9,
            r"contexts\[0\] is 1 \(int\); give a list, a tuple, or a 1-D tensor or array of integers",
        ),
        ([[1]], ["a"], 9, r"continuations\[0\] is 'a' \(str\); give a list, a tuple, or a 1-D tensor or array"),
        (
            torch.ones(1, 2),
            [[1]],
            9,
            r"contexts is a tensor of shape \(1, 2\); give a list with one sequence of token ids",
        ),
        (
            [[1], [1] * 100],
            [[2], [2] * 30],
            9,
            r"contexts\[1\] and continuations\[1\] have 129 tokens before the last one, but the model's context is 128 "
            r"\(max_position_embeddings\); cut the beginning of the context",
        ),
    ],
)
def test_requests_that_cannot_be_scored_are_one_sentence(
    small_model: HymbaForCausalLM,
    contexts: Any,
    continuations: Any,
    budget: Any,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        score_continuations(small_model, contexts, continuations, tokens_per_row=budget)


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array])
def test_token_ids_may_come_in_any_kind_of_sequence(small_model: HymbaForCausalLM, kind: Any) -> None:
    contexts, continuations = four_choices(2)
    given_ids = [kind(one) for one in contexts], [kind(one) for one in continuations]
    found = score_continuations(small_model, *given_ids, tokens_per_row=np.int64(60))
    assert found == score_continuations(small_model, contexts, continuations, tokens_per_row=60)


def test_all_that_a_row_reads_may_fill_the_context(small_model: HymbaForCausalLM) -> None:
    """The last token of a continuation is predicted, not read."""
    check(small_model, [tokens(100, 0)], [tokens(29, 1)], tokens_per_row=9)


def test_nothing_to_score_is_no_error(small_model: HymbaForCausalLM) -> None:
    assert score_continuations(small_model, [], [], tokens_per_row=9) == []
