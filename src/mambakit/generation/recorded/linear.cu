// A linear layer for up to eight vectors at once, with what comes before and after it: the norm of its input; the
// convolution of some of its outputs, or the addition to the residual stream.
//
// A team of SPLIT warps computes R outputs for all B vectors: its lanes read R rows of weights side by side, 16
// bytes each, U loads ahead, and meet them with the vectors in shared memory. Sums cross lanes by halving and
// warps through shared memory, in a fixed order. A block takes every so-many-th set of rows, so that the vectors
// are prepared once for all of them.
//
// Settings: VECTORS (B, padded to a power of two), TEAM_ROWS (R), AHEAD (U), SPLIT, NORM (normalise the input, of type RES), GATED
// (normalise an input of type IO in groups), ADD (to the residual stream), TAPS (of the convolution, or 0), CONV
// (the type of its state).

struct Params {
    const IO *weight, *bias;                 // (rows, k), (rows) or null
    void* input;                             // (batch, k), rows `input_stride` apart
    const IO *norm, *gate;                   // (k); (batch, k), rows `gate_stride` apart, or null
    void* out;                               // (batch, rows) of IO; with ADD of RES
    const IO *taps, *taps_bias;              // (channels, TAPS), (channels) or null
    CONV* conv;                              // (batch, TAPS - 1, channels)
    int64 input_stride, gate_stride, batch, rows, k, groups, first_channel, channels, sets, blocks;
    double eps;
};

constexpr int B = VECTORS, R = TEAM_ROWS, U = AHEAD;
constexpr int ROWS = WARPS / SPLIT * R;      // of a set
constexpr int STEP = 32 * SPLIT;             // loads of a team side by side

// A team's weights: U loads of each of its R rows, always the next ones.
struct Stream {
    Words4 w[R][U];
    const IO* row[R];
    int k, lane;

    DEVICE Words4 fetch(int r, int load) const { return load_weights(row[r] + load * VEC, k - load * VEC); }
    DEVICE void begin(const Params& p, int64 first_row) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int64 number = first_row + r < p.rows ? first_row + r : p.rows - 1;
            row[r] = p.weight + number * k;
        }
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int r = 0; r < R; r++) w[r][u] = fetch(r, lane + u * STEP);
    }
    DEVICE void multiply(float (&sums)[R * B], const IO* vectors, int pitch) {
#pragma unroll
        for (int i = 0; i < R * B; i++) sums[i] = 0.0f;
        for (int first = lane; first * VEC < k; first += U * STEP) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int here = first + u * STEP;
                if (here * VEC < k) {
                    float weights[R][VEC];
#pragma unroll
                    for (int r = 0; r < R; r++) unpack16<VEC, IO>(weights[r], w[r][u]);
#pragma unroll
                    for (int b = 0; b < B; b++) {
                        float x[VEC];
                        unpack16<VEC, IO>(x, *(const Words4*)(vectors + b * pitch + here * VEC));
#pragma unroll
                        for (int r = 0; r < R; r++)
#pragma unroll
                            for (int i = 0; i < VEC; i++) sums[r * B + b] += weights[r][i] * x[i];
                    }
#pragma unroll
                    for (int r = 0; r < R; r++) w[r][u] = fetch(r, here + U * STEP);
                }
            }
        }
    }
};

// What a thread does with one output: `fetch` ahead of everything, `fetch_sum` behind earlier kernels, `finish` behind
// the product.
struct Output {
    int64 row, vector;
    bool exists, convolved;
    float bias, sum;
#if TAPS
    Window<TAPS, CONV> window;
#endif

    DEVICE void fetch(const Params& p, int64 set) {
        row = set * ROWS + threadIdx.x % ROWS, vector = threadIdx.x / ROWS;
        exists = row < p.rows && vector < p.batch;
        if (!exists) return;
        bias = p.bias ? load(p.bias[row]) : 0.0f;
#if TAPS
        const int64 channel = row - p.first_channel;
        convolved = channel >= 0 && channel < p.channels;
        if (convolved) window.fetch(p.taps, p.taps_bias, p.conv, vector, channel, p.channels);
#endif
    }
    DEVICE void fetch_sum(const Params& p) {
        if constexpr (ADD) {
            if (exists) sum = load(((const RES*)p.out)[vector * p.rows + row]);
        }
    }
    DEVICE void finish(const Params& p, float product) {
        if (!exists) return;
        float value = rounded(product + bias);
        const int64 at = vector * p.rows + row;
        if constexpr (ADD) {
            store((RES*)p.out + at, sum + value);
        } else {
#if TAPS
            if (convolved) value = window.push(value);
#endif
            store((IO*)p.out + at, value);
        }
    }
};

KERNEL(linear, THREADS, 2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / SPLIT;
    const int k = (int)p.k, pitch = (k + 7) / 8 * 8;
    IO* const vectors = (IO*)shared_memory;
    IO* const norm = vectors + B * pitch;                     // with a norm: its weights
    float* const partial = (float*)(norm + (NORM || GATED ? pitch : 0));  // twice WARPS x R x B
    float* const scratch = partial + 2 * WARPS * R * B;       // WARPS x B

    Stream stream;
    stream.k = k, stream.lane = warp % SPLIT * 32 + lane;
    stream.begin(p, blockIdx.x * (int64)ROWS + team * R);
    Output output;
    output.fetch(p, blockIdx.x);
    const IO* norm_weight = nullptr;
    if constexpr (NORM || GATED) norm_weight = stage(norm, p.norm, k);
    let_next_kernel_start();
    wait_for_earlier_kernels();
    output.fetch_sum(p);
    if constexpr (NORM) {
        const Source<RES> source{(RES*)p.input, nullptr, nullptr, norm_weight, p.input_stride, 0, 0, (int)p.batch, 1, k, (float)p.eps};
        normalise<B>(vectors, pitch, source, scratch);
    } else if constexpr (GATED) {
        const int groups = (int)p.groups;
        const Source<IO> source{(IO*)p.input, nullptr, p.gate, norm_weight, p.input_stride, 0, p.gate_stride,
                                (int)p.batch, groups, k / groups, (float)p.eps};
        normalise<B>(vectors, pitch, source, scratch);
    } else {
        bring<B>(vectors, pitch, (const IO*)p.input, p.input_stride, (int)p.batch, k);
    }
    clear<B>(vectors, pitch, (int)p.batch, k);
    block_barrier();

    float* here = partial;
    for (int64 set = blockIdx.x; set < p.sets; set += p.blocks) {
        float sums[R * B];
        stream.multiply(sums, vectors, pitch);
        const int64 next = set + p.blocks;
        if (next < p.sets) stream.begin(p, next * ROWS + team * R);
        const int first = sum_lanes<R * B, 1, 32>(sums, lane);
#pragma unroll
        for (int i = 0; i < (R * B > 32 ? R * B / 32 : 1); i++) here[warp * R * B + first + i] = sums[i];
        block_barrier();
        if (threadIdx.x < ROWS * B) {
            const int row = threadIdx.x % ROWS, b = threadIdx.x / ROWS;
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < SPLIT; s++) sum += here[(row / R * SPLIT + s) * R * B + row % R * B + b];
            output.finish(p, sum);
            if (next < p.sets) output.fetch(p, next), output.fetch_sum(p);
        }
        here = here == partial ? partial + WARPS * R * B : partial;  // the other half: nobody still reads it
    }
}
