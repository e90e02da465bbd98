// State space duality, the backward pass.
//
// A task takes some heads of one group of one row backwards through time, segment by segment. Per head it recomputes
// the states before every piece of the segment from the segment's checkpoint, then goes back over the pieces with K,
// the gradient of the state after a piece. Here states lie as (p, n) matrices in panels, state columns in the lanes,
// so that the gradients of B and C, sums over channels, need no sums across lanes. See MATH.md.

#include "tile.h"

namespace mambakit {
namespace ssd {
namespace {

constexpr int64_t ROUND = 16 * SEGMENT;  // tokens from one sum over the blocks of a group to the next

// Blocks that the heads of a group fall into: a number of the sizes alone, since the gradients of B and C are summed by
// block first, and the number of threads shall not change the order of a sum.
int64_t head_blocks(const Args& a) { return most(1, least(4, ceil_div(16, most(1, a.b * a.g)))); }

int64_t state_floats(const Args& a, const Panels& n) { return n.count * n.width * room(a.p); }

// A head's state (p, n) into panels, and back.
void import_state(const Args& a, const Panels& n, float* to, const float* from) {
    for (int64_t panel = 0; panel < n.count; ++panel) {
        const int64_t first = panel * n.width, count = least(n.width, a.n - first);
        for (int64_t c = 0; c < a.p; ++c)
            widen_row(to + (panel * room(a.p) + c) * n.width, from + c * a.n + first, count, n.width);
    }
}

void export_state(const Args& a, const Panels& n, float* to, const float* from) {
    for (int64_t panel = 0; panel < n.count; ++panel) {
        const int64_t first = panel * n.width, count = least(n.width, a.n - first);
        for (int64_t c = 0; c < a.p; ++c)
            std::memcpy(to + c * a.n + first, from + (panel * room(a.p) + c) * n.width, sizeof(float) * count);
    }
}

MAMBAKIT_INLINE float dot(const float* a, const float* b, int64_t count) {
    vfloat total{};
    for (int64_t i = 0; i < count; i += LANES) total = total + load(a + i) * load(b + i);
    return sum(total);
}

// For each place among (chunks, b, h): the gradient of the state after the chunk, and sums over its tokens.
struct Places {
    float* K;
    double *A, *bias, *D, *passed;  // D is summed by channel, (places, p)
};

// Gradients of B and C: straight to their place where a task has all blocks of a group, else to a copy for each block,
// (blocks, chunks, b, tokens of a round, g, n).
struct Copies {
    float *B = nullptr, *C = nullptr;
    int64_t chunks = 1, tokens = 0;
};

template <class T>
class WalkBack {
  public:
    WalkBack(const Args& a, const Plan& plan, const Task& task)
        : a(a),
          plan(plan),
          task(task),
          p(a.p),
          n(a.n),
          size(state_floats(a, n)),
          scratch(GroupTiles::floats(a, SEGMENT) + (SEGMENT + BLOCK) * (p.stride + TILE) + 4 * SEGMENT * n.stride +
                  (TILE + BLOCK) * (3 * p.stride + n.stride + TILE) + p.count * p.width * room(a.n) +
                  room(a.p) * TILE),
          tiles(a, SEGMENT, scratch) {
        x = scratch.take((SEGMENT + BLOCK) * p.stride);
        pairs = scratch.take((SEGMENT + BLOCK) * TILE);
        grad_B = scratch.take(2 * SEGMENT * n.stride);
        grad_C = grad_B + SEGMENT * n.stride;
        total_B = scratch.take(2 * SEGMENT * n.stride);
        total_C = total_B + SEGMENT * n.stride;
        grad_y = scratch.take((TILE + BLOCK) * p.stride);
        scaled = scratch.take((TILE + BLOCK) * p.stride);
        grad_u = scratch.take((TILE + BLOCK) * p.stride);
        sums = scratch.take((TILE + BLOCK) * n.stride);
        own_pairs = scratch.take((TILE + BLOCK) * TILE);
        turned_K = scratch.take(p.count * p.width * room(a.n));
        turned_grad_y = scratch.take(room(a.p) * TILE);
    }

