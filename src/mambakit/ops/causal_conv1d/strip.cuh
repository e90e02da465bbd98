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
