// What the forward and the backward pass of `ssd` share: step sizes, pieces of a tile, and its matrix products.
//
// Time is cut into tiles of TILE tokens. Inside a piece of a tile, over which a head's decays multiply to e^-RANGE
// at the least, the state is kept relative to the piece's first token, h_t = P_t g_t with P_t the product of the
// decays since then, so that g_t = g_{t-1} + (dt_t / P_t) x_t B_t^T is a plain sum. Everything becomes products of
// small matrices in which the decays are mere factors of rows: `C B^T` is shared by all heads of a group, and
// no exponential is taken per pair of tokens. See MATH.md.
#pragma once

#include <cmath>

#include "kernel.h"

namespace mambakit {
namespace ssd {

struct Args {
    // Inputs; sequences with strides (in elements) of a row of the batch, of a token, and of a head or group
    const void* x;
    int64_t x_batch, x_token, x_head;
    const void* dt;
    int64_t dt_batch, dt_token, dt_head;
    const void* B;
    int64_t B_batch, B_token, B_group;
    const void* C;
    int64_t C_batch, C_token, C_group;
    const float* A;         // (h,) or null: then `dt` is the logarithm of the decay and x enters unscaled
    const float* D;         // (h,) or (h, p) or null
    const float* bias;      // (h,) or null
    const float* initial;   // (b, h, p, n) or null
    const uint8_t* starts;  // (b, l) or null
    // Outputs
    void* y;             // (b, l, h, p)
    float* final;        // (b, h, p, n), may be `initial`
    float* checkpoints;  // (b, segments - 1, h, p, n): states after each segment but the last; null in inference
    // Backward only: gradients of the outputs, then of the inputs
    const void* grad_y;
    const float* grad_final;
    void *grad_x, *grad_dt;
    float* grad_A;
    void *grad_B, *grad_C;
    float *grad_D, *grad_bias, *grad_initial;
    // Sizes and options
    int64_t b, l, h, p, g, n;
    int64_t D_is_matrix, softplus, is_bf16, threads;
    double dt_min, dt_max;
};

constexpr int TILE = 16;          // tokens; a multiple of LANES
constexpr int64_t SEGMENT = 256;  // tokens from one checkpoint to the next; a multiple of TILE
constexpr double RANGE = 60;      // e^60 times an activation is far from float32's end, and so is e^-60
constexpr int BLOCK = 8;          // rows that a product computes together, at most

// ---------------------------------------------------------------------------------------------------------
// Matrices. A matrix of n columns lies in panels of V vectors: [panel][row][V * LANES]. A product keeps a block of
// R rows of one panel in registers.

#if defined(MAMBAKIT_AVX512) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32
#else
constexpr bool MANY_REGISTERS = false;  // 16
#endif
template <int V>
constexpr int ROWS = V == 1 ? 8 : (MANY_REGISTERS ? 16 : 8) / V;

MAMBAKIT_INLINE int64_t round_up(int64_t size, int64_t to) { return ceil_div(size, to) * to; }

struct Panels {
    int vectors;     // V: 1, 2 or 4
    int64_t width;   // columns of a panel
    int64_t count;   // panels
    int64_t stride;  // of a row where rows are whole: all panels, and whole blocks

    explicit Panels(int64_t columns) {
        const int64_t most = MANY_REGISTERS ? 4 : 2;
        vectors = 1;
        while (vectors < most && columns > vectors * LANES) vectors *= 2;
        if (vectors == 4 && round_up(columns, 2 * LANES) < round_up(columns, 4 * LANES)) vectors = 2;
        width = vectors * LANES;
        count = ceil_div(columns, width);
        stride = round_up(count * width, BLOCK);
    }
};

// The rows for which a matrix in panels has room: whole blocks, and whole vectors when it is transposed.
MAMBAKIT_INLINE int64_t room(int64_t rows) { return round_up(rows, LANES > BLOCK ? LANES : BLOCK); }

// A matrix read element by element, with strides.
struct Elements {
    const float* at;
    int64_t row, column;
};

template <int V>
struct Sum {
    vfloat of[ROWS<V>][V];

