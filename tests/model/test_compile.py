"""A model under torch.compile computes what it computes without, although kernels in C++ are no part of a graph."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from hymba_align.model import HymbaForCausalLM, SegmentTree

# Dynamo looks at the gradients of tensors that have none, and torch warns of its own old names.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*deprecated:DeprecationWarning")


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_gives_the_same_logits_and_gradients(small_model: HymbaForCausalLM, training: bool) -> None:
    small_model.train(training)
    ids = torch.arange(40)[None] % 20 + 3
    tree = SegmentTree([10, 18, 12], [-1, 0, 0])
    compiled = torch.compile(small_model, backend="eager")
    for _ in range(3):  # addresses that outlive their tensors need not be wrong the first time
        with torch.set_grad_enabled(training):
            found = compiled(input_ids=ids, segments=tree, use_cache=False).logits
            expected = small_model(input_ids=ids, segments=tree, use_cache=False).logits
        assert_close(found, expected, atol=1e-5, rtol=0)  # float32, observed 2e-6: a compiled norm is the plain one
        if training:
            parameters = [parameter for parameter in small_model.parameters() if parameter.requires_grad]
            pairs = (torch.autograd.grad(logits.square().sum(), parameters) for logits in (found, expected))
            for ours, wanted in zip(*pairs, strict=True):
                assert (ours - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6
