// Mamba-1's selective scan over a tree of segments, forward and backward, float32 on the CPU.
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = C_t h_t
//     gated: dt is softplus of what is given, and y becomes (y + D u) silu(z)
//
// Channels are independent but for the sums over channels in dB and dC. A vector holds one value of LANES channels, so
// the state of a block of LANES channels is N vectors. Blocks are taken in groups of GROUP channels; a group walks the
// whole row by itself, and groups run in parallel. Sums over channels are formed per group and then added in the order of
// the groups, so no result depends on the number of threads.
//
// The forward pass saves the state at the start of every chunk of K tokens. The backward pass takes the chunks from last
// to first: states and decays of one chunk again, then the walk in reverse. What flows out of a segment's start is added
// to the gradient of its parent's final state; parents come before their children, so it is complete when needed.
//
// T tokens, I channels, N state size, S segments, R given states, K tokens per chunk.
// Source: Mamba (arXiv 2312.00752), section 3.2 and algorithm 2.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int BLOCKS = GROUP / LANES;

// Mirrored field by field by `native_scan.Arguments`. Null where a pass does not use a field.
struct Arguments {
    int64_t tokens, channels, state, segments, chunk_tokens, chunks, threads, gated;
    const int64_t *lengths, *parents, *initial;  // (S,) each; -1: no parent, no given state
    Rows u, dt, z, dy;                           // (T, I); dy is the gradient of y
    const float *A, *B, *C, *D;                  // (I, N), (T, N), (T, N), (I,)
    const float *given;                          // (R, I, N)
    float *y, *final;                            // (T, I), (S, I, N)
    float *starts;                               // (chunks, channels rounded up to 16, N); in the forward pass null if not wanted
    float *du, *ddt, *dz;                        // (T, I)
    float *dA, *dB, *dC, *dD;                    // as A, B, C, D
    float *dfinal;                               // (S, I, N) gradient of `final`; overwritten
    float *dgiven;                               // (R, I, N), zeros when called
    float *sums;                                 // (groups, T, 2 N) scratch: dB | dC of each group
};

// Moves a block's state between the caller's (I, N) and N vectors.
void to_vectors(const float *matrix, int64_t N, int lanes, vec *vectors) {
    for (int64_t n = 0; n < N; ++n) {
        vec value = {};
        for (int lane = 0; lane < lanes; ++lane) value[lane] = matrix[lane * N + n];
        vectors[n] = value;
    }
}

void from_vectors(const vec *vectors, int64_t N, int lanes, float *matrix) {
    for (int64_t n = 0; n < N; ++n)
        for (int lane = 0; lane < lanes; ++lane) matrix[lane * N + n] = vectors[n][lane];
}

void add_from_vectors(const vec *vectors, int64_t N, int lanes, float *matrix) {
    for (int64_t n = 0; n < N; ++n)
        for (int lane = 0; lane < lanes; ++lane) matrix[lane * N + n] += vectors[n][lane];
}

// A group of channels and what both passes do with it. STATE is N where it is known when compiling, else 0.
template <int STATE> struct Group {
    const Arguments &a;
    int64_t N, first, row;  // state size, first channel, floats of one chunk in `starts`
    int blocks;
    Vectors A, state;  // A / log(2), as powers of two take it

    Group(const Arguments &arguments, int64_t index)
        : a(arguments), N(STATE ? STATE : a.state), first(index * GROUP), row((a.channels + 15) / 16 * 16 * N),
          blocks(int((std::min<int64_t>(GROUP, a.channels - first) + LANES - 1) / LANES)), A(BLOCKS * N),
          state(BLOCKS * N) {
        for (int block = 0; block < blocks; ++block) to_vectors(a.A + channel(block) * N, N, lanes(block), A.at(block * N));
        for (int64_t n = 0; n < blocks * N; ++n) *A.at(n) *= LOG2_E;
    }

    int64_t channel(int block) const { return first + block * LANES; }
    int lanes(int block) const { return int(std::min<int64_t>(LANES, a.channels - channel(block))); }
    float *start(int64_t chunk, int block) const { return a.starts + chunk * row + channel(block) * N; }
    float *of_segment(float *states, int64_t segment, int block) const {
        return states + (segment * a.channels + channel(block)) * N;
    }
};

template <int STATE, bool GATED> void forward_chunk(Group<STATE> &group, int block, int64_t token, int64_t end) {
    const Arguments &a = group.a;
    const int64_t N = STATE ? STATE : group.N, channel = group.channel(block);
    const int lanes = group.lanes(block);
    const vec *A = group.A.at(block * N);
    vec *h = group.state.at(block * N);
    const vec D = GATED ? load(a.D + channel, lanes) : vec{};
    for (; token < end; ++token) {
        const vec u = load(a.u.data + token * a.u.stride + channel, lanes);
        vec dt = load(a.dt.data + token * a.dt.stride + channel, lanes);
        if (GATED) dt = softplus(dt).value;
        const vec x = dt * u;
        const float *B = a.B + token * N, *C = a.C + token * N;
        vec y = {};
        for (int64_t n = 0; n < N; ++n) {
            h[n] = exp2_(dt * A[n]) * h[n] + x * B[n];
            y += h[n] * C[n];
        }
        if (GATED) {
            const vec z = load(a.z.data + token * a.z.stride + channel, lanes);
            y = (y + D * u) * (z * sigmoid(z));
        }
        store(a.y + token * a.channels + channel, y, lanes);
    }
}

