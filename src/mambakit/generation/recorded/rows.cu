// Norms for larger batches, a block per row: a branch is added to the residual stream, and the sum normalised; or
// Mamba-2's gated output is normalised in groups.
//
// Settings: IN (the input's type: RES or IO), STAGED (the weights fit into shared memory), HELD (pieces of a row that a
// thread holds meanwhile, or 0), PARTS (of what is added, or 0).

struct Params {
    IN* input;                                // (batch, groups x size), rows `input_stride` apart
    const IO *add, *gate, *weight;            // rows add_stride, gate_stride apart, or null; (groups x size)
    const float* parts;                       // (PARTS, batch, size): what is added, in parts, and its bias; or null
    const IO* bias;
    IO* out;                                  // (batch, groups x size)
    int64 input_stride, add_stride, gate_stride, batch, groups, size;
    double eps;
};

KERNEL(rows, THREADS, 512 / THREADS) {
    let_next_kernel_start();
    const int64 row = blockIdx.x, width = p.groups * p.size;
    float* const scratch = (float*)shared_memory;  // WARPS
    const IO* const weight = STAGED ? stage((IO*)(scratch + WARPS), p.weight, (int)width) : p.weight;
    wait_for_earlier_kernels();
    const Source<IN> source{p.input + row * p.input_stride, p.add ? p.add + row * p.add_stride : nullptr,
                            p.gate ? p.gate + row * p.gate_stride : nullptr, weight, 0, 0, 0, 1, (int)p.groups,
                            (int)p.size, (float)p.eps, p.parts + row * width, p.bias, p.batch * width};
    normalise<1, HELD, 0, PARTS>(p.out + row * width, (int)width, source, scratch);
}
