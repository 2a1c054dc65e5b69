"""What generation keeps: meta keys once per layer, ring buffers of keys, a convolution tail and an SSM state per row.

Legend: B sequences, G key/value heads, K slots, M meta tokens, N state size, I inner channels, W convolution taps,
L tokens of the packed row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache

from hymba_align.model.configuration import HymbaConfig


@dataclass
class KeyValues:
    """Keys (after RoPE) and values of one layer; the token at text position p lies in slot p modulo the slots.

    A global layer's buffers grow with the text. A local layer's stop growing at `window` slots and then overwrite the
    oldest token, which is just out of the next token's sight: the next token sees itself and `window` tokens before it.
    """

    window: int | None
    meta: tuple[Tensor, Tensor]
    """(G, M, d) and (G, M, e)"""
    keys: Tensor
    """(B, G, K, d)"""
    values: Tensor
    """(B, G, K, e)"""

    def slot_positions(self, lengths_B: Tensor) -> Tensor:
        """(B, K) text position of the token in each slot; negative where a slot is empty."""
        slots = self.keys.shape[2]
        newest = lengths_B[:, None] - 1
        slot = torch.arange(slots, device=lengths_B.device)
        return newest - (newest - slot) % slots

    def append(self, k_LGd: Tensor, v_LGe: Tensor, rows_L: Tensor, positions_L: Tensor, longest: int) -> None:
        """Stores new tokens.

        Args:
            k_LGd: keys of the new tokens.
            v_LGe: their values.
            rows_L: the sequence of each token.
            positions_L: its text position.
            longest: tokens of the longest sequence once these are stored.
        """
        self._grow(longest)
        slots = self.keys.shape[2]
        if self.window is not None:  # of tokens that share a slot only the last may be written
            newest = torch.full((len(self.keys),), -1, device=positions_L.device)
            newest = newest.scatter_reduce(0, rows_L, positions_L, "amax")
            kept = positions_L > newest[rows_L] - slots
            k_LGd, v_LGe, rows_L, positions_L = k_LGd[kept], v_LGe[kept], rows_L[kept], positions_L[kept]
        slot = positions_L % slots
        self.keys[rows_L, :, slot] = k_LGd.to(self.keys.dtype)
        self.values[rows_L, :, slot] = v_LGe.to(self.values.dtype)

    def _grow(self, longest: int) -> None:
        slots = self.keys.shape[2]
        limit = longest if self.window is None else min(longest, self.window)
        if limit <= slots:
            return
        wanted = max(limit, 2 * slots)
        extra = (wanted if self.window is None else min(wanted, self.window)) - slots
        self.keys, self.values = (
            torch.cat([x, x.new_zeros(*x.shape[:2], extra, x.shape[3])], dim=2) for x in (self.keys, self.values)
        )

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in the given order."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass
class HymbaLayerState:
    """What one layer carries from token to token; layers that reuse another's keys have no `key_values`."""

    key_values: KeyValues | None
    conv_tail: Tensor
    """(B, W - 1, I)"""
    ssm_state: Tensor
    """(B, I, N), float32"""


@dataclass(frozen=True)
class LayerUpdate:
    """What one layer computed for the cache in a forward pass over a packed row."""

    k: Tensor
    """(L, G, d), meta tokens first on the first pass"""
    v: Tensor
    """(L, G, e)"""
    conv_tail: Tensor
    """(S, W - 1, I) of every segment"""
    ssm_state: Tensor
    """(S, I, N) of every segment"""

    def detached(self) -> LayerUpdate:
        return LayerUpdate(*(x.detach() for x in (self.k, self.v, self.conv_tail, self.ssm_state)))


