"""The causal convolution's Triton kernels. `triton_conv.py` launches them; only it imports this file.

A program is one warp wide, owns a run of neighbouring tokens of one segment and a block of channels, and slides along it:
the last W - 1 inputs (and, backwards, the next W - 1 gradients) stay in registers, so that every row is read once.

A run is a row of int32: first token, tokens, tokens before it in its segment, tokens from it to the segment's end,
segment. The W - 1 rows before it come from `history`, oldest first. Rows are named by codes: token t is t, zeros are -1,
row r of the given tails (flattened) is -2 - r.

Legend: T tokens, I inner channels, S segments, W taps.
"""

# Triton joins tuples but does not unpack them, its names are the legend's, and to mypy a tuple that grows changes type.
# ruff: noqa: E741, RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_coded(
    u: tl.tensor, tails: tl.tensor, code: tl.tensor, u_stride: tl.tensor, I: tl.tensor, i: tl.tensor
) -> tl.tensor:
    """The row that a code names, in float32."""
    own = tl.load(u + tl.cast(code, tl.int64) * u_stride + i, mask=i < tl.where(code >= 0, I, 0), other=0.0)
    given = tl.load(tails + tl.cast(-2 - code, tl.int64) * I + i, mask=i < tl.where(code < -1, I, 0), other=0.0)
    return own.to(tl.float32) + given.to(tl.float32)


@triton.jit
def convolve(
    u: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tails: tl.tensor,
    y: tl.tensor,
    runs: tl.tensor,
    history: tl.tensor,
    u_stride: tl.tensor,
    I: tl.tensor,
    W: tl.constexpr,
    BI: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Convolved rows (T, I) of every run. `weight` is (W, I) in float32, the current token's tap last."""
    blocks = tl.cdiv(I, BI)
    run = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    inside = i < I
    first, length = tl.load(runs + run * 5), tl.load(runs + run * 5 + 1)
    taps, rows = (), ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + k * I + i, mask=inside, other=0.0),)
    for k in tl.static_range(W - 1):
        rows = rows + (load_coded(u, tails, tl.load(history + run * (W - 1) + k), u_stride, I, i),)
    shift = tl.load(bias + i, mask=inside, other=0.0)
    for t in range(0, length, STEPS):
        y_s = ()
        for j in tl.static_range(STEPS):  # all loads before the first store, which would hold them up
            token = tl.cast(first + tl.minimum(t + j, length - 1), tl.int64)
            rows = rows + (tl.load(u + token * u_stride + i, mask=inside, other=0.0).to(tl.float32),)
        for j in tl.static_range(STEPS):
            out = shift
            for k in tl.static_range(W):
                out += taps[k] * rows[j + k]
            if SILU:
                out = out * tl.sigmoid(out)
            y_s = y_s + (out,)
        for j in tl.static_range(STEPS):
            token = tl.cast(first + t + j, tl.int64)
            tl.store(y + token * I + i, y_s[j].to(y.dtype.element_ty), mask=i < tl.where(t + j < length, I, 0))
        rows = rows[STEPS:]


@triton.jit
def copy_tails(
    u: tl.tensor,
    tails: tl.tensor,
    out: tl.tensor,
    codes: tl.tensor,
    u_stride: tl.tensor,
    I: tl.tensor,
    BI: tl.constexpr,
) -> None:
    """The rows (len(codes), I) that the codes name."""
    blocks = tl.cdiv(I, BI)
    row = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    value = load_coded(u, tails, tl.load(codes + row), u_stride, I, i)
    tl.store(out + tl.cast(row, tl.int64) * I + i, value.to(out.dtype.element_ty), mask=i < I)


