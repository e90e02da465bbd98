// Norms for larger batches, a block per row: a branch is added to the residual stream, and the sum normalised; or
// Mamba-2's gated output is normalised in groups.
//
// Settings: IN (the input's type: RES or IO), STAGED (the weights fit into shared memory).

struct Params {
    IN* input;                                // (batch, groups x size), rows `input_stride` apart
    const IO *add, *gate, *weight;            // rows add_stride, gate_stride apart, or null; (groups x size)
    IO* out;                                  // (batch, groups x size)
    int64 input_stride, add_stride, gate_stride, groups, size;
    double eps;
};

KERNEL(rows, THREADS, 2) {
    const int64 row = blockIdx.x, width = p.groups * p.size;
    float* const scratch = (float*)shared_memory;  // WARPS
    const IO* const weight = STAGED ? stage((IO*)(scratch + WARPS), p.weight, (int)width) : p.weight;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const Source<IN> source{p.input + row * p.input_stride, p.add ? p.add + row * p.add_stride : nullptr,
                            p.gate ? p.gate + row * p.gate_stride : nullptr, weight, 0, 0, 0, 1, (int)p.groups,
                            (int)p.size, (float)p.eps};
    normalise<1>(p.out + row * width, (int)width, source, scratch);
}
