"""Generation with the cache equals decoding without it, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model import HymbaCache, HymbaForCausalLM, SegmentTree, cached_attention
from hymba_align.model.attention import TreeAttention
from hymba_align.model.kernels import choice
from hymba_align.model.key_values import KeyValues

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


def test_rows_can_be_repeated_each_in_its_place_and_a_cache_that_is_reset_starts_anew(
    small_model: HymbaForCausalLM,
) -> None:
    texts, more = tokens(2, 9), tokens(4, 3, seed=1)
    with torch.no_grad():
        cache = small_model(texts, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        continued = small_model(more, past_key_values=cache).logits
        whole = torch.cat([texts.repeat_interleave(2, dim=0), more], dim=1)
        assert_close(continued, small_model(whole, use_cache=False).logits[:, 9:], **CLOSE)
        cache.reset()
        assert (len(cache), cache.get_seq_length(), cache.num_bytes) == (0, 0, 0)
        again = small_model(more, past_key_values=cache).logits
        assert_close(again, small_model(more, use_cache=False).logits, **CLOSE)
    assert cache.lengths.tolist() == [3] * 4


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


def test_a_cache_keeps_no_memory_beyond_what_it_counts(small_model: HymbaForCausalLM) -> None:
    """Its tensors must not be views of a whole row's: with one key head, those of the meta tokens would be."""
    with torch.no_grad():
        cache = small_model(tokens(1, 30), use_cache=True).past_key_values
        assert stored_bytes(cache) == cache.num_bytes
        small_model(tokens(1, 1), past_key_values=cache)
        assert stored_bytes(cache) == cache.num_bytes
        cache.fold()
        assert stored_bytes(cache) == cache.num_bytes
        small_model(tokens(1, 3), past_key_values=cache)
    assert stored_bytes(cache) == cache.num_bytes


def stored_bytes(cache: HymbaCache) -> int:
    """Bytes of the memory that its tensors keep alive."""
    tensors = [tensor for state in cache.states for tensor in (state.conv_tail, state.ssm_state)]
    for stored in (state.key_values for state in cache.states):
        if stored is not None:
            tensors += [*stored.shared, stored.keys, stored.values]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return sum(storage.nbytes() for storage in storages.values())


class TakesAllQueries:
    """A backend that cannot leave out the queries of cached tokens."""

    def __init__(self, tree: TreeAttention) -> None:
        self.attend = tree.attend

    @classmethod
    def build(cls, lengths: list[int], parents: list[int], window: int, device: torch.device) -> Self:
        return cls(TreeAttention.build(lengths, parents, window, device))


