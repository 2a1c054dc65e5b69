"""Looking at a forward pass: in any form of input, through any wrapper, without a trace in what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hymba_align.inside.observing import ObservedAttention, ObservedFusion, hymba_in, observe
from hymba_align.model import HymbaCache, HymbaForCausalLM, SegmentTree

LENGTHS = [9, 1, 14]
CLOSE = {"atol": 2e-6, "rtol": 0}  # float32, sums may have another order, observed 0


@pytest.fixture
def ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (length,), generator=generator) for length in LENGTHS]


def padded(ids: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(map(len, ids)) + 2
    tokens, mask = torch.full((len(ids), width), 7), torch.zeros(len(ids), width, dtype=torch.int64)
    for row, one in enumerate(ids):
        start = {"left": width - len(one), "right": 0, "middle": 1}[side]
        tokens[row, start : start + len(one)] = one
        mask[row, start : start + len(one)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def packed(ids: list[Tensor], form: str) -> dict[str, Any]:
    row, lengths = {"input_ids": torch.cat(ids)[None]}, torch.tensor([len(one) for one in ids])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return (
        row
        | {
            "segments": {"segments": SegmentTree.from_lengths(lengths)},
            "position_ids": {"position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None]},
            "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
            "cu_seq_lens_k": {"cu_seq_lens_k": ends},
            "seq_idx": {"seq_idx": torch.arange(len(ids)).repeat_interleave(lengths)[None]},
        }[form]
    )


FORMS: dict[str, Callable[[list[Tensor]], dict[str, Any]]] = {
    **{f"padded on the {side}": lambda ids, side=side: padded(ids, side) for side in ("left", "right", "middle")},
    **{
        form: lambda ids, form=form: packed(ids, form)
        for form in ("segments", "position_ids", "cu_seq_lens", "cu_seq_lens_k", "seq_idx")
    },
}


class Seen:
    """Everything that was shown: the weights of each segment (H, Q, K) and both branches of its tokens, by layer."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], Tensor] = {}
        self.branches: dict[tuple[int, int], Tensor] = {}
        self.token_ids: Tensor | None = None
        self.calls: list[str] = []

    def attention(self, seen: ObservedAttention) -> None:
        self.calls.append(f"attention {seen.layer}")
        self.token_ids = seen.row.token_ids
        assert not torch.is_grad_enabled()
        assert not seen.q_LHd.requires_grad
        assert not seen.k_LGd.requires_grad
        for block in seen.weights():
            self.weights[seen.layer, block.segment] = block.weights

    def fusion(self, seen: ObservedFusion) -> None:
        self.calls.append(f"fusion {seen.layer}")
        parts = torch.stack([seen.attention, seen.ssm, seen.attention_normed, seen.ssm_normed])
        assert not any(x.requires_grad for x in (seen.attention, seen.ssm, seen.attention_normed, seen.ssm_normed))
        for segment, part in enumerate(parts[:, seen.row.meta_tokens :].split(seen.row.tree.lengths.tolist(), dim=1)):
            self.branches[seen.layer, segment] = part


def look(model: nn.Module, inputs: dict[str, Any]) -> tuple[Seen, Tensor]:
    """What is shown of a forward pass, and its logits."""
    seen = Seen()
    with torch.no_grad(), observe(model, attention=seen.attention, fusion=seen.fusion):
        logits = model(**inputs).logits
    return seen, logits


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


# --- What is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_document_shows_the_same_alone_as_in_a_batch_or_a_packed_row(
    small_model: HymbaForCausalLM, ids: list[Tensor], form: str
) -> None:
    together, _ = look(small_model, FORMS[form](ids))

    assert together.token_ids is not None
    assert torch.equal(together.token_ids, torch.cat(ids))
    for segment, one in enumerate(ids):
        alone, _ = look(small_model, {"input_ids": one[None]})
        for layer in range(5):
            assert_close(together.weights[layer, segment], alone.weights[layer, 0], **CLOSE)
            assert_close(together.branches[layer, segment], alone.branches[layer, 0], atol=2e-5, rtol=0)  # seen 0


