// What both passes of the selective scan share: arguments, the cut into strips and tiles, and the step sizes.
//
// The lanes of a vector are neighbouring channels, so x, dt and z are read as they lie, and B_t and C_t are single
// numbers for all lanes. The states of a strip of channels stay in registers while a tile of tokens passes.
#pragma once

#include "kernel.h"

namespace mambakit {
namespace selective_scan {

constexpr int64_t LEAST_CHUNK = 512;  // tokens

// A sequence (b, l, d): address, and strides in elements.
struct Sequence {
    const void* data;
    int64_t batch, token;
};

// B or C (b, l, g, n).
struct Grouped {
    const void* data;
    int64_t batch, token, group;
};

struct Args {
    Sequence x, dt, z;  // z may be missing
    Grouped B, C;
    const float* A;         // (d, n)
    const float* D;         // (d,) or null
    const float* bias;      // of dt: (d,) or null
    const float* initial;   // (b, d, n) or null
    const uint8_t* starts;  // (b, l) or null
    // Outputs
    void* y;             // (b, l, d)
    float* final;        // (b, d, n), may be `initial`
    float* checkpoints;  // (b, tiles, n, d): the state before every tile; null in inference
    // Backward only: gradients of the outputs, then of the inputs
    const void* grad_y;
    const float* grad_final;
    void *grad_x, *grad_dt, *grad_z, *grad_B, *grad_C;
    float *grad_A, *grad_D, *grad_bias, *grad_initial;
    // Sizes and options
    int64_t b, l, d, n, g;
    int64_t tile;  // tokens between checkpoints
    int64_t softplus, is_bf16, threads;
};

// LANES channels of one group, or fewer at the group's end.
struct Strip {
    int64_t number, group, channel;
    int lanes;
};

MAMBAKIT_INLINE int64_t strips_per_group(const Args& a) { return ceil_div(a.d / a.g, LANES); }

MAMBAKIT_INLINE int64_t tiles(const Args& a) { return ceil_div(a.l, a.tile); }

MAMBAKIT_INLINE Strip strip_of(const Args& a, int64_t number) {
    const int64_t each = strips_per_group(a), group = number / each, within = number % each * LANES;
    const int64_t width = a.d / a.g;
    return {number, group, group * width + within, static_cast<int>(least(LANES, width - within))};
}

// Into how many chunks to cut time. Channels and rows of the batch are independent and come first; a chunk needs the
// state before it, which a first pass over the chunks before it has to find, at `extra` times the cost of the real one.
// So time is cut where `units` independent tasks leave threads idle for longer than that takes.
inline int64_t chunks_of_time(const Args& a, int64_t units, int64_t threads, double extra) {
    int64_t chunks = 1;
    double best = 0.85 * static_cast<double>(ceil_div(units, threads));  // turns; less gain is none
    for (int64_t c = 2; c <= least(2 * threads, a.l / LEAST_CHUNK); ++c) {
        const double first = extra * static_cast<double>(ceil_div(units * (c - 1), threads));
        const double turns = (first + static_cast<double>(ceil_div(units * c, threads))) / static_cast<double>(c);
        if (turns < best) best = turns, chunks = c;
    }
    return chunks;
}

template <class T>
MAMBAKIT_INLINE const T* at(const Sequence& s, int64_t row, int64_t t, int64_t channel) {
    return static_cast<const T*>(s.data) + row * s.batch + t * s.token + channel;
}

// Fetch what the same strip needs `tokens` later (or, in reverse, earlier): rows lie far apart, so the hardware does
// not do it. A tile's arithmetic hides the wait.
template <class T>
MAMBAKIT_INLINE void fetch(const T* row, int64_t stride, int64_t tokens) {
    __builtin_prefetch(row + stride * tokens, 0, 2);
}

// Tokens [begin, begin + count) of a row, and where its documents start.
struct Tile {
    int64_t row, begin;
    int count;
    const uint8_t* starts;

    Tile(const Args& a, int64_t row, int64_t number)
        : row(row),
          begin(number * a.tile),
          count(static_cast<int>(least(a.tile, a.l - begin))),
          starts(a.starts ? a.starts + row * a.l + begin : nullptr) {}