template <int STATE, bool GATED> void forward(const Arguments &a, int64_t index) {
    Group<STATE> group(a, index);
    const int64_t N = group.N;
    int64_t token = 0, chunk = 0;
    for (int64_t segment = 0; segment < a.segments; ++segment) {
        for (int block = 0; block < group.blocks; ++block) {
            vec *h = group.state.at(block * N);
            const int lanes = group.lanes(block);
            if (a.parents[segment] >= 0)
                to_vectors(group.of_segment(a.final, a.parents[segment], block), N, lanes, h);
            else if (a.initial[segment] >= 0)
                to_vectors(a.given + (a.initial[segment] * a.channels + group.channel(block)) * N, N, lanes, h);
            else
                std::fill(h, h + N, vec{});
        }
        const int64_t end = token + a.lengths[segment];
        for (; token < end; token = std::min(token + a.chunk_tokens, end), ++chunk)
            for (int block = 0; block < group.blocks; ++block) {
                if (a.starts) std::memcpy(group.start(chunk, block), group.state.at(block * N), N * sizeof(vec));
                forward_chunk<STATE, GATED>(group, block, token, std::min(token + a.chunk_tokens, end));
            }
        for (int block = 0; block < group.blocks; ++block)
            from_vectors(group.state.at(block * N), N, group.lanes(block), group.of_segment(a.final, segment, block));
    }
}

// What the backward pass keeps for one chunk of one block (h, decay, ...), and for all blocks of a group (the rest).
struct Chunk {
    Vectors h, decay;        // (K + 1, N) and (K, N)
    Vectors u, dt, slope, g; // (K,) input, step size and its derivative, gradient of C h
    Vectors dB, dC;          // (K, N) lanes still to be summed
    Vectors dA, dD;          // (blocks, N) and (blocks,)

    Chunk(int64_t K, int64_t N)
        : h((K + 1) * N), decay(K * N), u(K), dt(K), slope(K), g(K), dB(K * N), dC(K * N), dA(BLOCKS * N), dD(BLOCKS) {}
};

// States and decays of a chunk, from its saved start; the gradients of z and D and that of C h.
template <int STATE, bool GATED>
void recompute(Group<STATE> &group, Chunk &c, int block, int64_t chunk, int64_t token, int64_t end) {
    const Arguments &a = group.a;
    const int64_t N = STATE ? STATE : group.N, channel = group.channel(block), base = token;
    const int lanes = group.lanes(block);
    const vec *A = group.A.at(block * N);
    const vec D = GATED ? load(a.D + channel, lanes) : vec{};
    std::memcpy(c.h.at(0), group.start(chunk, block), N * sizeof(vec));
    for (; token < end; ++token) {
        const int64_t step = token - base;
        const vec u = load(a.u.data + token * a.u.stride + channel, lanes);
        vec dt = load(a.dt.data + token * a.dt.stride + channel, lanes);
        if (GATED) {
            const Softplus plus = softplus(dt);
            dt = plus.value;
            *c.slope.at(step) = plus.slope;
        }
        const vec x = dt * u;
        const float *B = a.B + token * N, *C = a.C + token * N;
        const vec *before = c.h.at(step * N);
        vec *h = c.h.at((step + 1) * N), *decay = c.decay.at(step * N), y = {};
        for (int64_t n = 0; n < N; ++n) {
            decay[n] = exp2_(dt * A[n]);
            h[n] = decay[n] * before[n] + x * B[n];
            if (GATED) y += h[n] * C[n];
        }
        vec g = load(a.dy.data + token * a.dy.stride + channel, lanes);
        if (GATED) {
            const vec z = load(a.z.data + token * a.z.stride + channel, lanes), s = sigmoid(z);
            store(a.dz + token * a.channels + channel, g * (y + D * u) * (s * (z * (1.0f - s) + 1.0f)), lanes);
            g *= z * s;
            *c.dD.at(block) += g * u;
        }
        *c.u.at(step) = u, *c.dt.at(step) = dt, *c.g.at(step) = g;
    }
}

