// Normalisation over channels, forward and backward, over rows of d channels that may lie apart.
//
// A row stays in the first-level cache for all its passes: statistics, then the result. The backward pass keeps
// nothing but the inputs; it computes the statistics again. Sums over rows (weight and bias) are kept per task and
// added in the order of the tasks, so they do not depend on the number of threads. See MATH.md.

#include <cmath>

#include "kernel.h"

namespace mambakit {
namespace norm {

struct Args {
    // Inputs: rows of d channels, with their distance in elements
    const void* x;
    int64_t x_row;
    const void* z;  // gate, or null
    int64_t z_row;
    const float* weight;  // (d,) or null
    const float* bias;    // (d,) or null
    // Output
    void* y;  // (rows, d)
    // Backward only: the gradients of the output, then of the inputs
    const void* grad_y;
    void* grad_x;
    void* grad_z;
    float* grad_weight;
    float* grad_bias;
    // Sizes and options
    int64_t rows, d, group;
    int64_t layer, gate_after, is_bf16, threads;
    double eps;
};

enum Gate { NONE, BEFORE, AFTER };

constexpr int64_t TASK = 8192;  // numbers in a task, about: a few microseconds
constexpr int64_t PARTS = 32;   // partial sums of the gradients of weight and bias, at most

// Calls body(c, lanes) for the vectors of one group of channels.
template <class Body>
MAMBAKIT_INLINE void each_vector(int64_t first, int64_t last, const Body& body) {
    int64_t c = first;
    for (; c + LANES <= last; c += LANES) body(c, LANES);
    if (c < last) body(c, static_cast<int>(last - c));
}

MAMBAKIT_INLINE float inverse_root(float mean_square, const Args& a) {
    return 1.0f / std::sqrt(mean_square + static_cast<float>(a.eps));
}

// Normalises one row. `u` is scratch for what is normalised.
template <class T, bool LAYER, Gate GATE>
void forward_row(const Args& a, int64_t row, float* u) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_row;
    const T* z = static_cast<const T*>(a.z) + row * a.z_row;
    T* y = static_cast<T*>(a.y) + row * a.d;
    const float share = 1.0f / static_cast<float>(a.group);
    for (int64_t first = 0; first < a.d; first += a.group) {
        const int64_t last = first + a.group;
        vfloat sum_u{}, squares{};
        each_vector(first, last, [&](int64_t c, int lanes) {
            vfloat v = load(x + c, lanes);
            if (GATE == BEFORE) v = v * silu(load(z + c, lanes));
            if (LAYER) sum_u = sum_u + v;
            else squares = squares + v * v;
            store(u + c, v, lanes);
        });
        const float mean = LAYER ? sum(sum_u) * share : 0.0f;
        if (LAYER)
            each_vector(first, last, [&](int64_t c, int lanes) {
                const vfloat v = keep_first(load(u + c, lanes) - mean, lanes);
                squares = squares + v * v;
            });
        const float r = inverse_root(sum(squares) * share, a);
        each_vector(first, last, [&](int64_t c, int lanes) {
            vfloat v = load(u + c, lanes);
            v = (LAYER ? v - mean : v) * r;
            if (a.weight) v = v * load(a.weight + c, lanes);
            if (a.bias) v = v + load(a.bias + c, lanes);
            if (GATE == AFTER) v = v * silu(load(z + c, lanes));
            store(y + c, v, lanes);
        });
    }
}

// Scratch of a row's backward pass: what is normalised, the gradient of the normalised and scaled, and two factors
// that the gate's derivative needs.
struct Row {
    float *u, *grad, *gate, *slope;
};

// One row of the backward pass; `sums` holds the gradients of weight and bias so far.
template <class T, bool LAYER, Gate GATE>
void backward_row(const Args& a, int64_t row, const Row& at, float* weight_sums, float* bias_sums) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_row;
    const T* z = static_cast<const T*>(a.z) + row * a.z_row;
    const T* grad_y = static_cast<const T*>(a.grad_y) + row * a.d;
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.d;
    T* grad_z = static_cast<T*>(a.grad_z) + row * a.d;
    const float share = 1.0f / static_cast<float>(a.group);
    const auto scaled = [&](vfloat v, int64_t c, int lanes) {
        return a.weight ? v * load(a.weight + c, lanes) : v;
    };
    for (int64_t first = 0; first < a.d; first += a.group) {
        const int64_t last = first + a.group;
        vfloat sum_u{}, squares{}, sum_grad{}, along{};  // `along`: of the gradient with what is normalised
        each_vector(first, last, [&](int64_t c, int lanes) {
            vfloat u = load(x + c, lanes), grad = load(grad_y + c, lanes);
            if (GATE != NONE) {
                const vfloat gate = load(z + c, lanes), open = sigmoid(gate);
                const vfloat factor = gate * open, slope = silu_slope(gate, open);
                store(at.gate + c, factor, lanes);
                store(at.slope + c, (GATE == BEFORE ? u : grad) * slope, lanes);
                if (GATE == BEFORE) u = u * factor;
                else grad = grad * factor;
            }
            store(at.u + c, u, lanes);
            store(at.grad + c, grad, lanes);
            if (LAYER) {
                sum_u = sum_u + u;
            } else {
                squares = squares + u * u;
                along = along + scaled(grad, c, lanes) * u;
            }
        });
        const float mean = LAYER ? sum(sum_u) * share : 0.0f;
        if (LAYER)
            each_vector(first, last, [&](int64_t c, int lanes) {
                const vfloat v = keep_first(load(at.u + c, lanes) - mean, lanes);
                const vfloat grad = scaled(load(at.grad + c, lanes), c, lanes);
                squares = squares + v * v;
                sum_grad = sum_grad + grad;
                along = along + grad * v;
            });
        const float r = inverse_root(sum(squares) * share, a);
        const float mean_grad = LAYER ? sum(sum_grad) * share : 0.0f;
        const float pull = r * r * sum(along) * share;
        each_vector(first, last, [&](int64_t c, int lanes) {
            const vfloat u = load(at.u + c, lanes), grad = load(at.grad + c, lanes);
            const vfloat v = LAYER ? u - mean : u;
            const vfloat normal = v * r;
            vfloat grad_u = scaled(grad, c, lanes) - v * pull;
            if (LAYER) grad_u = grad_u - mean_grad;
            grad_u = grad_u * r;
            if (GATE == BEFORE) {
                store(grad_z + c, grad_u * load(at.slope + c, lanes), lanes);
                grad_u = grad_u * load(at.gate + c, lanes);
            }
            if (GATE == AFTER) {
                vfloat y = scaled(normal, c, lanes);
                if (a.bias) y = y + load(a.bias + c, lanes);
                store(grad_z + c, y * load(at.slope + c, lanes), lanes);
            }
            store(grad_x + c, grad_u, lanes);
            if (a.weight) store(weight_sums + c, load(weight_sums + c, lanes) + grad * normal, lanes);
            if (a.bias) store(bias_sums + c, load(bias_sums + c, lanes) + grad, lanes);
        });
    }
}