    // All gradients of tokens begin to end, whole segments of the task; places are those of the task's heads.
    void gradients(const Places& places, const Copies& copies, int64_t begin, int64_t end) {
        for (int64_t first = begin + (end - begin - 1) / SEGMENT * SEGMENT; first >= begin; first -= SEGMENT) {
            segment = first;
            count = static_cast<int>(least(SEGMENT, end - first));
            tiles.template fill_B<T>(a, task, segment, count);
            tiles.template fill_C<T>(a, task, segment, count);
            tiles.multiply(a.n, count, true);
            for (int64_t block = task.block; block < task.end_block; ++block) {
                std::memset(pairs, 0, sizeof(float) * count * TILE);
                std::memset(grad_B, 0, sizeof(float) * count * n.stride);
                std::memset(grad_C, 0, sizeof(float) * count * n.stride);
                const int64_t end_head = plan.head(a, task.group, block + 1);
                for (head = plan.head(a, task.group, block); head < end_head; ++head) {
                    const int64_t i = head - task.head;
                    K = places.K + i * size;
                    sum_A = sum_bias = 0;
                    go_back(places.D + i * a.p);
                    places.A[i] += sum_A;
                    places.bias[i] += sum_bias;
                }
                finish(copies, block, first - begin);
            }
        }
    }

    // K alone, from no gradient after the task's last token to that of the state before its first one, and the factor
    // by which a gradient after the last token enters it.
    void K_alone(float* Ks, double* passed) {
        const int64_t last_tile = task.begin + (task.end - task.begin - 1) / TILE * TILE;
        for (int64_t first = last_tile; first >= task.begin; first -= TILE) {
            segment = first;
            count = static_cast<int>(least(TILE, task.end - first));
            tiles.template fill_C<T>(a, task, segment, count);
            for (int64_t i = 0; i < task.end_head - task.head; ++i) {
                head = task.head + i;
                K = Ks + i * size;
                if (first == last_tile) std::memset(K, 0, sizeof(float) * size);
                steps[0].compute<T>(a, task.row, head, first, count, false);
                cut_pieces(false);
                for (int k = piece_count - 1; k >= 0; --k) {
                    widen_grad_y(pieces[k], 0);
                    advance_K(pieces[k], 0);
                }
                const double by = pass(steps[0], starts_of(a, task.row, first), count);
                passed[i] = first == last_tile ? by : passed[i] == 0 || by == 0 ? 0 : passed[i] * by;
            }
        }
    }

  private:
    const Args& a;
    const Plan& plan;
    const Task& task;
    const Panels p, n;
    const int64_t size;
    Scratch scratch;
    GroupTiles tiles;
    float *x, *pairs, *grad_B, *grad_C, *total_B, *total_C;
    float *grad_y, *scaled, *grad_u, *sums, *own_pairs, *turned_K, *turned_grad_y;
    // The segment and the head at hand
    int64_t segment = 0, head = 0;
    int count = 0, piece_count = 0;
    float* K = nullptr;
    double sum_A = 0, sum_bias = 0;
    Steps steps[SEGMENT / TILE];
    Piece pieces[SEGMENT];
    int tile_of[SEGMENT];  // the first token of a piece's tile

    void cut_pieces(bool nothing) {
        piece_count = 0;
        for (int tile = 0; tile < count; tile += TILE) {
            const int tokens = static_cast<int>(least(TILE, count - tile));
            for (int first = 0; first < tokens; first = pieces[piece_count++].end) {
                pieces[piece_count].cut(steps[tile / TILE], starts_of(a, task.row, segment + tile), first, tokens,
                                        nothing && tile == 0);
                tile_of[piece_count] = tile;
            }
        }
    }

    void go_back(double* sum_D) {
        for (int tile = 0; tile < count; tile += TILE)
            steps[tile / TILE].compute<T>(a, task.row, head, segment + tile,
                                          static_cast<int>(least(TILE, count - tile)), true);
        cut_pieces(segment == 0 && a.initial == nullptr);
        const T* from = static_cast<const T*>(a.x) + task.row * a.x_batch + segment * a.x_token + head * a.x_head;
        for (int t = 0; t < count; ++t) widen_row(x + t * p.stride, from + t * a.x_token, a.p, p.stride);
        Scratch memory(piece_count * size);
        float* states = memory.take(piece_count * size);
        recompute(states);
        for (int k = piece_count - 1; k >= 0; --k) piece_back(pieces[k], tile_of[k], states + k * size, sum_D);
    }

