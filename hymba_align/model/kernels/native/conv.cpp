// Mamba's causal depthwise convolution over a tree of segments, forward and backward, float32 on the CPU.
//
//     y_t = bias + sum_k weight_{W-1-k} u_{t-k}        with SiLU after it if asked
//
// Every token has a list of the W rows that its taps read: rows of u, of a given tail, or a row of zeros. A segment's list
// starts with the last W - 1 rows of its path. The backward pass adds to the same rows of the gradients. Channels are
// independent; groups of them run in parallel.
//
// T tokens, I channels, S segments, R given tails, W taps. Source: Mamba (arXiv 2312.00752), section 3.4.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

// Mirrored field by field by `native_conv.Arguments`. Null where a pass does not use a field.
struct Arguments {
    int64_t tokens, channels, taps, segments, threads, silu;
    const int64_t *lengths, *parents, *initial;  // (S,) each; -1: no parent, no given tail
    Rows u, dy;                                  // (T, I)
    const float *weight, *bias;                  // (W, I), (I,)
    const float *given;                          // (R, W - 1, I)
    float *y, *tails;                            // (T, I), (S, W - 1, I)
    float *du, *dweight, *dbias, *dgiven;        // as u (rows of I), weight, bias, given; zeros when called
    const float *dtails;                         // (S, W - 1, I)
    const float *zeros;                          // (I,)
};

// Where a tap reads: token `index` of u, or row -1 - `index` of the given tails; NOWHERE is the row of zeros.
constexpr int64_t NOWHERE = INT64_MIN;

// For each segment the last W - 1 sources on its path: (S, W - 1).
std::vector<int64_t> tail_sources(const Arguments &a) {
    const int64_t reach = a.taps - 1;
    std::vector<int64_t> sources(a.segments * reach);
    int64_t start = 0;
    for (int64_t segment = 0; segment < a.segments; ++segment) {
        for (int64_t entry = 0; entry < reach; ++entry) {
            const int64_t index = a.lengths[segment] - reach + entry;  // in the segment; negative: before it
            int64_t &source = sources[segment * reach + entry];
            if (index >= 0)
                source = start + index;
            else if (a.parents[segment] >= 0)
                source = sources[a.parents[segment] * reach + reach + index];
            else if (a.initial[segment] >= 0)
                source = -1 - (a.initial[segment] * reach + reach + index);
            else
                source = NOWHERE;
        }
        start += a.lengths[segment];
    }
    return sources;
}

// Sources of the W - 1 rows before a segment.
void sources_before(const Arguments &a, const std::vector<int64_t> &tails, int64_t segment, int64_t *sources) {
    const int64_t reach = a.taps - 1;
    for (int64_t entry = 0; entry < reach; ++entry)
        sources[entry] = a.parents[segment] >= 0   ? tails[a.parents[segment] * reach + entry]
                         : a.initial[segment] >= 0 ? -1 - (a.initial[segment] * reach + entry)
                                                   : NOWHERE;
}

inline const float *input_row(const Arguments &a, int64_t source) {
    return source >= 0 ? a.u.data + source * a.u.stride : source == NOWHERE ? a.zeros : a.given + (-1 - source) * a.channels;
}

inline float *gradient_row(const Arguments &a, int64_t source) {
    if (source >= 0) return a.du + source * a.channels;
    return source == NOWHERE || !a.dgiven ? nullptr : a.dgiven + (-1 - source) * a.channels;
}

// Calls `visit(token, sources)` for every token of the row, in order; `sources` are those of its W taps, oldest first.
template <typename Visit> void for_each_token(const Arguments &a, const std::vector<int64_t> &tails, Visit visit) {
    std::vector<int64_t> list(a.taps);
    int64_t *sources = list.data(), token = 0;
    for (int64_t segment = 0; segment < a.segments; ++segment) {
        sources_before(a, tails, segment, sources);
        for (const int64_t end = token + a.lengths[segment]; token < end; ++token) {
            sources[a.taps - 1] = token;
            visit(token, sources);
            std::copy(sources + 1, sources + a.taps, sources);
        }
    }
}

// TAPS is W where it is known when compiling, else 0.
template <int TAPS> inline vec convolve(const Arguments &a, const int64_t *sources, int64_t channel, int lanes) {
    vec sum = load(a.bias + channel, lanes);
    for (int64_t tap = 0; tap < (TAPS ? TAPS : a.taps); ++tap)
        sum += load(input_row(a, sources[tap]) + channel, lanes) * load(a.weight + tap * a.channels + channel, lanes);
    return sum;
}

template <int TAPS> void forward(const Arguments &a, const std::vector<int64_t> &tails, int64_t first, int64_t end) {
    for_each_token(a, tails, [&](int64_t token, const int64_t *sources) {
        for (int64_t channel = first; channel < end; channel += LANES) {
            const int lanes = int(std::min<int64_t>(LANES, end - channel));
            vec y = convolve<TAPS>(a, sources, channel, lanes);
            if (a.silu) y *= sigmoid(y);
            store(a.y + token * a.channels + channel, y, lanes);
        }
    });
    for (int64_t row = 0; row < int64_t(tails.size()); ++row)
        std::copy(input_row(a, tails[row]) + first, input_row(a, tails[row]) + end, a.tails + row * a.channels + first);
}

inline void add(float *to, vec value, int lanes) { store(to, load(to, lanes) + value, lanes); }

template <int TAPS> void backward(const Arguments &a, const std::vector<int64_t> &tails, int64_t first, int64_t end) {
    for_each_token(a, tails, [&](int64_t token, const int64_t *sources) {
        for (int64_t channel = first; channel < end; channel += LANES) {
            const int lanes = int(std::min<int64_t>(LANES, end - channel));
            vec g = load(a.dy.data + token * a.dy.stride + channel, lanes);
            if (a.silu) {
                const vec y = convolve<TAPS>(a, sources, channel, lanes), s = sigmoid(y);
                g *= s * (y * (1.0f - s) + 1.0f);
            }
            add(a.dbias + channel, g, lanes);
            for (int64_t tap = 0; tap < (TAPS ? TAPS : a.taps); ++tap) {
                add(a.dweight + tap * a.channels + channel, g * load(input_row(a, sources[tap]) + channel, lanes), lanes);
                if (float *row = gradient_row(a, sources[tap]))
                    add(row + channel, g * load(a.weight + tap * a.channels + channel, lanes), lanes);
            }
        }
    });
    for (int64_t row = 0; row < int64_t(tails.size()); ++row)
        if (float *to = gradient_row(a, tails[row]))
            for (int64_t channel = first; channel < end; ++channel) to[channel] += a.dtails[row * a.channels + channel];
}

template <int TAPS> void run(const Arguments &a, bool reverse) {
    const std::vector<int64_t> tails = tail_sources(a);
    in_parallel((a.channels + GROUP - 1) / GROUP, a.threads, [&](int64_t index) {
        const int64_t first = index * GROUP, end = std::min<int64_t>(first + GROUP, a.channels);
        reverse ? backward<TAPS>(a, tails, first, end) : forward<TAPS>(a, tails, first, end);
    });
}

}  // namespace

extern "C" {

int conv_forward(const Arguments *a) {
    return completed([a] { a->taps == 4 ? run<4>(*a, false) : run<0>(*a, false); });
}

int conv_backward(const Arguments *a) {
    return completed([a] { a->taps == 4 ? run<4>(*a, true) : run<0>(*a, true); });
}
}
