// Products of panels of float32 and bfloat16 weights with float32 activations.
#pragma once

#include "panels.h"

namespace mambakit {
namespace decode {

// Sequences whose sums fit into the registers, beside a column of weights.
#if defined(MAMBAKIT_AVX512)
constexpr int MOST_FLOATS = 8;
#elif defined(MAMBAKIT_AVX2) || defined(__aarch64__)
constexpr int MOST_FLOATS = 2;
#else
constexpr int MOST_FLOATS = 1;
#endif

template <int SIZE>
MAMBAKIT_INLINE void keep(const vfloat (&sum)[SIZE][VECTORS], Results results) {
    for (int m = 0; m < SIZE; ++m)
        for (int v = 0; v < VECTORS; ++v) store(results[m] + v * LANES, sum[m][v]);
}

template <int SIZE>
MAMBAKIT_INLINE void float32_block(const float* weights, const Input& x, int64_t first, Results results) {
    vfloat sum[SIZE][VECTORS] = {};
    const float* values = x.values + first * x.stride;
    for (int64_t k = 0; k < x.columns; ++k, weights += PANEL) {
        vfloat column[VECTORS];
        for (int v = 0; v < VECTORS; ++v) column[v] = load(weights + v * LANES);
        for (int m = 0; m < SIZE; ++m)
            for (int v = 0; v < VECTORS; ++v)
                sum[m][v] = sum[m][v] + column[v] * values[m * x.stride + k];
    }
    keep<SIZE>(sum, results + first);
}

// The upper half of a word is a float32 once the lower half is cleared; the lower half has to be moved up.
template <int SIZE>
MAMBAKIT_INLINE void bfloat16_block(const float* weights, const Input& x, int64_t first, Results results) {
    vfloat sum[SIZE][VECTORS] = {};
    const float* values = x.values + first * x.stride;
    for (int64_t k = 0; k < x.columns; k += 2, weights += PANEL) {
        vfloat even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            const vuint words = bit_cast<vuint>(load(weights + v * LANES));
            even[v] = bit_cast<vfloat>(words << 16);
            odd[v] = bit_cast<vfloat>(words & 0xffff0000u);
        }
        for (int m = 0; m < SIZE; ++m)
            for (int v = 0; v < VECTORS; ++v) {
                sum[m][v] = sum[m][v] + even[v] * values[m * x.stride + k];
                sum[m][v] = sum[m][v] + odd[v] * values[m * x.stride + k + 1];
            }
    }
    keep<SIZE>(sum, results + first);
}

inline void multiply_float32(const char* panel, const Input& x, int64_t batch, Results results) {
    in_blocks<MOST_FLOATS>(batch, [&](int64_t first, auto size) {
        float32_block<size.value>(reinterpret_cast<const float*>(panel), x, first, results);
    });
}

inline void multiply_bfloat16(const char* panel, const Input& x, int64_t batch, Results results) {
    in_blocks<MOST_FLOATS>(batch, [&](int64_t first, auto size) {
        bfloat16_block<size.value>(reinterpret_cast<const float*>(panel), x, first, results);
    });
}

}  // namespace decode
}  // namespace mambakit