    // The states before every piece of the segment.
    void recompute(float* states) {
        const int64_t segments = ceil_div(a.l, SEGMENT), index = segment / SEGMENT - 1, state = a.p * a.n;
        if (segment > 0)
            import_state(a, n, states, a.checkpoints + ((task.row * (segments - 1) + index) * a.h + head) * state);
        else if (a.initial)
            import_state(a, n, states, a.initial + (task.row * a.h + head) * state);
        for (int k = 0; k + 1 < piece_count; ++k) {
            const Piece& piece = pieces[k];
            const Steps& step = steps[tile_of[k] / TILE];
            for (int t = piece.begin; t < piece.end; ++t)
                scale_row(scaled + t * p.stride, x + (tile_of[k] + t) * p.stride,
                          static_cast<float>(step.dt[t] * piece.through / piece.since[t]), p.stride);
            advance(n, states + (k + 1) * size, states + k * size, piece.entry * piece.through, a.p,
                    {scaled + piece.begin * p.stride, 1, p.stride},
                    tiles.B + (tile_of[k] + piece.begin) * n.stride, n.stride, piece.end - piece.begin);
        }
    }

    void piece_back(const Piece& piece, int tile, const float* state, double* sum_D) {
        const Steps& step = steps[tile / TILE];
        double grad_dt[TILE], grad_log[TILE];
        widen_grad_y(piece, tile);
        if (a.D) add_D(piece, tile, sum_D);
        inside_pairs(piece, tile, grad_log);
        inputs(piece, tile, grad_dt);
        through_states(piece, tile, state, grad_log);
        for (int t = piece.begin; t < piece.end; ++t) {
            const double raw = a.A ? step.slope[t] * (grad_dt[t] + a.A[head] * grad_log[t]) : grad_log[t];
            const int64_t place = (task.row * a.l + segment + tile + t) * a.h + head;
            store(static_cast<T*>(a.grad_dt) + place, broadcast(static_cast<float>(raw)), 1);
            sum_A += step.dt[t] * grad_log[t];
            sum_bias += raw;
        }
        advance_K(piece, tile);
    }

    // The gradients of the outputs, as they are and relative to the piece's first token.
    void widen_grad_y(const Piece& piece, int tile) {
        const T* from =
            static_cast<const T*>(a.grad_y) + ((task.row * a.l + segment + tile) * a.h + head) * a.p;
        for (int t = piece.begin; t < piece.end; ++t) {
            widen_row(grad_y + t * p.stride, from + t * a.h * a.p, a.p, p.stride);
            scale_row(scaled + t * p.stride, grad_y + t * p.stride, static_cast<float>(piece.since[t]), p.stride);
        }
    }

    void add_D(const Piece& piece, int tile, double* sum_D) const {
        for (int64_t c = 0; c < a.p; c += LANES) {
            vfloat total{};
            for (int t = piece.begin; t < piece.end; ++t)
                total = total + load(grad_y + t * p.stride + c) * load(x + (tile + t) * p.stride + c);
            float lane[LANES];
            store(lane, total);
            for (int64_t i = c; i < least(a.p, c + LANES); ++i) sum_D[i] += lane[i - c];
        }
    }

    // Pairs of tokens inside the piece: row s of `pairs` gains what C_t B_s is multiplied by in the loss, and the
    // decay of a token gets the share of all pairs that it stands between.
    void inside_pairs(const Piece& piece, int tile, double* grad_log) {
        const Steps& step = steps[tile / TILE];
        transpose_rows(tiles.tokens, turned_grad_y, room(a.p) * tiles.tokens.width, grad_y, p.stride, TILE, a.p);
        read(tiles.tokens, own_pairs, TILE, piece.begin, piece.end, 1, {x + tile * p.stride, p.stride, 1},
             turned_grad_y, a.p);
        alignas(64) float since[TILE], before[TILE] = {};  // before: sums over earlier s of the shares, by t
        for (int t = 0; t < TILE; ++t) since[t] = t >= piece.begin && t < piece.end ? piece.since[t] : 0;
        for (int s = piece.begin; s < piece.end; ++s) {
            double between = 0;
            for (int t = s; t < piece.end; ++t) between += before[t];
            grad_log[s] = between;
            const float by = static_cast<float>(step.dt[s] / piece.since[s]);
            const int64_t row = (tile + s) * TILE;
            for (int t = s; t < piece.end; ++t) {
                const float pair = by * since[t] * own_pairs[s * TILE + t];
                pairs[row + t] += pair;
                if (t > s) before[t] += pair * tiles.products[row + t];
            }
        }
    }

