// Causal depthwise convolution, forward and backward, over (b, l, d) with contiguous channels.
//
// A strip of LANES channels runs through a few tokens with its taps and its last w - 1 inputs in registers, then its
// neighbour does, so that every input is read once and memory is read along rows. A document's first token empties
// the window. The backward pass runs the same way: it recomputes the output before the activation, keeps the w - 1
// unfinished rows of the inputs' gradient, and looks w - 1 tokens beyond its end. See MATH.md.

#include "kernel.h"

namespace mambakit {
namespace causal_conv1d {

struct Args {
    // Inputs. Sequences have strides (in elements) of a row of the batch and of a token.
    const void* x;
    int64_t x_batch, x_token;
    const float* weight;    // (d, w)
    const float* bias;      // (d,) or null
    const float* initial;   // (b, w - 1, d) or null
    const uint8_t* starts;  // (b, l) or null
    // Outputs
    void* y;       // (b, l, d)
    float* final;  // (b, w - 1, d), may be `initial`
    // Backward only: gradients of the outputs, then of the inputs
    const void* grad_y;
    const float* grad_final;
    void* grad_x;
    float* grad_weight;   // (d, w)
    float* grad_bias;     // (d,) or null
    float* grad_initial;  // (b, w - 1, d) or null
    // Sizes
    int64_t b, l, d, w;
    int64_t silu, is_bf16, threads;
};

constexpr int64_t TILE = 128;   // tokens per task
constexpr int64_t GROUP = 16;   // strips per task
constexpr int64_t STEP = 16;     // tokens that a strip takes at once, before its neighbour does
constexpr int64_t MOST_TAPS = 32;
constexpr int64_t PARTS = 64;   // partial sums of the weights' gradient, at most about

// The filter of one strip: taps, bias and the window of past inputs. W is the width at compile time, or
// MOST_TAPS for any.
template <class T, int W>
struct Strip {
    int64_t row, channel;
    int lanes;
    vfloat tap[W], window[W], bias;

    static MAMBAKIT_INLINE int width(const Args& a) { return W < MOST_TAPS ? W : static_cast<int>(a.w); }

    MAMBAKIT_INLINE void begin(const Args& a, int64_t of_row, int64_t of_channel, int64_t t) {
        row = of_row;
        channel = of_channel;
        lanes = static_cast<int>(least(LANES, a.d - channel));
        const int w = width(a);
        load_taps(a.weight + channel * w, w);
        bias = a.bias ? load(a.bias + channel, lanes) : vfloat{};
        look_back(a, t);
    }

    // From (lanes, w) in memory to w vectors.
    MAMBAKIT_INLINE void load_taps(const float* weight, int w) {
        float lane[W][LANES];
        if (lanes == LANES) {  // a loop of known length becomes shuffles
            for (int i = 0; i < LANES; ++i)
                for (int k = 0; k < w; ++k) lane[k][i] = weight[i * w + k];
        } else {
            for (int i = 0; i < LANES; ++i)
                for (int k = 0; k < w; ++k) lane[k][i] = i < lanes ? weight[i * w + k] : 0;
        }
        for (int k = 0; k < w; ++k) tap[k] = load(lane[k]);
    }

    MAMBAKIT_INLINE const uint8_t* starts(const Args& a) const {
        return a.starts ? a.starts + row * a.l : nullptr;
    }

    MAMBAKIT_INLINE vfloat input(const Args& a, int64_t t) const {
        const T* x = static_cast<const T*>(a.x) + row * a.x_batch + t * a.x_token + channel;
        prefetch(x);
        return load(x, lanes);
    }

    // Where the state's number i of this strip lies.
    MAMBAKIT_INLINE int64_t state(const Args& a, int64_t i) const {
        return (row * (width(a) - 1) + i) * a.d + channel;
    }

