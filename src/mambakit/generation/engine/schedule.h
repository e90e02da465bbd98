// Threads that walk through a list of phases together, inside one parallel region.
//
// A phase is a number of tasks. Each thread has a home, an equal stretch of neighbouring tasks, so that it reads one
// stream of memory; when its own are done it helps the others. A phase is over when its tasks are done, not when
// every thread has arrived: a thread that is late, or was never started, or is interrupted between two tasks, holds
// nobody up. Results must not depend on who does a task.
#pragma once

#include <thread>

#include "kernel.h"

namespace mambakit {
namespace decode {

// A counter alone in its cache line.
struct alignas(64) Counter {
    std::atomic<int64_t> value;
};

MAMBAKIT_INLINE void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Ledger {
  public:
    // Counters needed for `phases` phases on `threads` threads.
    static int64_t size(int64_t phases, int64_t threads) { return phases * (threads + 1); }

    Ledger(Counter* counters, int64_t phases, int64_t threads) : counters_(counters), threads_(threads) {
        for (int64_t i = 0; i < size(phases, threads); ++i)
            counters_[i].value.store(0, std::memory_order_relaxed);
    }

    bool is_over(int64_t phase, int64_t tasks) const {
        return done(phase).load(std::memory_order_acquire) >= tasks;
    }

    // Run body(task) for tasks of this phase until none is left to take.
    template <class Body>
    void work(int64_t phase, int64_t tasks, int64_t thread, const Body& body) {
        int64_t mine = 0;
        for (int64_t i = 0; i < threads_; ++i) {
            const int64_t home = (thread + i) % threads_;
            const int64_t begin = tasks * home / threads_, end = tasks * (home + 1) / threads_;
            for (;;) {
                const int64_t task = begin + next(phase, home).fetch_add(1, std::memory_order_relaxed);
                if (task >= end) break;
                body(task);
                ++mine;
            }
        }
        if (mine) done(phase).fetch_add(mine, std::memory_order_acq_rel);
    }

    // Wait for the others' tasks.
    void wait(int64_t phase, int64_t tasks) const {
        for (int64_t i = 0; !is_over(phase, tasks); ++i) {
            // Whoever holds the last task may be waiting for this very core.
            if (i > PATIENCE) std::this_thread::yield();
            else relax();
        }
    }

  private:
    static constexpr int64_t PATIENCE = 4000;  // about 50 microseconds

    std::atomic<int64_t>& done(int64_t phase) const { return counters_[phase * (threads_ + 1)].value; }
    std::atomic<int64_t>& next(int64_t phase, int64_t home) const {
        return counters_[phase * (threads_ + 1) + 1 + home].value;
    }

    Counter* counters_;
    int64_t threads_;
};

}  // namespace decode
}  // namespace mambakit
