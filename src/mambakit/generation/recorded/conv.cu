// One token of the convolution, in place, for larger batches.
//
// Settings: TAPS, CONV (the type of the state).

struct Params {
    IO* x;                                    // (batch, channels), rows `stride` apart
    const IO *taps, *taps_bias;               // (channels, TAPS), (channels) or null
    CONV* conv;                               // (batch, TAPS - 1, channels)
    int64 stride, batch, channels;
};

KERNEL(conv, THREADS, 4) {
    const int64 number = (int64)blockIdx.x * THREADS + threadIdx.x, row = number / p.channels, channel = number % p.channels;
    Window<TAPS, CONV> window;
    if (row < p.batch) window.fetch(p.taps, p.taps_bias, p.conv, row, channel, p.channels);
    let_next_kernel_start();
    wait_for_earlier_kernels();
    if (row >= p.batch) return;
    IO* const x = p.x + row * p.stride + channel;
    store(x, window.push(load(*x)));
}
