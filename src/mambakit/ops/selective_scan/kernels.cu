// The selective scan on a GPU: forward and backward in one pass over their inputs each.
//
// LANES neighbouring threads share a channel, each with NPT of its states in registers; a block owns CHANNELS
// channels of one row and walks through the tokens of its segment in tiles of T. A tile is brought to shared
// memory ahead of time (copies that pass no register), converted once per element to (step size, step size x
// input), and scanned token by token; sums over states and channels cross lanes by halving (sum_lanes).
//
// Where rows x channels fill no GPU, time is split into segments. `summarise` gives each segment's own final
// state and total decay, and every block then folds those before its own. It walks a segment from its end and
// stops where all decays since have fallen below float's smallest number, so that it mostly reads a fraction of
// the tokens. The backward pass does the same from the other side.
//
// The backward pass recomputes states from one checkpoint per tile, SUB tokens at a time: those states and their
// decays stay in registers until the gradient has come back through them.
//
// Settings of a compilation: IO (float, bf16, half), NPT, LANES, ALIGNED and ALIGNED_BC (16-byte accesses are
// possible), PACKED (seq_idx given), GATED (z given), SOFTPLUS, and one of the kernels' names.

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int CHANNELS = THREADS / LANES;
constexpr int NP = LANES * NPT;                   // states of a channel, padded
constexpr int T = LANES <= 4 ? 8 * LANES : 32;    // tokens of a tile
constexpr int SUB = 8;                            // tokens whose states the backward pass holds at once
constexpr int PITCH = CHANNELS + 8;               // row of a tile of floats: rows start in different banks
constexpr int TILE = T * CHANNELS;
constexpr bool EXACT = sizeof(IO) == 4;
constexpr float GONE = -150.0f;                   // 2 to this power is zero in float

struct Params {
    // Activations (b, l, d) and (b, l, g, n), with strides in elements; the last axis is contiguous.
    const IO *x, *dt, *z, *dy, *B, *C;
    IO *y, *dx, *ddt, *dz;                        // contiguous
    const float *A, *D, *dt_bias, *initial, *dfinal;
    const int* seq_idx;
    float *final, *checkpoints;                   // (b, d, n); (b, tiles, d, n) or null
    float *local, *passed;                        // summaries (b, segments, d, n): own state, total decay
    float *dA, *dD, *ddt_bias, *dinitial;         // per (b, segment): (..., d, n), (..., d), (..., d); (b, d, n)
    float *dB, *dC;                               // (b, l, g, n), or one such per channel block if `partial`
    int64 x_b, x_l, dt_b, dt_l, z_b, z_l, dy_b, dy_l, B_b, B_l, B_g, C_b, C_l, C_g;
    int64 batch, length, d, n, groups, segment, segments, partial;
};

struct alignas(8) Pair { float a, b; };
template <int N> struct alignas(N >= 4 ? 16 : 4 * N) Floats { float v[N]; };
typedef Floats<NPT> States;

// Where a block works, and where its thread does.
struct Place {
    int64 row, segment, start, stop;              // batch row, segment, its tokens
    int group, block, first, columns;             // group, block in the group, first channel, channels
    int lane, q, c;                               // lane of the warp, lane of the channel, channel of the block
    bool owns;                                    // whether the thread's channel exists

    DEVICE explicit Place(const Params& p) {
        const int per_group = (int)(p.d / p.groups), blocks = (per_group + CHANNELS - 1) / CHANNELS;
        int64 rest = blockIdx.x;
        block = (int)(rest % blocks), rest /= blocks;
        group = (int)(rest % p.groups), rest /= p.groups;
        segment = rest % p.segments, row = rest / p.segments;
        first = group * per_group + block * CHANNELS;
        columns = per_group - block * CHANNELS < CHANNELS ? per_group - block * CHANNELS : CHANNELS;
        start = segment * p.segment;
        stop = start + p.segment < p.length ? start + p.segment : p.length;
        lane = threadIdx.x % 32, q = threadIdx.x % LANES, c = threadIdx.x / LANES;
        owns = c < columns;
    }
    DEVICE int64 states(const Params& p, int64 outer) const {  // offset of the thread's states in (outer, d, n)
        return (outer * p.d + first + c) * p.n + q * NPT;
    }
    DEVICE const IO* at(const IO* base, int64 by_row, int64 by_token, int64 token) const {
        return base + row * by_row + token * by_token;
    }
};

