// What a segment does on its own: the state it leaves behind and how much it keeps of the one that enters; or,
// for the backward pass, the same of the gradient that enters at its end.

#ifdef KERNEL_summarise
constexpr bool FORWARD = true;
#define SUMMARISE summarise
#else
constexpr bool FORWARD = false;
#define SUMMARISE summarise_backward
#endif

KERNEL(SUMMARISE, THREADS, 4) {
    const Place at(p);
    if (at.segment == (FORWARD ? p.segments - 1 : 0)) return;  // no segment lies beyond it
    constexpr int STREAMS = FORWARD ? 2 : 2 + GATED;     // dt, and x or dy, z
    IO* raw = (IO*)shared_memory;                        // [2][STREAMS][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B or C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    tile.constants(p, at);
    States rates[CPT], own[CPT]{};
    load_rates(rates, p, at);
    float since[CPT]{};  // time between the tokens seen and the border that matters
    bool cut = false;    // a document border lies between
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    const auto first_token = [&](int64 number) { return at.start + (FORWARD ? tiles - 1 - number : number) * T; };
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels in_stream = FORWARD ? Channels(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns)
                                       : Channels(at.at(p.dy, p.dy_b, p.dy_l, at.start) + at.first, p.dy_l, at.columns);
    const Channels z_stream(at.at(p.z, p.z_b, p.z_l, at.start) + at.first, p.z_l, at.columns);
    const Vectors weights = FORWARD
        ? Vectors(at.at(p.B, p.B_b, p.B_l, at.start) + at.group * p.B_g, p.B_l, (int)p.n)
        : Vectors(at.at(p.C, p.C_b, p.C_l, at.start) + at.group * p.C_g, p.C_l, (int)p.n);
    const auto fetch = [&](int64 number, int stage_number) {
        const int64 begin = first_token(number), token = begin - at.start;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        IO* to = raw + stage_number * STREAMS * TILE;
        dt_stream.fetch(to, token, valid);
        in_stream.fetch(to + TILE, token, valid);
        if constexpr (!FORWARD && GATED) z_stream.fetch(to + 2 * TILE, token, valid);
        weights.fetch(raw_BC + stage_number * 2 * T * NP, token, valid);
        copies_commit();
    };
    fetch(0, 0);
    int now = 0;
#pragma unroll 1
    for (int64 number = 0; number < tiles; number++, now ^= 1) {
        const int64 begin = first_token(number);
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        copies_wait<0>();
        block_barrier();
        if (number + 1 < tiles) fetch(number + 1, now ^ 1);
        const IO* dt_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;
        each_eight(valid == T && at.columns == CHANNELS, [&](Eight e, auto whole) {
            float dt[8], in[8], z[8];
            Pair pairs[8];
            load8(dt, e.in(dt_raw));
            load8(in, e.in(dt_raw + TILE));
            if constexpr (!FORWARD && GATED) load8(z, e.in(dt_raw + 2 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                if constexpr (FORWARD) in[j] *= step;
                if constexpr (!FORWARD && GATED) in[j] *= z[j] * sigmoid(z[j]);
                pairs[j] = Pair{step, exists ? in[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
        });
        tile.tokens(p, at, begin, valid, BC_raw, nullptr);
        block_barrier();
#pragma unroll 4
        for (int s = 0; s < T; s++) {
            const int t = FORWARD ? T - 1 - s : s;
            const Pairs in = read_pairs(tile, at, t);
            const States weight = read_states(tile.BC + t * 2 * NP + at.q * NPT);
            if (!FORWARD && PACKED && tile.fresh[t]) cut = true;
#pragma unroll
            for (int k = 0; k < CPT; k++) {
                if (!FORWARD) since[k] += in.v[k].a;  // the state that enters has decayed by this token, too
                if (!(PACKED && cut)) {
#pragma unroll
                    for (int i = 0; i < NPT; i++)
                        own[k].v[i] += exp2_fast(since[k] * rates[k].v[i]) * (in.v[k].b * weight.v[i]);
                }
                if (FORWARD) since[k] += in.v[k].a;
            }
            if (FORWARD && PACKED && tile.fresh[t]) cut = true;
        }
        // Steps are never negative after a softplus: what has vanished stays so.
        bool gone = PACKED && cut;
        if (SOFTPLUS && !gone) {
            gone = true;
#pragma unroll
            for (int k = 0; k < CPT; k++)
#pragma unroll
                for (int i = 0; i < NPT; i++)
                    gone = gone && (!at.owns(k) || at.q * NPT + i >= p.n || since[k] * rates[k].v[i] < GONE);
        }
        if (block_all(gone)) {
            copies_wait<0>();
            break;
        }
    }
    States decay[CPT];
#pragma unroll
    for (int k = 0; k < CPT; k++)
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            const float log = since[k] * rates[k].v[i];
            decay[k].v[i] = (PACKED && cut) || (SOFTPLUS && log < GONE) ? 0.0f : exp2_fast(log);
        }
    store_states(p, at, p.local, at.row * p.segments + at.segment, own);
    store_states(p, at, p.passed, at.row * p.segments + at.segment, decay);
}
