// What becomes of a panel's results: stored, added, convolved, or made a step of a recurrence.
#pragma once

#include "before.h"

namespace mambakit {
namespace decode {

// Lane i becomes the sum of row i. Each exchange leaves two vectors whose sum holds two rows' halves.
MAMBAKIT_INLINE vfloat sums_of_rows(vfloat (&row)[LANES]) {
    for (int i = 0; i < LANES; i += 2) {
        exchange<1>(row[i], row[i + 1]);
        row[i] = row[i] + row[i + 1];
    }
    for (int i = 0; i < LANES; i += 4) {
        exchange<2>(row[i], row[i + 2]);
        row[i] = row[i] + row[i + 2];
    }
    if constexpr (LANES > 4)
        for (int i = 0; i < LANES; i += 8) {
            exchange<4>(row[i], row[i + 4]);
            row[i] = row[i] + row[i + 4];
        }
    if constexpr (LANES > 8) {
        exchange<8>(row[0], row[8]);
        row[0] = row[0] + row[8];
    }
    return row[0];
}

// h = decay h + u B and C h for one row of n states, as a vector whose lanes add up to C h. N is the number of whole
// vectors, or 0 for any n.
template <int N, class Decay>
MAMBAKIT_INLINE vfloat advance(float* h, const float* B, const float* C, float u, int64_t n, const Decay& decay) {
    vfloat read{};
    if constexpr (N > 0) {
        for (int i = 0; i < N * LANES; i += LANES) {
            const vfloat next = decay(i, LANES) * load(h + i) + u * load(B + i);
            store(h + i, next);
            read = read + next * load(C + i);
        }
    } else {
        for (int64_t i = 0; i < n; i += LANES) {
            const int lanes = lanes_left(i, n);
            const vfloat next = decay(i, lanes) * load(h + i, lanes) + u * load(B + i, lanes);
            store(h + i, next, lanes);
            read = read + next * load(C + i, lanes);
        }
    }
    return read;
}

template <class T>
void convolve(const Conv& conv, const Product& product, int64_t row, int64_t rows, T* state, const float* y,
              float* out) {
    for (int64_t i = 0; i < rows; i += LANES) {
        const int lanes = lanes_left(i, rows);
        const int64_t channel = row + i;
        vfloat sum = conv.bias ? load(conv.bias + channel, lanes) : vfloat{};
        T* past = state + channel;
        for (int64_t k = 0; k < conv.width; ++k) {
            const vfloat x = k < conv.width - 1 ? load(past + k * product.rows, lanes) : load(y + i);
            if (k > 0) store(past + (k - 1) * product.rows, x, lanes);
            sum = sum + load(conv.taps + k * product.rows + channel, lanes) * x;
        }
        store(out + i, silu(sum), lanes);
    }
}

template <int N>
void scan(const Scan& s, int64_t row, int64_t rows, int64_t m, float* h, const float* y, float* out) {
    const float *x = s.x + m * s.x_stride + row, *gate = s.gate + m * s.gate_stride + row;
    const float *B = s.B + m * s.BC_stride, *C = s.C + m * s.BC_stride;
    for (int64_t i = 0; i < rows; i += LANES) {
        const int lanes = lanes_left(i, rows);
        const vfloat input = load(x + i, lanes);
        const vfloat dt = softplus(load(y + i) + load(s.dt_bias + row + i, lanes));
        float step[LANES], u[LANES];
        store(step, dt);
        store(u, dt * input);
        vfloat read[LANES] = {};
        for (int j = 0; j < lanes; ++j) {
            const float* A = s.A + (row + i + j) * s.n;
            read[j] = advance<N>(h + (row + i + j) * s.n, B, C, u[j], s.n,
                                 [&](int64_t k, int count) { return exp2(step[j] * load(A + k, count)); });
        }
        const vfloat result = sums_of_rows(read) + load(s.D + row + i, lanes) * input;
        store(out + i, result * load(gate + i, lanes), lanes);
    }
}

inline void scan_any(const Scan& s, int64_t row, int64_t rows, int64_t m, float* h, const float* y, float* out) {
    switch (s.n) {
        case LANES: return scan<1>(s, row, rows, m, h, y, out);
        case 2 * LANES: return scan<2>(s, row, rows, m, h, y, out);
        case 4 * LANES: return scan<4>(s, row, rows, m, h, y, out);
        default: return scan<0>(s, row, rows, m, h, y, out);
    }
}

// Pieces of heads: LANES channels of one head of one sequence.
MAMBAKIT_INLINE int64_t pieces(const Heads& s) { return s.heads * ceil_div(s.headdim, LANES); }

template <int N>
void head_piece(const Heads& s, int64_t m, int64_t head, int64_t first, float* h) {
    const int lanes = lanes_left(first, s.headdim);
    const int64_t channel = head * s.headdim + first, group = head / (s.heads / s.groups);
    const vfloat x = load(s.x + m * s.mixed_stride + channel, lanes);
    const float *B = s.B + m * s.mixed_stride + group * s.n, *C = s.C + m * s.mixed_stride + group * s.n;
    const float dt = s.dt[m * s.dt_stride + head];
    const vfloat decay = exp2(broadcast(dt * s.A[head]));
    float u[LANES];
    store(u, dt * x);
    vfloat read[LANES] = {};
    h += channel * s.n;
    for (int j = 0; j < lanes; ++j)
        read[j] = advance<N>(h + j * s.n, B, C, u[j], s.n, [&](int64_t, int) { return decay; });
    store(s.out + m * s.out_stride + channel, sums_of_rows(read) + s.D[head] * x, lanes);
}

inline void head_task(const Heads& s, int64_t batch, int64_t begin, int64_t end, float* h) {
    const int64_t per_head = ceil_div(s.headdim, LANES), per_row = pieces(s);
    for (int64_t piece = begin; piece < least(end, batch * per_row); ++piece) {
        const int64_t m = piece / per_row, head = piece % per_row / per_head;
        const int64_t first = piece % per_head * LANES;
        float* own = h + m * s.heads * s.headdim * s.n;
        if (s.n == 8 * LANES) head_piece<8>(s, m, head, first, own);
        else if (s.n == 4 * LANES) head_piece<4>(s, m, head, first, own);
        else head_piece<0>(s, m, head, first, own);
    }
}

// f(y) for LANES results.
MAMBAKIT_INLINE vfloat activate(int64_t then, vfloat y) {
    switch (then) {
        case SILU: return silu(y);
        case RELU2: {
            const vfloat positive = at_least(y, 0.0f);
            return positive * positive;
        }
        case GELU: {
            float lane[LANES];
            store(lane, y);
            for (float& v : lane) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
            return load(lane);
        }
        default: return y;
    }
}

// Finish the results y of one panel, whose first row is `row`, for one sequence.
inline void finish(const Args& a, const Product& product, int64_t row, int64_t m, float* y) {
    const int64_t rows = least(PANEL, product.rows - row);
    float* out = (product.out ? product.out + m * product.stride : a.logits + m * a.logits_stride) + row;
    if (product.bias)
        for (int64_t i = 0; i < rows; i += LANES)
            store(y + i, load(y + i) + load(product.bias + row + i, lanes_left(i, rows)));
    if (product.then == CONV) {
        const Conv& conv = *static_cast<const Conv*>(product.how);
        const int64_t begin = m * (conv.width - 1) * product.rows;
        void* state = a.states[conv.state];
        if (conv.state_bf16) convolve(conv, product, row, rows, static_cast<bf16*>(state) + begin, y, out);
        else convolve(conv, product, row, rows, static_cast<float*>(state) + begin, y, out);
        return;
    }
    if (product.then == SCAN) {
        const Scan& s = *static_cast<const Scan*>(product.how);
        float* h = static_cast<float*>(a.states[s.state]) + m * product.rows * s.n;
        scan_any(s, row, rows, m, h, y, out);
        return;
    }
    for (int64_t i = 0; i < rows; i += LANES) {
        const int lanes = lanes_left(i, rows);
        vfloat v = load(y + i);
        if (product.then == ADD) {
            v = v + load(out + i, lanes);
        } else if (product.then == STEP) {
            const Step& s = *static_cast<const Step*>(product.how);
            v = softplus(v + load(s.bias + row + i, lanes));
            v = at_most(at_least(v, static_cast<float>(s.least)), static_cast<float>(s.most));
        } else {
            v = activate(product.then, v);
        }
        store(out + i, v, lanes);
    }
}

}  // namespace decode
}  // namespace mambakit