DEVICE States load_states(const Params& p, const Place& at, const float* from, int64 outer) {
    States s;
#pragma unroll
    for (int i = 0; i < NPT; i++)
        s.v[i] = from && at.owns && at.q * NPT + i < p.n ? from[at.states(p, outer) + i] : 0.0f;
    return s;
}

DEVICE void store_states(const Params& p, const Place& at, float* to, int64 outer, const States& s) {
    if (!to || !at.owns) return;
#pragma unroll
    for (int i = 0; i < NPT; i++)
        if (at.q * NPT + i < p.n) to[at.states(p, outer) + i] = s.v[i];
}

// Decay rates in powers of two per unit of time.
DEVICE States load_rates(const Params& p, const Place& at) {
    States rates = load_states(p, at, p.A, 0);
#pragma unroll
    for (int i = 0; i < NPT; i++) rates.v[i] *= LOG2E;
    return rates;
}

// The state (or gradient) that enters a segment: fold the summaries from `begin` towards `end`.
DEVICE States fold(const Params& p, const Place& at, States s, int64 begin, int64 end, int step) {
    for (int64 j = begin; j != end; j += step) {
        const States own = load_states(p, at, p.local, at.row * p.segments + j);
        const States decay = load_states(p, at, p.passed, at.row * p.segments + j);
#pragma unroll
        for (int i = 0; i < NPT; i++) s.v[i] = decay.v[i] == 0.0f ? own.v[i] : decay.v[i] * s.v[i] + own.v[i];
    }
    return s;
}

// Bring `rows` rows of `columns` <= ROW elements to shared memory; complete after copies_wait and a barrier.
template <int ROW, bool VECTORS>
DEVICE void stage(IO* to, const IO* from, int64 stride, int rows, int columns) {
    constexpr int STEP = 16 / sizeof(IO), CHUNKS = ROW / STEP > 0 ? ROW / STEP : 1;
    if constexpr (VECTORS && ROW % STEP == 0) {
        for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, column = i % CHUNKS * STEP;
            if (column < columns) copy16_async(to + row * ROW + column, from + row * stride + column);
        }
    } else {
        for (int i = threadIdx.x; i < rows * ROW; i += THREADS) {
            const int row = i / ROW, column = i % ROW;
            if (column < columns) to[i] = from[row * stride + column];
        }
    }
}

// Eight elements of a tile, of which the first `count` exist in global memory.
DEVICE void write8(IO* to, const float (&values)[8], int count) {
    if constexpr (ALIGNED) {
        store8(to, values);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (j < count) store(to + j, values[j]);
    }
}

DEVICE float step_size(float raw) {
    if constexpr (SOFTPLUS) return softplus<EXACT>(raw);
    return raw;
}

// Whether a token begins a document that the state before it does not belong to.
DEVICE int begins(const Params& p, const Place& at, int64 token) {
    return token > 0 && p.seq_idx[at.row * p.length + token] != p.seq_idx[at.row * p.length + token - 1];
}

// Shared memory after the staged tiles: per token and channel a pair, B and C, and small vectors.
struct Tile {
    Pair* pairs;       // [T][PITCH]: (step size, step size x input)
    float* BC;         // [T][2][NP]
    int* fresh;        // [T]: begins a document
    float *skip, *bias;  // [CHANNELS]

