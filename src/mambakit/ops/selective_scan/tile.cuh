// What the kernels of the selective scan share: how the work is laid out, and how a tile of tokens comes to shared
// memory.
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