    // Gradients of x, and the part of that of dt which goes through u = dt x.
    void inputs(const Piece& piece, int tile, double* grad_dt) {
        const Steps& step = steps[tile / TILE];
        for (int64_t panel = 0; panel < n.count; ++panel) {
            const int64_t depth = least(n.width, round_up(a.n - panel * n.width, LANES));
            transpose_rows(p, turned_K + panel * n.width * p.width, room(a.n) * p.width,
                           K + panel * room(a.p) * n.width, n.width, a.p, depth);
        }
        const Inside inside{{tiles.products + tile * TILE, TILE, 1}, scaled, p.stride, true};
        read(p, grad_u, p.stride, piece.begin, piece.end, static_cast<float>(piece.through),
             {tiles.B + tile * n.stride, n.stride, 1}, turned_K, a.n, &inside);
        const float* D = a.D && a.D_is_matrix ? a.D + head * a.p : nullptr;
        const float D_head = a.D && !a.D_is_matrix ? a.D[head] : 0;
        for (int t = piece.begin; t < piece.end; ++t) {
            T* to = static_cast<T*>(a.grad_x) + ((task.row * a.l + segment + tile + t) * a.h + head) * a.p;
            const float *x_t = x + (tile + t) * p.stride, *grad_y_t = grad_y + t * p.stride;
            const float by = static_cast<float>(1 / piece.since[t]), dt = step.dt[t];
            vfloat total{};
            for (int64_t c = 0; c < a.p; c += LANES) {
                const int lanes = static_cast<int>(least(LANES, a.p - c));
                const vfloat grad = by * load(grad_u + t * p.stride + c);
                vfloat grad_x = dt * grad;
                if (a.D) grad_x = grad_x + (D ? load(D + c, lanes) : broadcast(D_head)) * load(grad_y_t + c);
                store(to + c, grad_x, lanes);
                total = total + keep_first(grad, lanes) * load(x_t + c);
            }
            grad_dt[t] = sum(total);
        }
    }

    // Gradients of C through the state before the piece, of B through the one after it, and of the decays through both.
    void through_states(const Piece& piece, int tile, const float* state, double* grad_log) {
        const Steps& step = steps[tile / TILE];
        const int first = piece.begin, end = piece.end;
        const float *B = tiles.B + tile * n.stride, *C = tiles.C + tile * n.stride;
        read(n, sums, n.stride, first, end, 1, {x + tile * p.stride, p.stride, 1}, K, a.p);
        double leaving = 0;  // of tokens before
        for (int t = first; t < end; ++t) {
            grad_log[t] += leaving;
            const float by = static_cast<float>(step.dt[t] * piece.through / piece.since[t]);
            leaving += add_row(grad_B + (tile + t) * n.stride, sums + t * n.stride, by, B + t * n.stride);
        }
        if (piece.entry == 0) return;
        read(n, sums, n.stride, first, end, 1, {grad_y, p.stride, 1}, state, a.p);
        double entering = 0;
        for (int64_t panel = 0; panel < n.count; ++panel)
            entering += dot(K + panel * room(a.p) * n.width, state + panel * room(a.p) * n.width, a.p * n.width);
        entering *= piece.entry * piece.through;
        for (int t = end - 1; t >= first; --t) {
            const float by = static_cast<float>(piece.entry * piece.since[t]);
            entering += add_row(grad_C + (tile + t) * n.stride, sums + t * n.stride, by, C + t * n.stride);
            grad_log[t] += entering;
        }
    }

    // to += by * from; returns the inner product of what was added with another row.
    MAMBAKIT_INLINE float add_row(float* to, const float* from, float by, const float* other) const {
        vfloat total{};
        for (int64_t k = 0; k < n.count * n.width; k += LANES) {
            const vfloat added = by * load(from + k);
            store(to + k, load(to + k) + added);
            total = total + added * load(other + k);
        }
        return sum(total);
    }

