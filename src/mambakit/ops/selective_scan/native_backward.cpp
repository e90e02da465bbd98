// The selective scan, backward: tiles in reverse, each from the state that the forward pass kept before it.
//
// Per tile and strip, a block of states at a time: forwards through the tile, keeping decays and decayed states (64 KB
// with AVX-512, which the second cache holds; shorter tiles that fit the first are no faster); then backwards through
// it, with the gradients of the states in registers. The gradients of B and C are sums over channels: across lanes at
// once (a tile of vectors would leave the cache), over the strips of a task, then over the tasks of a group in their
// order. See MATH.md.

#include "strip.h"

namespace mambakit {
namespace selective_scan {
namespace {

constexpr int BLOCK = 8;               // states at once
constexpr int64_t MOST_STRIPS = 8;     // per task
constexpr int64_t TASKS = 16;          // wanted at least
constexpr int64_t PARTIAL = 1 << 22;   // numbers that partial gradients of B and C take, or a tile of each task

// One tile of one strip: per token a vector of each.
struct TileScratch {
    float *dts, *us;  // step sizes, dt x
    float* grads;     // of the scan's output, before skip and gate
    float* ys;        // the scan's output
    float* grad_us;   // of dt x
    float* grad_dts;  // of the step size through the decay, in units of ln 2
    float *decays, *decayed;  // exp(dt A) and exp(dt A) h, for a block of states
    float *B, *C;             // (count, n)
    float *grad_B, *grad_C;   // (count, n): sums over the task's strips
};

// What is kept of a strip between tiles, and accumulated over time.
struct StripSums {
    float* rates;   // A log2(e)
    float* grad_h;  // of the state after the tile, through the later tokens
    float* grad_A;
    float *grad_D, *grad_bias;
};

// Steps, dt x, and the gradient of the scan's output.
template <class T>
float open_tile(const Args& a, const Tile& tile, const Strip& strip, const TileScratch& w) {
    const float longest = step_sizes<T>(a, tile, strip, -a.tile, w.dts, w.us);
    const T* grad_y = static_cast<const T*>(a.grad_y) + (tile.row * a.l + tile.begin) * a.d + strip.channel;
    for (int t = 0; t < tile.count; ++t) {
        vfloat grad = load(grad_y + t * a.d, strip.lanes);
        fetch(grad_y + t * a.d, a.d, -a.tile);
        if (a.z.data) {
            const T* z = at<T>(a.z, tile.row, tile.begin + t, strip.channel);
            fetch(z, a.z.token, -a.tile);
            grad = grad * silu(load(z, strip.lanes));
        }
        store(w.grads + t * LANES, grad);
        store(w.ys + t * LANES, vfloat{});
        store(w.grad_us + t * LANES, vfloat{});
        store(w.grad_dts + t * LANES, vfloat{});
    }
    return longest;
}

// Through the tile for NB states from state s on; h holds the state before the tile.
template <int NB, bool CLAMP>
MAMBAKIT_INLINE void forwards(const Args& a, const Tile& tile, const TileScratch& w, const float* rates,
                              vfloat (&h)[NB], int64_t s) {
    for (int t = 0; t < tile.count; ++t) {
        if (tile.starts_at(t))
            for (int k = 0; k < NB; ++k) h[k] = vfloat{};
        const vfloat dt = load(w.dts + t * LANES), u = load(w.us + t * LANES), grad = load(w.grads + t * LANES);
        const float *B = w.B + t * a.n + s, *C = w.C + t * a.n + s;
        vfloat y = load(w.ys + t * LANES), for_C[NB];
        unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY {
            const vfloat factor = decay<CLAMP>(dt * load(rates + (s + k) * LANES));
            const vfloat decayed = factor * h[k];
            store(w.decays + (t * NB + k) * LANES, factor);
            store(w.decayed + (t * NB + k) * LANES, decayed);
            h[k] = decayed + u * B[k];
            y = y + h[k] * C[k];
            for_C[k] = grad * h[k];
        });
        add_sums(for_C, w.grad_C + t * a.n + s);
        store(w.ys + t * LANES, y);
    }
}

// Back through it, with the gradients of the states.
template <int NB>
MAMBAKIT_INLINE void backwards(const Args& a, const Tile& tile, const TileScratch& w, const StripSums& sums,
                               int64_t s) {
    vfloat later[NB], grad_A[NB];
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { later[k] = load(sums.grad_h + (s + k) * LANES); });
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { grad_A[k] = load(sums.grad_A + (s + k) * LANES); });
    for (int t = tile.count - 1; t >= 0; --t) {
        const vfloat dt = load(w.dts + t * LANES), u = load(w.us + t * LANES), grad = load(w.grads + t * LANES);
        const float *B = w.B + t * a.n + s, *C = w.C + t * a.n + s;
        vfloat grad_u = load(w.grad_us + t * LANES), grad_dt = load(w.grad_dts + t * LANES);
        vfloat for_B[NB];
        unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY {
            const vfloat grad_h = grad * C[k] + later[k];
            for_B[k] = grad_h * u;
            grad_u = grad_u + grad_h * B[k];
            const vfloat through = grad_h * load(w.decayed + (t * NB + k) * LANES);
            grad_dt = grad_dt + through * load(sums.rates + (s + k) * LANES);
            grad_A[k] = grad_A[k] + through * dt;
            later[k] = grad_h * load(w.decays + (t * NB + k) * LANES);
        });
        add_sums(for_B, w.grad_B + t * a.n + s);
        store(w.grad_us + t * LANES, grad_u);
        store(w.grad_dts + t * LANES, grad_dt);
        if (tile.starts_at(t))
            for (int k = 0; k < NB; ++k) later[k] = vfloat{};
    }
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { store(sums.grad_h + (s + k) * LANES, later[k]); });
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { store(sums.grad_A + (s + k) * LANES, grad_A[k]); });
}

