"""A look at any forward pass of a Hymba while it runs: the attention's queries and keys, and both sides of the fusion.

Stock hooks on modules, removed again. What the model computes stays the same to the bit: a visitor gets what passed
by, after the fact, and returns nothing.

Legend: B batch rows, T columns of the batch, L tokens of the packed row, M meta tokens, H query heads, G key heads,
d query/key head size, I inner size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hymba_align.inside.weights import AttentionBlocks, WeightBlock
from hymba_align.model.attention import AttentionRow
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.key_values import KeyValues
from hymba_align.model.layers import HymbaMixer
from hymba_align.model.layout import Layout, lay_out
from hymba_align.model.modeling import HymbaModel
from hymba_align.model.plan import ForwardPlan
from hymba_align.model.segments import SegmentTree


@dataclass(frozen=True, eq=False)
class ObservedRow:
    """The packed row that a forward pass ran, whatever form its input had. Token t of the text is token M + t of it."""

    config: HymbaConfig
    layout: Layout
    """From the caller's batch to the row; `rows_S` says which batch row each segment comes from"""
    token_ids: Tensor | None
    """(L - M,) of the text; None where the input was embeddings"""
    device: torch.device

    @property
    def tree(self) -> SegmentTree:
        """Segments of the text, meta tokens not counted."""
        return self.layout.tree

    @property
    def meta_tokens(self) -> int:
        """M, tokens of the row before its text."""
        return self.config.num_memory_tokens

    @cached_property
    def blocks(self) -> AttentionBlocks:
        """Which tokens see which, for attention weights."""
        return AttentionBlocks.build(self.tree, self.meta_tokens, self.config.sliding_window, self.device)


@dataclass(frozen=True, eq=False)
class ObservedAttention:
    """The attention of one layer."""

    row: ObservedRow
    layer: int
    is_global: bool
    q_LHd: Tensor
    """Queries after RoPE, as the kernel gets them"""
    k_LGd: Tensor
    """Keys after RoPE, as the kernel gets them"""

    def weights(self) -> Iterator[WeightBlock]:
        """The weights of all text tokens, in blocks."""
        return self.row.blocks.weights(self.q_LHd, self.k_LGd, is_global=self.is_global)


@dataclass(frozen=True, eq=False)
class ObservedFusion:
    """Both branches of one layer where they meet, each (L, I)."""

    row: ObservedRow
    layer: int
    is_global: bool
    attention: Tensor
    """What the attention heads computed"""
    ssm: Tensor
    """What the SSM heads computed"""
    attention_normed: Tensor
    """behind `pre_avg_layernorm1`, as it enters the mean"""
    ssm_normed: Tensor
    """behind `pre_avg_layernorm2`"""


@contextmanager
def observe(
    model: nn.Module,
    *,
    attention: Callable[[ObservedAttention], None] | None = None,
    fusion: Callable[[ObservedFusion], None] | None = None,
) -> Iterator[None]:
    """A context in which every forward pass of the model calls the visitors, layer by layer while it runs.

    Visitors run without gradients and without autocast; what they get is the model's own memory, to be read only. What
    gradient checkpointing computes a second time is not shown again.

    Args:
        model: a Hymba, or anything around one (adapters of PEFT, a trainer's wrapper).
        attention: called in every layer before its attention is computed.
        fusion: called in every layer once both branches are normalised.

    Raises:
        ValueError: no Hymba in the model, or more than one; while observed, a forward pass that continues a cache.
    """
    observer = _Observer(hymba_in(model), attention, fusion)
    with ExitStack() as hooks:
        for remove in observer.attach():
            hooks.callback(remove)
        yield


