"""Generation with the cache equals decoding without it, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model import HymbaCache, HymbaForCausalLM

CLOSE = {"atol": 2e-5, "rtol": 0}  # float32, observed 4e-6


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def uncached(model: HymbaForCausalLM, prompt: Tensor, steps: int) -> list[int]:
    sequence = prompt[None]
    with torch.no_grad():
        for _ in range(steps):
            sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return sequence[0, len(prompt) :].tolist()


def test_a_batch_of_any_lengths_decodes_as_each_prompt_alone_far_past_the_window(
    small_model: HymbaForCausalLM, pad: Callable[[list[Tensor], str], tuple[Tensor, Tensor]]
) -> None:
    prompts = [tokens(n, seed=n) for n in (1, 5, 6, 7, 13, 20)]  # the window is 6
    ids, mask = pad(prompts, "left")
    output = small_model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        assert output[row, -25:].tolist() == uncached(small_model, prompt, 25)


def test_sampling_draws_the_same_tokens_with_and_without_the_cache(small_model: HymbaForCausalLM) -> None:
    ids = tokens(3, 9)
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        sampled.append(
            small_model.generate(ids, max_new_tokens=20, do_sample=True, eos_token_id=None, use_cache=use_cache)
        )
    assert torch.equal(*sampled)


@pytest.mark.parametrize("widths", [[4, 3, 5], [1, 1, 10], [8, 7, 1], [2, 9, 9]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_fed_to_the_cache_in_pieces_gives_the_logits_of_the_whole(
    small_model: HymbaForCausalLM, widths: list[int], side: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    cache = HymbaCache(small_model.config)
    texts: list[list[int]] = [[], [], []]
    found: list[list[Tensor]] = [[], [], []]
    for turn, width in enumerate(widths):  # each turn every row gets between 0 (1 at first) and `width` real tokens
        ids = torch.randint(0, 61, (3, width), generator=generator)
        mask = torch.zeros_like(ids)
        for row in range(3):
            count = int(torch.randint(int(turn == 0), width + 1, (), generator=generator)) if row else width
            real = slice(width - count, width) if side == "left" else slice(0, count)
            mask[row, real] = 1
            texts[row] += ids[row, real].tolist()
        with torch.no_grad():
            output = small_model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        for row in range(3):
            found[row].append(output.logits[row, mask[row].bool()])
    assert cache.lengths.tolist() == [len(text) for text in texts]
    assert cache.get_seq_length() == sum(widths)
    for text, logits in zip(texts, found, strict=True):
        with torch.no_grad():
            assert_close(torch.cat(logits), small_model(torch.tensor([text]), use_cache=False).logits[0], **CLOSE)


def test_beam_search_finds_the_same_beams_with_and_without_the_cache(small_model: HymbaForCausalLM) -> None:
    ids = tokens(2, 6)
    cached, plain = (
        small_model.generate(
            ids, max_new_tokens=8, do_sample=False, num_beams=4, eos_token_id=None, use_cache=use_cache
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_the_cache_holds_meta_keys_once_windows_in_local_layers_and_nothing_for_key_consumers(
    small_model: HymbaForCausalLM,
) -> None:
    config = small_model.config
    rows, length = 3, 40
    with torch.no_grad():
        cache = small_model(tokens(rows, length), use_cache=True).past_key_values
    stored = [state.key_values for state in cache.states]
    assert [kv is None for kv in stored] == [False, False, True, True, False]
    assert [kv.keys.shape[2] for kv in stored if kv is not None] == [40, config.sliding_window, 40]
    per_token = config.num_key_value_heads * (config.head_dim + config.v_head_dim)
    key_values = per_token * (3 * config.num_memory_tokens + rows * (2 * length + config.sliding_window))
    states = rows * 5 * config.inner_size * (config.mamba_d_conv - 1 + config.mamba_d_state)
    assert cache.num_bytes == 4 * (key_values + states)


def test_prefill_reads_only_the_last_column_of_logits_in_generate(small_model: HymbaForCausalLM) -> None:
    widths: list[int] = []
    small_model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    small_model.generate(tokens(2, 9), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert widths == [1, 1, 1]


def test_what_the_cache_cannot_do_is_refused(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="cache_implementation is 'static'; Hymba generates with its own HymbaCache"):
        small_model.generate(tokens(1, 3), max_new_tokens=2, cache_implementation="static")
    cache = small_model(tokens(2, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot drop its last tokens"):
        cache.crop(1)
    with pytest.raises(ValueError, match="a cache holds one sequence per row"):
        small_model(tokens(1, 2).repeat(2, 1), past_key_values=cache, shared_prefix_lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="the cache holds 2 sequences but the batch has 1 rows"):
        small_model(tokens(1, 1), past_key_values=cache)


def test_a_continued_cache_trains_its_new_tokens_and_cuts_the_graph_before_them(small_model: HymbaForCausalLM) -> None:
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    cache = small_model(ids[:, :12], use_cache=True).past_key_values
    loss = small_model(ids[:, 12:], attention_mask=mask, past_key_values=cache, labels=ids[:, 12:]).loss
    with torch.no_grad():
        logprobs = small_model(ids).logits.log_softmax(-1)
    expected = -logprobs[:, 12:-1].gather(2, ids[:, 13:, None]).mean()
    assert_close(loss.detach(), expected, **CLOSE)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in small_model.model.layers.parameters())
    assert small_model.model.memory_tokens.grad is None  # they ran in the first pass


def test_half_precision_decodes_with_the_cache_as_without_up_to_rounding(small_model: HymbaForCausalLM) -> None:
    """Token for token is a promise of float32: in bfloat16 near ties may fall either way."""
    model = small_model.to(torch.bfloat16)
    ids = tokens(3, 20)
    cache = HymbaCache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits.float()
        pieces = [model(piece, past_key_values=cache).logits.float() for piece in ids.split([9, 1, 1, 9], dim=1)]
    error = (torch.cat(pieces, dim=1) - whole).abs()
    assert error.mean() < 0.02 * whole.std()  # observed 0.005
    assert error.max() < 0.15 * whole.std()  # observed 0.04
