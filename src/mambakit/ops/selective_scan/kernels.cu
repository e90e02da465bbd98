// The selective scan on a GPU: forward and backward in one pass over their inputs each.
//
// LANES neighbouring threads share CPT channels, each with NPT of their states in registers; a block owns CHANNELS
// channels of one row and walks through the tokens of its segment in tiles of T. A tile is brought to shared
// memory ahead of time (copies that pass no register), converted once per element to (step size, step size x
// input), and scanned token by token; sums over states and channels cross lanes by halving (sum_lanes). Two
// limits meet here: the exponential unit, which no arrangement relieves, and shared memory, whose 128 bytes per
// cycle are why a thread reads B and C for several channels and why rows are padded to start in other banks.
//
// Where rows x channels fill no GPU, time is split into segments. `summarise` gives each segment's own final
// state and total decay, and every block then folds those before its own. It walks a segment from its end and
// stops where all that lies further back has decayed to nothing, so that it mostly reads a fraction of the
// tokens. The backward pass does the same from the other side.
//
// The backward pass recomputes states from one checkpoint per tile (kept in the type of the activations), SUB
// tokens at a time: those states and their decays stay in registers until the gradient has come back through them.
//
// Settings of a compilation: IO (float, bf16, half), NPT, LANES, ALIGNED and ALIGNED_BC (16-byte accesses are
// possible), WHOLE_N (no padded states), PACKED (seq_idx given), GATED (z given), SOFTPLUS, and one of the kernels' names.

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int CPT = 2;                                           // channels of a thread
constexpr int CHANNELS = THREADS / LANES * CPT;
constexpr int NP = LANES * NPT;                                  // states of a channel, padded
constexpr int T = LANES <= 8 ? 4 * LANES : 32;                   // tokens of a tile
constexpr int SUB = 4;                                           // tokens whose states backward holds at once
constexpr bool EXACT = sizeof(IO) == 4;
constexpr float GONE = -40.0f;                                   // 2 to this power counts as nothing
constexpr int RAW = CHANNELS + 32 / sizeof(IO);                  // rows of staged, of pairs and of floats: padded,
constexpr int PITCH = CHANNELS + 2;                              // so that rows start in different banks
constexpr int ROW = CHANNELS + 4;
constexpr int TILE = T * RAW;

struct Params {
    // Activations (b, l, d) and (b, l, g, n), with strides in elements; the last axis is contiguous.
    const IO *x, *dt, *z, *dy, *B, *C;
    IO *y, *dx, *ddt, *dz;                        // contiguous
    const float *A, *D, *dt_bias, *initial, *dfinal;
    const int* seq_idx;
    float* final;                                 // (b, d, n)
    IO* checkpoints;                              // (b, tiles, d, n) or null: states before each tile
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
    int lane, q, c;                               // lane of the warp, lane of the channels, first of the channels

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
        lane = threadIdx.x % 32, q = threadIdx.x % LANES;
        c = threadIdx.x / LANES * CPT;
    }
    DEVICE bool owns(int k) const { return c + k < columns; }  // whether the thread's channel k exists
    DEVICE int64 states(const Params& p, int64 outer, int k) const {  // offset of its states in (outer, d, n)
        return (outer * p.d + first + c + k) * p.n + q * NPT;
    }
    DEVICE const IO* at(const IO* base, int64 by_row, int64 by_token, int64 token) const {
        return base + row * by_row + token * by_token;
    }
};

// The states of one channel and lane side by side, read and written as one where all of them exist.
template <typename Number> struct alignas(sizeof(Number) * NPT <= 16 ? sizeof(Number) * NPT : 16) Stored { Number v[NPT]; };

template <typename Number>
DEVICE void load_states(States (&to)[CPT], const Params& p, const Place& at, const Number* from, int64 outer) {
    const Number* const base = from ? from + at.states(p, outer, 0) : nullptr;
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        Stored<Number> stored{};
        if (base && at.owns(k)) {
            if constexpr (WHOLE_N) {
                stored = *(const Stored<Number>*)(base + k * NP);
            } else {
#pragma unroll
                for (int i = 0; i < NPT; i++)
                    if (at.q * NPT + i < p.n) stored.v[i] = base[k * (int)p.n + i];
            }
        }
#pragma unroll
        for (int i = 0; i < NPT; i++) to[k].v[i] = load(stored.v[i]);
    }
}

