// What every kernel needs besides vectors: threads, scratch memory, and the door through which Python calls.
//
// Threads are those of the OpenMP runtime that PyTorch has already started. The library is neither compiled nor
// linked with OpenMP: Python hands over the address of that runtime's `GOMP_parallel` once (see __init__.py),
// so there can be no second pool of threads, and where there is none everything runs in the calling thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "simd.h"

#if defined(_WIN32)
#define MAMBAKIT_EXPORT extern "C" __declspec(dllexport)
#else
#define MAMBAKIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Defines `extern "C" int mambakit_NAME(const Args*, size)`. Python packs the fields of the plain struct `Args`,
// 8 bytes each (pointers, int64_t, double), in order; a size that differs means that the two sides disagree.
#define MAMBAKIT_KERNEL(NAME, ARGS, RUN)                                        \
    MAMBAKIT_EXPORT int mambakit_##NAME(const ARGS* arguments, int64_t size) { \
        if (size != static_cast<int64_t>(sizeof(ARGS))) return 1;              \
        RUN(*arguments);                                                        \
        return 0;                                                               \
    }

namespace mambakit {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Parallel openmp_parallel;  // GOMP_parallel, or null

// Run body(0), ..., body(tasks - 1) on up to `threads` threads, each task once. Idle threads take the next task,
// so which thread runs which is open: what a task computes must not depend on it.
template <class Body>
void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
    threads = threads < tasks ? threads : tasks;
    if (threads <= 1 || openmp_parallel == nullptr) {
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t tasks;
        std::atomic<int64_t> next;
    } shared{body, tasks, {0}};
    const auto work = [](void* pointer) {
        Shared& shared = *static_cast<Shared*>(pointer);
        for (;;) {
            const int64_t task = shared.next.fetch_add(1, std::memory_order_relaxed);
            if (task >= shared.tasks) return;
            shared.body(task);
        }
    };
    openmp_parallel(work, &shared, static_cast<unsigned>(threads), 0);
}

// Memory of one scope, kept by the thread for the next scope that asks. Scopes may nest. Uninitialised.
class Scratch {
  public:
    // Room for `floats` numbers in at most 16 pieces.
    explicit Scratch(int64_t floats);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next piece, aligned to 64 bytes.
    float* take(int64_t floats);

  private:
    char* base_;
    int64_t left_;
    int slot_;
#if defined(MAMBAKIT_CHECKED)
    void* pieces_[16];  // each on its own, so that the sanitizer sees a step over its end
    int count_ = 0;
#endif
};

// Fetch the cache line that the strip after the next will read or write. Strips walk down a few rows that lie
// far apart, which no hardware prefetcher follows.
template <class T>
MAMBAKIT_INLINE void prefetch(const T* strip) {
    __builtin_prefetch(strip + 2 * LANES);
}

MAMBAKIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MAMBAKIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MAMBAKIT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mambakit