    MAMBAKIT_INLINE void clear() {
        for (int r = 0; r < ROWS<V>; ++r)
            for (int v = 0; v < V; ++v) of[r][v] = vfloat{};
    }
    // Add what stands there times 1 + more, or times more.
    MAMBAKIT_INLINE void add_kept(const float* from, int64_t stride, bool one, float more) {
        for (int r = 0; r < ROWS<V>; ++r) {
            for (int v = 0; v < V; ++v) {
                const vfloat old = load(from + r * stride + v * LANES);
                of[r][v] = of[r][v] + more * old;
                if (one) of[r][v] = of[r][v] + old;
            }
        }
    }
    MAMBAKIT_INLINE void write(float* to, int64_t stride) const {
        for (int r = 0; r < ROWS<V>; ++r)
            for (int v = 0; v < V; ++v) store(to + r * stride + v * LANES, of[r][v]);
    }
    MAMBAKIT_INLINE void scale(float by) {
        for (int r = 0; r < ROWS<V>; ++r)
            for (int v = 0; v < V; ++v) of[r][v] = of[r][v] * by;
    }
    // Add the rows of `a` times `depth` rows of `m`.
    MAMBAKIT_INLINE void add(Elements a, const float* m, int64_t stride, int64_t depth) {
        const float *element = a.at, *row = m;
        for (int64_t k = 0; k < depth; ++k) {
            vfloat vector[V];
            for (int v = 0; v < V; ++v) vector[v] = load(row + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS<V>; ++r) {
                const vfloat factor = broadcast(element[r * a.row]);
                for (int v = 0; v < V; ++v) of[r][v] = of[r][v] + factor * vector[v];
            }
            element += a.column;
            row += stride;
        }
    }
};

// A state of `rows` rows, some steps on: to = keep * from + a m, where `m` has `depth` rows. With keep = 0 what
// stands in `from` is not read. The small sum is added to the large state once, so that a slow head rounds once per
// piece and not once per token; and a factor near 1 is applied as 1 + (keep - 1), whose second part has all digits:
// rounded itself, the factor would be wrong by the same amount every time.
template <int V>
void advance_panels(const Panels& panels, float* to, const float* from, double keep, int64_t rows, Elements a,
                    const float* m, int64_t stride, int64_t depth) {
    const int64_t width = V * LANES, size = room(rows) * width;
    const bool near_one = keep > 0.5;
    const float more = static_cast<float>(near_one ? keep - 1 : keep);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        for (int64_t r = 0; r < rows; r += ROWS<V>) {
            const int64_t place = panel * size + r * width;
            for (int64_t i = 0; i < ROWS<V> * width; i += 16) __builtin_prefetch(from + place + i);  // for the end
            Sum<V> sum;
            sum.clear();
            sum.add({a.at + r * a.row, a.row, a.column}, m + panel * width, stride, depth);
            if (near_one || more != 0) sum.add_kept(from + place, width, near_one, more);
            sum.write(to + place, width);
        }
    }
}

inline void advance(const Panels& panels, float* to, const float* from, double keep, int64_t rows, Elements a,
                    const float* m, int64_t stride, int64_t depth) {
    switch (panels.vectors) {
        case 1: return advance_panels<1>(panels, to, from, keep, rows, a, m, stride, depth);
        case 2: return advance_panels<2>(panels, to, from, keep, rows, a, m, stride, depth);
        default: return advance_panels<4>(panels, to, from, keep, rows, a, m, stride, depth);
    }
}

// What is inside a piece of a tile: row t of `weight` times rows of `m`, those up to t or those from t on.
struct Inside {
    Elements weight;
    const float* m;
    int64_t stride;
    bool later;
};

// Rows begin to end of `out`: scale * a state, `depth` being the state's rows, plus what is inside, if anything.
// Whole blocks are written.
template <int V>
void read_panels(const Panels& panels, float* out, int64_t out_stride, int begin, int end, float scale, Elements a,
                 const float* state, int64_t depth, const Inside* inside) {
    const int64_t width = V * LANES, size = room(depth) * width;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        for (int t = begin; t < end; t += ROWS<V>) {
            Sum<V> sum;
            sum.clear();
            if (scale != 0) {
                sum.add({a.at + t * a.row, a.row, a.column}, state + panel * size, width, depth);
                sum.scale(scale);
            }
            if (inside) {
                const Elements& w = inside->weight;
                const int first = inside->later ? t : begin;
                const int last = inside->later ? end : static_cast<int>(least(t + ROWS<V>, end));
                sum.add({w.at + t * w.row + first * w.column, w.row, w.column},
                        inside->m + first * inside->stride + panel * width, inside->stride, last - first);
            }
            sum.write(out + t * out_stride + panel * width, out_stride);
        }
    }
}