template <int NB>
void both_ways(const Args& a, const Tile& tile, const Strip& strip, const TileScratch& w, const StripSums& sums,
               bool clamp, const float* checkpoint, int64_t s) {
    vfloat h[NB];
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { h[k] = load(checkpoint + (s + k) * a.d, strip.lanes); });
    if (clamp) forwards<NB, true>(a, tile, w, sums.rates, h, s);
    else forwards<NB, false>(a, tile, w, sums.rates, h, s);
    backwards<NB>(a, tile, w, sums, s);
}

// Back through the tile with the gradients of NB states alone.
template <int NB, bool CLAMP>
void backwards_alone(const Args& a, const Tile& tile, const TileScratch& w, const StripSums& sums, int64_t s) {
    vfloat later[NB];
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { later[k] = load(sums.grad_h + (s + k) * LANES); });
    for (int t = tile.count - 1; t >= 0; --t) {
        const vfloat dt = load(w.dts + t * LANES), grad = load(w.grads + t * LANES);
        const float* C = w.C + t * a.n + s;
        unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY {
            later[k] = decay<CLAMP>(dt * load(sums.rates + (s + k) * LANES)) * (grad * C[k] + later[k]);
        });
        if (tile.starts_at(t))
            for (int k = 0; k < NB; ++k) later[k] = vfloat{};
    }
    unrolled<NB>([&](auto k) MAMBAKIT_INLINE_BODY { store(sums.grad_h + (s + k) * LANES, later[k]); });
}

template <int NB>
void alone(const Args& a, const Tile& tile, const TileScratch& w, const StripSums& sums, bool clamp, int64_t s) {
    if (clamp) backwards_alone<NB, true>(a, tile, w, sums, s);
    else backwards_alone<NB, false>(a, tile, w, sums, s);
}

