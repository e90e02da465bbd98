// A linear layer for up to 64 vectors of 16-bit numbers, by the tensor cores. What costs is to read its weights; so a
// block has as many rows as there is work for every multiprocessor, and where the rows do not suffice, a part of the
// columns.
//
// As in linear.cu a thread meets only what it has asked for itself: a block's warps take every so-many-th 32 columns, a
// lane 16 bytes of them, of TILES times 16 rows of weights and of 8 vectors at a time, STAGES ahead. Their sums meet in
// shared memory, those of parts of the columns in global memory: whoever needs them adds them up (rows.cu), or the block
// that comes last.
//
// Settings: THREADS, TILES, VECTOR_TILES (8 vectors each), STAGES, PARTS (of the columns), LAST (the last block adds them
// up).

struct Params {
    const IO *weight, *bias, *input;          // (rows, k); (rows) or null; (batch, k), rows `input_stride` apart
    IO* out;                                  // (batch, rows), unless parts are left
    float* parts;                             // (PARTS, batch, rows)
    unsigned* counters;                       // blocks of rows: parts that are done; zero before and after
    int64 input_stride, batch, rows, k, row_blocks, steps;  // steps of a part
};

constexpr int STEP = 32;                      // columns of a warp at once
constexpr int N = TILES * 16, M = VECTOR_TILES * 8;
constexpr int PIECES = 2 * TILES + VECTOR_TILES;
constexpr int PITCH = N + 4;                  // of sums in shared memory

struct Operands {
    const IO *weight, *input;                 // a lane's first row, at its own columns
    int64 weight_stride, input_stride;        // eight rows further
    Words4* slots;
    int tiles, vectors, columns;              // how many of these exist; columns from the lane's first

    DEVICE void copy_weights(int stage, int step) const {
        const IO* from = weight + step * STEP;
        const bool inside = step * STEP < columns;
#pragma unroll
        for (int t = 0; t < 2 * TILES; t++, from += weight_stride)
            copy16_async_or_zero(slots + (stage * PIECES + t) * THREADS, from, inside && t < tiles);
    }
    DEVICE void copy_inputs(int stage, int step) const {
        const IO* from = input + step * STEP;
        const bool inside = step * STEP < columns;
#pragma unroll
        for (int t = 0; t < VECTOR_TILES; t++, from += input_stride)
            copy16_async_or_zero(slots + (stage * PIECES + 2 * TILES + t) * THREADS, from, inside && t < vectors);
    }
    DEVICE Words4 read(int stage, int piece) const { return load16_shared(slots + (stage * PIECES + piece) * THREADS); }
};

using Sums = float[TILES][VECTOR_TILES][4];

// sums += a step of one stage
DEVICE void multiply(Sums& sums, const Operands& from, int stage) {
    Words4 x[VECTOR_TILES];
#pragma unroll
    for (int v = 0; v < VECTOR_TILES; v++) x[v] = from.read(stage, 2 * TILES + v);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const Words4 low = from.read(stage, 2 * t), high = from.read(stage, 2 * t + 1);
#pragma unroll
        for (int v = 0; v < VECTOR_TILES; v++)
            multiply_tile(sums[t][v], {low.x, high.x, low.y, high.y}, x[v].x, x[v].y, IO{});
#pragma unroll
        for (int v = 0; v < VECTOR_TILES; v++)
            multiply_tile(sums[t][v], {low.z, high.z, low.w, high.w}, x[v].z, x[v].w, IO{});
    }
}

struct alignas(16) Floats { float v[4]; };
struct alignas(8) Rounded { IO v[4]; };

DEVICE void add(Floats& to, const Floats& more) {
#pragma unroll
    for (int i = 0; i < 4; i++) to.v[i] += more.v[i];
}

// Four outputs of one vector.
DEVICE void finish(const Params& p, Floats sum, int64 vector, int64 row) {
    Rounded out;
#pragma unroll
    for (int i = 0; i < 4; i++) store(&out.v[i], sum.v[i] + (p.bias ? load(p.bias[row + i]) : 0.0f));
    *(Rounded*)(p.out + vector * p.rows + row) = out;
}