template <typename Number>
DEVICE void store_states(const Params& p, const Place& at, Number* to, int64 outer, const States (&s)[CPT]) {
    if (!to) return;
    Number* const base = to + at.states(p, outer, 0);
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        if (!at.owns(k)) continue;
        Stored<Number> stored;
#pragma unroll
        for (int i = 0; i < NPT; i++) store(&stored.v[i], s[k].v[i]);
        if constexpr (WHOLE_N) {
            *(Stored<Number>*)(base + k * NP) = stored;
        } else {
#pragma unroll
            for (int i = 0; i < NPT; i++)
                if (at.q * NPT + i < p.n) base[k * (int)p.n + i] = stored.v[i];
        }
    }
}

// Decay rates in powers of two per unit of time.
DEVICE void load_rates(States (&rates)[CPT], const Params& p, const Place& at) {
    load_states(rates, p, at, p.A, 0);
#pragma unroll
    for (int k = 0; k < CPT; k++)
#pragma unroll
        for (int i = 0; i < NPT; i++) rates[k].v[i] *= LOG2E;
}

// The state (or gradient) that enters a segment: fold the summaries from `begin` towards `end`.
DEVICE void fold(States (&s)[CPT], const Params& p, const Place& at, int64 begin, int64 end, int step) {
    for (int64 j = begin; j != end; j += step) {
        States own[CPT], decay[CPT];
        load_states(own, p, at, p.local, at.row * p.segments + j);
        load_states(decay, p, at, p.passed, at.row * p.segments + j);
#pragma unroll
        for (int k = 0; k < CPT; k++)
#pragma unroll
            for (int i = 0; i < NPT; i++)
                s[k].v[i] = decay[k].v[i] == 0.0f ? own[k].v[i] : decay[k].v[i] * s[k].v[i] + own[k].v[i];
    }
}

// Brings tile after tile of one tensor to shared memory, rows of `columns` <= WIDTH elements PITCHED apart there;
// complete after copies_wait and a barrier. A thread's places in tiles and memory are found once.
template <int WIDTH, int PITCHED, bool VECTORS>
struct Stream {
    static constexpr int STEP = VECTORS && WIDTH % (16 / sizeof(IO)) == 0 ? 16 / sizeof(IO) : 1;
    static constexpr int CHUNKS = WIDTH / STEP, COPIES = (T * CHUNKS + THREADS - 1) / THREADS;
    static constexpr bool ONE_COLUMN = THREADS % CHUNKS == 0;  // a thread's copies are all of one column
    const IO* from;
    int64 stride;
    int columns;

    DEVICE Stream(const IO* base, int64 by_token, int count) : from(base), stride(by_token), columns(count) {}
    // Copy the tile of `rows` <= T tokens that begins `token` tokens after the base.
    DEVICE void fetch(IO* to, int64 token, int rows) const {
        const IO* tile = from + token * stride;
#pragma unroll
        for (int n = 0; n < COPIES; n++) {
            const int i = threadIdx.x + n * THREADS;
            const int row = i / CHUNKS, column = i % CHUNKS * STEP;
            if (row >= rows || column >= columns) continue;
            if constexpr (STEP > 1) {
                copy16_async(to + row * PITCHED + column, tile + row * (int)stride + column);
            } else {
                to[row * PITCHED + column] = tile[row * stride + column];
            }
        }
    }
};
typedef Stream<CHANNELS, RAW, ALIGNED> Channels;
typedef Stream<NP, NP, ALIGNED_BC> Vectors;

// The i-th eight elements of a tile. Neighbouring threads take two eights of a row, then the next row, so that
// they meet different banks in all of the tile's layouts.
struct Eight {
    int t, k;
    DEVICE explicit Eight(int i) {
        constexpr int TWO = CHANNELS >= 16 ? 2 : 1;
        t = i / TWO % T, k = (i % TWO + i / (TWO * T) * TWO) * 8;
    }
    DEVICE IO* in(IO* raw) const { return raw + t * RAW + k; }
    DEVICE const IO* in(const IO* raw) const { return raw + t * RAW + k; }
};
constexpr int EIGHTS = T * CHANNELS / 8;