    DEVICE explicit Tile(unsigned char* memory) {
        pairs = (Pair*)memory;
        BC = (float*)(pairs + T * PITCH);
        fresh = (int*)(BC + T * 2 * NP);
        skip = (float*)(fresh + T);
        bias = skip + CHANNELS;
    }
    static constexpr int BYTES = T * PITCH * 8 + T * 2 * NP * 4 + T * 4 + 2 * CHANNELS * 4;

    DEVICE void constants(const Params& p, const Place& at) {
        for (int c = threadIdx.x; c < at.columns; c += THREADS) {
            skip[c] = p.D ? p.D[at.first + c] : 0.0f;
            bias[c] = p.dt_bias ? p.dt_bias[at.first + c] : 0.0f;
        }
    }
    // B and C as floats, zero where there is no token or state, and the documents' first tokens.
    template <typename From>
    DEVICE void tokens(const Params& p, const Place& at, int64 begin, int valid, From from) {
        for (int i = threadIdx.x; i < T * 2 * NP; i += THREADS) {
            const int t = i / (2 * NP), which = i / NP % 2, state = i % NP;
            BC[i] = t < valid && state < p.n ? load(from(which, t, state)) : 0.0f;
        }
        if constexpr (PACKED)
            for (int t = threadIdx.x; t < T; t += THREADS) fresh[t] = t < valid && begins(p, at, begin + t);
    }
};

DEVICE States read_states(const float* from) { return *(const States*)from; }

// =========================================================================================================
#ifdef KERNEL_forward

constexpr int STREAMS = 2 + GATED;

KERNEL(forward, THREADS, 4) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, (z)][T][CHANNELS]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    tile.constants(p, at);
    const States rates = load_rates(p, at);
    States h = fold(p, at, load_states(p, at, p.initial, at.row), 0, at.segment, 1);

    const auto fetch = [&](int64 begin, int stage_number) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        IO* to = raw + stage_number * STREAMS * TILE;
        IO* to_BC = raw_BC + stage_number * 2 * T * NP;
        stage<CHANNELS, ALIGNED>(to, at.at(p.x, p.x_b, p.x_l, begin) + at.first, p.x_l, valid, at.columns);
        stage<CHANNELS, ALIGNED>(to + TILE, at.at(p.dt, p.dt_b, p.dt_l, begin) + at.first, p.dt_l, valid, at.columns);
        if constexpr (GATED)
            stage<CHANNELS, ALIGNED>(to + 2 * TILE, at.at(p.z, p.z_b, p.z_l, begin) + at.first, p.z_l, valid, at.columns);
        stage<NP, ALIGNED_BC>(to_BC, at.at(p.B, p.B_b, p.B_l, begin) + at.group * p.B_g, p.B_l, valid, (int)p.n);
        stage<NP, ALIGNED_BC>(to_BC + T * NP, at.at(p.C, p.C_b, p.C_l, begin) + at.group * p.C_g, p.C_l, valid, (int)p.n);
        copies_commit();
    };
    fetch(at.start, 0);
    int now = 0;
    for (int64 begin = at.start; begin < at.stop; begin += T, now ^= 1) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        copies_wait<0>();
        block_barrier();
        if (begin + T < at.stop) fetch(begin + T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;
        if (p.checkpoints) {
            const int64 tiles = (p.length + T - 1) / T;
            store_states(p, at, p.checkpoints, at.row * tiles + begin / T, h);
        }

        for (int i = threadIdx.x; i < TILE / 8; i += THREADS) {
            const int t = i / (CHANNELS / 8), k = i % (CHANNELS / 8) * 8;
            float x[8], dt[8];
            load8(x, x_raw + t * CHANNELS + k);
            load8(dt, x_raw + TILE + t * CHANNELS + k);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = t < valid && k + j < at.columns;
                const float step = exists ? step_size(dt[j] + tile.bias[k + j]) : 0.0f;
                tile.pairs[t * PITCH + k + j] = Pair{step, exists ? step * x[j] : 0.0f};
            }
        }
        tile.tokens(p, at, begin, valid, [&](int which, int t, int state) { return BC_raw[(which * T + t) * NP + state]; });
        block_barrier();