@dataclass
class HymbaCache(Cache):
    """State of a batch of sequences between forward passes. Empty until the first pass.

    Rows may have different lengths, with padding on any side. It is written once per forward pass, after all layers,
    and holds values without their graph: gradients do not flow into earlier passes.
    """

    config: HymbaConfig
    states: list[HymbaLayerState] = field(default_factory=list)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """(B,) real text tokens of each row, on the CPU"""
    columns: int = 0
    """batch columns seen so far, padding included: what transformers calls the sequence length"""

    def __post_init__(self) -> None:
        super().__init__(layers=[])

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"HymbaCache(rows={len(self.lengths)}, columns={self.columns}, bytes={self.num_bytes})"

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors, counted as allocated."""
        tensors: list[Tensor] = []
        for state in self.states:
            tensors += [state.conv_tail, state.ssm_state]
            if (stored := state.key_values) is not None:
                tensors += [stored.keys, stored.values, *stored.meta]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Batch columns seen so far, padding included."""
        return self.columns

    def commit(self, updates: list[LayerUpdate], rows_S: Tensor, lengths_S: Tensor, columns: int, batch: int) -> None:
        """Takes in one forward pass.

        Args:
            updates: one per layer; on the first pass the row starts with the meta tokens, as its own segment.
            rows_S: batch row of each segment, meta tokens not counted.
            lengths_S: tokens of each segment, meta tokens not counted.
            columns: T of the batch that was run.
            batch: B of the batch that was run.
        """
        first_pass = not self.states
        updates = [update.detached() for update in updates]
        if not first_pass and torch.is_grad_enabled():  # a backward pass may still need what is written over below
            self.batch_select_indices(torch.arange(batch))
        if first_pass:
            self.lengths = torch.zeros(batch, dtype=torch.int64)
            self.states = [self._new_state(layer, update, batch) for layer, update in enumerate(updates)]
        device = updates[0].k.device
        starts = self.lengths[rows_S]
        offsets = lengths_S.cumsum(0) - lengths_S
        index = torch.arange(int(lengths_S.sum())) - offsets.repeat_interleave(lengths_S)
        positions_L = (starts.repeat_interleave(lengths_S) + index).to(device)
        rows_L = rows_S.repeat_interleave(lengths_S).to(device)
        self.lengths = self.lengths.index_add(0, rows_S, lengths_S)
        self.columns += columns
        longest = int(self.lengths.max())
        rows = rows_S.to(device)
        meta = self.config.num_memory_tokens if first_pass else 0
        for state, update in zip(self.states, updates, strict=True):
            state.conv_tail[rows] = update.conv_tail[int(first_pass) :].to(state.conv_tail.dtype)
            state.ssm_state[rows] = update.ssm_state[int(first_pass) :]
            if state.key_values is not None:
                state.key_values.append(update.k[meta:], update.v[meta:], rows_L, positions_L, longest)

    def _new_state(self, layer: int, update: LayerUpdate, batch: int) -> HymbaLayerState:
        """State after the meta tokens."""
        key_values = None
        if self.config.kv_source(layer) == layer:
            meta = self.config.num_memory_tokens
            key_values = KeyValues(
                window=None if self.config.is_global(layer) else self.config.sliding_window,
                meta=(update.k[:meta].transpose(0, 1).contiguous(), update.v[:meta].transpose(0, 1).contiguous()),
                keys=update.k.new_zeros(batch, update.k.shape[1], 0, update.k.shape[2]),
                values=update.v.new_zeros(batch, update.v.shape[1], 0, update.v.shape[2]),
            )
        return HymbaLayerState(
            key_values,
            update.conv_tail[:1].repeat(batch, 1, 1),
            update.ssm_state[:1].repeat(batch, 1, 1),
        )

    def reset(self) -> None:
        """Forgets everything."""
        self.states, self.lengths, self.columns = [], torch.zeros(0, dtype=torch.int64), 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "HymbaCache cannot drop its last tokens: the SSM state does not run backwards; start a new cache"
        )

    @property
    def is_croppable(self) -> bool:
        return False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows, in the given order; rows may repeat."""
        for state in self.states:
            rows = indices.to(state.conv_tail.device)
            state.conv_tail, state.ssm_state = state.conv_tail[rows], state.ssm_state[rows]
            if state.key_values is not None:
                state.key_values.select(rows)
        self.lengths = self.lengths[indices.cpu()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the surviving beams, in order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))