// Call `body(Eight)` for all of the thread's eights.
template <typename Body>
DEVICE void each_eight(Body body) {
#pragma unroll
    for (int n = 0; n < (EIGHTS + THREADS - 1) / THREADS; n++) {
        const int i = threadIdx.x + n * THREADS;
        if (EIGHTS % THREADS == 0 || i < EIGHTS) body(Eight(i));
    }
}
// Call `body(Eight, whole)`; a tile all of whose tokens and channels exist needs no questions asked.
template <typename Body>
DEVICE void each_eight(bool whole, Body body) {
    if (whole) each_eight([&](Eight e) { body(e, Yes()); });
    else each_eight([&](Eight e) { body(e, No()); });
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
    float* ys;         // [T][ROW]: <h, C>
    float* BC;         // [T][2][NP]
    int* fresh;        // [T]: begins a document
    float *skip, *bias;  // [CHANNELS]

    DEVICE explicit Tile(unsigned char* memory) {
        pairs = (Pair*)memory;
        ys = (float*)(pairs + T * PITCH);
        BC = ys + T * ROW;
        fresh = (int*)(BC + T * 2 * NP);
        skip = (float*)(fresh + T);
        bias = skip + CHANNELS;
    }
    static constexpr int BYTES = T * (8 * PITCH + 4 * ROW + 8 * NP + 4) + 8 * CHANNELS;

    DEVICE void constants(const Params& p, const Place& at) {
        for (int c = threadIdx.x; c < at.columns; c += THREADS) {
            skip[c] = p.D ? p.D[at.first + c] : 0.0f;
            bias[c] = p.dt_bias ? p.dt_bias[at.first + c] : 0.0f;
        }
    }
    // B and C as floats from their staged rows (null: that half is not needed), zero where there is no token or
    // state, and the documents' first tokens.
    DEVICE void tokens(const Params& p, const Place& at, int64 begin, int valid, const IO* B, const IO* C) {
        constexpr int STEP = NP % 4 == 0 ? 4 : 1, COUNT = T * 2 * NP / STEP;
#pragma unroll
        for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
            const int i = threadIdx.x + n * THREADS;
            if (COUNT % THREADS != 0 && i >= COUNT) break;
            const int t = i / (2 * NP / STEP), which = i / (NP / STEP) % 2, state = i % (NP / STEP) * STEP;
            const IO* from = which ? C : B;
            if (!from) continue;
            Floats<STEP> values;
#pragma unroll
            for (int j = 0; j < STEP; j++)
                values.v[j] = t < valid && state + j < p.n ? load(from[t * NP + state + j]) : 0.0f;
            *(Floats<STEP>*)(BC + i * STEP) = values;
        }
        if constexpr (PACKED)
            for (int t = threadIdx.x; t < T; t += THREADS) fresh[t] = t < valid && begins(p, at, begin + t);
    }
};

DEVICE States read_states(const float* from) { return *(const States*)from; }

DEVICE void store_pairs(Pair* to, const Pair (&pairs)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) *(Words4*)(to + j) = Words4{float_bits(pairs[j].a), float_bits(pairs[j].b),
                                                            float_bits(pairs[j + 1].a), float_bits(pairs[j + 1].b)};
}
DEVICE void load_pairs(Pair (&pairs)[8], const Pair* from) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const Words4 words = *(const Words4*)(from + j);
        pairs[j] = Pair{bits_float(words.x), bits_float(words.y)};
        pairs[j + 1] = Pair{bits_float(words.z), bits_float(words.w)};
    }
}

// What the scans read of a token: a pair for each of the thread's channels.
struct alignas(CPT * 8) Pairs { Pair v[CPT]; };
struct alignas(CPT * 4) Numbers { float v[CPT]; };
DEVICE Pairs read_pairs(const Tile& tile, const Place& at, int t) { return *(const Pairs*)(tile.pairs + t * PITCH + at.c); }

// =========================================================================================================
#ifdef KERNEL_forward

constexpr int STREAMS = 2 + GATED;
constexpr int UNROLL = LANES < 4 ? 4 : LANES;

