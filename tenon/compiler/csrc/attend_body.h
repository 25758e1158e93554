// The body of paged attention, included once per storage type with SCALAR, ROW, GROUP, DOT, TAKE, STORE, LOAD_ROW,
// STORE_ROW, TO_ROW, TO_F, NAME(x) defined; ROW is the type in which queries and probabilities meet keys and values.
//
// Cache layout: K [G, block, D / GROUP, B, GROUP] (positions of a channel, or of a pair of them, lie side by side: a
// dot product over channels needs no shuffles), V [G, block, B / GROUP, D, GROUP]; heads outermost, so that blocks
// allocated in a row are read in a row. Probabilities are rounded to ROW, and summed as rounded. Online softmax runs
// over tiles of 64 absolute positions from the first visible one upwards, in parts of LANES: a row's bits depend
// neither on its neighbours nor on how the context was cut into chunks.
// Each K and V byte of a tile is read from memory once for all rows and heads of an item.

static void NAME(write_kv)(const attend_step *a, int64_t row, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc) {
    const int64_t G = a->n_kv_heads, D = a->head_dim, B = a->block_tokens, N = a->n_blocks;
    const int64_t block = a->slot[row] / B, off = a->slot[row] % B;
    for (int64_t g = 0; g < G; g++) {
        const SCALAR *ks = k + (row * G + g) * D, *vs = v + (row * G + g) * D;
        SCALAR *kd = kc + (g * N + block) * D * B + off * GROUP;
        for (int64_t d = 0; d < D; d += GROUP) memcpy(kd + d * B, ks + d, GROUP * sizeof(SCALAR));
        SCALAR *vd = vc + ((g * N + block) * B + off / GROUP * GROUP) * D + off % GROUP;
        for (int64_t d = 0; d < D; d++) vd[d * GROUP] = vs[d];
    }
}

// Where K and V of LANES positions from `first` lie: in one block, or gathered into ks [D / GROUP][LANES][GROUP] and
// vs [LANES / GROUP][D][GROUP] where some are a tree's or blocks are smaller than that; what is multiplied and summed in
// which order is the same. K's channels are `stride` positions apart. The next tile's are asked for while this one's are
// multiplied, line by line: blocks lie scattered, so the hardware's prefetcher cannot guess the next one, and asking for
// many lines at once stalls the core until they are there.
typedef struct {
    const SCALAR *k, *v, *next_k, *next_v;
    int64_t stride;
} NAME(part);

static NAME(part) NAME(find_part)(
    const attend_step *a, const int32_t *table, const int32_t *path, int64_t base, int64_t first, int64_t last,
    int64_t g, const SCALAR *kc, const SCALAR *vc, SCALAR *ks, SCALAR *vs) {
    const int64_t N = a->n_blocks, B = a->block_tokens, D = a->head_dim;
    const int64_t n = last - first + 1 < LANES ? last - first + 1 : LANES;
    if (first + n - 1 <= base && B >= LANES) {
        const int64_t next = first + TILE <= base ? first + TILE : first;
        const int64_t block = g * N + table[first / B], off = first % B;
        const int64_t next_block = g * N + table[next / B], next_off = next % B;
        return (NAME(part)){
            kc + block * D * B + off * GROUP, vc + (block * B + off) * D, kc + next_block * D * B + next_off * GROUP,
            vc + (next_block * B + next_off) * D, B};
    }
    memset(ks, 0, D * LANES * sizeof(SCALAR));
    memset(vs, 0, D * LANES * sizeof(SCALAR));
    for (int64_t j = 0; j < n; j++) {
        const int64_t p = first + j;
        const int64_t slot = p <= base ? table[p / B] * B + p % B : path[p - base - 1];
        const int64_t block = g * N + slot / B, off = slot % B;
        const SCALAR *from = kc + block * D * B + off * GROUP;
        for (int64_t d = 0; d < D; d += GROUP) memcpy(ks + d * LANES + j * GROUP, from + d * B, GROUP * sizeof(SCALAR));
        from = vc + (block * B + off / GROUP * GROUP) * D + off % GROUP;
        for (int64_t d = 0; d < D; d++) vs[(j / GROUP * D + d) * GROUP + j % GROUP] = from[d * GROUP];
    }
    return (NAME(part)){ks, vs, ks, vs, LANES};
}

