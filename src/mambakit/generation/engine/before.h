// A phase's input, made ready by every thread for itself: gated, normalised, and rounded where the weights are
// integers. Doing this once and waiting for it would take longer.
#pragma once

#include "program.h"

namespace mambakit {
namespace decode {

// What one thread has to itself.
struct Room {
    Results results;     // (MOST_BATCH, PANEL)
    float* values;       // (MOST_BATCH, stride)
    int8_t* bytes;       // (MOST_BATCH, groups, 64)
    float* scales;       // (MOST_BATCH, groups)
    int32_t* offsets;    // (MOST_BATCH, groups)
    int64_t stride;

    static int64_t groups(int64_t widest) { return ceil_div(widest, GROUP); }

    // Bytes for inputs of `widest` columns; a multiple of 64.
    static int64_t size(int64_t widest) {
        return MOST_BATCH * (4 * PANEL + groups(widest) * (4 * GROUP + GROUP)) +
               2 * ceil_div(4 * MOST_BATCH * groups(widest), 64) * 64;
    }

    Room(char* memory, int64_t widest) : stride(groups(widest) * GROUP) {
        const int64_t factors = ceil_div(4 * MOST_BATCH * groups(widest), 64) * 64;
        results = reinterpret_cast<Results>(memory);
        memory += 4 * MOST_BATCH * PANEL;
        values = reinterpret_cast<float*>(memory);
        memory += 4 * MOST_BATCH * stride;
        bytes = reinterpret_cast<int8_t*>(memory);
        memory += MOST_BATCH * stride;
        scales = reinterpret_cast<float*>(memory);
        offsets = reinterpret_cast<int32_t*>(memory + factors);
    }
};

MAMBAKIT_INLINE int lanes_left(int64_t i, int64_t end) { return static_cast<int>(least(LANES, end - i)); }

// One row of `columns` channels, as Prepare says.
inline void prepare_row(const Prepare& p, const float* x, const float* gate, int64_t columns, float* to) {
    const int64_t group = p.weight ? p.group : columns;
    for (int64_t begin = 0; begin < columns; begin += group) {
        const int64_t end = least(columns, begin + group);
        vfloat squares{};
        for (int64_t i = begin; i < end; i += LANES) {
            const int lanes = lanes_left(i, end);
            vfloat v = load(x + i, lanes);
            if (gate && !p.gate_last) v = v * load(gate + i, lanes);
            squares = squares + v * v;
            store(to + i, v, lanes);
        }
        if (!p.weight) continue;
        const float mean = sum(squares) / static_cast<float>(end - begin);
        const float factor = 1.0f / std::sqrt(mean + static_cast<float>(p.eps));
        for (int64_t i = begin; i < end; i += LANES) {
            const int lanes = lanes_left(i, end);
            vfloat v = load(to + i, lanes) * factor * load(p.weight + i, lanes);
            if (gate && p.gate_last) v = v * load(gate + i, lanes);
            store(to + i, v, lanes);
        }
    }
}

// Round one group of numbers: value = byte scale. A number that is not finite makes the scale NaN, and with it
// everything that this group touches.
inline void round_group(const float* values, int64_t count, int64_t shift, int8_t* bytes, float* scale,
                        int32_t* offset) {
    vfloat largest{}, broken{};
    for (int64_t i = 0; i < count; i += LANES) {
        const vfloat v = load(values + i, lanes_left(i, count));
        const vfloat size = absolute(v);
        largest = size > largest ? size : largest;
        broken = broken + v * 0.0f;
    }
    float lane[LANES], most = 0;
    store(lane, largest);
    for (int i = 0; i < LANES; ++i) most = lane[i] > most ? lane[i] : most;
    const float inverse = most > 0 && most < INFINITY ? 127.0f / most : 0.0f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the lower bits then hold
    vint total{};
    for (int64_t i = 0; i < GROUP; i += LANES) {
        vint rounded{};
        if (i < count) {
            const vfloat v = load(values + i, lanes_left(i, count)) * inverse;
            rounded = bit_cast<vint>((v == v ? v : vfloat{}) + magic) - bit_cast<vint>(broadcast(magic));
        }
        total = total + rounded;
        typedef int8_t vbyte __attribute__((vector_size(LANES)));
        const vbyte narrow_ = __builtin_convertvector(rounded, vbyte);
        std::memcpy(bytes + i, &narrow_, LANES);
    }
    int32_t sum_of_bytes = 0;
    for (int i = 0; i < LANES; ++i) sum_of_bytes += total[i];
    *scale = most / 127.0f + sum(broken);
    *offset = -static_cast<int32_t>(shift) * sum_of_bytes;
}

// The input of a phase for all sequences.
inline Input prepare(const Phase& phase, int64_t batch, const Room& room) {
    Input x{phase.input, phase.stride, phase.columns, room.bytes, room.scales, room.offsets,
            ceil_div(phase.columns, GROUP)};
    if (phase.prepare) {
        const Prepare& p = *phase.prepare;
        for (int64_t m = 0; m < batch; ++m) {
            float* to = room.values + m * room.stride;
            prepare_row(p, x.values + m * x.stride, p.gate ? p.gate + m * p.gate_stride : nullptr, x.columns, to);
            if (x.columns % 2) to[x.columns] = 0;
        }
        x.values = room.values;
        x.stride = room.stride;
    }
    if (phase.format < INT8) return x;
    for (int64_t m = 0; m < batch; ++m)
        for (int64_t g = 0; g < x.groups; ++g) {
            const int64_t at = m * x.groups + g;
            round_group(x.values + m * x.stride + g * GROUP, least(GROUP, x.columns - g * GROUP),
                        phase.format == INT8 ? 128 : 8, x.bytes + at * GROUP, x.scales + at, x.offsets + at);
        }
    return x;
}

}  // namespace decode
}  // namespace mambakit
