// The body of paged attention, included once per storage type with SCALAR, LOAD, STORE, TO_F, NAME(x) defined.
//
// Cache layout: K [G, block, D, B] (sixteen positions of one channel lie side by side: a dot product over channels
// needs no shuffles), V [G, block, B, D]; heads outermost, so that blocks allocated in a row are read in a row.
// Online softmax runs over tiles of 64 absolute positions from the first visible
// one upwards, in parts of 16: a row's bits depend neither on its neighbours nor on how the context was cut into chunks.
// Each K and V byte of a tile is read from memory once for all rows and heads of an item.

static void NAME(write_kv)(const attend_step *a, int64_t row, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, B = a->block_tokens, N = a->n_blocks;
    const int64_t block = a->slot[row] / B, off = a->slot[row] % B;
    for (int64_t g = 0; g < G; g++) {
        const SCALAR *ks = k + (row * G + g) * D, *vs = v + (row * G + g) * D;
        SCALAR *kd = kc + (g * N + block) * D * B + off;
        for (int64_t d = 0; d < D; d++) kd[d * B] = ks[d];
        memcpy(vc + ((g * N + block) * B + off) * D, vs, D * sizeof(SCALAR));
    }
}

// 16 positions as fp32: kf [D][16], vf [16][D]. Positions past `last` are left out of vf and are junk in kf.
static inline __attribute__((always_inline)) void NAME(load_part)(
    const attend_step *a, const int32_t *table, const int32_t *path, int64_t base, int64_t first, int64_t last,
    int64_t g, const SCALAR *kc, const SCALAR *vc, float *kf, float *vf, const int64_t D) {
    const int64_t N = a->n_blocks, B = a->block_tokens;
    const int64_t n = last - first + 1 < 16 ? last - first + 1 : 16;
    if (first + n - 1 <= base) {
        const int64_t block = table[first / B], off = first % B;
        const SCALAR *ks = kc + (g * N + block) * D * B + off;
        const SCALAR *vs = vc + ((g * N + block) * B + off) * D;
        for (int64_t d = 0; d < D; d++) store_f(kf + d * 16, LOAD(ks + d * B));
        for (int64_t i = 0; i < n * D; i += 16) store_f(vf + i, LOAD(vs + i));
        return;
    }
    memset(kf, 0, D * 16 * sizeof(float));
    for (int64_t j = 0; j < n; j++) {
        const int64_t p = first + j;
        const int64_t slot = p <= base ? table[p / B] * B + p % B : path[p - base - 1];
        const SCALAR *ks = kc + (g * N + slot / B) * D * B + slot % B;
        const SCALAR *vs = vc + ((g * N + slot / B) * B + slot % B) * D;
        for (int64_t d = 0; d < D; d++) kf[d * 16 + j] = TO_F(ks[d * B]);
        for (int64_t d = 0; d < D; d += 16) store_f(vf + j * D + d, LOAD(vs + d));
    }
}

// Asks memory for the K (or V) of the 16 positions that start `at`. Blocks lie scattered: the hardware's prefetcher
// cannot guess the next one, the block table knows it. One part at a time, or the queue of misses overflows.
static inline __attribute__((always_inline)) void NAME(prefetch)(
    const attend_step *a, const int32_t *table, int64_t at, int64_t base, int64_t g, const SCALAR *c, int k,
    const int64_t D) {
    const int64_t B = a->block_tokens;
    if (at > base) return;
    const SCALAR *head = c + (g * a->n_blocks + table[at / B]) * D * B;
    if (k && B > 16)
        for (int64_t d = 0; d < D; d++) __builtin_prefetch(head + d * B + at % B, 0, 2);
    else
        for (int64_t i = 0; i < 16 * D; i += 64 / sizeof(SCALAR)) __builtin_prefetch(head + at % B * (k ? 1 : D) + i, 0, 2);
}

// Scores of N <= 4 queries against 16 positions. Each query's sum runs over channels in order, whatever N is.
#define SCORES(N, K_OF_D)                                                        \
    do {                                                                         \
        v16 sum[N];                                                              \
        for (int i = 0; i < N; i++) sum[i] = splat(0);                           \
        for (int64_t d = 0; d < D; d++) {                                        \
            const v16 key = K_OF_D;                                              \
            for (int i = 0; i < N; i++) sum[i] += key * q0[i * D + d];           \
        }                                                                        \
        for (int i = 0; i < N; i++) store_f(dst + i * TILE, sum[i]);             \
    } while (0)

