// The body of paged attention, included once per storage type with SCALAR, ROW, GROUP, DOT, TAKE, STORE, LOAD_ROW,
// STORE_ROW, TO_ROW, TO_F, NAME(x) defined; ROW is the type in which queries and probabilities meet keys and values.
//
// Cache layout: K [G, block, D / GROUP, B, GROUP] (positions of a channel, or of a pair of them, lie side by side: a
// dot product over channels needs no shuffles), V [G, block, B / GROUP, D, GROUP]; heads outermost, so that blocks
// allocated in a row are read in a row. Probabilities are rounded to ROW, and summed as rounded. Online softmax runs
// over tiles of 64 absolute positions from the first visible one upwards, in parts of LANES: a row's bits depend
// neither on its neighbours nor on how the context was cut into chunks.
// Each K and V byte of a tile is read from memory once for all rows and heads of an item.

static void NAME(put)(
    const attend_step *a, int64_t g, int64_t slot, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc) {
    const int64_t D = a->head_dim, B = a->block_tokens, N = a->n_blocks, block = slot / B, off = slot % B;
    kc += (g * N + block) * D * B + off * GROUP;
    for (int64_t d = 0; d < D; d += GROUP) memcpy(kc + d * B, k + d, GROUP * sizeof(SCALAR));
    vc += ((g * N + block) * B + off / GROUP * GROUP) * D + off % GROUP;
    for (int64_t d = 0; d < D; d++) vc[d * GROUP] = v[d];
}

static void NAME(get)(
    const attend_step *a, int64_t g, int64_t slot, const SCALAR *kc, const SCALAR *vc, SCALAR *k, SCALAR *v) {
    const int64_t D = a->head_dim, B = a->block_tokens, N = a->n_blocks, block = slot / B, off = slot % B;
    kc += (g * N + block) * D * B + off * GROUP;
    for (int64_t d = 0; d < D; d += GROUP) memcpy(k + d, kc + d * B, GROUP * sizeof(SCALAR));
    vc += ((g * N + block) * B + off / GROUP * GROUP) * D + off % GROUP;
    for (int64_t d = 0; d < D; d++) v[d] = vc[d * GROUP];
}

// What an item reads of one K/V head: positions up to `base` through its span's table, further ones in the slots of a
// row's path. What is not read in place is gathered into ks [D / GROUP][LANES][GROUP] and vs [LANES / GROUP][D][GROUP]
// of the tile's parts, whose lanes hold the slots `held`: what a row shares with the one before is not gathered again.
typedef struct {
    const attend_step *a;
    const int32_t *table;
    int64_t base;
    const SCALAR *kc, *vc;
    SCALAR *ks, *vs;
    int32_t held_k[TILE], held_v[TILE];
} NAME(context);

static void NAME(gather)(NAME(context) *x, const int32_t *path, int64_t first, int64_t n, int what) {
    const int64_t B = x->a->block_tokens, D = x->a->head_dim, c = first % TILE / LANES * LANES;
    SCALAR *ks = x->ks + c * D, *vs = x->vs + c * D;
    int32_t *held_k = x->held_k + c, *held_v = x->held_v + c;
    int64_t j = 0;
    if (first <= x->base && B >= LANES) {  // what is the table's comes as it lies, the rest of its lanes with it
        const int64_t block = x->table[first / B], off = first % B;
        const int32_t slot = block * B + off;
        const SCALAR *k = x->kc + block * D * B + off * GROUP, *v = x->vc + (block * B + off) * D;
        if (what & KEYS && held_k[0] != slot) {
            for (int64_t d = 0; d < D; d += GROUP) memcpy(ks + d * LANES, k + d * B, LANES * GROUP * sizeof(SCALAR));
            for (int32_t i = 0; i < LANES; i++) held_k[i] = slot + i;
        }
        if (what & VALUES && held_v[0] != slot) {
            memcpy(vs, v, LANES * D * sizeof(SCALAR));
            for (int32_t i = 0; i < LANES; i++) held_v[i] = slot + i;
        }
        j = x->base - first + 1;
    }
    for (; j < n; j++) {
        const int64_t p = first + j;
        const int32_t slot = p <= x->base ? x->table[p / B] * B + p % B : path[p - x->base - 1];
        if (what & KEYS && held_k[j] != slot) {
            const SCALAR *from = x->kc + slot / B * D * B + slot % B * GROUP;
            for (int64_t d = 0; d < D; d += GROUP)
                memcpy(ks + d * LANES + j * GROUP, from + d * B, GROUP * sizeof(SCALAR));
            held_k[j] = slot;
        }
        if (what & VALUES && held_v[j] != slot) {
            const SCALAR *from = x->vc + slot / GROUP * GROUP * D + slot % GROUP;
            for (int64_t d = 0; d < D; d++) vs[(j / GROUP * D + d) * GROUP + j % GROUP] = from[d * GROUP];
            held_v[j] = slot;
        }
    }
}