KERNEL(forward, THREADS, 4) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, (z)][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    tile.constants(p, at);
    States rates[CPT], h[CPT];
    load_rates(rates, p, at);
    load_states(h, p, at, p.initial, at.row);
    fold(h, p, at, 0, at.segment, 1);

    const Channels x_stream(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns);
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels z_stream(at.at(p.z, p.z_b, p.z_l, at.start) + at.first, p.z_l, at.columns);
    const Vectors B_stream(at.at(p.B, p.B_b, p.B_l, at.start) + at.group * p.B_g, p.B_l, (int)p.n);
    const Vectors C_stream(at.at(p.C, p.C_b, p.C_l, at.start) + at.group * p.C_g, p.C_l, (int)p.n);
    const auto fetch = [&](int64 begin, int stage_number) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        const int64 token = begin - at.start;
        IO* to = raw + stage_number * STREAMS * TILE;
        IO* to_BC = raw_BC + stage_number * 2 * T * NP;
        x_stream.fetch(to, token, valid);
        dt_stream.fetch(to + TILE, token, valid);
        if constexpr (GATED) z_stream.fetch(to + 2 * TILE, token, valid);
        B_stream.fetch(to_BC, token, valid);
        C_stream.fetch(to_BC + T * NP, token, valid);
        copies_commit();
    };
    fetch(at.start, 0);
    int now = 0;
    const int64 all_tiles = (p.length + T - 1) / T;
#pragma unroll 1
    for (int64 begin = at.start; begin < at.stop; begin += T, now ^= 1) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        copies_wait<0>();
        block_barrier();
        if (begin + T < at.stop) fetch(begin + T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;
        if (p.checkpoints) store_states(p, at, p.checkpoints, at.row * all_tiles + begin / T, h);

        const bool whole = valid == T && at.columns == CHANNELS;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                pairs[j] = Pair{step, exists ? step * x[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
        });
        tile.tokens(p, at, begin, valid, BC_raw, BC_raw + T * NP);
        block_barrier();

#pragma unroll 1
        for (int t0 = 0; t0 < T; t0 += UNROLL) {
#pragma unroll
            for (int t1 = 0; t1 < UNROLL; t1 += LANES) {
                float sums[CPT][LANES];
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    const int t = t0 + t1 + j;
                    const Pairs in = read_pairs(tile, at, t);
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t];
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            const float before = fresh ? 0.0f : h[k].v[i];
                            h[k].v[i] = exp2_fast(in.v[k].a * rates[k].v[i]) * before + in.v[k].b * B.v[i];
                            sum += h[k].v[i] * C.v[i];
                        }
                        sums[k][j] = sum;
                    }
                }
                Numbers y;
                int own = 0;
