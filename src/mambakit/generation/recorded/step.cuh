// What the kernels of one decoding step share: vectors brought to shared memory (normalised on the way), one token
// of the convolution, and the streaming of weights.
//
// Producing a token reads every weight once, so a kernel is as fast as it keeps reads in flight. All of them follow
// one plan: ask for weights and states, which no earlier kernel of the step writes; wait for the earlier kernels;
// bring in the activations; compute. Activations are rounded where the model's own forward rounds them.
//
// Settings of every compilation: IO (float, bf16, half: weights and activations), RES (the residual stream's type),
// ALIGNED (16-byte accesses are possible).

#ifndef THREADS
#define THREADS 256
#endif
constexpr int WARPS = THREADS / 32;
constexpr int VEC = 16 / sizeof(IO);  // weights of one load

DEVICE float rounded(float x) {
    IO y;
    store(&y, x);
    return load(y);
}

DEVICE float silu(float x) { return x * sigmoid(x); }

// Up to eight consecutive numbers, zero beyond `left`.
template <typename T>
DEVICE void load_some(float (&to)[8], const T* from, int left) {
    if constexpr (ALIGNED) {
        load8(to, from);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = i < left ? load(from[i]) : 0.0f;
    }
}

template <typename T>
DEVICE void store_some(T* to, const float (&from)[8], int left) {
    if constexpr (ALIGNED) {
        unsigned words[2 * sizeof(T)];
        pack<T, 8>(words, from);
#pragma unroll
        for (int q = 0; q < (int)sizeof(T) / 2; q++)
            store16((Words4*)to + q, Words4{words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]});
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) store(to + i, from[i]);
    }
}

// 16 bytes of weights, zero beyond `left`.
DEVICE Words4 load_weights(const IO* from, int left) {
    if constexpr (ALIGNED) {
        return left > 0 ? load16_once(from) : Words4{0, 0, 0, 0};
    } else {
        float numbers[VEC];
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < VEC; i++) numbers[i] = i < left ? load(from[i]) : 0.0f;
        pack<IO, VEC>(words, numbers);
        return Words4{words[0], words[1], words[2], words[3]};
    }
}

template <int N, typename T>
DEVICE void unpack16(float (&to)[N], const Words4& from) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
    unpack<T, N>(to, words);
}

// ---------------------------------------------------------------------------------------------------------
// Vectors

// Ask for `size` weights to be copied to shared memory; whoever reads them waits for copies first. Where they cannot
// be copied 16 bytes at a time, they are read where they are.
DEVICE const IO* stage(IO* to, const IO* from, int size) {
    if constexpr (!ALIGNED) return from;
    for (int c = threadIdx.x * VEC; c < size; c += THREADS * VEC) copy16_async(to + c, from + c);
    copies_commit();
    return to;
}

// N rows of activations and what to do with them on their way.
template <typename In>
struct Source {
    In* from;              // rows of `groups` x `size` numbers, `stride` apart
    const IO *add, *gate;  // added to them first, and kept; multiplied by their SiLU last; or null
    const IO* weight;      // of the norm
    int64 stride, add_stride, gate_stride;
    int rows, groups, size;
    float eps;
    const float* parts = nullptr;  // what is added is the sum of SUMMED of these, `part_stride` apart, and of a bias
    const IO* bias = nullptr;
    int64 part_stride = 0;

    // Eight numbers of a row with what is added to them, rounded as they will be kept.
    template <int SUMMED>
    DEVICE void read(float (&x)[8], int row, int at, int left) const {
        load_some(x, from + row * stride + at, left);
        float more[8];
        if constexpr (SUMMED > 0) {
            float part[SUMMED][8], constant[8] = {};
#pragma unroll
            for (int c = 0; c < SUMMED; c++) load_some(part[c], parts + c * part_stride + at, left);
            if (bias) load_some(constant, bias + at, left);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                more[i] = 0.0f;
#pragma unroll
                for (int c = 0; c < SUMMED; c++) more[i] += part[c][i];
                more[i] = rounded(more[i] + constant[i]);
            }
        } else if (add) {
            load_some(more, add + row * add_stride + at, left);
        } else {
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            In kept;
            store(&kept, x[i] + more[i]);
            x[i] = load(kept);
        }
    }
    template <int SUMMED>
    DEVICE void keep(const float (&x)[8], int row, int at, int left) const {
        if (SUMMED > 0 || add) store_some(from + row * stride + at, x, left);
    }
    DEVICE void fetch_gate(float (&z)[8], int row, int at, int left) const {
        if (gate) load_some(z, gate + row * gate_stride + at, left);
    }
    // Eight numbers of the result.
    DEVICE void finish(IO* to, float (&x)[8], const float (&z)[8], float root, int at, int left) const {
        float scale[8];
        load_some(scale, weight + at, left);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= root * scale[i];
        if (gate) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= silu(z[i]);
        }
        store_some(to + at, x, left);
    }
};

// 1 / sqrt(mean + eps) of every row, from the threads' sums of squares. `scratch` holds WARPS x N floats.
template <int N, int PENDING>
DEVICE void root_of_mean(float (&root)[N], float (&squares)[N], float* scratch, int size, float eps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = sum_lanes<N, 1, 32>(squares, lane);
    scratch[warp * N + first] = squares[0];
    copies_wait<PENDING>();  // of the weights
    block_barrier();
#pragma unroll
    for (int j = 0; j < N; j++) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += scratch[w * N + j];
        root[j] = 1.0f / sqrtf(sum / size + eps);
    }
}

