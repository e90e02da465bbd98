// The causal depthwise convolution on a GPU: every input read once from memory, every output written once.
//
// A thread owns CH neighbouring channels of a strip of TOKENS tokens and walks along it with the last W inputs in
// registers; a warp covers 32 CH channels, a block STRIPS strips one after the other in time. The tokens before a
// strip (and, in the backward pass, those after it) are read by two strips, mostly from cache.
//
// Settings of a compilation: IO (float, bf16, half), W taps, CH, ALIGNED (vector accesses are possible), PACKED
// (seq_idx given), SILU, and one of the kernels' names.

constexpr int THREADS = 256;
constexpr int STRIPS = THREADS / 32;
constexpr int TOKENS = 64;
constexpr int AHEAD = W * ((4 + W - 1) / W);  // tokens on their way from memory while as many are computed

struct Params {
    const IO *x, *dy;                // (b, l, d) with strides in elements; the last axis is contiguous
    IO *y, *dx;                      // contiguous
    const float *weight, *bias;      // (d, W), (d)
    const float *initial, *dfinal;   // (b, W - 1, d)
    const int* seq_idx;              // (b, l)
    float *final, *dinitial;         // (b, W - 1, d)
    float *dweight, *dbias;          // by row and block of tokens: (b, blocks, d, W), (b, blocks, d)
    int64 x_b, x_l, dy_b, dy_l;
    int64 length, d, token_blocks, channel_blocks;
};

struct Values { float v[CH]; };
constexpr int WORDS = sizeof(IO) * CH / 4;  // a thread's channels of one token, as 32-bit words
struct alignas(4 * WORDS) Packed { unsigned word[WORDS]; };

struct Place {
    int64 row, block, start, stop, first;  // batch row, block of tokens, tokens of the strip, first channel
    int count;                             // channels that exist

    DEVICE explicit Place(const Params& p) {
        int64 rest = blockIdx.x;
        const int64 channels = rest % p.channel_blocks;
        rest /= p.channel_blocks;
        block = rest % p.token_blocks, row = rest / p.token_blocks;
        first = (channels * 32 + threadIdx.x % 32) * CH;
        const int64 left = p.d - first;
        count = left < 0 ? 0 : left < CH ? (int)left : CH;
        start = (block * STRIPS + threadIdx.x / 32) * TOKENS;
        stop = start + TOKENS < p.length ? start + TOKENS : p.length;
    }
};

// The first `count` of the channels; where accesses are not aligned, those that exist one by one.
DEVICE Packed read(const IO* from, int count) {
    if constexpr (ALIGNED) return *(const Packed*)from;
    union { Packed packed; IO v[CH]; } mixed{};
#pragma unroll
    for (int c = 0; c < CH; c++)
        if (c < count) mixed.v[c] = from[c];
    return mixed.packed;
}

DEVICE Values unpack(const Packed& packed) {
    Values values;
    unpack<IO, CH>(values.v, packed.word);
    return values;
}

DEVICE void write(IO* to, const Values& values, int count) {
    if constexpr (ALIGNED) {
        Packed packed;
        pack<IO, CH>(packed.word, values.v);
        *(Packed*)to = packed;
    } else {
#pragma unroll
        for (int c = 0; c < CH; c++)
            if (c < count) store(to + c, values.v[c]);
    }
}

DEVICE Values read_floats(const float* from, int64 stride, int count) {
    Values values;
#pragma unroll
    for (int c = 0; c < CH; c++) values.v[c] = from && c < count ? from[c * stride] : 0.0f;
    return values;
}

DEVICE void write_floats(float* to, const Values& values, int count) {
#pragma unroll
    for (int c = 0; c < CH; c++)
        if (c < count) to[c] = values.v[c];
}

// The last W - 1 inputs before the next token, oldest first, zero where they belong to another document than the
// last of them; and how many tokens of this document there are among them.
struct Window {
    Values x[W];
    int depth;

    DEVICE void clear() {
        depth = 0;
#pragma unroll
        for (int k = 0; k < W; k++) x[k] = Values{};
    }
    // Take in the next token's input; `fresh` where it begins a document.
    DEVICE void push(const Values& next, bool fresh) {
        if (PACKED && fresh) clear();
#pragma unroll
        for (int k = 0; k < W - 1; k++) x[k] = x[k + 1];
        x[W - 1] = next;
        depth = depth < W ? depth + 1 : W;
    }
};

// A strip's inputs by token, counted from its first; what lies before the row's first token is the state.
struct Strip {
    const IO* x;
    const int* documents;
    int64 start;
    int stride;

    DEVICE Strip(const Params& p, const Place& at) {
        x = p.x + at.row * p.x_b + at.start * p.x_l + at.first;
        documents = PACKED ? p.seq_idx + at.row * p.length + at.start : nullptr;
        start = at.start, stride = (int)p.x_l;
    }
    DEVICE bool begins(int t) const {
        if constexpr (!PACKED) return false;
        return start + t > 0 && documents[t] != documents[t - 1];
    }
    DEVICE Packed input(int t, int count) const { return read(x + t * stride, count); }
    // Fill a window with the W - 1 inputs before the strip.
    DEVICE void fill(const Params& p, const Place& at, Window& window) const {
        window.clear();
#pragma unroll
        for (int t = 1 - W; t < 0; t++) {
            if (start + t >= 0) {
                window.push(unpack(input(t, at.count)), begins(t));
            } else {
                const int64 state = (at.row * (W - 1) + t + W - 1) * p.d + at.first;
                window.push(read_floats(p.initial ? p.initial + state : nullptr, 1, at.count), false);
            }
        }
    }
};

// =========================================================================================================
#ifdef KERNEL_forward

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
#endif

// =========================================================================================================
#ifdef KERNEL_backward

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
#endif
