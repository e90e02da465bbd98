// All gradients, tile by tile from the end.

constexpr int STREAMS = 3 + GATED;
constexpr int SUBS = T / SUB;
constexpr int TOGETHER = LANES < SUB ? LANES : SUB;                  // tokens whose sums cross lanes together
constexpr int KEPT = 2 * NPT * LANES > 32 ? 2 * NPT * LANES / 32 : 1;  // sums of a token that a lane ends up with

KERNEL(backward, THREADS, 4) {
    const Place at(p);
    IO* raw = (IO*)shared_memory;                        // [2][x, dt, dy, (z)][T][RAW]
    IO* raw_BC = raw + 2 * STREAMS * TILE;               // [2][B, C][T][NP]
    Tile tile((unsigned char*)(raw_BC + 2 * 2 * T * NP));
    // In tile.ys the gradient of the ungated output, and then, where that is spent, the ungated output.
    float* starts = (float*)((unsigned char*)tile.pairs + Tile::BYTES);  // [SUBS - 1][CPT][THREADS][NPT]: states
    float* slots = starts + (SUBS - 1) * CPT * THREADS * NPT;  // [2][WARPS][SUB][2 NP]: of B and C by warp
    tile.constants(p, at);
    States rates[CPT], g[CPT], dA[CPT]{};
    load_rates(rates, p, at);
    load_states(g, p, at, p.dfinal, at.row);
    fold(g, p, at, p.segments - 1, at.segment, -1);
    float d_skip[CPT]{}, d_bias[CPT]{};
    const int64 all_tiles = (p.length + T - 1) / T;
    // The states before the tokens of a sub other than the first, which the checkpoint holds.
    const auto start_of = [&](int sub, int k) {
        return (States*)(starts + (((sub - 1) * CPT + k) * THREADS + threadIdx.x) * NPT);
    };

    const Channels x_stream(at.at(p.x, p.x_b, p.x_l, at.start) + at.first, p.x_l, at.columns);
    const Channels dt_stream(at.at(p.dt, p.dt_b, p.dt_l, at.start) + at.first, p.dt_l, at.columns);
    const Channels dy_stream(at.at(p.dy, p.dy_b, p.dy_l, at.start) + at.first, p.dy_l, at.columns);
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
        dy_stream.fetch(to + 2 * TILE, token, valid);
        if constexpr (GATED) z_stream.fetch(to + 3 * TILE, token, valid);
        B_stream.fetch(to_BC, token, valid);
        C_stream.fetch(to_BC + T * NP, token, valid);
        copies_commit();
    };
    // Where the thread's sums of gradients of B and C go, for the first token of a row.
    constexpr int SUMS = (SUB * 2 * NP + THREADS - 1) / THREADS;
    const int64 by_token = p.groups * p.n, by_block = p.partial ? p.batch * p.length * by_token : 0;
    float* sum_to[SUMS];
#pragma unroll
    for (int m = 0; m < SUMS; m++) {
        const int i = threadIdx.x + m * THREADS;
        sum_to[m] = (i / NP % 2 ? p.dC : p.dB) + at.block * by_block + (at.row * p.length + i / (2 * NP)) * by_token +
                    at.group * p.n + i % NP;
    }
    const int64 tiles = (at.stop - at.start + T - 1) / T;
    fetch(at.start + (tiles - 1) * T, 0);
    int now = 0;
#pragma unroll 1
    for (int64 number = tiles - 1; number >= 0; number--, now ^= 1) {
        const int64 begin = at.start + number * T;
        const int valid = (int)(at.stop - begin < T ? at.stop - begin : T);
        States h[CPT];
        load_states(h, p, at, p.checkpoints, at.row * all_tiles + begin / T);
        copies_wait<0>();
        block_barrier();
        if (number > 0) fetch(begin - T, now ^ 1);
        const IO* x_raw = raw + now * STREAMS * TILE;
        const IO* BC_raw = raw_BC + now * 2 * T * NP;

        const bool whole = valid == T && at.columns == CHANNELS;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8], dy[8], z[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
            load8(dy, e.in(x_raw + 2 * TILE));
            if constexpr (GATED) load8(z, e.in(x_raw + 3 * TILE));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float step = exists ? step_size(dt[j] + tile.bias[e.k + j]) : 0.0f;
                if constexpr (GATED) dy[j] *= z[j] * sigmoid(z[j]);
                if (!exists) dy[j] = 0.0f;
                pairs[j] = Pair{step, exists ? step * x[j] : 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
            store8(tile.ys + e.t * ROW + e.k, dy);
        });
        tile.tokens(p, at, begin, valid, BC_raw, BC_raw + T * NP);
        block_barrier();

        // States before each SUB tokens.
