"""A Hymba in float64 that runs one sequence at a time, written from DESIGN.md, section 2: no tree, no blocks, no kernels.

test_attention.py holds it against what the released code computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.reference import causal_conv_reference, selective_scan_reference


@dataclass
class Dense:
    """A Hymba in float64 that runs one sequence at a time and forms every matrix of attention."""

    weights: dict[str, Tensor]
    config: HymbaConfig
    lacks: frozenset[tuple[int, str]] = frozenset()
    """Layers and branches (attention, ssm) whose term in the fusion is left out"""
    fused: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of the last sequence, by layer and branch: (M + T, I) before and behind the norm"""

    @classmethod
    def of(cls, model: HymbaForCausalLM, *lacks: tuple[int, str]) -> Dense:
        weights = {name.removeprefix("model."): x.double() for name, x in model.state_dict().items()}
        return cls(weights, model.config, frozenset(lacks))

    def run(self, token_ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Input of every layer (M + T, D), and attention weights of every layer (H, M + T, M + T)."""
        x = torch.cat([self.weights["memory_tokens"], self.weights["embed_tokens.weight"][token_ids]])
        inputs, attention = [], []
        keys: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in range(self.config.num_hidden_layers):
            inputs.append(x)
            x, weights = self._layer(x, layer, keys)
            attention.append(weights)
        self.output = x
        return inputs, attention

    def log_probs(self, token_ids: list[int]) -> Tensor:
        """(T, V) of what follows each token."""
        self.run(token_ids)
        hidden = self._norm(self.output[self.config.num_memory_tokens :], "final_layernorm")
        return (hidden @ self.weights["embed_tokens.weight"].T).log_softmax(-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.weights[f"{name}.weight"]
        )

    def _rotate(self, x_LHd: Tensor) -> Tensor:
        size, config = x_LHd.shape[-1], self.config
        base = config.rope_theta
        if config.rope_type == "ntk":
            base *= (2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1) ** (
                size / (size - 2)
            )
        angle = torch.arange(len(x_LHd))[:, None, None] * base ** (-torch.arange(0, size, 2).double() / size)
        a, b = x_LHd[..., : size // 2], x_LHd[..., size // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _layer(self, x: Tensor, layer: int, keys: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        c, at = self.config, f"layers.{layer}."
        w = {name.removeprefix(at): x for name, x in self.weights.items() if name.startswith(at)}
        heads, groups, inner = c.num_attention_heads, c.num_key_value_heads, c.mamba_expand * c.hidden_size
        size, v_size = c.hidden_size // heads, c.v_head_dim
        source = next((group[0] for group in c.kv_reuse_group if layer in group), layer)
        own = [groups * size, groups * v_size] if source == layer else []
        parts = (self._norm(x, f"{at}input_layernorm") @ w["mamba.in_proj.weight"].T).split(
            [heads * size, *own, inner, inner], -1
        )
        q, u, z = self._rotate(parts[0].unflatten(-1, (heads, size))), parts[-2], parts[-1]
        if source == layer:
            keys[layer] = self._rotate(parts[1].unflatten(-1, (groups, size))), parts[2].unflatten(-1, (groups, v_size))
        k, v = (one.repeat_interleave(heads // groups, 1) for one in keys[source])
        place = torch.arange(len(x))
        distance = place[:, None] - place
        sees = distance >= 0
        if layer not in c.global_attn_idx:
            sees &= (distance <= c.sliding_window) | (place < c.num_memory_tokens)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        a = torch.einsum("hqk,khe->qhe", weights, v).flatten(1)
        y = self._scan(u, z, at, w)
        for branch, before, norm in (("attention", a, "pre_avg_layernorm1"), ("ssm", y, "pre_avg_layernorm2")):
            self.fused[layer, branch] = before, self._norm(before, f"{at}mamba.{norm}")
            if (layer, branch) not in self.lacks:
                x = x + self.fused[layer, branch][1] / 2 @ w["mamba.out_proj.weight"].T
        n = self._norm(x, f"{at}pre_moe_layernorm")
        gate, up, down = (w[f"moe.experts.0.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        return x + (F.silu(n @ gate) * (n @ up)) @ down, weights

    def _scan(self, u: Tensor, z: Tensor, at: str, w: dict[str, Tensor]) -> Tensor:
        c = self.config
        taps = w["mamba.conv1d.weight"].squeeze(1)
        u = F.silu(causal_conv_reference(u, taps, w["mamba.conv1d.bias"], u.new_zeros(taps.shape[1] - 1, u.shape[1])))
        dt, B, C = (u @ w["mamba.x_proj.0.weight"].T).split([c.mamba_dt_rank, c.mamba_d_state, c.mamba_d_state], -1)
        dt, B, C = (self._norm(one, f"{at}mamba.{name}_layernorm") for one, name in ((dt, "dt"), (B, "B"), (C, "C")))
        dt = F.softplus(dt @ w["mamba.dt_proj.0.weight"].T + w["mamba.dt_proj.0.bias"])
        A = -w["mamba.A_log.0"].exp()
        y, _ = selective_scan_reference(u, dt, A, B, C, torch.zeros_like(A))
        return (y + w["mamba.D.0"] * u) * F.silu(z)
