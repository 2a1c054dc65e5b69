"""Answers are those of plain lm-eval at batch size 1 however they are shared, and survive a kill; nothing else is reused."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.testing import assert_close

from hymba_align.errors import StorageError, UsageError
from hymba_align.eval import answers as answers_module
from hymba_align.eval.answers import Answer, Answers, Processes, StopAt, end_ids
from hymba_align.eval.harness import HymbaLM
from hymba_align.eval.sharing import deal
from hymba_align.model import HymbaConfig, HymbaForCausalLM

CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 model, sums of 1 to 10 tokens, down to -54; observed 5.1e-6
MOST = 10
TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "arithmetic" / "tokenizer"


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> HymbaForCausalLM:
    """Weights large enough that greedy answers depend on the whole prompt."""
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        v_head_dim=16,
        mamba_d_state=4,
        mamba_dt_rank=4,
        num_memory_tokens=4,
        sliding_window=16,
        global_attn_idx=[0, 2],
        kv_reuse_group=[],
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return HymbaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Eight of different lengths, two of them equal; six begin alike."""
    shots = "Question: Ann has 3 bags with 4 pens in each. How many pens?\nAnswer: 3*4=12 #### 12\n\n"
    texts = [f"{shots}Question: {'Bob has some. ' * size}How many?\nAnswer:" for size in (1, 5, 2, 9, 1, 3)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in [*texts, "Hello", "One and one is"]]


def one(model: Any, tokenizer: Any, **changes: Any) -> Answers:
    given: dict[str, Any] = {
        "processes": Processes.alone(),
        "store": None,
        "identity": "a",
        "batch_size": 3,
        "max_length": 400,
        "terminal": io.StringIO(),
    }
    return Answers(model, tokenizer, **{**given, **changes})


