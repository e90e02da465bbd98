// Products of panels of integers with integer activations; exact but for the scales' products.
//
// Included twice, with MAMBAKIT_DOT as the namespace: once as it is, once where the compiler may use VNNI
// instructions. Everything here is inlined or internal, so that the two never meet.

#include "panels.h"

namespace mambakit {
namespace decode {
namespace MAMBAKIT_DOT {
namespace {

#if defined(MAMBAKIT_AVX512)
constexpr int MOST_INTEGERS = 4;
#else
constexpr int MOST_INTEGERS = 1;
#endif

MAMBAKIT_INLINE vint words(const char* from) {
    vint v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MAMBAKIT_INLINE int32_t word(const int8_t* from) {
    int32_t w;
    std::memcpy(&w, from, sizeof w);
    return w;
}

#if (defined(MAMBAKIT_AVX512) || defined(MAMBAKIT_AVX2)) && !defined(MAMBAKIT_VNNI)
// sum[i] + the product of the four unsigned bytes of w[i], none above 128, with the four signed bytes of x: two
// products fit into 16 bits.
MAMBAKIT_INLINE vint dot_small(vint sum, vint w, int32_t x) {
#if defined(MAMBAKIT_AVX512)
    const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(w), _mm512_set1_epi32(x));
    return sum + bit_cast<vint>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(w), _mm256_set1_epi32(x));
    return sum + bit_cast<vint>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
#endif

// sum[i] + the product of the four unsigned bytes of w[i] with the four signed bytes of x. SMALL promises that no
// unsigned byte is above 128.
template <bool SMALL>
MAMBAKIT_INLINE vint dot(vint sum, vint w, int32_t x) {
#if defined(MAMBAKIT_AVX512) && defined(MAMBAKIT_VNNI)
    return bit_cast<vint>(
        _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), _mm512_set1_epi32(x)));
#elif defined(MAMBAKIT_AVX512) || defined(MAMBAKIT_AVX2)
    if (SMALL) return dot_small(sum, w, x);
    return dot_small(dot_small(sum, w & 0x7f7f7f7f, x), w & static_cast<int32_t>(0x80808080u), x);
#else
    for (int j = 0; j < 4; ++j) {
        const int32_t byte = static_cast<int8_t>(static_cast<uint32_t>(x) >> (8 * j));
        sum = sum + (bit_cast<vint>(bit_cast<vuint>(w) >> (8 * j)) & 0xff) * byte;
    }
    return sum;
#endif
}

MAMBAKIT_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }

template <int SIZE>
MAMBAKIT_INLINE void int8_block(const char* panel, const Input& x, int64_t first, Results results) {
    const float* row_scales = reinterpret_cast<const float*>(panel);
    const char* weights = panel + 4 * PANEL;
    vfloat total[SIZE][VECTORS] = {};
    for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t at = first * x.groups + g;
        vint sum[SIZE][VECTORS];
        for (int m = 0; m < SIZE; ++m)
            for (int v = 0; v < VECTORS; ++v) sum[m][v] = x.offsets[at + m * x.groups] - vint{};
        for (int k = 0; k < GROUP; k += 4, weights += 4 * PANEL)
            for (int v = 0; v < VECTORS; ++v) {
                const vint w = words(weights + 4 * v * LANES);
                for (int m = 0; m < SIZE; ++m)
                    sum[m][v] = dot<false>(sum[m][v], w, word(x.bytes + (at + m * x.groups) * GROUP + k));
            }
        for (int m = 0; m < SIZE; ++m)
            for (int v = 0; v < VECTORS; ++v)
                total[m][v] = total[m][v] + to_float(sum[m][v]) * x.scales[at + m * x.groups];
    }
    for (int m = 0; m < SIZE; ++m)
        for (int v = 0; v < VECTORS; ++v)
            store(results[first + m] + v * LANES, total[m][v] * load(row_scales + v * LANES));
}

template <int SIZE>
MAMBAKIT_INLINE void int4_block(const char* weights, const Input& x, int64_t first, Results results) {
    vfloat total[SIZE][VECTORS] = {};
    for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t at = first * x.groups + g;
        const bf16* row_scales = reinterpret_cast<const bf16*>(weights);
        weights += 2 * PANEL;
        vint sum[SIZE][VECTORS];
        for (int m = 0; m < SIZE; ++m)
            for (int v = 0; v < VECTORS; ++v) sum[m][v] = x.offsets[at + m * x.groups] - vint{};
        for (int k = 0; k < GROUP / 2; k += 4, weights += 4 * PANEL)
            for (int v = 0; v < VECTORS; ++v) {
                const vint both = words(weights + 4 * v * LANES);
                const vint lower = both & 0x0f0f0f0f, upper = (both >> 4) & 0x0f0f0f0f;
                for (int m = 0; m < SIZE; ++m) {
                    const int8_t* bytes = x.bytes + (at + m * x.groups) * GROUP + k;
                    sum[m][v] = dot<true>(sum[m][v], lower, word(bytes));
                    sum[m][v] = dot<true>(sum[m][v], upper, word(bytes + GROUP / 2));
                }
            }
        for (int v = 0; v < VECTORS; ++v) {
            const vfloat scale = load(row_scales + v * LANES);
            for (int m = 0; m < SIZE; ++m)
                total[m][v] = total[m][v] + to_float(sum[m][v]) * (scale * x.scales[at + m * x.groups]);
        }
    }
    for (int m = 0; m < SIZE; ++m)
        for (int v = 0; v < VECTORS; ++v) store(results[first + m] + v * LANES, total[m][v]);
}

}  // namespace

void multiply_int8(const char* panel, const Input& x, int64_t batch, Results results) {
    in_blocks<MOST_INTEGERS>(batch, [&](int64_t first, auto size) {
        int8_block<size.value>(panel, x, first, results);
    });
}

void multiply_int4(const char* panel, const Input& x, int64_t batch, Results results) {
    in_blocks<MOST_INTEGERS>(batch, [&](int64_t first, auto size) {
        int4_block<size.value>(panel, x, first, results);
    });
}

}  // namespace MAMBAKIT_DOT
}  // namespace decode
}  // namespace mambakit
