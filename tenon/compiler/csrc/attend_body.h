// The body of paged attention, included once per storage type with SCALAR, LOAD, STORE1, NAME(x) defined.
//
// Cache layout: K [block, G, D, B] (sixteen positions of one channel lie side by side: a dot product over channels
// needs no shuffles), V [block, G, B, D]. Online softmax runs over tiles of 16 absolute positions from the first visible
// one upwards: a row's bits depend neither on its neighbours nor on how the context was cut into chunks.
// Each K and V byte of a tile is read once for all rows and heads of an item.

static void NAME(write_kv)(const attend_step *a, int64_t row, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, B = a->block_tokens;
    const int64_t block = a->slot[row] / B, off = a->slot[row] % B;
    for (int64_t g = 0; g < G; g++) {
        const SCALAR *ks = k + (row * G + g) * D, *vs = v + (row * G + g) * D;
        SCALAR *kd = kc + (block * G + g) * D * B + off;
        for (int64_t d = 0; d < D; d++) kd[d * B] = ks[d];
        memcpy(vc + ((block * G + g) * B + off) * D, vs, D * sizeof(SCALAR));
    }
}

// One tile of 16 positions as fp32: kf [D][16], vf [16][D]. Positions past `last` are left out of vf and are junk in kf.
static inline __attribute__((always_inline)) void NAME(load_tile)(
    const attend_step *a, const int32_t *table, const int32_t *path, int64_t base, int64_t first, int64_t last,
    int64_t g, const SCALAR *kc, const SCALAR *vc, float *kf, float *vf, const int64_t D) {
    const int64_t G = a->n_kv_heads, B = a->block_tokens;
    const int64_t n = last - first + 1 < 16 ? last - first + 1 : 16;
    if (first + n - 1 <= base) {
        const int64_t block = table[first / B], off = first % B;
        const SCALAR *ks = kc + (block * G + g) * D * B + off;
        const SCALAR *vs = vc + ((block * G + g) * B + off) * D;
        for (int64_t d = 0; d < D; d++) store_f(kf + d * 16, LOAD(ks + d * B));
        for (int64_t i = 0; i < n * D; i += 16) store_f(vf + i, LOAD(vs + i));
        return;
    }
    memset(kf, 0, D * 16 * sizeof(float));
    for (int64_t j = 0; j < n; j++) {
        const int64_t p = first + j;
        const int64_t slot = p <= base ? table[p / B] * B + p % B : path[p - base - 1];
        const SCALAR *ks = kc + ((slot / B) * G + g) * D * B + slot % B;
        const SCALAR *vs = vc + (((slot / B) * G + g) * B + slot % B) * D;
        for (int64_t d = 0; d < D; d++) kf[d * 16 + j] = TO_F(ks[d * B]);
        for (int64_t d = 0; d < D; d += 16) store_f(vf + j * D + d, LOAD(vs + d));
    }
}