    // K from after the piece to before it. Leaves `scaled` changed.
    void advance_K(const Piece& piece, int tile) {
        if (piece.entry == 0) {
            std::memset(K, 0, sizeof(float) * size);
            return;
        }
        const float entry = static_cast<float>(piece.entry);
        for (int t = piece.begin; t < piece.end; ++t)
            scale_row(scaled + t * p.stride, scaled + t * p.stride, entry, p.stride);
        advance(n, K, K, piece.entry * piece.through, a.p,
                {scaled + piece.begin * p.stride, 1, p.stride}, tiles.C + (tile + piece.begin) * n.stride, n.stride,
                piece.end - piece.begin);
    }

    // The pairs' share in the gradients of B and C, now that the block's heads are summed, and the way out of both.
    void finish(const Copies& copies, int64_t block, int64_t round_token) {
        for (int tile = 0; tile < count; tile += TILE) {
            const int tokens = static_cast<int>(least(TILE, count - tile));
            float* own = pairs + tile * TILE;
            const int64_t row = (block * copies.chunks + task.chunk) * a.b + task.row;
            const int64_t copied = ((row * copies.tokens + round_token + tile) * a.g + task.group) * a.n;
            const Inside to_B{{own, TILE, 1}, tiles.C + tile * n.stride, n.stride, true};
            read(n, sums, n.stride, 0, tokens, 0, {}, nullptr, 0, &to_B);
            write(block, tile, tokens, grad_B, total_B, copies.B ? copies.B + copied : nullptr, a.grad_B);
            const Inside to_C{{own, 1, TILE}, tiles.B + tile * n.stride, n.stride, false};
            read(n, sums, n.stride, 0, tokens, 0, {}, nullptr, 0, &to_C);
            write(block, tile, tokens, grad_C, total_C, copies.C ? copies.C + copied : nullptr, a.grad_C);
        }
    }

