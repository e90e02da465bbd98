// Causal depthwise convolution, forward and backward, over (b, l, d) with contiguous channels.
//
// A strip of LANES channels runs through a tile of tokens with its taps and its last w - 1 inputs in registers, so
// every input is read once. A document's first token empties that window. The backward pass runs the same way:
// it recomputes the output before the activation, keeps the w - 1 unfinished rows of the inputs' gradient in
// registers, and looks w - 1 tokens beyond its tile. See MATH.md.

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

constexpr int64_t TILE = 128;    // tokens: rows of a strip stay in the first-level cache's reach
constexpr int64_t GROUP = 16;    // strips per task
constexpr int64_t MOST_TAPS = 32;
constexpr int64_t PARTS = 64;    // partial sums of the weights' gradient, at most about

// The filter of one strip: taps, bias and the window of past inputs. W is the width at compile time, or
// MOST_TAPS for any.
template <class T, int W>
struct Strip {
    const Args& a;
    const int64_t row, channel;
    const int lanes;
    vfloat tap[W], window[W], bias;

    MAMBAKIT_INLINE int width() const { return W < MOST_TAPS ? W : static_cast<int>(a.w); }

    Strip(const Args& args, int64_t row, int64_t channel)
        : a(args),
          row(row),
          channel(channel),
          lanes(static_cast<int>(least(LANES, args.d - channel))) {
        const int w = width();
        float lane[W][LANES] = {};
        const float* weight = a.weight + channel * w;
        if (lanes == LANES) {
            for (int i = 0; i < LANES; ++i)
                for (int k = 0; k < w; ++k) lane[k][i] = weight[i * w + k];
        } else {
            for (int i = 0; i < lanes; ++i)
                for (int k = 0; k < w; ++k) lane[k][i] = weight[i * w + k];
        }
        for (int k = 0; k < w; ++k) tap[k] = load(lane[k]);
        bias = a.bias ? load(a.bias + channel, lanes) : vfloat{};
    }

    const uint8_t* starts() const { return a.starts ? a.starts + row * a.l : nullptr; }

    vfloat input(int64_t t) const {
        return load(static_cast<const T*>(a.x) + row * a.x_batch + t * a.x_token + channel, lanes);
    }

    // window[k] becomes what tap k of token t sees, k < w - 1, unless t starts a document.
    void look_back(int64_t t) {
        bool open = true;
        const int w = width();
        for (int distance = 1; distance < w; ++distance) {
            const int64_t seen = t - distance;
            if (distance > 1 && a.starts && seen + 1 > 0) open = open && !starts()[seen + 1];
            vfloat& slot = window[w - 1 - distance];
            if (open && seen >= 0) slot = input(seen);
            else if (open && a.initial) slot = load(a.initial + state(w - 1 + seen), lanes);
            else slot = vfloat{};
        }
    }

    int64_t state(int64_t i) const { return (row * (width() - 1) + i) * a.d + channel; }

    MAMBAKIT_INLINE void forget() {
        for (int k = 0; k < width() - 1; ++k) window[k] = vfloat{};
    }

    // The filter's output before the activation; the newest input enters the window.
    MAMBAKIT_INLINE vfloat filter(vfloat x) {
        const int w = width();
        window[w - 1] = x;
        vfloat sum = bias;
        for (int k = 0; k < w; ++k) sum = sum + tap[k] * window[k];
        return sum;
    }

    MAMBAKIT_INLINE void shift() {
        for (int k = 0; k < width() - 1; ++k) window[k] = window[k + 1];
    }
};

template <class T, int W, bool SILU>
void filter_tile(const Args& a, int64_t row, int64_t channel, int64_t begin, int64_t end) {
    Strip<T, W> strip(a, row, channel);
    strip.look_back(begin);
    const uint8_t* starts = strip.starts();
    T* y = static_cast<T*>(a.y) + row * a.l * a.d + channel;
    for (int64_t t = begin; t < end; ++t) {
        if (starts && starts[t]) strip.forget();
        const vfloat sum = strip.filter(strip.input(t));
        store(y + t * a.d, SILU ? silu(sum) : sum, strip.lanes);
        strip.shift();
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
        const int64_t last = least(a.d, (group + 1) * GROUP * LANES);
        for (int64_t c = group * GROUP * LANES; c < last; c += LANES) {
            if (a.silu) filter_tile<T, W, true>(a, row, c, begin, end);
            else filter_tile<T, W, false>(a, row, c, begin, end);
        }
    });
}

