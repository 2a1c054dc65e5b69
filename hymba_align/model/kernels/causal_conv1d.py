"""Mamba's causal depthwise convolution by the library causal-conv1d, over a tree of segments and for single tokens.

The library takes a row with a sequence number per token and convolves every sequence from zeros. Segments that each
continue the one before them in the row are one such sequence, a run. What a run's first W - 1 tokens lack is what they
see of the segment that the run continues; they are convolved again in a short row, behind a copy of that history, and
replace the first result. The row itself is never copied out.

Not run on a GPU for this project yet: tested on the CPU with stand-ins that follow the library's interface.

Legend: T tokens, I inner channels, S segments, R given tails, W taps (the kernel width), E entries read once more.
Source: Mamba (arXiv 2312.00752), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hymba_align.errors import KernelError
from hymba_align.model.kernels.interface import ConvRow
from hymba_align.model.kernels.step import ConvStep

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = 8
"""The library reads channels in groups of this many."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why causal-conv1d cannot run there, with what to do about it; None if it can."""
    if device.type != "cuda":
        return f"causal-conv1d runs on CUDA only, not on {device.type}: choose torch"
    if dtype not in DTYPES:
        return f"causal-conv1d does not compute in {dtype}: choose torch"
    try:
        import causal_conv1d  # noqa: F401
    except ImportError as error:
        return f"causal-conv1d does not load ({error}); in the clone: pip install --no-build-isolation -e '.[cuda]'"
    return None


@dataclass(frozen=True)
class Reads:
    """Entries of the row, of given tails, or zeros.

    Index t < T is token t, T is zeros, and T + 1 + r * (W - 1) + j is entry j of given tail r.
    """

    in_row: Tensor
    """(E, 1) whether each is an entry of the row."""
    tokens: Tensor
    """(E,) the token, or 0."""
    others: Tensor
    """(E,) the entry of zeros and given tails, laid end to end, or 0."""

    @classmethod
    def build(cls, sources: list[int], total: int, device: torch.device) -> Reads:
        """Which of `total` inputs the entries come from, on the device."""
        index = torch.tensor(sources, dtype=torch.int64)
        own = index < total
        return cls(
            own[:, None].to(device),
            index.masked_fill(~own, 0).to(device),
            (index - total).masked_fill(own, 0).to(device),
        )

    def take(self, u: Tensor, others: Tensor) -> Tensor:
        """What each entry reads (E, I)."""
        return torch.where(self.in_row, u[self.tokens], others[self.others])


