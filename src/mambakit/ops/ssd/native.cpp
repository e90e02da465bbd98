// State space duality, forward and token by token.
//
// A task takes some heads of one group of one row through time, tile by tile. In a tile `C B^T` is formed once for
// the group; then every head scales its inputs, reads its outputs and moves its state on. States lie as (n, p)
// matrices in panels, channels in the lanes. See MATH.md and tile.h.

#include "tile.h"

namespace mambakit {
namespace ssd {
namespace {

int64_t state_floats(const Args& a, const Panels& p) { return p.count * p.width * room(a.n); }

// A head's state (p, n) into panels (n, p).
void import_state(const Args& a, const Panels& p, float* to, const float* from) {
    for (int64_t c = 0; c < p.count * p.width; c += LANES) {
        for (int64_t k = 0; k < a.n; k += LANES) {
            vfloat row[LANES];
            const int count = static_cast<int>(least(LANES, a.n - k));
            for (int i = 0; i < LANES; ++i)
                row[i] = c + i < a.p ? load(from + (c + i) * a.n + k, count) : vfloat{};
            transpose(row);
            float* block = to + c / p.width * room(a.n) * p.width + k * p.width + c % p.width;
            for (int i = 0; i < LANES; ++i) store(block + i * p.width, row[i]);
        }
    }
}

// And back.
void export_state(const Args& a, const Panels& p, float* to, const float* from) {
    for (int64_t c = 0; c < a.p; c += LANES) {
        for (int64_t k = 0; k < a.n; k += LANES) {
            vfloat row[LANES];
            const int count = static_cast<int>(least(LANES, a.n - k));
            const float* block = from + c / p.width * room(a.n) * p.width + k * p.width + c % p.width;
            for (int i = 0; i < LANES; ++i) row[i] = load(block + i * p.width);
            transpose(row);
            for (int i = 0; i < LANES && c + i < a.p; ++i) store(to + (c + i) * a.n + k, row[i], count);
        }
    }
}

// A task's heads through its tokens.
template <class T>
class Walk {
  public:
    Walk(const Args& a, const Task& task)
        : a(a),
          task(task),
          p(a.p),
          size(state_floats(a, p)),
          scratch(GroupTiles::floats(a, TILE) + (4 * TILE + BLOCK) * p.stride),
          tiles(a, TILE, scratch) {
        x = scratch.take(TILE * p.stride);
        u = scratch.take(TILE * p.stride);
        entering = scratch.take(TILE * p.stride);
        y = scratch.take((TILE + BLOCK) * p.stride);
    }

    // Outputs, and states moved from before the task's first token to after its last one. `states` are those of the
    // task's heads; `nothing` says that they are empty, whatever stands there.
    void outputs(float* states, bool nothing) {
        for (int64_t begin = task.begin; begin < task.end; begin += TILE) {
            const int count = static_cast<int>(least(TILE, task.end - begin));
            tiles.template fill_B<T>(a, task, begin, count);
            tiles.template fill_C<T>(a, task, begin, count);
            tiles.multiply(a.n, TILE, false);
            for (int64_t head = task.head; head < task.end_head; ++head) {
                float* state = states + (head - task.head) * size;
                if (a.checkpoints && begin > 0 && begin % SEGMENT == 0) checkpoint(head, begin, state);
                steps.compute<T>(a, task.row, head, begin, count, false);
                tile<true>(head, begin, count, state, nothing && begin == task.begin);
            }
        }
    }

    // The states alone, from empty ones, and the factor by which a state before the first token enters them.
    void states_alone(float* states, double* passed) {
        for (int64_t begin = task.begin; begin < task.end; begin += TILE) {
            const int count = static_cast<int>(least(TILE, task.end - begin));
            tiles.template fill_B<T>(a, task, begin, count);
            for (int64_t i = 0; i < task.end_head - task.head; ++i) {
                steps.compute<T>(a, task.row, task.head + i, begin, count, false);
                tile<false>(task.head + i, begin, count, states + i * size, begin == task.begin);
                const double by = pass(steps, starts_of(a, task.row, begin), count);
                passed[i] = begin == task.begin ? by : passed[i] == 0 || by == 0 ? 0 : passed[i] * by;
            }
        }
    }

  private:
    const Args& a;
    const Task& task;
    const Panels p;
    const int64_t size;
    Scratch scratch;
    GroupTiles tiles;
    float *x, *u, *entering, *y;
    Steps steps;

    void checkpoint(int64_t head, int64_t begin, const float* state) const {
        const int64_t segments = ceil_div(a.l, SEGMENT), index = begin / SEGMENT - 1;
        const int64_t place = (task.row * (segments - 1) + index) * a.h + head;
        export_state(a, p, a.checkpoints + place * a.p * a.n, state);
    }

    template <bool OUTPUTS>
    void tile(int64_t head, int64_t begin, int count, float* state, bool nothing) {
        const T* from = static_cast<const T*>(a.x) + task.row * a.x_batch + begin * a.x_token + head * a.x_head;
        for (int t = 0; t < count; ++t) widen_row(x + t * p.stride, from + t * a.x_token, a.p, p.stride);
        Piece piece;
        for (int first = 0; first < count; first = piece.end) {
            piece.cut(steps, starts_of(a, task.row, begin), first, count, nothing);
            for (int t = first; t < piece.end; ++t) {
                const int64_t row = t * p.stride;
                const double by = steps.dt[t] / piece.since[t];
                if (OUTPUTS) scale_row(u + row, x + row, static_cast<float>(by), p.stride);
                scale_row(entering + row, x + row, static_cast<float>(by * piece.through), p.stride);
            }
            if (OUTPUTS) {
                const Inside inside{{tiles.products, TILE, 1}, u, p.stride, false};
                read(p, y, p.stride, first, piece.end, static_cast<float>(piece.entry),
                     {tiles.C, tiles.n.stride, 1}, state, a.n, &inside);
                for (int t = first; t < piece.end; ++t) write_output(head, begin + t, t, piece.since[t]);
            }
            advance(p, state, state, piece.entry * piece.through, a.n,
                    {tiles.B + first * tiles.n.stride, 1, tiles.n.stride}, entering + first * p.stride, p.stride,
                    piece.end - first);
        }
    }