inline void read(const Panels& panels, float* out, int64_t out_stride, int begin, int end, float scale, Elements a,
                 const float* state, int64_t depth, const Inside* inside = nullptr) {
    switch (panels.vectors) {
        case 1: return read_panels<1>(panels, out, out_stride, begin, end, scale, a, state, depth, inside);
        case 2: return read_panels<2>(panels, out, out_stride, begin, end, scale, a, state, depth, inside);
        default: return read_panels<4>(panels, out, out_stride, begin, end, scale, a, state, depth, inside);
    }
}

// LANES rows of LANES numbers, transposed.
MAMBAKIT_INLINE void transpose_block(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
    vfloat row[LANES];
    for (int i = 0; i < LANES; ++i) row[i] = load(from + i * from_stride);
    transpose(row);
    for (int i = 0; i < LANES; ++i) store(to + i * to_stride, row[i]);
}

// Rows of `depth` numbers become columns of a matrix in panels, each of `size` numbers.
inline void transpose_rows(const Panels& panels, float* to, int64_t size, const float* from, int64_t stride,
                           int64_t rows, int64_t depth) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t k = 0; k < depth; k += LANES)
            transpose_block(to + r / panels.width * size + k * panels.width + r % panels.width, panels.width,
                            from + r * stride + k, stride);
}

// ---------------------------------------------------------------------------------------------------------
// Rows of activations

// One row, widened to float32 and filled up with zeros to `stride` numbers.
template <class T>
MAMBAKIT_INLINE void widen_row(float* to, const T* from, int64_t count, int64_t stride) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) {
        store(to + i, load(from + i, static_cast<int>(count - i)));
        i += LANES;
    }
    for (; i < stride; i += LANES) store(to + i, vfloat{});
}

// One row times `by`.
MAMBAKIT_INLINE void scale_row(float* to, const float* from, float by, int64_t stride) {
    for (int64_t i = 0; i < stride; i += LANES) store(to + i, by * load(from + i));
}

// ---------------------------------------------------------------------------------------------------------
// Step sizes and decays of one head in one tile

struct Steps {
    alignas(64) float dt[TILE];      // after bias, softplus and clamp; 1 without A; zero beyond the sequence
    alignas(64) float slope[TILE];   // its derivative by the raw step size
    alignas(64) double log[TILE];    // logarithms of the decays, dt A
    alignas(64) double decay[TILE];  // float64: the error of a product of decays grows with the product's length

