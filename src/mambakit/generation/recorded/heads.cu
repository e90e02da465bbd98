// One token of Mamba-2's recurrence, and its gate: the states are read, moved on and written back, 16 bytes at a
// time, and nothing else here costs anything.
//
// A block owns some of one head's channels in one row of the batch. LANES threads hold one channel's states, Q
// times VS of them side by side; a thread has CPT channels, all of whose states it asks for first.
//
// Settings: LANES, LOADS (Q), CPT, WHOLE_N (no padded states, 16-byte accesses), STATE (the states' type), GATE (multiply by
// silu(z); otherwise the norm does).

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
        *(Words4*)(to + first) = Words4{words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
        for (int i = 0; i < VS; i++)
            if (first + i < n) store(to + first + i, from[i]);
    }
}

DEVICE void read_vector(float (&to)[VS], const IO* from, int first, int n) {
#pragma unroll
    for (int i = 0; i < VS; i++) to[i] = first + i < n ? load(from[first + i]) : 0.0f;
}

KERNEL(heads, THREADS, 2) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % LANES, n = (int)p.n;
    const int part = (int)(blockIdx.x % p.parts);
    const int64 head = blockIdx.x / p.parts % p.heads, row = blockIdx.x / p.parts / p.heads;
    const auto channel = [&](int i) { return part * PART + (i * WARPS + warp) * SIDE + lane / LANES; };
    const auto first = [&](int j) { return (j * LANES + q) * VS; };
    STATE* const state = p.state + (row * p.heads + head) * p.p * n;

    Words4 h[CPT][Q];
#pragma unroll
    for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < Q; j++)
            if (channel(i) < p.p && first(j) < n) h[i][j] = read_states(state + (int64)channel(i) * n, first(j), n);
    const float rate = -LOG2E * exp2_fast(LOG2E * p.A_log[head]), bias = p.dt_bias[head], skip = p.D[head];
    let_next_kernel_start();
    wait_for_earlier_kernels();

    const float step = softplus<sizeof(IO) == 4>(load(p.dt[row * p.stride + head]) + bias);
    const float dt = fminf(fmaxf(step, (float)p.least), (float)p.most), decay = exp2_fast(dt * rate);
    const int64 group = head / p.heads_per_group * n;
    const IO* const x = p.x + row * p.stride + head * p.p;
    // Channels whose sums this thread will hold.
    constexpr int KEPT = CPT > LANES ? CPT / LANES : 1;
    const int begin = first_sum<CPT, 1, LANES>(lane);
    float through[KEPT], gate[KEPT], y[CPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = channel(begin + i);
        if (c >= p.p) continue;
        through[i] = skip * load(x[c]);
        if constexpr (GATE) gate[i] = load(p.z[row * p.stride + head * p.p + c]);
    }
#pragma unroll
    for (int i = 0; i < CPT; i++) y[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < Q; j++) {
        if (first(j) >= n) continue;
        float B[VS], C[VS];
        read_vector(B, p.B + row * p.stride + group, first(j), n);
        read_vector(C, p.C + row * p.stride + group, first(j), n);
#pragma unroll
        for (int i = 0; i < CPT; i++) {
            if (channel(i) >= p.p) continue;
            const float input = dt * load(x[channel(i)]);
            float s[VS];
            unpack16<VS, STATE>(s, h[i][j]);
#pragma unroll
            for (int v = 0; v < VS; v++) {
                s[v] = decay * s[v] + input * B[v];
                y[i] += s[v] * C[v];
            }
            write_states(state + (int64)channel(i) * n, first(j), n, s);
        }
    }
    sum_lanes<CPT, 1, LANES>(y, lane);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = channel(begin + i);
        if (c >= p.p) continue;
        float out = y[i] + through[i];
        if constexpr (GATE) out *= silu(gate[i]);
        store(p.y + (row * p.heads + head) * p.p + c, out);  // lanes with the same sum write the same
    }
}
