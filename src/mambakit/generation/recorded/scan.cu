// One token of Mamba-1's recurrence: the step size from its bottleneck, the states moved on, the output gated.
//
// A block owns 16 channels of some rows of the batch. With RANK, 8 lanes each take one channel's product for the
// step size; otherwise the raw step sizes are given. Then LANES threads hold NPT states each of one channel.
//
// Settings: NPT, LANES, PASSES (channels of a thread at once), RANK (whether `dt` is the bottleneck and `dt_weight` is applied here), WHOLE_N (no padded
// states), STATE (the states' type).

struct Params {
    const IO *x, *z, *dt, *B, *C;             // rows x_b, z_b, dt_b, BC_b apart
    const IO* dt_weight;                      // (d, rank)
    const float *dt_bias, *A_log, *D;         // (d), (d, n), (d)
    STATE* state;                             // (batch, d, n)
    IO* y;                                    // (batch, d)
    int64 x_b, z_b, dt_b, BC_b, batch, d, n, rank, rows, channel_blocks;
};

constexpr int CHANNELS = 16;
constexpr int MOST_ROWS = 8;                  // of the batch, in a block
constexpr int SCAN_THREADS = 128;
constexpr int TEAM = SCAN_THREADS / CHANNELS; // lanes of one channel's product
constexpr int AHEAD = 3;
constexpr int AT_ONCE = SCAN_THREADS / LANES; // channels, of one row or several

template <typename T> struct alignas(sizeof(T) * NPT <= 16 ? sizeof(T) * NPT : 16) States { T v[NPT]; };

// The states (or rates) of one channel and lane.
template <typename T>
DEVICE States<T> read_states(const T* channel, int q, int n) {
    States<T> found{};
    if constexpr (WHOLE_N) {
        found = *(const States<T>*)(channel + q * NPT);
    } else {
#pragma unroll
        for (int i = 0; i < NPT; i++)
            if (q * NPT + i < n) found.v[i] = channel[q * NPT + i];
    }
    return found;
}

// One channel's product for the step sizes, by TEAM lanes.
struct Projection {
    Words4 ahead[AHEAD];
    const IO* weights;
    int lane, c, rank;

    DEVICE Words4 read(int at) const { return load_weights(weights + at, rank - at); }
    DEVICE void fetch(const Params& p, int64 first) {
        c = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, rank = (int)p.rank;
        weights = p.dt_weight + (first + c < p.d ? first + c : p.d - 1) * rank;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) ahead[u] = read((lane + u * TEAM) * VEC);
    }
    DEVICE void multiply(float (&steps)[MOST_ROWS][CHANNELS], const Params& p, int64 row0, int rows) {
        float sums[MOST_ROWS];
#pragma unroll
        for (int b = 0; b < MOST_ROWS; b++) sums[b] = 0.0f;
        for (int begin = lane * VEC; begin < rank; begin += AHEAD * TEAM * VEC) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int at = begin + u * TEAM * VEC;
                if (at >= rank) continue;
                float w[VEC];
                unpack16<VEC, IO>(w, ahead[u]);
                ahead[u] = read(at + AHEAD * TEAM * VEC);
#pragma unroll
                for (int b = 0; b < MOST_ROWS; b++) {
                    if (b >= rows) continue;
                    const IO* const from = p.dt + (row0 + b) * p.dt_b + at;
#pragma unroll
                    for (int i = 0; i < VEC; i++)
                        if (at + i < rank) sums[b] += w[i] * load(from[i]);
                }
            }
        }
#pragma unroll
        for (int b = 0; b < MOST_ROWS; b++) {
            if (b >= rows) continue;
            float sum[1] = {sums[b]};
            sum_lanes<1, 1, TEAM>(sum, lane);
            steps[b][c] = rounded(sum[0]);
        }
    }
};

