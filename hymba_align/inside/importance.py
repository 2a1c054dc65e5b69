"""What each branch of each layer is worth: the score of the whole model, and of the model without it.

A branch is removed by `without_branch` (model/branches.py). Every removal is scored over the same documents or problems
as the whole model, so that the error of a change is a paired one.

Legend: M meta tokens, L tokens of a row with them, T without, D hidden size, S documents of a row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hymba_align.errors import DataError
from hymba_align.files import fingerprint
from hymba_align.inside.observing import hymba_in
from hymba_align.inside.result import Branch, Importance, LayerImportance, Measured, Removal
from hymba_align.inside.rows import Row
from hymba_align.model.branches import BRANCHES, without_branch
from hymba_align.model.modeling import LOGITS_AT_ONCE, NOT_SCORED, HymbaForCausalLM, HymbaModel
from hymba_align.model.plan import ForwardPlan
from hymba_align.model.segments import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.eval.result import TaskResult
    from hymba_align.recipe_eval import EvalSection, Task

Removed = tuple[int, Branch] | None
"""A layer and the branch that it lacks; None for the whole model"""
Sums = NDArray[np.float64]
"""Of each document"""


def scorings(model: nn.Module) -> int:
    """How many models are scored: the whole one, and one per layer and branch."""
    return 1 + len(BRANCHES) * hymba_in(model).config.num_hidden_layers


def _nothing() -> None:
    """For callers that show no progress."""


# ---- loss ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_loss_importance(
    model: nn.Module, rows: Iterable[Row], *, scored: Callable[[], None] = _nothing
) -> Importance:
    """The loss of every removal, in nats per token under the loss.

    Exact: what each removal gives is to the bit what the model gives that runs whole within `without_branch`. The layers
    below the removed branch run once for all removals above them: of n layers, n (n + 3) run instead of n (2n + 1).

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
        before = row.tree.predecessors()
        chosen = ((row.labels != NOT_SCORED) & (before != ROOT)).nonzero().flatten()
        documents = torch.arange(row.tree.num_segments).repeat_interleave(row.tree.lengths)[chosen]
        counts = documents.bincount(minlength=row.tree.num_segments)
        return cls(before[chosen], row.labels[chosen], documents, counts.double().numpy())

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
    """Last hidden states (T, D) of the whole model and of every removal over a row."""
    taken: list[tuple[Tensor, ForwardPlan]] = []
    hook = hymba.layers[0].register_forward_pre_hook(lambda _, given: taken.append((given[0], given[3])))
    try:
        ids = row.input_ids[None].to(hymba.embed_tokens.weight.device)
        whole = hymba(input_ids=ids, segments=row.tree, use_cache=False).last_hidden_state[0]
    finally:
        hook.remove()
    yield None, whole
    [(x_LD, plan)] = taken
    stack = _Stack(hymba, plan)
    made: KeysAndValues = {}
    for layer in range(len(hymba.layers)):
        for branch in BRANCHES:
            with without_branch(hymba, layer, branch):
                hidden_LD = hymba.final_layernorm(stack.run(x_LD, dict(made), layer, len(hymba.layers)))
            yield (layer, branch), hidden_LD[plan.meta_tokens :]
        x_LD = stack.run(x_LD, made, layer, layer + 1)


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


# ---- tasks -----------------------------------------------------------------------------------------------------------


def measure_task_importance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    task: Task,
    *,
    scored: Callable[[], None] = _nothing,
) -> Importance:
    """The share of problems that every removal solves, in percent.

    The eval package's own scorer asks and grades, so that the whole model's score is that of `hymba-align eval` with the
    same section, dtype and kind of device. Every removal answers every problem itself: answers are kept in a folder that
    goes with its score, and no other removal sees it. The score is the task's first that is a mean over single problems.
    Source: Hymba (arXiv 2411.13676), its analysis of head importance.

    Args:
        model: a Hymba with its head on its device, with or without LoRA adapters around it, in eval mode.
        tokenizer: with the chat template that prompts are rendered with.
        section: which problems, how they are asked, and the batch size; of its tasks only `task` is scored.
        task: its name.
        scored: called for every model that `scorings` counts.

    Raises:
        UsageError, GraderError: problems or settings that cannot be used.
    """
    hymba = hymba_in(model)
    results: dict[Removed, TaskResult] = {None: _score(model, tokenizer, section, task, None)}
    scored()
    for layer in range(len(hymba.layers)):
        for branch in BRANCHES:
            with without_branch(hymba, layer, branch):
                results[layer, branch] = _score(model, tokenizer, section, task, (layer, branch))
            scored()
    whole = results[None]
    score = next(name for name in whole.scores if whole.problems(name) is not None)
    found = whole.scores[score]
    return Importance(
        metric=task if score == whole.headline else f"{task} {score}",
        unit="% correct",
        lower_is_better=False,
        whole=Measured(100 * found.value, None if found.stderr is None else 100 * found.stderr),
        chance=None,
        n=found.n,
        documents=found.n,
        layers=tuple(_task_layer(hymba, layer, results, score) for layer in range(len(hymba.layers))),
    )


def _score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, section: EvalSection, task: Task, removed: Removed
) -> TaskResult:
    """The task's result of the model as it stands."""
    from hymba_align.eval.inputs import scorer
    from hymba_align.eval.run import TaskRun
    from hymba_align.eval.sharing import Processes

    template = {"name": "", "sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()}
    with tempfile.TemporaryDirectory(prefix="hymba-align-") as folder:
        run = TaskRun(
            model=cast(HymbaForCausalLM, model),
            tokenizer=tokenizer,
            section=section,
            out_dir=Path(folder),
            checkpoint=str(_with_head(model).config.name_or_path),
            chat_template=template,
            processes=Processes.alone(),
            identity=fingerprint(["removed", removed]),
            terminal=io.StringIO(),  # one display counts the removals
        )
        return scorer(task)(run)


def _task_layer(hymba: HymbaModel, layer: int, results: dict[Removed, TaskResult], score: str) -> LayerImportance:
    whole, attention, ssm = results[None], results[layer, "attention"], results[layer, "ssm"]
    return LayerImportance(
        layer=layer,
        is_global=hymba.config.is_global(layer),
        attention=Removal(100 * attention.scores[score].value, _paired(whole, attention, score)),
        ssm=Removal(100 * ssm.scores[score].value, _paired(whole, ssm, score)),
        difference=_paired(attention, ssm, score),
    )


def _paired(before: TaskResult, after: TaskResult, score: str) -> Measured:
    """By how much the score is higher after, in points, with the standard error over the problems that both answered."""
    from hymba_align.eval.report.differences import difference

    found = difference(before, after, score)
    assert not isinstance(found, str), f"removals are scored alike, and yet cannot be compared: {found}"
    return Measured(100 * found.value, None if found.stderr is None else 100 * found.stderr)
