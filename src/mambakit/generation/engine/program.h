// A model as a list of phases, as the Python side lays it down (program.py has the same structs, field by field).
//
// Between two phases every thread has finished the one before. All fields have 8 bytes; pointers to what is not
// there are null. Buffers of activations are (batch, width) float32 with rows at a stride.
#pragma once

#include "panels.h"

namespace mambakit {
namespace decode {

// What is done to a phase's input x, by every thread for itself:  x, then x gate, then rms norm, then times weight;
// the gate after the weight where `gate_last`.
struct Prepare {
    const float* gate;
    int64_t gate_stride;
    const float* weight;  // null: no norm
    double eps;
    int64_t group;  // channels with a mean square of their own
    int64_t gate_last;
};

enum Then : int64_t { STORE = 0, ADD = 1, SILU = 2, GELU = 3, RELU2 = 4, STEP = 5, CONV = 6, SCAN = 7 };

// One linear layer, y = W x + bias, and what becomes of its results:
//   STORE, SILU, GELU, RELU2   out = f(y)
//   ADD                        out += y
//   STEP, CONV, SCAN           as their structs say
struct Product {
    const char* weights;  // panels
    const float* bias;    // null or (rows,)
    int64_t rows;
    int64_t then;
    const void* how;  // the struct of STEP, CONV or SCAN
    float* out;       // null: the logits
    int64_t stride;
};

// out = clamp(softplus(y + bias), least, most)
struct Step {
    const float* bias;
    double least, most;
};

// The causal convolution and a SiLU; the last inputs move up in the state (batch, width - 1, rows).
struct Conv {
    const float* taps;  // (width, rows)
    const float* bias;  // null or (rows,)
    int64_t width;
    int64_t state;  // number in the table of states
    int64_t state_bf16;
};

// Mamba-1's recurrence; y is the raw step size:  dt = softplus(y + dt_bias),
// h = exp(dt A) h + dt x B,  out = (C h + D x) gate;  the state h is (batch, rows, n).
struct Scan {
    const float* dt_bias;  // (rows,)
    const float* A;        // (rows, n), times log2 e
    const float* D;        // (rows,)
    const float* x;
    int64_t x_stride;
    const float* gate;
    int64_t gate_stride;
    const float* B;  // B and C are (batch, n) with the same stride
    const float* C;
    int64_t BC_stride;
    int64_t n;
    int64_t state;
};

// Mamba-2's recurrence: h = exp(dt A) h + dt x B,  out = C h + D x  for every head; the state h is (batch, heads,
// headdim, n), and heads / groups heads share B and C.
struct Heads {
    const float* A;  // (heads,), times log2 e
    const float* D;  // (heads,)
    const float* dt;
    int64_t dt_stride;
    const float* x;
    const float* B;
    const float* C;
    int64_t mixed_stride;  // of x, B and C
    float* out;
    int64_t out_stride;
    int64_t heads, headdim, groups, n;
    int64_t state;
};

// Either linear layers with the same input, or Mamba-2's heads.
struct Phase {
    const Heads* heads;  // not null: the heads, and nothing else below but `per_task`
    const float* input;
    int64_t stride, columns;
    const Prepare* prepare;  // null: the input as it is
    int64_t format;
    const Product* products;
    int64_t count;
    int64_t per_task;  // panels (or pieces of heads) that a thread takes at once
};

struct Args {
    const Phase* phases;
    int64_t phase_count;
    const int64_t* tokens;  // (batch,)
    const void* embedding;  // (vocabulary, d_model)
    int64_t embedding_bf16, d_model;
    float* residual;
    int64_t residual_stride;
    void* const* states;
    float* logits;
    int64_t logits_stride;
    char* room;  // for each thread what `room_bytes` says, then the ledger
    int64_t widest;  // columns of the widest input
    int64_t batch, threads;
    int64_t vnni;         // whether to use those instructions where they exist
    int64_t struct_bytes;  // of all structs above together: a check that both sides mean the same
};

}  // namespace decode
}  // namespace mambakit