// Adds to N <= 4 queries' sums the values of n positions in order; V_OF_J(c) is sixteen channels of position j.
#define VALUES(N, V_OF_J)                                                        \
    do {                                                                         \
        for (int64_t d = 0; d < D; d += 32) {                                    \
            v16 x[N], y[N];                                                      \
            for (int i = 0; i < N; i++)                                          \
                x[i] = load_f(acc0 + i * D + d), y[i] = load_f(acc0 + i * D + d + 16); \
            for (int64_t j = 0; j < n; j++) {                                    \
                const v16 v0 = V_OF_J(0), v1 = V_OF_J(16);                       \
                for (int i = 0; i < N; i++)                                      \
                    x[i] += v0 * p0[i * TILE + j], y[i] += v1 * p0[i * TILE + j]; \
            }                                                                    \
            for (int i = 0; i < N; i++)                                          \
                store_f(acc0 + i * D + d, x[i]), store_f(acc0 + i * D + d + 16, y[i]); \
        }                                                                        \
    } while (0)
#define V_CACHE(c) LOAD(vs + j * D + d + c)
#define V_SCRATCH(c) load_f(vf + j * D + d + c)
#define BY_COUNT(n, MACRO, ...)                  \
    switch (n) {                                 \
    case 1: MACRO(1, __VA_ARGS__); break;        \
    case 2: MACRO(2, __VA_ARGS__); break;        \
    case 3: MACRO(3, __VA_ARGS__); break;        \
    default: MACRO(4, __VA_ARGS__);              \
    }