#pragma unroll 1
        for (int sub = 0; sub < SUBS - 1; sub++) {
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                const int t = sub * SUB + j;
                const Pairs in = read_pairs(tile, at, t);
                const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                const bool fresh = PACKED && tile.fresh[t];
#pragma unroll
                for (int k = 0; k < CPT; k++)
#pragma unroll
                    for (int i = 0; i < NPT; i++)
                        h[k].v[i] = exp2_fast(in.v[k].a * rates[k].v[i]) * (fresh ? 0.0f : h[k].v[i]) + in.v[k].b * B.v[i];
            }
#pragma unroll
            for (int k = 0; k < CPT; k++) *start_of(sub + 1, k) = h[k];
        }

#pragma unroll 1
        for (int sub = SUBS - 1; sub >= 0; sub--) {
            const int t0 = sub * SUB;
            float* const here = slots + sub % 2 * WARPS * SUB * 2 * NP;  // in turn, so that one barrier is enough
            float decay[SUB][CPT][NPT], before[SUB + 1][CPT][NPT];
            if (sub == 0) {
                load_states(h, p, at, p.checkpoints, at.row * all_tiles + begin / T);
            } else {
#pragma unroll
                for (int k = 0; k < CPT; k++) h[k] = *start_of(sub, k);
            }
            Numbers ys[SUB / TOGETHER];
            int own_y = 0;
#pragma unroll
            for (int j0 = 0; j0 < SUB; j0 += TOGETHER) {
                float sums[CPT][TOGETHER];
#pragma unroll
                for (int j = j0; j < j0 + TOGETHER; j++) {
                    const Pairs in = read_pairs(tile, at, t0 + j);
                    const States B = read_states(tile.BC + (t0 + j) * 2 * NP + at.q * NPT);
                    const bool fresh = PACKED && tile.fresh[t0 + j];
                    States C;
                    if constexpr (GATED) C = read_states(tile.BC + (t0 + j) * 2 * NP + NP + at.q * NPT);
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            decay[j][k][i] = fresh ? 0.0f : exp2_fast(in.v[k].a * rates[k].v[i]);
                            before[j][k][i] = fresh ? 0.0f : h[k].v[i];
                            h[k].v[i] = decay[j][k][i] * before[j][k][i] + in.v[k].b * B.v[i];
                            if constexpr (GATED) sum += h[k].v[i] * C.v[i];
                        }
                        sums[k][j - j0] = sum;
                    }
                }
                if constexpr (GATED) {
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        own_y = sum_lanes<TOGETHER, 1, LANES>(sums[k], at.lane);
                        ys[j0 / TOGETHER].v[k] = sums[k][0];
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < CPT; k++)
#pragma unroll
                for (int i = 0; i < NPT; i++) before[SUB][k][i] = h[k].v[i];

#pragma unroll
            for (int j0 = SUB - TOGETHER; j0 >= 0; j0 -= TOGETHER) {
                float d_input[CPT][TOGETHER], d_step[CPT][TOGETHER];
#pragma unroll
                for (int j = j0 + TOGETHER - 1; j >= j0; j--) {
                    const int t = t0 + j;
                    const Pairs in = read_pairs(tile, at, t);
                    const Numbers dy = *(const Numbers*)(tile.ys + t * ROW + at.c);
                    const States B = read_states(tile.BC + t * 2 * NP + at.q * NPT);
                    const States C = read_states(tile.BC + t * 2 * NP + NP + at.q * NPT);
                    const bool fresh_next = PACKED && j + 1 < SUB && tile.fresh[t + 1];
                    float dBC[2 * NPT];
#pragma unroll
                    for (int i = 0; i < 2 * NPT; i++) dBC[i] = 0.0f;
#pragma unroll
                    for (int k = 0; k < CPT; k++) {
                        float input = 0.0f, step = 0.0f;
#pragma unroll
                        for (int i = 0; i < NPT; i++) {
                            g[k].v[i] += C.v[i] * dy.v[k];
                            dBC[i] += g[k].v[i] * in.v[k].b;
                            // The state after a token is the one before the next, unless a document begins there.
                            const float after = fresh_next ? decay[j][k][i] * before[j][k][i] + in.v[k].b * B.v[i]
                                                           : before[j + 1][k][i];
                            dBC[NPT + i] += after * dy.v[k];
                            input += g[k].v[i] * B.v[i];
                            g[k].v[i] *= decay[j][k][i];
                            const float through = g[k].v[i] * before[j][k][i];
                            step += through * rates[k].v[i];
                            dA[k].v[i] += through * in.v[k].a;
                        }
                        d_input[k][j - j0] = input;
                        d_step[k][j - j0] = step * LN2;
                    }
                    const int own = sum_lanes<2 * NPT, LANES, 32>(dBC, at.lane);
                    float* slot = here + ((threadIdx.x / 32) * SUB + j) * 2 * NP + at.q * NPT;
#pragma unroll
                    for (int v = 0; v < KEPT; v++) slot[own + v < NPT ? own + v : NP + own + v - NPT] = dBC[v];
                }
                Pairs found;
                int own = 0;
#pragma unroll
                for (int k = 0; k < CPT; k++) {
                    own = sum_lanes<TOGETHER, 1, LANES>(d_input[k], at.lane);
                    sum_lanes<TOGETHER, 1, LANES>(d_step[k], at.lane);
                    found.v[k] = Pair{d_input[k][0], d_step[k][0]};
                }
                *(Pairs*)(tile.pairs + (t0 + j0 + own) * PITCH + at.c) = found;  // read by all its lanes already
                if constexpr (GATED) *(Numbers*)(tile.ys + (t0 + j0 + own_y) * ROW + at.c) = ys[j0 / TOGETHER];
            }

            block_barrier();
