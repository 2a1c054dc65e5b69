"""The selective scan's Triton kernels. `triton_scan.py` launches them and explains the order; only it imports this file.

A program owns one chunk and a block of channels, is one warp wide and walks the chunk's tokens. The state tile's layout
decides the cost. (NP, BI) puts channels on the lanes and all states of a channel in one thread's registers: sums over
states are then free. The gradient kernel also sums over channels for dB and dC, which costs shuffles between lanes;
(CI, NP, LANES) shares them out: 16 lanes hold channels, 2 hold states, the rest lies in registers, which halves the
shuffles and repeats what is the same for all states of a channel only twice.

States lie in memory as (N, I), channels fastest, so that loads and stores keep the layout of the tile.
A chunk is a row of int32: first token, length, start, first checkpoint, segment that it ends or -1. Its start is the
chunk whose last state it continues, or -1 for zeros, or -2 - r for given state r.
Steps past a chunk's end read its last token again with dt = 0, which leaves every state as it is.

Legend: T tokens, I inner channels, N state size (NP padded to a power of two), C chunks, S segments.
"""

# Triton joins tuples but does not unpack them, its names are the legend's, and to mypy a tuple that grows changes type.
# ruff: noqa: E741, RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NOT_SPECIALISED = ("T", "I")
"""T changes with every batch. That I is a multiple of 16 stays unsaid, because Triton would then give each thread four
neighbouring channels of the states it loads, and all arithmetic after that to fewer lanes, several times over."""


