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

// Raw step sizes of the block's channels and rows.
DEVICE void project(float (&steps)[MOST_ROWS][CHANNELS], const Params& p, int64 first, int64 row0, int rows) {
    const int c = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, rank = (int)p.rank;
    const int64 channel = first + c < p.d ? first + c : p.d - 1;
    const IO* const weights = p.dt_weight + channel * rank;
    Words4 ahead[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) ahead[u] = load_weights(weights + (lane + u * TEAM) * VEC, rank - (lane + u * TEAM) * VEC);
    let_next_kernel_start();
    wait_for_earlier_kernels();
    float sums[MOST_ROWS];
#pragma unroll
    for (int b = 0; b < MOST_ROWS; b++) sums[b] = 0.0f;
    for (int load0 = lane; load0 * VEC < rank; load0 += AHEAD * TEAM) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int at = (load0 + u * TEAM) * VEC;
            if (at >= rank) continue;
            float w[VEC];
            unpack16<VEC, IO>(w, ahead[u]);
            ahead[u] = load_weights(weights + at + AHEAD * TEAM * VEC, rank - at - AHEAD * TEAM * VEC);
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

// One channel of one row of the batch, and a thread's share of its states.
struct Item {
    int c, b;                                 // channel of the block, row of the block
    bool exists;
    States<STATE> h;
    States<float> rates;

    DEVICE void fetch(const Params& p, int number, int64 first, int64 row0, int rows, int q) {
        c = number % CHANNELS, b = number / CHANNELS;
        exists = b < rows && first + c < p.d;
        if (!exists) return;
        h = read_states(p.state + ((row0 + b) * p.d + first + c) * p.n, q, (int)p.n);
        rates = read_states(p.A_log + (first + c) * p.n, q, (int)p.n);
    }

    // Move the states on; the thread's part of the output.
    DEVICE float step(const Params& p, int64 row, int64 channel, float raw, float x, int q) {
        const float dt = softplus<sizeof(IO) == 4>(raw + p.dt_bias[channel]);
        const IO *B = p.B + row * p.BC_b + q * NPT, *C = p.C + row * p.BC_b + q * NPT;
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
};

KERNEL(scan, SCAN_THREADS, 4) {
    const int64 block = blockIdx.x % p.channel_blocks, row0 = blockIdx.x / p.channel_blocks * p.rows;
    const int64 first = block * CHANNELS;
    const int rows = (int)(p.batch - row0 < p.rows ? p.batch - row0 : p.rows);
    auto& steps = *(float (*)[MOST_ROWS][CHANNELS])shared_memory;
    const int q = threadIdx.x % LANES, own = threadIdx.x / LANES;
    Item items[PASSES];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) items[i].fetch(p, base + own + i * AT_ONCE, first, row0, rows, q);
    };
    fetch(0);
    if constexpr (RANK) {
        project(steps, p, first, row0, rows);
        block_barrier();
    } else {
        let_next_kernel_start();
        wait_for_earlier_kernels();
    }
    for (int base = 0; base < rows * CHANNELS; base += AT_ONCE * PASSES) {
        if (base > 0) fetch(base);
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            Item& item = items[i];
            const int64 row = row0 + item.b, channel = first + item.c;
            float y[1] = {0.0f}, x = 0.0f;
            if (item.exists) {
                x = load(p.x[row * p.x_b + channel]);
                const float raw = RANK ? steps[item.b][item.c] : load(p.dt[row * p.dt_b + channel]);
                y[0] = item.step(p, row, channel, raw, x, q);
            }
            sum_lanes<1, 1, LANES>(y, (int)threadIdx.x % 32);  // of all threads: idle ones add nothing
            if (item.exists && q == 0) {
                const float out = (y[0] + p.D[channel] * x) * silu(load(p.z[row * p.z_b + channel]));
                store(p.y + row * p.d + channel, out);
            }
        }
    }
}