template <class T, bool LAYER, Gate GATE>
void forward_rows(const Args& a) {
    const int64_t each = most(1, TASK / most(1, a.d)), tasks = ceil_div(a.rows, each);
    parallel_for(tasks, a.rows * a.d < 2 * TASK ? 1 : a.threads, [&](int64_t task) {
        Scratch scratch(a.d);
        float* u = scratch.take(a.d);
        const int64_t end = least(a.rows, (task + 1) * each);
        for (int64_t row = task * each; row < end; ++row) forward_row<T, LAYER, GATE>(a, row, u);
    });
}

template <class T, bool LAYER, Gate GATE>
void backward_rows(const Args& a) {
    const int64_t each = most(most(1, TASK / most(1, a.d)), ceil_div(a.rows, PARTS));
    const int64_t tasks = most(1, ceil_div(a.rows, each));
    Scratch scratch(2 * a.d * tasks);
    float* sums = scratch.take(2 * a.d * tasks);
    parallel_for(tasks, a.rows * a.d < TASK ? 1 : a.threads, [&](int64_t task) {
        Scratch own(4 * a.d);
        const Row at{own.take(a.d), own.take(a.d), own.take(a.d), own.take(a.d)};
        float* weight_sums = sums + 2 * a.d * task;
        for (int64_t i = 0; i < 2 * a.d; ++i) weight_sums[i] = 0;
        const int64_t end = least(a.rows, (task + 1) * each);
        for (int64_t row = task * each; row < end; ++row)
            backward_row<T, LAYER, GATE>(a, row, at, weight_sums, weight_sums + a.d);
    });
    for (int64_t task = 1; task < tasks; ++task)
        for (int64_t i = 0; i < 2 * a.d; ++i) sums[i] += sums[2 * a.d * task + i];
    for (int64_t c = 0; c < a.d; ++c) {
        if (a.grad_weight) a.grad_weight[c] = sums[c];
        if (a.grad_bias) a.grad_bias[c] = sums[a.d + c];
    }
}

// Calls `Pass<T, LAYER, GATE>::run` for the options of these arguments.
template <template <class, bool, Gate> class Pass, class T, bool LAYER>
void by_gate(const Args& a) {
    if (a.z == nullptr) Pass<T, LAYER, NONE>::run(a);
    else if (a.gate_after) Pass<T, LAYER, AFTER>::run(a);
    else Pass<T, LAYER, BEFORE>::run(a);
}

template <template <class, bool, Gate> class Pass, class T>
void by_kind(const Args& a) {
    a.layer ? by_gate<Pass, T, true>(a) : by_gate<Pass, T, false>(a);
}

template <template <class, bool, Gate> class Pass>
void by_type(const Args& a) {
    a.is_bf16 ? by_kind<Pass, bf16>(a) : by_kind<Pass, float>(a);
}

template <class T, bool LAYER, Gate GATE>
struct Forward {
    static void run(const Args& a) { forward_rows<T, LAYER, GATE>(a); }
};

template <class T, bool LAYER, Gate GATE>
struct Backward {
    static void run(const Args& a) { backward_rows<T, LAYER, GATE>(a); }
};

}  // namespace norm
}  // namespace mambakit

MAMBAKIT_KERNEL(norm_forward, mambakit::norm::Args, mambakit::norm::by_type<mambakit::norm::Forward>)
MAMBAKIT_KERNEL(norm_backward, mambakit::norm::Args, mambakit::norm::by_type<mambakit::norm::Backward>)