def test_a_preference_batch_shows_its_prompt_once(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    prompt, _, answer = ids
    pair = [torch.cat([prompt, answer]), torch.cat([prompt, answer[:5]])]
    batch = padded(pair, "left") | {"shared_prefix_lengths": torch.tensor([len(prompt)])}

    shown, _ = look(small_model, {**batch, "use_cache": False})

    assert [len(shown.weights[0, segment][0]) for segment in range(3)] == [9, 14, 5]
    for segment, whole in zip((1, 2), pair, strict=True):
        alone, _ = look(small_model, {"input_ids": whole[None]})
        assert_close(shown.weights[0, segment], alone.weights[0, 0][:, 9:], **CLOSE)


def test_embeddings_show_what_their_tokens_do_and_no_token_ids(
    small_model: HymbaForCausalLM, ids: list[Tensor]
) -> None:
    by_ids, _ = look(small_model, {"input_ids": ids[0][None]})
    by_embeddings, _ = look(small_model, {"inputs_embeds": small_model.model.embed_tokens(ids[0][None])})

    assert by_embeddings.token_ids is None
    assert all(torch.equal(by_ids.weights[key], by_embeddings.weights[key]) for key in by_ids.weights)


def test_the_fusion_shows_what_enters_the_output_projection(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    entered: list[Tensor] = []
    for layer in small_model.model.layers:
        layer.mamba.out_proj.register_forward_pre_hook(lambda _, args: entered.append(args[0][5:]))

    shown, _ = look(small_model, {"input_ids": ids[0][None]})

    assert shown.calls == [f"{what} {layer}" for layer in range(5) for what in ("attention", "fusion")]
    for layer, fused in enumerate(entered):
        attention, ssm, attention_normed, ssm_normed = shown.branches[layer, 0]
        mixer = small_model.model.layers[layer].mamba
        assert torch.equal((attention_normed + ssm_normed) / 2, fused)
        assert torch.equal(mixer.pre_avg_layernorm1(attention), attention_normed)
        assert torch.equal(mixer.pre_avg_layernorm2(ssm), ssm_normed)


def test_under_autocast_queries_and_keys_are_shown_as_they_are_multiplied(
    small_model: HymbaForCausalLM, ids: list[Tensor]
) -> None:
    found: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def visit(seen: ObservedAttention) -> None:
        weights = next(seen.weights()).weights
        assert (weights.sum(-1) - 1).abs().max() <= 1e-6
        found.append((seen.q_LHd.dtype, seen.k_LGd.dtype, weights.dtype))

    with torch.autocast("cpu", torch.bfloat16), observe(small_model, attention=visit):
        small_model(input_ids=ids[0][None])
    assert found == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 5


def test_what_checkpointing_computes_again_is_not_shown_again(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    small_model.train().activation_checkpointing_enable({"use_reentrant": False})
    seen = Seen()
    with observe(small_model, attention=seen.attention, fusion=seen.fusion):
        small_model(input_ids=ids[0][None], labels=ids[0][None]).loss.backward()
    assert seen.calls == [f"{what} {layer}" for layer in range(5) for what in ("attention", "fusion")]


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_that_are_not_merged_show_what_merged_ones_do(
    small_model: HymbaForCausalLM, ids: list[Tensor]
) -> None:
    torch.manual_seed(1)
    plain, _ = look(small_model, packed(ids, "segments"))
    adapted = get_peft_model(
        small_model,
        LoraConfig(
            r=2, target_modules=["in_proj", "out_proj"], modules_to_save=["pre_avg_layernorm2"], init_lora_weights=False
        ),
    ).eval()

    unmerged, _ = look(adapted, packed(ids, "segments"))
    merged, _ = look(adapted.merge_and_unload(), packed(ids, "segments"))

    assert unmerged.calls == merged.calls
    for key, weights in unmerged.weights.items():
        assert_close(
            weights, merged.weights[key], atol=2e-5, rtol=0
        )  # float32, merged weights are rounded, observed 4e-6
        assert_close(unmerged.branches[key], merged.branches[key], atol=1e-4, rtol=0)  # float32, observed 2e-5
    assert (plain.weights[4, 2] - merged.weights[4, 2]).abs().max() > 0.01


# --- No trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["padded on the left", "padded on the right", "segments", "position_ids"])
def test_the_output_does_not_change_by_a_bit(
    small_model: HymbaForCausalLM, ids: list[Tensor], form: str, dtype: torch.dtype
) -> None:
    model = small_model.to(dtype)
    inputs = FORMS[form](ids)
    with torch.no_grad():
        wanted = model(**inputs).logits

    _, logits = look(model, inputs)

    assert torch.equal(logits, wanted)
    assert hooks(model) == 0


def test_gradients_do_not_change_by_a_bit(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    def gradients() -> list[Tensor]:
        small_model.zero_grad()
        small_model(**packed(ids, "segments"), labels=torch.cat(ids)[None]).loss.backward()
        return [parameter.grad.clone() for parameter in small_model.parameters() if parameter.grad is not None]

    wanted, seen = gradients(), Seen()
    with observe(small_model, attention=seen.attention, fusion=seen.fusion):
        found = gradients()

    assert seen.calls
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_a_cache_is_filled_as_ever(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    inputs = {"input_ids": ids[0][None], "use_cache": True}
    with torch.no_grad():
        wanted = small_model(**inputs).past_key_values
        with observe(small_model, attention=Seen().attention):
            found = small_model(**inputs, past_key_values=HymbaCache(small_model.config)).past_key_values
        after = [small_model(input_ids=ids[1][None], past_key_values=cache).logits for cache in (wanted, found)]
    assert torch.equal(*after)


def test_hooks_are_gone_after_a_visitor_failed(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    def fail(seen: ObservedAttention) -> None:
        raise RuntimeError(f"layer {seen.layer}")

    with pytest.raises(RuntimeError, match="layer 0"), observe(small_model, attention=fail):
        small_model(input_ids=ids[0][None])
    assert hooks(small_model) == 0


def test_the_observed_model_can_be_called_again_after_a_pass_that_failed(
    small_model: HymbaForCausalLM, ids: list[Tensor]
) -> None:
    seen = Seen()
    with torch.no_grad(), observe(small_model, attention=seen.attention, fusion=seen.fusion):
        with pytest.raises(IndexError):
            small_model(input_ids=torch.tensor([[999]]))
        small_model.model.meta_cache()
        assert seen.calls == []  # what failed is over
        small_model(input_ids=ids[0][None])
    assert len(seen.calls) == 10


# --- What cannot be observed ------------------------------------------------------------------------------------------


def test_continuing_a_cache_is_an_error_and_leaves_no_hook(small_model: HymbaForCausalLM, ids: list[Tensor]) -> None:
    with torch.no_grad():
        cache = small_model(input_ids=ids[0][None], use_cache=True).past_key_values
        with pytest.raises(ValueError) as caught, observe(small_model, attention=Seen().attention):
            small_model(input_ids=ids[1][None], past_key_values=cache)
    assert str(caught.value) == (
        "a forward pass that continues a cache cannot be observed: its keys are not in the row; run whole texts"
    )
    assert hooks(small_model) == 0


def test_the_meta_tokens_alone_are_not_shown(small_model: HymbaForCausalLM) -> None:
    seen = Seen()
    with torch.no_grad(), observe(small_model, attention=seen.attention, fusion=seen.fusion):
        small_model.model.meta_cache()
    assert seen.calls == []


@pytest.mark.parametrize("count", [0, 2])
def test_only_one_hymba_can_be_observed(small_model: HymbaForCausalLM, count: int) -> None:
    with pytest.raises(ValueError) as caught:
        hymba_in(nn.ModuleList([HymbaForCausalLM(small_model.config) for _ in range(count)]))
    assert str(caught.value) == f"a ModuleList holds {count} Hymba models; observe one at a time"
