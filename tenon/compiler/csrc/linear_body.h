// y = x W^T + bias, included once per storage type with SCALAR, GROUP, DOT, LOAD, STORE, TO_F, FROM_F, NAME(x) defined.
//
// Packed weights are panels of 16 outputs, [ceil(N / 16)][K / GROUP][16][GROUP], zeros past N. A panel is read from
// memory once for all rows of x, in chunks of up to 14 rows whose sums stay in registers. Each output is one lane's sum
// over channels in order, whatever is computed beside it: a row's bits depend on the row alone.

// Adds the bias to R x P * 16 sums and stores the first n columns.
static __attribute__((noinline)) void NAME(finish)(
    const float *sum, int64_t stride, const SCALAR *bias, int64_t rows, int64_t N, int64_t n, SCALAR *y) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const v16 v = load_f(sum + r * stride + i);
            STORE(y + r * N + i, bias ? v + LOAD(bias + i) : v);
        }
        for (; i < n; i++) y[r * N + i] = FROM_F(sum[r * stride + i] + (bias ? TO_F(bias[i]) : 0.0f));
    }
}

// tile_R_P: R rows, packed as [K / GROUP][R][GROUP], against P panels.
#define WEIGHT_AT(p) wk + p * 16 * K
#define ROW_AT(r) x + r * GROUP
#define TILE(R, P)                                                                                         \
    static void NAME(tile_##R##_##P)(                                                                      \
        const SCALAR *x, const SCALAR *w, const SCALAR *bias, int64_t K, int64_t N, int64_t n, SCALAR *y) { \
        enum { STRIDE = 16 * P };                                                                          \
        EACH_##R(SUMS_##P) for (int64_t k = 0; k < K; k += GROUP, x += R * GROUP) {                        \
            const SCALAR *wk = w + k * 16;                                                                 \
            WEIGHTS_##P EACH_##R(ADDS_##P)                                                                 \
        }                                                                                                  \
        float flat[R * STRIDE] __attribute__((aligned(64)));                                               \
        EACH_##R(KEEP_##P) NAME(finish)(flat, STRIDE, bias, R, N, n < STRIDE ? n : STRIDE, y);             \
    }

TILE(1, 8) TILE(2, 8) TILE(3, 8)
TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2) TILE(7, 2)
TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2) TILE(13, 2) TILE(14, 2)
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(7, 1)
TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1) TILE(13, 1) TILE(14, 1)
#undef TILE
#undef WEIGHT_AT
#undef ROW_AT

typedef void (*NAME(tile))(const SCALAR *, const SCALAR *, const SCALAR *, int64_t, int64_t, int64_t, SCALAR *);
#define T(R, P) NAME(tile_##R##_##P)
static const NAME(tile) NAME(tiles)[4][14] = {
    {T(1, 1), T(2, 1), T(3, 1), T(4, 1), T(5, 1), T(6, 1), T(7, 1), T(8, 1), T(9, 1), T(10, 1), T(11, 1), T(12, 1),
     T(13, 1), T(14, 1)},
    {T(1, 2), T(2, 2), T(3, 2), T(4, 2), T(5, 2), T(6, 2), T(7, 2), T(8, 2), T(9, 2), T(10, 2), T(11, 2), T(12, 2),
     T(13, 2), T(14, 2)},
    {T(1, 4), T(2, 4), T(3, 4), T(4, 4), T(5, 4), T(6, 4)},
    {T(1, 8), T(2, 8), T(3, 8)},
};
#undef T

// Rows [R, K] side by side: [K / GROUP][R][GROUP].
static void NAME(pack_rows)(const SCALAR *x, int64_t R, int64_t K, SCALAR *out) {
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k += GROUP) memcpy(out + k * R + r * GROUP, x + r * K + k, GROUP * sizeof(SCALAR));
}

// Returns 0, or -1 when memory for scratch is not to be had.
int NAME(tenon_linear)(
    const SCALAR *x, const SCALAR *w, const SCALAR *bias, int64_t T, int64_t K, int64_t N, SCALAR *y) {
    const int64_t chunks = (T + 13) / 14, most = (T + chunks - 1) / chunks, panels = (N + 15) / 16;
    const int64_t block = (ROWS_BYTES / (most * K * (int64_t)sizeof(SCALAR)) + 1) * most;
    SCALAR *packed = T > 1 ? aligned_alloc(64, (T * K * sizeof(SCALAR) + 63) / 64 * 64) : (SCALAR *)x;
    if (!packed) return -1;
#pragma omp parallel if (T * K * N > PARALLEL)
    {
        if (T > 1) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < T; t += most) NAME(pack_rows)(x + t * K, T - t < most ? T - t : most, K, packed + t * K);
        }
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), end = panels * (me + 1) / team;
        for (int64_t t0 = 0, t1; t0 < T; t0 = t1) {
            t1 = T - t0 < block ? T : t0 + block;
            for (int64_t p = panels * me / team, log; p < end; p += 1 << log) {
                for (log = most <= 3 ? 3 : most <= 6 ? 2 : 1; 1 << log > end - p;) log--;
                for (int64_t t = t0; t < t1; t += most)
                    NAME(tiles)[log][(t1 - t < most ? t1 - t : most) - 1](
                        packed + t * K, w + p * 16 * K, bias ? bias + p * 16 : 0, K, N, N - p * 16, y + t * N + p * 16);
            }
        }
    }
    if (T > 1) free(packed);
    return 0;
}

// W [N, K] into panels.
void NAME(tenon_pack)(const SCALAR *w, int64_t N, int64_t K, SCALAR *out) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (N + 15) / 16; p++) {
        const int64_t n = N - p * 16 < 16 ? N - p * 16 : 16;
        SCALAR *to = out + p * 16 * K;
        if (n < 16) memset(to, 0, 16 * K * sizeof(SCALAR));
        for (int64_t i = 0; i < n; i++) {
            const SCALAR *from = w + (p * 16 + i) * K;
            for (int64_t k = 0; k < K; k += GROUP) memcpy(to + k * 16 + i * GROUP, from + k, GROUP * sizeof(SCALAR));
        }
    }
}
