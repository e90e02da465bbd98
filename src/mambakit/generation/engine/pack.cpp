// Weights become panels (panels.h): rounded where the format says so, and laid down in the order of reading.

#include "panels.h"

namespace mambakit {
namespace decode {
namespace {

struct Pack {
    const void* weights;  // (rows, columns), contiguous
    int64_t is_bf16;
    int64_t rows, columns;
    int64_t format;
    char* panels;
    int64_t threads;
};

// int4: a group's largest number becomes -8 at the first of these factors. With a smaller scale it is cut off, and all
// others are rounded more finely; the factor with the least square error is taken.
constexpr float SHRINK[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

MAMBAKIT_INLINE float rounded(float v, float least, float most) {
    v = v < least ? least : v > most ? most : v;
    return (v + MAGIC) - MAGIC;
}

// Columns begin to begin + GROUP of a row in float32, zeros beyond the matrix.
void read_group(const Pack& p, int64_t row, int64_t begin, float* to) {
    for (int64_t i = 0; i < GROUP; ++i) {
        const int64_t column = begin + i, at = row * p.columns + column;
        const bool inside = row < p.rows && column < p.columns;
        to[i] = !inside ? 0
                : p.is_bf16 ? widen(static_cast<const bf16*>(p.weights)[at])
                            : static_cast<const float*>(p.weights)[at];
    }
}

// The nearest bfloat16, ties to even; NaN stays NaN.
uint16_t to_bf16(float v) {
    uint32_t bits = bit_cast<uint32_t>(v);
    if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void float32_group(const float* from, int64_t row, int64_t begin, int64_t columns, float* panel) {
    for (int64_t i = 0; i < least(GROUP, columns - begin); ++i) panel[(begin + i) * PANEL + row] = from[i];
}

void bfloat16_group(const float* from, int64_t row, int64_t begin, int64_t columns, uint16_t* panel) {
    for (int64_t i = 0; i < least(GROUP, columns + columns % 2 - begin); ++i) {
        const int64_t column = begin + i;
        panel[column / 2 * 2 * PANEL + 2 * row + column % 2] = to_bf16(from[i]);
    }
}

void int8_group(const float* from, int64_t row, int64_t begin, float scale, char* panel) {
    auto* bytes = reinterpret_cast<uint8_t*>(panel + 4 * PANEL) + begin * PANEL;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < GROUP; ++i)
        bytes[i / 4 * 4 * PANEL + 4 * row + i % 4] =
            static_cast<uint8_t>(128.0f + rounded(from[i] * inverse, -127.0f, 127.0f));
}

float largest(const Pack& p, int64_t row) {
    float found = 0;
    for (int64_t begin = 0; begin < p.columns; begin += GROUP) {
        float group[GROUP];
        read_group(p, row, begin, group);
        for (float v : group) {
            if (v != v) return v;
            found = std::fabs(v) > found ? std::fabs(v) : found;
        }
    }
    return found;
}

// The scale of 64 numbers, a bfloat16; NaN if one of them is not finite.
float best_scale(const float* from) {
    float extreme = 0, best = 0, best_error = INFINITY;
    for (int64_t i = 0; i < GROUP; ++i) {
        if (from[i] != from[i]) return from[i];
        extreme = std::fabs(from[i]) > std::fabs(extreme) ? from[i] : extreme;
    }
    if (extreme == 0) return 0;
    if (std::fabs(extreme) == INFINITY) return __builtin_nanf("");
    for (const float shrink : SHRINK) {
        const float scale = widen(bf16{to_bf16(extreme * (shrink / -8))});
        if (scale == 0) continue;  // below the numbers of bfloat16
        const float inverse = 1.0f / scale;
        float error = 0;
        for (int64_t i = 0; i < GROUP; ++i) {
            const float off = rounded(from[i] * inverse, -8.0f, 7.0f) * scale - from[i];
            error += off * off;
        }
        if (error < best_error) {
            best_error = error;
            best = scale;
        }
    }
    return best;
}

void int4_group(const float* from, int64_t row, char* group) {
    const float scale = best_scale(from), inverse = scale != 0 ? 1.0f / scale : 0.0f;
    reinterpret_cast<uint16_t*>(group)[row] = to_bf16(scale);
    auto* bytes = reinterpret_cast<uint8_t*>(group + 2 * PANEL);
    for (int64_t i = 0; i < GROUP / 2; ++i) {
        const auto lower = static_cast<uint8_t>(8.0f + rounded(from[i] * inverse, -8.0f, 7.0f));
        const auto upper = static_cast<uint8_t>(8.0f + rounded(from[i + GROUP / 2] * inverse, -8.0f, 7.0f));
        bytes[i / 4 * 4 * PANEL + 4 * row + i % 4] = static_cast<uint8_t>(lower | upper << 4);
    }
}

void pack_panel(const Pack& p, int64_t number) {
    char* panel = p.panels + number * panel_bytes(p.format, p.columns);
    for (int64_t row = 0; row < PANEL; ++row) {
        const int64_t of_matrix = number * PANEL + row;
        float scale = 0;
        if (p.format == INT8) {
            scale = of_matrix < p.rows ? largest(p, of_matrix) / 127.0f : 0;
            reinterpret_cast<float*>(panel)[row] = scale;
        }
        for (int64_t begin = 0; begin < p.columns; begin += GROUP) {
            float group[GROUP];
            read_group(p, of_matrix, begin, group);
            switch (p.format) {
                case FLOAT32:
                    float32_group(group, row, begin, p.columns, reinterpret_cast<float*>(panel));
                    break;
                case BFLOAT16:
                    bfloat16_group(group, row, begin, p.columns, reinterpret_cast<uint16_t*>(panel));
                    break;
                case INT8: int8_group(group, row, begin, scale, panel); break;
                default: int4_group(group, row, panel + begin / GROUP * panel_bytes(INT4, GROUP));
            }
        }
    }
}

void pack(const Pack& p) {
    parallel_for(ceil_div(p.rows, PANEL), p.threads, [&](int64_t panel) { pack_panel(p, panel); });
}

}  // namespace
}  // namespace decode
}  // namespace mambakit

MAMBAKIT_KERNEL(decode_pack, mambakit::decode::Pack, mambakit::decode::pack)
