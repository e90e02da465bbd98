// The primitives of cuda.cuh on a CPU: a block's threads are fibres that take turns and switch at barriers and
// lane exchanges. Blocks run one after the other. Slow, exact about who has arrived where, and enough to check
// what a kernel computes without a GPU. A fibre that waits for one that has ended is reported as a deadlock.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __restrict__

struct Index { unsigned x; };
static Index blockIdx, threadIdx;
static unsigned char* shared_memory;

struct alignas(16) Words4 { unsigned x, y, z, w; };

namespace emulation {
constexpr size_t STACK = 256 * 1024;
struct Fibre { ucontext_t context; bool done; };
struct Meeting { int arrived = 0; long round = 0; bool all = true, result = true; };
static std::vector<Fibre> fibres;
static std::unique_ptr<unsigned char[]> stacks;  // not filled: only what is used takes memory
static ucontext_t scheduler;
static int current, count, stacked;
static bool progress;
static Meeting block;
static std::vector<Meeting> warps;
static std::vector<float> exchanged;
struct Operands { unsigned a[4], b[2]; };
static std::vector<Operands> operands;  // of two turns: nobody begins the next but one before all have read
static std::vector<int> turns;

inline void yield() { swapcontext(&fibres[current].context, &scheduler); threadIdx.x = (unsigned)current; }

// Wait until all `members` have come; true if all of them said yes.
inline bool meet(Meeting& at, int members, bool yes = true) {
    const long round = at.round;
    at.all = at.all && yes;
    progress = true;
    if (++at.arrived == members) {
        at.arrived = 0, at.result = at.all, at.all = true, at.round++;
        return at.result;
    }
    while (at.round == round) yield();
    return at.result;
}

template <typename Body>
void run_block(Body body, int threads) {
    static Body* entry;
    entry = &body;
    count = threads;
    fibres.assign(threads, Fibre{});
    if (threads > stacked) stacks.reset(new unsigned char[threads * STACK]), stacked = threads;
    warps.assign((threads + 31) / 32, Meeting{});
    exchanged.assign(threads, 0.0f);
    operands.resize(2 * threads);
    turns.assign(threads, 0);
    block = Meeting{};
    for (int i = 0; i < threads; i++) {
        getcontext(&fibres[i].context);
        fibres[i].context.uc_stack.ss_sp = stacks.get() + i * STACK;
        fibres[i].context.uc_stack.ss_size = STACK;
        fibres[i].context.uc_link = &scheduler;
        makecontext(&fibres[i].context, (void (*)()) + [] { (*entry)(); fibres[current].done = true; progress = true; }, 0);
    }
    for (int left = threads; left > 0;) {
        progress = false;
        for (int i = 0; i < threads; i++) {
            if (fibres[i].done) continue;
            current = i, threadIdx.x = (unsigned)i;
            swapcontext(&scheduler, &fibres[i].context);
            left -= fibres[i].done;
        }
        if (!progress) {
            fprintf(stderr, "a kernel's threads wait for threads that never come\n");
            abort();
        }
    }
}
}  // namespace emulation

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline unsigned float_bits(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float bits_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float half_to_float(unsigned short h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
inline unsigned short float_to_half(float x) { _Float16 y = (_Float16)x; unsigned short h; memcpy(&h, &y, 2); return h; }
inline unsigned short float_to_bf16(float x) {
    if (std::isnan(x)) return 0x7fff;
    const unsigned bits = float_bits(x);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline unsigned pack_bf16(float first, float second) { return float_to_bf16(first) | (unsigned)float_to_bf16(second) << 16; }
inline void block_barrier() { emulation::meet(emulation::block, emulation::count); }
inline bool block_all(bool yes) { return emulation::meet(emulation::block, emulation::count, yes); }
inline float swap_lanes(float x, int mask) {
    using namespace emulation;
    const int me = current, warp = me / 32, members = count - warp * 32 < 32 ? count - warp * 32 : 32;
    exchanged[me] = x;
    meet(warps[warp], members);
    const float other = exchanged[me ^ mask];
    meet(warps[warp], members);
    return other;
}
inline void add_to_global(float* to, float x) { *to += x; }
// Both addresses must be 16-byte aligned on a GPU; the copy is complete at once here.
inline void copy16_async(void* shared, const void* global) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) {
        fprintf(stderr, "an asynchronous copy is not aligned\n");
        abort();
    }
    memcpy(shared, global, 16);
}
inline void copy16_async_or_zero(void* shared, const void* global, bool exists) {
    if (exists) return copy16_async(shared, global);
    memset(shared, 0, 16);
}
inline Words4 load16_shared(const void* shared) { return *(const Words4*)shared; }
inline Words4 load16_once(const void* from) {
    if ((uintptr_t)from % 16) {
        fprintf(stderr, "a load of 16 bytes is not aligned\n");
        abort();
    }
    return *(const Words4*)from;
}
inline void store16(void* to, const Words4& x) { *(Words4*)to = x; }
inline void keep_order() {}
inline Words4 load16_fresh(const void* from) { return load16_once(from); }
inline void prefetch(const void*) {}
inline void publish() {}
inline unsigned add_to_counter(unsigned* to, unsigned x) { return (*to += x) - x; }
inline float bf16_to_float(unsigned short h) { return bits_float((unsigned)h << 16); }
template <float (*NUMBER)(unsigned short)>
void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    using namespace emulation;
    const int warp = current / 32, lane = current % 32, turn = (turns[current] ^= 1) * count;
    const Operands* all = operands.data() + turn + warp * 32;
    operands[turn + current] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    meet(warps[warp], 32);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned y = all[column * 4 + k % 8 / 2].b[k / 8];
            c[i] += NUMBER((unsigned short)(x >> 16 * (k % 2))) * NUMBER((unsigned short)(y >> 16 * (k % 2)));
        }
    }
}
inline void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply<bf16_to_float>(c, a, b0, b1); }
inline void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply<half_to_float>(c, a, b0, b1); }
inline void wait_for_earlier_kernels() {}  // kernels run one after the other
inline void let_next_kernel_start() {}
inline void copies_commit() {}
template <int PENDING> inline void copies_wait() {}

// One library holds one kernel: `run` starts it.
#define KERNEL(name, threads, blocks)                                                        \
    static void name(const Params& p);                                                       \
    extern "C" void run(const Params* p, long long grid, int block_threads, int shared) {    \
        std::vector<unsigned char> memory(shared + 16);                                      \
        shared_memory = memory.data() + (16 - (uintptr_t)memory.data() % 16) % 16;           \
        for (long long i = 0; i < grid; i++) {                                               \
            memset(shared_memory, 0xff, shared); /* NaN: what is read must be written */     \
            blockIdx.x = (unsigned)i;                                                        \
            emulation::run_block([&] { name(*p); }, block_threads);                          \
        }                                                                                    \
    }                                                                                        \
    static void name(const Params& p)
