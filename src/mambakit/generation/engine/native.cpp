// One token through a whole language model: every phase of the program (program.h), by threads that stay inside one
// parallel region (schedule.h). A phase's input is prepared (before.h), its panels are multiplied (floats.h,
// integers.h), and their results finished (after.h).

#include "after.h"
#include "floats.h"
#include "schedule.h"

namespace mambakit {
namespace decode {
namespace {

using Multiply = void (*)(const char*, const Input&, int64_t, Results);

constexpr int64_t STRUCT_BYTES = sizeof(Prepare) + sizeof(Product) + sizeof(Step) + sizeof(Conv) + sizeof(Scan) +
                                 sizeof(Heads) + sizeof(Phase) + sizeof(Args);

Multiply multiplication(const Args& a, int64_t format) {
    const bool vnni = a.vnni && vnni::available();
    switch (format) {
        case FLOAT32: return multiply_float32;
        case BFLOAT16: return multiply_bfloat16;
        case INT8: return vnni ? vnni::multiply_int8 : plain::multiply_int8;
        default: return vnni ? vnni::multiply_int4 : plain::multiply_int4;
    }
}

int64_t tasks_of(const Product& product, int64_t per_task) {
    return ceil_div(ceil_div(product.rows, PANEL), per_task);
}

int64_t tasks_of(const Phase& phase, int64_t batch) {
    if (phase.heads) return ceil_div(batch * pieces(*phase.heads), phase.per_task);
    int64_t tasks = 0;
    for (int64_t i = 0; i < phase.count; ++i) tasks += tasks_of(phase.products[i], phase.per_task);
    return tasks;
}

// A stretch of panels of one linear layer of the phase.
void product_task(const Args& a, const Phase& phase, const Input& x, int64_t task, Results results) {
    const Product* product = phase.products;
    for (int64_t own; task >= (own = tasks_of(*product, phase.per_task)); ++product) task -= own;
    const Multiply multiply = multiplication(a, phase.format);
    const int64_t bytes = panel_bytes(phase.format, phase.columns);
    const int64_t first = task * phase.per_task;
    const int64_t end = least(first + phase.per_task, ceil_div(product->rows, PANEL));
    for (int64_t panel = first; panel < end; ++panel) {
        multiply(product->weights + panel * bytes, x, a.batch, results);
        for (int64_t m = 0; m < a.batch; ++m) finish(a, *product, panel * PANEL, m, results[m]);
    }
}

template <class T>
void embed(const Args& a) {
    for (int64_t m = 0; m < a.batch; ++m) {
        const T* from = static_cast<const T*>(a.embedding) + a.tokens[m] * a.d_model;
        float* to = a.residual + m * a.residual_stride;
        for (int64_t i = 0; i < a.d_model; i += LANES) {
            const int lanes = lanes_left(i, a.d_model);
            store(to + i, load(from + i, lanes), lanes);
        }
    }
}

// All phases, as one of several threads.
void walk(const Args& a, Ledger& ledger, int64_t thread) {
    const Room room(a.room + thread * Room::size(a.widest), a.widest);
    for (int64_t i = 0; i < a.phase_count; ++i) {
        const Phase& phase = a.phases[i];
        const int64_t tasks = tasks_of(phase, a.batch);
        if (ledger.is_over(i, tasks)) continue;  // this thread was late
        if (phase.heads) {
            float* h = static_cast<float*>(a.states[phase.heads->state]);
            ledger.work(i, tasks, thread, [&](int64_t task) {
                head_task(*phase.heads, a.batch, task * phase.per_task, (task + 1) * phase.per_task, h);
            });
        } else {
            const Input x = prepare(phase, a.batch, room);
            ledger.work(i, tasks, thread,
                        [&](int64_t task) { product_task(a, phase, x, task, room.results); });
        }
        ledger.wait(i, tasks);
    }
}

void run(const Args& a) {
    if (a.embedding_bf16) embed<bf16>(a);
    else embed<float>(a);
    const int64_t threads = openmp_parallel ? most(1, a.threads) : 1;
    auto* counters = reinterpret_cast<Counter*>(a.room + a.threads * Room::size(a.widest));
    Ledger ledger(counters, a.phase_count, threads);
    if (threads == 1) return walk(a, ledger, 0);
    struct Shared {
        const Args& a;
        Ledger& ledger;
        std::atomic<int64_t> arrived;
    } shared{a, ledger, {0}};
    const auto work = [](void* pointer) {
        Shared& shared = *static_cast<Shared*>(pointer);
        walk(shared.a, shared.ledger, shared.arrived.fetch_add(1, std::memory_order_relaxed));
    };
    openmp_parallel(work, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace
}  // namespace decode
}  // namespace mambakit

// Run one step; 1: the arguments have another size than expected, 2: the program's structs have.
MAMBAKIT_EXPORT int mambakit_decode_step(const mambakit::decode::Args* arguments, int64_t size) {
    using namespace mambakit::decode;
    if (size != static_cast<int64_t>(sizeof(Args))) return 1;
    if (arguments->struct_bytes != STRUCT_BYTES) return 2;
    run(*arguments);
    return 0;
}

// Bytes of working memory for inputs of up to `widest` columns, on up to `threads` threads.
MAMBAKIT_EXPORT int64_t mambakit_decode_room(int64_t widest, int64_t phases, int64_t threads) {
    using namespace mambakit::decode;
    return threads * Room::size(widest) + Ledger::size(phases, threads) * static_cast<int64_t>(sizeof(Counter));
}

MAMBAKIT_EXPORT int mambakit_decode_has_vnni() { return mambakit::decode::vnni::available(); }