@pytest.mark.parametrize("backend", ["default", TreeAttention, TakesAllQueries])
@pytest.mark.parametrize("prefix", [0, 4, 6, 7, 19])  # the window is 6
def test_a_tree_starts_one_row_per_leaf_that_holds_its_whole_path_also_behind_a_cached_prefix(
    small_model: HymbaForCausalLM, prefix: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "default":
        monkeypatch.setattr(choice.Kernels, "attention_row", backend)
    tree = SegmentTree([3, 9, 1, 4, 8, 1], [-1, 0, 1, 0, -1, 1])  # leaves: 2, 3, 4, 5
    row, before, more = tokens(26), tokens(prefix, seed=1), tokens(4, 12, seed=2)
    past = None
    with torch.no_grad():
        if prefix:
            past = small_model(before[None], use_cache=True).past_key_values
        output = small_model(row[None], segments=tree, use_cache=True, past_key_values=past)
        cache = output.past_key_values
        assert cache.get_seq_length() == int(cache.lengths.max())  # what its longest row would be in a batch
        continued = [
            small_model(piece, past_key_values=cache).logits for piece in more.split([1, 1, 7, 1, 1, 1], dim=1)
        ]
    continued = torch.cat(continued, dim=1)
    pieces = row.split(tree.lengths.tolist())
    for leaf, segment in enumerate([2, 3, 4, 5]):
        path = torch.cat([before, *(pieces[one] for one in tree.path(segment))])
        assert cache.lengths[leaf] == len(path) + 12
        with torch.no_grad():
            whole = small_model(torch.cat([path, more[leaf]])[None], use_cache=False).logits[0]
        assert_close(continued[leaf], whole[len(path) :], **CLOSE)
        start = int(tree.offsets[segment])
        own = output.logits[0, start : start + int(tree.lengths[segment])]
        assert_close(own, whole[len(path) - len(own) : len(path)], **CLOSE)


def test_rows_of_a_cache_may_end_in_chosen_segments_in_any_order_and_more_than_once(
    small_model: HymbaForCausalLM,
) -> None:
    tree, ends = SegmentTree([3, 9, 2], [-1, 0, 0]), torch.tensor([2, 0, 2, 1])
    row, more = tokens(14), tokens(4, 3, seed=1)
    pieces = row.split(tree.lengths.tolist())
    with torch.no_grad():
        cache = small_model(row[None], segments=tree, use_cache=True, cache_segments=ends).past_key_values
        continued = small_model(more, past_key_values=cache).logits
        for number, end in enumerate(ends.tolist()):
            path = torch.cat([pieces[one] for one in tree.path(end)])
            whole = small_model(torch.cat([path, more[number]])[None], use_cache=False).logits[0]
            assert_close(continued[number], whole[-3:], **CLOSE)


def test_one_row_starts_many_sequences_without_copies_of_meta_tokens_and_prefix_in_global_layers(
    small_model: HymbaForCausalLM,
) -> None:
    prefix, questions = tokens(1, 20), tokens(3, 5, seed=1)
    with torch.no_grad():
        start = small_model(prefix, use_cache=True).past_key_values
        rows = start.expanded(3)
        logits = [small_model(piece, past_key_values=rows).logits for piece in questions.split([1, 3, 1], dim=1)]
        whole = small_model(torch.cat([prefix.expand(3, -1), questions], dim=1), use_cache=False).logits
    assert_close(torch.cat(logits, dim=1), whole[:, 20:], **CLOSE)
    config = small_model.config
    for state, first in zip(rows.states, start.states, strict=True):
        if state.key_values is not None:
            assert state.key_values.shared[0] is first.key_values.shared[0]
            held = 20 if state.key_values.window is None else 0
            assert state.key_values.shared[0].shape[1] == config.num_memory_tokens + held
    with pytest.raises(ValueError, match="the cache holds 3 sequences; only a cache of one can start others"):
        rows.expanded(2)


@pytest.mark.parametrize("lengths", [[2, 3], [3, 30], [30, 4]])
def test_rows_that_are_replaced_continue_as_the_sequences_they_were_given(
    small_model: HymbaForCausalLM, lengths: list[int]
) -> None:
    prefix, more = tokens(1, 4), tokens(3, 8, seed=2)
    texts = [tokens(1, length, seed=length) for length in lengths]
    with torch.no_grad():
        start = small_model(prefix, use_cache=True).past_key_values
        rows = start.expanded(3)
        small_model(texts[0].expand(3, -1), past_key_values=rows)
        fresh = start.expanded(2)
        small_model(texts[1].expand(2, -1), past_key_values=fresh)
        rows.put(torch.tensor([2, 0]), fresh)
        assert rows.get_seq_length() == 4 + max(lengths)
        continued = torch.cat([small_model(more[:, step, None], past_key_values=rows).logits for step in range(8)], 1)
        for row, text in enumerate([texts[1], texts[0], texts[1]]):
            whole = torch.cat([prefix, text, more[row : row + 1]], dim=1)
            assert_close(continued[row], small_model(whole, use_cache=False).logits[0, -8:], **CLOSE)
        other = small_model(prefix, use_cache=True).past_key_values.expanded(1)
    held = [state.conv_tail.clone() for state in rows.states]
    with pytest.raises(ValueError, match="started from another prefix; expand both from one cache"):
        rows.put(torch.tensor([0]), other)
    assert all(torch.equal(state.conv_tail, tail) for state, tail in zip(rows.states, held, strict=True))


def test_buffers_of_keys_grow_by_a_bounded_slack_and_not_past_the_context(small_model: HymbaForCausalLM) -> None:
    with torch.no_grad():
        cache = small_model(tokens(2, 90), use_cache=True).past_key_values
        slots = []
        for step in range(38):
            small_model(tokens(2, 1, seed=step), past_key_values=cache)
            slots.append(cache.states[0].key_values.keys.shape[2])
    assert slots == [90 + 1 + 16] * 17 + [90 + 17 + 1 + 16] * 17 + [128] * 4  # the context
    assert cache.states[1].key_values.keys.shape[2] == small_model.config.sliding_window
    held = torch.zeros(1, 1, 4000, 1)
    long = KeyValues(None, (held, held), held, held)
    long.grow(4001, 8192)
    assert long.keys.shape[2] == long.values.shape[2] == 4001 + 256


def test_long_pieces_are_attended_to_in_blocks_of_bounded_scores_with_the_same_result(
    small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = small_model.config.num_attention_heads
    attend, scores, own_keys = cached_attention.attend_cached, [], []

    def watched(q: Tensor, own: Any, shared: Any, cached: Any, *seen: Tensor | None) -> Tensor:
        keys = own[0].shape[2], shared[0].shape[1], cached[0].shape[2]
        scores.append(q.shape[0] * q.shape[1] * heads * sum(keys))
        own_keys.append(keys[0])
        return attend(q, own, shared, cached, *seen)

    monkeypatch.setattr(cached_attention, "attend_cached", watched)
    monkeypatch.setattr(cached_attention, "SCORES_AT_ONCE", 700)  # a few queries at a time
    ids = tokens(2, 40)
    with torch.no_grad():
        cache = small_model(ids[:, :9], use_cache=True).past_key_values
        piece = small_model(ids[:, 9:], past_key_values=cache).logits
        assert_close(piece, small_model(ids, use_cache=False).logits[:, 9:], **CLOSE)
    assert 300 < max(scores) <= 700
    assert (max(own_keys), own_keys.count(31)) == (31, 2)  # the last block sees all 31 new tokens in global layers only


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
    with pytest.raises(ValueError, match="a cache holds whole sequences; pass use_cache=False and no past_key_values"):
        small_model(tokens(1, 2).repeat(2, 1), past_key_values=cache, shared_prefix_lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="the cache holds 2 sequences but the batch has 1 rows"):
        small_model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(
        ValueError, match="the cache holds 2 sequences; a packed row or a tree can only continue a cache"
    ):
        small_model(tokens(1, 3), segments=SegmentTree.from_lengths([1, 2]), past_key_values=cache)


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