def together(world_size: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What each of so many stand-ins for processes returns, by rank; they run as threads and exchange copies."""
    barrier = threading.Barrier(world_size)
    given, results, errors = [b""] * world_size, [None] * world_size, []

    def process(rank: int) -> None:
        def gather(value: object) -> list[object]:
            given[rank] = pickle.dumps(value)
            barrier.wait(60)
            values = [pickle.loads(one) for one in given]
            barrier.wait(60)
            return values

        try:
            results[rank] = work(Processes(rank, world_size, gather))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of `decode` got."""
    calls: list[int] = []
    real = answers_module.decode

    def counting(model: Any, prompts: Any, **given: Any) -> Any:
        calls.append(len(prompts))
        return real(model, prompts, **given)

    monkeypatch.setattr(answers_module, "decode", counting)
    return calls


def counters(answers: Answers) -> tuple[int, ...]:
    return answers.new_tokens, answers.reused, answers.truncated_prompts, answers.longest_prompt


# ---- the same as plain lm-eval --------------------------------------------------------------------------------------


class Counting(HFLM):
    """Plain lm-eval, which also tells how many tokens it generated."""

    def _model_generate(self, context: Any, *arguments: Any, **given: Any) -> Any:
        generated = super()._model_generate(context, *arguments, **given)
        self.made = getattr(self, "made", {})
        self.made[tuple(context[0].tolist())] = generated[0, context.shape[1] :].tolist()
        return generated


def plain(model: Any, tokenizer: Any, max_length: int) -> Counting:
    return Counting(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=1,
        add_bos_token=False,
        max_length=max_length,
        softmax_dtype="float64",  # it adds log-probabilities in this type; float32 has steps of 1.5e-5 at -140
    )


def asks(texts: list[str], until: list[str]) -> list[Instance]:
    given = {"until": until, "max_gen_toks": MOST, "do_sample": False}
    return [
        Instance("generate_until", doc={}, arguments=(text, dict(given)), idx=0, metadata=("gsm8k", number, 1))
        for number, text in enumerate(texts)
    ]


SHARED = [(1, 1, 8192), (3, 1, 60), (16, 1, 8192), (2, 3, 60)]
"""Batch size, processes, tokens per row"""


@pytest.mark.parametrize("max_length", [400, 60], ids=["whole prompts", "prompts that are cut"])
@pytest.mark.parametrize("with_stops", [False, True], ids=["no stops", "stops inside tokens"])
def test_texts_and_cut_offs_are_those_of_plain_lm_eval_however_prompts_are_shared(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], max_length: int, with_stops: bool
) -> None:
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    free = plain(model, tokenizer, max_length).generate_until(asks(texts, []), disable_tqdm=True)
    # the middle of answers: strings that begin and end inside tokens
    until = [text[len(text) // 2 - 1 :][:2] for text in free[:3]] if with_stops else []
    baseline = plain(model, tokenizer, max_length)
    expected = baseline.generate_until(asks(texts, list(until)), disable_tqdm=True)
    made = {key: len(tokens) for key, tokens in baseline.made.items()}

    for batch_size, world_size, tokens_per_row in SHARED:

        def work(processes: Processes, batch: int = batch_size, row: int = tokens_per_row) -> HymbaLM:
            given = {"batch_size": batch, "tokens_per_row": row, "max_length": max_length, "processes": processes}
            adapter = HymbaLM(one(model, tokenizer, **given), name="test")
            assert adapter.generate_until(asks(texts, list(until))) == expected
            return adapter

        for adapter in together(world_size, work):
            for number, text in enumerate(texts):
                answer = adapter.answers_of["gsm8k", number]
                read = tuple(tokenizer.encode(text, add_special_tokens=False)[-(max_length - MOST) :])
                assert answer.tokens == made[read]
                ended = any(string in tokenizer.decode(baseline.made[read]) for string in [*until, "</s>"])
                assert answer.cut_off == (not ended)
    cut_off = {adapter.answers_of["gsm8k", number].cut_off for number in range(len(texts))}
    assert cut_off == ({True, False} if with_stops else {True})
    assert (adapter.answers.truncated_prompts > 0) == (max_length == 60)


@pytest.mark.parametrize("max_length", [400, 40], ids=["whole contexts", "contexts that are cut"])
def test_log_likelihoods_are_those_of_plain_lm_eval_however_choices_are_shared(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], max_length: int
) -> None:
    contexts = ["", *(tokenizer.decode(prompt) for prompt in prompts)]
    choices = [" (A)", " 12", " two or so", " x"]
    requests = [
        Instance("loglikelihood", doc={}, arguments=(context, choice), idx=0, metadata=("gpqa", number, 1))
        for number, context in enumerate(contexts)
        for choice in choices
    ]
    expected = plain(model, tokenizer, max_length).loglikelihood(requests, disable_tqdm=True)
    for batch_size, world_size, tokens_per_row in SHARED:

        def work(processes: Processes, batch: int = batch_size, row: int = tokens_per_row) -> list[tuple[float, bool]]:
            given = {"batch_size": batch, "tokens_per_row": row, "max_length": max_length, "processes": processes}
            answers = one(model, tokenizer, **given)
            assert HymbaLM(answers, name="test").loglikelihood(requests, disable_tqdm=True) == (
                answers.score(*_tokens(answers, requests), name="test")
            )
            assert (answers.truncated_prompts > 0) == (max_length == 40)
            return HymbaLM(answers, name="test").loglikelihood(requests, disable_tqdm=True)

        found = together(world_size, work)
        assert all(scores == found[0] for scores in found)
        assert_close([value for value, _ in found[0]], [value for value, _ in expected], **CLOSE)
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in expected]
    assert len({round(value, 3) for value, _ in expected}) > 20, "they depend on contexts and choices"


def _args(request: Instance) -> tuple[str, str]:
    context, continuation = request.args
    return context, continuation


