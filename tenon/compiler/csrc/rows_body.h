// Row-wise maths, included once per storage type with SCALAR, LOAD, STORE, TO_F, FROM_F, NAME(x) defined.
// A row's bits depend on the row alone: sums run in one fixed order. A vector at a time, the rest one by one.

static inline float NAME(mean_square)(const float *x, int64_t n) {
    vf sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vf v = load_f(x + i);
        sum = muladd(v, v, sum);
    }
    float rest = 0;
    for (; i < n; i++) rest += x[i] * x[i];
    return (sum_v(sum) + rest) / (float)n;
}

// x *= factor * weight
static inline void NAME(scale)(float *x, float factor, const SCALAR *weight, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_f(x + i, load_f(x + i) * factor * LOAD(weight + i));
    for (; i < n; i++) x[i] = x[i] * factor * TO_F(weight[i]);
}

static inline void NAME(widen)(const SCALAR *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_f(out + i, LOAD(x + i));
    for (; i < n; i++) out[i] = TO_F(x[i]);
}

static inline void NAME(narrow)(const float *x, int64_t n, SCALAR *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) STORE(out + i, load_f(x + i));
    for (; i < n; i++) out[i] = FROM_F(x[i]);
}

// out = weight * x / rms(x), rows of n.
void NAME(tenon_norm)(const SCALAR *x, const SCALAR *weight, float eps, int64_t rows, int64_t n, SCALAR *out) {
#pragma omp parallel for schedule(static) if (rows * n > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        float buffer[n];
        NAME(widen)(x + r * n, n, buffer);
        NAME(scale)(buffer, 1.0f / sqrtf(NAME(mean_square)(buffer, n) + eps), weight, n);
        NAME(narrow)(buffer, n, out + r * n);
    }
}

// h += delta in place, out = norm(h).
void NAME(tenon_add_norm)(
    SCALAR *h, const SCALAR *delta, const SCALAR *weight, float eps, int64_t rows, int64_t n, SCALAR *out) {
#pragma omp parallel for schedule(static) if (rows * n > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        float buffer[n];
        SCALAR *hr = h + r * n;
        const SCALAR *dr = delta + r * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            STORE(hr + i, LOAD(hr + i) + LOAD(dr + i));
            store_f(buffer + i, LOAD(hr + i));
        }
        for (; i < n; i++) {
            hr[i] = FROM_F(TO_F(hr[i]) + TO_F(dr[i]));
            buffer[i] = TO_F(hr[i]);
        }
        NAME(scale)(buffer, 1.0f / sqrtf(NAME(mean_square)(buffer, n) + eps), weight, n);
        NAME(narrow)(buffer, n, out + r * n);
    }
}

// The fused projection [T, (H + 2G) D] into q, k, v; q and k normed where weights are given, and rotated.
void NAME(tenon_heads)(
    const SCALAR *qkv, const SCALAR *q_norm, const SCALAR *k_norm, float eps, const float *cosine, const float *sine,
    int64_t rows, int64_t H, int64_t G, int64_t D, SCALAR *q, SCALAR *k, SCALAR *v) {
    const int64_t N = (H + 2 * G) * D, half = D / 2;
#pragma omp parallel for schedule(static) if (rows * N > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cosine + r * half, *s = sine + r * half;
        float x[D];
        for (int64_t h = 0; h < H + G; h++) {
            SCALAR *dst = h < H ? q + (r * H + h) * D : k + (r * G + h - H) * D;
            const SCALAR *weight = h < H ? q_norm : k_norm;
            NAME(widen)(qkv + r * N + h * D, D, x);
            if (weight) NAME(scale)(x, 1.0f / sqrtf(NAME(mean_square)(x, D) + eps), weight, D);
            int64_t d = 0;
            for (; d + LANES <= half; d += LANES) {
                const vf a = load_f(x + d), b = load_f(x + d + half), cd = load_f(c + d), sd = load_f(s + d);
                STORE(dst + d, a * cd - b * sd);
                STORE(dst + d + half, b * cd + a * sd);
            }
            for (; d < half; d++) {
                dst[d] = FROM_F(x[d] * c[d] - x[d + half] * s[d]);
                dst[d + half] = FROM_F(x[d + half] * c[d] + x[d] * s[d]);
            }
        }
        memcpy(v + r * G * D, qkv + r * N + (H + G) * D, G * D * sizeof(SCALAR));
    }
}

// out = silu(gate) * up over rows of [gate | up], F each.
void NAME(tenon_swiglu)(const SCALAR *x, int64_t rows, int64_t F, SCALAR *out) {
#pragma omp parallel for schedule(static) if (rows * F > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const SCALAR *gate = x + 2 * r * F, *up = gate + F;
        SCALAR *dst = out + r * F;
        int64_t i = 0;
        for (; i + LANES <= F; i += LANES) {
            const vf g = LOAD(gate + i);
            STORE(dst + i, g / (exp_v(clamp88(-g)) + 1.0f) * LOAD(up + i));
        }
        for (; i < F; i++) {
            const float g = TO_F(gate[i]);
            dst[i] = FROM_F(g / (expf(-g) + 1.0f) * TO_F(up[i]));
        }
    }
}