// Gradients of x, dt and z of the tile, and the sums over time for D and the bias.
template <class T>
void close_tile(const Args& a, const Tile& tile, const Strip& strip, const TileScratch& w, const StripSums& sums) {
    const vfloat D = a.D ? load(a.D + strip.channel, strip.lanes) : vfloat{};
    const vfloat bias = a.bias ? load(a.bias + strip.channel, strip.lanes) : vfloat{};
    vfloat grad_D = load(sums.grad_D), grad_bias = load(sums.grad_bias);
    const auto place = [&](void* tensor, int64_t token) {
        T* to = static_cast<T*>(tensor) + (tile.row * a.l + token) * a.d + strip.channel;
        fetch(to, a.d, -a.tile);
        return to;
    };
    for (int t = 0; t < tile.count; ++t) {
        const int64_t token = tile.begin + t;
        const vfloat x = load(at<T>(a.x, tile.row, token, strip.channel), strip.lanes);
        const vfloat grad = load(w.grads + t * LANES), grad_u = load(w.grad_us + t * LANES);
        if (a.z.data) {
            const vfloat z = load(at<T>(a.z, tile.row, token, strip.channel), strip.lanes);
            const vfloat grad_y = load(place(const_cast<void*>(a.grad_y), token), strip.lanes);
            const vfloat y = load(w.ys + t * LANES) + D * x;
            store(place(a.grad_z, token), grad_y * y * silu_slope(z, sigmoid(z)), strip.lanes);
        }
        store(place(a.grad_x, token), grad_u * load(w.dts + t * LANES) + D * grad, strip.lanes);
        vfloat grad_dt = load(w.grad_dts + t * LANES) * (1.0f / LOG2_E) + grad_u * x;
        if (a.softplus)
            grad_dt = grad_dt * sigmoid(load(at<T>(a.dt, tile.row, token, strip.channel), strip.lanes) + bias);
        store(place(a.grad_dt, token), grad_dt, strip.lanes);
        grad_D = grad_D + grad * x;
        grad_bias = grad_bias + grad_dt;
    }
    store(sums.grad_D, grad_D);
    store(sums.grad_bias, grad_bias);
}

// How the work is cut. Strips are dealt out to tasks by sizes alone: sums over channels have one order for any number
// of threads. Where that is not enough, time is cut into chunks; in each the tasks go through segments of time at the
// same pace, because partial gradients of B and C, one per task, are kept for one segment.
struct Plan {
    int64_t threads, strips, strips_each, tasks_per_group, tasks;
    int64_t chunks, tiles_each;          // of a chunk
    int64_t units;                       // rows of the batch times chunks
    int64_t segments, tiles_per_segment;  // of a chunk

    explicit Plan(const Args& a) : threads(a.b * a.l * a.d * a.n < 32768 ? 1 : a.threads) {
        const int64_t per_group = strips_per_group(a);
        strips = a.g * per_group;
        strips_each = most(1, least(MOST_STRIPS, a.b * strips / TASKS));
        tasks_per_group = ceil_div(per_group, strips_each);
        tasks = a.g * tasks_per_group;
        chunks = chunks_of_time(a, a.b * tasks, threads, 0.35);
        tiles_each = ceil_div(tiles(a), chunks);
        chunks = ceil_div(tiles(a), tiles_each);
        units = a.b * chunks;
        const int64_t affordable = PARTIAL / most(1, 2 * units * tasks * a.n * a.tile);
        tiles_per_segment = most(1, least(tiles_each, affordable));
        segments = ceil_div(tiles_each, tiles_per_segment);
    }
};

// Strips of a group in a row of the batch, through tiles [begin, end) of a chunk.
struct Task {
    int64_t unit, row, chunk, number, group, first, last, begin, end;

    // `which` counts units and tasks.
    Task(const Args& a, const Plan& p, int64_t which)
        : unit(which / p.tasks), row(unit / p.chunks), chunk(unit % p.chunks), number(which % p.tasks),
          group(number / p.tasks_per_group) {
        const int64_t per_group = strips_per_group(a);
        first = group * per_group + number % p.tasks_per_group * p.strips_each;
        last = least((group + 1) * per_group, first + p.strips_each);
        begin = chunk * p.tiles_each;
        end = least(tiles(a), begin + p.tiles_each);
    }

    // The same in one segment.
    Task of_segment(const Plan& p, int64_t segment) const {
        Task part = *this;
        part.begin = least(end, begin + segment * p.tiles_per_segment);
        part.end = least(end, part.begin + p.tiles_per_segment);
        return part;
    }
};