    // What a block adds to some rows: through states, and through pairs (in `sums`).
    void write(int64_t block, int tile, int tokens, const float* states, float* total, float* copy, void* out) const {
        for (int t = 0; t < tokens; ++t) {
            const int64_t place = ((task.row * a.l + segment + tile + t) * a.g + task.group) * a.n;
            for (int64_t k = 0; k < a.n; k += LANES) {
                const int lanes = static_cast<int>(least(LANES, a.n - k));
                const int64_t here = (tile + t) * n.stride + k;
                vfloat v = load(states + here) + load(sums + t * n.stride + k);
                if (!copy && block > task.block) v = load(total + here) + v;
                if (copy) store(copy + t * a.g * a.n + k, v, lanes);
                else if (block + 1 < task.end_block) store(total + here, v);
                else store(static_cast<T*>(out) + place + k, v, lanes);
            }
        }
    }
};

// K after every chunk of time but the last: what later chunks send back.
template <class T>
void carry_back(const Args& a, const Plan& plan, const Panels& n, const Places& places) {
    const int64_t size = state_floats(a, n), heads = a.b * a.h, last = (plan.chunks - 1) * heads;
    parallel_for(plan.tasks(a) / plan.chunks * (plan.chunks - 1), plan.threads, [&](int64_t number) {
        const Task task = plan.task(a, number + plan.tasks(a) / plan.chunks);
        const int64_t before = task.place(a) - heads;
        WalkBack<T>(a, plan, task).K_alone(places.K + before * size, places.passed + before);
    });
    parallel_for(heads, plan.threads, [&](int64_t head) {
        import_state(a, n, places.K + (last + head) * size, a.grad_final + head * a.p * a.n);
        for (int64_t before = last + head - heads; before >= 0; before -= heads) {
            const float by = static_cast<float>(places.passed[before]);
            float *to = places.K + before * size, *from = to + heads * size;
            for (int64_t i = 0; by != 0 && i < size; i += LANES) store(to + i, load(to + i) + by * load(from + i));
        }
    });
}

// The copies of one round, added up into their place.
template <class T>
void add_copies(const Args& a, const Plan& plan, const Copies& copies, int64_t round) {
    const int64_t width = a.g * a.n, size = plan.chunks * a.b * copies.tokens * width;
    parallel_for(plan.chunks * a.b * ceil_div(copies.tokens, SEGMENT), plan.threads, [&](int64_t number) {
        const int64_t segments = ceil_div(copies.tokens, SEGMENT), row = number / segments;
        const int64_t chunk = row / a.b, first = number % segments * SEGMENT;
        const int64_t token = chunk * plan.tokens + round * copies.tokens + first;
        const int64_t end = least(a.l, (chunk + 1) * plan.tokens);
        const int64_t tokens = least(least(SEGMENT, copies.tokens - first), end - token);
        const int64_t from = (row * copies.tokens + first) * width, to = (row % a.b * a.l + token) * width;
        for (int64_t i = 0; i < tokens * width; i += LANES) {
            const int lanes = static_cast<int>(least(LANES, tokens * width - i));
            vfloat B{}, C{};
            for (int64_t block = 0; block < plan.blocks; ++block) {
                B = B + load(copies.B + block * size + from + i, lanes);
                C = C + load(copies.C + block * size + from + i, lanes);
            }
            store(static_cast<T*>(a.grad_B) + to + i, B, lanes);
            store(static_cast<T*>(a.grad_C) + to + i, C, lanes);
        }
    });
}

// The scalars' gradients: sums over chunks and rows of the batch.
void add_places(const Args& a, const Plan& plan, const Places& places) {
    for (int64_t head = 0; head < a.h; ++head) {
        double A = 0, bias = 0, D = 0;
        for (int64_t place = head; place < plan.chunks * a.b * a.h; place += a.h) {
            A += places.A[place];
            bias += places.bias[place];
        }
        if (a.grad_A) a.grad_A[head] = static_cast<float>(A);
        if (a.grad_bias) a.grad_bias[head] = static_cast<float>(bias);
        for (int64_t c = 0; a.grad_D && c < a.p; ++c) {
            double channel = 0;
            for (int64_t place = head; place < plan.chunks * a.b * a.h; place += a.h)
                channel += places.D[place * a.p + c];
            D += channel;
            if (a.D_is_matrix) a.grad_D[head * a.p + c] = static_cast<float>(channel);
        }
        if (a.grad_D && !a.D_is_matrix) a.grad_D[head] = static_cast<float>(D);
    }
}

template <class T>
void walk_back(const Args& a) {
    const Plan plan(a, head_blocks(a));
    const Panels n(a.n);
    const int64_t size = state_floats(a, n), count = plan.chunks * a.b * a.h;
    const int64_t rounds = plan.parts > 1 ? ceil_div(plan.tokens, ROUND) : 1;
    Copies copies;
    copies.chunks = plan.chunks;
    copies.tokens = rounds > 1 ? ROUND : plan.tokens;
    const int64_t copied = plan.parts > 1 ? plan.blocks * plan.chunks * a.b * copies.tokens * a.g * a.n : 0;
    Scratch scratch(count * (size + 2 * (3 + a.p)) + 2 * copied);
    const Places places = [&] {
        float* K = scratch.take(count * size);
        double* doubles = reinterpret_cast<double*>(scratch.take(2 * count * (3 + a.p)));
        std::memset(doubles, 0, sizeof(double) * count * (3 + a.p));
        return Places{K, doubles, doubles + count, doubles + 3 * count, doubles + 2 * count};
    }();
    if (plan.parts > 1) copies.B = scratch.take(copied), copies.C = scratch.take(copied);
    carry_back<T>(a, plan, n, places);
    for (int64_t round = rounds - 1; round >= 0; --round) {
        parallel_for(plan.tasks(a), plan.threads, [&](int64_t number) {
            const Task task = plan.task(a, number);
            const int64_t place = task.place(a), begin = task.begin + round * copies.tokens;
            if (begin >= task.end) return;
            const Places own{places.K + place * size, places.A + place, places.bias + place,
                             places.D + place * a.p, nullptr};
            WalkBack<T>(a, plan, task).gradients(own, copies, begin, least(task.end, begin + copies.tokens));
            for (int64_t i = 0; begin == 0 && a.grad_initial && i < task.end_head - task.head; ++i)
                export_state(a, n, a.grad_initial + (place + i) * a.p * a.n, own.K + i * size);
        });
        if (plan.parts > 1) add_copies<T>(a, plan, copies, round);
    }
    add_places(a, plan, places);
}

void backward(const Args& a) { a.is_bf16 ? walk_back<bf16>(a) : walk_back<float>(a); }

}  // namespace
}  // namespace ssd
}  // namespace mambakit

MAMBAKIT_KERNEL(ssd_backward, mambakit::ssd::Args, mambakit::ssd::backward)
