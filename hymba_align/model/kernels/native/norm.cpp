// Root mean square norm of rows, forward and backward, float32 on the CPU: y = weight x / sqrt(mean(x^2) + eps).
//
// Rows are independent but for the gradient of the weight, which is summed per block of ROWS rows and then over the
// blocks in order, so no result depends on the number of threads. Source: arXiv 1910.07467, equation 4.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 64;

// Mirrored field by field by `native_norm.Arguments`. Null where a pass does not use a field.
struct Arguments {
    int64_t rows, size, threads;
    float eps;
    const float *weight;        // (size,)
    Rows x, dy;                 // (rows, size)
    float *y, *inverse;         // (rows, size), (rows,) 1 / sqrt(mean(x^2) + eps)
    float *dx, *sums, *dweight; // (rows, size), (blocks of rows, size) zeros when called, (size,)
};

template <typename Visit> inline void for_each_vector(int64_t size, Visit visit) {
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES) visit(c, LANES);
    if (c < size) visit(c, int(size - c));
}

void forward(const Arguments &a) {
    in_parallel((a.rows + ROWS - 1) / ROWS, a.threads, [&](int64_t block) {
        for (int64_t row = block * ROWS; row < std::min(a.rows, (block + 1) * ROWS); ++row) {
            const float *x = a.x.data + row * a.x.stride;
            float *y = a.y + row * a.size;
            vec squares = {};
            for_each_vector(a.size, [&](int64_t c, int lanes) {
                const vec value = load(x + c, lanes);
                squares += value * value;
            });
            const float inverse = 1.0f / std::sqrt(sum_lanes(squares) / float(a.size) + a.eps);
            a.inverse[row] = inverse;
            for_each_vector(a.size, [&](int64_t c, int lanes) {
                store(y + c, load(x + c, lanes) * inverse * load(a.weight + c, lanes), lanes);
            });
        }
    });
}

void backward(const Arguments &a) {
    const int64_t blocks = (a.rows + ROWS - 1) / ROWS;
    in_parallel(blocks, a.threads, [&](int64_t block) {
        float *sums = a.sums + block * a.size;
        for (int64_t row = block * ROWS; row < std::min(a.rows, (block + 1) * ROWS); ++row) {
            const float *x = a.x.data + row * a.x.stride, *dy = a.dy.data + row * a.dy.stride;
            float *dx = a.dx + row * a.size;
            const float inverse = a.inverse[row];
            vec products = {};
            for_each_vector(a.size, [&](int64_t c, int lanes) {
                const vec scaled = load(dy + c, lanes) * (load(x + c, lanes) * inverse);
                store(sums + c, load(sums + c, lanes) + scaled, lanes);
                products += scaled * load(a.weight + c, lanes);
            });
            const float mean = sum_lanes(products) / float(a.size);
            for_each_vector(a.size, [&](int64_t c, int lanes) {
                const vec scaled = load(x + c, lanes) * inverse;
                store(dx + c, (load(dy + c, lanes) * load(a.weight + c, lanes) - scaled * mean) * inverse, lanes);
            });
        }
    });
    for_each_vector(a.size, [&](int64_t c, int lanes) {
        vec sum = {};
        for (int64_t block = 0; block < blocks; ++block) sum += load(a.sums + block * a.size + c, lanes);
        store(a.dweight + c, sum, lanes);
    });
}
}  // namespace

extern "C" {

int64_t norm_rows() { return ROWS; }

int norm_forward(const Arguments *a) {
    return completed([a] { forward(*a); });
}

int norm_backward(const Arguments *a) {
    return completed([a] { backward(*a); });
}
}
