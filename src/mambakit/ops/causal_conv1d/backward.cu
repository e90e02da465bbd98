// All gradients, in one walk along each strip.

// dx lags W - 1 tokens behind: pending[k] is the gradient so far of the input in the window's place k.
KERNEL(backward, THREADS, CH <= 2 ? 3 : 2) {
    const Place at(p);
    Values dweight[W], dbias{};
#pragma unroll
    for (int k = 0; k < W; k++) dweight[k] = Values{};
    if (at.count > 0 && at.start < at.stop) {
        Values weight[W], pending[W];
#pragma unroll
        for (int k = 0; k < W; k++) {
            weight[k] = read_floats(p.weight + at.first * W + k, W, at.count);
            pending[k] = Values{};
        }
        const Values bias = read_floats(p.bias ? p.bias + at.first : nullptr, 1, at.count);
        const Strip strip(p, at);
        Window window;
        strip.fill(p, at, window);
        const int tokens = (int)(at.stop - at.start), d = (int)p.d, dy_stride = (int)p.dy_l;
        // Later tokens whose outputs reach back into the strip.
        const int64 after = p.length - at.stop;
        const int reach = tokens + (after < W - 1 ? (int)after : W - 1);
        const IO* const dy = p.dy + at.row * p.dy_b + at.start * p.dy_l + at.first;
        IO* const dx = p.dx + (at.row * p.length + at.start) * p.d + at.first;

        // Before the strip's own: inputs of the strip before, which writes them, or the state.
        const auto retire_early = [&](int token, const Values& gradient) {
            if (at.start == 0 && p.dinitial && token >= 1 - W)
                write_floats(p.dinitial + (at.row * (W - 1) + token + W - 1) * p.d + at.first, gradient, at.count);
        };
        const auto step = [&](int t, const Packed& x, const Packed& gradient, auto own, auto inside) {
            window.push(unpack(x), strip.begins(t));
#pragma unroll
            for (int k = 0; k < W - 1; k++) pending[k] = pending[k + 1];
            pending[W - 1] = Values{};
            Values g = unpack(gradient);
            if constexpr (SILU) {
#pragma unroll
                for (int c = 0; c < CH; c++) {
                    float u = bias.v[c];
#pragma unroll
                    for (int k = 0; k < W; k++) u += weight[k].v[c] * window.x[k].v[c];
                    const float s = sigmoid(u);
                    g.v[c] *= s * (1.0f + u * (1.0f - s));
                }
            }
#pragma unroll
            for (int k = 0; k < W; k++) {
                const bool reached = !PACKED || W - k <= window.depth;
#pragma unroll
                for (int c = 0; c < CH; c++) {
                    if (reached) pending[k].v[c] += weight[k].v[c] * g.v[c];
                    if (own.value) dweight[k].v[c] += g.v[c] * window.x[k].v[c];
                }
            }
            if (own.value) {
#pragma unroll
                for (int c = 0; c < CH; c++) dbias.v[c] += g.v[c];
            }
            // The oldest input has met all its outputs.
            const int done = t - W + 1;
            if (inside.value || done >= 0) write(dx + done * d, pending[0], at.count);
            else retire_early(done, pending[0]);
        };
        Packed next_x[AHEAD], next_dy[AHEAD];
        const auto fetch = [&](int j, int t) {
            if (t >= reach) return;
            next_x[j] = strip.input(t, at.count);
            next_dy[j] = read(dy + t * dy_stride, at.count);
        };
#pragma unroll
        for (int j = 0; j < AHEAD; j++) fetch(j, j);
        const auto group = [&](int t0, auto inside) {
            Packed here_x[AHEAD], here_dy[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                here_x[j] = next_x[j], here_dy[j] = next_dy[j];
                fetch(j, t0 + AHEAD + j);
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) step(t0 + j, here_x[j], here_dy[j], Yes(), inside);
        };
        // Whole groups of the strip's own tokens ask no questions, so that window and gradients move through
        // registers by name only; the first reaches out of the strip, and the rest and the tokens after ask all.
        int t0 = 0;
        if (AHEAD <= tokens) group(t0, No()), t0 += AHEAD;
#pragma unroll 1
        for (; t0 + AHEAD <= tokens; t0 += AHEAD) group(t0, Yes());
#pragma unroll 1
        for (; t0 < reach; t0 += AHEAD) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                if (t0 + j >= reach) break;
                if (t0 + j < tokens) step(t0 + j, next_x[j], next_dy[j], Yes(), No());
                else step(t0 + j, next_x[j], next_dy[j], No(), No());
                fetch(j, t0 + AHEAD + j);
            }
        }
        if (reach < tokens + W - 1) {
            // The sequence ends in reach: the final state is the window, and its gradient reaches inputs of the
            // last document.
#pragma unroll
            for (int k = 1; k < W; k++) {
                if (!PACKED || W - k <= window.depth) {
                    const Values extra = read_floats(p.dfinal + (at.row * (W - 1) + k - 1) * p.d + at.first, 1, at.count);
#pragma unroll
                    for (int c = 0; c < CH; c++) pending[k].v[c] += extra.v[c];
                }
                const int token = reach - W + k;
                if (token >= tokens) continue;
                if (token >= 0) write(dx + token * d, pending[k], at.count);
                else retire_early(token, pending[k]);
            }
        }
    }

    // Sum the block's strips.
    float* sums = (float*)shared_memory;  // [STRIPS][W + 1][32 CH]
    constexpr int WIDTH = 32 * CH;
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k <= W; k++)
#pragma unroll
        for (int c = 0; c < CH; c++)
            sums[(strip * (W + 1) + k) * WIDTH + lane * CH + c] = k < W ? dweight[k < W ? k : 0].v[c] : dbias.v[c];
    block_barrier();
    const int64 base = (blockIdx.x % p.channel_blocks) * WIDTH, outer = at.row * p.token_blocks + at.block;
    for (int i = threadIdx.x; i < (W + 1) * WIDTH; i += THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < STRIPS; s++) sum += sums[s * (W + 1) * WIDTH + i];
        const int k = i / WIDTH;
        const int64 channel = base + i % WIDTH;
        if (channel >= p.d) continue;
        if (k < W) p.dweight[(outer * p.d + channel) * W + k] = sum;
        else p.dbias[outer * p.d + channel] = sum;
    }
}
