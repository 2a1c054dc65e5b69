"""Hymba for transformers: the stack of layers behind learned meta tokens, and its language-model head.

There is one forward pass, over a packed row (see `layout.py`): the meta tokens run once, at its start, and every
document continues them.

B batch rows, T columns, L tokens of the packed row (meta tokens included), D hidden size, V vocabulary, S segments.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hymba_align.model.cache import HymbaCache, LayerUpdate
from hymba_align.model.cached_rows import obstacle_to_caching, paths_to_cache
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.layers import (
    HymbaConv,
    HymbaDecay,
    HymbaDecoderLayer,
    HymbaRMSNorm,
    HymbaSkip,
    HymbaStepProjection,
)
from hymba_align.model.layout import Layout, lay_out
from hymba_align.model.plan import ForwardPlan
from hymba_align.model.rows import take_rows
from hymba_align.model.segments import ROOT, SegmentTree

LOGITS_AT_ONCE = 2**25
"""Logits that exist at a time where only the loss is wanted: 128 MB in float32, 1,048 positions of 32,001 tokens."""

NOT_SCORED = -100
"""The label that transformers leaves out of the loss."""


class HymbaPreTrainedModel(PreTrainedModel):
    """Weights, initialisation and what transformers needs to know."""

    config: HymbaConfig
    config_class = HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HymbaDecoderLayer"]  # noqa: RUF012  transformers' own form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; the SSM starts as in Mamba: A = -1..-N, D = 1, step sizes between 0.001 and 0.1."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HymbaConv):
            bound = 1 / math.sqrt(module.weight.shape[-1])
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, HymbaStepProjection):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            dt = torch.exp(torch.empty_like(module.bias).uniform_(math.log(1e-3), math.log(1e-1)))
            init.copy_(module.bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        elif isinstance(module, HymbaDecay):
            init.copy_(module[0], torch.arange(1, module[0].shape[1] + 1).log().expand_as(module[0]))
        elif isinstance(module, HymbaSkip):
            init.ones_(module[0])
        elif isinstance(module, HymbaModel):
            init.normal_(module.memory_tokens, mean=0.0, std=std)


class HymbaModel(HymbaPreTrainedModel):
    """The layers behind the meta tokens, without a head."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HymbaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Of each layer that makes keys and values, the last one that reads them.
        self.last_readers = {config.kv_source(index): index for index in range(config.num_hidden_layers)}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segments: SegmentTree | None = None,
        shared_prefix_lengths: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        positions_to_keep: Tensor | None = None,
        cache_segments: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of the text tokens; zeros at padding.

        Args:
            input_ids: (B, T); or `inputs_embeds`.
            attention_mask: (B, T), 0 marks padding on any side. With a filled cache, (B, past + T) is accepted too.
            position_ids: (B, T); only where they restart at 0 matters: documents of one row. Positions themselves follow
                from the documents and count the meta tokens.
            past_key_values: state of the sequences so far, continued in place.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            use_cache: return a cache. By default as the configuration says, but not in training and not for packed rows.
                The cache of packed rows and trees has one row per segment that nothing continues, in row order, which
                holds its whole path; such rows may also continue a cache of one sequence.
            segments: tree over a single row (B = 1).
            shared_prefix_lengths: (B / 2,) leading real tokens that rows i and i + B / 2 share; computed once.
            cu_seq_lens_q: (S + 1,) cumulative document lengths of a single row; `cu_seq_lens_k` is the same.
            seq_idx: (B, T) number of each token's document. Of these descriptions of documents one is enough.
            output_hidden_states: also return the input of every layer and the final norm's output.
            output_attentions: not available; attention weights are never formed for a whole row.
            positions_to_keep: (n,) or (1, n) positions of the flattened batch whose last hidden states are wanted; they come
                back as (1, n, D) in this order. Positions at padding have none.
            cache_segments: (R,) segments whose paths the rows of the cache hold, instead; may repeat.
            kwargs: what collators and `generate` send along and nothing here needs (`max_length_q`, `cache_position`, ...).

        Raises:
            ValueError: inputs that contradict each other; the message names the value.
        """
        given = _given(input_ids, inputs_embeds, past_key_values, output_attentions)
        batch, columns = given.shape[:2]
        continues = past_key_values is not None and past_key_values.is_initialized
        layout = lay_out(
            batch,
            columns,
            input_ids=input_ids,
            attention_mask=_last_columns(attention_mask, columns) if continues else attention_mask,
            position_ids=None if continues else position_ids,  # with a cache, positions follow from it
            cu_seq_lens=_same(cu_seq_lens_q, cu_seq_lens_k),
            seq_idx=seq_idx,
            segments=segments,
            shared_prefix_lengths=shared_prefix_lengths,
        )
        paths = paths_to_cache(layout, cache_segments)
        obstacle = obstacle_to_caching(layout, batch, past_key_values, shared_prefix_lengths, paths)
        cache = self._choose_cache(past_key_values, use_cache, obstacle, by_default=paths is None)
        # As a batch, because NEFTune's hook reads (B, T, D); without a name, so that it is free before the layers start.
        x_LD = layout.pack(self.embed_tokens(given) if inputs_embeds is None else given)
        # Found before the layers start: moving positions to the CPU waits for a GPU's work.
        kept = None if positions_to_keep is None else layout.tokens_at(positions_to_keep).to(x_LD.device)
        plan = ForwardPlan.build(self.config, layout.tree, layout.rows_S, cache, x_LD.dtype, x_LD.device)
        if plan.meta_tokens:
            x_LD = torch.cat([self.memory_tokens.to(x_LD.dtype), x_LD])
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs: list[Tensor] | None = [] if wants_states else None
        x_LD, updates = self._run_layers(x_LD, plan, cache, inputs)
        x_LD = self.final_layernorm(x_LD)
        if cache is not None and paths is not None:
            cache.commit_paths(updates, layout.tree, paths)
        elif cache is not None:
            cache.commit(updates, layout.tree, layout.rows_S, columns)
        states = None
        if inputs is not None:
            states = tuple(layout.unpack(state[plan.meta_tokens :], batch) for state in (*inputs, x_LD))
        x_LD = x_LD[plan.meta_tokens :]
        return BaseModelOutputWithPast(
            last_hidden_state=layout.unpack(x_LD, batch) if kept is None else take_rows(x_LD, kept)[None],
            past_key_values=cache,
            hidden_states=states,
        )

    def meta_cache(self) -> HymbaCache:
        """A cache of one sequence that stands after the meta tokens and has no text yet."""
        tree = SegmentTree.from_lengths([1])  # a row has text; what this token leaves behind is not taken in
        cache = HymbaCache(self.config)
        plan = ForwardPlan.build(
            self.config,
            tree,
            torch.zeros(1, dtype=torch.int64),
            cache,
            self.memory_tokens.dtype,
            self.memory_tokens.device,
        )
        x_LD = torch.cat([self.memory_tokens, torch.zeros_like(self.memory_tokens[:1])])
        _, updates = self._run_layers(x_LD, plan, cache, None)
        cache.start(updates, 1)
        return cache

    def _choose_cache(
        self, past: HymbaCache | None, use_cache: bool | None, obstacle: str | None, *, by_default: bool
    ) -> HymbaCache | None:
        """The caller's cache, or a new one if asked for; by default as the configuration says, where the rows allow it."""
        if past is None:
            default = self.config.use_cache and not self.training and by_default and not obstacle
            if not (default if use_cache is None else use_cache):
                return None
        if obstacle:
            raise ValueError(obstacle)
        return HymbaCache(self.config) if past is None else past

    def _run_layers(
        self, x_LD: Tensor, plan: ForwardPlan, cache: HymbaCache | None, inputs: list[Tensor] | None
    ) -> tuple[Tensor, list[LayerUpdate]]:
        """Output of the last layer and what the cache takes in; the input of every layer goes to `inputs`, if wanted."""
        updates: list[LayerUpdate] = []
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            if inputs is not None:
                inputs.append(x_LD)
            source = self.config.kv_source(index)
            k, v = shared.get(source, (None, None))
            past = stored = None
            if cache is not None and cache.is_initialized:
                past, stored = cache.states[index], cache.states[source].key_values
            x_LD, k, v, conv_tail, ssm_state = layer(x_LD, k, v, plan, past, stored)
            if cache is not None:
                updates.append(LayerUpdate(k, v, conv_tail, ssm_state))
            if self.last_readers[source] > index:
                # The values are a view of all that in_proj makes, which recomputation would otherwise keep alive.
                shared[source] = (k, v.contiguous() if self.training and layer.gradient_checkpointing else v)
            else:
                shared.pop(source, None)
        return x_LD, updates


