// The selective scan, forward: all tokens, or one.
//
// A task takes a few neighbouring strips of channels through all tokens, tile by tile. Per tile and strip: step sizes
// and dt x; then the recurrence, a block of states at a time in registers; then skip and gate. One token is another
// kernel: there the lanes are states, as they lie in memory. See MATH.md.

#include "strip.h"

namespace mambakit {
namespace selective_scan {
namespace {

// Scratch of a tile, and its B and C. Without `ys` the states alone are wanted.
struct Work {
    const float *dts, *us, *B, *C;
    float* ys;
};

// The recurrence of NB states over tokens [begin, end) without a document's start. `h`, `rates` and B, C are those
// of the block; `n` is the distance of tokens in B and C.
template <int NB, bool CLAMP, bool OUTPUTS>
MAMBAKIT_INLINE void scan(int begin, int end, int64_t n, const Work& w, int64_t first, const float* rates,
                          float* states) {
    const float *B = w.B + first, *C = w.C + first;
    vfloat h[NB];
    unrolled<NB>([&](auto s) MAMBAKIT_INLINE_BODY { h[s] = load(states + s * LANES); });
    for (int t = begin; t < end; ++t) {
        const vfloat dt = load(w.dts + t * LANES), u = load(w.us + t * LANES);
        vfloat y = OUTPUTS ? load(w.ys + t * LANES) : vfloat{};
        unrolled<NB>([&](auto s) MAMBAKIT_INLINE_BODY {
            h[s] = decay<CLAMP>(dt * load(rates + s * LANES)) * h[s] + u * B[t * n + s];
            if (OUTPUTS) y = y + h[s] * C[t * n + s];
        });
        if (OUTPUTS) store(w.ys + t * LANES, y);
    }
    unrolled<NB>([&](auto s) MAMBAKIT_INLINE_BODY { store(states + s * LANES, h[s]); });
}

template <int NB, bool OUTPUTS>
void scan_block(const Args& a, const Tile& tile, const Work& w, bool clamp, const float* rates, float* states,
                int64_t s) {
    int begin = 0;
    while (begin < tile.count) {
        if (tile.starts_at(begin))
            for (int i = 0; i < NB * LANES; ++i) states[s * LANES + i] = 0;
        int end = begin + 1;
        while (end < tile.count && !tile.starts_at(end)) ++end;
        const float* r = rates + s * LANES;
        float* h = states + s * LANES;
        if (clamp) scan<NB, true, OUTPUTS>(begin, end, a.n, w, s, r, h);
        else scan<NB, false, OUTPUTS>(begin, end, a.n, w, s, r, h);
        begin = end;
    }
}

constexpr int BLOCK = 16;  // states at once; 8 are slower even where 16 do not fit the registers

template <bool OUTPUTS>
void scan_states(const Args& a, const Tile& tile, const Work& w, bool clamp, const float* rates, float* states) {
    int64_t s = 0;
    for (; s + BLOCK <= a.n; s += BLOCK) scan_block<BLOCK, OUTPUTS>(a, tile, w, clamp, rates, states, s);
    if (s + 8 <= a.n) scan_block<8, OUTPUTS>(a, tile, w, clamp, rates, states, s), s += 8;
    if (s + 4 <= a.n) scan_block<4, OUTPUTS>(a, tile, w, clamp, rates, states, s), s += 4;
    for (; s < a.n; ++s) scan_block<1, OUTPUTS>(a, tile, w, clamp, rates, states, s);
}

// y = (y + D x) silu(z), from scratch to the output.
template <class T>
void write_outputs(const Args& a, const Tile& tile, const Strip& strip, const float* ys) {
    const vfloat D = a.D ? load(a.D + strip.channel, strip.lanes) : vfloat{};
    for (int t = 0; t < tile.count; ++t) {
        const int64_t token = tile.begin + t;
        vfloat y = load(ys + t * LANES);
        if (a.D) y = y + D * load(at<T>(a.x, tile.row, token, strip.channel), strip.lanes);
        if (a.z.data) {
            const T* z = at<T>(a.z, tile.row, token, strip.channel);
            fetch(z, a.z.token, a.tile);
            y = y * silu(load(z, strip.lanes));
        }
        T* to = static_cast<T*>(a.y) + (tile.row * a.l + token) * a.d + strip.channel;
        fetch(to, a.d, a.tile);
        store(to, y, strip.lanes);
    }
}

// How the work is cut: strips of a row into tasks of neighbours, and time into chunks where that is not enough.
struct Plan {
    int64_t threads, strips, strips_each, tasks, chunks, tiles_each;