    // window[k] becomes what tap k of token t sees, k < w - 1, unless t starts a document.
    MAMBAKIT_INLINE void look_back(const Args& a, int64_t t) {
        const int w = width(a);
        bool open = true;
        for (int distance = 1; distance < w; ++distance) {
            const int64_t seen = t - distance;
            if (distance > 1 && a.starts && seen + 1 > 0) open = open && !starts(a)[seen + 1];
            vfloat& slot = window[w - 1 - distance];
            if (open && seen >= 0) slot = input(a, seen);
            else if (open && a.initial) slot = load(a.initial + state(a, w - 1 + seen), lanes);
            else slot = vfloat{};
        }
    }

    MAMBAKIT_INLINE void forget(const Args& a) {
        for (int k = 0; k < width(a) - 1; ++k) window[k] = vfloat{};
    }

    // The filter's output before the activation; the newest input enters the window.
    MAMBAKIT_INLINE vfloat filter(const Args& a, vfloat x) {
        const int w = width(a);
        window[w - 1] = x;
        vfloat sum = bias;
        for (int k = 0; k < w; ++k) sum = sum + tap[k] * window[k];
        return sum;
    }

    MAMBAKIT_INLINE void shift(const Args& a) {
        for (int k = 0; k < width(a) - 1; ++k) window[k] = window[k + 1];
    }
};

template <class T, int W, bool SILU>
MAMBAKIT_INLINE void filter_step(const Args& a, Strip<T, W>& strip, int64_t begin, int64_t end) {
    const uint8_t* starts = strip.starts(a);
    T* y = static_cast<T*>(a.y) + strip.row * a.l * a.d + strip.channel;
    for (int64_t t = begin; t < end; ++t) {
        if (starts && starts[t]) strip.forget(a);
        const vfloat sum = strip.filter(a, strip.input(a, t));
        prefetch(y + t * a.d);
        store(y + t * a.d, SILU ? silu(sum) : sum, strip.lanes);
        strip.shift(a);
    }
}

template <class T, int W, bool SILU>
void filter_tile(const Args& a, int64_t row, int64_t channel, int64_t strips, int64_t begin, int64_t end) {
    if (end - begin <= STEP) {  // one token, most of all
        for (int64_t i = 0; i < strips; ++i) {
            Strip<T, W> strip;
            strip.begin(a, row, channel + i * LANES, begin);
            filter_step<T, W, SILU>(a, strip, begin, end);
        }
        return;
    }
    Strip<T, W> strip[GROUP];
    for (int64_t i = 0; i < strips; ++i) strip[i].begin(a, row, channel + i * LANES, begin);
    for (int64_t t = begin; t < end; t += STEP)
        for (int64_t i = 0; i < strips; ++i) {
            Strip<T, W> local = strip[i];  // stays in registers
            filter_step<T, W, SILU>(a, local, t, least(end, t + STEP));
            for (int k = 0; k < local.width(a) - 1; ++k) strip[i].window[k] = local.window[k];
        }
}

// The last w - 1 inputs of every row, zeros where they belong to another document than the last token.
// Rows are written in the order in which they are read, so that the new state may overwrite the old.
template <class T>
void keep_final(const Args& a) {
    for (int64_t row = 0; row < a.b; ++row) {
        int64_t first = 0;  // of the last document
        if (a.starts)
            for (int64_t t = most(0, a.l - a.w + 1); t < a.l; ++t)
                if (a.starts[row * a.l + t]) first = t;
        const bool continued = a.initial && first == 0;
        for (int64_t i = 0; i < a.w - 1; ++i) {
            const int64_t seen = a.l - (a.w - 1) + i;
            float* to = a.final + (row * (a.w - 1) + i) * a.d;
            for (int64_t c = 0; c < a.d; c += LANES) {
                const int lanes = static_cast<int>(least(LANES, a.d - c));
                vfloat v{};
                if (seen >= first)
                    v = load(static_cast<const T*>(a.x) + row * a.x_batch + seen * a.x_token + c, lanes);
                else if (seen < 0 && continued)
                    v = load(a.initial + (row * (a.w - 1) + a.w - 1 + seen) * a.d + c, lanes);
                store(to + c, v, lanes);
            }
        }
    }
}

template <class T, int W>
void forward_tiles(const Args& a) {
    const int64_t tiles = ceil_div(a.l, TILE), groups = ceil_div(a.d, GROUP * LANES);
    // Below about 16 k numbers a second thread costs more than it brings.
    const int64_t threads = a.b * a.l * a.d < 16384 ? 1 : a.threads;
    parallel_for(a.b * tiles * groups, threads, [&](int64_t task) {
        const int64_t group = task % groups, tile = task / groups % tiles, row = task / groups / tiles;
        const int64_t begin = tile * TILE, end = least(a.l, begin + TILE);
        const int64_t first = group * GROUP * LANES;
        const int64_t strips = least(GROUP, ceil_div(a.d - first, LANES));
        if (a.silu) filter_tile<T, W, true>(a, row, first, strips, begin, end);
        else filter_tile<T, W, false>(a, row, first, strips, begin, end);
    });
}

// The backward pass of one strip: what its forward pass needs, the gradients of the inputs in the window, which
// later tokens still add to, and the sums over time that are the gradients of taps and bias.
template <class T, int W>
struct BackwardStrip {
    Strip<T, W> strip;
    vfloat unfinished[W], grad_tap[W], grad_bias;
    int64_t first, end;  // the inputs whose gradients are this task's, and not yet finished