@triton.jit
def convolve_back(
    u: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tails: tl.tensor,
    dy: tl.tensor,
    du: tl.tensor,
    heads: tl.tensor,
    ends: tl.tensor,
    dweight: tl.tensor,
    runs: tl.tensor,
    history: tl.tensor,
    u_stride: tl.tensor,
    dy_stride: tl.tensor,
    I: tl.tensor,
    W: tl.constexpr,
    BI: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """du (T, I) from the segment's own tokens and partial sums dweight (runs, W + 1, I), the bias last.

    What crosses from segment to segment is left in float32 for `join_segments`: the gradients of each segment's first
    W - 1 outputs before SiLU in `heads` (S, W - 1, I), and du of its last W - 1 tokens, last first, in `ends`.
    """
    blocks = tl.cdiv(I, BI)
    run = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    inside = i < I
    row = runs + run * 5
    first, length, before, after = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    side = tl.cast(tl.load(row + 4), tl.int64) * (W - 1)
    taps, rows, sums, pending = (), (), (), ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + k * I + i, mask=inside, other=0.0),)
        sums = sums + (tl.zeros([BI], tl.float32),)
    for k in tl.static_range(W - 1):
        rows = rows + (load_coded(u, tails, tl.load(history + run * (W - 1) + k), u_stride, I, i),)
        pending = pending + (tl.zeros([BI], tl.float32),)
    shift = tl.load(bias + i, mask=inside, other=0.0)
    dbias = tl.zeros([BI], tl.float32)
    # The run's last tokens also have gradient from the next run's first W - 1, computed here once more.
    for t in range(0, length + W - 1, STEPS):
        d_s = ()
        for j in tl.static_range(STEPS):
            token = tl.cast(first + tl.minimum(t + j, after - 1), tl.int64)
            rows = rows + (tl.load(u + token * u_stride + i, mask=inside, other=0.0).to(tl.float32),)
            d = tl.load(dy + token * dy_stride + i, mask=i < tl.where(t + j < after, I, 0), other=0.0)
            d_s = d_s + (d.to(tl.float32),)
        for j in tl.static_range(STEPS):
            d = d_s[j]
            if SILU:
                out = shift
                for k in tl.static_range(W):
                    out += taps[k] * rows[j + k]
                sigmoid = tl.sigmoid(out)
                d = d * sigmoid * (1.0 + out * (1.0 - sigmoid))
            own = tl.where(t + j < length, d, 0.0)
            dbias += own
            added = ()
            for k in tl.static_range(W):
                added = added + (sums[k] + own * rows[j + k],)
            sums = added
            # pending[m] is du so far of the token W - 1 - m steps back; this token adds its share.
            shares = ()
            for m in tl.static_range(W - 1):
                shares = shares + (pending[m] + taps[m] * d,)
            shares = shares + (taps[W - 1] * d,)
            done = t + j - (W - 1)  # the token, in the run, that no later one adds to
            pending = shares[1:]
            left = after - 1 - done
            valid = (done >= 0) & (done < length)
            place = tl.cast(first + done, tl.int64) * I + i
            tl.store(du + place, shares[0].to(du.dtype.element_ty), mask=i < tl.where(valid & (left >= W - 1), I, 0))
            tl.store(ends + (side + left) * I + i, shares[0], mask=i < tl.where(valid & (left < W - 1), I, 0))
            head = (t + j < length) & (before + t + j < W - 1)
            tl.store(heads + (side + before + t + j) * I + i, d, mask=i < tl.where(head, I, 0))
        rows = rows[STEPS:]
    for k in tl.static_range(W):
        tl.store(dweight + (tl.cast(run, tl.int64) * (W + 1) + k) * I + i, sums[k], mask=inside)
    tl.store(dweight + (tl.cast(run, tl.int64) * (W + 1) + W) * I + i, dbias, mask=inside)


@triton.jit
def join_segments(
    weight: tl.tensor,
    heads: tl.tensor,
    ends: tl.tensor,
    dtails: tl.tensor,
    out: tl.tensor,
    targets: tl.tensor,
    bases: tl.tensor,
    first_use: tl.tensor,
    uses: tl.tensor,
    I: tl.tensor,
    W: tl.constexpr,
    BI: tl.constexpr,
    HAS_DTAILS: tl.constexpr,
) -> None:
    """Rows `targets` of `out`: their share in `ends` (base -1: none), and what every later use of the row sends back.

    A use is W * head + tap, or -1 - tail for a tail's row.
    """
    blocks = tl.cdiv(I, BI)
    row = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    base = tl.load(bases + row)
    total = tl.load(ends + tl.cast(base, tl.int64) * I + i, mask=i < tl.where(base >= 0, I, 0), other=0.0)
    for k in range(tl.load(first_use + row), tl.load(first_use + row + 1)):
        use = tl.load(uses + k)
        inside = i < tl.where(use >= 0, I, 0)
        head = tl.load(heads + tl.cast(use // W, tl.int64) * I + i, mask=inside, other=0.0)
        total += head * tl.load(weight + use % W * I + i, mask=inside, other=0.0)
        if HAS_DTAILS:
            inside = i < tl.where(use < 0, I, 0)
            total += tl.load(dtails + tl.cast(-1 - use, tl.int64) * I + i, mask=inside, other=0.0).to(tl.float32)
    target = tl.cast(tl.load(targets + row), tl.int64)
    tl.store(out + target * I + i, total.to(out.dtype.element_ty), mask=i < I)