// Rows of one item against one K/V head. Scratch per thread: q, acc [Q][D], s [Q][16], m, l [Q], kf, vf.
static inline __attribute__((always_inline)) void NAME(item)(
    const attend_step *a, int64_t item, int64_t g, float scale, const SCALAR *q, const SCALAR *kc, const SCALAR *vc,
    SCALAR *out, float *scratch, const int64_t D) {
    const int64_t H = a->n_heads, rep = H / a->n_kv_heads;
    const int64_t r0 = a->item_row[item], n_rows = a->item_n[item], nq = n_rows * rep, Q = (nq + 3) / 4 * 4;
    const int32_t *table = a->table + a->item_table[item];
    float *qf = scratch, *acc = qf + Q * D, *s = acc + Q * D, *m = s + Q * 16, *l = m + Q;
    float *kf = l + Q, *vf = kf + D * 16;

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
    for (int64_t i = 0; i < Q; i++) m[i] = -INFINITY, l[i] = 0;
    for (int64_t i = 0; i < nq; i++) {
        const SCALAR *src = q + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        for (int64_t d = 0; d < D; d += 16) store_f(qf + i * D + d, LOAD(src + d) * scale);
    }

    for (int64_t t = first / 16 * 16; t <= last; t += 16) {
        NAME(load_tile)(a, table, path, base, t, last, g, kc, vc, kf, vf, D);
        const int64_t n = last - t + 1 < 16 ? last - t + 1 : 16;
        for (int64_t i = 0; i < Q; i += 4) {
            v16 s0 = {}, s1 = {}, s2 = {}, s3 = {};
            const float *q0 = qf + i * D, *q1 = q0 + D, *q2 = q1 + D, *q3 = q2 + D;
            for (int64_t d = 0; d < D; d++) {
                const v16 k = load_f(kf + d * 16);
                s0 += k * q0[d];
                s1 += k * q1[d];
                s2 += k * q2[d];
                s3 += k * q3[d];
            }
            store_f(s + i * 16, s0);
            store_f(s + i * 16 + 16, s1);
            store_f(s + i * 16 + 32, s2);
            store_f(s + i * 16 + 48, s3);
        }
        for (int64_t i = 0; i < nq; i++) {
            const int64_t p = a->pos[r0 + i / rep];
            const int64_t low = a->window && p - a->window + 1 > t ? p - a->window + 1 - t : 0;
            const int64_t high = p - t;
            v16 x = load_f(s + i * 16);
            if (low > 0 || high < 15) {
                const i16x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                const int32_t lo = low > 16 ? 16 : (int32_t)low, hi = high < -1 ? -1 : (int32_t)high;
                x = select16((lane >= lo) & (lane <= hi), x, splat(-INFINITY));
            }
            const float best = max16(x);
            if (best == -INFINITY) {
                store_f(s + i * 16, (v16){});
                continue;
            }
            if (best > m[i]) {
                const float shrink = m[i] == -INFINITY ? 0.0f : expf(m[i] - best);
                for (int64_t d = 0; d < D; d += 16) store_f(acc + i * D + d, load_f(acc + i * D + d) * shrink);
                l[i] *= shrink;
                m[i] = best;
            }
            x = exp16(x - m[i]);
            l[i] += sum16(x);
            store_f(s + i * 16, x);
        }
        for (int64_t i = 0; i < Q; i += 4) {
            const float *p0 = s + i * 16, *p1 = p0 + 16, *p2 = p1 + 16, *p3 = p2 + 16;
            float *a0 = acc + i * D;
            for (int64_t d = 0; d < D; d += 32) {
                v16 x00 = load_f(a0 + d), x01 = load_f(a0 + d + 16);
                v16 x10 = load_f(a0 + D + d), x11 = load_f(a0 + D + d + 16);
                v16 x20 = load_f(a0 + 2 * D + d), x21 = load_f(a0 + 2 * D + d + 16);
                v16 x30 = load_f(a0 + 3 * D + d), x31 = load_f(a0 + 3 * D + d + 16);
                for (int64_t j = 0; j < n; j++) {
                    const v16 v0 = load_f(vf + j * D + d), v1 = load_f(vf + j * D + d + 16);
                    x00 += v0 * p0[j], x01 += v1 * p0[j];
                    x10 += v0 * p1[j], x11 += v1 * p1[j];
                    x20 += v0 * p2[j], x21 += v1 * p2[j];
                    x30 += v0 * p3[j], x31 += v1 * p3[j];
                }
                store_f(a0 + d, x00), store_f(a0 + d + 16, x01);
                store_f(a0 + D + d, x10), store_f(a0 + D + d + 16, x11);
                store_f(a0 + 2 * D + d, x20), store_f(a0 + 2 * D + d + 16, x21);
                store_f(a0 + 3 * D + d, x30), store_f(a0 + 3 * D + d + 16, x31);
            }
        }
    }
    for (int64_t i = 0; i < nq; i++) {
        SCALAR *dst = out + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        const float inverse = 1.0f / l[i];
        for (int64_t d = 0; d < D; d += 16) STORE(dst + d, load_f(acc + i * D + d) * inverse);
    }
}

// Writes the step's K and V into the cache, then attends. Returns 0, or -1 when memory for scratch is not to be had.
int NAME(tenon_attend)(
    const attend_step *a, float scale, const SCALAR *q, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc,
    SCALAR *out) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, rep = a->n_heads / G;
    int64_t rows = 1;
    for (int64_t i = 0; i < a->n_items; i++)
        if (a->item_n[i] > rows) rows = a->item_n[i];
    const int64_t Q = (rows * rep + 3) / 4 * 4;
    const size_t bytes = (2 * Q * D + Q * 18 + 32 * D) * sizeof(float);
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

// Only the first half of the above: the backend attends by other means.
void NAME(tenon_write)(const attend_step *a, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < a->n_rows; row++) NAME(write_kv)(a, row, k, v, kc, vc);
}

// Positions [0, n) of one sequence, from the cache into contiguous k, v [G, n, D].
void NAME(tenon_gather)(
    const attend_step *a, const int32_t *table, int64_t from, int64_t n, const SCALAR *kc, const SCALAR *vc, SCALAR *k,
    SCALAR *v) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, B = a->block_tokens;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t g = 0; g < G; g++)
        for (int64_t i = from / B; i < (from + n + B - 1) / B; i++) {
            const int64_t lo = i * B < from ? from - i * B : 0, hi = (i + 1) * B > from + n ? from + n - i * B : B;
            const SCALAR *ks = kc + (table[i] * G + g) * D * B, *vs = vc + (table[i] * G + g) * B * D;
            for (int64_t j = lo; j < hi; j++) {
                SCALAR *kd = k + (g * n + i * B + j - from) * D;
                for (int64_t d = 0; d < D; d++) kd[d] = ks[d * B + j];
                memcpy(v + (g * n + i * B + j - from) * D, vs + j * D, D * sizeof(SCALAR));
            }
        }
}