    void begin(const Args& a, int64_t row, int64_t channel, int64_t begin_, int64_t end_) {
        strip.begin(a, row, channel, begin_);
        first = begin_ == 0 ? -(strip.width(a) - 1) : begin_;
        end = end_;
        for (int k = 0; k < strip.width(a); ++k) unfinished[k] = grad_tap[k] = vfloat{};
        grad_bias = vfloat{};
    }

    MAMBAKIT_INLINE void finish(const Args& a, int64_t t, vfloat grad) {
        if (t < first || t >= end) return;
        T* grad_x = static_cast<T*>(a.grad_x) + strip.row * a.l * a.d + strip.channel;
        prefetch(grad_x + t * a.d);
        if (t >= 0) store(grad_x + t * a.d, grad, strip.lanes);
        else if (a.grad_initial)
            store(a.grad_initial + strip.state(a, strip.width(a) - 1 + t), grad, strip.lanes);
    }

    // A document ends before token t: nothing is added to its inputs' gradients any more.
    void cut(const Args& a, int64_t t) {
        const int w = strip.width(a);
        for (int k = 0; k < w - 1; ++k) finish(a, t - (w - 1) + k, unfinished[k]);
        for (int k = 0; k < w; ++k) unfinished[k] = vfloat{};
        first = most(first, t);
        strip.forget(a);
    }

    // Tokens from `from` to `to`. Those from `end` on belong to the next task and count for inputs only.
    MAMBAKIT_INLINE void run(const Args& a, int64_t from, int64_t to) {
        const int w = strip.width(a);
        const uint8_t* starts = strip.starts(a);
        const T* grad_y = static_cast<const T*>(a.grad_y) + strip.row * a.l * a.d + strip.channel;
        for (int64_t t = from; t < to; ++t) {
            if (starts && starts[t]) cut(a, t);
            const vfloat sum = strip.filter(a, strip.input(a, t));
            vfloat grad = load(grad_y + t * a.d, strip.lanes);
            prefetch(grad_y + t * a.d);
            if (a.silu) grad = grad * silu_slope(sum, sigmoid(sum));
            if (t < end) {
                for (int k = 0; k < w; ++k) grad_tap[k] = grad_tap[k] + grad * strip.window[k];
                grad_bias = grad_bias + grad;
            }
            unfinished[w - 1] = vfloat{};
            for (int k = 0; k < w; ++k) unfinished[k] = unfinished[k] + grad * strip.tap[k];
            finish(a, t - (w - 1), unfinished[0]);
            for (int k = 0; k < w - 1; ++k) unfinished[k] = unfinished[k + 1];
            strip.shift(a);
        }
    }