    explicit Plan(const Args& a)
        : threads(a.b * a.l * a.d * a.n < 65536 ? 1 : a.threads), strips(a.g * strips_per_group(a)) {
        // Neighbouring strips share B and C and read memory in longer runs, but there should be tasks for all.
        strips_each = most(1, least(4, a.b * strips / (2 * most(1, threads))));
        tasks = ceil_div(strips, strips_each);
        chunks = chunks_of_time(a, a.b * tasks, threads, 0.75);
        tiles_each = ceil_div(tiles(a), chunks);
        chunks = ceil_div(tiles(a), tiles_each);
    }
};

// Strips [first, last) of a row of the batch through tiles [begin, end).
struct Task {
    int64_t row, first, last, chunk, begin, end;

    Task(const Args& a, const Plan& p, int64_t number)
        : row(number / p.tasks % a.b),
          first(number % p.tasks * p.strips_each),
          last(least(p.strips, first + p.strips_each)),
          chunk(number / p.tasks / a.b),
          begin(chunk * p.tiles_each),
          end(least(tiles(a), begin + p.tiles_each)) {}
};

// The states on the chunks' borders, where time is cut: (chunks, b, strips) times n vectors, and the time that passes
// in a chunk, a vector of float64.
struct Borders {
    float* states = nullptr;
    double* steps = nullptr;

    int64_t place(const Args& a, const Plan& p, const Task& task, int64_t chunk) const {
        return (chunk * a.b + task.row) * p.strips + task.first;
    }
};

template <class T>
class Walk {
  public:
    Walk(const Args& a, const Task& task)
        : a(a),
          task(task),
          width(a.n * LANES),
          strips(task.last - task.first),
          scratch(3 * a.tile * LANES + 2 * a.tile * a.n + (2 * width + 1) * strips) {
        dts = scratch.take(a.tile * LANES);
        us = scratch.take(a.tile * LANES);
        ys = scratch.take(a.tile * LANES);
        B = scratch.take(a.tile * a.n);
        C = scratch.take(a.tile * a.n);
        rates = scratch.take(strips * width);
        states = scratch.take(strips * width);
        fastest = scratch.take(strips);
        for (int64_t i = 0; i < strips; ++i) fastest[i] = decay_rates(a, strip(i), rates + i * width);
    }

    void start_from_initial() {
        for (int64_t i = 0; i < strips; ++i) {
            if (a.initial) gather_states(a.initial + task.row * a.d * a.n, a, strip(i), states + i * width);
            else
                for (int64_t k = 0; k < width; ++k) states[i * width + k] = 0;
        }
    }
    void start_from(const float* from) { std::memcpy(states, from, sizeof(float) * strips * width); }
    void start_from_nothing() {
        for (int64_t k = 0; k < strips * width; ++k) states[k] = 0;
    }
    void keep(float* to) const { std::memcpy(to, states, sizeof(float) * strips * width); }
    void keep_final() const {
        for (int64_t i = 0; i < strips; ++i)
            scatter_states(states + i * width, a, strip(i), a.final + task.row * a.d * a.n);
    }

    // Through the tiles. Without OUTPUTS only the states move, and the step sizes are added up.
    template <bool OUTPUTS>
    void run(double* steps) {
        for (int64_t number = task.begin; number < task.end; ++number) {
            const Tile tile(a, task.row, number);
            int64_t group = -1;
            for (int64_t i = 0; i < strips; ++i) {
                const Strip strip = this->strip(i);
                if (strip.group != group) {
                    group = strip.group;
                    copy_grouped<T>(a.B, a, tile, group, B);
                    if (OUTPUTS) copy_grouped<T>(a.C, a, tile, group, C);
                }
                if (OUTPUTS && a.checkpoints) checkpoint(number, strip, states + i * width);
                const float longest = step_sizes<T>(a, tile, strip, a.tile, dts, us);
                const bool clamp = !(longest * fastest[i] < SAFE_EXPONENT);
                if (OUTPUTS)
                    for (int t = 0; t < tile.count; ++t) store(ys + t * LANES, vfloat{});
                else add_steps(dts, tile.count, steps + i * LANES);
                scan_states<OUTPUTS>(a, tile, {dts, us, B, C, ys}, clamp, rates + i * width, states + i * width);
                if (OUTPUTS) write_outputs<T>(a, tile, strip, ys);
            }
        }
    }

    // The states that enter a chunk, from those that leave the chunk before on its own and those that entered that.
    void add_entered(const float* entered, const double* steps, float* left) const {
        for (int64_t i = 0; i < strips; ++i)
            add_passed(entered + i * width, rates + i * width, steps + i * LANES, a.n, left + i * width);
    }

  private:
    const Args& a;
    const Task& task;
    const int64_t width, strips;
    Scratch scratch;
    float *dts, *us, *ys, *B, *C, *rates, *states, *fastest;

    Strip strip(int64_t i) const { return strip_of(a, task.first + i); }

