// A linear layer for up to eight vectors at once, with what comes before and after it: the norm of its input; the
// convolution of some of its outputs, or the addition to the residual stream.
//
// Sixteen rows of weights are a tile, and a block has some tiles one after the other. Its warps read a tile side by side
// in steps of 64 bytes of each row, and a lane always the same pieces of a step: 16 bytes of rows lane / 4 and lane / 4 +
// 8. So a thread meets nothing but what it has asked for itself: its pieces arrive in its own slots of shared memory,
// AHEAD rounds ahead, across the borders of tiles and without a barrier. Numbers of 16 bits are multiplied by the tensor
// cores: what a lane holds are the operands it has to give if columns are taken in the order in which they come. The
// warps' sums meet in shared memory when all tiles are done, in a fixed order. Where rows are few a tile is eight of them
// and a round two steps.
//
// Settings: THREADS, VECTORS (B, padded to a power of two), TILE (8 or 16 rows), WHOLE (tiles and rounds need no limits),
// AHEAD (rounds of copies under way), HELD (pieces of the one vector that a thread holds while it is normalised, or 0),
// NORM (normalise the input, of type RES), GATED (normalise an input of type IO in groups), ADD (to the residual stream),
// TAPS (of the convolution, or 0), CONV (the type of its state).

struct Params {
    const IO *weight, *bias;                 // (rows, k), (rows) or null
    void* input;                             // (batch, k), rows `input_stride` apart
    const IO *norm, *gate;                   // (k); (batch, k), rows `gate_stride` apart, or null
    void* out;                               // (batch, rows) of IO; with ADD of RES
    const IO *taps, *taps_bias;              // (channels, TAPS), (channels) or null
    CONV* conv;                              // (batch, TAPS - 1, channels)
    int64 input_stride, gate_stride, batch, rows, k, groups, first_channel, channels, tiles;
    double eps;
};

constexpr int B = VECTORS;
constexpr int STEP = 4 * VEC;                // columns that a warp reads at once
constexpr bool PAIR = TILE == 16;            // a lane's two pieces are of two rows, not of two steps
constexpr int COLUMNS = WARPS * STEP * (PAIR ? 1 : 2);  // of a round
constexpr bool TENSOR = sizeof(IO) == 2;
constexpr int SUMS = TENSOR ? 4 : B;         // of a lane, twice

// The places of a thread's pieces, tile by tile.
struct Walk {
    const IO* here;
    int64 turn;                              // from the end of a tile to the beginning of the next
    int at, k, left, rounds, todo, rows;     // column; rounds left in the tile and altogether; rows from the lane's first

    DEVICE void begin(const Params& p, int64 first_row, int tiles, int rounds_of_tile) {
        const int lane = threadIdx.x % 32;
        k = (int)p.k, rounds = left = rounds_of_tile, todo = tiles * rounds;
        at = (int)threadIdx.x / 32 * STEP + lane % 4 * VEC;
        const int64 to_end = p.rows - first_row - lane / 4;
        rows = to_end < tiles * TILE ? (int)to_end : tiles * TILE;
        here = p.weight + (first_row + lane / 4) * p.k + at;
        turn = (int64)TILE * k - rounds * COLUMNS;
    }
    DEVICE void copy(Words4* slots) const {
        if (todo > 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const IO* const from = here + (PAIR ? i * 8 * (int64)k : i * WARPS * STEP);
                const int column = at + (PAIR ? 0 : i * WARPS * STEP);
                const bool exists = WHOLE || (column < k && rows > (PAIR ? 8 * i : 0));
                if constexpr (!ALIGNED) slots[i * THREADS] = load_weights(from, exists ? k - column : 0);
                else if constexpr (WHOLE) copy16_async(slots + i * THREADS, from);
                else copy16_async_or_zero(slots + i * THREADS, from, exists);
            }
        }
        copies_commit();
    }
    DEVICE void next() {
        here += COLUMNS, at += COLUMNS, todo--;
        if (--left == 0) here += turn, at -= rounds * COLUMNS, rows -= TILE, left = rounds;
    }
};

// The vectors' columns that a lane needs: of its own vector, or of all.
template <typename T>
DEVICE Words4 operand(const T* vectors, int pitch, int batch, bool exists) {
    const int vector = threadIdx.x % 32 / 4;
    return exists && vector < batch ? *(const Words4*)(vectors + vector * pitch) : Words4{0, 0, 0, 0};
}

// sums += two pieces of weights by the same columns of the vectors.
template <typename T>
DEVICE void multiply(float (&sums)[2][SUMS], const Words4 (&w)[2], const T* vectors, int pitch, int batch, int left) {
    if constexpr (sizeof(T) == 2 && PAIR) {
        const Words4 x = operand(vectors, pitch, batch, WHOLE || left > 0);
        multiply_tile(sums[0], {w[0].x, w[1].x, w[0].y, w[1].y}, x.x, x.y, T{});
        multiply_tile(sums[1], {w[0].z, w[1].z, w[0].w, w[1].w}, x.z, x.w, T{});
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Words4 x = operand(vectors + i * WARPS * STEP, pitch, batch, WHOLE || left > i * WARPS * STEP);
            multiply_tile(sums[i], {w[i].x, 0, w[i].y, 0}, x.x, x.y, T{});
            multiply_tile(sums[i], {w[i].z, 0, w[i].w, 0}, x.z, x.w, T{});
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = PAIR ? 0 : i * WARPS * STEP;
            if (left <= column) continue;
            float weights[VEC];
            unpack16<VEC, T>(weights, w[i]);
#pragma unroll
            for (int b = 0; b < B; b++) {
                float x[VEC];
                unpack16<VEC, T>(x, *(const Words4*)(vectors + b * pitch + column));
#pragma unroll
                for (int v = 0; v < VEC; v++) sums[i][b] += weights[v] * x[v];
            }
        }
    }
}