// One strip through one tile of the backward pass. `sums` holds w + 1 rows of d: the taps' and the bias's.
template <class T, int W>
void backward_tile(const Args& a, int64_t row, int64_t channel, int64_t begin, int64_t end, float* sums) {
    Strip<T, W> strip(a, row, channel);
    const int w = strip.width(), lanes = strip.lanes;
    const uint8_t* starts = strip.starts();
    const T* grad_y = static_cast<const T*>(a.grad_y) + row * a.l * a.d + channel;
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.l * a.d + channel;
    vfloat unfinished[W] = {};  // gradients of the inputs in the window
    vfloat grad_tap[W], grad_bias = load(sums + w * a.d + channel, lanes);
    for (int k = 0; k < w; ++k) grad_tap[k] = load(sums + k * a.d + channel, lanes);
    int64_t first = begin == 0 ? -(w - 1) : begin;  // input whose gradient is due next

    const auto finish = [&](int64_t t, vfloat grad) {
        if (t < first || t >= end) return;
        if (t >= 0) store(grad_x + t * a.d, grad, lanes);
        else if (a.grad_initial) store(a.grad_initial + strip.state(w - 1 + t), grad, lanes);
    };

    strip.look_back(begin);
    const int64_t stop = least(a.l, end + w - 1);
    for (int64_t t = begin; t < stop; ++t) {
        if (starts && starts[t]) {
            for (int k = 0; k < w - 1; ++k) finish(t - (w - 1) + k, unfinished[k]);
            for (int k = 0; k < w; ++k) unfinished[k] = vfloat{};
            first = t;
            strip.forget();
        }
        const vfloat sum = strip.filter(strip.input(t));
        vfloat grad = load(grad_y + t * a.d, lanes);
        if (a.silu) grad = grad * silu_slope(sum, sigmoid(sum));
        if (t < end) {
            for (int k = 0; k < w; ++k) grad_tap[k] = grad_tap[k] + grad * strip.window[k];
            grad_bias = grad_bias + grad;
        }
        unfinished[w - 1] = vfloat{};
        for (int k = 0; k < w; ++k) unfinished[k] = unfinished[k] + grad * strip.tap[k];
        finish(t - (w - 1), unfinished[0]);
        for (int k = 0; k < w - 1; ++k) unfinished[k] = unfinished[k + 1];
        strip.shift();
    }
    if (stop == a.l)  // what remains is the final state, whose gradient comes from outside
        for (int k = 0; k < w - 1; ++k)
            finish(stop - (w - 1) + k, unfinished[k] + load(a.grad_final + strip.state(k), lanes));
    for (int k = 0; k < w; ++k) store(sums + k * a.d + channel, grad_tap[k], lanes);
    store(sums + w * a.d + channel, grad_bias, lanes);
}

// A task takes several tiles of one row, so that few partial sums of the weights' gradient are kept. How the
// tokens are cut depends on the sizes alone: the result does not depend on the number of threads.
template <class T, int W>
void backward_tiles(const Args& a) {
    const int64_t tiles = ceil_div(a.l, TILE), groups = ceil_div(a.d, GROUP * LANES);
    const int64_t tiles_each = ceil_div(tiles * a.b, PARTS), parts = ceil_div(tiles, tiles_each);
    const int64_t threads = a.b * a.l * a.d < 8192 ? 1 : a.threads;
    const int64_t width = (a.w + 1) * a.d;
    Scratch scratch(a.b * parts * width);
    float* sums = scratch.take(a.b * parts * width);
    parallel_for(a.b * parts * groups, threads, [&](int64_t task) {
        const int64_t group = task % groups, part = task / groups % parts, row = task / groups / parts;
        const int64_t first = group * GROUP * LANES, last = least(a.d, first + GROUP * LANES);
        float* own = sums + (row * parts + part) * width;
        for (int64_t k = 0; k <= a.w; ++k)
            for (int64_t c = first; c < last; ++c) own[k * a.d + c] = 0;
        const int64_t end = least(a.l, (part + 1) * tiles_each * TILE);
        for (int64_t begin = part * tiles_each * TILE; begin < end; begin += TILE)
            for (int64_t c = first; c < last; c += LANES)
                backward_tile<T, W>(a, row, c, begin, least(end, begin + TILE), own);
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
