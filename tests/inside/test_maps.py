"""Attention maps of one text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hymba_align.inside.maps import attention_maps
from hymba_align.inside.observing import ObservedAttention, observe
from hymba_align.inside.rows import Document
from hymba_align.model import HymbaConfig, HymbaForCausalLM

META = 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained("data/arithmetic/tokenizer")


@pytest.fixture
def model(small_config: HymbaConfig, tokenizer: PreTrainedTokenizerBase) -> HymbaForCausalLM:
    torch.manual_seed(0)
    return HymbaForCausalLM(HymbaConfig(**{**small_config.to_diff_dict(), "vocab_size": len(tokenizer)})).eval()


@pytest.fixture
def document(tokenizer: PreTrainedTokenizerBase) -> Document:
    ids = tokenizer("What is 12 + 7?\n12 + 7 = 19")["input_ids"]
    return Document("test.jsonl:1", tuple(ids), (True,) * len(ids))


def dense(model: HymbaForCausalLM, document: Document) -> dict[int, Tensor]:
    """By layer, (T, M + T) mean over heads, of the whole document: softmax of what each token sees, in float64."""
    found: dict[int, Tensor] = {}

    def visit(seen: ObservedAttention) -> None:
        q, k = seen.q_LHd[META:].double(), seen.k_LGd.double().expand(-1, 3, -1)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        sees = (distance >= 0) & (distance <= (10**6 if seen.is_global else 6))
        sees = torch.cat([torch.ones(len(q), META, dtype=torch.bool), sees], 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        found[seen.layer] = scores.masked_fill(~sees, -torch.inf).softmax(-1).mean(0)

    with torch.no_grad(), observe(model, attention=visit):
        model(input_ids=torch.tensor([document.token_ids]))
    return found


def test_maps_hold_the_mean_over_heads_of_what_each_token_attends_to(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Document
) -> None:
    tokens = len(document.token_ids)
    wanted = dense(model, document)

    maps = attention_maps(model, document, tokenizer, [4, 2], most_tokens=tokens)

    assert [(one.layer, one.is_global, one.document) for one in maps] == [
        (4, True, "test.jsonl:1"),
        (2, False, "test.jsonl:1"),
    ]
    for one in maps:
        to_meta, to_text = wanted[one.layer].split([META, tokens], 1)
        found = torch.tensor(one.weights, dtype=torch.float64)
        assert (found - torch.cat([to_meta.sum(1, keepdim=True), to_text], 1)).abs().max() <= 1e-6  # observed 4e-8
        assert (torch.tensor(one.meta, dtype=torch.float64) - to_meta.mean(0)).abs().max() <= 1e-6  # observed 3e-9
        assert (found.sum(1) - 1).abs().max() <= 1e-6


def test_the_first_tokens_have_the_map_that_they_have_in_the_whole_text(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Document
) -> None:
    (whole,) = attention_maps(model, document, tokenizer, [2], most_tokens=1000)
    (first,) = attention_maps(model, document, tokenizer, [2], most_tokens=4)

    assert first.queries == whole.queries[:4]
    for part, row in zip(first.weights, whole.weights, strict=False):
        assert part == pytest.approx(row[:5], abs=1e-6)  # float32, observed 4e-8


def test_tokens_are_named_as_they_read(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Document
) -> None:
    (found,) = attention_maps(model, document, tokenizer, [0], most_tokens=1000)
    assert "".join(found.queries).endswith("What is 12 + 7?\n12 + 7 = 19")
    assert len(found.queries) == len(document.token_ids)


@pytest.mark.parametrize("layers", [[5], [-1], [1, 1]])
def test_layers_that_the_model_does_not_have_are_named(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Document, layers: list[int]
) -> None:
    with pytest.raises(ValueError) as caught:
        attention_maps(model, document, tokenizer, layers, most_tokens=4)
    assert str(caught.value) == f"layer {layers[-1]} is named twice or not one of the model's, 0 to 4"


@pytest.mark.parametrize(("tokens", "most_tokens"), [(8, 0), (8, -1), (0, 4)])
def test_a_map_needs_a_token(
    model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: int, most_tokens: int
) -> None:
    document = Document("test.jsonl:1", (7,) * tokens, (True,) * tokens)
    with pytest.raises(ValueError) as caught:
        attention_maps(model, document, tokenizer, [0], most_tokens=most_tokens)
    assert str(caught.value) == f"test.jsonl:1 has {tokens} tokens, of which {most_tokens} may be shown; a map needs 1"