// Rows of one item against one K/V head. Scratch per thread: q, acc [Q][D], s [Q][TILE], m, l [Q], kf, vf [4][16 D].
static inline __attribute__((always_inline)) void NAME(item)(
    const attend_step *a, int64_t item, int64_t g, float scale, const SCALAR *q, const SCALAR *kc, const SCALAR *vc,
    SCALAR *out, float *scratch, const int64_t D) {
    const int64_t H = a->n_heads, N = a->n_blocks, B = a->block_tokens, rep = H / a->n_kv_heads;
    const int64_t r0 = a->item_row[item], n_rows = a->item_n[item], nq = n_rows * rep, Q = (nq + 3) / 4 * 4;
    const int32_t *table = a->table + a->item_table[item];
    float *qf = scratch, *acc = qf + Q * D, *s = acc + Q * D, *m = s + Q * TILE, *l = m + Q;
    float *kparts = l + Q, *vparts = kparts + TILE * D;

    int64_t base = a->base[r0], last = a->pos[r0], first = last;
    int32_t path[MAX_DEPTH];
    if (a->parent[r0] >= 0)
        for (int64_t row = r0; a->parent[row] >= 0; row = a->parent[row]) path[a->pos[row] - base - 1] = a->slot[row];
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t p = a->pos[r0 + i];
        if (p > last) last = p;
        if (p < first) first = p;
    }
    if (a->parent[r0] < 0) base = last;
    first = a->window && first >= a->window ? first - a->window + 1 : 0;

    memset(qf, 0, Q * D * sizeof(float));
    memset(acc, 0, Q * D * sizeof(float));
    memset(s, 0, Q * TILE * sizeof(float));
    for (int64_t i = 0; i < Q; i++) m[i] = -INFINITY, l[i] = 0;
    for (int64_t i = 0; i < nq; i++) {
        const SCALAR *src = q + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        for (int64_t d = 0; d < D; d += 16) store_f(qf + i * D + d, LOAD(src + d) * scale);
    }

    for (int64_t t = first / TILE * TILE; t <= last; t += TILE) {
        const int64_t parts = (last - t) / 16 + 1 < TILE / 16 ? (last - t) / 16 + 1 : TILE / 16;
        const int64_t skip = first > t ? (first - t) / 16 : 0;
        // Few queries read the cache directly; many share one conversion. The arithmetic is the same.
        const int direct = Q == 4 && t + parts * 16 - 1 <= base;
        for (int64_t c = skip; c < parts; c++) {
            const int64_t at = t + c * 16;
            NAME(prefetch)(a, table, at + TILE, base, g, kc, 1, D);
            if (direct) {
                const SCALAR *ks = kc + (g * N + table[at / B]) * D * B + at % B;
                const float *q0 = qf;
                float *dst = s + c * 16;
                BY_COUNT(nq, SCORES, LOAD(ks + d * B))
                continue;
            }
            float *kf = kparts + c * 16 * D;
            NAME(load_part)(a, table, path, base, at, last, g, kc, vc, kf, vparts + c * 16 * D, D);
            for (int64_t i = 0; i < Q; i += 4) {
                const float *q0 = qf + i * D;
                float *dst = s + i * TILE + c * 16;
                SCORES(4, load_f(kf + d * 16));
            }
        }
        for (int64_t i = 0; i < nq; i++) {
            const int64_t p = a->pos[r0 + i / rep];
            const int64_t low = a->window && p - a->window + 1 > t ? p - a->window + 1 - t : 0, high = p - t;
            v16 x[TILE / 16], top = splat(-INFINITY);
            for (int64_t c = skip; c < parts; c++) {
                x[c] = load_f(s + i * TILE + c * 16);
                if (low > c * 16 || high < c * 16 + 15) {
                    const i16x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                    const int64_t from = low - c * 16, to = high - c * 16;
                    const int32_t lo = from > 16 ? 16 : (int32_t)from, hi = to < -1 ? -1 : to > 16 ? 16 : (int32_t)to;
                    x[c] = select16((lane >= lo) & (lane <= hi), x[c], splat(-INFINITY));
                }
                top = max_v(x[c], top);
            }
            const float best = max16(top);
            if (best == -INFINITY) {
                memset(s + i * TILE, 0, TILE * sizeof(float));
                continue;
            }
            if (best > m[i]) {
                const float shrink = m[i] == -INFINITY ? 0.0f : expf(m[i] - best);
                for (int64_t d = 0; d < D; d += 16) store_f(acc + i * D + d, load_f(acc + i * D + d) * shrink);
                l[i] *= shrink;
                m[i] = best;
            }
            v16 sum = {};
            for (int64_t c = skip; c < parts; c++) {
                x[c] = exp16(x[c] - m[i]);
                sum += x[c];
                store_f(s + i * TILE + c * 16, x[c]);
            }
            l[i] += sum16(sum);
        }
        for (int64_t c = skip; c < parts; c++) {
            const int64_t at = t + c * 16, n = last - at + 1 < 16 ? last - at + 1 : 16;
            NAME(prefetch)(a, table, at + TILE, base, g, vc, 0, D);
            if (direct) {
                const SCALAR *vs = vc + ((g * N + table[at / B]) * B + at % B) * D;
                const float *p0 = s + c * 16;
                float *acc0 = acc;
                BY_COUNT(nq, VALUES, V_CACHE)
                continue;
            }
            const float *vf = vparts + c * 16 * D;
            for (int64_t i = 0; i < Q; i += 4) {
                const float *p0 = s + i * TILE + c * 16;
                float *acc0 = acc + i * D;
                VALUES(4, V_SCRATCH);
            }
        }
    }
    for (int64_t i = 0; i < nq; i++) {
        SCALAR *dst = out + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        const float inverse = 1.0f / l[i];
        for (int64_t d = 0; d < D; d += 16) STORE(dst + d, load_f(acc + i * D + d) * inverse);
    }
}
#undef SCORES
#undef BY_COUNT
#undef VALUES
#undef V_CACHE
#undef V_SCRATCH

// Writes the step's K and V into the cache, then attends. Returns 0, or -1 when memory for scratch is not to be had.
int NAME(tenon_attend)(
    const attend_step *a, float scale, const SCALAR *q, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc,
    SCALAR *out) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, rep = a->n_heads / G;
    int64_t rows = 1;
    for (int64_t i = 0; i < a->n_items; i++)
        if (a->item_n[i] > rows) rows = a->item_n[i];
    const int64_t Q = (rows * rep + 3) / 4 * 4;
    const size_t bytes = (2 * Q * D + Q * (TILE + 2) + 2 * TILE * D) * sizeof(float);
    int failed = 0;
#pragma omp parallel
    {
        float *scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->n_rows; row++) NAME(write_kv)(a, row, k, v, kc, vc);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->n_items * G; i++) {
            if (!scratch) continue;
            const int64_t item = i / G, g = i % G;
            switch (D) {
            case 32: NAME(item)(a, item, g, scale, q, kc, vc, out, scratch, 32); break;
            case 64: NAME(item)(a, item, g, scale, q, kc, vc, out, scratch, 64); break;
            case 128: NAME(item)(a, item, g, scale, q, kc, vc, out, scratch, 128); break;
            default: NAME(item)(a, item, g, scale, q, kc, vc, out, scratch, D);
            }
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}