// Everything that lives across tasks. Sums of a strip are (units, strips, n or 1) vectors.
struct Shared {
    float *rates, *fastest;  // (strips, n) vectors, (strips,)
    float *grad_h, *grad_A, *grad_D, *grad_bias;
    float* grad_B;  // (units, tasks, tiles of a segment, tokens, n)
    float* grad_C;
    double* steps;  // (units, strips) vectors: the time that passes in a chunk; only where there are several

    static int64_t partials(const Args& a, const Plan& p) {
        return p.units * p.tasks * p.tiles_per_segment * a.tile * a.n;
    }

    static int64_t floats(const Args& a, const Plan& p) {
        const int64_t vectors = p.units * p.strips * LANES;
        return p.strips * (a.n * LANES + 1) + (2 * a.n + 4) * vectors + 2 * partials(a, p);
    }

    Shared(const Args& a, const Plan& p, Scratch& scratch) {
        const int64_t vectors = p.units * p.strips * LANES;
        rates = scratch.take(p.strips * a.n * LANES);
        fastest = scratch.take(p.strips);
        grad_h = scratch.take(vectors * a.n);
        grad_A = scratch.take(vectors * a.n);
        grad_D = scratch.take(vectors);
        grad_bias = scratch.take(vectors);
        grad_B = scratch.take(partials(a, p));
        grad_C = scratch.take(partials(a, p));
        steps = reinterpret_cast<double*>(scratch.take(2 * vectors));
        parallel_for(p.strips, p.threads, [&](int64_t i) {
            fastest[i] = decay_rates(a, strip_of(a, i), rates + i * a.n * LANES);
        });
        for (int64_t i = 0; i < vectors * a.n; ++i) grad_A[i] = 0;
        for (int64_t i = 0; i < vectors; ++i) grad_D[i] = grad_bias[i] = 0;
    }

    StripSums of(const Args& a, const Plan& p, int64_t unit, int64_t strip) const {
        const int64_t i = (unit * p.strips + strip) * LANES;
        return {rates + strip * a.n * LANES, grad_h + i * a.n, grad_A + i * a.n, grad_D + i, grad_bias + i};
    }

    // Where a task's partial gradients of B or C for its first token lie.
    int64_t place(const Args& a, const Plan& p, const Task& task) const {
        return (task.unit * p.tasks + task.number) * p.tiles_per_segment * a.tile * a.n;
    }
};

// A task's way back through its tiles.
template <class T>
class Walk {
  public:
    Walk(const Args& a, const Plan& p, const Shared& shared, const Task& task)
        : a(a), p(p), shared(shared), task(task),
          scratch((6 + 2 * BLOCK) * a.tile * LANES + 2 * a.tile * a.n) {
        const int64_t vectors = a.tile * LANES, states = a.tile * a.n;
        for (float** piece : {&w.dts, &w.us, &w.grads, &w.ys, &w.grad_us, &w.grad_dts}) *piece = scratch.take(vectors);
        for (float** piece : {&w.decays, &w.decayed}) *piece = scratch.take(BLOCK * vectors);
        for (float** piece : {&w.B, &w.C}) *piece = scratch.take(states);
    }

    // The gradients of the states after the last tile: given, or none yet.
    void start() const {
        for (int64_t i = task.first; i < task.last; ++i) {
            float* grad_h = shared.of(a, p, task.unit, i).grad_h;
            if (task.chunk == p.chunks - 1)
                gather_states(a.grad_final + task.row * a.d * a.n, a, strip_of(a, i), grad_h);
            else
                for (int64_t k = 0; k < a.n * LANES; ++k) grad_h[k] = 0;
        }
    }