#pragma unroll 1
        for (int t0 = 0; t0 < T; t0 += LANES < 4 ? 4 : LANES) {
#pragma unroll
            for (int t1 = 0; t1 < (LANES < 4 ? 4 : LANES); t1 += LANES) {
                float sums[LANES];
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    const int t = t0 + t1 + j;
                    const Pair in = tile.pairs[t * PITCH + at.c];
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t];
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < NPT; i++) {
                        const float before = fresh ? 0.0f : h.v[i];
                        h.v[i] = exp2_fast(in.a * rates.v[i]) * before + in.b * B.v[i];
                        sum += h.v[i] * C.v[i];
                    }
                    sums[j] = sum;
                }
                const int own = sum_lanes<LANES, 1, LANES>(sums, at.lane);
                tile.pairs[(t0 + t1 + own) * PITCH + at.c].a = sums[0];  // read by all lanes of the channel already
            }
        }
        block_barrier();

        for (int i = threadIdx.x; i < TILE / 8; i += THREADS) {
            const int t = i / (CHANNELS / 8), k = i % (CHANNELS / 8) * 8;
            if (t >= valid || k >= at.columns) continue;
            float x[8], z[8], y[8];
            load8(x, x_raw + t * CHANNELS + k);
            if constexpr (GATED) load8(z, x_raw + 2 * TILE + t * CHANNELS + k);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                y[j] = tile.pairs[t * PITCH + k + j].a;
                if (k + j < at.columns) y[j] += tile.skip[k + j] * x[j];
                if constexpr (GATED) y[j] *= z[j] * sigmoid(z[j]);
            }
            write8(p.y + (at.row * p.length + begin + t) * p.d + at.first + k, y, at.columns - k);
        }
    }
    if (at.segment == p.segments - 1) store_states(p, at, p.final, at.row, h);
}
#endif

// =========================================================================================================
// What a segment does on its own: the state it leaves behind and how much it keeps of the one that enters; or,
// for the backward pass, the same of the gradient that enters at its end.
#if defined(KERNEL_summarise) || defined(KERNEL_summarise_backward)
#ifdef KERNEL_summarise
constexpr bool FORWARD = true;
#define SUMMARISE summarise
#else
constexpr bool FORWARD = false;
#define SUMMARISE summarise_backward
#endif

KERNEL(SUMMARISE, THREADS, 4) {
    const Place at(p);
    Tile tile(shared_memory);
    tile.constants(p, at);
    const States rates = load_rates(p, at);
    States own{};
    float since = 0.0f;  // time between the tokens seen and the border that matters
    bool cut = false;    // a document border lies between
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    for (int64 number = 0; number < tiles; number++) {
        const int64 begin = at.start + (FORWARD ? tiles - 1 - number : number) * T;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        block_barrier();
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
            const int t = i / CHANNELS, k = i % CHANNELS;
            Pair pair{0.0f, 0.0f};
            if (t < valid && k < at.columns) {
                const int c = at.first + k;
                const int64 token = begin + t;
                pair.a = step_size(load(at.at(p.dt, p.dt_b, p.dt_l, token)[c]) + tile.bias[k]);
                if (FORWARD) {
                    pair.b = pair.a * load(at.at(p.x, p.x_b, p.x_l, token)[c]);
                } else {
                    pair.b = load(at.at(p.dy, p.dy_b, p.dy_l, token)[c]);
                    if constexpr (GATED) {
                        const float z = load(at.at(p.z, p.z_b, p.z_l, token)[c]);
                        pair.b *= z * sigmoid(z);
                    }
                }
            }
            tile.pairs[t * PITCH + k] = pair;
        }
        tile.tokens(p, at, begin, valid, [&](int which, int t, int state) {
            return which ? at.at(p.C, p.C_b, p.C_l, begin + t)[at.group * p.C_g + state]
                         : at.at(p.B, p.B_b, p.B_l, begin + t)[at.group * p.B_g + state];
        });
        block_barrier();
#pragma unroll 4
        for (int s = 0; s < T; s++) {
            const int t = FORWARD ? T - 1 - s : s;
            const Pair in = tile.pairs[t * PITCH + at.c];
            const States weight = read_states(tile.BC + t * 2 * NP + (FORWARD ? 0 : NP) + at.q * NPT);
            if (!FORWARD && PACKED && tile.fresh[t]) cut = true;
            if (!FORWARD) since += in.a;  // the state that enters has decayed by this token, too
            if (!(PACKED && cut)) {
#pragma unroll
                for (int i = 0; i < NPT; i++) own.v[i] += exp2_fast(since * rates.v[i]) * (in.b * weight.v[i]);
            }
            if (FORWARD) since += in.a;
            if (FORWARD && PACKED && tile.fresh[t]) cut = true;
        }
        // Steps are never negative after a softplus: what has vanished stays so.
        bool gone = PACKED && cut;
        if (SOFTPLUS && !gone) {
            gone = true;
#pragma unroll
            for (int i = 0; i < NPT; i++) gone = gone && (at.q * NPT + i >= p.n || since * rates.v[i] < GONE);
        }
        if (block_all(gone || !at.owns)) break;
    }
    States decay;
