"""A branch removed by the hook: beside weights that are really zero, beside a dense reference, in every use, and put back."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hymba_align.model import HymbaCache, HymbaForCausalLM, SegmentTree, without_branch
from hymba_align.model.branches import BRANCHES, branch_norms
from hymba_align.model.decoding import decode

Dense = runpy.run_path(str(Path(__file__).parent.parent / "inside" / "dense.py"))["Dense"]
CLOSE = {"atol": 1e-4, "rtol": 0}  # float32 beside float64, observed 2e-5
NORMS = {"attention": "pre_avg_layernorm1", "ssm": "pre_avg_layernorm2"}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def with_zero_scales(model: HymbaForCausalLM, *removed: tuple[int, str]) -> HymbaForCausalLM:
    """A copy whose learned scales of these layers and branches are zero."""
    model = copy.deepcopy(model)
    for layer, branch in removed:
        nn.init.zeros_(getattr(model.model.layers[layer].mamba, NORMS[branch]).weight)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None, **described: Any) -> Tensor:
    return model(tokens(2, 20) if ids is None else ids, **described).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_removed_branch_gives_the_bits_of_a_model_whose_scale_of_it_is_zero(
    small_model: HymbaForCausalLM, branch: Any, dtype: torch.dtype
) -> None:
    model = small_model.to(dtype)
    tree = SegmentTree(torch.tensor([9, 4, 7]), torch.tensor([-1, 0, 0]))
    whole = logits(model, tokens(1, 20), segments=tree)
    for layer in (0, 2, 4):  # global, one that shares keys, the last
        wanted = logits(with_zero_scales(model, (layer, branch)), tokens(1, 20), segments=tree)
        with without_branch(model, layer, branch):
            assert torch.equal(logits(model, tokens(1, 20), segments=tree), wanted)
        assert not torch.equal(wanted, whole)
    assert torch.equal(logits(model, tokens(1, 20), segments=tree), whole)


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_removed_branch_is_a_term_that_a_dense_reference_leaves_out(
    golden_model: HymbaForCausalLM, golden_documents: list[Tensor], layer: int, branch: Any
) -> None:
    ids = golden_documents[1]
    wanted = Dense.of(golden_model, (layer, branch)).log_probs(ids.tolist())
    with without_branch(golden_model, layer, branch):
        found = logits(golden_model, ids[None])[0].double().log_softmax(-1)
    assert_close(found, wanted, **CLOSE)
    assert (logits(golden_model, ids[None])[0].double().log_softmax(-1) - wanted).abs().max() > 0.05


def test_contexts_nest_and_several_layers_can_go_at_once(small_model: HymbaForCausalLM) -> None:
    def without(removed: Sequence[tuple[int, str]]) -> Tensor:
        return logits(with_zero_scales(small_model, *removed))

    with without_branch(small_model, [0, 3], "ssm"):
        assert torch.equal(logits(small_model), without([(0, "ssm"), (3, "ssm")]))
        with without_branch(small_model, 0, "attention"), without_branch(small_model, 3, "ssm"):
            assert torch.equal(logits(small_model), without([(0, "attention"), (0, "ssm"), (3, "ssm")]))
        assert torch.equal(logits(small_model), without([(0, "ssm"), (3, "ssm")]))
    with without_branch(small_model, [], "ssm"):
        assert torch.equal(logits(small_model), without([]))


def test_the_model_is_put_back_after_an_error_too(small_model: HymbaForCausalLM) -> None:
    whole, weights = logits(small_model), copy.deepcopy(small_model.state_dict())

    def fail() -> None:
        with without_branch(small_model, 2, "ssm"), without_branch(small_model, [1, 2], "attention"):
            assert not torch.equal(logits(small_model), whole)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert torch.equal(logits(small_model), whole)
    assert not any(module._forward_hooks for module in small_model.modules())
    assert all(torch.equal(x, weights[name]) for name, x in small_model.state_dict().items())


def test_a_layer_s_keys_and_values_still_go_to_the_layers_that_share_them(small_model: HymbaForCausalLM) -> None:
    made: list[Tensor] = []
    hook = small_model.model.layers[1].register_forward_hook(lambda *call: made.append(call[2].k))
    logits(small_model)
    with without_branch(small_model, 1, "attention"):
        logits(small_model)
    hook.remove()
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("branch", BRANCHES)
def test_generation_and_caches_go_without_the_branch(small_model: HymbaForCausalLM, branch: Any) -> None:
    zeroed = with_zero_scales(small_model, (0, branch), (3, branch))
    prompts = [tokens(9), tokens(4, seed=1)]
    with without_branch(small_model, [0, 3], branch):
        found = decode(small_model, prompts, max_new_tokens=6)
        cache = HymbaCache(small_model.config)
        parts = [logits(small_model, part, past_key_values=cache) for part in tokens(1, 12).split([7, 1, 4], dim=1)]
        generated = small_model.generate(
            prompts[0][None], attention_mask=torch.ones(1, 9), max_new_tokens=6, do_sample=False
        )
    wanted = decode(zeroed, prompts, max_new_tokens=6)
    assert found == wanted
    assert found != decode(small_model, prompts, max_new_tokens=6)
    assert generated[0, 9:].tolist() == wanted[0].tokens
    assert_close(torch.cat(parts, dim=1), logits(zeroed, tokens(1, 12)), atol=2e-5, rtol=0)  # float32, observed 3e-6


def test_gradients_of_all_that_is_left_are_those_of_a_scale_of_zero(small_model: HymbaForCausalLM) -> None:
    zeroed = with_zero_scales(small_model, (1, "ssm")).train()
    small_model.train()
    ids = tokens(2, 12)
    with without_branch(small_model, 1, "ssm"):
        small_model(ids, labels=ids).loss.backward()
    zeroed(ids, labels=ids).loss.backward()
    wanted = {name: x.grad for name, x in zeroed.named_parameters()}
    for name, x in small_model.named_parameters():
        if name == "model.layers.1.mamba.pre_avg_layernorm2.weight":
            assert x.grad is None
        elif x.grad is None:  # what only the removed branch reads
            assert wanted[name] is not None
            assert not wanted[name].any()
        else:
            assert torch.equal(x.grad, wanted[name])


@pytest.mark.parametrize("modules_to_save", [None, ["pre_avg_layernorm1", "pre_avg_layernorm2"], ["mamba"]])
def test_a_model_in_a_wrapper_of_peft_loses_the_branch_of_the_wrapped_layer(
    small_model: HymbaForCausalLM, modules_to_save: list[str] | None
) -> None:
    targets = ["gate_proj"] if modules_to_save == ["mamba"] else ["in_proj", "out_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=modules_to_save)
    torch.manual_seed(1)
    wrapped = get_peft_model(small_model, config).eval()
    whole = logits(wrapped)
    for branch in BRANCHES:
        zeroed = copy.deepcopy(wrapped)
        for norm in branch_norms(zeroed, 0, branch):
            for weight in norm.parameters():
                nn.init.zeros_(weight)
        with without_branch(wrapped, 0, branch):
            assert torch.equal(logits(wrapped), logits(zeroed))
            assert not torch.equal(logits(wrapped), whole)
    assert torch.equal(logits(wrapped), whole)


def test_the_base_model_without_its_head_is_taken_too(small_model: HymbaForCausalLM) -> None:
    wanted = logits(with_zero_scales(small_model, (4, "ssm")))
    with without_branch(small_model.model, 4, "ssm"):
        assert torch.equal(logits(small_model), wanted)


@pytest.mark.parametrize(
    ("layers", "branch", "message"),
    [
        (5, "ssm", "layer is 5; the model has the layers 0 to 4"),
        ([0, -1], "attention", "layer is -1; the model has the layers 0 to 4"),
        (0, "mamba", "branch is 'mamba'; it is one of attention, ssm"),
    ],
)
def test_what_there_is_not_is_an_error_and_leaves_no_hook(
    small_model: HymbaForCausalLM, layers: Any, branch: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught, without_branch(small_model, layers, branch):
        pass
    assert str(caught.value) == message
    assert not any(module._forward_hooks for module in small_model.modules())


def test_a_model_without_layers_of_hymba_is_an_error() -> None:
    with pytest.raises(ValueError) as caught, without_branch(nn.Linear(2, 2), 0, "ssm"):
        pass
    assert str(caught.value) == "the model is a Linear without a layer of Hymba; give a Hymba"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_which_would_not_see_the_hook_is_an_error(
    small_model: HymbaForCausalLM, in_place: bool
) -> None:
    model: Any = small_model
    if in_place:
        model.model.layers[0].compile(backend="eager")
    else:
        model = torch.compile(small_model, backend="eager")
    with pytest.raises(ValueError) as caught, without_branch(model, 0, "ssm"):
        pass
    assert str(caught.value) == (
        "the model is compiled, and a compiled graph does not see the hook that removes a branch; "
        "give the model as it was before torch.compile"
    )