// Where K and V of LANES positions from `first` up to `last` lie: in one block, or gathered where some are a tree's or
// blocks are smaller than that; what is multiplied and summed in which order is the same. Lanes past `last` may hold
// anything. K's channels are `stride` positions apart. The next tile's are asked for while this one's are multiplied,
// line by line: blocks lie scattered, so the hardware's prefetcher cannot guess the next one, and asking for many lines
// at once stalls the core until they are there.
typedef struct {
    const SCALAR *k, *v, *next_k, *next_v;
    int64_t stride;
} NAME(part);

static NAME(part) NAME(find_part)(NAME(context) *x, const int32_t *path, int64_t first, int64_t last, int what) {
    const int64_t B = x->a->block_tokens, D = x->a->head_dim;
    const int64_t n = last - first + 1 < LANES ? last - first + 1 : LANES;
    if (first + n - 1 <= x->base && B >= LANES) {
        const int64_t next = first + TILE <= x->base ? first + TILE : first;
        const int64_t block = x->table[first / B], off = first % B;
        const int64_t next_block = x->table[next / B], next_off = next % B;
        return (NAME(part)){
            x->kc + block * D * B + off * GROUP, x->vc + (block * B + off) * D,
            x->kc + next_block * D * B + next_off * GROUP, x->vc + (next_block * B + next_off) * D, B};
    }
    NAME(gather)(x, path, first, n, what);
    const int64_t at = first % TILE * D;
    return (NAME(part)){x->ks + at, x->vs + at, x->ks + at, x->vs + at, LANES};
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

// Of Q queries against parts [first, end), four at a time.
static void NAME(scores)(
    int64_t Q, const ROW *q, const NAME(part) *parts, int64_t first, int64_t end, float *s, int64_t D) {
    typedef void scores(const ROW *, const NAME(part) *, float *, int64_t);
    static scores *const all[3][4] = {
        {NAME(scores_1_1), NAME(scores_2_1), NAME(scores_3_1), NAME(scores_4_1)},
        {NAME(scores_1_2), NAME(scores_2_2), NAME(scores_3_2), NAME(scores_4_2)},
        {NAME(scores_1_4), NAME(scores_2_4), NAME(scores_3_4), NAME(scores_4_4)},
    };
    for (; Q > 0; Q -= 4, q += 4 * D, s += 4 * TILE) {
        const int64_t N = Q < 4 ? Q : 4;
        const int wide = LOG_WIDE(N);
        int64_t c = first;
        for (; c + (1 << wide) <= end; c += 1 << wide) all[wide][N - 1](q, parts + c, s + c * LANES, D);
        for (; c < end; c++) all[0][N - 1](q, parts + c, s + c * LANES, D);
    }
}

// The same, adding values of positions up to the tile's `last`.
static void NAME(values)(
    int64_t Q, float *acc, const ROW *prob, const NAME(part) *parts, int64_t first, int64_t end, int64_t last,
    int64_t D) {
    typedef void values(float *, const ROW *, const NAME(part) *, int64_t, int64_t, int64_t, int64_t, int64_t);
    static values *const two[4] = {NAME(values_1_2), NAME(values_2_2), NAME(values_3_2), NAME(values_4_2)};
    static values *const four[4] = {NAME(values_1_4), NAME(values_2_4), NAME(values_3_4), NAME(values_4_4)};
    if (first >= end) return;
    const int64_t left = last - (end - 1) * LANES + 1, n = left < LANES ? left : LANES;
    for (; Q > 0; Q -= 4, acc += 4 * D, prob += 4 * TILE) {
        const int64_t N = Q < 4 ? Q : 4;
        int64_t d = 0;
        if (LOG_WIDE(N) == 2)
            for (; d + 4 * LANES <= D; d += 4 * LANES) four[N - 1](acc, prob, parts, first, end, n, d, D);
        for (; d < D; d += 2 * LANES) two[N - 1](acc, prob, parts, first, end, n, d, D);
    }
}

// One query's scores of a tile's parts [first, end) become probabilities of its positions [low, high], against the best
// score of all tiles so far: what was summed against another one shrinks.
static void NAME(weigh)(
    const float *s, int64_t first, int64_t end, int64_t low, int64_t high, float scale, float *acc, float *m, float *l,
    ROW *prob, int64_t D) {
    vf x[PARTS], top = splat(-INFINITY);
    for (int64_t c = first; c < end; c++) {
        x[c] = load_f(s + c * LANES) * scale;
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
        memset(prob, 0, TILE * sizeof(ROW));
        return;
    }
    if (best > *m) {
        const float shrink = *m == -INFINITY ? 0.0f : expf(*m - best);
        for (int64_t d = 0; d < D; d += LANES) store_f(acc + d, load_f(acc + d) * shrink);
        *l *= shrink;
        *m = best;
    }
    vf sum = {};
    for (int64_t c = first; c < end; c++) {
        STORE_ROW(prob + c * LANES, exp_v(x[c] - *m));
        sum += LOAD_ROW(prob + c * LANES);
    }
    *l += sum_v(sum);
}

// Rows of one item against one K/V head. Parts that end at or below the item's base are taken through by all rows
// together, further ones by each row alone. Scratch per thread: acc [Q][D], s [Q][TILE], m, l [Q] in fp32; q [Q][D] and
// probabilities [Q][TILE] as ROW; K and V of a tile's gathered parts as stored; path [rows][depth].
static void NAME(item)(
    const attend_step *a, int64_t item, int64_t g, float scale, const SCALAR *q, const SCALAR *kc, const SCALAR *vc,
    SCALAR *out, float *scratch, int64_t depth) {
    const int64_t H = a->n_heads, D = a->head_dim, rep = H / a->n_kv_heads;
    const int64_t r0 = a->item_row[item], n_rows = a->item_n[item], Q = n_rows * rep;
    const int64_t of_head = g * a->n_blocks * a->block_tokens * D;
    const int32_t *pos = a->pos + r0;
    float *acc = scratch, *s = acc + Q * D, *m = s + Q * TILE, *l = m + Q;
    ROW *qs = (ROW *)(l + Q), *prob = qs + Q * D;
    SCALAR *ks = (SCALAR *)(prob + Q * TILE), *vs = ks + TILE * D;
    int32_t *path = (int32_t *)(vs + TILE * D);

    int64_t base = 0, last = 0, first = pos[0];
    for (int64_t i = 0; i < n_rows; i++) {
        if (a->base[r0 + i] > base) base = a->base[r0 + i];
        if (pos[i] > last) last = pos[i];
        if (pos[i] < first) first = pos[i];
    }
    first = a->window && first >= a->window ? first - a->window + 1 : 0;
    for (int64_t i = 0; i < n_rows; i++)
        for (int64_t row = r0 + i; a->parent[row] >= 0; row = a->parent[row])
            path[i * depth + a->pos[row] - base - 1] = a->slot[row];
    NAME(context) seen = {a, a->table + a->item_table[item], base, kc + of_head, vc + of_head, ks, vs};
    memset(seen.held_k, -1, sizeof seen.held_k);
    memset(seen.held_v, -1, sizeof seen.held_v);

    memset(acc, 0, Q * D * sizeof(float));
    for (int64_t i = 0; i < Q; i++) {
        m[i] = -INFINITY, l[i] = 0;
        const SCALAR *from = q + ((r0 + i / rep) * H + g * rep + i % rep) * D;
        for (int64_t d = 0; d < D; d++) qs[i * D + d] = TO_ROW(from[d]);
    }

    for (int64_t t = first / TILE * TILE; t <= last; t += TILE) {
        const int64_t skip = first > t ? (first - t) / LANES : 0, end = parts_to(last - t);
        const int64_t whole = last == base ? end : base < t ? 0 : (base - t + 1) / LANES;
        const int64_t shared = whole < skip ? skip : whole > end ? end : whole;
        NAME(part) parts[PARTS];
        for (int64_t c = skip; c < shared; c++)
            parts[c] = NAME(find_part)(&seen, 0, t + c * LANES, last, KEYS | VALUES);
        NAME(scores)(Q, qs, parts, skip, shared, s, D);
        for (int64_t i = 0; i < n_rows && shared < end; i++) {
            const int64_t own = parts_to(pos[i] - t);
            for (int64_t c = shared; c < own; c++)
                parts[c] = NAME(find_part)(&seen, path + i * depth, t + c * LANES, pos[i], KEYS);
            NAME(scores)(rep, qs + i * rep * D, parts, shared, own, s + i * rep * TILE, D);
        }
        for (int64_t i = 0; i < Q; i++) {
            const int64_t p = pos[i / rep], own = parts_to(p - t);
            const int64_t low = a->window && p - a->window + 1 > t ? p - a->window + 1 - t : 0;
            NAME(weigh)(
                s + i * TILE, skip, own > shared ? own : shared, low, p - t, scale, acc + i * D, m + i, l + i,
                prob + i * TILE, D);
        }
        NAME(values)(Q, acc, prob, parts, skip, shared, last - t, D);
        for (int64_t i = 0; i < n_rows && shared < end; i++) {
            const int64_t own = parts_to(pos[i] - t);
            for (int64_t c = shared; c < own; c++)
                parts[c] = NAME(find_part)(&seen, path + i * depth, t + c * LANES, pos[i], VALUES);
            NAME(values)(rep, acc + i * rep * D, prob + i * rep * TILE, parts, shared, own, pos[i] - t, D);
        }
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
    int64_t rows = 1, depth = 0;
    for (int64_t i = 0; i < a->n_items; i++)
        if (a->item_n[i] > rows) rows = a->item_n[i];
    for (int64_t i = 0; i < a->n_rows; i++)
        if (a->pos[i] - a->base[i] > depth) depth = a->pos[i] - a->base[i];
    const int64_t Q = rows * rep;
    const size_t of_queries = Q * (D + TILE + 2) * sizeof(float) + Q * (D + TILE) * sizeof(ROW);
    const size_t bytes = of_queries + 2 * TILE * D * sizeof(SCALAR) + rows * depth * sizeof(int32_t);
    int failed = 0;
#pragma omp parallel
    {
        float *scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->n_rows; row++)
            for (int64_t g = 0; g < G; g++)
                NAME(put)(a, g, a->slot[row], k + (row * G + g) * D, v + (row * G + g) * D, kc, vc);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->n_items * G; i++) {
            if (!scratch) continue;
            NAME(item)(a, i / G, i % G, scale, q, kc, vc, out, scratch, depth);
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}

// Copies K and V from each move's first slot to its second in these layers; all are read before any is written. Returns
// 0, or -1 when memory for scratch is not to be had: then nothing was moved.
int NAME(tenon_move)(
    const attend_step *a, int64_t n, const int32_t *moves, int64_t n_layers, SCALAR *const *kc, SCALAR *const *vc) {
    const int64_t G = a->n_kv_heads, D = a->head_dim;
    int failed = 0;
#pragma omp parallel
    {
        SCALAR *kv = malloc(2 * n * D * sizeof(SCALAR));
        if (!kv) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_layers * G; i++) {
            if (failed) continue;
            SCALAR *k = kc[i / G], *v = vc[i / G];
            for (int64_t j = 0; j < n; j++)
                NAME(get)(a, i % G, moves[2 * j], k, v, kv + 2 * j * D, kv + (2 * j + 1) * D);
            for (int64_t j = 0; j < n; j++)
                NAME(put)(a, i % G, moves[2 * j + 1], kv + 2 * j * D, kv + (2 * j + 1) * D, k, v);
        }
        free(kv);
    }
    return failed ? -1 : 0;
}
