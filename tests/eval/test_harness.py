"""The harness's adapter gives what lm-eval's own path gives at batch size 1, and runs what is shared once."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.testing import assert_close

from hymba_align.errors import UsageError
from hymba_align.eval import harness
from hymba_align.eval.answers import Answer, Answers, Processes, StopAt
from hymba_align.eval.harness import HymbaLM
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.decoding import decode
from hymba_align.model.kernels import choice

CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 models, sums of 4 to 60 tokens, down to -375; observed 4.5e-6
NEW_TOKENS = 12
MAX_LENGTH = 1024


@pytest.fixture
def model(config: HymbaConfig) -> HymbaForCausalLM:
    """Weights large enough that greedy answers depend on the whole prompt."""
    torch.manual_seed(0)
    config.initializer_range = 0.2
    return HymbaForCausalLM(config).eval()


@pytest.fixture
def rows() -> list[dict[str, str]]:
    lines = Path("data/arithmetic/test.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def _reasons_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_logged", set())


@pytest.fixture
def run_tokens(model: HymbaForCausalLM) -> Iterator[list[int]]:
    """Tokens of each forward pass, meta tokens included, counted at the first layer."""
    counts: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    yield counts
    handle.remove()


def chats(tokenizer: Any, rows: list[dict[str, str]], *, same_shots: bool, questions: int = 6) -> list[str]:
    """Five-shot prompts as GSM8K's; the shots are the same for all questions, or drawn for each."""
    prompts = []
    draw = random.Random(0)
    for number in range(questions):
        shots = rows[10:15] if same_shots else draw.sample(rows[10:], 5)
        messages = []
        for shot in shots:
            messages.append({"role": "user", "content": f"Question: {shot['question']}\nAnswer:"})
            messages.append({"role": "assistant", "content": shot["answer"]})
        messages.append({"role": "user", "content": f"Question: {rows[number]['question']}\nAnswer:"})
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return prompts


def asks(prompts: list[str], **settings: Any) -> list[Instance]:
    settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False, **settings}
    return [
        Instance("generate_until", doc={}, arguments=(prompt, settings), idx=0, metadata=("gsm8k", number, 1))
        for number, prompt in enumerate(prompts)
    ]


def plain(model: Any, tokenizer: Any, max_length: int = MAX_LENGTH) -> HFLM:
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=1,
        add_bos_token=False,
        max_length=max_length,
        softmax_dtype="float64",  # it adds log-probabilities in this type; float32 has steps of 1.5e-5 at -140
    )


def ours(model: Any, tokenizer: Any, max_length: int = MAX_LENGTH, **settings: Any) -> HymbaLM:
    """The adapter; `settings` are those of `Answers`, and `redact`."""
    settings = {"processes": Processes.alone(), "terminal": io.StringIO(), **settings}
    redact = settings.pop("redact", None)
    answers = Answers(model, tokenizer, store=None, identity="", batch_size=4, max_length=max_length, **settings)
    return HymbaLM(answers, name="answers", redact=redact)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_shots", [True, False], ids=["equal shots", "shots drawn per question"])
def test_five_shot_answers_are_those_of_each_prompt_alone(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], same_shots: bool
) -> None:
    prompts = chats(tokenizer, rows, same_shots=same_shots)
    expected = plain(model, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    assert ours(model, tokenizer).generate_until(asks(prompts)) == expected
    assert len(set(expected)) > 1, "the answers depend on the question"


def test_equal_shots_run_once_for_all_questions(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], run_tokens: list[int]
) -> None:
    prompts = chats(tokenizer, rows, same_shots=True)
    ours(model, tokenizer).generate_until(asks(prompts, max_gen_toks=1))
    tokens = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    common = next(place for place, ids in enumerate(zip(*tokens, strict=False)) if len(set(ids)) > 1)
    assert common > 5 * max(len(prompt) - common for prompt in tokens), "most of a prompt is shots"
    shots, *questions = run_tokens
    own = sum(len(prompt) - common for prompt in tokens)
    assert shots == model.config.num_memory_tokens + common
    assert 0.9 * own < sum(questions) <= own  # two questions of a group may begin with the same words


