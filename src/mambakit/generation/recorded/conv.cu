// One token of the convolution, in place, for larger batches: a thread has one channel of ROWS rows of the batch.
//
// Settings: TAPS, CONV (the type of the state), ROWS.

struct Params {
    IO* x;                                    // (batch, channels), rows `stride` apart
    const IO *taps, *taps_bias;               // (channels, TAPS), (channels) or null
    CONV* conv;                               // (batch, TAPS - 1, channels)
    int64 stride, batch, channels, channel_blocks;
};

KERNEL(conv, THREADS, 4) {
    let_next_kernel_start();
    const unsigned blocks = (unsigned)p.channel_blocks;
    const int channel = (int)(blockIdx.x % blocks) * THREADS + (int)threadIdx.x;
    const int64 row = (int64)(blockIdx.x / blocks) * ROWS;
    const int rows = channel < p.channels ? (int)(p.batch - row < ROWS ? p.batch - row : ROWS) : 0;
    Window<TAPS, CONV> windows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < rows) windows[r].fetch(p.taps, p.taps_bias, p.conv, row + r, channel, p.channels);
    wait_for_earlier_kernels();
    IO* const x = p.x + row * p.stride + channel;
    float input[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < rows) input[r] = load(x[r * p.stride]);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < rows) store(x + r * p.stride, windows[r].push(input[r]));
}
