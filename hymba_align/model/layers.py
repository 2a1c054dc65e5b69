"""The layers of Hymba: attention heads and Mamba heads read the same input in parallel, then a feed-forward block.

Modules take one packed row (L, D) and the plan of it; see `plan.py`. Parameter names are those of released checkpoints.

Glossary (paper: Hymba, arXiv 2411.13676; Mamba, arXiv 2312.00752)
    L   tokens of the packed row, meta tokens included
    D   hidden size                       I      inner size of both branches
    H   query heads                       G      key/value heads
    d   query/key head size               e      value head size
    N   SSM state size                    R      rank of the step size
    S   segments                          W      convolution taps
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hymba_align.model.cache import HymbaLayerState
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.kernels import ConvRow
from hymba_align.model.kernels.choice import choose_kernels
from hymba_align.model.kernels.norm import rms_norm
from hymba_align.model.key_values import KeyValues
from hymba_align.model.plan import ForwardPlan


class HymbaRMSNorm(nn.Module):
    """Root mean square norm in float32, cast back, then scaled. Source: arXiv 1910.07467, equation 4."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a compiler fuses the plain form and cannot look into the others
            return rms_norm(x, self.weight, self.eps)
        return choose_kernels(x.device, x.dtype).rms_norm(x, self.weight, self.eps)


class HymbaStepProjection(nn.Linear):
    """Linear layer whose bias is added in float32, as the step size needs; its output is float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).float() + cast(Tensor, self.bias).float()


class HymbaConv(nn.Module):
    """Causal depthwise convolution along the tree, then SiLU. Not an `nn.Conv1d`: adapters made for that would not see the tree."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, u_LI: Tensor, plan: ConvRow, tails: Tensor | None) -> tuple[Tensor, Tensor]:
        return plan.run(u_LI, self.weight.squeeze(1), self.bias, tails, silu=True)


class HymbaDecay(nn.ParameterList):
    """A_log, the logarithm of the negated state matrix (I, N), as the list of one that checkpoints store.

    A class of its own because transformers initialises the weights of other people's models by the module that holds
    them directly.
    """

    def __init__(self, channels: int, state: int) -> None:
        super().__init__([torch.empty(channels, state)])


class HymbaSkip(nn.ParameterList):
    """D, the SSM's direct path (I,), as the list of one that checkpoints store."""

    def __init__(self, channels: int) -> None:
        super().__init__([torch.empty(channels)])


class LayerOutput(NamedTuple):
    """What a layer hands on: its output, the keys and values it used, and where each segment's SSM branch ended."""

    x: Tensor
    """(L, D)"""
    k: Tensor
    """(L, G, d), after RoPE"""
    v: Tensor
    """(L, G, e)"""
    conv_tail: Tensor
    """(S, W - 1, I)"""
    ssm_state: Tensor
    """(S, I, N)"""


class HymbaMixer(nn.Module):
    """The hybrid head: attention and SSM side by side, normalised and averaged. Source: Hymba, section 2.1, equation 3.

    Args:
        config: shape of the model.
        layer: index of this layer.
    """

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        inner, state, rank = config.inner_size, config.mamba_d_state, config.mamba_dt_rank
        self.layer = layer
        self.kv_source = config.kv_source(layer)
        self.is_global = config.is_global(layer)
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.v_head_dim = config.head_dim, config.v_head_dim
        self.dt_rank, self.state = rank, state
        # q | k | v | u | z; layers that reuse keys and values have no k | v
        own_kv = [self.groups * self.head_dim, self.groups * self.v_head_dim] if self.kv_source == layer else [0, 0]
        self.splits = [self.heads * self.head_dim, *own_kv, inner, inner]

        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.conv1d = HymbaConv(inner, config.mamba_d_conv)
        self.x_proj = nn.ModuleList([nn.Linear(inner, rank + 2 * state, bias=False)])
        self.dt_proj = nn.ModuleList([HymbaStepProjection(rank, inner)])
        self.A_log = HymbaDecay(inner, state)
        self.D = HymbaSkip(inner)
        self.dt_layernorm = HymbaRMSNorm(rank, config.rms_norm_eps)
        self.B_layernorm = HymbaRMSNorm(state, config.rms_norm_eps)
        self.C_layernorm = HymbaRMSNorm(state, config.rms_norm_eps)
        self.pre_avg_layernorm1 = HymbaRMSNorm(inner, config.rms_norm_eps)
        self.pre_avg_layernorm2 = HymbaRMSNorm(inner, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x_LD: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        plan: ForwardPlan,
        past: HymbaLayerState | None,
        stored: KeyValues | None,
    ) -> LayerOutput:
        """Runs the layer on a packed row.

        Args:
            x_LD: normalised input.
            k: (L, G, d) keys of the layer's source, if it reuses another's.
            v: (L, G, e) values of the layer's source, if it reuses another's.
            plan: the packed row.
            past: this layer's state before the row, if it continues a cache.
            stored: cached keys and values of the layer's source, if the row continues a cache.
        """
        q, own_k, own_v, u_LI, z_LI = self.in_proj(x_LD).split(self.splits, dim=-1)
        q = plan.rotate(q.unflatten(-1, (self.heads, self.head_dim)))
        if k is None or v is None:
            k = plan.rotate(own_k.unflatten(-1, (self.groups, self.head_dim)))
            v = own_v.unflatten(-1, (self.groups, self.v_head_dim))
        a_LI = plan.attention.attend(q, k, v, is_global=self.is_global, stored=stored)
        y_LI, conv_tail, ssm_state = self._scan(u_LI, z_LI, plan, past)
        fused_LI = (self.pre_avg_layernorm1(a_LI) + self.pre_avg_layernorm2(y_LI)) / 2
        return LayerOutput(self.out_proj(fused_LI), k, v, conv_tail, ssm_state)

    def _scan(
        self, u_LI: Tensor, z_LI: Tensor, plan: ForwardPlan, past: HymbaLayerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The SSM branch: gated output (L, I), convolution tails and final states. Source: Mamba, section 3.4, figure 3."""
        u_LI, conv_tail = self.conv1d(u_LI, plan.conv, None if past is None else past.conv_tail)
        dt_LR, B_LN, C_LN = self.x_proj[0](u_LI).split([self.dt_rank, self.state, self.state], dim=-1)
        y_LI, ssm_state = plan.scan.gated(
            u_LI,
            self.dt_proj[0](self.dt_layernorm(dt_LR)),
            -torch.exp(self.A_log[0].float()),
            self.B_layernorm(B_LN),
            self.C_layernorm(C_LN),
            self.D[0],
            z_LI,
            None if past is None else past.ssm_state,
        )
        return y_LI, conv_tail, ssm_state


class HymbaMLP(nn.Module):
    """SwiGLU feed-forward block. Source: arXiv 2002.05202, section 2."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HymbaExperts(nn.Module):
    """The one expert of released checkpoints, under the name they store it by."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class HymbaDecoderLayer(GradientCheckpointingLayer):
    """One layer: hybrid head, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.mamba = HymbaMixer(config, layer)
        self.moe = HymbaExperts(config)
        self.input_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_LD: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        plan: ForwardPlan,
        past: HymbaLayerState | None,
        stored: KeyValues | None,
    ) -> LayerOutput:
        """As `HymbaMixer.forward`, on the residual stream. Tensors are positional: reentrant checkpointing needs that."""
        mixed = self.mamba(self.input_layernorm(x_LD), k, v, plan, past, stored)
        x_LD = x_LD + mixed.x
        return mixed._replace(x=x_LD + self.moe(self.pre_moe_layernorm(x_LD)))
