// Included once per storage type with SCALAR, LOAD, TO_F, NAME(x) defined.

// The best id of each row, the smaller of equals; -1 where no value is finite or one is NaN.
void NAME(tenon_argmax)(const SCALAR *x, int64_t rows, int64_t n, int64_t *out) {
#pragma omp parallel for schedule(static) if (rows * n > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const SCALAR *row = x + r * n;
        v16 top = splat(-INFINITY);
        i16x nan = {};
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const v16 v = LOAD(row + i);
            top = max_v(v, top);
            nan |= v != v;
        }
        float best = max16(top);
        int bad = 0;
        for (int k = 0; k < 16; k++) bad |= nan[k];
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
