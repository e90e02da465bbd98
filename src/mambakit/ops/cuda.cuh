// What the CUDA kernels of this library share: activations in three types, fast exponentials, copies from
// global to shared memory, and sums across the lanes of a warp.
//
// Compiled at run time by NVRTC (see cuda.py), which needs no headers of CUDA's own. The tests compile the same
// text for a CPU, with the few primitives below written in C++ (tests/ops/emulation); everything else must
// build on them.
#pragma once

typedef long long int64;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL(name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
extern __shared__ __align__(16) unsigned char shared_memory[];

struct alignas(16) Words4 { unsigned x, y, z, w; };

DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float swap_lanes(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE bool block_all(bool yes) { return __syncthreads_and(yes); }
DEVICE void add_to_global(float* to, float x) { atomicAdd(to, x); }
DEVICE unsigned float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(unsigned x) { return __uint_as_float(x); }
DEVICE float half_to_float(unsigned short h) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(h)); return y; }
DEVICE unsigned short float_to_half(float x) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
// Two numbers in a word, the first in its lower half.
DEVICE unsigned pack_bf16(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
DEVICE unsigned short float_to_bf16(float x) { return (unsigned short)pack_bf16(x, 0.0f); }  // faster than alone
// 16 bytes from global to shared memory without passing through registers; both addresses 16-byte aligned.
DEVICE void copy16_async(void* shared, const void* global) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}
// The same where `exists`, otherwise 16 zeros.
DEVICE void copy16_async_or_zero(void* shared, const void* global, bool exists) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(exists ? 16 : 0));
}
// 16 bytes of shared memory, read where this stands: not before copies that stand above have been waited for, and
// before copies below.
DEVICE Words4 load16_shared(const void* shared) {
    unsigned from = (unsigned)__cvta_generic_to_shared(shared);
    Words4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}
// 16 bytes at once: a compiler may store a struct word by word.
DEVICE void store16(void* to, const Words4& x) {
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// What is read above is asked for before anything below.
DEVICE void keep_order() { asm volatile("" ::: "memory"); }
// 16 bytes that another block of this kernel may have written: not from the nearest cache.
DEVICE Words4 load16_fresh(const void* from) {
    Words4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// What this thread has written is seen by whoever sees what it writes next.
DEVICE void publish() { __threadfence(); }
DEVICE unsigned add_to_counter(unsigned* to, unsigned x) { return atomicAdd(to, x); }
// c (16 x 8) += a (16 x 16) b (16 x 8) by the lanes of a warp, two numbers of 16 bits to a word. Lane 4 g + t holds rows
// g and g + 8 of a: words {(g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)} and the columns after; column g of b:
// rows {2t, 2t + 8} and the ones after; of c {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
#define MULTIPLY(name, type)                                                                                  \
    DEVICE void name(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                    \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
    }
MULTIPLY(multiply_bf16, "bf16")
MULTIPLY(multiply_f16, "f16")
#undef MULTIPLY
// 16 bytes that are read once: asked for where this stands, and not kept in the nearest cache.
DEVICE Words4 load16_once(const void* from) {
    Words4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}
// A kernel launched with `overlap` starts while the one before it still runs: it may read nothing that others
// write before it has waited. Elsewhere these do nothing.
DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#endif

// Answers known to the compiler.
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// ---------------------------------------------------------------------------------------------------------
// Activations are kept as they are stored and computed with as float.

struct bf16 { unsigned short bits; };
struct half { unsigned short bits; };
template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

DEVICE float load(float x) { return x; }
DEVICE float load(bf16 x) { return bits_float((unsigned)x.bits << 16); }
DEVICE float load(half x) { return half_to_float(x.bits); }
DEVICE void store(float* to, float x) { *to = x; }
DEVICE void store(bf16* to, float x) { to->bits = float_to_bf16(x); }
DEVICE void store(half* to, float x) { to->bits = float_to_half(x); }

// Elements side by side, as 32-bit words.
template <typename T, int N>
DEVICE void unpack(float (&to)[N], const unsigned (&words)[N * sizeof(T) / 4]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        if constexpr (sizeof(T) == 4) {
            to[i] = bits_float(words[i]);
        } else {
            T element;
            element.bits = (unsigned short)(words[i / 2] >> (16 * (i % 2)));
            to[i] = load(element);
        }
    }
}

template <typename T, int N>
DEVICE void pack(unsigned (&words)[N * sizeof(T) / 4], const float (&from)[N]) {
#pragma unroll
    for (int i = 0; i < N * (int)sizeof(T) / 4; i++) {
        if constexpr (sizeof(T) == 4) {
            words[i] = float_bits(from[i]);
        } else if constexpr (IS_BF16<T>) {
            words[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
        } else {
            T low, high;
            store(&low, from[2 * i]);
            store(&high, from[2 * i + 1]);
            words[i] = low.bits | ((unsigned)high.bits << 16);
        }
    }
}

// c += a b for tiles of either 16-bit type.
DEVICE void multiply_tile(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) { multiply_bf16(c, a, b0, b1); }
DEVICE void multiply_tile(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, half) { multiply_f16(c, a, b0, b1); }

// Eight consecutive elements at a 16-byte aligned address.
template <typename T>
DEVICE void load8(float (&to)[8], const T* from) {
    constexpr int QUADS = sizeof(T) / 2;
    unsigned words[4 * QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const Words4 quad = *((const Words4*)from + q);
        words[4 * q] = quad.x, words[4 * q + 1] = quad.y, words[4 * q + 2] = quad.z, words[4 * q + 3] = quad.w;
    }
    unpack<T, 8>(to, words);
}

template <typename T>
DEVICE void store8(T* to, const float (&from)[8]) {
    constexpr int QUADS = sizeof(T) / 2;
    unsigned words[4 * QUADS];
    pack<T, 8>(words, from);
#pragma unroll
    for (int q = 0; q < QUADS; q++)
        *((Words4*)to + q) = Words4{words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]};
}

// ---------------------------------------------------------------------------------------------------------
// Functions of one number

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }

