// The residual stream begins as the embedding of each row's token.

struct Params {
    const int64* tokens;                      // (batch)
    const IO* embedding;                      // (v, d)
    RES* out;                                 // (batch, d)
    int64 batch, d, vocab;
};

KERNEL(embed, THREADS, 4) {
    const int64 number = (int64)blockIdx.x * THREADS + threadIdx.x, row = number / p.d;
    if (row >= p.batch) return;
    const int64 token = p.tokens[row];
    const bool known = token >= 0 && token < p.vocab;  // the others become NaN: nothing else can be said from here
    store(p.out + number, known ? load(p.embedding[token * p.d + number % p.d]) : bits_float(0x7fc00000u));
}