    // All gradients.
    void run() {
        for (int64_t number = task.end - 1; number >= task.begin; --number) {
            const Tile tile(a, task.row, number);
            copy_grouped<T>(a.B, a, tile, task.group, w.B);
            copy_grouped<T>(a.C, a, tile, task.group, w.C);
            const int64_t place = shared.place(a, p, task) + (number - task.begin) * a.tile * a.n;
            w.grad_B = shared.grad_B + place;
            w.grad_C = shared.grad_C + place;
            for (int64_t i = 0; i < tile.count * a.n; ++i) w.grad_B[i] = w.grad_C[i] = 0;
            for (int64_t i = task.first; i < task.last; ++i) {
                const Strip strip = strip_of(a, i);
                const StripSums sums = shared.of(a, p, task.unit, i);
                const bool clamp = !(open_tile<T>(a, tile, strip, w) * shared.fastest[i] < SAFE_EXPONENT);
                const float* before = a.checkpoints + (task.row * tiles(a) + number) * a.n * a.d + strip.channel;
                int64_t s = 0;
                for (; s + BLOCK <= a.n; s += BLOCK) both_ways<BLOCK>(a, tile, strip, w, sums, clamp, before, s);
                if (s + 4 <= a.n) both_ways<4>(a, tile, strip, w, sums, clamp, before, s), s += 4;
                for (; s < a.n; ++s) both_ways<1>(a, tile, strip, w, sums, clamp, before, s);
                close_tile<T>(a, tile, strip, w, sums);
            }
        }
    }

    // Those of the states alone; step sizes are added up.
    void run_alone() {
        double* steps = shared.steps + (task.unit * p.strips + task.first) * LANES;
        for (int64_t i = 0; i < (task.last - task.first) * LANES; ++i) steps[i] = 0;
        for (int64_t number = task.end - 1; number >= task.begin; --number) {
            const Tile tile(a, task.row, number);
            copy_grouped<T>(a.C, a, tile, task.group, w.C);
            for (int64_t i = task.first; i < task.last; ++i) {
                const Strip strip = strip_of(a, i);
                const StripSums sums = shared.of(a, p, task.unit, i);
                const bool clamp = !(open_tile<T>(a, tile, strip, w) * shared.fastest[i] < SAFE_EXPONENT);
                add_steps(w.dts, tile.count, steps + (i - task.first) * LANES);
                int64_t s = 0;
                for (; s + BLOCK <= a.n; s += BLOCK) alone<BLOCK>(a, tile, w, sums, clamp, s);
                for (; s < a.n; ++s) alone<1>(a, tile, w, sums, clamp, s);
            }
        }
    }

  private:
    const Args& a;
    const Plan& p;
    const Shared& shared;
    const Task& task;
    Scratch scratch;
    TileScratch w;
};

// The gradients of the states at the end of every chunk: what each chunk but the first hands back on its own, to
// which is added what passes through it. Until then a chunk keeps its own at its own place; then they move one on.
template <class T>
void find_borders(const Args& a, const Plan& p, const Shared& shared) {
    parallel_for(p.units * p.tasks, p.threads, [&](int64_t number) {
        const Task task(a, p, number);
        Walk<T> walk(a, p, shared, task);
        walk.start();
        if (task.chunk > 0) walk.run_alone();
    });
    const int64_t size = a.n * LANES;
    parallel_for(a.b * p.strips, p.threads, [&](int64_t number) {
        const int64_t row = number / p.strips, strip = number % p.strips;
        for (int64_t chunk = p.chunks - 2; chunk > 0; --chunk) {
            if (start_among(a, row, chunk * p.tiles_each, (chunk + 1) * p.tiles_each)) continue;
            const StripSums own = shared.of(a, p, row * p.chunks + chunk, strip);
            const double* steps = shared.steps + ((row * p.chunks + chunk) * p.strips + strip) * LANES;
            add_passed(shared.of(a, p, row * p.chunks + chunk + 1, strip).grad_h, own.rates, steps, a.n, own.grad_h);
        }
        for (int64_t chunk = 0; chunk < p.chunks - 1; ++chunk)
            std::memcpy(shared.of(a, p, row * p.chunks + chunk, strip).grad_h,
                        shared.of(a, p, row * p.chunks + chunk + 1, strip).grad_h, sizeof(float) * size);
        gather_states(a.grad_final + row * a.d * a.n, a, strip_of(a, strip),
                      shared.of(a, p, (row + 1) * p.chunks - 1, strip).grad_h);
    });
}

