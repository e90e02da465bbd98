// Outputs, the final state, and for a backward pass the states before every tile.

constexpr int STREAMS = 2 + GATED;
constexpr int UNROLL = LANES < 4 ? 4 : LANES;

KERNEL(forward, THREADS, 4) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, (z)][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    tile.constants(p, at);
    States rates[CPT], h[CPT];
    load_rates(rates, p, at);
    load_states(h, p, at, p.initial, at.row);
    fold(h, p, at, 0, at.segment, 1);

    const Channels x_stream(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns);
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels z_stream(at.at(p.z, p.z_b, p.z_l, at.start) + at.first, p.z_l, at.columns);
    const Vectors B_stream(at.at(p.B, p.B_b, p.B_l, at.start) + at.group * p.B_g, p.B_l, (int)p.n);
    const Vectors C_stream(at.at(p.C, p.C_b, p.C_l, at.start) + at.group * p.C_g, p.C_l, (int)p.n);
    const auto fetch = [&](int64 begin, int stage_number) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        const int64 token = begin - at.start;
        IO* to = raw + stage_number * STREAMS * TILE;
        IO* to_BC = raw_BC + stage_number * 2 * T * NP;
        x_stream.fetch(to, token, valid);
        dt_stream.fetch(to + TILE, token, valid);
        if constexpr (GATED) z_stream.fetch(to + 2 * TILE, token, valid);
        B_stream.fetch(to_BC, token, valid);
        C_stream.fetch(to_BC + T * NP, token, valid);
        copies_commit();
    };
    fetch(at.start, 0);
    int now = 0;
    const int64 all_tiles = (p.length + T - 1) / T;
#pragma unroll 1
    for (int64 begin = at.start; begin < at.stop; begin += T, now ^= 1) {
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        copies_wait<0>();
        block_barrier();
        if (begin + T < at.stop) fetch(begin + T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;
        if (p.checkpoints) store_states(p, at, p.checkpoints, at.row * all_tiles + begin / T, h);

        const bool whole = valid == T && at.columns == CHANNELS;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                pairs[j] = Pair{step, exists ? step * x[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
        });
        tile.tokens(p, at, begin, valid, BC_raw, BC_raw + T * NP);
        block_barrier();

#pragma unroll 1
        for (int t0 = 0; t0 < T; t0 += UNROLL) {
#pragma unroll
            for (int t1 = 0; t1 < UNROLL; t1 += LANES) {
                float sums[CPT][LANES];
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    const int t = t0 + t1 + j;
                    const Pairs in = read_pairs(tile, at, t);
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t];
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            const float before = fresh ? 0.0f : h[k].v[i];
                            h[k].v[i] = exp2_fast(in.v[k].a * rates[k].v[i]) * before + in.v[k].b * B.v[i];
                            sum += h[k].v[i] * C.v[i];
                        }
                        sums[k][j] = sum;
                    }
                }
                Numbers y;
                int own = 0;
#pragma unroll
                for (int k = 0; k < CPT; k++) {
                    own = sum_lanes<LANES, 1, LANES>(sums[k], at.lane);
                    y.v[k] = sums[k][0];
                }
                *(Numbers*)(tile.ys + (t0 + t1 + own) * ROW + at.c) = y;
            }
        }
        block_barrier();

        IO* const y_tile = p.y + (at.row * p.length + begin) * p.d + at.first;
        each_eight(whole, [&](Eight e, auto whole) {
            if (!whole.value && (e.t >= valid || e.k >= at.columns)) return;
            float x[8], z[8], y[8];
            load8(x, e.in(x_raw));
            load8(y, tile.ys + e.t * ROW + e.k);
            if constexpr (GATED) load8(z, e.in(x_raw + 2 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (whole.value || e.k + j < at.columns) y[j] += tile.skip[e.k + j] * x[j];
                if constexpr (GATED) y[j] *= z[j] * sigmoid(z[j]);
            }
            write8(y_tile + e.t * (int)p.d + e.k, y, at.columns - e.k);
        });
    }
    if (at.segment == p.segments - 1) store_states(p, at, p.final, at.row, h);
}