@triton.jit
def only_if(mask: tl.tensor, condition: tl.tensor) -> tl.tensor:
    """`mask` where the scalar holds. Triton 3.9's interpreter broadcasts a scalar comparison as int32, hence the detour."""
    return mask & (tl.full(mask.shape, tl.cast(condition, tl.int32), tl.int32) != 0)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), relative error 2e-7.

    log(1 + e) / e is a Chebyshev interpolant of degree 8 on [0, 1]. The hardware's fast logarithm loses the digits of
    log(1 + e) where e is small, and small is what steps are when training starts.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = -0.0290740641 + e * 0.0051261021
    p = 0.0775160866 + e * p
    p = -0.1360224761 + e * p
    p = 0.1907688073 + e * p
    p = -0.2483539899 + e * p
    p = 0.3331812171 + e * p
    p = -0.4999944498 + e * p
    p = 0.9999999659 + e * p
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def load_start(
    ends: tl.tensor, initial: tl.tensor, code: tl.tensor, size: tl.tensor, states: tl.tensor, ok: tl.tensor
) -> tl.tensor:
    """The state that a chunk with this start code starts from."""
    h = tl.load(ends + tl.cast(code, tl.int64) * size + states, mask=only_if(ok, code >= 0), other=0.0)
    given = tl.load(initial + tl.cast(-2 - code, tl.int64) * size + states, mask=only_if(ok, code < -1), other=0.0)
    return h + given


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def run_chunks(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    ends: tl.tensor,
    totals: tl.tensor,
    chunks: tl.tensor,
    selected: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    BI: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Last state (N, I) of every selected chunk, run from zero, and its sum of dt (I,)."""
    blocks = tl.cdiv(I, BI)
    chunk = tl.load(selected + tl.program_id(0) // blocks)
    first, length = tl.load(chunks + chunk * 5), tl.load(chunks + chunk * 5 + 1)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    n = tl.arange(0, NP)
    states, ok = n[:, None] * I + i[None, :], (n < N)[:, None] & (i < I)[None, :]
    exponent = tl.load(A + states, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([NP, BI], tl.float32)
    total = tl.zeros([BI], tl.float32)
    for t in range(0, length, STEPS):
        u_s, dt_s, B_s = (), (), ()
        for j in tl.static_range(STEPS):  # all loads first: stores or arithmetic between them would hold them up
            token = tl.cast(first + tl.minimum(t + j, length - 1), tl.int64)
            u_s = u_s + (tl.load(u + token * u_stride + i, mask=i < I, other=0.0).to(tl.float32),)
            step = tl.load(dt + token * dt_stride + i, mask=i < I, other=0.0).to(tl.float32)
            dt_s = dt_s + (tl.where(t + j < length, softplus(step) if SOFTPLUS else step, 0.0),)
            B_s = B_s + (tl.load(B + token * N + n, mask=n < N, other=0.0).to(tl.float32),)
        for j in tl.static_range(STEPS):
            x = dt_s[j] * u_s[j]
            h = tl.exp2(dt_s[j][None, :] * exponent) * h + x[None, :] * B_s[j][:, None]
            total += dt_s[j]
    tl.store(ends + tl.cast(chunk, tl.int64) * N * I + states, h, mask=ok)
    tl.store(totals + tl.cast(chunk, tl.int64) * I + i, total, mask=i < I)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def hand_down(
    A: tl.tensor,
    initial: tl.tensor,
    ends: tl.tensor,
    totals: tl.tensor,
    chunks: tl.tensor,
    segments: tl.tensor,
    level: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Turns the last states from zero into the true ones, along each segment of a level.

    A segment is a row of int32: first chunk, chunks, chunks that others continue.
    """
    size = I * N
    blocks = tl.cdiv(size, BLOCK)
    segment = tl.load(level + tl.program_id(0) // blocks)
    first, count = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 2)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = s < size
    exponent = tl.load(A + s, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    h = load_start(ends, initial, tl.load(chunks + first * 5 + 2), size, s, ok)
    for c in range(0, count, STEPS):
        end_s, total_s = (), ()
        for j in tl.static_range(STEPS):
            chunk = tl.cast(first + tl.minimum(c + j, count - 1), tl.int64)
            end_s = end_s + (tl.load(ends + chunk * size + s, mask=ok, other=0.0),)
            total_s = total_s + (tl.load(totals + chunk * I + s % I, mask=ok, other=0.0),)
        for j in tl.static_range(STEPS):
            chunk = tl.cast(first + c + j, tl.int64)
            h = tl.exp2(total_s[j] * exponent) * h + end_s[j]
            tl.store(ends + chunk * size + s, h, mask=s < tl.where(c + j < count, size, 0))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def finish_chunks(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    initial: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    finals: tl.tensor,
    checkpoints: tl.tensor,
    chunks: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    z_stride: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    BI: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    SPACING: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Output (T, I) of every chunk from its true start, finals (S, N, I), and, to keep, a state every SPACING tokens."""
    blocks = tl.cdiv(I, BI)
    row = chunks + tl.program_id(0) // blocks * 5
    first, length, checkpoint, segment = tl.load(row), tl.load(row + 1), tl.load(row + 3), tl.load(row + 4)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    n = tl.arange(0, NP)
    states, ok = n[:, None] * I + i[None, :], (n < N)[:, None] & (i < I)[None, :]
    exponent = tl.load(A + states, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    h = load_start(ends, initial, tl.load(row + 2), N * I, states, ok)
    if GATED:
        skip = tl.load(D + i, mask=i < I, other=0.0).to(tl.float32)
    for t in range(0, length, STEPS):
        if KEEP and t % SPACING == 0:
            kept = tl.cast(checkpoint + t // SPACING, tl.int64)
            tl.store(checkpoints + kept * N * I + states, h, mask=ok)
        u_s, dt_s, z_s, B_s, C_s, y_s = (), (), (), (), (), ()
        for j in tl.static_range(STEPS):
            token = tl.cast(first + tl.minimum(t + j, length - 1), tl.int64)
            u_s = u_s + (tl.load(u + token * u_stride + i, mask=i < I, other=0.0).to(tl.float32),)
            step = tl.load(dt + token * dt_stride + i, mask=i < I, other=0.0).to(tl.float32)
            dt_s = dt_s + (tl.where(t + j < length, softplus(step) if GATED else step, 0.0),)
            B_s = B_s + (tl.load(B + token * N + n, mask=n < N, other=0.0).to(tl.float32),)
            C_s = C_s + (tl.load(C + token * N + n, mask=n < N, other=0.0).to(tl.float32),)
            if GATED:
                z_s = z_s + (tl.load(z + token * z_stride + i, mask=i < I, other=0.0).to(tl.float32),)
        for j in tl.static_range(STEPS):
            x = dt_s[j] * u_s[j]
            h = tl.exp2(dt_s[j][None, :] * exponent) * h + x[None, :] * B_s[j][:, None]
            out = tl.sum(h * C_s[j][:, None], axis=0)
            if GATED:
                out = (out + skip * u_s[j]) * (z_s[j] * tl.sigmoid(z_s[j]))
            y_s = y_s + (out,)
        for j in tl.static_range(STEPS):
            token = tl.cast(first + t + j, tl.int64)
            tl.store(y + token * I + i, y_s[j].to(y.dtype.element_ty), mask=i < tl.where(t + j < length, I, 0))
    tl.store(finals + tl.cast(segment, tl.int64) * N * I + states, h, mask=only_if(ok, segment >= 0))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def run_chunks_back(
    dt: tl.tensor,
    A: tl.tensor,
    C: tl.tensor,
    z: tl.tensor,
    dout: tl.tensor,
    dends: tl.tensor,
    totals: tl.tensor,
    chunks: tl.tensor,
    selected: tl.tensor,
    dt_stride: tl.tensor,
    z_stride: tl.tensor,
    dout_stride: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    BI: tl.constexpr,
    GATED: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Gradient (N, I) of every selected chunk's start from its own outputs alone, and its sum of dt (I,)."""
    blocks = tl.cdiv(I, BI)
    chunk = tl.load(selected + tl.program_id(0) // blocks)
    first, length = tl.load(chunks + chunk * 5), tl.load(chunks + chunk * 5 + 1)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    n = tl.arange(0, NP)
    states, ok = n[:, None] * I + i[None, :], (n < N)[:, None] & (i < I)[None, :]
    exponent = tl.load(A + states, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    g = tl.zeros([NP, BI], tl.float32)
    total = tl.zeros([BI], tl.float32)
    for back in range(0, length, STEPS):
        dt_s, dy_s, C_s = (), (), ()
        for j in tl.static_range(STEPS):
            token = tl.cast(first + tl.maximum(length - 1 - back - j, 0), tl.int64)
            step = tl.load(dt + token * dt_stride + i, mask=i < I, other=0.0).to(tl.float32)
            dt_s = dt_s + (tl.where(back + j < length, softplus(step) if GATED else step, 0.0),)
            dy = tl.load(dout + token * dout_stride + i, mask=i < tl.where(back + j < length, I, 0), other=0.0)
            dy = dy.to(tl.float32)
            if GATED:
                gate = tl.load(z + token * z_stride + i, mask=i < I, other=0.0).to(tl.float32)
                dy = dy * gate * tl.sigmoid(gate)
            dy_s = dy_s + (dy,)
            C_s = C_s + (tl.load(C + token * N + n, mask=n < N, other=0.0).to(tl.float32),)
        for j in tl.static_range(STEPS):
            g = tl.exp2(dt_s[j][None, :] * exponent) * (g + dy_s[j][None, :] * C_s[j][:, None])
            total += dt_s[j]
    tl.store(dends + tl.cast(chunk, tl.int64) * N * I + states, g, mask=ok)
    tl.store(totals + tl.cast(chunk, tl.int64) * I + i, total, mask=i < I)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def hand_up(
    A: tl.tensor,
    dfinals: tl.tensor,
    dends: tl.tensor,
    dstarts: tl.tensor,
    totals: tl.tensor,
    chunks: tl.tensor,
    segments: tl.tensor,
    first_child: tl.tensor,
    children: tl.tensor,
    level: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DFINALS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Turns the gradients of chunks' starts into those of their ends, and gives that of each segment's start.

    Walks each segment of a level backwards. Its last state has gradient from all children and from outside.
    """
    size = I * N
    blocks = tl.cdiv(size, BLOCK)
    segment = tl.load(level + tl.program_id(0) // blocks)
    first, count = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 1)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = s < size
    exponent = tl.load(A + s, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    g = tl.zeros([BLOCK], tl.float32)
    if HAS_DFINALS:
        g += tl.load(dfinals + tl.cast(segment, tl.int64) * size + s, mask=ok, other=0.0)
    begin, stop = tl.load(first_child + segment), tl.load(first_child + segment + 1)
    for k in range(begin, stop, STEPS):
        for j in tl.static_range(STEPS):
            child = tl.cast(tl.load(children + tl.minimum(k + j, stop - 1)), tl.int64)
            g += tl.load(dstarts + child * size + s, mask=s < tl.where(k + j < stop, size, 0), other=0.0)
    first_known = tl.where(tl.load(chunks + first * 5 + 2) == -1, 1, 0)
    for back in range(0, count, STEPS):
        own_s, total_s = (), ()
        for j in tl.static_range(STEPS):
            place = count - 1 - back - j
            chunk = tl.cast(first + tl.maximum(place, 0), tl.int64)
            known = s < tl.where(place >= first_known, size, 0)  # a start of zeros has no gradient to hand on
            own_s = own_s + (tl.load(dends + chunk * size + s, mask=known, other=0.0),)
            total_s = total_s + (tl.load(totals + chunk * I + s % I, mask=known, other=0.0),)
        for j in tl.static_range(STEPS):
            place = count - 1 - back - j
            tl.store(dends + tl.cast(first + place, tl.int64) * size + s, g, mask=s < tl.where(place >= 0, size, 0))
            g = tl.where(place >= 0, tl.exp2(total_s[j] * exponent) * g + own_s[j], g)
    tl.store(dstarts + tl.cast(segment, tl.int64) * size + s, g, mask=ok)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gradients(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    dout: tl.tensor,
    checkpoints: tl.tensor,
    dends: tl.tensor,
    du: tl.tensor,
    ddt: tl.tensor,
    dz: tl.tensor,
    dA: tl.tensor,
    dB: tl.tensor,
    dC: tl.tensor,
    dD: tl.tensor,
    chunks: tl.tensor,
    T: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    z_stride: tl.tensor,
    dout_stride: tl.tensor,
    I: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    CI: tl.constexpr,
    LANES: tl.constexpr,
    GATED: tl.constexpr,
    SPACING: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """All gradients of a chunk: du, ddt, dz (T, I); partial sums dA (C, N, I), dD (C, I), dB and dC (blocks, T, N).

    Goes backwards, STEPS tokens at a time. Their states are run again from the last checkpoint and held in registers.
    """
    blocks = tl.cdiv(I, CI * LANES)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = chunks + chunk * 5
    first, length, checkpoint = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    n = tl.arange(0, NP)
    i = block * (CI * LANES) + tl.arange(0, CI)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = i < I
    states, ok = n[None, :, None] * I + i[:, None, :], (n < N)[None, :, None] & inside[:, None, :]
    exponent = tl.load(A + states, mask=ok, other=0.0).to(tl.float32) * LOG2_E
    g = tl.load(dends + tl.cast(chunk, tl.int64) * N * I + states, mask=ok, other=0.0)
    dA_sum = tl.zeros([CI, NP, LANES], tl.float32)
    if GATED:
        skip = tl.load(D + i, mask=inside, other=0.0).to(tl.float32)
        dD_sum = tl.zeros([CI, LANES], tl.float32)
    groups = tl.cdiv(length, STEPS)
    for group in range(groups):
        begin = (groups - 1 - group) * STEPS
        kept = begin // SPACING
        h = tl.load(checkpoints + tl.cast(checkpoint + kept, tl.int64) * N * I + states, mask=ok, other=0.0)
        for t in range(kept * SPACING, begin):
            token = tl.cast(first + t, tl.int64)
            step = tl.load(dt + token * dt_stride + i, mask=inside, other=0.0).to(tl.float32)
            step = softplus(step) if GATED else step
            x = step * tl.load(u + token * u_stride + i, mask=inside, other=0.0).to(tl.float32)
            B_t = tl.load(B + token * N + n, mask=n < N, other=0.0).to(tl.float32)
            h = tl.exp2(step[:, None, :] * exponent) * h + x[:, None, :] * B_t[None, :, None]
        h_s = (h,)
        for j in tl.static_range(STEPS - 1):
            token = tl.cast(first + tl.minimum(begin + j, length - 1), tl.int64)
            step = tl.load(dt + token * dt_stride + i, mask=inside, other=0.0).to(tl.float32)
            step = tl.where(begin + j < length, softplus(step) if GATED else step, 0.0)
            x = step * tl.load(u + token * u_stride + i, mask=inside, other=0.0).to(tl.float32)
            B_t = tl.load(B + token * N + n, mask=n < N, other=0.0).to(tl.float32)
            h = tl.exp2(step[:, None, :] * exponent) * h + x[:, None, :] * B_t[None, :, None]
            h_s = h_s + (h,)
        for j in tl.static_range(STEPS - 1, -1, -1):
            alive = begin + j < length
            known = i < tl.where(alive, I, 0)
            token = tl.cast(first + tl.minimum(begin + j, length - 1), tl.int64)
            raw = tl.load(dt + token * dt_stride + i, mask=inside, other=0.0).to(tl.float32)
            step = tl.where(alive, softplus(raw) if GATED else raw, 0.0)
            u_t = tl.load(u + token * u_stride + i, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dout + token * dout_stride + i, mask=known, other=0.0).to(tl.float32)
            B_t = tl.load(B + token * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :, None]
            C_t = tl.load(C + token * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :, None]
            x = step * u_t
            decay = tl.exp2(step[:, None, :] * exponent)
            from_before = decay * h_s[j]
            h = from_before + x[:, None, :] * B_t
            if GATED:
                z_t = tl.load(z + token * z_stride + i, mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(z_t)
                ungated = tl.sum(h * C_t, axis=1) + skip * u_t
                dz_t = dy * ungated * sigmoid * (1.0 + z_t * (1.0 - sigmoid))
                tl.store(dz + token * I + i, dz_t.to(dz.dtype.element_ty), mask=known)
                dy = dy * z_t * sigmoid
                dD_sum += dy * u_t
            dC_t = tl.sum(tl.sum(h * dy[:, None, :], axis=0), axis=1)
            g += dy[:, None, :] * C_t
            dB_t = tl.sum(tl.sum(g * x[:, None, :], axis=0), axis=1)
            dx = tl.sum(g * B_t, axis=1)
            dexponent = g * from_before  # of dt A
            dA_sum += dexponent * step[:, None, :]
            ddt_t = tl.sum(dexponent * exponent, axis=1) * LN_2 + u_t * dx
            g = g * decay
            du_t = step * dx
            if GATED:
                du_t += skip * dy
                ddt_t *= tl.sigmoid(raw)
            tl.store(du + token * I + i, du_t.to(du.dtype.element_ty), mask=known)
            tl.store(ddt + token * I + i, ddt_t.to(ddt.dtype.element_ty), mask=known)
            place = (tl.cast(block, tl.int64) * T + token) * N + n
            tl.store(dB + place, dB_t, mask=n < tl.where(alive, N, 0))
            tl.store(dC + place, dC_t, mask=n < tl.where(alive, N, 0))
    tl.store(dA + tl.cast(chunk, tl.int64) * N * I + states, dA_sum, mask=ok)
    if GATED:
        tl.store(dD + tl.cast(chunk, tl.int64) * I + i, dD_sum, mask=inside)