#pragma unroll
    for (int i = 0; i < NPT; i++) decay.v[i] = PACKED && cut ? 0.0f : exp2_fast(since * rates.v[i]);
    store_states(p, at, p.local, at.row * p.segments + at.segment, own);
    store_states(p, at, p.passed, at.row * p.segments + at.segment, decay);
}
#endif

// =========================================================================================================
#ifdef KERNEL_backward

constexpr int STREAMS = 3 + GATED;
constexpr int SUBS = T / SUB;
constexpr int TOGETHER = LANES < SUB ? LANES : SUB;                  // tokens whose sums cross lanes together
constexpr int KEPT = 2 * NPT * LANES > 32 ? 2 * NPT * LANES / 32 : 1;  // sums of a token that a lane ends up with

KERNEL(backward, THREADS, 2) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, dy, (z)][T][CHANNELS]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    float* gy = (float*)((unsigned char*)tile.pairs + Tile::BYTES);  // [T][PITCH]: gradient of the ungated output
    float* ys = gy + T * PITCH;                          // [T][PITCH]: <h, C>, where there is a gate
    float* starts = ys + (GATED ? T * PITCH : 0);        // [SUBS][THREADS][NPT]: states before each SUB tokens
    float* slots = starts + SUBS * THREADS * NPT;        // [WARPS][SUB][2 NP]: gradients of B and C by warp
    tile.constants(p, at);
    const States rates = load_rates(p, at);
    States g = fold(p, at, load_states(p, at, p.dfinal, at.row), p.segments - 1, at.segment, -1);
    States dA{};
    float d_skip = 0.0f, d_bias = 0.0f;
    const int64 all_tiles = (p.length + T - 1) / T;

    const auto fetch = [&](int64 begin, int stage_number) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        IO* to = raw + stage_number * STREAMS * TILE;
        IO* to_BC = raw_BC + stage_number * 2 * T * NP;
        stage<CHANNELS, ALIGNED>(to, at.at(p.x, p.x_b, p.x_l, begin) + at.first, p.x_l, valid, at.columns);
        stage<CHANNELS, ALIGNED>(to + TILE, at.at(p.dt, p.dt_b, p.dt_l, begin) + at.first, p.dt_l, valid, at.columns);
        stage<CHANNELS, ALIGNED>(to + 2 * TILE, at.at(p.dy, p.dy_b, p.dy_l, begin) + at.first, p.dy_l, valid, at.columns);
        if constexpr (GATED)
            stage<CHANNELS, ALIGNED>(to + 3 * TILE, at.at(p.z, p.z_b, p.z_l, begin) + at.first, p.z_l, valid, at.columns);
        stage<NP, ALIGNED_BC>(to_BC, at.at(p.B, p.B_b, p.B_l, begin) + at.group * p.B_g, p.B_l, valid, (int)p.n);
        stage<NP, ALIGNED_BC>(to_BC + T * NP, at.at(p.C, p.C_b, p.C_l, begin) + at.group * p.C_g, p.C_l, valid, (int)p.n);
        copies_commit();
    };
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    fetch(at.start + (tiles - 1) * T, 0);
    int now = 0;
