// One token of Mamba-1's recurrence: the step size from its bottleneck, the states moved on, the output gated.
//
// A block owns 16 channels of up to 8 rows of the batch. Their step sizes are a small product: of 16-bit numbers by the
// tensor cores, two warps for each 8 channels, otherwise by 8 lanes for each channel. Then a thread prepares what one
// channel in one row needs, once, in shared memory. Then LANES threads hold NPT states each of one channel in one row,
// and go on to the next. States are asked for at the very beginning.
//
// Settings: NPT, LANES, PASSES (channels of a thread at once), WHOLE_N (no padded states), STATE (the states' type), BLOCKS
// (of a multiprocessor at least: so few registers may a thread have).

struct Params {
    const IO *x, *z, *dt, *B, *C;             // rows x_b, z_b, dt_b, BC_b apart
    const IO* dt_weight;                      // (d, rank)
    const float *dt_bias, *A_log, *D;         // (d), (d, n), (d)
    STATE* state;                             // (batch, d, n)
    IO* y;                                    // (batch, d)
    int64 x_b, z_b, dt_b, BC_b, batch, d, n, rank, channel_blocks;
};

constexpr int CHANNELS = 16;
constexpr int MOST_ROWS = 8;                  // of the batch, in a block
constexpr int SCAN_THREADS = 128;
constexpr int TEAM = SCAN_THREADS / CHANNELS; // lanes of one channel's product
constexpr int AHEAD = 3;
constexpr int AT_ONCE = SCAN_THREADS / LANES; // channels, of one row or several
constexpr bool SAME = AT_ONCE % CHANNELS == 0;// a thread's channel is the same in all rows
constexpr bool TENSOR = sizeof(IO) == 2;
constexpr int HALVES = TENSOR ? 2 : 1;        // parts of a sum

using Steps = float[HALVES][MOST_ROWS][CHANNELS];

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

// The step sizes by the tensor cores, with the rows of the batch as rows: a warp takes 8 channels and every second 32
// columns, a lane 16 bytes of one channel's and of one row's.
template <typename T>
struct TensorProjection {
    Words4 ahead[AHEAD], x[AHEAD];
    const IO* weights;
    int rank, column, first;                  // of the warp's steps

    DEVICE Words4 read(int step) const {
        const int at = step * 32 + column;
        return load_weights(weights + at, rank - at);
    }
    // The same of what earlier kernels have written.
    DEVICE static Words4 read_vectors(const T* from, int left) {
        if constexpr (ALIGNED) return load16_fresh(from);
        else return load_weights(from, left);
    }
    DEVICE void fetch(const Params& p, int64 channel) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        channel += warp % 2 * 8 + lane / 4;
        weights = p.dt_weight + (channel < p.d ? channel : p.d - 1) * p.rank;
        rank = (int)p.rank, column = lane % 4 * 8, first = warp / 2;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) ahead[u] = read(first + 2 * u);
    }
    DEVICE void fetch_inputs(const Params& p, int64 row0, int rows, int begin) {
        const int b = (int)(threadIdx.x % 32 / 4);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int at = (begin + 2 * u) * 32 + column;
            x[u] = Words4{0, 0, 0, 0};
            if (b < rows && at < rank) x[u] = read_vectors(p.dt + (row0 + b) * p.dt_b + at, rank - at);
        }
    }
    DEVICE void fetch_inputs(const Params& p, int64 row0, int rows) { fetch_inputs(p, row0, rows, first); }
    DEVICE void multiply(Steps& steps, const Params& p, int64 row0, int rows) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = lane / 4;
        float sums[4] = {};
        for (int begin = first;;) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const Words4 w = ahead[u];
                multiply_tile(sums, {x[u].x, 0, x[u].y, 0}, w.x, w.y, T{});
                multiply_tile(sums, {x[u].z, 0, x[u].w, 0}, w.z, w.w, T{});
            }
            begin += 2 * AHEAD;
            if (begin * 32 >= rank) break;
#pragma unroll
            for (int u = 0; u < AHEAD; u++) ahead[u] = read(begin + 2 * u);
            fetch_inputs(p, row0, rows, begin);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) steps[warp / 2][b][warp % 2 * 8 + lane % 4 * 2 + i] = sums[i];
    }
};

// The same by TEAM lanes for each channel.
struct LaneProjection {
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
    DEVICE void fetch_inputs(const Params&, int64, int) {}
    DEVICE void multiply(Steps& steps, const Params& p, int64 row0, int rows) {
        float sums[MOST_ROWS] = {};
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
            steps[0][b][c] = sum[0];
        }
    }
};

template <typename T> struct Projection { using type = TensorProjection<T>; };
template <> struct Projection<float> { using type = LaneProjection; };

// What everybody needs to know of a channel in a row: step size, and its product with the input.
struct alignas(8) Prepared { float dt, input; };

struct Shared {
    Steps steps;                              // later the sums over states, in the first part
    Prepared prepared[MOST_ROWS][CHANNELS];
    alignas(16) float BC[1];                  // rows of B and C, LANES x NPT numbers each, zero where there are none
};

constexpr int STATES = LANES * NPT;

// One channel in one row of the batch, and a thread's share of its states.
struct Item {
    int b, c;                                 // of the block
    bool exists;
    STATE* place;
    States<STATE> h;