// log(1 + exp(x)), to float's last digits where EXACT. For small w = exp(x) a logarithm of 1 + w would lose w's
// digits, so there it is a polynomial in w.
template <bool EXACT>
DEVICE float softplus(float x) {
    const float w = exp2_fast(LOG2E * fminf(x, 20.0f));
    float found;
    if constexpr (EXACT) {
        found = log1pf(w);
    } else {
        const float series = w * (1.0f + w * (-0.5f + w * (1.0f / 3 + w * -0.25f)));
        found = w < 0.06f ? series : LN2 * log2_fast(1.0f + w);
    }
    return x > 20.0f ? x : found;
}

// ---------------------------------------------------------------------------------------------------------
// Sums across lanes

// The index that `sum_lanes` returns.
template <int COUNT, int STRIDE, int END>
DEVICE int first_sum(int lane) {
    if constexpr (STRIDE >= END || COUNT == 1) {
        return 0;
    } else {
        return (lane & STRIDE ? COUNT / 2 : 0) + first_sum<COUNT / 2, 2 * STRIDE, END>(lane);
    }
}

// Sum each of COUNT values over the lanes that differ in the bits STRIDE, 2 STRIDE, ... below END. With every
// halving a lane keeps half of its values, so that COUNT values cost COUNT - 1 exchanges and not COUNT times the
// number of halvings. On return values[0 .. kept) hold the sums whose numbers begin at the returned index.
template <int COUNT, int STRIDE, int END>
DEVICE int sum_lanes(float* values, int lane) {
    if constexpr (STRIDE >= END) {
        return 0;
    } else if constexpr (COUNT == 1) {
        values[0] += swap_lanes(values[0], STRIDE);
        return sum_lanes<1, 2 * STRIDE, END>(values, lane);
    } else {
        const bool upper = lane & STRIDE;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const float mine = upper ? values[i + COUNT / 2] : values[i];
            const float other = upper ? values[i] : values[i + COUNT / 2];
            values[i] = mine + swap_lanes(other, STRIDE);
        }
        return (upper ? COUNT / 2 : 0) + sum_lanes<COUNT / 2, 2 * STRIDE, END>(values, lane);
    }
}