// The walk through a chunk from its last token to its first.
template <int STATE, bool GATED>
void reverse(Group<STATE> &group, Chunk &c, int block, int64_t first_token, int64_t steps) {
    const Arguments &a = group.a;
    const int64_t N = STATE ? STATE : group.N, channel = group.channel(block);
    const int lanes = group.lanes(block);
    const vec *A = group.A.at(block * N);
    const vec D = GATED ? load(a.D + channel, lanes) : vec{};
    vec *carry = group.state.at(block * N), *dA = c.dA.at(block * N);
    for (int64_t step = steps - 1; step >= 0; --step) {
        const int64_t token = first_token + step;
        const vec u = *c.u.at(step), dt = *c.dt.at(step), g = *c.g.at(step), x = dt * u;
        const float *B = a.B + token * N, *C = a.C + token * N;
        const vec *before = c.h.at(step * N), *h = before + N, *decay = c.decay.at(step * N);
        vec *dB = c.dB.at(step * N), *dC = c.dC.at(step * N), dx = {}, ddt = {};
        for (int64_t n = 0; n < N; ++n) {
            const vec dh = carry[n] + g * C[n];
            dC[n] += g * h[n];
            dB[n] += dh * x;
            dx += dh * B[n];
            carry[n] = dh * decay[n];
            const vec dexponent = carry[n] * before[n];
            dA[n] += dexponent * dt;
            ddt += dexponent * A[n];
        }
        ddt = ddt * LOG_2 + dx * u;
        store(a.ddt + token * a.channels + channel, GATED ? ddt * *c.slope.at(step) : ddt, lanes);
        store(a.du + token * a.channels + channel, dx * dt + D * g, lanes);
    }
}

template <int STATE, bool GATED> void backward(const Arguments &a, int64_t index) {
    Group<STATE> group(a, index);
    const int64_t N = group.N, K = a.chunk_tokens;
    Chunk c(K, N);
    int64_t end = a.tokens, chunk = a.chunks;
    for (int64_t segment = a.segments - 1; segment >= 0; --segment) {
        for (int block = 0; block < group.blocks; ++block)
            to_vectors(group.of_segment(a.dfinal, segment, block), N, group.lanes(block), group.state.at(block * N));
        const int64_t start = end - a.lengths[segment];
        while (end > start) {
            const int64_t token = start + (end - 1 - start) / K * K;
            --chunk;
            std::fill(c.dB.at(0), c.dB.at((end - token) * N), vec{});
            std::fill(c.dC.at(0), c.dC.at((end - token) * N), vec{});
            for (int block = 0; block < group.blocks; ++block) {
                recompute<STATE, GATED>(group, c, block, chunk, token, end);
                reverse<STATE, GATED>(group, c, block, token, end - token);
            }
            float *sums = a.sums + (index * a.tokens + token) * 2 * N;
            for (int64_t step = 0; step < end - token; ++step, sums += 2 * N)
                for (int64_t n = 0; n < N; ++n) {
                    sums[n] = sum_lanes(*c.dB.at(step * N + n));
                    sums[N + n] = sum_lanes(*c.dC.at(step * N + n));
                }
            end = token;
        }
        for (int block = 0; block < group.blocks; ++block) {
            const vec *carry = group.state.at(block * N);
            if (a.parents[segment] >= 0)
                add_from_vectors(carry, N, group.lanes(block), group.of_segment(a.dfinal, a.parents[segment], block));
            else if (a.initial[segment] >= 0 && a.dgiven)
                add_from_vectors(carry, N, group.lanes(block), group.of_segment(a.dgiven, a.initial[segment], block));
        }
    }
    for (int block = 0; block < group.blocks; ++block) {
        from_vectors(c.dA.at(block * N), N, group.lanes(block), a.dA + group.channel(block) * N);
        if (GATED) store(a.dD + group.channel(block), *c.dD.at(block), group.lanes(block));
    }
}

template <int STATE, bool GATED> void run_forward(const Arguments &a) {
    in_parallel((a.channels + GROUP - 1) / GROUP, a.threads, [&](int64_t index) { forward<STATE, GATED>(a, index); });
}

template <int STATE, bool GATED> void run_backward(const Arguments &a) {
    const int64_t groups = (a.channels + GROUP - 1) / GROUP;
    in_parallel(groups, a.threads, [&](int64_t index) { backward<STATE, GATED>(a, index); });
    const int64_t N = a.state;
    for (int64_t token = 0; token < a.tokens; ++token)
        for (int64_t n = 0; n < N; ++n) {
            float dB = 0.0f, dC = 0.0f;
            for (int64_t group = 0; group < groups; ++group) {
                const float *sums = a.sums + (group * a.tokens + token) * 2 * N;
                dB += sums[n], dC += sums[N + n];
            }
            a.dB[token * N + n] = dB, a.dC[token * N + n] = dC;
        }
}

}  // namespace

extern "C" {

int64_t scan_group() { return GROUP; }

int scan_forward(const Arguments *a) {
    return completed([a] {
        if (a->state == 16)
            a->gated ? run_forward<16, true>(*a) : run_forward<16, false>(*a);
        else
            a->gated ? run_forward<0, true>(*a) : run_forward<0, false>(*a);
    });
}

int scan_backward(const Arguments *a) {
    return completed([a] {
        if (a->state == 16)
            a->gated ? run_backward<16, true>(*a) : run_backward<16, false>(*a);
        else
            a->gated ? run_backward<0, true>(*a) : run_backward<0, false>(*a);
    });
}
}
