"""Gradients with two threads are the same bits every time, also where rows of a tensor are read several times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.kernels.choice import VARIABLE
from hymba_align.model.rows import take_rows
from hymba_align.model.segments import SegmentTree

TORCH_KERNELS = "scan=torch,conv=torch,attention=sdpa,norm=torch"


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_rows_and_their_gradient_are_those_of_indexing() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 4, 4], [2, 4, 0]])
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = torch.autograd.grad((x[index] * weights).sum(), x)[0]
    assert torch.equal(take_rows(x, index), x[index])
    torch.testing.assert_close(torch.autograd.grad((take_rows(x, index) * weights).sum(), x)[0], expected)


def test_the_gradient_of_rows_read_many_times_is_the_same_bits_every_time() -> None:
    x = torch.randn(4, 512, requires_grad=True)
    index, weights = torch.arange(400) % 4, torch.randn(400, 512)
    found = [torch.autograd.grad((take_rows(x, index) * weights).sum(), x)[0] for _ in range(10)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("kernels", ["", TORCH_KERNELS], ids=["default kernels", "torch kernels"])
@pytest.mark.parametrize("parents", [[-1] * 12, [-1, *[0] * 11]], ids=["documents", "questions behind shared shots"])
def test_gradients_of_a_packed_row_are_the_same_bits_every_time(
    small_config: HymbaConfig, monkeypatch: pytest.MonkeyPatch, kernels: str, parents: list[int]
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    torch.manual_seed(0)
    small_config.hidden_size = 96  # rows wide enough for two threads
    small_config.num_attention_heads, small_config.v_head_dim = 3, 64
    model = HymbaForCausalLM(small_config).train()
    ids = torch.randint(0, 61, (1, 12 * 50))
    tree = SegmentTree(torch.full((12,), 50), torch.tensor(parents))
    found = []
    for _ in range(6):
        model.zero_grad()
        model(input_ids=ids, labels=ids, segments=tree, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))