// to = round(x / sqrt(mean(x^2) + eps) * weight [* silu(gate)]) by groups of channels; rows `pitch` apart. With HELD a
// thread keeps so many pieces of the one row, all of which it asks for at once; otherwise it reads them twice. PENDING
// copies may be under way behind those of the weights. All threads of the block come here; the caller sets a barrier
// behind.
template <int N, int HELD_PIECES, int PENDING, int SUMMED = 0, typename In>
DEVICE void normalise(IO* to, int pitch, const Source<In>& s, float* scratch) {
    for (int g = 0; g < s.groups; g++) {
        const int first = g * s.size;
        float squares[N], root[N];
#pragma unroll
        for (int j = 0; j < N; j++) squares[j] = 0.0f;
        if constexpr (HELD_PIECES > 0) {
            static_assert(N == 1, "one row is held");
            float x[HELD_PIECES][8], z[HELD_PIECES][8];
#pragma unroll
            for (int h = 0; h < HELD_PIECES; h++) {
                const int c = (h * THREADS + (int)threadIdx.x) * 8;
                if (c >= s.size) continue;
                s.template read<SUMMED>(x[h], 0, first + c, s.size - c);
                s.fetch_gate(z[h], 0, first + c, s.size - c);
            }
            keep_order();  // a store would have later reads wait
#pragma unroll
            for (int h = 0; h < HELD_PIECES; h++) {
                const int c = (h * THREADS + (int)threadIdx.x) * 8;
                if (c >= s.size) continue;
                s.template keep<SUMMED>(x[h], 0, first + c, s.size - c);
#pragma unroll
                for (int i = 0; i < 8; i++) squares[0] += x[h][i] * x[h][i];
            }
            root_of_mean<N, PENDING>(root, squares, scratch, s.size, s.eps);
#pragma unroll
            for (int h = 0; h < HELD_PIECES; h++) {
                const int c = (h * THREADS + (int)threadIdx.x) * 8;
                if (c < s.size) s.finish(to, x[h], z[h], root[0], first + c, s.size - c);
            }
        } else {
            for (int c = threadIdx.x * 8; c < s.size; c += THREADS * 8)
#pragma unroll
                for (int j = 0; j < N; j++) {
                    if (j >= s.rows) continue;
                    float x[8];
                    s.template read<SUMMED>(x, j, first + c, s.size - c);
                    s.template keep<SUMMED>(x, j, first + c, s.size - c);
#pragma unroll
                    for (int i = 0; i < 8; i++) squares[j] += x[i] * x[i];
                }
            root_of_mean<N, PENDING>(root, squares, scratch, s.size, s.eps);
            for (int c = threadIdx.x * 8; c < s.size; c += THREADS * 8)
#pragma unroll
                for (int j = 0; j < N; j++) {
                    if (j >= s.rows) continue;
                    float x[8], z[8];
                    load_some(x, s.from + j * s.stride + first + c, s.size - c);  // from the nearest cache
                    s.fetch_gate(z, j, first + c, s.size - c);
                    s.finish(to + j * pitch, x, z, root[j], first + c, s.size - c);
                }
        }
        block_barrier();
    }
}

// The same without a norm.
template <int N>
DEVICE void bring(IO* to, int pitch, const IO* from, int64 stride, int rows, int size) {
    if constexpr (ALIGNED) {
        // Some pieces at once: a store would have later reads wait.
        constexpr int ONCE = 4;
        const int pieces = size / VEC, all = rows * pieces;
        for (int base = threadIdx.x; base < all; base += ONCE * THREADS) {
            Words4 x[ONCE];
#pragma unroll
            for (int i = 0; i < ONCE; i++) {
                const int number = base + i * THREADS, row = N == 1 ? 0 : number / pieces;
                if (number < all) x[i] = *(const Words4*)(from + row * stride + (number - row * pieces) * VEC);
            }
            keep_order();
#pragma unroll
            for (int i = 0; i < ONCE; i++) {
                const int number = base + i * THREADS, row = N == 1 ? 0 : number / pieces;
                if (number < all) store16(to + row * pitch + (number - row * pieces) * VEC, x[i]);
            }
        }
    } else {
        for (int c = threadIdx.x * 8; c < size; c += THREADS * 8)
#pragma unroll
            for (int j = 0; j < N; j++) {
                if (j >= rows) continue;
                float x[8];
                load_some(x, from + j * stride + c, size - c);
                store_some(to + j * pitch + c, x, size - c);
            }
    }
}

// Zero what the products read beyond the vectors: padding columns, and rows that do not exist.
template <int N>
DEVICE void clear(IO* to, int pitch, int rows, int size) {
#pragma unroll
    for (int j = 0; j < N; j++)
        for (int i = (j < rows ? size : 0) + (int)threadIdx.x; i < pitch; i += THREADS) store(to + j * pitch + i, 0.0f);
}

// ---------------------------------------------------------------------------------------------------------
// One token of one channel's convolution, W taps

template <int W, typename State>
struct Window {
    static constexpr int PAST = W > 1 ? W - 1 : 1;
    float weight[W], bias, past[PAST];
    State* state;  // of the oldest input; the next one is `stride` further
    int64 stride;

    DEVICE void fetch(const IO* weights, const IO* biases, State* states, int64 row, int64 channel, int64 channels) {
        state = states + row * (W - 1) * channels + channel, stride = channels;
#pragma unroll
        for (int k = 0; k < W; k++) weight[k] = load(weights[channel * W + k]);
        bias = biases ? load(biases[channel]) : 0.0f;
#pragma unroll
        for (int k = 0; k < W - 1; k++) past[k] = load(state[k * stride]);
    }
    DEVICE float push(float x) {
        float y = bias;
#pragma unroll
        for (int k = 0; k < W - 1; k++) y += weight[k] * past[k];
        y += weight[W - 1] * x;
#pragma unroll
        for (int k = 0; k < W - 1; k++) store(state + k * stride, k + 1 < W - 1 ? past[k + 1] : x);
        return silu(y);
    }
};