#pragma unroll 1
    for (int64 number = tiles - 1; number >= 0; number--, now ^= 1) {
        const int64 begin = at.start + number * T;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        States h = load_states(p, at, p.checkpoints, at.row * all_tiles + begin / T);
        copies_wait<0>();
        block_barrier();
        if (number > 0) fetch(begin - T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;

        for (int i = threadIdx.x; i < TILE / 8; i += THREADS) {
            const int t = i / (CHANNELS / 8), k = i % (CHANNELS / 8) * 8;
            float x[8], dt[8], dy[8], z[8];
            load8(x, x_raw + t * CHANNELS + k);
            load8(dt, x_raw + TILE + t * CHANNELS + k);
            load8(dy, x_raw + 2 * TILE + t * CHANNELS + k);
            if constexpr (GATED) load8(z, x_raw + 3 * TILE + t * CHANNELS + k);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = t < valid && k + j < at.columns;
                const float step = exists ? step_size(dt[j] + tile.bias[k + j]) : 0.0f;
                float gradient = dy[j];
                if constexpr (GATED) gradient *= z[j] * sigmoid(z[j]);
                tile.pairs[t * PITCH + k + j] = Pair{step, exists ? step * x[j] : 0.0f};
                gy[t * PITCH + k + j] = exists ? gradient : 0.0f;
            }
        }
        tile.tokens(p, at, begin, valid, [&](int which, int t, int state) { return BC_raw[(which * T + t) * NP + state]; });
        block_barrier();

        // States before each SUB tokens.
#pragma unroll 1
        for (int sub = 0;; sub++) {
            *(States*)(starts + (sub * THREADS + threadIdx.x) * NPT) = h;
            if (sub == SUBS - 1) break;
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                const int t = sub * SUB + j;
                const Pair in = tile.pairs[t * PITCH + at.c];
                const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                const bool fresh = PACKED && tile.fresh[t];
#pragma unroll
                for (int i = 0; i < NPT; i++)
                    h.v[i] = exp2_fast(in.a * rates.v[i]) * (fresh ? 0.0f : h.v[i]) + in.b * B.v[i];
            }
        }