KERNEL(product, THREADS, 1) {
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, batch = (int)p.batch;
    const unsigned row_blocks = (unsigned)p.row_blocks;
    const int row_block = (int)(blockIdx.x % row_blocks), part = (int)(blockIdx.x / row_blocks);
    const int64 first_row = (int64)row_block * N;
    const int all = (int)((p.k + STEP - 1) / STEP), begin = part * (int)p.steps + warp;
    const int end = PARTS > 1 && (part + 1) * (int)p.steps < all ? (part + 1) * (int)p.steps : all;
    const int row = lane / 4, column = lane % 4 * VEC;
    const Operands from{p.weight + (first_row + row) * p.k + column, p.input + row * p.input_stride + column,
                        8 * p.k, 8 * p.input_stride, (Words4*)shared_memory + threadIdx.x,
                        (int)((p.rows - first_row - row + 7) / 8), (batch - row + 7) / 8, (int)p.k - column};
#pragma unroll
    for (int s = 0; s < STAGES; s++)
        if (begin + s * WARPS < end) from.copy_weights(s, begin + s * WARPS);
    wait_for_earlier_kernels();
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (begin + s * WARPS < end) from.copy_inputs(s, begin + s * WARPS);
        copies_commit();  // the first with all weights
    }
    Sums sums = {};
    int stage = 0;
    for (int step = begin; step < end; step += WARPS) {
        copies_wait<STAGES - 1>();
        multiply(sums, from, stage);
        const int next = step + STAGES * WARPS;
        if (next < end) from.copy_weights(stage, next), from.copy_inputs(stage, next);
        copies_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    float* const shared_sums = (float*)shared_memory;  // (WARPS, M, PITCH), where the slots were
    block_barrier();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int v = 0; v < VECTOR_TILES; v++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                shared_sums[(warp * M + v * 8 + lane % 4 * 2 + i % 2) * PITCH + t * 16 + row + i / 2 * 8] = sums[t][v][i];
    block_barrier();
    for (int number = threadIdx.x; number < batch * (N / 4); number += THREADS) {
        const int vector = number / (N / 4), at = number % (N / 4) * 4;
        if (first_row + at >= p.rows) continue;
        Floats sum{};
#pragma unroll
        for (int w = 0; w < WARPS; w++) add(sum, *(const Floats*)(shared_sums + (w * M + vector) * PITCH + at));
        if constexpr (PARTS > 1)
            store16(p.parts + ((int64)part * batch + vector) * p.rows + first_row + at,
                    Words4{float_bits(sum.v[0]), float_bits(sum.v[1]), float_bits(sum.v[2]), float_bits(sum.v[3])});
        else
            finish(p, sum, vector, first_row + at);
    }
    if constexpr (LAST) {
        publish();
        block_barrier();
        bool last = true;
        if (threadIdx.x == 0) {
            last = add_to_counter(p.counters + row_block, 1) == PARTS - 1;
            if (last) p.counters[row_block] = 0;
        }
        if (!block_all(last)) return;
        publish();
        for (int number = threadIdx.x; number < batch * (N / 4); number += THREADS) {
            const int vector = number / (N / 4), at = number % (N / 4) * 4;
            if (first_row + at >= p.rows) continue;
            Words4 parts[PARTS];
#pragma unroll
            for (int q = 0; q < PARTS; q++)
                parts[q] = load16_fresh(p.parts + ((int64)q * batch + vector) * p.rows + first_row + at);
            Floats sum{};
#pragma unroll
            for (int q = 0; q < PARTS; q++)
                add(sum, Floats{bits_float(parts[q].x), bits_float(parts[q].y), bits_float(parts[q].z), bits_float(parts[q].w)});
            finish(p, sum, vector, first_row + at);
        }
    }
}
