// Grouped-query attention over a tree of segments, forward and backward, float32 on the CPU.
//
// The first segment holds the meta tokens. A token sees all of them, its ancestors' tokens and the earlier tokens of its
// own segment; with a window, keys that are not meta tokens must also lie within it.
//
// The query heads that share a key head are rows of one matrix: row = token * R + head. A tile is WIDTH rows of one
// segment; a vector holds one value of LANES rows, so the softmax works on lanes and never across them. Scores of a tile
// over all its keys are kept, not those of a whole segment: memory grows with the row, not with its square. The backward
// pass forms them again from the saved maximum and sum of every row.
//
// One group of key heads is one task of the backward pass: gradients of keys and values are added in one order always.
//
// L tokens, H query heads, G key/value heads, R = H / G, d query/key head size, e value head size, S segments.
// Source: FlashAttention-2 (arXiv 2307.08691), section 3, without its running softmax.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int WIDTH = 2 * LANES;
constexpr int KEYS = 4;  // keys (or columns) that the inner loops take at once, as registers allow
constexpr int64_t TILES_PER_TASK = 8;  // in the forward pass

// Mirrored field by field by `native_attention.Arguments`. Null where a pass does not use a field.
struct Arguments {
    int64_t tokens, heads, groups, key_size, value_size, segments, known, window, threads;  // known: segments without queries; window -1: none
    const int64_t *lengths, *parents;                                               // (S,) each
    Rows q, k, v, dout;                   // (L, H d), (L, G d), (L, G e), (L, H e)
    float *out, *stats;                   // (L, H e); (L, H, 2) maximum of a row's scores and 1 / sum of its exponentials
    float *dq, *dk, *dv;                  // (L, H d), (L, G d), (L, G e)
};

struct Tile {
    int64_t segment, first;  // row of the segment
};

struct Tree {
    std::vector<int64_t> offsets, positions;  // of each segment's first token: in the row, and on its path
    std::vector<Tile> tiles;

    explicit Tree(const Arguments &a) {
        const int64_t repeat = a.heads / a.groups;
        int64_t offset = 0;
        for (int64_t s = 0; s < a.segments; ++s) {
            offsets.push_back(offset);
            positions.push_back(a.parents[s] < 0 ? 0 : positions[a.parents[s]] + a.lengths[a.parents[s]]);
            for (int64_t first = 0; s >= a.known && first < a.lengths[s] * repeat; first += WIDTH) tiles.push_back({s, first});
            offset += a.lengths[s];
        }
    }
};

// One tile of one group with the keys that any of its rows sees.
class Work {
  public:
    Work(const Arguments &arguments, const Tree &tree, int64_t group)
        : a(arguments), tree_(tree), group_(group), repeat(a.heads / a.groups),
          scale(1.0f / std::sqrt(float(a.key_size))), key_vecs(padded(a.key_size)), value_vecs(padded(a.value_size)),
          q(a.key_size * 2), dout(a.value_size * 2), combined(std::max(a.key_size, a.value_size) * 2),
          q_rows(WIDTH * key_vecs), dout_rows(WIDTH * value_vecs) {}

    // Vectors of a row of `size` values, rounded up to an even number.
    static int64_t padded(int64_t size) { return (size + WIDTH - 1) / WIDTH * 2; }

    void forward(const Tile &tile) {
        open(tile);
        score();
        vec best[2] = {splat(-INFINITY), splat(-INFINITY)}, sum[2] = {vec{}, vec{}};
        for (int64_t key = 0; key < keys; ++key)
            for (int half = 0; half < 2; ++half) {
                const vec s = *scores.at(2 * key + half);
                best[half] = s > best[half] ? s : best[half];
            }
        exponentiate(best);
        for (int64_t key = 0; key < keys; ++key)
            for (int half = 0; half < 2; ++half) sum[half] += *scores.at(2 * key + half);
        const vec inverse[2] = {1.0f / sum[0], 1.0f / sum[1]};
        combine(scores, a.v, a.value_size, inverse);
        for (int row = 0; row < rows; ++row) {
            float *to = a.out + head(row) * a.value_size;
            for (int64_t c = 0; c < a.value_size; ++c) to[c] = value(combined, c, row);
            float *stats = a.stats + head(row) * 2;
            stats[0] = best[row / LANES][row % LANES], stats[1] = inverse[row / LANES][row % LANES];
        }
    }