    // After the last token: what is unfinished is the final state, whose gradient comes from outside. The
    // sums go to `sums`, w + 1 rows of d: the taps' and the bias's.
    void close(const Args& a, int64_t stop, float* sums) {
        const int w = strip.width(a);
        if (stop == a.l)
            for (int k = 0; k < w - 1; ++k)
                finish(a, stop - (w - 1) + k,
                       unfinished[k] + load(a.grad_final + strip.state(a, k), strip.lanes));
        for (int k = 0; k < w; ++k) store(sums + k * a.d + strip.channel, grad_tap[k], strip.lanes);
        store(sums + w * a.d + strip.channel, grad_bias, strip.lanes);
    }
};

// How the tokens are cut into tasks depends on the sizes alone, so the sums do not depend on the number of
// threads; and few tasks per row, so that few sums are kept.
template <class T, int W>
void backward_tiles(const Args& a) {
    const int64_t groups = ceil_div(a.d, GROUP * LANES);
    const int64_t length = TILE * ceil_div(ceil_div(a.l, TILE) * a.b, PARTS), parts = ceil_div(a.l, length);
    const int64_t threads = a.b * a.l * a.d < 8192 ? 1 : a.threads;
    const int64_t width = (a.w + 1) * a.d;
    Scratch scratch(a.b * parts * width);
    float* sums = scratch.take(a.b * parts * width);
    parallel_for(a.b * parts * groups, threads, [&](int64_t task) {
        const int64_t group = task % groups, part = task / groups % parts, row = task / groups / parts;
        const int64_t begin = part * length, end = least(a.l, begin + length);
        const int64_t stop = least(a.l, end + a.w - 1), first = group * GROUP * LANES;
        const int64_t strips = least(GROUP, ceil_div(a.d - first, LANES));
        BackwardStrip<T, W> strip[GROUP];
        for (int64_t i = 0; i < strips; ++i) strip[i].begin(a, row, first + i * LANES, begin, end);
        for (int64_t t = begin; t < stop; t += STEP)
            for (int64_t i = 0; i < strips; ++i) {
                BackwardStrip<T, W> local = strip[i];
                local.run(a, t, least(stop, t + STEP));
                strip[i] = local;
            }
        for (int64_t i = 0; i < strips; ++i) strip[i].close(a, stop, sums + (row * parts + part) * width);
    });
    for (int64_t part = 1; part < a.b * parts; ++part)
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[part * width + i];
    for (int64_t c = 0; c < a.d; ++c) {
        for (int64_t k = 0; k < a.w; ++k) a.grad_weight[c * a.w + k] = sums[k * a.d + c];
        if (a.grad_bias) a.grad_bias[c] = sums[a.w * a.d + c];
    }
}

template <class T>
void forward_of(const Args& a) {
    switch (a.w) {
        case 2: forward_tiles<T, 2>(a); break;
        case 3: forward_tiles<T, 3>(a); break;
        case 4: forward_tiles<T, 4>(a); break;
        default: forward_tiles<T, MOST_TAPS>(a);
    }
    keep_final<T>(a);
}

template <class T>
void backward_of(const Args& a) {
    switch (a.w) {
        case 2: backward_tiles<T, 2>(a); break;
        case 3: backward_tiles<T, 3>(a); break;
        case 4: backward_tiles<T, 4>(a); break;
        default: backward_tiles<T, MOST_TAPS>(a);
    }
}

void forward(const Args& a) { a.is_bf16 ? forward_of<bf16>(a) : forward_of<float>(a); }

void backward(const Args& a) { a.is_bf16 ? backward_of<bf16>(a) : backward_of<float>(a); }

}  // namespace causal_conv1d
}  // namespace mambakit

MAMBAKIT_KERNEL(causal_conv1d_forward, mambakit::causal_conv1d::Args, mambakit::causal_conv1d::forward)
MAMBAKIT_KERNEL(causal_conv1d_backward, mambakit::causal_conv1d::Args, mambakit::causal_conv1d::backward)