// The gradients of B or C for a tile, in float32 or rounded: over the tasks of every group in order.
template <class T>
void sum_tasks(const Args& a, const Plan& p, const float* parts, const Tile& tile, int64_t place, void* to) {
    const int64_t stride = p.tiles_per_segment * a.tile * a.n;  // from task to task
    for (int t = 0; t < tile.count; ++t)
        for (int64_t group = 0; group < a.g; ++group) {
            T* target = static_cast<T*>(to) + ((tile.row * a.l + tile.begin + t) * a.g + group) * a.n;
            const float* from = parts + place + group * p.tasks_per_group * stride + t * a.n;
            for (int64_t s = 0; s < a.n; s += LANES) {
                const int lanes = static_cast<int>(least(LANES, a.n - s));
                vfloat total{};
                for (int64_t i = 0; i < p.tasks_per_group; ++i) total = total + load(from + i * stride + s, lanes);
                store(target + s, total, lanes);
            }
        }
}

// What is summed over time and, but for the initial state, over the rows of the batch.
void write_sums(const Args& a, const Plan& p, const Shared& shared, int64_t number) {
    const Strip strip = strip_of(a, number);
    Scratch scratch(a.n * LANES);
    float* grad_A = scratch.take(a.n * LANES);
    vfloat grad_D{}, grad_bias{};
    for (int64_t i = 0; i < a.n * LANES; ++i) grad_A[i] = 0;
    for (int64_t unit = 0; unit < p.units; ++unit) {
        const StripSums sums = shared.of(a, p, unit, number);
        for (int64_t i = 0; i < a.n * LANES; ++i) grad_A[i] += sums.grad_A[i];
        grad_D = grad_D + load(sums.grad_D);
        grad_bias = grad_bias + load(sums.grad_bias);
        if (a.grad_initial && unit % p.chunks == 0)
            scatter_states(sums.grad_h, a, strip, a.grad_initial + unit / p.chunks * a.d * a.n);
    }
    scatter_states(grad_A, a, strip, a.grad_A);
    if (a.grad_D) store(a.grad_D + strip.channel, grad_D, strip.lanes);
    if (a.grad_bias) store(a.grad_bias + strip.channel, grad_bias, strip.lanes);
}

template <class T>
void backward_of(const Args& a) {
    const Plan p(a);
    Scratch scratch(Shared::floats(a, p));
    const Shared shared(a, p, scratch);
    if (p.chunks > 1) find_borders<T>(a, p, shared);
    for (int64_t segment = p.segments - 1; segment >= 0; --segment) {
        parallel_for(p.units * p.tasks, p.threads, [&](int64_t number) {
            const Task whole(a, p, number), task = whole.of_segment(p, segment);
            Walk<T> walk(a, p, shared, task);
            if (p.chunks == 1 && task.end == tiles(a)) walk.start();
            walk.run();
        });
        parallel_for(p.units * p.tiles_per_segment, p.threads, [&](int64_t number) {
            const int64_t unit = number / p.tiles_per_segment, within = number % p.tiles_per_segment;
            const Task task = Task(a, p, unit * p.tasks).of_segment(p, segment);
            if (task.begin + within >= task.end) return;
            const Tile tile(a, task.row, task.begin + within);
            const int64_t place = shared.place(a, p, task) + within * a.tile * a.n;
            sum_tasks<T>(a, p, shared.grad_B, tile, place, a.grad_B);
            sum_tasks<T>(a, p, shared.grad_C, tile, place, a.grad_C);
        });
    }
    parallel_for(p.strips, p.threads, [&](int64_t strip) { write_sums(a, p, shared, strip); });
}

void backward(const Args& a) { a.is_bf16 ? backward_of<bf16>(a) : backward_of<float>(a); }

}  // namespace
}  // namespace selective_scan
}  // namespace mambakit

MAMBAKIT_KERNEL(selective_scan_backward, mambakit::selective_scan::Args, mambakit::selective_scan::backward)
