"""The forward pass: input forms agree, contradictions are refused, nothing leaks, files round-trip."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hymba_align.model import HymbaForCausalLM, SegmentTree

CLOSE = {"atol": 2e-5, "rtol": 0}  # float32, observed 4e-6


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def test_every_description_of_the_same_documents_gives_the_same_logits(small_model: HymbaForCausalLM) -> None:
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(7), torch.arange(1), torch.arange(12)])[None]
    cumulative = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    with torch.no_grad():
        expected = small_model(ids, segments=SegmentTree.from_lengths([7, 1, 12])).logits
        for described in (
            {"position_ids": positions},
            {"cu_seq_lens_q": cumulative},
            {"cu_seq_lens_k": cumulative},
            {"seq_idx": torch.repeat_interleave(torch.tensor([4, 2, 4]), torch.tensor([7, 1, 12]))[None]},
            {
                "position_ids": positions,
                "cu_seq_lens_q": cumulative,
                "cu_seq_lens_k": cumulative,
                "max_length_q": 12,
                "max_length_k": 12,
                "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor([7, 1, 12]))[None],
            },
            {"attention_mask": torch.ones_like(ids), "position_ids": positions},
        ):
            assert torch.equal(small_model(ids, **described).logits, expected)
        embeds = small_model.get_input_embeddings()(ids)
        assert torch.equal(small_model(inputs_embeds=embeds, position_ids=positions).logits, expected)


def test_changing_one_document_leaves_the_other_documents_bitwise_unchanged(small_model: HymbaForCausalLM) -> None:
    ids = tokens(1, 40)
    tree = SegmentTree.from_lengths([11, 29])
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 61
    with torch.no_grad():
        before, after = (small_model(x, segments=tree).logits[0] for x in (ids, changed))
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10], after[10])
    assert torch.equal(before[11:], after[11:])


def test_meta_tokens_run_once_however_many_documents_there_are(small_model: HymbaForCausalLM) -> None:
    seen: list[int] = []
    small_model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    small_model(tokens(1, 24), segments=SegmentTree.from_lengths([3] * 8))
    small_model(tokens(8, 3))
    assert seen == [24 + 5, 24 + 5]


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_a_shared_preference_prefix_changes_nothing_but_the_work(
    small_model: HymbaForCausalLM, pad: Callable[[list[Tensor], str], tuple[Tensor, Tensor]], side: str
) -> None:
    prompts, answers = (
        [tokens(9), tokens(0), tokens(4)],
        [[tokens(3), tokens(8)], [tokens(5), tokens(2)], [tokens(0), tokens(6)]],
    )
    rows = [torch.cat([prompt, pair[half]]) for half in (0, 1) for prompt, pair in zip(prompts, answers, strict=True)]
    ids, mask = pad(rows, side)
    seen: list[int] = []
    small_model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    apart = small_model(ids, attention_mask=mask).logits
    shared = small_model(ids, attention_mask=mask, shared_prefix_lengths=torch.tensor([9, 0, 4])).logits
    assert shared.shape == apart.shape
    assert_close(shared[mask.bool()], apart[mask.bool()], **CLOSE)
    assert seen[0] - seen[1] == 9 + 0 + 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids or inputs_embeds, exactly one"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\) but the input has \(2, 4\)"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4)}, "attention_mask has no real token"),
        ({"input_ids": tokens(1, 4), "position_ids": torch.tensor([[0, 1, 3, 4]])}, "position_ids go from 1 to 3 at token 2"),
        ({"input_ids": tokens(1, 4), "cu_seq_lens_q": torch.tensor([0, 3])}, r"cu_seq_lens ends at 3 but the input is \(1, 4\)"),
        (
            {"input_ids": tokens(1, 4), "cu_seq_lens_q": torch.tensor([0, 1, 4]), "position_ids": torch.tensor([[0, 1, 0, 1]])},
            r"position_ids gives documents of \[2, 2\] tokens, cu_seq_lens of \[1, 3\]",
        ),
        ({"input_ids": tokens(2, 4), "segments": SegmentTree.from_lengths([4])}, "segments describe a single row, but the batch has 2"),
        ({"input_ids": tokens(1, 4), "segments": SegmentTree.from_lengths([3])}, "segments hold 3 tokens but the row has 4"),
        (
            {"input_ids": tokens(1, 2), "segments": SegmentTree.from_lengths([2]), "attention_mask": torch.tensor([[0, 1]])},
            "segments exclude padding",
        ),
        ({"input_ids": tokens(3, 4), "shared_prefix_lengths": torch.tensor([1])}, r"shared_prefix_lengths has shape \(1,\) for a batch of 3"),
        ({"input_ids": tokens(1, 4).repeat(2, 1), "shared_prefix_lengths": torch.tensor([5])}, r"shared_prefix_lengths\[0\] is 5, but its rows have 4 and 4"),
        ({"input_ids": torch.tensor([[1, 2], [1, 3]]), "shared_prefix_lengths": torch.tensor([2])}, "the first 2 tokens of its two rows differ"),
        ({"input_ids": tokens(1, 4), "output_attentions": True}, "Hymba returns no attention weights"),
        ({"input_ids": tokens(1, 4).repeat(2, 1), "shared_prefix_lengths": torch.tensor([2]), "use_cache": True}, "a cache holds whole sequences"),
        ({"input_ids": tokens(1, 4), "cache_segments": torch.tensor([1]), "use_cache": True}, r"cache_segments is \[1\]; it lists one or more of the row's segments, 0 to 0"),
        (
            {"input_ids": tokens(2, 2), "attention_mask": torch.tensor([[1, 1], [0, 0]]), "use_cache": True},
            "no real token in row 1; every sequence needs one",
        ),
        (
            {"input_ids": tokens(1, 2), "segments": SegmentTree.from_lengths([2]), "shared_prefix_lengths": torch.tensor([])},
            "segments and shared_prefix_lengths exclude each other",
        ),
        (
            {"input_ids": tokens(1, 4), "segments": SegmentTree.from_lengths([4]), "cu_seq_lens_q": torch.tensor([0, 2, 4])},
            "segments exclude position_ids, cu_seq_lens and seq_idx that divide the row",
        ),
        (
            {"input_ids": tokens(1, 4).repeat(2, 1), "shared_prefix_lengths": torch.tensor([2]), "position_ids": torch.tensor([[0, 1, 0, 1]])},
            "shared_prefix_lengths excludes several documents per row",
        ),
        ({"input_ids": tokens(1, 4), "position_ids": torch.arange(100, 104)[None]}, "position_ids of row 0 start at 100; they must start at 0"),
        (
            {"input_ids": tokens(1, 4), "cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
            "cu_seq_lens_q and cu_seq_lens_k differ",
        ),
        ({"input_ids": tokens(1, 4), "past_key_values": ()}, "past_key_values is a tuple; Hymba continues a HymbaCache only"),
    ],
)  # fmt: skip
def test_inputs_that_contradict_each_other_are_refused(
    small_model: HymbaForCausalLM, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**({"use_cache": False} | inputs))


def test_loss_leaves_out_padding_and_document_starts_and_follows_the_tree(small_model: HymbaForCausalLM) -> None:
    ids = tokens(1, 9)
    tree = SegmentTree([4, 3, 2], [-1, 0, 0])
    with torch.no_grad():
        output = small_model(ids, segments=tree, labels=ids, use_cache=False)
        logprobs = output.logits[0].log_softmax(-1)
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (3, 7), (7, 8)]
    expected = -sum(logprobs[before, ids[0, token]] for before, token in pairs) / len(pairs)
    assert_close(output.loss, expected, **CLOSE)

    padded, mask = torch.cat([tokens(1, 3, seed=9), ids], 1), torch.tensor([[0] * 3 + [1] * 9])
    alone = small_model(ids, labels=ids, use_cache=False).loss
    assert_close(small_model(padded, attention_mask=mask, labels=padded, use_cache=False).loss, alone, **CLOSE)
    halved = small_model(ids, labels=ids, num_items_in_batch=16, use_cache=False).loss
    assert_close(halved, alone / 2, **CLOSE)


def test_logits_to_keep_keeps_the_last_columns(small_model: HymbaForCausalLM) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():
        everything = small_model(ids).logits
        assert_close(small_model(ids, logits_to_keep=2).logits, everything[:, -2:], **CLOSE)
        assert_close(small_model(ids, logits_to_keep=torch.tensor([0, 3])).logits, everything[:, [0, 3]], **CLOSE)


def test_save_and_load_gives_bitwise_equal_logits_and_the_released_names(
    small_model: HymbaForCausalLM, tmp_path: Path
) -> None:
    small_model.save_pretrained(tmp_path)
    ids = tokens(2, 12)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, small_model(ids).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in small_model.named_parameters()}
    assert "lm_head.weight" not in stored
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["HymbaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "nvidia/Hymba-1.5B-Base--modeling_hymba.HymbaForCausalLM"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_bitwise_equal_gradients(small_model: HymbaForCausalLM, reentrant: bool) -> None:
    ids = tokens(1, 30)
    tree = SegmentTree([6, 10, 14], [-1, 0, 0])

    def gradients() -> dict[str, Tensor]:
        small_model.zero_grad()
        small_model(ids, segments=tree, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in small_model.named_parameters()}

    small_model.train()
    plain = gradients()
    recomputed: list[int] = []
    small_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    small_model.model.layers[1].mamba.register_forward_pre_hook(lambda *_: recomputed.append(1))
    checkpointed = gradients()
    assert len(recomputed) == 2  # once forward, once again for the backward pass
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("form", ["bfloat16 weights", "autocast"])
def test_bfloat16_stays_close_to_float32(small_model: HymbaForCausalLM, form: str) -> None:
    ids = tokens(1, 40)
    tree = SegmentTree.from_lengths([15, 25])
    exact = small_model(ids, segments=tree).logits
    if form == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            output = small_model(ids, segments=tree, labels=ids)
    else:
        output = small_model.to(torch.bfloat16)(ids, segments=tree, labels=ids)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in small_model.parameters())
    error = (output.logits.float() - exact).abs()
    assert error.mean() < 0.03 * exact.std()  # observed 0.012
    assert error.max() < 0.2 * exact.std()  # observed 0.07


def test_layer_inputs_are_let_go_unless_they_are_asked_for(small_model: HymbaForCausalLM) -> None:
    alive: list[weakref.ref[Tensor]] = []
    for layer in small_model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    with torch.no_grad():
        output = small_model(tokens(1, 8), use_cache=False)
    assert output.hidden_states is None
    assert [reference() for reference in alive] == [None] * 5


LINEAR = ["in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("target", LINEAR)
def test_a_lora_on_any_linear_layer_changes_the_result_and_receives_gradient(
    small_model: HymbaForCausalLM, target: str
) -> None:
    ids = tokens(1, 20)
    before = small_model(ids).logits.detach()
    adapted = get_peft_model(small_model, LoraConfig(r=2, target_modules=rf".*\.{target}", init_lora_weights=False))
    output = adapted(input_ids=ids, labels=ids)
    assert not torch.allclose(output.logits, before, atol=1e-4)
    output.loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * small_model.config.num_hidden_layers
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name


def test_a_merged_lora_computes_what_the_adapter_did(small_model: HymbaForCausalLM) -> None:
    ids = tokens(1, 20)
    adapted = get_peft_model(
        small_model, LoraConfig(r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert_close(adapted.merge_and_unload()(ids).logits, expected, **CLOSE)


def test_an_adapter_on_the_convolution_is_refused_instead_of_ignored(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="HymbaConv"):
        get_peft_model(small_model, LoraConfig(target_modules=["conv1d"]))