// A warp's sums for a tile: `to` is (B, TILE).
DEVICE void keep(float* to, float (&sums)[2][SUMS], int batch) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        if constexpr (TENSOR) {
            const int vector = lane % 4 * 2 + i % 2;
            if ((PAIR || i < 2) && vector < batch) to[vector * TILE + lane / 4 + i / 2 * 8] = sums[0][i] + sums[1][i];
        } else {
#pragma unroll
            for (int r = 0; r < (PAIR ? 2 : 1); r++) {
                float sum[1] = {PAIR ? sums[r][i] : sums[0][i] + sums[1][i]};
                sum_lanes<1, 1, 4>(sum, lane);
                if (lane % 4 == i % 4) to[i * TILE + lane / 4 + r * 8] = sum[0];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[r][i] = 0.0f;
}

// What a thread does with one output: `fetch` ahead of everything, `fetch_sum` behind earlier kernels, `finish` behind
// the product.
struct Output {
    int64 row;
    int place, vector;                       // row of the block
    bool exists, convolved;
    float bias, sum;
#if TAPS
    Window<TAPS, CONV> window;
#endif

    DEVICE void fetch(const Params& p, int64 first_row, int rows, int number) {
        place = number % rows, row = first_row + place, vector = number / rows;
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
    DEVICE void finish(const Params& p, const float* partial) {
        if (!exists) return;
        float product = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            product += partial[((place / TILE * WARPS + w) * B + vector) * TILE + place % TILE];
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

// The vectors, normalised or as they are.
DEVICE void prepare(const Params& p, IO* vectors, int pitch, const IO* norm, float* scratch) {
    const int k = (int)p.k, batch = (int)p.batch, groups = (int)p.groups;
    if constexpr (NORM) {
        const Source<RES> source{(RES*)p.input, nullptr, nullptr, norm, p.input_stride, 0, 0, batch, 1, k, (float)p.eps};
        normalise<B, HELD, AHEAD>(vectors, pitch, source, scratch);
    } else if constexpr (GATED) {
        const Source<IO> source{(IO*)p.input, nullptr, p.gate, norm, p.input_stride, 0, p.gate_stride,
                                batch, groups, k / groups, (float)p.eps};
        normalise<B, HELD, AHEAD>(vectors, pitch, source, scratch);
    } else {
        bring<B>(vectors, pitch, (const IO*)p.input, p.input_stride, batch, k);
    }
    if constexpr (!ALIGNED || !TENSOR) clear<B>(vectors, pitch, batch, k);  // otherwise nothing beyond them is read
    block_barrier();
}

KERNEL(linear, THREADS, BLOCKS) {
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = (int)p.k, batch = (int)p.batch;
    const int pitch = (k + 63) / 64 * 64 + 32;  // rows of vectors lie in different banks
    Words4* const slots = (Words4*)shared_memory + threadIdx.x;
    IO* const vectors = (IO*)((Words4*)shared_memory + AHEAD * 2 * THREADS);
    IO* const norm = vectors + B * pitch;                              // with a norm: its weights
    float* const scratch = (float*)(norm + (NORM || GATED ? pitch : 0));  // WARPS x B
    float* const partial = scratch + WARPS * B;                        // tiles x WARPS x B x TILE

    const int64 first_tile = blockIdx.x * p.tiles, all_tiles = (p.rows + TILE - 1) / TILE, first_row = first_tile * TILE;
    const int tiles = (int)(all_tiles - first_tile < p.tiles ? all_tiles - first_tile : p.tiles);
    const int rounds = (k + COLUMNS - 1) / COLUMNS;  // of a tile
    const IO* norm_weight = nullptr;
    if constexpr (NORM || GATED) norm_weight = stage(norm, p.norm, k);
    Walk walk;
    walk.begin(p, first_row, tiles, rounds);
#pragma unroll
    for (int u = 0; u < AHEAD; u++) walk.copy(slots + u * 2 * THREADS), walk.next();
    Output output;
    output.fetch(p, first_row, tiles * TILE, threadIdx.x);
    wait_for_earlier_kernels();
    output.fetch_sum(p);
    prepare(p, vectors, pitch, norm_weight, scratch);

    float sums[2][SUMS] = {};
    int slot = 0;
    const int first = warp * STEP + lane % 4 * VEC;
    for (int tile = 0; tile < tiles; tile++) {
        int at = first;
        for (int round = 0; round < rounds; round++, at += COLUMNS) {
            copies_wait<AHEAD - 1>();
            Words4* const mine = slots + slot * 2 * THREADS;
            const Words4 w[2] = {load16_shared(mine), load16_shared(mine + THREADS)};
            walk.copy(mine), walk.next();
            slot = slot + 1 == AHEAD ? 0 : slot + 1;
            multiply(sums, w, vectors + at, pitch, batch, k - at);
        }
        keep(partial + (tile * WARPS + warp) * B * TILE, sums, batch);
    }
    block_barrier();
    const int outputs = tiles * TILE * batch;
    for (int number = threadIdx.x; number < outputs; number += THREADS) {
        if (number >= THREADS) output.fetch(p, first_row, tiles * TILE, number), output.fetch_sum(p);
        output.finish(p, partial);
    }
}