    void write_output(int64_t head, int64_t token, int t, double since) const {
        T* to = static_cast<T*>(a.y) + ((task.row * a.l + token) * a.h + head) * a.p;
        const float *y_t = y + t * p.stride, *x_t = x + t * p.stride, scale = static_cast<float>(since);
        const float* D = a.D && a.D_is_matrix ? a.D + head * a.p : nullptr;
        const float D_head = a.D && !a.D_is_matrix ? a.D[head] : 0;
        for (int64_t c = 0; c < a.p; c += LANES) {
            const int lanes = static_cast<int>(least(LANES, a.p - c));
            vfloat v = scale * load(y_t + c);
            if (a.D) v = v + (D ? load(D + c, lanes) : broadcast(D_head)) * load(x_t + c);
            store(to + c, v, lanes);
        }
    }
};

// States enter the chunks of time: what every chunk but the last leaves behind on its own, and the sums of that.
template <class T>
void carry(const Args& a, const Plan& plan, const Panels& p, float* states, double* passed) {
    const int64_t size = state_floats(a, p), heads = a.b * a.h;
    parallel_for(plan.tasks(a) / plan.chunks * (plan.chunks - 1), plan.threads, [&](int64_t number) {
        const Task task = plan.task(a, number);
        const int64_t next = task.place(a) + heads;
        Walk<T>(a, task).states_alone(states + next * size, passed + next);
    });
    parallel_for(heads, plan.threads, [&](int64_t head) {
        if (a.initial) import_state(a, p, states + head * size, a.initial + head * a.p * a.n);
        for (int64_t next = head + heads; next < plan.chunks * heads; next += heads) {
            const float by = static_cast<float>(passed[next]);
            if (by == 0 || (next == head + heads && !a.initial)) continue;
            float *to = states + next * size, *from = to - heads * size;
            for (int64_t i = 0; i < size; i += LANES) store(to + i, load(to + i) + by * load(from + i));
        }
    });
}

template <class T>
void walk(const Args& a) {
    const Plan plan(a, a.h);
    const Panels p(a.p);
    const int64_t size = state_floats(a, p), places = plan.chunks * a.b * a.h;
    Scratch scratch(places * (size + 2));
    float* states = scratch.take(places * size);  // before each chunk of time
    double* passed = reinterpret_cast<double*>(scratch.take(2 * places));
    if (a.initial || plan.chunks > 1) carry<T>(a, plan, p, states, passed);
    parallel_for(plan.tasks(a), plan.threads, [&](int64_t number) {
        const Task task = plan.task(a, number);
        float* own = states + task.place(a) * size;
        Walk<T>(a, task).outputs(own, task.begin == 0 && a.initial == nullptr);
        for (int64_t i = 0; task.end == a.l && i < task.end_head - task.head; ++i)
            export_state(a, p, a.final + (task.row * a.h + task.head + i) * a.p * a.n, own + i * size);
    });
}

// One token: the state, (p, n) as in memory, is read and written once.
template <class T>
void step(const Args& a) {
    const int64_t threads = a.b * a.h * a.p * a.n < (1 << 18) ? 1 : a.threads;
    parallel_for(a.b * a.h, threads, [&](int64_t number) {
        const int64_t row = number / a.h, head = number % a.h, group = head / (a.h / a.g);
        const int64_t stride = round_up(a.n, BLOCK > LANES ? BLOCK : LANES);
        Scratch scratch(2 * stride);
        float *B = scratch.take(stride), *C = scratch.take(stride);
        widen_row(B, static_cast<const T*>(a.B) + row * a.B_batch + group * a.B_group, a.n, stride);
        widen_row(C, static_cast<const T*>(a.C) + row * a.C_batch + group * a.C_group, a.n, stride);
        Steps steps;
        steps.compute<T>(a, row, head, 0, 1, false);
        const float dt = steps.dt[0], decay = static_cast<float>(steps.decay[0]);
        const T* x = static_cast<const T*>(a.x) + row * a.x_batch + head * a.x_head;
        T* y = static_cast<T*>(a.y) + number * a.p;
        for (int64_t c = 0; c < a.p; ++c) {
            const float* from = a.initial ? a.initial + (number * a.p + c) * a.n : nullptr;
            float* to = a.final + (number * a.p + c) * a.n;
            const float x_c = widen(x[c]), u = dt * x_c;
            vfloat out{};
            for (int64_t k = 0; k < a.n; k += LANES) {
                const int lanes = static_cast<int>(least(LANES, a.n - k));
                vfloat h = u * load(B + k);
                if (from) h = h + decay * load(from + k, lanes);
                store(to + k, h, lanes);
                out = out + h * load(C + k);
            }
            const float D = a.D ? a.D[a.D_is_matrix ? head * a.p + c : head] : 0;
            store(y + c, broadcast(sum(out) + (a.D ? D * x_c : 0)), 1);
        }
    });
}

void forward(const Args& a) {
    if (a.l == 1) a.is_bf16 ? step<bf16>(a) : step<float>(a);
    else a.is_bf16 ? walk<bf16>(a) : walk<float>(a);
}

}  // namespace
}  // namespace ssd
}  // namespace mambakit

MAMBAKIT_KERNEL(ssd_forward, mambakit::ssd::Args, mambakit::ssd::forward)