    MAMBAKIT_INLINE bool starts_at(int t) const { return starts && starts[t]; }
};

// Whether a document starts in tiles [begin, end) of a row: then no state passes through them.
inline bool start_among(const Args& a, int64_t row, int64_t begin, int64_t end) {
    const int64_t from = begin * a.tile, to = least(a.l, end * a.tile);
    return a.starts && std::memchr(a.starts + row * a.l + from, 1, static_cast<size_t>(to - from)) != nullptr;
}

// B or C of a tile as float32 (count, n).
template <class T>
void copy_grouped(const Grouped& from, const Args& a, const Tile& tile, int64_t group, float* to) {
    const T* source = static_cast<const T*>(from.data) + tile.row * from.batch + tile.begin * from.token +
                      group * from.group;
    for (int t = 0; t < tile.count; ++t)
        for (int64_t s = 0; s < a.n; s += LANES) {
            const int lanes = static_cast<int>(least(LANES, a.n - s));
            store(to + t * a.n + s, load(source + t * from.token + s, lanes), lanes);
        }
}

// From (d, n) in memory to n vectors of the strip's channels, and back.
inline void gather_states(const float* from, const Args& a, const Strip& strip, float* to) {
    const float* source = from + strip.channel * a.n;
    for (int64_t s = 0; s < a.n; ++s)
        for (int i = 0; i < LANES; ++i) to[s * LANES + i] = i < strip.lanes ? source[i * a.n + s] : 0;
}

inline void scatter_states(const float* from, const Args& a, const Strip& strip, float* to) {
    float* target = to + strip.channel * a.n;
    for (int i = 0; i < strip.lanes; ++i)
        for (int64_t s = 0; s < a.n; ++s) target[i * a.n + s] = from[s * LANES + i];
}

MAMBAKIT_INLINE vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

// The step sizes of a tile and dt x, `count` vectors each; `next` tokens on lies the tile after this. Returns the
// largest step in any lane.
template <class T>
MAMBAKIT_INLINE float step_sizes(const Args& a, const Tile& tile, const Strip& strip, int64_t next, float* dts,
                                 float* us) {
    const vfloat bias = a.bias ? load(a.bias + strip.channel, strip.lanes) : vfloat{};
    vfloat largest{};
    for (int t = 0; t < tile.count; ++t) {
        const T* from = at<T>(a.dt, tile.row, tile.begin + t, strip.channel);
        const T* x = at<T>(a.x, tile.row, tile.begin + t, strip.channel);
        fetch(from, a.dt.token, next);
        fetch(x, a.x.token, next);
        vfloat dt = load(from, strip.lanes) + bias;
        if (a.softplus) dt = softplus(dt);
        store(dts + t * LANES, dt);
        store(us + t * LANES, dt * load(x, strip.lanes));
        largest = larger(absolute(dt), largest);
    }
    float lane[LANES], most = 0;
    store(lane, largest);
    for (int i = 0; i < LANES; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
}

// Decay rates of a strip for base 2, A log2(e): n vectors. Returns the largest magnitude.
inline float decay_rates(const Args& a, const Strip& strip, float* to) {
    gather_states(a.A, a, strip, to);
    float most = 0;
    for (int64_t i = 0; i < a.n * LANES; ++i) {
        to[i] *= LOG2_E;
        const float size = to[i] < 0 ? -to[i] : to[i];
        most = size > most ? size : most;
    }
    return most;
}

// Exponents below this need no clamping.
constexpr float SAFE_EXPONENT = 120.0f;

// 2^v for the decays, 1 exactly at 0, to about 1 unit in the last place, also what it differs from 1 by. CLAMP is needed
// where |v| may exceed SAFE_EXPONENT. With AVX-512 multiplications bound the scan (nine to a state and token, against
// five other operations): a table of 2^(i/16) takes two terms off the polynomial and adds one multiplication.
template <bool CLAMP>
MAMBAKIT_INLINE vfloat decay(vfloat v) {
    if (CLAMP) return exp2(v);
#if defined(MAMBAKIT_AVX512)
    // The bits of 2^(i/16) less i in the exponent's place, to which the shift below adds i again.
    const __m512i table = _mm512_setr_epi32(
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
    const float magic = 786432.0f;  // 1.5 * 2^19: adding it rounds to sixteenths
    asm("" : "+v"(v));  // keeps the additions from being fused with the product `v`: they run beside multiplications
    const vfloat shifted = v + magic;
    const vfloat r = v - (shifted - magic);  // |r| <= 1/32
    const __m512i bits = bit_cast<__m512i>(shifted);
    const __m512i power = _mm512_permutexvar_epi32(bits, table);
    const vfloat near = bit_cast<vfloat>(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 19)));
    vfloat q = 0.05550595000386238f * r + 0.24023428559303284f;
    q = q * r + 0.6931471824645996f;
    return near + (near * r) * q;
#else
    return exp2_in_range(v);
#endif
}

// to += 2^(rate * steps) * from: what n states of a strip are worth after a time of `steps` (one number per lane).
inline void add_passed(const float* from, const float* rates, const double* steps, int64_t n, float* to) {
    float lane[LANES];
    for (int i = 0; i < LANES; ++i) lane[i] = static_cast<float>(steps[i]);
    const vfloat time = load(lane);
    for (int64_t s = 0; s < n * LANES; s += LANES)
        store(to + s, load(to + s) + decay<true>(time * load(rates + s)) * load(from + s));
}

// Add the step sizes of a tile. Over a long time float32 would lose digits of the sum.
inline void add_steps(const float* dts, int count, double* to) {
    vfloat total{};
    for (int t = 0; t < count; ++t) total = total + load(dts + t * LANES);
    float lane[LANES];
    store(lane, total);
    for (int i = 0; i < LANES; ++i) to[i] += lane[i];
}

}  // namespace selective_scan
}  // namespace mambakit