    template <class T>
    void compute(const Args& a, int64_t row, int64_t head, int64_t begin, int count, bool slopes) {
        const T* from = static_cast<const T*>(a.dt) + row * a.dt_batch + begin * a.dt_token + head * a.dt_head;
        if (!a.A) {
            for (int t = 0; t < TILE; ++t) dt[t] = t < count, log[t] = t < count ? widen(from[t * a.dt_token]) : 0;
            for (int t = 0; t < TILE; t += DOUBLES) store(decay + t, exp(load(log + t)));
            return;
        }
        const float bias = a.bias ? a.bias[head] : 0;
        for (int t = 0; t < TILE; ++t) dt[t] = t < count ? widen(from[t * a.dt_token]) + bias : 0;
        const bool clamp = a.dt_min != 0 || a.dt_max != INFINITY;
        const float low = static_cast<float>(a.dt_min), high = static_cast<float>(a.dt_max);
        for (int t = 0; t < TILE; t += LANES) {
            const vfloat raw = load(dt + t);
            const vfloat free = a.softplus ? softplus(raw) : raw;
            if (slopes) {
                vfloat by = a.softplus ? sigmoid(raw) : broadcast(1);
                if (clamp) by = (free >= low) & (free <= high) ? by : vfloat{};
                store(slope + t, by);
            }
            store(dt + t, clamp ? at_most(at_least(free, low), high) : free);
        }
        for (int t = count; t < TILE; ++t) dt[t] = 0;
        const double rate = a.A[head];
        for (int t = 0; t < TILE; ++t) log[t] = rate * dt[t];
        for (int t = 0; t < TILE; t += DOUBLES) store(decay + t, exp(load(log + t)));
    }
};

// Tokens begin to end of a tile, within RANGE of each other.
struct Piece {
    int begin, end;
    double entry;        // the decay of its first token; 0 where nothing enters
    double through;      // product of the other decays
    double since[TILE];  // product of the decays after the first token up to each

    // The piece of a tile of `count` tokens that begins at one of them; `starts` are those of the tile (or null),
    // `nothing` says that no state enters the tile.
    void cut(const Steps& steps, const uint8_t* starts, int first, int count, bool nothing) {
        begin = first;
        entry = (nothing && first == 0) || (starts && starts[first]) ? 0 : steps.decay[first];
        double log = 0, product = 1;
        since[first] = 1;
        for (end = first + 1; end < count; ++end) {
            log += steps.log[end];
            // Also where the sum is not a number: a piece of one token divides by nothing.
            if (!(log >= -RANGE && log <= RANGE) || (starts && starts[end])) break;
            product *= steps.decay[end];
            since[end] = product;
        }
        through = product;
    }
};

// ---------------------------------------------------------------------------------------------------------
// Work

// Some blocks of heads of one group of one row of the batch, over a chunk of time.
struct Task {
    int64_t row, group, block, end_block, head, end_head, chunk, begin, end;

    // Where its first head stands among (chunks, b, h).
    int64_t place(const Args& a) const { return (chunk * a.b + row) * a.h + head; }
};

// The bytes that say which tokens of a row start a document, from a token on; null where there are none.
MAMBAKIT_INLINE const uint8_t* starts_of(const Args& a, int64_t row, int64_t begin) {
    return a.starts ? a.starts + row * a.l + begin : nullptr;
}

// The product of some decays, 0 across the start of a document whatever they are.
MAMBAKIT_INLINE double pass(const Steps& steps, const uint8_t* starts, int count) {
    double product = 1;
    for (int t = 0; t < count; ++t) {
        if (starts && starts[t]) return 0;
        product *= steps.decay[t];
    }
    return product;
}

// How the work is cut: rows and groups first; then the blocks of a group's heads into parts; where that does not
// suffice, time into chunks of whole segments. Only the last changes a result, within rounding.
struct Plan {
    int64_t threads, blocks, parts, chunks, tokens;

