// How weights lie in memory, and the product of one panel of them with the activations of a few sequences.
//
// A panel is 32 rows of a matrix, stored column by column, so that whoever multiplies it reads one stream of
// memory from its beginning to its end: two rows read side by side are two streams, and a core's prefetcher then
// delivers a third of what it does for one. The results of a panel are 32 neighbouring numbers, and no sum runs
// across the lanes of a vector. Every sum is taken in the order of the columns, for any number of sequences,
// so a sequence's results do not depend on its neighbours.
//
//   float32   32 numbers for each column
//   bfloat16  32 words for each two columns, the first one's number in the lower half
//   int8      32 float scales; then for each four columns 32 words of four bytes, each 128 + an integer
//   int4      for each 64 columns 32 bfloat16 scales, then 8 times 32 words of four bytes: for j = 0, ..., 7 the
//             lower halves belong to the columns 4 j to 4 j + 3, the upper halves to the 32nd after them; each
//             is 8 + an integer
//
// Against integers the activations are integers too, rounded for each sequence in groups of 64 columns.
// Bytes are unsigned because the instructions multiply unsigned with signed bytes: sum (128 + w) x is
// corrected by 128 sum x, which is the same for all rows.
#pragma once

#include "kernel.h"

namespace mambakit {
namespace decode {

constexpr int PANEL = 32;                // rows of a panel
constexpr int VECTORS = PANEL / LANES;   // vectors that hold one column of it
constexpr int GROUP = 64;                // columns that share a scale
constexpr int MOST_BATCH = 16;

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

// Activations in the form in which a format's product takes them.
struct Input {
    const float* values;  // (batch, columns), rows at `stride`; an odd last column is followed by a zero
    int64_t stride;
    int64_t columns;
    // For integers. Rows of `groups` groups.
    int8_t* bytes;     // (batch, groups, 64)
    float* scales;     // (batch, groups)
    int32_t* offsets;  // (batch, groups): minus the bytes' sum times what the weights are shifted by
    int64_t groups;
};

// Results of one panel, one row per sequence.
using Results = float (*)[PANEL];

MAMBAKIT_INLINE int64_t panel_bytes(int64_t format, int64_t columns) {
    const int64_t groups = ceil_div(columns, GROUP);
    switch (format) {
        case FLOAT32: return 4 * PANEL * columns;
        case BFLOAT16: return 4 * PANEL * ceil_div(columns, 2);
        case INT8: return 4 * PANEL + groups * GROUP * PANEL;
        default: return groups * (2 * PANEL + GROUP / 2 * PANEL);
    }
}

// Multiply a panel of integers for all sequences. `vnni` is compiled for processors with those instructions.
namespace plain {
void multiply_int8(const char* panel, const Input& x, int64_t batch, Results results);
void multiply_int4(const char* panel, const Input& x, int64_t batch, Results results);
}  // namespace plain
namespace vnni {
bool available();
void multiply_int8(const char* panel, const Input& x, int64_t batch, Results results);
void multiply_int4(const char* panel, const Input& x, int64_t batch, Results results);
}  // namespace vnni

template <int SIZE>
struct Count {
    static constexpr int value = SIZE;
};

// Call run(first, Count<n>{}) for sequences 0 to batch - 1, at most MOST at a time and as evenly as can be: their
// sums stay in registers.
template <int MOST, class Run>
MAMBAKIT_INLINE void in_blocks(int64_t batch, const Run& run) {
    const int64_t blocks = ceil_div(batch, MOST);
    int64_t first = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t size = (batch - first) / (blocks - block);
        switch (size) {
            case 1: run(first, Count<1>{}); break;
            case 2: if constexpr (MOST >= 2) run(first, Count<2>{}); break;
            case 3: if constexpr (MOST >= 3) run(first, Count<3>{}); break;
            case 4: if constexpr (MOST >= 4) run(first, Count<4>{}); break;
            case 5: if constexpr (MOST >= 5) run(first, Count<5>{}); break;
            case 6: if constexpr (MOST >= 6) run(first, Count<6>{}); break;
            case 7: if constexpr (MOST >= 7) run(first, Count<7>{}); break;
            default: if constexpr (MOST >= 8) run(first, Count<8>{}); break;
        }
        first += size;
    }
}

}  // namespace decode
}  // namespace mambakit