#pragma unroll
                for (int k = 0; k < CPT; k++) {
                    own = sum_lanes<LANES, 1, LANES>(sums[k], at.lane);
                    y.v[k] = sums[k][0];
                }
                *(Numbers*)(tile.ys + (t0 + t1 + own) * ROW + at.c) = y;
            }
        }
        block_barrier();

        IO* const y_tile = p.y + (at.row * p.length + begin) * p.d + at.first;
        each_eight(whole, [&](Eight e, auto whole) {
            if (!whole.value && (e.t >= valid || e.k >= at.columns)) return;
            float x[8], z[8], y[8];
            load8(x, e.in(x_raw));
            load8(y, tile.ys + e.t * ROW + e.k);
            if constexpr (GATED) load8(z, e.in(x_raw + 2 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (whole.value || e.k + j < at.columns) y[j] += tile.skip[e.k + j] * x[j];
                if constexpr (GATED) y[j] *= z[j] * sigmoid(z[j]);
            }
            write8(y_tile + e.t * (int)p.d + e.k, y, at.columns - e.k);
        });
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
    constexpr int STREAMS = FORWARD ? 2 : 2 + GATED;     // dt, and x or dy, z
    IO* raw = (IO*)shared_memory;                        // [2][STREAMS][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B or C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    tile.constants(p, at);
    States rates[CPT], own[CPT]{};
    load_rates(rates, p, at);
    float since[CPT]{};  // time between the tokens seen and the border that matters
    bool cut = false;    // a document border lies between
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    const auto first_token = [&](int64 number) { return at.start + (FORWARD ? tiles - 1 - number : number) * T; };
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels in_stream = FORWARD ? Channels(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns)
                                       : Channels(at.at(p.dy, p.dy_b, p.dy_l, at.start) + at.first, p.dy_l, at.columns);
    const Channels z_stream(at.at(p.z, p.z_b, p.z_l, at.start) + at.first, p.z_l, at.columns);
    const Vectors weights = FORWARD
        ? Vectors(at.at(p.B, p.B_b, p.B_l, at.start) + at.group * p.B_g, p.B_l, (int)p.n)
        : Vectors(at.at(p.C, p.C_b, p.C_l, at.start) + at.group * p.C_g, p.C_l, (int)p.n);
    const auto fetch = [&](int64 number, int stage_number) {
        const int64 begin = first_token(number), token = begin - at.start;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        IO* to = raw + stage_number * STREAMS * TILE;
        dt_stream.fetch(to, token, valid);
        in_stream.fetch(to + TILE, token, valid);
        if constexpr (!FORWARD && GATED) z_stream.fetch(to + 2 * TILE, token, valid);
        weights.fetch(raw_BC + stage_number * 2 * T * NP, token, valid);
        copies_commit();
    };
    fetch(0, 0);
    int now = 0;
#pragma unroll 1
    for (int64 number = 0; number < tiles; number++, now ^= 1) {
        const int64 begin = first_token(number);
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        copies_wait<0>();
        block_barrier();
        if (number + 1 < tiles) fetch(number + 1, now ^ 1);
        const IO* dt_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;
        each_eight(valid == T && at.columns == CHANNELS, [&](Eight e, auto whole) {
            float dt[8], in[8], z[8];
            Pair pairs[8];
            load8(dt, e.in(dt_raw));
            load8(in, e.in(dt_raw + TILE));
            if constexpr (!FORWARD && GATED) load8(z, e.in(dt_raw + 2 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                if constexpr (FORWARD) in[j] *= step;
                if constexpr (!FORWARD && GATED) in[j] *= z[j] * sigmoid(z[j]);
                pairs[j] = Pair{step, exists ? in[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
        });
        tile.tokens(p, at, begin, valid, BC_raw, nullptr);
        block_barrier();
#pragma unroll 4
        for (int s = 0; s < T; s++) {
            const int t = FORWARD ? T - 1 - s : s;
            const Pairs in = read_pairs(tile, at, t);
            const States weight = read_states(tile.BC + t * 2 * NP + at.q * NPT);
            if (!FORWARD && PACKED && tile.fresh[t]) cut = true;
#pragma unroll
            for (int k = 0; k < CPT; k++) {
                if (!FORWARD) since[k] += in.v[k].a;  // the state that enters has decayed by this token, too
                if (!(PACKED && cut)) {
#pragma unroll
                    for (int i = 0; i < NPT; i++)
                        own[k].v[i] += exp2_fast(since[k] * rates[k].v[i]) * (in.v[k].b * weight.v[i]);
                }
                if (FORWARD) since[k] += in.v[k].a;
            }
            if (FORWARD && PACKED && tile.fresh[t]) cut = true;
        }
        // Steps are never negative after a softplus: what has vanished stays so.
        bool gone = PACKED && cut;
        if (SOFTPLUS && !gone) {
            gone = true;
#pragma unroll
            for (int k = 0; k < CPT; k++)
#pragma unroll
                for (int i = 0; i < NPT; i++)
                    gone = gone && (!at.owns(k) || at.q * NPT + i >= p.n || since[k] * rates[k].v[i] < GONE);
        }
        if (block_all(gone)) {
            copies_wait<0>();
            break;
        }
    }
    States decay[CPT];
#pragma unroll
    for (int k = 0; k < CPT; k++)
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            const float log = since[k] * rates[k].v[i];
            decay[k].v[i] = (PACKED && cut) || (SOFTPLUS && log < GONE) ? 0.0f : exp2_fast(log);
        }
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

KERNEL(backward, THREADS, 4) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, dy, (z)][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    // In tile.ys the gradient of the ungated output, and then, where that is spent, the ungated output.
    float* starts = (float*)((unsigned char*)tile.pairs + Tile::BYTES);  // [SUBS - 1][CPT][THREADS][NPT]: states
    float* slots = starts + (SUBS - 1) * CPT * THREADS * NPT;  // [2][WARPS][SUB][2 NP]: of B and C by warp
    tile.constants(p, at);
    States rates[CPT], g[CPT], dA[CPT]{};
    load_rates(rates, p, at);
    load_states(g, p, at, p.dfinal, at.row);
    fold(g, p, at, p.segments - 1, at.segment, -1);
    float d_skip[CPT]{}, d_bias[CPT]{};
    const int64 all_tiles = (p.length + T - 1) / T;
    // The states before the tokens of a sub other than the first, which the checkpoint holds.
    const auto start_of = [&](int sub, int k) {
        return (States*)(starts + (((sub - 1) * CPT + k) * THREADS + threadIdx.x) * NPT);
    };

    const Channels x_stream(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns);
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels dy_stream(at.at(p.dy, p.dy_b, p.dy_l, at.start) + at.first, p.dy_l, at.columns);
    const Channels z_stream(at.at(p.z, p.z_b, p.z_l, at.start) + at.first, p.z_l, at.columns);
    const Vectors B_stream(at.at(p.B, p.B_b, p.B_l, at.start) + at.group * p.B_g, p.B_l, (int)p.n);
    const Vectors C_stream(at.at(p.C, p.C_b, p.C_l, at.start) + at.group * p.C_g, p.C_l, (int)p.n);
    const auto fetch = [&](int64 begin, int stage_number) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        const int64 token = begin - at.start;
        IO* to = raw + stage_number * STREAMS * TILE;
        IO* to_BC = raw_BC + stage_number * 2 * T * NP;
        x_stream.fetch(to, token, valid);
        dt_stream.fetch(to + TILE, token, valid);
        dy_stream.fetch(to + 2 * TILE, token, valid);
        if constexpr (GATED) z_stream.fetch(to + 3 * TILE, token, valid);
        B_stream.fetch(to_BC, token, valid);
        C_stream.fetch(to_BC + T * NP, token, valid);
        copies_commit();
    };
    // Where the thread's sums of gradients of B and C go, for the first token of a row.
    constexpr int SUMS = (SUB * 2 * NP + THREADS - 1) / THREADS;
    const int64 by_token = p.groups * p.n, by_block = p.partial ? p.batch * p.length * by_token : 0;
    float* sum_to[SUMS];
#pragma unroll
    for (int m = 0; m < SUMS; m++) {
        const int i = threadIdx.x + m * THREADS;
        sum_to[m] = (i / NP % 2 ? p.dC : p.dB) + at.block * by_block + (at.row * p.length + i / (2 * NP)) * by_token +
                    at.group * p.n + i % NP;
    }
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    fetch(at.start + (tiles - 1) * T, 0);
    int now = 0;
#pragma unroll 1
    for (int64 number = tiles - 1; number >= 0; number--, now ^= 1) {
        const int64 begin = at.start + number * T;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        States h[CPT];
        load_states(h, p, at, p.checkpoints, at.row * all_tiles + begin / T);
        copies_wait<0>();
        block_barrier();
        if (number > 0) fetch(begin - T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;

        const bool whole = valid == T && at.columns == CHANNELS;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8], dy[8], z[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
            load8(dy, e.in(x_raw + 2 * TILE));
            if constexpr (GATED) load8(z, e.in(x_raw + 3 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                if constexpr (GATED) dy[j] *= z[j] * sigmoid(z[j]);
                if (!exists) dy[j] = 0.0f;
                pairs[j] = Pair{step, exists ? step * x[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
            store8(tile.ys + e.t * ROW + e.k, dy);
        });
        tile.tokens(p, at, begin, valid, BC_raw, BC_raw + T * NP);
        block_barrier();

        // States before each SUB tokens.
#pragma unroll 1
        for (int sub = 0; sub < SUBS - 1; sub++) {
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                const int t = sub * SUB + j;
                const Pairs in = read_pairs(tile, at, t);
                const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                const bool fresh = PACKED && tile.fresh[t];
#pragma unroll
                for (int k = 0; k < CPT; k++)
#pragma unroll
                    for (int i = 0; i < NPT; i++)
                        h[k].v[i] = exp2_fast(in.v[k].a * rates[k].v[i]) * (fresh ? 0.0f : h[k].v[i]) + in.v[k].b * B.v[i];
            }
#pragma unroll
            for (int k = 0; k < CPT; k++) *start_of(sub + 1, k) = h[k];
        }

#pragma unroll 1
        for (int sub = SUBS - 1; sub >= 0; sub--) {
            const int t0 = sub * SUB;
            float* const here = slots + sub % 2 * WARPS * SUB * 2 * NP;  // in turn, so that one barrier is enough
            float decay[SUB][CPT][NPT], before[SUB + 1][CPT][NPT];
            if (sub == 0) {
                load_states(h, p, at, p.checkpoints, at.row * all_tiles + begin / T);
            } else {
#pragma unroll
                for (int k = 0; k < CPT; k++) h[k] = *start_of(sub, k);
            }
            Numbers ys[SUB / TOGETHER];
            int own_y = 0;
#pragma unroll
            for (int j0 = 0; j0 < SUB; j0 += TOGETHER) {
                float sums[CPT][TOGETHER];
#pragma unroll
                for (int j = j0; j < j0 + TOGETHER; j++) {
                    const Pairs in = read_pairs(tile, at, t0 + j);
                    const States B = read_states(tile.BC + (t0 + j) * 2 * NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t0 + j];
                    States C;
                    if constexpr (GATED) C = read_states(tile.BC + (t0 + j) * 2 * NP + NP + at.q * NPT);
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            decay[j][k][i] = fresh ? 0.0f : exp2_fast(in.v[k].a * rates[k].v[i]);
                            before[j][k][i] = fresh ? 0.0f : h[k].v[i];
                            h[k].v[i] = decay[j][k][i] * before[j][k][i] + in.v[k].b * B.v[i];
                            if constexpr (GATED) sum += h[k].v[i] * C.v[i];
                        }
                        sums[k][j - j0] = sum;
                    }
                }
                if constexpr (GATED) {
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        own_y = sum_lanes<TOGETHER, 1, LANES>(sums[k], at.lane);
                        ys[j0 / TOGETHER].v[k] = sums[k][0];
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < CPT; k++)
#pragma unroll
                for (int i = 0; i < NPT; i++) before[SUB][k][i] = h[k].v[i];

#pragma unroll
            for (int j0 = SUB - TOGETHER; j0 >= 0; j0 -= TOGETHER) {
                float d_input[CPT][TOGETHER], d_step[CPT][TOGETHER];
#pragma unroll
                for (int j = j0 + TOGETHER - 1; j >= j0; j--) {
                    const int t = t0 + j;
                    const Pairs in = read_pairs(tile, at, t);
                    const Numbers dy = *(const Numbers*)(tile.ys + t * ROW + at.c);
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    const bool fresh_next = PACKED && j + 1 < SUB && tile.fresh[t + 1];
                    float dBC[2 * NPT];
#pragma unroll
                    for (int i = 0; i < 2 * NPT; i++) dBC[i] = 0.0f;
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float input = 0.0f, step = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            g[k].v[i] += C.v[i] * dy.v[k];
                            dBC[i] += g[k].v[i] * in.v[k].b;
                            // The state after a token is the one before the next, unless a document begins there.
                            const float after = fresh_next ? decay[j][k][i] * before[j][k][i] + in.v[k].b * B.v[i]
                                                           : before[j + 1][k][i];
                            dBC[NPT + i] += after * dy.v[k];
                            input += g[k].v[i] * B.v[i];
                            g[k].v[i] *= decay[j][k][i];
                            const float through = g[k].v[i] * before[j][k][i];
                            step += through * rates[k].v[i];
                            dA[k].v[i] += through * in.v[k].a;
                        }
                        d_input[k][j - j0] = input;
                        d_step[k][j - j0] = step * LN2;
                    }
                    const int own = sum_lanes<2 * NPT, LANES, 32>(dBC, at.lane);
                    float* slot = here + ((threadIdx.x / 32) * SUB + j) * 2 * NP + at.q * NPT;
#pragma unroll
                    for (int v = 0; v < KEPT; v++) slot[own + v < NPT ? own + v : NP + own + v - NPT] = dBC[v];
                }
                Pairs found;
                int own = 0;
#pragma unroll
                for (int k = 0; k < CPT; k++) {
                    own = sum_lanes<TOGETHER, 1, LANES>(d_input[k], at.lane);
                    sum_lanes<TOGETHER, 1, LANES>(d_step[k], at.lane);
                    found.v[k] = Pair{d_input[k][0], d_step[k][0]};
                }
                *(Pairs*)(tile.pairs + (t0 + j0 + own) * PITCH + at.c) = found;  // read by all its lanes already
                if constexpr (GATED) *(Numbers*)(tile.ys + (t0 + j0 + own_y) * ROW + at.c) = ys[j0 / TOGETHER];
            }

            block_barrier();
#pragma unroll
            for (int m = 0; m < SUMS; m++) {
                const int i = threadIdx.x + m * THREADS, t = t0 + i / (2 * NP), state = i % NP;
                float sum = 0.0f;
                if ((SUB * 2 * NP) % THREADS != 0 && i >= SUB * 2 * NP) break;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += here[w * SUB * 2 * NP + i];
                if (t < valid && (WHOLE_N || state < p.n)) {
                    float* const to = sum_to[m] + (begin + t0) * by_token;
                    if (p.partial) *to = sum;
                    else add_to_global(to, sum);
                }
            }
        }
        block_barrier();

        const int64 where = (at.row * p.length + begin) * p.d + at.first;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8], dy[8], z[8], y[8], dx[8], ddt[8], dz[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
            load8(dy, e.in(x_raw + 2 * TILE));
            load_pairs(pairs, tile.pairs + e.t * PITCH + e.k);
            if constexpr (GATED) {
                load8(z, e.in(x_raw + 3 * TILE));
                load8(y, tile.ys + e.t * ROW + e.k);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float skip = exists ? tile.skip[e.k + j] : 0.0f;
                const float raw_step = exists ? dt[j] + tile.bias[e.k + j] : 0.0f;
                const float input = exists ? x[j] : 0.0f;
                float gradient = dy[j];
                if constexpr (GATED) {
                    const float s = sigmoid(z[j]);
                    gradient *= z[j] * s;
                    dz[j] = dy[j] * (y[j] + skip * input) * s * (1.0f + z[j] * (1.0f - s));
                }
                dx[j] = step_size(raw_step) * pairs[j].a + skip * gradient;
                ddt[j] = pairs[j].b + input * pairs[j].a;
                if constexpr (SOFTPLUS) ddt[j] *= sigmoid(raw_step);
                pairs[j] = exists ? Pair{gradient * input, ddt[j]} : Pair{0.0f, 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
            if (whole.value || (e.t < valid && e.k < at.columns)) {
                const int64 to = where + e.t * (int)p.d + e.k;
                write8(p.dx + to, dx, at.columns - e.k);
                write8(p.ddt + to, ddt, at.columns - e.k);
                if constexpr (GATED) write8(p.dz + to, dz, at.columns - e.k);
            }
        });
        block_barrier();
        for (int t = at.q; t < T; t += LANES) {
            const Pairs found = read_pairs(tile, at, t);
#pragma unroll
            for (int k = 0; k < CPT; k++) d_skip[k] += found.v[k].a, d_bias[k] += found.v[k].b;
        }
    }

    // Sums over all tokens of the segment.
    const int64 outer = at.row * p.segments + at.segment;
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        sum_lanes<1, 1, LANES>(&d_skip[k], at.lane);
        sum_lanes<1, 1, LANES>(&d_bias[k], at.lane);
        if (at.q == 0 && at.owns(k)) {
            p.dD[outer * p.d + at.first + at.c + k] = d_skip[k];
            p.ddt_bias[outer * p.d + at.first + at.c + k] = d_bias[k];
        }
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
    States rates[CPT], h[CPT];
    load_rates(rates, p, at);
    load_states(h, p, at, p.initial, at.row);
    const IO* B = at.at(p.B, p.B_b, 0, 0) + at.group * p.B_g;
    const IO* C = at.at(p.C, p.C_b, 0, 0) + at.group * p.C_g;
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        const int c = at.owns(k) ? at.first + at.c + k : at.first;
        const float x = load(at.at(p.x, p.x_b, 0, 0)[c]);
        const float dt = step_size(load(at.at(p.dt, p.dt_b, 0, 0)[c]) + (p.dt_bias ? p.dt_bias[c] : 0.0f));
        float y[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            const int state = at.q * NPT + i;
            if (state >= p.n) continue;
            h[k].v[i] = exp2_fast(dt * rates[k].v[i]) * h[k].v[i] + dt * x * load(B[state]);
            y[0] += h[k].v[i] * load(C[state]);
        }
        sum_lanes<1, 1, LANES>(y, at.lane);
        if (at.owns(k) && at.q == 0) {
            if (p.D) y[0] += p.D[c] * x;
            if constexpr (GATED) {
                const float z = load(at.at(p.z, p.z_b, 0, 0)[c]);
                y[0] *= z * sigmoid(z);
            }
            store(p.y + at.row * p.d + c, y[0]);
        }
    }
    store_states(p, at, p.final, at.row, h);
}
#endif
