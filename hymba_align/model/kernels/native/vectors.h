// What the kernels share: vectors of floats, functions on them, and threads. C++17 with GCC's vector extension, which
// clang has too. Everything is compiled into each kernel's own library.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Channels that one task takes. A constant, so that no sum over channels depends on the number of threads.
constexpr int GROUP = 128;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

struct Rows {  // one row of I values per token, `stride` values apart
    const float *data;
    int64_t stride;
};

inline vec splat(float value) { return vec{} + value; }

inline vec load(const float *from, int lanes) {
    vec value = {};
    if (lanes == LANES)
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, lanes * sizeof(float));
    return value;
}

inline void store(float *to, vec value, int lanes) {
    if (lanes == LANES)
        std::memcpy(to, &value, sizeof value);
    else
        std::memcpy(to, &value, lanes * sizeof(float));
}

// Keeps a value in a register where the compiler would load it anew for every product that it is part of.
inline vec held(vec value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#endif
    return value;
}

inline float sum_lanes(vec value) {
    float sums[LANES];
    std::memcpy(sums, &value, sizeof value);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    return sums[0];
}

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f, LOG_2 = 0.693147181f;
// 1.5 * 2^23 + 127. A sum with it has the rounded integer plus 127 in its low bits: the exponent of a power of two.
constexpr float ROUND = 12583039.0f;

// 2^(n + f), where `rounded` is ROUND + n and |f| <= 1/2: a polynomial in f within 2e-9 of 2^f, relatively.
inline vec power_of_two(vec rounded, vec f) {
    vec p = splat(1.535336182e-4f);
    p = p * f + 1.339887445e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.0f;
    return p * (vec)((ivec)rounded << 23);
}

// 2^x for x <= 0, relative error at most 1e-7; stays at 1.2e-38 below -126, nan stays nan.
inline vec exp2_(vec x) {
    x = x < -126.0f ? splat(-126.0f) : x;
    const vec rounded = x + ROUND;
    return power_of_two(rounded, x - (rounded - ROUND));
}

// exp(x) for x <= 0, as exp2_.
inline vec exp_(vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    const vec rounded = x * LOG2_E + ROUND;
    return power_of_two(rounded, (x * LOG2_E - (rounded - ROUND)) + x * LOG2_E_REST);
}

inline vec sigmoid(vec x) {
    const vec e = exp_(x < 0.0f ? x : -x), above = 1.0f / (e + 1.0f);
    return x < 0.0f ? e * above : above;
}

struct Softplus {
    vec value, slope;
};

// log(1 + exp(x)) = max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) = 2 atanh(e / (2 + e)), whose series to the 13th power
// is within 2e-8. The slope is the sigmoid.
inline Softplus softplus(vec x) {
    const vec e = exp_(x < 0.0f ? x : -x);
    const vec s = e / (e + 2.0f), s2 = s * s, above = 1.0f / (e + 1.0f);
    vec p = splat(2.0f / 13.0f);
    p = p * s2 + 2.0f / 11.0f;
    p = p * s2 + 2.0f / 9.0f;
    p = p * s2 + 2.0f / 7.0f;
    p = p * s2 + 2.0f / 5.0f;
    p = p * s2 + 2.0f / 3.0f;
    p = p * s2 + 2.0f;
    return {(x < 0.0f ? vec{} : x) + p * s, x < 0.0f ? e * above : above};
}

// Zeroed vectors on a boundary of their own size.
class Vectors {
  public:
    explicit Vectors(int64_t count) { resize(count); }
    ~Vectors() { release(); }
    Vectors(const Vectors &) = delete;
    Vectors &operator=(const Vectors &) = delete;
    vec *at(int64_t index) { return data_ + index; }
    int64_t size() const { return count_; }

    // Zeroed anew.
    void resize(int64_t count) {
        release();
        data_ = nullptr, count_ = 0;
        data_ = new (std::align_val_t(sizeof(vec))) vec[count]();
        count_ = count;
    }

  private:
    vec *data_ = nullptr;
    int64_t count_ = 0;

    void release() { ::operator delete[](data_, std::align_val_t(sizeof(vec))); }
};

// Runs tasks 0 .. count - 1 on up to `threads` threads, this one included. Threads end with the call, so that nothing is
// left behind for a forked process to miss. Throws std::bad_alloc, once all threads have ended, if a task did.
template <typename Task> void in_parallel(int64_t count, int64_t threads, Task task) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> exhausted{false};
    const auto work = [&] {
        try {
            for (int64_t index; !exhausted && (index = next.fetch_add(1)) < count;) task(index);
        } catch (const std::bad_alloc &) {
            exhausted = true;  // thrown out of a thread, it would end the process
        }
    };
    std::vector<std::thread> others;
    try {
        others.reserve(std::max<int64_t>(0, std::min(threads, count) - 1));
        while (int64_t(others.size()) < std::min(threads, count) - 1) others.emplace_back(work);
    } catch (const std::exception &) {
        // The system grants no more threads: those that run do all tasks.
    }
    work();
    for (std::thread &other : others) other.join();
    if (exhausted) throw std::bad_alloc();
}

// 0, or 1 where memory ran out: nothing may be thrown out of a C function.
template <typename Function> int completed(Function function) {
    try {
        function();
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

}  // namespace
