// One vector of float32 numbers, as wide as the instruction level that this file is compiled for.
//
// Written with the vector extensions of GCC and Clang, so that the same source gives AVX-512 (16 lanes), AVX2
// with FMA (8), and SSE2 or NEON (4); intrinsics appear only where the compilers do not find the instruction by
// themselves. Arithmetic is float32 throughout; bfloat16 exists in memory only.
//
// Accuracy. `exp2` and `exp` are 1 exactly at 0 and their error near 0 shrinks with the argument: a recurrence
// h = exp(dt A) h + u that remembers 1 / (dt |A|) tokens multiplies a bias of the exponential by that number.
// NaN goes through every function; arguments beyond the range give 0 or infinity.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace mambakit {

#define MAMBAKIT_INLINE inline __attribute__((always_inline))
#define MAMBAKIT_INLINE_BODY __attribute__((always_inline))  // of a lambda, after its parameters

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MAMBAKIT_AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define MAMBAKIT_AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

// A bfloat16 number in memory: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

// Calls body(0), ..., body(N - 1) with constants, so that arrays of vectors which it indexes become registers. (A
// loop that the compiler unrolls does so too late.)
template <class Body, int... I>
MAMBAKIT_INLINE void unrolled(const Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

template <int N, class Body>
MAMBAKIT_INLINE void unrolled(const Body& body) {
    unrolled(body, std::make_integer_sequence<int, N>{});
}

template <class To, class From>
MAMBAKIT_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

MAMBAKIT_INLINE vfloat broadcast(float value) {
    return value - vfloat{};  // not `+`: minus zero stays minus zero
}

// ---------------------------------------------------------------------------------------------------------
// Memory. `count` lanes (1 to LANES) are read or written; the rest read as zero and nothing beyond is touched.

#if defined(MAMBAKIT_AVX512)
MAMBAKIT_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
#elif defined(MAMBAKIT_AVX2)
MAMBAKIT_INLINE __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

MAMBAKIT_INLINE vfloat load(const float* from) {
    vfloat v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MAMBAKIT_INLINE void store(float* to, vfloat v) { std::memcpy(to, &v, sizeof v); }

MAMBAKIT_INLINE vfloat load(const float* from, int count) {
    if (count == LANES) return load(from);
#if defined(MAMBAKIT_AVX512)
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
#elif defined(MAMBAKIT_AVX2)
    return _mm256_maskload_ps(from, first_lanes(count));
#else
    vfloat v{};
    std::memcpy(&v, from, sizeof(float) * count);
    return v;
#endif
}

MAMBAKIT_INLINE void store(float* to, vfloat v, int count) {
    if (count == LANES) return store(to, v);
#if defined(MAMBAKIT_AVX512)
    _mm512_mask_storeu_ps(to, first_lanes(count), v);
#elif defined(MAMBAKIT_AVX2)
    _mm256_maskstore_ps(to, first_lanes(count), v);
#else
    std::memcpy(to, &v, sizeof(float) * count);
#endif
}

MAMBAKIT_INLINE vfloat widen(vhalf half) {
    return bit_cast<vfloat>(__builtin_convertvector(half, vuint) << 16);
}

// Round to the nearest bfloat16, ties to even; NaN stays NaN (its upper half could be infinity's).
MAMBAKIT_INLINE vhalf narrow(vfloat v) {
    const vuint bits = bit_cast<vuint>(v);
    const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vuint kept = v == v ? rounded : (bits >> 16) | 0x40;
    return __builtin_convertvector(kept, vhalf);
}

MAMBAKIT_INLINE vfloat load(const bf16* from) {
    vhalf half;
    std::memcpy(&half, from, sizeof half);
    return widen(half);
}

MAMBAKIT_INLINE void store(bf16* to, vfloat v) {
    const vhalf half = narrow(v);
    std::memcpy(to, &half, sizeof half);
}

MAMBAKIT_INLINE vfloat load(const bf16* from, int count) {
    if (count == LANES) return load(from);
#if defined(MAMBAKIT_AVX512)
    return widen(bit_cast<vhalf>(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
#else
    vhalf half{};
    std::memcpy(&half, from, sizeof(bf16) * count);
    return widen(half);
#endif
}

MAMBAKIT_INLINE void store(bf16* to, vfloat v, int count) {
    if (count == LANES) return store(to, v);
    const vhalf half = narrow(v);
#if defined(MAMBAKIT_AVX512)
    _mm256_mask_storeu_epi16(to, first_lanes(count), bit_cast<__m256i>(half));
#else
    std::memcpy(to, &half, sizeof(bf16) * count);
#endif
}

MAMBAKIT_INLINE float widen(float value) { return value; }
MAMBAKIT_INLINE float widen(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// ---------------------------------------------------------------------------------------------------------
// Arithmetic

// Zero in the lanes from `count` on, whatever stood there.
MAMBAKIT_INLINE vfloat keep_first(vfloat v, int count) {
    if (count == LANES) return v;
#if defined(MAMBAKIT_AVX512)
    return _mm512_maskz_mov_ps(first_lanes(count), v);
#else
    float lane[LANES];
    store(lane, v);
    for (int i = count; i < LANES; ++i) lane[i] = 0;
    return load(lane);
#endif
}

// The larger or smaller of the two; a NaN in the first argument goes through.
MAMBAKIT_INLINE vfloat at_least(vfloat v, float least) {
#if defined(MAMBAKIT_AVX512)
    return _mm512_max_ps(_mm512_set1_ps(least), v);
#elif defined(MAMBAKIT_AVX2)
    return _mm256_max_ps(_mm256_set1_ps(least), v);
#else
    return v < least ? broadcast(least) : v;
#endif
}

MAMBAKIT_INLINE vfloat at_most(vfloat v, float most) {
#if defined(MAMBAKIT_AVX512)
    return _mm512_min_ps(_mm512_set1_ps(most), v);
#elif defined(MAMBAKIT_AVX2)
    return _mm256_min_ps(_mm256_set1_ps(most), v);
#else
    return v > most ? broadcast(most) : v;
#endif
}

MAMBAKIT_INLINE vfloat absolute(vfloat v) { return bit_cast<vfloat>(bit_cast<vint>(v) & 0x7fffffff); }

// The sum of all lanes, always in the same order.
MAMBAKIT_INLINE float sum(vfloat v) {
#if defined(MAMBAKIT_AVX512)
    const __m512 half = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    const __m512 quarter = _mm512_add_ps(half, _mm512_shuffle_f32x4(half, half, 0xb1));
    __m128 four = _mm512_castps512_ps128(quarter);
#elif defined(MAMBAKIT_AVX2)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#endif
#if defined(MAMBAKIT_AVX512) || defined(MAMBAKIT_AVX2)
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// 1 / v for finite v, to about 1 unit in the last place.
MAMBAKIT_INLINE vfloat reciprocal(vfloat v) {
#if defined(MAMBAKIT_AVX512)
    const vfloat guess = _mm512_rcp14_ps(v);
    return guess + guess * (1.0f - v * guess);
#else
    return 1.0f / v;
#endif
}

// 2^v to 1 unit in the last place, 1 exactly at 0, for -127 <= v <= 128 (there 0 and infinity). The integer part goes
// to the exponent's bits, the rest r (|r| <= 1/2) through 1 + r q(r), q minimax for the relative error of the whole
// (2e-9) under the constraint.
MAMBAKIT_INLINE vfloat exp2_in_range(vfloat v) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const vfloat shifted = v + magic;
    const vfloat r = v - (shifted - magic);
    vfloat q = 0.00015353361959569156f * r + 0.0013398873852565885f;
    q = q * r + 0.00961843691766262f;
    q = q * r + 0.055503323674201965f;
    q = q * r + 0.24022647738456726f;
    q = q * r + 0.6931471824645996f;
    q = q * r + 1.0f;
    return bit_cast<vfloat>(bit_cast<vint>(q) + (bit_cast<vint>(shifted) << 23));
}

// 2^v for any v.
MAMBAKIT_INLINE vfloat exp2(vfloat v) { return exp2_in_range(at_most(at_least(v, -127.0f), 128.0f)); }

constexpr float LOG2_E = 1.4426950408889634f;

// e^v to about 1 unit in the last place, 1 exactly at 0, for -88 <= v <= 88.7; ln 2 in two parts keeps the digits
// of large arguments.
MAMBAKIT_INLINE vfloat exp_in_range(vfloat v) {
    const float magic = 12582912.0f;
    const vfloat shifted = v * LOG2_E + magic;
    const vfloat i = shifted - magic;
    const vfloat r = (v - i * 0.693145751953125f) - i * 1.428606765330187e-06f;
    vfloat q = 0.001381459878757596f * r + 0.008368716575205326f;
    q = q * r + 0.04166838899254799f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
    q = q * r + 1.0f;
    q = q * r + 1.0f;
    return bit_cast<vfloat>(bit_cast<vint>(q) + (bit_cast<vint>(shifted) << 23));
}

// e^v for any v; 0 below the normal numbers.
MAMBAKIT_INLINE vfloat exp(vfloat v) {
    const vfloat y = exp_in_range(at_most(at_least(v, -87.33f), 88.72f));
    const vfloat low = v < -87.33f ? vfloat{} : y;
    return v > 88.72f ? vfloat{} + INFINITY : low;
}

// 1 / (1 + e^-v). Beyond 87 the sum would be infinite, beyond -87 it is 1 already.
MAMBAKIT_INLINE vfloat sigmoid(vfloat v) {
    return reciprocal(1.0f + exp_in_range(at_most(at_least(-v, -87.0f), 87.0f)));
}

MAMBAKIT_INLINE vfloat silu(vfloat v) { return v * sigmoid(v); }

// The derivative of silu at v, given sigmoid(v).
MAMBAKIT_INLINE vfloat silu_slope(vfloat v, vfloat sigmoid_v) {
    return sigmoid_v * (1.0f + v * (1.0f - sigmoid_v));
}

// log(1 + v) for 0 <= v <= 1, to about 1 unit in the last place also for small v: 2 atanh(v / (2 + v)).
MAMBAKIT_INLINE vfloat log1p_unit(vfloat v) {
    const vfloat s = v * reciprocal(2.0f + v);
    const vfloat s2 = s * s;
    vfloat p = 0.2802445888519287f * s2 + 0.27999141812324524f;
    p = p * s2 + 0.4002169966697693f;
    p = p * s2 + 0.6666641235351562f;
    return s * (p * s2) + 2.0f * s;
}

// log(1 + e^v), without overflow.
MAMBAKIT_INLINE vfloat softplus(vfloat v) {
    return at_least(v, 0.0f) + log1p_unit(exp_in_range(at_least(-absolute(v), -87.0f)));
}

// ---------------------------------------------------------------------------------------------------------
// Transposition

// Exchange, between two rows, what a transposition of blocks of D lanes exchanges.
template <int D>
MAMBAKIT_INLINE void exchange(vfloat& a, vfloat& b) {
    vint upper, lower;
    for (int i = 0; i < LANES; ++i) {
        upper[i] = i & D ? LANES + (i ^ D) : i;
        lower[i] = i & D ? LANES + i : i ^ D;
    }
#if defined(__clang__)
    const vfloat old_a = a, old_b = b;
    for (int i = 0; i < LANES; ++i) {
        a[i] = upper[i] < LANES ? old_a[upper[i]] : old_b[upper[i] - LANES];
        b[i] = lower[i] < LANES ? old_a[lower[i]] : old_b[lower[i] - LANES];
    }
#else
    const vfloat old = a;
    a = __builtin_shuffle(old, b, upper);
    b = __builtin_shuffle(old, b, lower);
#endif
}

// LANES rows become LANES columns.
MAMBAKIT_INLINE void transpose(vfloat (&row)[LANES]) {
    for (int i = 0; i < LANES; i += 2) exchange<1>(row[i], row[i + 1]);
    for (int i = 0; i < LANES; ++i)
        if (!(i & 2)) exchange<2>(row[i], row[i + 2]);
    if constexpr (LANES > 4)
        for (int i = 0; i < LANES; ++i)
            if (!(i & 4)) exchange<4>(row[i], row[i + 4]);
    if constexpr (LANES > 8)
        for (int i = 0; i < 8; ++i) exchange<8>(row[i], row[i + 8]);
}

// Lane i is lane `index[i]` of a and b side by side; the index is a constant.
MAMBAKIT_INLINE vfloat shuffle(vfloat a, vfloat b, vint index) {
#if defined(__clang__)
    vfloat to;
    for (int i = 0; i < LANES; ++i) to[i] = index[i] < LANES ? a[index[i]] : b[index[i] - LANES];
    return to;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// Sums of neighbours: in each quarter (four lanes) two of a's and two of b's.
MAMBAKIT_INLINE vfloat neighbour_sums(vfloat a, vfloat b) {
    vint even;
    for (int i = 0; i < LANES; ++i) even[i] = (i & ~3) + (i & 2 ? LANES : 0) + 2 * (i & 1);
    return shuffle(a, b, even) + shuffle(a, b, even + 1);
}

// Sums of neighbouring quarters: those of a, then those of b.
MAMBAKIT_INLINE vfloat quarter_sums(vfloat a, vfloat b) {
    vint even;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * (i & ~3) + (i & 3);
    return shuffle(a, b, even) + shuffle(a, b, even + 4);
}

// to[i] += the sum of row i's lanes, for N = 1, 4 or 8 rows. No shuffle needs an index in a register.
template <int N>
MAMBAKIT_INLINE void add_sums(const vfloat (&row)[N], float* to) {
    if constexpr (N == 1) {
        *to += sum(row[0]);
    } else {
        vfloat four[N / 4];  // every quarter: its share of four sums
        for (int i = 0; i < N / 4; ++i)
            four[i] = neighbour_sums(neighbour_sums(row[4 * i], row[4 * i + 1]),
                                     neighbour_sums(row[4 * i + 2], row[4 * i + 3]));
        if constexpr (LANES == 4) {
            for (int i = 0; i < N / 4; ++i) store(to + 4 * i, load(to + 4 * i) + four[i]);
        } else {
            vfloat all = quarter_sums(four[0], four[N / 4 - 1]);
            if constexpr (LANES == 16) all = quarter_sums(all, all);
#if defined(MAMBAKIT_AVX512)
            if constexpr (N == 8) {  // a whole smaller vector: a masked store would hold up the loads after it
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm512_castps512_ps256(all)));
                return;
            }
#endif
            store(to, load(to, N) + all, N);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// float64, for what is multiplied along a whole sequence

constexpr int DOUBLES = LANES / 2;
typedef double vdouble __attribute__((vector_size(4 * LANES)));
typedef int64_t vlong __attribute__((vector_size(4 * LANES)));

MAMBAKIT_INLINE vdouble load(const double* from) {
    vdouble v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MAMBAKIT_INLINE void store(double* to, vdouble v) { std::memcpy(to, &v, sizeof v); }

// e^v with a relative error of 3e-13, 1 exactly at 0; below e^-708 it is 0.
MAMBAKIT_INLINE vdouble exp(vdouble v) {
    const vdouble kept = v < -708.0 ? vdouble{} - 708.0 : v > 709.0 ? vdouble{} + 709.0 : v;
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const vdouble shifted = kept * 1.4426950408889634 + magic;
    const vdouble i = shifted - magic;
    const vdouble r = (kept - i * 0.693147180369123816490) - i * 1.90821492927058770002e-10;
    vdouble q = r * (1.0 / 3628800) + 1.0 / 362880;  // Taylor's series: |r| <= ln 2 / 2
    q = q * r + 1.0 / 40320;
    q = q * r + 1.0 / 5040;
    q = q * r + 1.0 / 720;
    q = q * r + 1.0 / 120;
    q = q * r + 1.0 / 24;
    q = q * r + 1.0 / 6;
    q = q * r + 0.5;
    q = q * r + 1.0;
    q = q * r + 1.0;
    const vdouble y = bit_cast<vdouble>(bit_cast<vlong>(q) + (bit_cast<vlong>(shifted) << 52));
    const vdouble low = v < -708.0 ? vdouble{} : y;
    return v > 709.0 ? vdouble{} + INFINITY : low;
}

}  // namespace mambakit