@dataclass(frozen=True)
class LibraryConv(ConvRow):
    """The runs of a packed row, and the short row of their first tokens. Made once per forward pass."""

    runs: Tensor
    """(1, T) int32 the run of each token."""
    first_reads: Reads
    """The short row: per run that continues something, its history and its first tokens."""
    first_runs: Tensor
    """(1, E) int32 the run of each entry of the short row."""
    first_outputs: Tensor
    """Entries of the short row that are tokens."""
    first_tokens: Tensor
    """The tokens that they are."""
    tail_reads: Reads
    """Each segment's own tail, W - 1 entries."""
    taps: int
    needs_tails: bool
    """Whether given tails are read."""

    @classmethod
    def build(
        cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device
    ) -> LibraryConv:
        """As `ConvRow.build`.

        Raises:
            KernelError: a number of taps that the library does not have.
        """
        _check_taps(taps)
        reach, total = taps - 1, sum(lengths)
        tails: list[list[int]] = []
        histories: list[list[int]] = []  # of each run
        run_sizes: list[int] = []
        start = 0
        for segment, (length, parent, tail) in enumerate(zip(lengths, parents, initial, strict=True)):
            if parent >= 0:
                history = tails[parent]
            elif tail >= 0:
                history = [total + 1 + tail * reach + entry for entry in range(reach)]
            else:
                history = [total] * reach
            if segment and parent == segment - 1:
                run_sizes[-1] += length
            else:
                histories.append(history)
                run_sizes.append(length)
            start += length
            tails.append([*history, *range(max(start - length, start - reach), start)][-reach:])

        sources: list[int] = []
        source_runs: list[int] = []
        outputs: list[int] = []
        tokens: list[int] = []
        start = 0
        for run, (history, size) in enumerate(zip(histories, run_sizes, strict=True)):
            if any(source != total for source in history):
                own = range(start, start + min(size, reach))
                outputs += range(len(sources) + reach, len(sources) + reach + len(own))
                tokens += own
                sources += [*history, *own]
                source_runs += [run] * (reach + len(own))
            start += size
        runs = torch.arange(len(run_sizes), dtype=torch.int32).repeat_interleave(torch.tensor(run_sizes))
        return cls(
            runs=runs[None].to(device),
            first_reads=Reads.build(sources, total, device),
            first_runs=torch.tensor([source_runs], dtype=torch.int32, device=device),
            first_outputs=torch.tensor(outputs, dtype=torch.int64, device=device),
            first_tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
            tail_reads=Reads.build([source for tail in tails for source in tail], total, device),
            taps=taps,
            needs_tails=any(state >= 0 for state, parent in zip(initial, parents, strict=True) if parent < 0),
        )

    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `ConvRow.run`, summed in float32 by the library.

        Raises:
            KernelError: a dtype or a number of channels that the library does not take.
            ValueError: the plan refers to tails that are not given.
        """
        _check_input(u)
        if self.needs_tails and initial_tails is None:
            raise ValueError("causal_conv: the plan refers to given tails, but none were given")
        others = u.new_zeros(1, u.shape[1])
        if initial_tails is not None:
            others = torch.cat([others, initial_tails.to(u.dtype).flatten(0, 1)])
        y = _convolve(u, weight, bias, self.runs, silu)
        if len(self.first_tokens):
            first = _convolve(self.first_reads.take(u, others), weight, bias, self.first_runs, silu)
            y = y.index_copy(0, self.first_tokens, first[self.first_outputs])
        return y, self.tail_reads.take(u, others).unflatten(0, (-1, self.taps - 1))


@dataclass(frozen=True)
class LibraryConvStep(ConvStep):
    """One output of the convolution for every cached sequence at once. Inference only."""

    @classmethod
    def build(
        cls, lengths: list[int], parents: list[int], initial: list[int], taps: int, device: torch.device
    ) -> LibraryConvStep:
        """As `ConvStep.build`.

        Raises:
            KernelError: a number of taps that the library does not have.
        """
        _check_taps(taps)
        return super().build(lengths, parents, initial, taps, device)

    def run(
        self, u: Tensor, weight: Tensor, bias: Tensor, initial_tails: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `ConvRow.run`; the given tails stay as they are.

        Raises:
            KernelError: gradients are wanted, or a dtype that the library does not take.
            ValueError: no tails are given.
        """
        from causal_conv1d import causal_conv1d_update

        if initial_tails is None:
            raise ValueError("ConvStep: a step continues tails, but none were given")
        refuse_gradients("causal-conv1d", u, weight, bias, initial_tails)
        _check_input(u)
        tails = initial_tails.to(u.dtype, copy=True)
        y = causal_conv1d_update(
            u, tails.transpose(1, 2), weight, bias.to(weight.dtype), activation="silu" if silu else None
        )
        return cast(Tensor, y), tails


def refuse_gradients(library: str, *inputs: Tensor | None) -> None:
    """Raises a KernelError if autograd records any of the inputs."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise KernelError(f"{library}: its single-token update has no gradient; run it in torch.no_grad()")


def _convolve(u: Tensor, weight: Tensor, bias: Tensor, runs: Tensor, silu: bool) -> Tensor:
    """(T, I) every run convolved from zeros."""
    from causal_conv1d import causal_conv1d_fn

    if u.stride(1) != 1 or u.stride(0) % CHANNELS or u.storage_offset() % CHANNELS:
        u = u.contiguous()  # it reads 16 aligned bytes at a time
    y: Tensor = causal_conv1d_fn(
        u.T[None], weight, bias.to(weight.dtype), seq_idx=runs, activation="silu" if silu else None
    )
    return y[0].T


def _check_taps(taps: int) -> None:
    if not 2 <= taps <= 4:
        raise KernelError(f"causal-conv1d has 2 to 4 taps, not {taps} (mamba_d_conv); choose torch")


def _check_input(u: Tensor) -> None:
    if u.dtype not in DTYPES:
        raise KernelError(f"causal-conv1d does not compute in {u.dtype}; choose torch")
    if u.shape[1] % CHANNELS:
        raise KernelError(
            f"causal-conv1d takes channels in multiples of {CHANNELS}, not {u.shape[1]} "
            "(mamba_expand x hidden_size); choose torch"
        )
