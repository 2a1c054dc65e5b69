"""The loss without logits: only what is scored is projected, a tile at a time, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hymba_align.model import HymbaForCausalLM, SegmentTree
from hymba_align.model import modeling as modeling_module


def tokens(batch: int, columns: int) -> Tensor:
    return torch.randint(3, 61, (batch, columns), generator=torch.Generator().manual_seed(3))


def some_labels(ids: Tensor) -> Tensor:
    """Two thirds of the tokens, in runs."""
    return torch.where(torch.arange(ids.shape[1]) % 9 < 3, -100, ids)


def padded() -> dict[str, Any]:
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 16:] = 0
    return {"input_ids": ids, "labels": some_labels(ids), "attention_mask": mask}


def packed() -> dict[str, Any]:
    ids = tokens(1, 30)
    return {"input_ids": ids, "labels": some_labels(ids), "cu_seq_lens_q": torch.tensor([0, 11, 12, 30])}


def tree() -> dict[str, Any]:
    ids = tokens(1, 30)
    return {"input_ids": ids, "labels": ids, "segments": SegmentTree([6, 10, 14], [-1, 0, 0])}


def preference() -> dict[str, Any]:
    ids = tokens(2, 19)
    ids[1, :7] = ids[0, :7]
    return {"input_ids": ids, "labels": some_labels(ids), "shared_prefix_lengths": torch.tensor([7])}


FORMS = [padded, packed, tree, preference]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """At most 7 rows of logits at once."""
    monkeypatch.setattr(modeling_module, "LOGITS_AT_ONCE", 7 * 61 + 5)
    return 7


def loss_and_gradients(model: HymbaForCausalLM, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_equal_those_of_all_logits(
    small_model: HymbaForCausalLM, small_tiles: int, form: Any, num_items: int | None
) -> None:
    inputs = form() | ({} if num_items is None else {"num_items_in_batch": num_items})
    loss, gradients = loss_and_gradients(small_model, **inputs)
    lean_loss, lean_gradients = loss_and_gradients(small_model, **inputs, return_logits=False)
    # float32 on the CPU
    assert_close(lean_loss, loss, atol=1e-6, rtol=0)  # observed 5e-7 of losses up to 4.8
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        # observed 4e-7 of gradients up to 1.4
        assert_close(
            lean_gradients[name], gradient, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_the_head_sees_scored_positions_only_and_never_more_than_a_tile(
    small_model: HymbaForCausalLM, small_tiles: int, form: Any
) -> None:
    seen: list[int] = []
    small_model.lm_head.register_forward_hook(lambda *given: seen.append(given[-1].numel() // 61))
    inputs = form()
    output = small_model(**inputs, return_logits=False)
    assert output.logits is None
    scored = sum(seen)
    assert 0 < scored <= (inputs["labels"] != -100).sum()
    assert max(seen) == small_tiles
    output.loss.backward()
    assert sum(seen) - scored == scored - (scored % small_tiles or small_tiles)  # all but the last tile once again


def test_hidden_states_come_back_for_the_positions_asked_for_in_their_order(small_model: HymbaForCausalLM) -> None:
    inputs = {key: value for key, value in padded().items() if key != "labels"}
    whole = small_model.model(**inputs).last_hidden_state
    found = small_model.model(**inputs, positions_to_keep=torch.tensor([[20, 9, 10]])).last_hidden_state
    assert torch.equal(found, whole.flatten(0, 1)[[20, 9, 10]][None])


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (2, "positions_to_keep holds 2, which is padding; give real tokens only"),
        (38, "positions_to_keep reach from 9 to 38, but the flattened batch has 38 positions"),
    ],
)
def test_a_position_without_a_token_is_named(small_model: HymbaForCausalLM, position: int, message: str) -> None:
    inputs = {key: value for key, value in padded().items() if key != "labels"}
    with pytest.raises(ValueError, match=f"^{message}$"):
        small_model.model(**inputs, positions_to_keep=torch.tensor([9, position]))


def test_neither_logits_nor_labels_is_refused(small_model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="return_logits is False but there are no labels"):
        small_model(tokens(1, 5), return_logits=False)


def test_bfloat16_autocast_gives_the_loss_of_all_logits(small_model: HymbaForCausalLM, small_tiles: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(small_model, **packed())
        lean_loss, lean_gradients = loss_and_gradients(small_model, **packed(), return_logits=False)
    assert_close(lean_loss, loss, atol=1e-5, rtol=0)  # observed 5e-7
    for name, gradient in gradients.items():
        error = (lean_gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 0.03, name  # observed 0.016; the head sums its tiles' gradients


def test_labels_of_another_shape_than_the_input_are_refused(small_model: HymbaForCausalLM) -> None:
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ValueError) as caught:
        small_model(ids, labels=ids[:, :-1])
    assert str(caught.value) == "labels have shape (1, 5) but the input has (1, 6); give one per token"