def _given(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, past: HymbaCache | None, output_attentions: bool | None
) -> Tensor:
    """The token ids, or the embeddings in their place, after what Hymba does not take was refused."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Hymba takes input_ids or inputs_embeds, exactly one of them")
    if output_attentions:
        raise ValueError("Hymba returns no attention weights; leave output_attentions off")
    if past is not None and not isinstance(past, HymbaCache):
        raise ValueError(f"past_key_values is a {type(past).__name__}; Hymba continues a HymbaCache only")
    return given


def _last_columns(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """The part of a mask over past and new tokens that belongs to the new ones."""
    return None if attention_mask is None else attention_mask[:, -columns:]


def _same(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Tensor | None:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; in a causal model each document attends to itself")
    return cu_seq_lens_q


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """Hymba with its language-model head, tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' own form

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segments: SegmentTree | None = None,
        shared_prefix_lengths: Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with `labels` the mean next-token loss.

        Args:
            labels: (B, T) token ids; -100 is not scored, nor is padding or the first token of a document (or of what
                continues a cache). In a tree a segment's first token is predicted by its parent's last one.
            logits_to_keep: last columns to compute logits for (0: all), or a tensor of column indices; not with labels.
            return_logits: False with `labels` when only the loss is wanted. Logits then exist for what is scored only,
                `LOGITS_AT_ONCE` of them, and once again in the backward pass; the output has none.
            kwargs: the remaining inputs of `HymbaModel.forward`; `num_items_in_batch` divides the summed loss instead
                of the number of scored tokens.

        The other arguments and the errors are those of `HymbaModel.forward`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        if labels is None and not return_logits:
            raise ValueError("return_logits is False but there are no labels; without both there is nothing to compute")
        scored = None
        if labels is not None:
            _check_labels(labels, inputs_embeds if input_ids is None else input_ids, keep)
            documents = lay_out(
                *labels.shape,
                attention_mask=_last_columns(attention_mask, labels.shape[1]),
                position_ids=position_ids,
                cu_seq_lens=_same(kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")),
                seq_idx=kwargs.get("seq_idx"),
                segments=segments,
            )
            scored = _next_token_pairs(documents, labels)
        if scored is not None and not return_logits:
            kwargs["positions_to_keep"] = scored[0]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segments=segments,
            shared_prefix_lengths=shared_prefix_lengths,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        loss = logits = None
        if return_logits:
            logits = self.lm_head(hidden_BTD if isinstance(keep, int) else hidden_BTD[:, keep])
        if scored is not None:
            loss = self._loss(hidden_BTD, logits, *scored, num_items)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(
        self, hidden_BTD: Tensor, logits: Tensor | None, predicting: Tensor, targets: Tensor, num_items: Any
    ) -> Tensor:
        """The mean over the targets, or their sum over `num_items`; without logits, `hidden_BTD` is (1, n, D) of what predicts."""
        if logits is None:
            return self._summed_loss(hidden_BTD[0], targets) / (len(targets) if num_items is None else num_items)
        loss: Tensor = self.loss_function(
            take_rows(logits.flatten(0, 1), predicting.to(logits.device)),
            labels=None,
            shift_labels=targets,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items,
        )
        return loss

    def _summed_loss(self, hidden_nD: Tensor, targets_n: Tensor) -> Tensor:
        """Summed loss in float32, from one tile of logits at a time.

        Every tile but the last is computed again in the backward pass, which begins with the last one.
        """
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        tiles = list(zip(hidden_nD.split(rows), targets_n.to(hidden_nD.device).split(rows), strict=True))
        again = partial(checkpoint, self._tile_loss, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([*(again(*tile) for tile in tiles[:-1]), self._tile_loss(*tiles[-1])]).sum()

    def _tile_loss(self, hidden_nD: Tensor, targets_n: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden_nD).float(), targets_n, reduction="sum")

    def _prepare_cache_for_generation(  # type: ignore[override]  # upstream declares a bool and returns nothing
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *unused: Any
    ) -> None:
        """Gives `generate` a `HymbaCache` where it would make one of transformers' own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; Hymba generates with its own HymbaCache, leave it unset"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HymbaCache(self.config)


def _check_labels(labels: Tensor, given: Tensor | None, keep: Any) -> None:
    if not isinstance(keep, int):
        raise ValueError("labels need the logits of every column; leave logits_to_keep at 0")
    if given is not None and labels.shape != given.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} but the input has {tuple(given.shape[:2])}; give one per token"
        )


def _next_token_pairs(layout: Layout, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the flattened batch that predict, and what: (n,) and (n,). Left out is what is not scored: labels of
    -100, document starts and padding.
    """
    before = layout.tree.predecessors()
    predicted = (before != ROOT).nonzero().flatten()
    predicting = before[predicted]
    if layout.take_L is not None:
        predicted, predicting = layout.take_L[predicted], layout.take_L[predicting]
    targets = labels.flatten()[predicted.to(labels.device)]
    scored = targets != NOT_SCORED
    return predicting[scored.to(predicting.device)], targets[scored]
