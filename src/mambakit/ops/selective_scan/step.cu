// One token: the state is read, moved on and written back.

KERNEL(step, THREADS, 4) {
    const Place at(p);
    States rates[CPT], h[CPT];
    load_rates(rates, p, at);
    load_states(h, p, at, p.initial, at.row);
    const IO* B = at.at(p.B, p.B_b, 0, 0) + at.group * p.B_g;
    const IO* C = at.at(p.C, p.C_b, 0, 0) + at.group * p.C_g;
#pragma unroll
    for (int k = 0; k < CPT; k++) {
        const int c = at.owns(k) ? at.first + at.c + k : at.first;
        const float x = load(at.at(p.x, p.x_b, 0, 0)[c]);
        const float dt = step_size(load(at.at(p.dt, p.dt_b, 0, 0)[c]) + (p.dt_bias ? p.dt_bias[c] : 0.0f));
        float y[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < NPT; i++) {
            const int state = at.q * NPT + i;
            if (state >= p.n) continue;
            h[k].v[i] = exp2_fast(dt * rates[k].v[i]) * h[k].v[i] + dt * x * load(B[state]);
            y[0] += h[k].v[i] * load(C[state]);
        }
        sum_lanes<1, 1, LANES>(y, at.lane);
        if (at.owns(k) && at.q == 0) {
            if (p.D) y[0] += p.D[c] * x;
            if constexpr (GATED) {
                const float z = load(at.at(p.z, p.z_b, 0, 0)[c]);
                y[0] *= z * sigmoid(z);
            }
            store(p.y + at.row * p.d + c, y[0]);
        }
    }
    store_states(p, at, p.final, at.row, h);
}