#pragma unroll
            for (int m = 0; m < SUMS; m++) {
                const int i = threadIdx.x + m * THREADS, t = t0 + i / (2 * NP), state = i % NP;
                float sum = 0.0f;
                if ((SUB * 2 * NP) % THREADS != 0 && i >= SUB * 2 * NP) break;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += here[w * SUB * 2 * NP + i];
                if (t < valid && (WHOLE_N || state < p.n)) {
                    float* const to = sum_to[m] + (begin + t0) * by_token;
                    if (p.partial) *to = sum;
                    else add_to_global(to, sum);
                }
            }
        }
        block_barrier();

        const int64 where = (at.row * p.length + begin) * p.d + at.first;
        each_eight(whole, [&](Eight e, auto whole) {
            float x[8], dt[8], dy[8], z[8], y[8], dx[8], ddt[8], dz[8];
            Pair pairs[8];
            load8(x, e.in(x_raw));
            load8(dt, e.in(x_raw + TILE));
            load8(dy, e.in(x_raw + 2 * TILE));
            load_pairs(pairs, tile.pairs + e.t * PITCH + e.k);
            if constexpr (GATED) {
                load8(z, e.in(x_raw + 3 * TILE));
                load8(y, tile.ys + e.t * ROW + e.k);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool exists = whole.value || (e.t < valid && e.k + j < at.columns);
                const float skip = exists ? tile.skip[e.k + j] : 0.0f;
                const float raw_step = exists ? dt[j] + tile.bias[e.k + j] : 0.0f;
                const float input = exists ? x[j] : 0.0f;
                float gradient = dy[j];
                if constexpr (GATED) {
                    const float s = sigmoid(z[j]);
                    gradient *= z[j] * s;
                    dz[j] = dy[j] * (y[j] + skip * input) * s * (1.0f + z[j] * (1.0f - s));
                }
                dx[j] = step_size(raw_step) * pairs[j].a + skip * gradient;
                ddt[j] = pairs[j].b + input * pairs[j].a;
                if constexpr (SOFTPLUS) ddt[j] *= sigmoid(raw_step);
                pairs[j] = exists ? Pair{gradient * input, ddt[j]} : Pair{0.0f, 0.0f};
            }
            store_pairs(tile.pairs + e.t * PITCH + e.k, pairs);
            if (whole.value || (e.t < valid && e.k < at.columns)) {
                const int64 to = where + e.t * (int)p.d + e.k;
                write8(p.dx + to, dx, at.columns - e.k);
                write8(p.ddt + to, ddt, at.columns - e.k);
                if constexpr (GATED) write8(p.dz + to, dz, at.columns - e.k);
            }
        });
        block_barrier();
        for (int t = at.q; t < T; t += LANES) {
            const Pairs found = read_pairs(tile, at, t);
#pragma unroll
            for (int k = 0; k < CPT; k++) d_skip[k] += found.v[k].a, d_bias[k] += found.v[k].b;
        }
    }

    // Sums over all tokens of the segment.
    const int64 outer = at.row * p.segments + at.segment;
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        sum_lanes<1, 1, LANES>(&d_skip[k], at.lane);
        sum_lanes<1, 1, LANES>(&d_bias[k], at.lane);
        if (at.q == 0 && at.owns(k)) {
            p.dD[outer * p.d + at.first + at.c + k] = d_skip[k];
            p.ddt_bias[outer * p.d + at.first + at.c + k] = d_bias[k];
        }
    }
    store_states(p, at, p.dA, outer, dA);
    if (at.segment == 0) store_states(p, at, p.dinitial, at.row, g);
}
