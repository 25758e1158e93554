// Included once per storage type with SCALAR, LOAD, TO_F, NAME(x) defined.

// The best id of each row, the smaller of equals; -1 where no value is finite or one is NaN.
void NAME(tenon_argmax)(const SCALAR *x, int64_t rows, int64_t n, int64_t *out) {
#pragma omp parallel for schedule(static) if (rows * n > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const SCALAR *row = x + r * n;
        vf top = splat(-INFINITY);
        vi nan = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            const vf v = LOAD(row + i);
            top = max_v(v, top);
            nan |= v != v;
        }
        float best = max_lanes(top);
        int bad = 0;
        for (int k = 0; k < LANES; k++) bad |= nan[k];
        for (; i < n; i++) {
            const float v = TO_F(row[i]);
            if (v > best) best = v;
            bad |= v != v;
        }
        out[r] = -1;
        if (bad || !isfinite(best)) continue;
        for (i = 0; i < n; i++)
            if (TO_F(row[i]) == best) {
                out[r] = i;
                break;
            }
    }
}