#pragma unroll 1
        for (int sub = SUBS - 1; sub >= 0; sub--) {
            const int t0 = sub * SUB;
            float decay[SUB][NPT], before[SUB + 1][NPT];
            h = *(const States*)(starts + (sub * THREADS + threadIdx.x) * NPT);
#pragma unroll
            for (int j0 = 0; j0 < SUB; j0 += TOGETHER) {
                float sums[TOGETHER];
#pragma unroll
                for (int j = j0; j < j0 + TOGETHER; j++) {
                    const Pair in = tile.pairs[(t0 + j) * PITCH + at.c];
                    const States B = read_states(tile.BC + (t0 + j) * 2 * NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t0 + j];
                    float sum = 0.0f;
                    States C;
                    if constexpr (GATED) C = read_states(tile.BC + (t0 + j) * 2 * NP + NP + at.q * NPT);
#pragma unroll
                    for (int i = 0; i < NPT; i++) {
                        decay[j][i] = fresh ? 0.0f : exp2_fast(in.a * rates.v[i]);
                        before[j][i] = fresh ? 0.0f : h.v[i];
                        h.v[i] = decay[j][i] * before[j][i] + in.b * B.v[i];
                        if constexpr (GATED) sum += h.v[i] * C.v[i];
                    }
                    sums[j - j0] = sum;
                }
                if constexpr (GATED) {
                    const int own = sum_lanes<TOGETHER, 1, LANES>(sums, at.lane);
                    ys[(t0 + j0 + own) * PITCH + at.c] = sums[0];
                }
            }
#pragma unroll
            for (int i = 0; i < NPT; i++) before[SUB][i] = h.v[i];

#pragma unroll
            for (int j0 = SUB - TOGETHER; j0 >= 0; j0 -= TOGETHER) {
                float d_input[TOGETHER], d_step[TOGETHER];
#pragma unroll
                for (int j = j0 + TOGETHER - 1; j >= j0; j--) {
                    const int t = t0 + j;
                    const Pair in = tile.pairs[t * PITCH + at.c];
                    const float dy = gy[t * PITCH + at.c];
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    float dBC[2 * NPT], input = 0.0f, step = 0.0f;
                    const bool fresh_next = PACKED && j + 1 < SUB && tile.fresh[t + 1];
#pragma unroll
                    for (int i = 0; i < NPT; i++) {
                        g.v[i] += C.v[i] * dy;
                        dBC[i] = g.v[i] * in.b;
                        // The state after this token is the one before the next, unless a document begins there.
                        const float after = fresh_next ? decay[j][i] * before[j][i] + in.b * B.v[i] : before[j + 1][i];
                        dBC[NPT + i] = after * dy;
                        input += g.v[i] * B.v[i];
                        g.v[i] *= decay[j][i];
                        const float through = g.v[i] * before[j][i];
                        step += through * rates.v[i];
                        dA.v[i] += through * in.a;
                    }
                    d_input[j - j0] = input;
                    d_step[j - j0] = step * LN2;
                    const int own = sum_lanes<2 * NPT, LANES, 32>(dBC, at.lane);
                    float* slot = slots + ((threadIdx.x / 32) * SUB + j) * 2 * NP + at.q * NPT;
#pragma unroll
                    for (int k = 0; k < KEPT; k++) {
                        const int v = own + k;
                        slot[v < NPT ? v : NP + v - NPT] = dBC[k];
                    }
                }
                const int own = sum_lanes<TOGETHER, 1, LANES>(d_input, at.lane);
                sum_lanes<TOGETHER, 1, LANES>(d_step, at.lane);
                tile.pairs[(t0 + j0 + own) * PITCH + at.c] = Pair{d_input[0], d_step[0]};
            }

            block_barrier();
            for (int i = threadIdx.x; i < SUB * 2 * NP; i += THREADS) {
                const int t = t0 + i / (2 * NP), which = i / NP % 2, state = i % NP;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += slots[w * SUB * 2 * NP + i];
                if (t < valid && state < p.n) {
                    float* to = which ? p.dC : p.dB;
                    int64 where = ((at.row * p.length + begin + t) * p.groups + at.group) * p.n + state;
                    if (p.partial) {
                        to[at.block * p.batch * p.length * p.groups * p.n + where] = sum;
                    } else {
                        add_to_global(to + where, sum);
                    }
                }
            }
            block_barrier();
        }

        for (int i = threadIdx.x; i < TILE / 8; i += THREADS) {
            const int t = i / (CHANNELS / 8), k = i % (CHANNELS / 8) * 8;
            float x[8], dt[8], dy[8], z[8], dx[8], ddt[8], dz[8];
            load8(x, x_raw + t * CHANNELS + k);
            load8(dt, x_raw + TILE + t * CHANNELS + k);
            if constexpr (GATED) {
                load8(dy, x_raw + 2 * TILE + t * CHANNELS + k);
                load8(z, x_raw + 3 * TILE + t * CHANNELS + k);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = t < valid && k + j < at.columns;
                const Pair found = tile.pairs[t * PITCH + k + j];
                const float gradient = gy[t * PITCH + k + j];
                const float skip = exists ? tile.skip[k + j] : 0.0f;
                const float raw_step = exists ? dt[j] + tile.bias[k + j] : 0.0f;
                const float input = exists ? x[j] : 0.0f;
                dx[j] = step_size(raw_step) * found.a + skip * gradient;
                ddt[j] = found.b + input * found.a;
                if constexpr (SOFTPLUS) ddt[j] *= sigmoid(raw_step);
                if constexpr (GATED) {
                    const float s = sigmoid(z[j]);
                    const float y = ys[t * PITCH + k + j] + skip * input;
                    dz[j] = dy[j] * y * s * (1.0f + z[j] * (1.0f - s));
                }
                tile.pairs[t * PITCH + k + j] = exists ? Pair{gradient * input, ddt[j]} : Pair{0.0f, 0.0f};
            }
            if (t < valid && k < at.columns) {
                const int64 where = (at.row * p.length + begin + t) * p.d + at.first + k;
                write8(p.dx + where, dx, at.columns - k);
                write8(p.ddt + where, ddt, at.columns - k);
                if constexpr (GATED) write8(p.dz + where, dz, at.columns - k);
            }
        }
        block_barrier();
        for (int t = threadIdx.x / CHANNELS; t < T; t += LANES) {
            const Pair found = tile.pairs[t * PITCH + threadIdx.x % CHANNELS];
            d_skip += found.a;
            d_bias += found.b;
        }
    }

    // Sums over all tokens of the segment.
    block_barrier();
    tile.pairs[threadIdx.x / CHANNELS * PITCH + threadIdx.x % CHANNELS] = Pair{d_skip, d_bias};
    block_barrier();
    const int64 outer = at.row * p.segments + at.segment;
    for (int c = threadIdx.x; c < at.columns; c += THREADS) {
        Pair sum{0.0f, 0.0f};
        for (int r = 0; r < LANES; r++) {
            sum.a += tile.pairs[r * PITCH + c].a;
            sum.b += tile.pairs[r * PITCH + c].b;
        }
        p.dD[outer * p.d + at.first + c] = sum.a;
        p.ddt_bias[outer * p.d + at.first + c] = sum.b;
    }
    store_states(p, at, p.dA, outer, dA);
    if (at.segment == 0) store_states(p, at, p.dinitial, at.row, g);
}
#endif

