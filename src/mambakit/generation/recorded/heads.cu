// One token of Mamba-2's recurrence, and its gate: the states are read, moved on and written back, 16 bytes at a
// time, and nothing else here costs anything.
//
// A block owns some of one head's channels in one row of the batch. LANES threads hold one channel's states, Q
// times VS of them side by side; a thread has CPT channels, all of whose states it asks for first.
//
// Settings: LANES, LOADS (Q), CPT, WHOLE_N (no padded states, 16-byte accesses), STATE (the states' type), GATE (multiply by
// silu(z); otherwise the norm does), ALIGNED (B and C can be read in vectors), BLOCKS (of a multiprocessor at least: so
// few registers may a thread have).

struct Params {
    const IO *x, *z, *dt, *B, *C;             // rows `stride` apart: (h, p), (h, p), (h), (g, n), (g, n)
    const float *dt_bias, *A_log, *D;         // (h)
    STATE* state;                             // (batch, h, p, n)
    IO* y;                                    // (batch, h, p)
    int64 stride, batch, heads, p, n, heads_per_group, parts;
    double least, most;                       // step sizes are clamped to these
};

constexpr int Q = LOADS;
constexpr int VS = 16 / sizeof(STATE);
constexpr int SIDE = 32 / LANES;              // channels of a warp side by side
constexpr int PART = WARPS * SIDE * CPT;      // channels of a block

DEVICE Words4 read_states(const STATE* from, int first, int n) {
    if constexpr (WHOLE_N) {
        return *(const Words4*)(from + first);
    } else {
        float numbers[VS];
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < VS; i++) numbers[i] = first + i < n ? load(from[first + i]) : 0.0f;
        pack<STATE, VS>(words, numbers);
        return Words4{words[0], words[1], words[2], words[3]};
    }
}

DEVICE void write_states(STATE* to, int first, int n, const float (&from)[VS]) {
    if constexpr (WHOLE_N) {
        unsigned words[4];
        pack<STATE, VS>(words, from);
        store16(to + first, Words4{words[0], words[1], words[2], words[3]});
    } else {
#pragma unroll
        for (int i = 0; i < VS; i++)
            if (first + i < n) store(to + first + i, from[i]);
    }
}

struct alignas(ALIGNED ? VS * sizeof(IO) < 16 ? VS * sizeof(IO) : 16 : sizeof(IO)) Vector { IO v[VS]; };

DEVICE Vector read_vector(const IO* from, int first, int n) {
    Vector found{};
    if constexpr (ALIGNED) {
        if (first < n) found = *(const Vector*)(from + first);
    } else {
#pragma unroll
        for (int i = 0; i < VS; i++)
            if (first + i < n) found.v[i] = from[first + i];
    }
    return found;
}

KERNEL(heads, THREADS, BLOCKS) {
    let_next_kernel_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % LANES, n = (int)p.n;
    // In 32 bits: a division of 64 takes as long as the rest of a thread's work.
    const unsigned parts = (unsigned)p.parts, heads = (unsigned)p.heads, block = blockIdx.x / parts;
    const int part = (int)(blockIdx.x % parts), head = (int)(block % heads), sizes = (int)p.p;
    const int64 row = block / heads;
    const auto channel = [&](int i) { return part * PART + (i * WARPS + warp) * SIDE + lane / LANES; };
    const auto first = [&](int j) { return (j * LANES + q) * VS; };
    STATE* const state = p.state + (row * heads + head) * sizes * n;

    Words4 h[CPT][Q];
#pragma unroll
    for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < Q; j++)
            if (channel(i) < sizes && first(j) < n) h[i][j] = read_states(state + channel(i) * n, first(j), n);
    const float logarithm = p.A_log[head], bias = p.dt_bias[head], skip = p.D[head];
    wait_for_earlier_kernels();

    // Everything is asked for before anything is used.
    constexpr int KEPT = CPT > LANES ? CPT / LANES : 1;  // channels whose sums this thread will hold
    const int begin = first_sum<CPT, 1, LANES>(lane), group = head / (int)p.heads_per_group * n;
    const IO* const own = p.x + row * p.stride + head * sizes;
    const IO raw = p.dt[row * p.stride + head];
    IO x[CPT], kept[KEPT], z[KEPT];
    Vector B[Q], C[Q];
#pragma unroll
    for (int i = 0; i < CPT; i++) x[i] = channel(i) < sizes ? own[channel(i)] : IO{};
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = channel(begin + i);
        if (c >= sizes) continue;
        kept[i] = own[c];
        if constexpr (GATE) z[i] = p.z[row * p.stride + head * sizes + c];
    }
#pragma unroll
    for (int j = 0; j < Q; j++) {
        B[j] = read_vector(p.B + row * p.stride + group, first(j), n);
        C[j] = read_vector(p.C + row * p.stride + group, first(j), n);
    }
    keep_order();

    const float step = softplus<sizeof(IO) == 4>(load(raw) + bias);
    const float dt = fminf(fmaxf(step, (float)p.least), (float)p.most), decay = exp2_fast(-LOG2E * dt * exp2_fast(LOG2E * logarithm));
    float y[CPT];
#pragma unroll
    for (int i = 0; i < CPT; i++) y[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < Q; j++) {
        if (first(j) >= n) continue;
#pragma unroll
        for (int i = 0; i < CPT; i++) {
            if (channel(i) >= sizes) continue;
            const float input = dt * load(x[i]);
            float s[VS];
            unpack16<VS, STATE>(s, h[i][j]);
#pragma unroll
            for (int v = 0; v < VS; v++) {
                s[v] = decay * s[v] + input * load(B[j].v[v]);
                y[i] += s[v] * load(C[j].v[v]);
            }
            write_states(state + channel(i) * n, first(j), n, s);
        }
    }
    sum_lanes<CPT, 1, LANES>(y, lane);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = channel(begin + i);
        if (c >= sizes) continue;
        float out = y[i] + skip * load(kept[i]);
        if constexpr (GATE) out *= silu(load(z[i]));
        store(p.y + (row * heads + head) * sizes + c, out);  // lanes with the same sum write the same
    }
}
