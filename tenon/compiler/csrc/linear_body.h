// y = x W^T + bias, included once per storage type with SCALAR, ROW, GROUP, DOT, TAKE, LOAD, STORE, TO_F, FROM_F,
// TO_ROW, NAME(x) defined; ROW is the type that a row of x has where it meets weights.
//
// Packed weights are panels of LANES outputs, [ceil(N / LANES)][K / GROUP][LANES][GROUP], zeros past N. A panel is read
// from memory once for all rows of x, in chunks of up to MOST_ROWS whose sums stay in registers. Each output is one
// lane's sum over channels in order, whatever is computed beside it: a row's bits depend on the row alone.

// Adds the bias to R x P * LANES sums and stores the first n columns.
static __attribute__((noinline)) void NAME(finish)(
    const float *sum, int64_t stride, const SCALAR *bias, int64_t rows, int64_t N, int64_t n, SCALAR *y) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            const vf v = load_f(sum + r * stride + i);
            STORE(y + r * N + i, bias ? v + LOAD(bias + i) : v);
        }
        for (; i < n; i++) y[r * N + i] = FROM_F(sum[r * stride + i] + (bias ? TO_F(bias[i]) : 0.0f));
    }
}

// tile_R_P: R rows, packed as [K / GROUP][R][GROUP], against P panels.
#define WEIGHT_AT(p) wk + p * LANES * K
#define ROW_AT(r) x + r * GROUP
#define TILE(R, P)                                                                                      \
    static void NAME(tile_##R##_##P)(                                                                   \
        const ROW *x, const SCALAR *w, const SCALAR *bias, int64_t K, int64_t N, int64_t n, SCALAR *y) { \
        enum { STRIDE = LANES * P };                                                                    \
        EACH_##R(SUMS_##P) for (int64_t k = 0; k < K; k += GROUP, x += R * GROUP) {                     \
            const SCALAR *wk = w + k * LANES;                                                           \
            WEIGHTS_##P EACH_##R(ADDS_##P)                                                              \
        }                                                                                               \
        float flat[R * STRIDE] __attribute__((aligned(64)));                                            \
        EACH_##R(KEEP_##P) NAME(finish)(flat, STRIDE, bias, R, N, n < STRIDE ? n : STRIDE, y);          \
    }

TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
TILE(1, 4) TILE(2, 4) TILE(3, 4)
TILE(1, 8)
#if !FEW_REGISTERS
TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1) TILE(13, 1) TILE(14, 1)
TILE(7, 2) TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2) TILE(13, 2) TILE(14, 2)
TILE(4, 4) TILE(5, 4) TILE(6, 4)
TILE(2, 8) TILE(3, 8)
#endif
#undef TILE
#undef WEIGHT_AT
#undef ROW_AT

typedef void (*NAME(tile))(const ROW *, const SCALAR *, const SCALAR *, int64_t, int64_t, int64_t, SCALAR *);
#define T(R, P) NAME(tile_##R##_##P)
static const NAME(tile) NAME(tiles)[4][MOST_ROWS] = {
#if FEW_REGISTERS
    {T(1, 1), T(2, 1), T(3, 1), T(4, 1), T(5, 1), T(6, 1)},
    {T(1, 2), T(2, 2), T(3, 2), T(4, 2), T(5, 2), T(6, 2)},
    {T(1, 4), T(2, 4), T(3, 4)},
    {T(1, 8)},
#else
    {T(1, 1), T(2, 1), T(3, 1), T(4, 1), T(5, 1), T(6, 1), T(7, 1), T(8, 1), T(9, 1), T(10, 1), T(11, 1), T(12, 1),
     T(13, 1), T(14, 1)},
    {T(1, 2), T(2, 2), T(3, 2), T(4, 2), T(5, 2), T(6, 2), T(7, 2), T(8, 2), T(9, 2), T(10, 2), T(11, 2), T(12, 2),
     T(13, 2), T(14, 2)},
    {T(1, 4), T(2, 4), T(3, 4), T(4, 4), T(5, 4), T(6, 4)},
    {T(1, 8), T(2, 8), T(3, 8)},
#endif
};
#undef T

// Rows [R, K] side by side: [K / GROUP][R][GROUP].
static void NAME(pack_rows)(const SCALAR *x, int64_t R, int64_t K, ROW *out) {
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k += GROUP)
            for (int64_t i = 0; i < GROUP; i++) out[k * R + r * GROUP + i] = TO_ROW(x[r * K + k + i]);
}

// Returns 0, or -1 when memory for scratch is not to be had.
int NAME(tenon_linear)(
    const SCALAR *x, const SCALAR *w, const SCALAR *bias, int64_t T, int64_t K, int64_t N, SCALAR *y) {
    const int64_t chunks = (T + MOST_ROWS - 1) / MOST_ROWS, most = (T + chunks - 1) / chunks;
    const int64_t panels = (N + LANES - 1) / LANES;
    const int64_t block = (ROWS_BYTES / (most * K * (int64_t)sizeof(ROW)) + 1) * most;
    const int as_is = T == 1 && sizeof(ROW) == sizeof(SCALAR);
    ROW *packed = as_is ? (ROW *)x : aligned_alloc(64, (T * K * sizeof(ROW) + 63) / 64 * 64);
    if (!packed) return -1;
#pragma omp parallel if (T * K * N > PARALLEL)
    {
        if (!as_is) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < T; t += most) NAME(pack_rows)(x + t * K, T - t < most ? T - t : most, K, packed + t * K);
        }
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), end = panels * (me + 1) / team;
        for (int64_t t0 = 0, t1; t0 < T; t0 = t1) {
            t1 = T - t0 < block ? T : t0 + block;
            for (int64_t p = panels * me / team, log; p < end; p += 1 << log) {
                for (log = LOG_PANELS(most); 1 << log > end - p;) log--;
                for (int64_t t = t0; t < t1; t += most)
                    NAME(tiles)[log][(t1 - t < most ? t1 - t : most) - 1](
                        packed + t * K, w + p * LANES * K, bias ? bias + p * LANES : 0, K, N, N - p * LANES,
                        y + t * N + p * LANES);
            }
        }
    }
    if (!as_is) free(packed);
    return 0;
}

// W [N, K] into panels.
void NAME(tenon_pack)(const SCALAR *w, int64_t N, int64_t K, SCALAR *out) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (N + LANES - 1) / LANES; p++) {
        const int64_t n = N - p * LANES < LANES ? N - p * LANES : LANES;
        SCALAR *to = out + p * LANES * K;
        if (n < LANES) memset(to, 0, LANES * K * sizeof(SCALAR));
        for (int64_t i = 0; i < n; i++) {
            const SCALAR *from = w + (p * LANES + i) * K;
            for (int64_t k = 0; k < K; k += GROUP)
                memcpy(to + k * LANES + i * GROUP, from + k, GROUP * sizeof(SCALAR));
        }
    }
}