def _tokens(answers: Answers, requests: list[Instance]) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts and continuations as lm-eval encodes them."""
    adapter = HymbaLM(answers, name="test")
    pairs: list[tuple[list[int], list[int]]] = []
    for context, continuation in map(_args, requests):
        ids = adapter.tok_encode(continuation, add_special_tokens=False)
        pairs.append(adapter._encode_pair(context, continuation) if context else ([adapter.prefix_token_id], ids))
    return [before for before, _ in pairs], [after for _, after in pairs]


# ---- several processes ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_every_request_has_one_process_and_no_process_has_much_more_than_another(
    costs: list[int], processes: int
) -> None:
    shares = deal(costs, processes)
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert all(costs[a] >= costs[b] for share in shares for a, b in itertools.pairwise(share))


def test_processes_answer_a_share_each_and_get_all_answers(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], decoded: list[int]
) -> None:
    alone = one(model, tokenizer)
    expected = alone.generate(prompts, max_new_tokens=MOST, name="test")
    assert decoded == [7], "the two equal prompts are one"
    decoded.clear()

    def work(processes: Processes) -> Any:
        answers = one(model, tokenizer, processes=processes)
        return answers.generate(prompts, max_new_tokens=MOST, name="test"), counters(answers)

    assert together(3, work) == [(expected, counters(alone))] * 3
    assert sorted(decoded) == [2, 2, 3]
    assert alone.new_tokens == sum(answer.tokens for answer in expected) - expected[4].tokens
    decoded.clear()
    assert [found[0] for found in together(9, work)] == [expected] * 9
    assert decoded == [1] * 7, "nothing is left for two of them"


def test_processes_that_ask_for_different_things_do_not_mix_their_answers(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]]
) -> None:
    with pytest.raises(AssertionError, match="the processes ask for different answers"):
        together(
            2,
            lambda processes: one(model, tokenizer, processes=processes).generate(
                prompts[: 2 + processes.rank], max_new_tokens=2, name="test"
            ),
        )


def test_lm_evals_own_path_is_refused_in_several_processes(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]]
) -> None:
    def work(processes: Processes) -> None:
        request = Instance("generate_until", {}, ("One?", {"do_sample": True, "temperature": 1.0}), 0)
        HymbaLM(one(model, tokenizer, processes=processes), name="gsm8k").generate_until([request])

    with pytest.raises(UsageError) as error:
        together(2, work)
    assert str(error.value) == (
        "gsm8k: lm-eval's own path answers, one padded batch at a time, because it samples (do_sample=True); that runs in "
        "one process, not in 2: set num_processes=1"
    )


# ---- kept answers ---------------------------------------------------------------------------------------------------


def test_two_real_processes_agree_with_one_and_what_they_had_when_killed_is_not_computed_again(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, decoded: list[int]
) -> None:
    contexts = [prompt for prompt in prompts for _ in range(2)]
    continuations = [tokenizer.encode(f" {one}", add_special_tokens=False) for one in ("7", "none") * len(prompts)]
    asked = {"prompts": prompts, "contexts": contexts, "continuations": continuations}
    (tmp_path / "asked.json").write_text(json.dumps({**asked, "tokenizer": str(TOKENIZER), "most": MOST}))
    model.save_pretrained(tmp_path / "model")
    script = [sys.executable, str(Path(__file__).with_name("answering_process.py")), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = [subprocess.Popen([*script, str(rank), "2", str(3 - rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(120) for process in running] == [-signal.SIGKILL] * 2
    finally:
        for process in running:
            process.kill()

    alone = one(model, tokenizer)
    expected = alone.generate(prompts, max_new_tokens=MOST, name="test")
    scores = alone.score(contexts, continuations, name="test")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [Answer(**answer) for answer in found["answers"]] == expected
        assert_close([value for value, _ in found["scores"]], [value for value, _ in scores], **CLOSE)
        assert tuple(found["counters"].values()) == counters(alone)

    store = tmp_path / "store" / "gsm8k"
    assert [len(file.read_text().splitlines()) for file in sorted(store.parent.iterdir())] == [3, 2]
    decoded.clear()
    resumed = one(model, tokenizer, store=store)
    assert resumed.generate(prompts, max_new_tokens=MOST, name="test") == expected
    assert decoded == [2]
    assert (resumed.reused, resumed.new_tokens) == (5, sum(record["tokens"] for record in _records(store)[-2:]))

    # three processes find all of it, and leave nothing behind
    decoded.clear()

    def work(processes: Processes) -> Any:
        answers = one(model, tokenizer, store=store, processes=processes)
        found = answers.generate(prompts, max_new_tokens=MOST, name="test"), answers.reused
        answers.finish()
        return found

    assert together(3, work) == [(expected, 7)] * 3
    assert not decoded
    assert not list(store.parent.iterdir())


def _records(store: Path) -> list[dict[str, Any]]:
    """What process 0 has kept."""
    lines = store.with_name(f"{store.name}.answers-0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_answer_is_in_its_file_as_soon_as_it_is_there(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    seen: list[int] = []

    def look(number: int, answer: Answer) -> None:
        record = _records(tmp_path / "gsm8k")[-1]
        assert (record["text"], record["tokens"]) == (answer.text, answer.tokens)
        seen.append(len(_records(tmp_path / "gsm8k")))

    answers = one(model, tokenizer, store=tmp_path / "gsm8k", batch_size=1)
    answers.generate(prompts, max_new_tokens=3, name="test", on_answer=look)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_an_interruption_before_the_first_answer_leaves_no_file(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers_module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one(model, tokenizer, store=tmp_path / "out" / "gsm8k").generate(prompts, max_new_tokens=3, name="test")
    assert not (tmp_path / "out").exists()


def test_processes_whose_folders_are_not_shared_go_on_with_the_answers_of_all(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, decoded: list[int]
) -> None:
    def work(processes: Processes) -> Any:
        answers = one(model, tokenizer, store=tmp_path / str(processes.rank) / "gsm8k", processes=processes)
        return answers.generate(prompts, max_new_tokens=3, name="test"), answers.reused

    (found, _), _ = together(2, work)
    assert sorted(decoded) == [3, 4]
    decoded.clear()
    assert together(2, work) == [(found, 7)] * 2
    assert not decoded


@pytest.mark.parametrize("kept", [0, 1, 30, -1], ids=["nothing", "a character", "half", "all but the line break"])
def test_a_torn_last_line_is_dropped_and_the_file_is_whole_again(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, decoded: list[int], kept: int
) -> None:
    store = tmp_path / "gsm8k"
    expected = one(model, tokenizer, store=store).generate(prompts, max_new_tokens=3, name="test")
    file = tmp_path / "gsm8k.answers-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * 20 + b"\n" + json.dumps({"key": "k", "other": 1}).encode() + b"\n"  # as a power cut may leave it
    file.write_bytes(b"".join([*lines[:-1], lines[-1][:kept]]))
    decoded.clear()
    answers = one(model, tokenizer, store=store)
    assert answers.generate(prompts, max_new_tokens=3, name="test") == expected
    assert (decoded, answers.reused) == ([2], 5)
    decoded.clear()
    again = one(model, tokenizer, store=store)
    assert again.generate(prompts, max_new_tokens=3, name="test") == expected
    assert (decoded, again.reused) == ([], 7)


def test_nothing_is_reused_for_another_checkpoint_type_of_number_template_or_setting(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, decoded: list[int]
) -> None:
    store = tmp_path / "gsm8k"

    def reused(changes: dict[str, Any] | None = None, model: Any = model, **given: Any) -> int:
        answers = one(model, tokenizer, store=store, **(changes or {}))
        before = given.pop("template", [])
        asked = [before + prompt for prompt in prompts]
        answers.generate(asked, **{"max_new_tokens": 3, "name": "test", **given})
        return answers.reused

    assert reused() == 0
    decoded.clear()
    assert [reused(), reused({"batch_size": 1}), decoded] == [7, 7, []]
    assert reused({"identity": "b"}) == 0
    assert reused(max_new_tokens=4) == 0
    assert reused(until=["q"]) == 0
    assert reused(template=[5]) == 0
    assert reused(redact=lambda number, text: text) == 0
    assert reused({"max_length": 40}) < 7, "what is cut is another prompt"
    assert reused(model=_in_float64(model)) == 0
    other = one(model, tokenizer, store=tmp_path / "gsm8k_nvidia")
    other.generate(prompts, max_new_tokens=3, name="test")
    assert other.reused == 0, "another task's"


def _in_float64(model: HymbaForCausalLM) -> HymbaForCausalLM:
    other = HymbaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other.double()


def test_an_end_token_stored_with_the_model_is_a_setting(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one(model, tokenizer, store=tmp_path / "gsm8k").generate(prompts, max_new_tokens=3, name="test")
    monkeypatch.setattr(model.generation_config, "eos_token_id", 17)
    answers = one(model, tokenizer, store=tmp_path / "gsm8k")
    answers.generate(prompts, max_new_tokens=3, name="test")
    assert answers.reused == 0


def test_log_likelihoods_come_back_exactly(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    continuations = [tokenizer.encode(" 12 of them", add_special_tokens=False)] * len(prompts)
    expected = one(model, tokenizer, store=tmp_path / "gpqa").score(prompts, continuations, name="test")
    monkeypatch.setattr(answers_module, "scored_rows", lambda *_, **__: pytest.fail("nothing is left to score"))
    assert one(model, tokenizer, store=tmp_path / "gpqa").score(prompts, continuations, name="test") == expected
    assert set(_records(tmp_path / "gpqa")[0]) == {"key", "seconds", "log_likelihood", "is_greedy"}


def test_of_a_redacted_answer_only_what_may_be_kept_exists_on_disk_and_in_memory(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    whole = one(model, tokenizer).generate(prompts, max_new_tokens=MOST, name="test")
    answers = one(model, tokenizer, store=tmp_path / "gpqa")
    found = answers.generate(prompts, max_new_tokens=MOST, name="test", redact=lambda number, text: f"({number})")
    numbers = [0, 1, 2, 3, 0, 5, 6, 7]  # equal prompts have one answer
    assert found == [Answer(f"({n})", one.tokens, one.cut_off) for n, one in zip(numbers, whole, strict=True)]
    kept = (tmp_path / "gpqa.answers-0.jsonl").read_text()
    assert sorted(json.loads(line)["text"] for line in kept.splitlines()) == [f"({n})" for n in sorted({*numbers})]
    assert not any(answer.text[-6:] in kept for answer in whole)


def test_a_full_disk_is_said_with_what_to_do(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "gsm8k.answers-0.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError) as error:
        one(model, tokenizer, store=tmp_path / "gsm8k").generate(prompts, max_new_tokens=3, name="test")
    message = str(error.value)
    assert message.startswith(f"{tmp_path} cannot be written (the disk is full); free some room (")
    assert message.endswith("), then run the same command again: it continues from the answers already given")


# ---- what is run ----------------------------------------------------------------------------------------------------


def test_what_prompts_begin_with_runs_once_and_no_pass_takes_more_than_a_row(
    model: HymbaForCausalLM, tokenizer: Any, prompts: list[list[int]]
) -> None:
    counts: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    many = [[*prompts[0], 20 + number, *prompts[7]] for number in range(30)]
    one(model, tokenizer, batch_size=30, tokens_per_row=50).generate(many, max_new_tokens=1, name="test")
    handle.remove()
    own = 1 + len(prompts[7])
    assert counts[0] == model.config.num_memory_tokens + len(prompts[0])
    assert sum(counts[1:]) == 30 * own
    assert max(counts[1:]) <= 50


def test_the_stop_rule_is_given_the_end_tokens_of_the_model(model: HymbaForCausalLM, tokenizer: Any) -> None:
    assert end_ids(None) == end_ids(_ending(None)) == frozenset()
    assert end_ids(_ending(3)) == {3}
    assert end_ids(_ending([3, 4])) == {3, 4}
    stop = StopAt(tokenizer, ["never"], ids={9})
    assert [stop([5]), stop([5, 9]), stop([9, 5])] == [False, True, False]


def _ending(ids: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=ids)