// scores_N_P: scores of N queries against P parts. Each sum runs over channels in order, whatever else is
// computed beside it.
#define STRIDE TILE
#define WEIGHT_AT(p) k##p + d * stride##p
#define NEXT_AT(p) next##p + d * stride##p
#define ROW_AT(r) q + r * D + d
#define SCORES(N, P)                                                                                          \
    static void NAME(scores_##N##_##P)(const ROW *q, const NAME(part) *parts, float *flat, int64_t D) {       \
        KEYS_##P EACH_##N(SUMS_##P) for (int64_t d = 0; d < D; d += GROUP) {                                  \
            ASKS_##P WEIGHTS_##P EACH_##N(ADDS_##P)                                                           \
        }                                                                                                     \
        EACH_##N(KEEP_##P)                                                                                    \
    }
SCORES(1, 1) SCORES(2, 1) SCORES(3, 1) SCORES(4, 1) SCORES(1, 2) SCORES(2, 2) SCORES(3, 2) SCORES(4, 2)
SCORES(1, 4) SCORES(2, 4) SCORES(3, 4) SCORES(4, 4)
#undef SCORES
#undef STRIDE
#undef WEIGHT_AT
#undef NEXT_AT
#undef ROW_AT

// values_N_P: adds to N queries' sums of LANES P channels the values of positions in order, weighted by probabilities.
// The last part holds `n` positions.
#define STRIDE D
#define WEIGHT_AT(p) v + j * D + p * LANES * GROUP
#define NEXT_AT(p) next + j * D + p * LANES * GROUP
#define ROW_AT(r) row + r * TILE + j
#define VALUES(N, P)                                                                                               \
    static void NAME(values_##N##_##P)(                                                                            \
        float *flat, const ROW *prob, const NAME(part) *parts, int64_t first, int64_t end, int64_t n, int64_t at, \
        int64_t D) {                                                                                               \
        flat += at;                                                                                                \
        EACH_##N(RESUME_##P) for (int64_t c = first; c < end; c++) {                                               \
            const SCALAR *v = parts[c].v + at * GROUP, *next = parts[c].next_v + at * GROUP;                       \
            const ROW *row = prob + c * LANES;                                                                     \
            const int64_t m = c == end - 1 ? n : LANES;                                                            \
            int64_t j = 0;                                                                                         \
            for (; j + GROUP <= m; j += GROUP) { ASKS_##P WEIGHTS_##P EACH_##N(ADDS_##P) }                         \
            if (j < m) { HALVES_##P EACH_##N(ADDS_##P) }                                                           \
        }                                                                                                          \
        EACH_##N(KEEP_##P)                                                                                         \
    }
VALUES(1, 2) VALUES(2, 2) VALUES(3, 2) VALUES(4, 2) VALUES(1, 4) VALUES(2, 4) VALUES(3, 4) VALUES(4, 4)
#undef VALUES
#undef STRIDE
#undef WEIGHT_AT
#undef NEXT_AT
#undef ROW_AT

static void NAME(scores)(
    int64_t N, const ROW *q, const NAME(part) *parts, int64_t first, int64_t end, float *s, int64_t D) {
    typedef void scores(const ROW *, const NAME(part) *, float *, int64_t);
    static scores *const all[3][4] = {
        {NAME(scores_1_1), NAME(scores_2_1), NAME(scores_3_1), NAME(scores_4_1)},
        {NAME(scores_1_2), NAME(scores_2_2), NAME(scores_3_2), NAME(scores_4_2)},
        {NAME(scores_1_4), NAME(scores_2_4), NAME(scores_3_4), NAME(scores_4_4)},
    };
    const int wide = LOG_WIDE(N);
    int64_t c = first;
    for (; c + (1 << wide) <= end; c += 1 << wide) all[wide][N - 1](q, parts + c, s + c * LANES, D);
    for (; c < end; c++) all[0][N - 1](q, parts + c, s + c * LANES, D);
}

static void NAME(values)(
    int64_t N, float *acc, const ROW *prob, const NAME(part) *parts, int64_t first, int64_t end, int64_t n, int64_t D) {
    typedef void values(float *, const ROW *, const NAME(part) *, int64_t, int64_t, int64_t, int64_t, int64_t);
    static values *const two[4] = {NAME(values_1_2), NAME(values_2_2), NAME(values_3_2), NAME(values_4_2)};
    static values *const four[4] = {NAME(values_1_4), NAME(values_2_4), NAME(values_3_4), NAME(values_4_4)};
    int64_t d = 0;
    if (LOG_WIDE(N) == 2)
        for (; d + 4 * LANES <= D; d += 4 * LANES) four[N - 1](acc, prob, parts, first, end, n, d, D);
    for (; d < D; d += 2 * LANES) two[N - 1](acc, prob, parts, first, end, n, d, D);
}

// Rows of one item against one K/V head. Scratch per thread: acc [Q][D], s [Q][TILE], m, l [Q] in fp32; q [Q][D] and
// probabilities [Q][TILE] as ROW; K and V of a tile's gathered parts as stored.
static void NAME(item)(
    const attend_step *a, int64_t item, int64_t g, float scale, const SCALAR *q, const SCALAR *kc, const SCALAR *vc,
    SCALAR *out, float *scratch) {
    const int64_t H = a->n_heads, D = a->head_dim, rep = H / a->n_kv_heads;
    const int64_t r0 = a->item_row[item], n_rows = a->item_n[item], Q = n_rows * rep;
    const int32_t *table = a->table + a->item_table[item];
    float *acc = scratch, *s = acc + Q * D, *m = s + Q * TILE, *l = m + Q;
    ROW *qs = (ROW *)(l + Q), *prob = qs + Q * D;
    SCALAR *ks = (SCALAR *)(prob + Q * TILE), *vs = ks + TILE * D;

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

    memset(acc, 0, Q * D * sizeof(float));
    for (int64_t i = 0; i < Q; i++) {
        m[i] = -INFINITY, l[i] = 0;
        const SCALAR *from = q + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        for (int64_t d = 0; d < D; d++) qs[i * D + d] = TO_ROW(from[d]);
    }

    for (int64_t t = first / TILE * TILE; t <= last; t += TILE) {
        const int64_t end = (last - t) / LANES + 1 < PARTS ? (last - t) / LANES + 1 : PARTS;
        const int64_t skip = first > t ? (first - t) / LANES : 0, n = last - t - (end - 1) * LANES + 1;
        NAME(part) parts[PARTS];
        for (int64_t c = skip; c < end; c++)
            parts[c] = NAME(find_part)(
                a, table, path, base, t + c * LANES, last, g, kc, vc, ks + c * LANES * D, vs + c * LANES * D);
        for (int64_t i = 0; i < Q; i += 4)
            NAME(scores)(Q - i < 4 ? Q - i : 4, qs + i * D, parts, skip, end, s + i * TILE, D);
        for (int64_t i = 0; i < Q; i++) {
            const int64_t p = a->pos[r0 + i / rep];
            const int64_t low = a->window && p - a->window + 1 > t ? p - a->window + 1 - t : 0, high = p - t;
            vf x[PARTS], top = splat(-INFINITY);
            for (int64_t c = skip; c < end; c++) {
                x[c] = load_f(s + i * TILE + c * LANES) * scale;
                if (low > c * LANES || high < c * LANES + LANES - 1) {
                    const vi lane = lane_numbers();
                    const int64_t from = low - c * LANES, to = high - c * LANES;
                    const int32_t lo = from > LANES ? LANES : (int32_t)from;
                    const int32_t hi = to < -1 ? -1 : to > LANES ? LANES : (int32_t)to;
                    x[c] = select_v((lane >= lo) & (lane <= hi), x[c], splat(-INFINITY));
                }
                top = max_v(x[c], top);
            }
            const float best = max_lanes(top);
            if (best == -INFINITY) {
                memset(prob + i * TILE, 0, TILE * sizeof(ROW));
                continue;
            }
            if (best > m[i]) {
                const float shrink = m[i] == -INFINITY ? 0.0f : expf(m[i] - best);
                for (int64_t d = 0; d < D; d += LANES) store_f(acc + i * D + d, load_f(acc + i * D + d) * shrink);
                l[i] *= shrink;
                m[i] = best;
            }
            vf sum = {};
            for (int64_t c = skip; c < end; c++) {
                STORE_ROW(prob + i * TILE + c * LANES, exp_v(x[c] - m[i]));
                sum += LOAD_ROW(prob + i * TILE + c * LANES);
            }
            l[i] += sum_v(sum);
        }
        for (int64_t i = 0; i < Q; i += 4)
            NAME(values)(
                Q - i < 4 ? Q - i : 4, acc + i * D, prob + i * TILE, parts, skip, end, n < LANES ? n : LANES, D);
    }
    for (int64_t i = 0; i < Q; i++) {
        SCALAR *dst = out + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        const float inverse = 1.0f / l[i];
        for (int64_t d = 0; d < D; d += LANES) STORE(dst + d, load_f(acc + i * D + d) * inverse);
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
    const int64_t Q = rows * rep;
    const size_t of_queries = Q * (D + TILE + 2) * sizeof(float) + Q * (D + TILE) * sizeof(ROW);
    const size_t bytes = of_queries + 2 * TILE * D * sizeof(SCALAR);
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
            NAME(item)(a, i / G, i % G, scale, q, kc, vc, out, scratch);
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}