    void backward(const Tile &tile, Vectors &dk, Vectors &dv) {
        open(tile);
        vec best[2] = {}, inverse[2] = {}, delta[2] = {};
        std::fill(dout_rows.at(0), dout_rows.at(WIDTH * value_vecs), vec{});
        std::fill(dout.at(0), dout.at(a.value_size * 2), vec{});
        for (int row = 0; row < rows; ++row) {
            const float *from = a.dout.data + token(row) * a.dout.stride + (group_ * repeat + of_group(row)) * a.value_size;
            const float *out = a.out + head(row) * a.value_size, *stats = a.stats + head(row) * 2;
            std::memcpy(dout_rows.at(row * value_vecs), from, a.value_size * sizeof(float));
            float sums[4] = {};
            for (int64_t c = 0; c < a.value_size; ++c) value(dout, c, row) = from[c], sums[c % 4] += from[c] * out[c];
            delta[row / LANES][row % LANES] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            best[row / LANES][row % LANES] = stats[0], inverse[row / LANES][row % LANES] = stats[1];
        }
        score();
        exponentiate(best);
        for (int64_t key = 0; key < keys; ++key)
            for (int half = 0; half < 2; ++half) *scores.at(2 * key + half) *= inverse[half];
        gather(scores, dout_rows, value_vecs, dv);
        multiply(dout, a.value_size, a.v, gradients);
        for (int64_t key = 0; key < keys; ++key)
            for (int half = 0; half < 2; ++half) {
                vec &g = *gradients.at(2 * key + half);
                g = (g - delta[half]) * *scores.at(2 * key + half);
            }
        gather(gradients, q_rows, key_vecs, dk);
        const vec scales[2] = {splat(scale), splat(scale)};
        combine(gradients, a.k, a.key_size, scales);
        for (int row = 0; row < rows; ++row) {
            float *to = a.dq + head(row) * a.key_size;
            for (int64_t c = 0; c < a.key_size; ++c) to[c] = value(combined, c, row);
        }
    }

  private:
    const Arguments &a;
    const Tree &tree_;
    const int64_t group_, repeat;
    const float scale;
    const int64_t key_vecs, value_vecs;
    Vectors q, dout, combined;    // (size, 2) by column: lanes are rows of the tile
    Vectors q_rows, dout_rows;    // (WIDTH, vecs) by row
    Vectors scores{0}, gradients{0};  // (keys, 2)
    std::vector<int64_t> sources, positions;  // of each key: its token, and its place on the path (-1 for meta tokens)
    int64_t keys = 0, visible = 0, segment = 0, first = 0;
    int rows = 0;

    int64_t of_group(int row) const { return (first + row) % repeat; }
    int64_t token(int row) const { return tree_.offsets[segment] + (first + row) / repeat; }
    int64_t head(int row) const { return token(row) * a.heads + group_ * repeat + of_group(row); }
    int64_t position(int row) const { return tree_.positions[segment] + (first + row) / repeat; }
    float &value(Vectors &columns, int64_t c, int row) {
        return reinterpret_cast<float *>(columns.at(c * 2))[row];
    }