// =========================================================================================================
// One token: the state is read, moved on and written back.
#ifdef KERNEL_step

KERNEL(step, THREADS, 4) {
    const Place at(p);
    const States rates = load_rates(p, at);
    States h = load_states(p, at, p.initial, at.row);
    const int c = at.owns ? at.first + at.c : at.first;
    const float x = load(at.at(p.x, p.x_b, 0, 0)[c]);
    const float dt = step_size(load(at.at(p.dt, p.dt_b, 0, 0)[c]) + (p.dt_bias ? p.dt_bias[c] : 0.0f));
    const IO* B = at.at(p.B, p.B_b, 0, 0) + at.group * p.B_g;
    const IO* C = at.at(p.C, p.C_b, 0, 0) + at.group * p.C_g;
    float y[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < NPT; i++) {
        const int state = at.q * NPT + i;
        if (state >= p.n) continue;
        h.v[i] = exp2_fast(dt * rates.v[i]) * h.v[i] + dt * x * load(B[state]);
        y[0] += h.v[i] * load(C[state]);
    }
    sum_lanes<1, 1, LANES>(y, at.lane);
    store_states(p, at, p.final, at.row, h);
    if (at.owns && at.q == 0) {
        if (p.D) y[0] += p.D[c] * x;
        if constexpr (GATED) {
            const float z = load(at.at(p.z, p.z_b, 0, 0)[c]);
            y[0] *= z * sigmoid(z);
        }
        store(p.y + at.row * p.d + c, y[0]);
    }
}
#endif