    // `most_blocks` is how many blocks the heads of a group fall into, at most.
    Plan(const Args& a, int64_t most_blocks) : threads(a.threads), parts(1), chunks(1), tokens(a.l) {
        if (a.b * a.l * a.h * a.p * a.n < (1 << 18)) threads = 1;  // some ten microseconds of work
        const int64_t units = a.b * a.g;
        blocks = most(1, least(most_blocks, a.h / a.g));
        double best = 0;
        for (int64_t k = 1; k <= blocks && best < 0.9; ++k) {
            const double turns = static_cast<double>(ceil_div(blocks, k) * ceil_div(units * k, threads));
            const double used = static_cast<double>(units * blocks) / static_cast<double>(threads) / turns;
            if (used > best * 1.05) best = used, parts = k;
        }
        const int64_t segments = ceil_div(a.l, SEGMENT);
        if (units > 0 && units * parts < threads) chunks = least(ceil_div(threads, units * parts), segments);
        if (chunks > 1) tokens = ceil_div(segments, chunks) * SEGMENT;
        chunks = ceil_div(a.l, tokens);
    }

    int64_t tasks(const Args& a) const { return a.b * a.g * parts * chunks; }

    // The first head of a block of a group.
    int64_t head(const Args& a, int64_t group, int64_t block) const {
        const int64_t heads = a.h / a.g;
        return group * heads + heads * block / blocks;
    }

    Task task(const Args& a, int64_t number) const {
        const int64_t part = number % parts, unit = number / parts;
        const int64_t group = unit % a.g, row = unit / a.g % a.b, chunk = unit / a.g / a.b;
        const int64_t block = blocks * part / parts, end_block = blocks * (part + 1) / parts;
        return {row,   group,          block, end_block, head(a, group, block), head(a, group, end_block),
                chunk, chunk * tokens, least(a.l, (chunk + 1) * tokens)};
    }
};

// B and C of some tokens in float32, and for each tile the products of its tokens: (t, s) holds C_t B_s, or with
// `turned` (s, t) does; zero where s > t.
struct GroupTiles {
    const Panels n, tokens;
    float *B, *C, *products, *columns;

    static int64_t floats(const Args& a, int64_t most) {
        return (most + BLOCK) * (2 * Panels(a.n).stride + TILE) + room(a.n) * TILE;
    }

    // Room for `most` tokens.
    GroupTiles(const Args& a, int64_t most, Scratch& scratch) : n(a.n), tokens(TILE) {
        B = scratch.take((most + BLOCK) * n.stride);
        C = scratch.take((most + BLOCK) * n.stride);
        products = scratch.take((most + BLOCK) * TILE);
        columns = scratch.take(room(a.n) * TILE);
    }

    template <class T>
    void fill_B(const Args& a, const Task& task, int64_t begin, int64_t count) {
        const T* from = static_cast<const T*>(a.B) + task.row * a.B_batch + task.group * a.B_group;
        for (int64_t t = 0; t < count; ++t)
            widen_row(B + t * n.stride, from + (begin + t) * a.B_token, a.n, n.stride);
    }

    template <class T>
    void fill_C(const Args& a, const Task& task, int64_t begin, int64_t count) {
        const T* from = static_cast<const T*>(a.C) + task.row * a.C_batch + task.group * a.C_group;
        for (int64_t t = 0; t < count; ++t)
            widen_row(C + t * n.stride, from + (begin + t) * a.C_token, a.n, n.stride);
    }

    void multiply(int64_t depth, int64_t count, bool turned) {
        const float *rows = turned ? B : C, *others = turned ? C : B;
        for (int64_t tile = 0; tile < count; tile += TILE) {
            const int64_t size = room(depth) * tokens.width;
            transpose_rows(tokens, columns, size, others + tile * n.stride, n.stride, TILE, depth);
            float* product = products + tile * TILE;
            read(tokens, product, TILE, 0, TILE, 1, {rows + tile * n.stride, n.stride, 1}, columns, depth);
            for (int t = 0; t < TILE; ++t)
                for (int s = t + 1; s < TILE; ++s) product[turned ? s * TILE + t : t * TILE + s] = 0;
        }
    }
};

}  // namespace ssd
}  // namespace mambakit