    // Loads the queries and lists the keys.
    void open(const Tile &tile) {
        segment = tile.segment, first = tile.first;
        rows = int(std::min<int64_t>(WIDTH, a.lengths[segment] * repeat - first));
        list_keys();
        std::fill(q.at(0), q.at(a.key_size * 2), vec{});
        std::fill(q_rows.at(0), q_rows.at(WIDTH * key_vecs), vec{});
        for (int row = 0; row < rows; ++row) {
            const float *from = a.q.data + token(row) * a.q.stride + (group_ * repeat + of_group(row)) * a.key_size;
            float *to = reinterpret_cast<float *>(q_rows.at(row * key_vecs));
            for (int64_t c = 0; c < a.key_size; ++c) {
                to[c] = from[c] * scale;
                value(q, c, row) = from[c] * (scale * LOG2_E);
            }
        }
    }

    void list_keys() {
        std::vector<int64_t> path;
        for (int64_t s = segment; s >= 0; s = a.parents[s]) path.push_back(s);
        sources.clear(), positions.clear();
        const int64_t last = position(rows - 1), nearest = a.window < 0 ? 0 : position(0) - a.window;
        for (auto s = path.rbegin(); s != path.rend(); ++s) {
            const int64_t start = tree_.positions[*s], end = std::min(start + a.lengths[*s], last + 1);
            for (int64_t place = *s ? std::max(start, nearest) : start; place < end; ++place) {
                sources.push_back(tree_.offsets[*s] + place - start);
                positions.push_back(*s || !segment ? place : -1);
            }
        }
        visible = int64_t(sources.size());
        keys = (visible + KEYS - 1) / KEYS * KEYS;
        while (int64_t(sources.size()) < keys) sources.push_back(a.tokens);  // a row that nobody reads
        if (scores.size() < keys * 2) scores.resize(keys * 2), gradients.resize(keys * 2);
    }

    // Scores in units of log(2); minus infinity where a row does not see a key.
    void score() {
        multiply(q, a.key_size, a.k, scores);
        const vec hidden = splat(-INFINITY);
        vec place[2] = {};
        for (int row = 0; row < rows; ++row) place[row / LANES][row % LANES] = float(position(row));
        const int64_t earliest = position(0), latest = position(rows - 1);
        for (int64_t key = 0; key < visible; ++key) {
            const int64_t at = positions[key];
            const bool far = a.window >= 0 && at >= 0 && segment && latest - at > a.window;
            if (at <= earliest && !far) continue;
            for (int half = 0; half < 2; ++half) {
                vec &s = *scores.at(2 * key + half);
                s = place[half] < float(at) ? hidden : s;
                if (far) s = place[half] > float(at + a.window) ? hidden : s;
            }
        }
        for (int64_t key = visible; key < keys; ++key) *scores.at(2 * key) = *scores.at(2 * key + 1) = hidden;
    }

    void exponentiate(const vec *best) {
        for (int64_t key = 0; key < keys; ++key)
            for (int half = 0; half < 2; ++half) {
                vec &s = *scores.at(2 * key + half);
                s = s == -INFINITY ? vec{} : exp2_(s - best[half]);
            }
    }

    const float *source(const Rows &x, int64_t size, int64_t key) const {
        const int64_t token = sources[key] < a.tokens ? sources[key] : 0;
        return x.data + token * x.stride + group_ * size;
    }

    // to[key] = sum over c of columns[c] x[key][c]
    void multiply(Vectors &columns, int64_t size, const Rows &x, Vectors &to) {
        for (int64_t key = 0; key < keys; key += KEYS) {
            const float *from[KEYS];
            for (int i = 0; i < KEYS; ++i) from[i] = source(x, size, key + i);
            vec sum[KEYS][2] = {};
            for (int64_t c = 0; c < size; ++c) {
                const vec low = held(*columns.at(2 * c)), high = held(*columns.at(2 * c + 1));
                for (int i = 0; i < KEYS; ++i) sum[i][0] += low * from[i][c], sum[i][1] += high * from[i][c];
            }
            for (int i = 0; i < KEYS; ++i) *to.at(2 * (key + i)) = sum[i][0], *to.at(2 * (key + i) + 1) = sum[i][1];
        }
    }

