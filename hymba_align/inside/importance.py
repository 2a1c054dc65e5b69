"""What each branch of each layer is worth: the loss of the whole model, and of the model without it.

A branch is removed as by `without_branch` (model/branches.py). Every removal is scored over the same documents as the whole
model, so that the error of a change is a paired one. `task_importance.py` has accuracies in place of the loss.

Legend: M meta tokens, L tokens of a row with them, T without, D hidden size, I inner size, S documents of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hymba_align.errors import DataError
from hymba_align.inside.observing import hymba_in
from hymba_align.inside.passes import scored_places
from hymba_align.inside.result import Branch, Importance, LayerImportance, Measured, Removal
from hymba_align.inside.rows import Row
from hymba_align.model.branches import BRANCHES, branch_norms
from hymba_align.model.layers import HymbaDecoderLayer
from hymba_align.model.modeling import LOGITS_AT_ONCE, HymbaForCausalLM, HymbaModel
from hymba_align.model.plan import ForwardPlan

Removed = tuple[int, Branch] | None
"""A layer and the branch that it lacks; None for the whole model"""
Sums = NDArray[np.float64]
"""Of each document"""


def scorings(model: nn.Module) -> int:
    """How many models are scored: the whole one, and one per layer and branch."""
    return 1 + len(BRANCHES) * hymba_in(model).config.num_hidden_layers


def _nothing() -> None:
    """For callers that show no progress."""


@torch.no_grad()
def measure_loss_importance(
    model: nn.Module, rows: Iterable[Row], *, scored: Callable[[], None] = _nothing
) -> Importance:
    """The loss of every removal, in nats per token under the loss.

    Exact: what each removal gives is to the bit what the model gives that runs whole within `without_branch`. What lies
    before the removal is computed once for all: of n layers, n² run, and 2n times the end of one, instead of n (2n + 1).

    The standard errors are those of a ratio of sums over documents (`measured`): documents are independent of each
    other, tokens of one are not. Source: Hymba (arXiv 2411.13676), its analysis of head importance.

    Args:
        model: a Hymba with its head, with or without adapters around it.
        rows: of documents, at least one.
        scored: called for every row, once per model that `scorings` counts.

    Raises:
        DataError: no token is under the loss.
    """
    causal = _with_head(model)
    config = causal.config
    losses: dict[Removed, list[Sums]] = {}
    tokens: list[Sums] = []
    documents = 0
    for row in rows:
        targets = _Targets.of(row)
        documents += row.tree.num_segments
        tokens.append(targets.tokens_S[targets.tokens_S > 0])
        for removed, hidden_TD in _every_removal(causal.model, row):
            sums_S = targets.losses(causal.lm_head, hidden_TD)
            losses.setdefault(removed, []).append(sums_S[targets.tokens_S > 0])
            scored()
    if not sum(map(len, tokens)):
        raise DataError(
            f"none of the {documents} documents has a token under the loss behind its first one, so that the model has no "
            "loss on them; give documents with text of the assistant, or plain text"
        )
    counted = np.concatenate(tokens)
    sums = {removed: np.concatenate(parts) for removed, parts in losses.items()}
    return Importance(
        metric="loss",
        unit="nats per token",
        lower_is_better=True,
        whole=measured(sums[None], counted),
        chance=math.log(config.vocab_size),
        n=int(counted.sum()),
        documents=len(counted),
        layers=tuple(
            _loss_layer(config.is_global(layer), layer, sums, counted) for layer in range(len(causal.model.layers))
        ),
    )


def measured(sums: Sums, tokens: Sums) -> Measured:
    """The mean over all tokens of what was summed per document, and its standard error between documents.

    The estimate is a ratio of two sums over documents, so the error is that of what a document's sum differs by from the
    mean times its tokens; where all documents are equally long, it is that of the mean of their means.

    Source: Cochran, Sampling Techniques (1977), chapter 6: the variance of a ratio estimate.
    """
    mean = float(sums.sum() / tokens.sum())
    count = len(sums)
    if count < 2:
        return Measured(mean)
    around = sums - mean * tokens
    return Measured(mean, float(math.sqrt(count / (count - 1) * np.square(around).sum()) / tokens.sum()))


def _loss_layer(is_global: bool, layer: int, sums: dict[Removed, Sums], tokens: Sums) -> LayerImportance:
    attention, ssm = sums[layer, "attention"], sums[layer, "ssm"]
    return LayerImportance(
        layer=layer,
        is_global=is_global,
        attention=Removal(measured(attention, tokens).mean, measured(attention - sums[None], tokens)),
        ssm=Removal(measured(ssm, tokens).mean, measured(ssm - sums[None], tokens)),
        difference=measured(ssm - attention, tokens),
    )


def _with_head(model: nn.Module) -> HymbaForCausalLM:
    found = [module for module in model.modules() if isinstance(module, HymbaForCausalLM)]
    if len(found) != 1:
        raise ValueError(f"a {type(model).__name__} holds {len(found)} Hymba models with a head; give one")
    return found[0]


@dataclass(frozen=True, eq=False)
class _Targets:
    """What is under the loss in a row, n tokens."""

    predicting_n: Tensor
    """Index in the row's text of the token that predicts each"""
    token_ids_n: Tensor
    document_n: Tensor
    tokens_S: Sums
    """How many of each document"""

    @classmethod
    def of(cls, row: Row) -> _Targets:
        """As the model's own loss has it: a document's first token is predicted by nothing."""
        chosen, predicting = scored_places(row)
        documents = torch.arange(row.tree.num_segments).repeat_interleave(row.tree.lengths)[chosen]
        counts = documents.bincount(minlength=row.tree.num_segments)
        return cls(predicting, row.labels[chosen], documents, counts.double().numpy())

    def losses(self, head: nn.Module, hidden_TD: Tensor) -> Sums:
        """(S,) summed loss of each document, from one tile of logits at a time; in float32 at least, added up in float64."""
        device, dtype = hidden_TD.device, torch.promote_types(hidden_TD.dtype, torch.float32)
        sums_S = torch.zeros(len(self.tokens_S), dtype=torch.float64)
        vocabulary = cast(Tensor, head.weight).shape[0]
        tiles = (
            x.split(max(1, LOGITS_AT_ONCE // vocabulary))
            for x in (self.predicting_n, self.token_ids_n, self.document_n)
        )
        for predicting, token_ids, documents in zip(*tiles, strict=True):
            logits = head(hidden_TD[predicting.to(device)]).to(dtype)
            losses = F.cross_entropy(logits, token_ids.to(device), reduction="none")
            sums_S.index_add_(0, documents, losses.double().cpu())
        return sums_S.numpy()


def _every_removal(hymba: HymbaModel, row: Row) -> Iterator[tuple[Removed, Tensor]]:
    """Last hidden states (T, D) of every removal over a row, and of the whole model at the end."""
    ids = row.input_ids[None].to(hymba.embed_tokens.weight.device)
    x_LD = hymba.embed_tokens(ids)[0]
    alone_S = torch.zeros(row.tree.num_segments, dtype=torch.int64)
    plan = ForwardPlan.build(hymba.config, row.tree, alone_S, None, x_LD.dtype, x_LD.device)
    x_LD = torch.cat([hymba.memory_tokens.to(x_LD.dtype), x_LD])
    stack = _Stack(hymba, plan)
    made: KeysAndValues = {}
    for index in range(len(hymba.layers)):
        below_LD = x_LD
        normed_LI: dict[Branch, Tensor] = {}
        with _normed_branches(hymba, index, normed_LI):
            x_LD = stack.run(below_LD, made, index, index + 1)
        for branch in BRANCHES:
            [kept_LI] = (normed for name, normed in normed_LI.items() if name != branch)
            without_LD = _end_of_layer(hymba.layers[index], below_LD, kept_LI)
            hidden_LD = stack.run(without_LD, dict(made), index + 1, len(hymba.layers))
            yield (index, branch), hymba.final_layernorm(hidden_LD)[plan.meta_tokens :]
    yield None, hymba.final_layernorm(x_LD)[plan.meta_tokens :]


@contextmanager
def _normed_branches(hymba: HymbaModel, layer: int, normed_LI: dict[Branch, Tensor]) -> Iterator[None]:
    """Within, what the norms behind both branches of a layer give is noted."""

    def note(branch: Branch, output: Tensor) -> None:
        normed_LI[branch] = output

    with ExitStack() as hooks:
        for branch in BRANCHES:
            [norm] = branch_norms(hymba, layer, branch)
            hook = norm.register_forward_hook(lambda _, args, output, branch=branch: note(branch, output))
            hooks.callback(hook.remove)
        yield


def _end_of_layer(layer: nn.Module, x_LD: Tensor, kept_LI: Tensor) -> Tensor:
    """Output of a layer of this input, of whose branches one is removed: all that comes behind their norms.

    Both branches and the keys and values of a layer are the same with a branch removed as without, and are not computed
    again. `HymbaMixer.forward` and `HymbaDecoderLayer.forward` with zeros for the other branch, to the bit.
    """
    assert isinstance(layer, HymbaDecoderLayer)
    x_LD = x_LD + layer.mamba.out_proj((kept_LI + 0.0) / 2)
    output_LD: Tensor = x_LD + layer.moe(layer.pre_moe_layernorm(x_LD))
    return output_LD


KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Of the layers that made some which later ones still read"""


@dataclass(frozen=True)
class _Stack:
    """The layers of a Hymba over one row, as `HymbaModel.forward` runs them, from any of them on."""

    hymba: HymbaModel
    plan: ForwardPlan

    def run(self, x_LD: Tensor, made: KeysAndValues, first: int, end: int) -> Tensor:
        """Output of the last of the layers `first` to `end - 1`.

        Args:
            x_LD: input of the first one.
            made: what earlier layers made; brought up to date.
        """
        for index in range(first, end):
            source = self.hymba.config.kv_source(index)
            x_LD, k, v, *_ = self.hymba.layers[index](x_LD, *made.get(source, (None, None)), self.plan, None, None)
            if self.hymba.last_readers[source] > index:
                made[source] = (k, v)
            else:
                made.pop(source, None)
        return x_LD