def test_answers_end_at_the_same_stop_strings(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    prompts = chats(tokenizer, rows, same_shots=True)
    free = plain(model, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    until = [text[len(text) // 2 :][:size] for text, size in zip(free, (1, 2, 3, 9, 2, 4), strict=True)]
    own, adapter = plain(model, tokenizer), ours(model, tokenizer)
    expected = own.generate_until(asks(prompts, until=until), disable_tqdm=True)
    assert adapter.generate_until(asks(prompts, until=until)) == expected
    assert all(len(short) < len(text) for short, text in zip(expected, free, strict=True))


def test_an_answer_ends_at_the_models_own_end_token_and_is_counted(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = chats(tokenizer, rows, same_shots=True)
    adapter = ours(model, tokenizer)
    free = adapter.generate_until(asks(prompts))
    assert all(answer.cut_off and answer.tokens == NEW_TOKENS for answer in adapter.answers_of.values())
    # from here on an answer's fifth token ends it
    ids = tokenizer.encode(prompts[0], add_special_tokens=False)
    end = decode(model, [ids], max_new_tokens=NEW_TOKENS)[0].tokens[4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, tokenizer.eos_token_id])
    expected = plain(model, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    assert adapter.generate_until(asks(prompts)) == expected
    assert len(expected[0]) < len(free[0])
    answers = [adapter.answers_of["gsm8k", number] for number in range(len(prompts))]
    assert answers[0] == Answer(expected[0], 5, cut_off=False)
    assert [answer.text for answer in answers] == expected


def test_the_end_of_turn_token_ends_an_answer_that_the_model_itself_would_go_on_with(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = chats(tokenizer, rows, same_shots=True)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    free = plain(model, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    ids = tokenizer.encode(prompts[0], add_special_tokens=False)
    end = decode(model, [ids], max_new_tokens=NEW_TOKENS)[0].tokens[4]
    other = copy.deepcopy(tokenizer)  # a shallow copy would share its special tokens
    other.eos_token = tokenizer.convert_ids_to_tokens(end)
    expected = plain(model, other).generate_until(asks(prompts), disable_tqdm=True)
    adapter = ours(model, other)
    assert adapter.generate_until(asks(prompts)) == expected
    assert len(expected[0]) < len(free[0])
    shared = dict(adapter.answers_of)
    assert not shared["gsm8k", 0].cut_off
    monkeypatch.setattr(harness, "_not_hymba", lambda _: "a test says so")
    adapter.answers_of.clear()
    adapter.generate_until(asks(prompts))
    assert adapter.answers_of == shared, "lm-eval's own path counts them too"


def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    prompts = chats(tokenizer, rows, same_shots=True)
    lengths = sorted(len(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts)
    context = NEW_TOKENS + lengths[2]
    expected = plain(model, tokenizer, context).generate_until(asks(prompts), disable_tqdm=True)
    adapter = ours(model, tokenizer, context)
    assert adapter.generate_until(asks(prompts)) == expected
    assert adapter.answers.truncated_prompts == sum(length > lengths[2] for length in lengths) > 0
    assert adapter.answers.longest_prompt == lengths[-1]
    with pytest.raises(UsageError) as error:
        adapter.generate_until(asks(prompts, max_gen_toks=context))
    assert str(error.value) == (
        f"answers: {context} new tokens are asked for, which leaves no room for a prompt in the context of {context} tokens; "
        "lower max_new_tokens"
    )


def test_requests_with_different_settings_keep_their_order_and_their_own_lengths(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    prompts = chats(tokenizer, rows, same_shots=False)
    mixed = [
        request
        for number, prompt in enumerate(prompts)
        for request in asks([prompt], max_gen_toks=3 if number % 2 else 9)
    ]
    assert ours(model, tokenizer).generate_until(mixed) == plain(model, tokenizer).generate_until(mixed, True)


def test_the_bar_counts_every_answer_once(model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    terminal = io.StringIO()
    ours(model, tokenizer, terminal=terminal).generate_until(asks(chats(tokenizer, rows, same_shots=True)))
    assert "6/6" in terminal.getvalue()
    assert "7/6" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "temperature": 0.7}, "it samples (do_sample=True)"),
        ({"temperature": 0.7, "do_sample": None}, "it samples (do_sample=True)"),
        ({"repetition_penalty": 1.3}, "the request sets repetition_penalty=1.3"),
    ],
)
def test_what_is_not_greedy_takes_lm_evals_own_path_and_says_so_once(
    model: HymbaForCausalLM,
    tokenizer: Any,
    rows: list[dict[str, str]],
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
) -> None:
    requests = asks(chats(tokenizer, rows, same_shots=True)[:3], **settings)
    answers = []
    for wrapper in (ours(model, tokenizer), ours(model, tokenizer)):
        torch.manual_seed(1)
        answers.append(wrapper.generate_until(requests))
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=False, max_length=MAX_LENGTH)
    torch.manual_seed(1)
    assert answers == [own.generate_until(requests, disable_tqdm=True)] * 2
    said = [record.getMessage() for record in caplog.records if "own path" in record.getMessage()]
    assert said == [f"answers: lm-eval's own path answers, one padded batch at a time, because {reason}"]


def test_a_setting_stored_with_the_model_counts_as_asked_for(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 7  # which lm-eval overrides
    prompts = chats(tokenizer, rows, same_shots=True)[:2]
    expected = plain(model, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    assert ours(model, tokenizer).generate_until(asks(prompts)) == expected
    assert "because the model's generation_config sets repetition_penalty=5.0" in caplog.text


def test_another_model_takes_lm_evals_own_path_and_says_so(
    tokenizer: Any, rows: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()
    adapter = ours(llama, tokenizer)
    prompts = chats(tokenizer, rows, same_shots=True)[:3]
    answers = adapter.generate_until(asks(prompts))
    assert answers == plain(llama, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    assert [adapter.answers_of["gsm8k", number].text for number in range(3)] == answers
    found = [value for value, _ in adapter.loglikelihood(choices(rows)[:4], disable_tqdm=True)]
    expected = [value for value, _ in plain(llama, tokenizer).loglikelihood(choices(rows)[:4], disable_tqdm=True)]
    assert_close(found, expected, **CLOSE)
    assert caplog.text.count("because the model is a LlamaForCausalLM, not a Hymba") == 2


def test_a_lora_adapter_takes_part_and_shares_as_the_model_itself_does(
    model: HymbaForCausalLM,
    tokenizer: Any,
    rows: list[dict[str, str]],
    run_tokens: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from peft import LoraConfig, get_peft_model

    prompts = chats(tokenizer, rows, same_shots=True)[:3]
    without = ours(model, tokenizer).generate_until(asks(prompts))
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=64, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, adapter).eval()
    expected = plain(wrapped, tokenizer).generate_until(asks(prompts), disable_tqdm=True)
    scores = plain(wrapped, tokenizer).loglikelihood(choices(rows)[:4], disable_tqdm=True)
    run_tokens.clear()
    found = ours(wrapped, tokenizer).generate_until(asks(prompts, max_gen_toks=1))
    assert sum(run_tokens) < 2 * len(tokenizer.encode(prompts[0])), "shots run once"
    assert [text[: len(first)] for text, first in zip(expected, found, strict=True)] == found
    assert ours(wrapped, tokenizer).generate_until(asks(prompts)) == expected != without
    assert_close(
        [value for value, _ in ours(wrapped, tokenizer).loglikelihood(choices(rows)[:4], disable_tqdm=True)],
        [value for value, _ in scores],
        **CLOSE,
    )
    assert "own path" not in caplog.text


def test_wrappers_that_act_around_the_model_stay(model: HymbaForCausalLM, tokenizer: Any) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert ours(tuned, tokenizer).model is tuned
    activated = LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    activated_model = get_peft_model(model, activated)
    assert ours(activated_model, tokenizer).model is activated_model


# ---- stops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("string", ["Question:", "\n\n", "s a", "</s>", "####"])
def test_a_stop_string_is_seen_by_the_token_that_completes_it_as_lm_eval_sees_it(tokenizer: Any, string: str) -> None:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    ids = tokenizer.encode("It has a dozen.\n\nQuestion: no\n#### 12</s>\n\n", add_special_tokens=False)
    stop = StopAt(tokenizer, [string], ids=())
    found = next(count for count in range(1, len(ids) + 1) if stop(ids[:count]))
    theirs = next(
        count
        for count in range(1, len(ids) + 1)
        if stop_sequences_criteria(tokenizer, [string], 0, 1)[0](torch.tensor([ids[:count]]), None)
    )
    assert found == theirs


# ---- log-likelihoods ------------------------------------------------------------------------------------------------


def choices(rows: list[dict[str, str]], shots: Callable[[int], str] = lambda question: "") -> list[Instance]:
    """Five questions with four choices each."""
    return [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(f"{shots(question)}Question: {rows[question]['question']}\nAnswer:", f" it is {answer}."),
            idx=index,
        )
        for question in range(5)
        for index, answer in enumerate((7, 12, "two dozen and then some", 0))
    ]


@pytest.mark.parametrize("kind", ["no shots", "equal shots", "different shots"])
@pytest.mark.parametrize("max_length", [MAX_LENGTH, 40])
def test_four_choices_have_the_log_likelihoods_of_each_alone(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], kind: str, max_length: int
) -> None:
    def shots(question: int) -> str:
        first = {"no shots": 20, "equal shots": 10, "different shots": 10 + question}[kind]
        return "".join(f"{row['question']} {row['answer']}\n\n" for row in rows[first : first + 3])

    requests = choices(rows, shots)
    expected = plain(model, tokenizer, max_length).loglikelihood(requests, disable_tqdm=True)
    found = ours(model, tokenizer, max_length).loglikelihood(requests, disable_tqdm=True)
    assert_close([value for value, _ in found], [value for value, _ in expected], **CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_question_runs_once_for_its_four_choices_and_the_shots_once_for_all(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], run_tokens: list[int]
) -> None:
    shots = "".join(f"{row['question']} {row['answer']}\n\n" for row in rows[10:13])
    requests = choices(rows, lambda question: shots)
    ours(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    read = [tokenizer.encode("".join(request.args), add_special_tokens=False)[:-1] for request in requests]
    prefixes = {tuple(tokens[: n + 1]) for tokens in read for n in range(len(tokens))}
    assert run_tokens == [model.config.num_memory_tokens + len(prefixes)]
    assert len(prefixes) < sum(map(len, read)) / 8
    run_tokens.clear()
    bounded = ours(model, tokenizer, tokens_per_row=200)
    bounded.loglikelihood(requests, disable_tqdm=True)
    assert len(run_tokens) > 2
    assert max(run_tokens[1:]) <= 200  # after the shots


def test_a_continuation_longer_than_the_context_is_refused(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    long = Instance(request_type="loglikelihood", doc={}, arguments=("Question:", " 7" * 60), idx=0)
    with pytest.raises(UsageError) as error:
        ours(model, tokenizer, 40).loglikelihood([long], disable_tqdm=True)
    assert str(error.value) == (
        "answers: a continuation has 120 tokens, more than the context of 40; score a shorter one or raise max_length"
    )


def test_whole_texts_are_scored_as_by_lm_eval(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    texts = [row["question"] + row["answer"] for row in rows[:3]]  # longer than the context: several windows each
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0, metadata=("", 0, 1))
        for text in texts
    ]
    expected = plain(model, tokenizer, 30).loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours(model, tokenizer, 30).loglikelihood_rolling(requests, disable_tqdm=True)
    assert_close(found, expected, **CLOSE)


def test_answers_and_scores_reach_the_harnesss_cache(
    model: HymbaForCausalLM, tokenizer: Any, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ours(model, tokenizer)
    kept: list[tuple[str, Any]] = []
    monkeypatch.setattr(adapter.cache_hook, "add_partial", lambda kind, key, value: kept.append((kind, key, value)))
    prompts = chats(tokenizer, rows, same_shots=True)[:2]
    answers = adapter.generate_until(asks(prompts))
    scores = adapter.loglikelihood(choices(rows)[:4], disable_tqdm=True)
    assert {(kind, key[0]): value for kind, key, value in kept if kind == "generate_until"} == {
        ("generate_until", prompt): answer for prompt, answer in zip(prompts, answers, strict=True)
    }
    assert {key: value for kind, key, value in kept if kind == "loglikelihood"} == {
        request.args: score for request, score in zip(choices(rows)[:4], scores, strict=True)
    }