    // combined[c] = factor * sum over keys of weights[key] x[key][c]
    void combine(Vectors &weights, const Rows &x, int64_t size, const vec *factor) {
        int64_t c = 0;
        for (; c + KEYS <= size; c += KEYS) combine_columns<KEYS>(weights, x, size, c, factor);
        for (; c < size; ++c) combine_columns<1>(weights, x, size, c, factor);
    }

    template <int COLUMNS> void combine_columns(Vectors &weights, const Rows &x, int64_t size, int64_t c, const vec *factor) {
        vec sum[COLUMNS][2] = {};
        for (int64_t key = 0; key < visible; ++key) {
            const float *from = x.data + sources[key] * x.stride + group_ * size + c;
            const vec low = held(*weights.at(2 * key)), high = held(*weights.at(2 * key + 1));
            for (int i = 0; i < COLUMNS; ++i) sum[i][0] += low * from[i], sum[i][1] += high * from[i];
        }
        for (int i = 0; i < COLUMNS; ++i)
            *combined.at(2 * (c + i)) = sum[i][0] * factor[0], *combined.at(2 * (c + i) + 1) = sum[i][1] * factor[1];
    }

    // to[token of key] += sum over the tile's rows of weights[key][row] x[row]
    void gather(Vectors &weights, Vectors &x, int64_t vecs, Vectors &to) {
        for (int64_t key = 0; key < keys; key += KEYS)
            for (int64_t c = 0; c < vecs; c += 2) {
                const float *weight = reinterpret_cast<const float *>(weights.at(2 * key));
                vec sum[KEYS][2] = {};
                for (int row = 0; row < WIDTH; ++row) {
                    const vec low = held(*x.at(row * vecs + c)), high = held(*x.at(row * vecs + c + 1));
                    for (int i = 0; i < KEYS; ++i)
                        sum[i][0] += low * weight[i * WIDTH + row], sum[i][1] += high * weight[i * WIDTH + row];
                }
                for (int i = 0; i < KEYS; ++i) {
                    vec *row = to.at(sources[key + i] * vecs + c);
                    row[0] += sum[i][0], row[1] += sum[i][1];
                }
            }
    }
};

// The rows of one group, without the padding of their vectors.
void copy_rows(Vectors &from, int64_t vecs, float *to, int64_t size, int64_t group, const Arguments &a) {
    for (int64_t token = 0; token < a.tokens; ++token)
        std::memcpy(to + (token * a.groups + group) * size, from.at(token * vecs), size * sizeof(float));
}

void forward(const Arguments &a) {
    const Tree tree(a);
    const int64_t tiles = int64_t(tree.tiles.size()), parts = (tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
    in_parallel(a.groups * parts, a.threads, [&](int64_t index) {
        Work work(a, tree, index / parts);
        const int64_t first = index % parts * TILES_PER_TASK;
        for (int64_t tile = first; tile < std::min(tiles, first + TILES_PER_TASK); ++tile) work.forward(tree.tiles[tile]);
    });
}

void backward(const Arguments &a) {
    const Tree tree(a);
    in_parallel(a.groups, a.threads, [&](int64_t group) {
        Work work(a, tree, group);
        const int64_t key_vecs = Work::padded(a.key_size), value_vecs = Work::padded(a.value_size);
        Vectors dk((a.tokens + 1) * key_vecs), dv((a.tokens + 1) * value_vecs);
        for (const Tile &tile : tree.tiles) work.backward(tile, dk, dv);
        copy_rows(dk, key_vecs, a.dk, a.key_size, group, a);
        copy_rows(dv, value_vecs, a.dv, a.value_size, group, a);
    });
}

}  // namespace

extern "C" {

int attention_forward(const Arguments *a) {
    return completed([a] { forward(*a); });
}

int attention_backward(const Arguments *a) {
    return completed([a] { backward(*a); });
}
}
