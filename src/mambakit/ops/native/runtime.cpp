// The library's own part: what it is, what this processor can run, where the threads come from, scratch memory.

#include "kernel.h"

#ifndef MAMBAKIT_SOURCES
#define MAMBAKIT_SOURCES "unknown"
#endif

namespace mambakit {

Parallel openmp_parallel = nullptr;

namespace {

constexpr int64_t ALIGNMENT = 64;
constexpr int SLOTS = 8;

struct Slot {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool busy = false;
};

struct Slots {
    Slot slot[SLOTS];
    ~Slots() {
        for (Slot& s : slot) std::free(s.memory);
    }
};

thread_local Slots slots;

int64_t rounded(int64_t floats) {
    return ceil_div(static_cast<int64_t>(sizeof(float)) * floats, ALIGNMENT) * ALIGNMENT;
}

char* aligned(void* memory) {
    return reinterpret_cast<char*>(ceil_div(reinterpret_cast<int64_t>(memory), ALIGNMENT) * ALIGNMENT);
}

void* allocate(int64_t bytes) {
    void* memory = std::malloc(static_cast<size_t>(bytes + ALIGNMENT));
    if (memory == nullptr) std::abort();  // no exception may cross into C, and no result is right
    return memory;
}

}  // namespace

#if defined(MAMBAKIT_CHECKED)

Scratch::Scratch(int64_t floats) : base_(nullptr), left_(rounded(floats) + 16 * ALIGNMENT), slot_(0) {}

Scratch::~Scratch() {
    for (int i = 0; i < count_; ++i) std::free(pieces_[i]);
}

float* Scratch::take(int64_t floats) {
    left_ -= rounded(floats);
    if (left_ < 0 || count_ == 16) std::abort();
    void* memory = nullptr;
    if (posix_memalign(&memory, ALIGNMENT, sizeof(float) * static_cast<size_t>(floats)) != 0) std::abort();
    pieces_[count_++] = memory;
    for (int64_t i = 0; i < floats; ++i) static_cast<float*>(memory)[i] = __builtin_nanf("");
    return static_cast<float*>(memory);
}

#else

Scratch::Scratch(int64_t floats) : left_(rounded(floats) + 16 * ALIGNMENT), slot_(0) {
    while (slot_ < SLOTS && slots.slot[slot_].busy) ++slot_;
    if (slot_ == SLOTS) std::abort();  // kernels nest two scopes
    Slot& slot = slots.slot[slot_];
    if (slot.bytes < left_) {
        std::free(slot.memory);
        slot.memory = allocate(left_);
        slot.bytes = left_;
    }
    slot.busy = true;
    base_ = aligned(slot.memory);
}

Scratch::~Scratch() { slots.slot[slot_].busy = false; }

float* Scratch::take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(base_);
    base_ += rounded(floats);
    left_ -= rounded(floats);
    if (left_ < 0) std::abort();
    return piece;
}

#endif

}  // namespace mambakit

// A digest of the sources that this library was made of.
MAMBAKIT_EXPORT const char* mambakit_sources() { return MAMBAKIT_SOURCES; }

MAMBAKIT_EXPORT const char* mambakit_compiler() {
#if defined(__clang__)
    return __VERSION__;
#else
    return "GCC " __VERSION__;
#endif
}

// The best instruction level that this processor and its operating system run.
MAMBAKIT_EXPORT const char* mambakit_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? "avx512" : avx2 ? "avx2" : "baseline";
#else
    return "baseline";
#endif
}

// Hand over GOMP_parallel of the OpenMP runtime in this process (null: run in the calling thread).
MAMBAKIT_EXPORT void mambakit_use_openmp(mambakit::Parallel parallel) { mambakit::openmp_parallel = parallel; }
