// Outputs and the final state.

KERNEL(forward, THREADS, CH <= 2 ? 4 : 3) {
    const Place at(p);
    if (at.count == 0 || at.start >= at.stop) return;
    Values weight[W];
#pragma unroll
    for (int k = 0; k < W; k++) weight[k] = read_floats(p.weight + at.first * W + k, W, at.count);
    const Values bias = read_floats(p.bias ? p.bias + at.first : nullptr, 1, at.count);
    const Strip strip(p, at);
    Window window;
    strip.fill(p, at, window);
    IO* const y = p.y + (at.row * p.length + at.start) * p.d + at.first;
    const int tokens = (int)(at.stop - at.start), y_stride = (int)p.d;
    Packed next[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (j < tokens) next[j] = strip.input(j, at.count);
    const auto step = [&](int t, const Packed& x) {
        window.push(unpack(x), strip.begins(t));
        Values out = bias;
#pragma unroll
        for (int k = 0; k < W; k++)
#pragma unroll
            for (int c = 0; c < CH; c++) out.v[c] += weight[k].v[c] * window.x[k].v[c];
        if constexpr (SILU) {
#pragma unroll
            for (int c = 0; c < CH; c++) out.v[c] *= sigmoid(out.v[c]);
        }
        write(y + t * y_stride, out, at.count);
    };
    // Whole groups without questions, so that the window moves through registers by name only.
    int t0 = 0;
    for (; t0 + AHEAD <= tokens; t0 += AHEAD) {
        Packed here[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            here[j] = next[j];
            if (t0 + AHEAD + j < tokens) next[j] = strip.input(t0 + AHEAD + j, at.count);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) step(t0 + j, here[j]);
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (t0 + j < tokens) step(t0 + j, next[j]);
    if (at.stop == p.length) {
#pragma unroll
        for (int k = 1; k < W; k++)
            write_floats(p.final + (at.row * (W - 1) + k - 1) * p.d + at.first, window.x[k], at.count);
    }
}