// One channel of one row of the batch, and a thread's share of its states: `fetch` ahead of everything, `fetch_inputs`
// behind earlier kernels.
struct Item {
    int c, b, q;                              // channel of the block, row of the block, lane of the channel
    bool exists;
    int64 row, channel;
    States<STATE> h;
    States<float> rates;
    float bias, skip, x, z, raw;
    IO B[NPT], C[NPT];

    DEVICE void fetch(const Params& p, int number, int64 first, int64 row0, int rows) {
        c = number % CHANNELS, b = number / CHANNELS, q = threadIdx.x % LANES;
        row = row0 + b, channel = first + c;
        exists = b < rows && channel < p.d;
        if (!exists) return;
        h = read_states(p.state + (row * p.d + channel) * p.n, q, (int)p.n);
        rates = read_states(p.A_log + channel * p.n, q, (int)p.n);
        bias = p.dt_bias[channel], skip = p.D[channel];
    }
    DEVICE void fetch_inputs(const Params& p) {
        if (!exists) return;
        x = load(p.x[row * p.x_b + channel]), z = load(p.z[row * p.z_b + channel]);
        if constexpr (!RANK) raw = load(p.dt[row * p.dt_b + channel]);
        const IO *from_B = p.B + row * p.BC_b + q * NPT, *from_C = p.C + row * p.BC_b + q * NPT;
#pragma unroll
        for (int i = 0; i < NPT; i++)
            if (WHOLE_N || q * NPT + i < p.n) B[i] = from_B[i], C[i] = from_C[i];
    }

    // Move the states on; the thread's part of the output.
    DEVICE float step(const Params& p) {
        if (!exists) return 0.0f;
        const float dt = softplus<sizeof(IO) == 4>(raw + bias);
        STATE* const to = p.state + (row * p.d + channel) * p.n + q * NPT;
        float y = 0.0f;
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            if (!WHOLE_N && q * NPT + i >= p.n) continue;
            const float rate = -LOG2E * exp2_fast(LOG2E * rates.v[i]);
            const float next = exp2_fast(dt * rate) * load(h.v[i]) + dt * x * load(B[i]);
            y += next * load(C[i]);
            store(&h.v[i], next);
            if constexpr (!WHOLE_N) to[i] = h.v[i];
        }
        if constexpr (WHOLE_N) *(States<STATE>*)to = h;
        return y;
    }
    DEVICE void finish(const Params& p, float y) {
        if (exists && q == 0) store(p.y + row * p.d + channel, (y + skip * x) * silu(z));
    }
};

KERNEL(scan, SCAN_THREADS, 4) {
    const int64 row0 = blockIdx.x / p.channel_blocks * p.rows, first = blockIdx.x % p.channel_blocks * CHANNELS;
    const int rows = (int)(p.batch - row0 < p.rows ? p.batch - row0 : p.rows), own = threadIdx.x / LANES;
    auto& steps = *(float (*)[MOST_ROWS][CHANNELS])shared_memory;
    Item items[PASSES];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) items[i].fetch(p, base + own + i * AT_ONCE, first, row0, rows);
    };
    const auto fetch_inputs = [&] {
#pragma unroll
        for (int i = 0; i < PASSES; i++) items[i].fetch_inputs(p);
    };
    Projection projection;
    fetch(0);
    if constexpr (RANK) projection.fetch(p, first);
    let_next_kernel_start();
    wait_for_earlier_kernels();
    fetch_inputs();
    if constexpr (RANK) {
        projection.multiply(steps, p, row0, rows);
        block_barrier();
    }
    for (int base = 0; base < rows * CHANNELS; base += AT_ONCE * PASSES) {
        if (base > 0) fetch(base), fetch_inputs();
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            Item& item = items[i];
            if constexpr (RANK) {
                if (item.exists) item.raw = steps[item.b][item.c];
            }
            float y[1] = {item.step(p)};
            sum_lanes<1, 1, LANES>(y, (int)threadIdx.x % 32);  // of all threads: idle ones add nothing
            item.finish(p, y[0]);
        }
    }
}