    DEVICE void fetch(STATE* states, unsigned number, int rows, int channels, int d, int n) {
        c = (int)(number % CHANNELS), b = (int)(number / CHANNELS), exists = b < rows && c < channels;
        place = states + b * (d * n) + c * n;
        if (exists) h = read_states((const STATE*)place, (int)(threadIdx.x % LANES), n);
    }
    // Move the states on; the thread's part of the output.
    DEVICE float step(const Shared& shared, const float (&rates)[NPT], int n) {
        if (!exists) return 0.0f;
        const int first = (int)(threadIdx.x % LANES) * NPT;
        const Prepared mine = shared.prepared[b][c];
        const float *B = shared.BC + 2 * b * STATES + first, *C = B + STATES;
        float y = 0.0f;
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            if (!WHOLE_N && first + i >= n) continue;
            const float next = exp2_fast(mine.dt * rates[i]) * load(h.v[i]) + mine.input * B[i];
            y += next * C[i];
            store(&h.v[i], next);
            if constexpr (!WHOLE_N) place[first + i] = h.v[i];
        }
        if constexpr (WHOLE_N) *(States<STATE>*)(place + first) = h;
        return y;
    }
};

// A thread's rates of one channel: logarithms as they are kept, and rates times log2(e).
DEVICE States<float> read_logarithms(const Params& p, int channel) {
    return read_states(p.A_log + (int64)channel * p.n, (int)(threadIdx.x % LANES), (int)p.n);
}
DEVICE void make_rates(float (&rates)[NPT], const States<float>& logarithms) {
#pragma unroll
    for (int i = 0; i < NPT; i++) rates[i] = -LOG2E * exp2_fast(LOG2E * logarithms.v[i]);
}

KERNEL(scan, SCAN_THREADS, BLOCKS) {
    let_next_kernel_start();
    const unsigned channel_blocks = (unsigned)p.channel_blocks;
    const int row0 = (int)(blockIdx.x / channel_blocks) * MOST_ROWS, first = (int)(blockIdx.x % channel_blocks) * CHANNELS;
    const int batch = (int)p.batch, d = (int)p.d, n = (int)p.n, own = (int)(threadIdx.x / LANES);
    const int rows = batch - row0 < MOST_ROWS ? batch - row0 : MOST_ROWS;
    const int channels = d - first < CHANNELS ? d - first : CHANNELS;
    Shared& shared = *(Shared*)shared_memory;
    STATE* const states = p.state + ((int64)row0 * d + first) * n;
    // Of one channel in one row, and whether there is one.
    const int b = (int)(threadIdx.x / CHANNELS), c = (int)(threadIdx.x % CHANNELS);
    const bool mine = b < rows && c < channels;
    const int64 row = row0 + b;
    const int channel = first + c;

    Item items[PASSES];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int i = 0; i < PASSES; i++)
            items[i].fetch(states, base + own + i * AT_ONCE, rows, channels, d, n);
    };
    fetch(0);
    typename Projection<IO>::type projection;
    projection.fetch(p, first);
    float bias = 0.0f, skip = 0.0f, x = 0.0f, z = 0.0f;
    States<float> logarithms{};
    if (SAME && own % CHANNELS < channels) logarithms = read_logarithms(p, first + own % CHANNELS);
    if (mine) bias = p.dt_bias[channel], skip = p.D[channel];
    wait_for_earlier_kernels();
    if (mine) x = load(p.x[row * p.x_b + channel]), z = load(p.z[row * p.z_b + channel]);
    projection.fetch_inputs(p, row0, rows);
    // All reads first: what is stored to shared memory waits for them.
    constexpr int EACH = (MOST_ROWS * 2 * STATES + SCAN_THREADS - 1) / SCAN_THREADS;
    IO BC[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const unsigned number = i * SCAN_THREADS + threadIdx.x;
        const int s = (int)(number % STATES), of = (int)(number / (2 * STATES));
        BC[i] = IO{};
        if (of < rows && s < n) BC[i] = (number / STATES % 2 ? p.C : p.B)[(row0 + of) * p.BC_b + s];
    }
    keep_order();
    projection.multiply(shared.steps, p, row0, rows);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const unsigned number = i * SCAN_THREADS + threadIdx.x;
        if (number < MOST_ROWS * 2 * STATES) shared.BC[number] = load(BC[i]);
    }
    block_barrier();
    if (mine) {
        float raw = shared.steps[0][b][c];
        if constexpr (HALVES == 2) raw += shared.steps[1][b][c];
        const float dt = softplus<sizeof(IO) == 4>(rounded(raw) + bias);
        shared.prepared[b][c] = {dt, dt * x};
    }
    block_barrier();
    float rates[NPT];
    make_rates(rates, logarithms);
    for (int base = 0; base < rows * CHANNELS; base += AT_ONCE * PASSES) {
        if (base > 0) fetch(base);
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            Item& item = items[i];
            if (!SAME && item.exists) make_rates(rates, read_logarithms(p, first + item.c));
            float y[1] = {item.step(shared, rates, n)};
            sum_lanes<1, 1, LANES>(y, (int)threadIdx.x % 32);  // of all threads: idle ones add nothing
            if (item.exists && threadIdx.x % LANES == 0) shared.steps[0][item.b][item.c] = y[0];
        }
    }
    block_barrier();
    if (mine) store(p.y + row * d + channel, (shared.steps[0][b][c] + skip * x) * silu(z));
}