def hymba_in(model: nn.Module) -> HymbaModel:
    """The one Hymba within a model, whatever wraps it: adapters of PEFT, a trainer.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, HymbaModel)]
    if len(found) != 1:
        raise ValueError(f"a {type(model).__name__} holds {len(found)} Hymba models; observe one at a time")
    return found[0]


class _Observer:
    """The hooks, and the row of the forward pass that is running."""

    def __init__(
        self,
        model: HymbaModel,
        attention: Callable[[ObservedAttention], None] | None,
        fusion: Callable[[ObservedFusion], None] | None,
    ) -> None:
        self.model, self.attention, self.fusion = model, attention, fusion
        self.row: ObservedRow | None = None  # None outside of a forward pass, as when one is computed a second time
        self.passed: dict[str, tuple[Tensor, Tensor]] = {}  # input and output of a layer's norms, by branch

    def attach(self) -> Iterator[Callable[[], None]]:
        """Attaches the hooks one by one; yields what removes each."""
        yield self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove
        yield self.model.register_forward_hook(self._end, always_call=True).remove
        for mixer in (module for module in self.model.modules() if isinstance(module, HymbaMixer)):
            if self.attention is not None:
                yield mixer.register_forward_pre_hook(self._record_attention, with_kwargs=True).remove
            if self.fusion is not None:
                for branch, norm in (("attention", mixer.pre_avg_layernorm1), ("ssm", mixer.pre_avg_layernorm2)):
                    yield norm.register_forward_hook(self._fusion_hook(mixer, branch)).remove

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.row = _observed_row(self.model, inspect.signature(model.forward).bind(*args, **kwargs).arguments)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.row = None

    def _record_attention(
        self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The mixer's arguments with a plan that shows queries and keys on their way to its attention."""
        if self.row is None or self.attention is None:
            return None
        assert isinstance(mixer, HymbaMixer)
        row, visit = self.row, self.attention

        def show(q_LHd: Tensor, k_LGd: Tensor) -> None:
            q, k = (_as_computed(x) for x in (q_LHd, k_LGd))
            seen = ObservedAttention(row, mixer.layer, mixer.is_global, q, k)
            with _undisturbed(row.device):
                visit(seen)

        bound = inspect.signature(mixer.forward).bind(*args, **kwargs)
        plan: ForwardPlan = bound.arguments["plan"]
        bound.arguments["plan"] = replace(plan, attention=_ShowingAttention(plan.attention, show))
        return bound.args, bound.kwargs

    def _fusion_hook(self, mixer: HymbaMixer, branch: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.row is None or self.fusion is None:
                return
            self.passed[branch] = args[0].detach(), output.detach()
            if len(self.passed) == 2:
                before, after = zip(self.passed.pop("attention"), self.passed.pop("ssm"), strict=True)
                with _undisturbed(self.row.device):
                    self.fusion(ObservedFusion(self.row, mixer.layer, mixer.is_global, *before, *after))

        return hook


@dataclass(frozen=True)
class _ShowingAttention(AttentionRow):
    """The attention of a row, which shows its queries and keys before it computes."""

    inner: AttentionRow
    show: Callable[[Tensor, Tensor], None]

    def attend(
        self, q_LHd: Tensor, k_LGd: Tensor, v_LGe: Tensor, *, is_global: bool, stored: KeyValues | None
    ) -> Tensor:
        """Attention output (L, H * e)."""
        self.show(q_LHd, k_LGd)
        return self.inner.attend(q_LHd, k_LGd, v_LGe, is_global=is_global, stored=stored)


def _as_computed(x: Tensor) -> Tensor:
    """`x` without its history, in the dtype in which autocast, if it is on, multiplies."""
    device = x.device.type
    x = x.detach()
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _observed_row(model: HymbaModel, given: dict[str, Any]) -> ObservedRow:
    """The row that `HymbaModel.forward` makes of its arguments."""
    past = given.get("past_key_values")
    if past is not None and past.is_initialized:
        raise ValueError(
            "a forward pass that continues a cache cannot be observed: its keys are not in the row; run whole texts"
        )
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if tokens is None:
        raise ValueError("Hymba takes input_ids or inputs_embeds, exactly one of them")
    lengths = given.get("cu_seq_lens_q")
    layout = lay_out(
        *tokens.shape[:2],
        input_ids=ids,
        attention_mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"),
        cu_seq_lens=given.get("cu_seq_lens_k") if lengths is None else lengths,
        seq_idx=given.get("seq_idx"),
        segments=given.get("segments"),
        shared_prefix_lengths=given.get("shared_prefix_lengths"),
    )
    token_ids = None if ids is None else layout.pack(ids[..., None])[:, 0]
    return ObservedRow(model.config, layout, token_ids, tokens.device)