    void checkpoint(int64_t number, const Strip& strip, const float* h) const {
        float* to = a.checkpoints + (task.row * tiles(a) + number) * a.n * a.d + strip.channel;
        for (int64_t s = 0; s < a.n; ++s) store(to + s * a.d, load(h + s * LANES), strip.lanes);
    }
};

// Find the states on the borders of chunks: what each chunk but the last leaves behind on its own, then what passes
// through. The first chunk's start is kept too, because the last chunk may overwrite it in memory.
template <class T>
void find_borders(const Args& a, const Plan& p, const Borders& borders) {
    parallel_for(a.b * p.tasks * (p.chunks - 1), p.threads, [&](int64_t number) {
        const Task task(a, p, number);
        const int64_t width = a.n * LANES, next = borders.place(a, p, task, task.chunk + 1);
        double* steps = borders.steps + next * LANES;
        for (int64_t i = 0; i < (task.last - task.first) * LANES; ++i) steps[i] = 0;
        Walk<T> walk(a, task);
        if (task.chunk > 0) walk.start_from_nothing();
        else walk.start_from_initial(), walk.keep(borders.states + borders.place(a, p, task, 0) * width);
        walk.template run<false>(steps);
        walk.keep(borders.states + next * width);
    });
    parallel_for(a.b * p.tasks, p.threads, [&](int64_t number) {
        const Task task(a, p, number);
        const Walk<T> walk(a, task);
        for (int64_t chunk = 1; chunk < p.chunks - 1; ++chunk) {
            if (start_among(a, task.row, chunk * p.tiles_each, (chunk + 1) * p.tiles_each)) continue;
            const int64_t entered = borders.place(a, p, task, chunk), left = borders.place(a, p, task, chunk + 1);
            walk.add_entered(borders.states + entered * a.n * LANES, borders.steps + left * LANES,
                             borders.states + left * a.n * LANES);
        }
    });
}

template <class T>
void all_tokens(const Args& a) {
    const Plan p(a);
    const int64_t places = p.chunks > 1 ? p.chunks * a.b * p.strips * LANES : 0;
    Scratch scratch(places * (a.n + 2));
    Borders borders;
    if (p.chunks > 1) {
        borders.states = scratch.take(places * a.n);
        borders.steps = reinterpret_cast<double*>(scratch.take(2 * places));
        find_borders<T>(a, p, borders);
    }
    parallel_for(a.b * p.tasks * p.chunks, p.threads, [&](int64_t number) {
        const Task task(a, p, number);
        Walk<T> walk(a, task);
        if (p.chunks > 1) walk.start_from(borders.states + borders.place(a, p, task, task.chunk) * a.n * LANES);
        else walk.start_from_initial();
        walk.template run<true>(nullptr);
        if (task.chunk == p.chunks - 1) walk.keep_final();
    });
}

// One token. The lanes are states: A and the state are read as they lie, a row of n per channel.
template <class T>
void step_strip(const Args& a, int64_t row, const Strip& strip) {
    const Tile tile(a, row, 0);
    float dts[LANES], us[LANES], ys[LANES];
    step_sizes<T>(a, tile, strip, a.tile, dts, us);
    const T* B = static_cast<const T*>(a.B.data) + row * a.B.batch + strip.group * a.B.group;
    const T* C = static_cast<const T*>(a.C.data) + row * a.C.batch + strip.group * a.C.group;
    for (int i = 0; i < strip.lanes; ++i) {
        const int64_t channel = strip.channel + i;
        const float* A = a.A + channel * a.n;
        const float* before = a.initial ? a.initial + (row * a.d + channel) * a.n : nullptr;
        float* after = a.final + (row * a.d + channel) * a.n;
        vfloat y{};
        for (int64_t s = 0; s < a.n; s += LANES) {
            const int lanes = static_cast<int>(least(LANES, a.n - s));
            vfloat h = load(B + s, lanes) * us[i];
            if (before) h = h + decay<true>(load(A + s, lanes) * (LOG2_E * dts[i])) * load(before + s, lanes);
            store(after + s, h, lanes);
            y = y + h * load(C + s, lanes);
        }
        ys[i] = sum(y);
    }
    for (int i = strip.lanes; i < LANES; ++i) ys[i] = 0;
    write_outputs<T>(a, tile, strip, ys);
}

template <class T>
void one_token(const Args& a) {
    // A strip takes about 0.1 us; tasks of eight outweigh handing them out.
    const int64_t strips = a.g * strips_per_group(a), each = 8, tasks = ceil_div(strips, each);
    parallel_for(a.b * tasks, a.b * a.d * a.n < 32768 ? 1 : a.threads, [&](int64_t task) {
        const int64_t last = least(strips, (task % tasks + 1) * each);
        for (int64_t i = task % tasks * each; i < last; ++i) step_strip<T>(a, task / tasks, strip_of(a, i));
    });
}

void forward(const Args& a) {
    if (a.l == 1 && !a.checkpoints) a.is_bf16 ? one_token<bf16>(a) : one_token<float>(a);
    else a.is_bf16 ? all_tokens<bf16>(a) : all_tokens<float>(a);
}

}  // namespace
}  // namespace selective_scan
}  // namespace mambakit

MAMBAKIT_KERNEL(selective_scan_forward, mambakit::selective_scan::Args, mambakit::selective_scan::forward)
