// The decoder's layers over T rows, included once per storage type with SCALAR, TO_F, FROM_F, NAME(x) defined.
// What tenon.models.decoder says in torch, in the same order; a row's bits depend on the row and its context alone.

typedef struct {
    SCALAR *x, *qkv, *q, *k, *v, *o, *delta, *gate_up, *gate;
    SCALAR *router, *gathered, *parts;   // sparse layers: [T, E], [T top_k, M], [T top_k, M]
    float *weight;                       // [T, top_k]
    int32_t *expert, *order, *start;     // [T, top_k], places sorted by expert, [E + 1]
} NAME(arrays);

// Lays out the scratch; `base` may be NULL. Returns its size in bytes.
static int64_t NAME(lay_out)(const stack *s, int64_t T, char *base, NAME(arrays) *a) {
    const int64_t M = s->hidden, Q = s->n_heads * s->head_dim, KV = s->n_kv_heads * s->head_dim, P = T * s->top_k;
    int64_t at = 0;
#define TAKE(name, count) (a->name = (void *)(base + at), at += line((count) * (int64_t)sizeof *a->name))
    TAKE(x, T * M), TAKE(delta, T * M), TAKE(qkv, T * (Q + 2 * KV)), TAKE(q, T * Q), TAKE(k, T * KV), TAKE(v, T * KV);
    TAKE(o, T * Q), TAKE(gate_up, T * 2 * s->width), TAKE(gate, T * s->width);
    TAKE(router, T * s->n_experts), TAKE(gathered, P * M), TAKE(parts, P * M);
    TAKE(weight, P), TAKE(expert, P), TAKE(order, P), TAKE(start, s->n_experts + 1);
#undef TAKE
    return at;
}

int64_t NAME(tenon_stack_scratch)(const stack *s, int64_t T) {
    NAME(arrays) a;
    return NAME(lay_out)(s, T, 0, &a);
}

// The K best experts of a row by router logits, the lower number first among equals, and their softmax weights.
static void NAME(route)(const SCALAR *logits, int64_t E, int64_t K, int normalise, int32_t *expert, float *weight) {
    float top = TO_F(logits[0]), all = 0, chosen = 0;
    for (int64_t e = 1; e < E; e++) top = TO_F(logits[e]) > top ? TO_F(logits[e]) : top;
    for (int64_t e = 0; e < E; e++) all += expf(TO_F(logits[e]) - top);
    uint8_t taken[E];
    memset(taken, 0, E);
    for (int64_t i = 0; i < K; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || TO_F(logits[e]) > TO_F(logits[best]))) best = e;
        taken[best] = 1;
        expert[i] = (int32_t)best;
        weight[i] = expf(TO_F(logits[best]) - top) / all;
        chosen += weight[i];
    }
    if (normalise)
        for (int64_t i = 0; i < K; i++) weight[i] /= chosen;
}

// Mixture of experts: rows are gathered by expert, each expert runs once, a row's parts are summed in its own order.
static int NAME(sparse)(const stack *s, const stack_layer *l, int64_t T, const NAME(arrays) *a) {
    const int64_t M = s->hidden, E = s->n_experts, K = s->top_k, F = l->width;
    const int64_t up_size = (2 * F + LANES - 1) / LANES * LANES * M, down_size = (M + LANES - 1) / LANES * LANES * F;
    if (NAME(tenon_linear)(a->x, l->router, 0, T, M, E, a->router)) return -1;
#pragma omp parallel for schedule(static) if (T > 64)
    for (int64_t t = 0; t < T; t++)
        NAME(route)(a->router + t * E, E, K, (int)s->normalise, a->expert + t * K, a->weight + t * K);
    memset(a->start, 0, (E + 1) * sizeof *a->start);
    for (int64_t i = 0; i < T * K; i++) a->start[a->expert[i] + 1]++;
    for (int64_t e = 0; e < E; e++) a->start[e + 1] += a->start[e];
    int32_t next[E];
    memcpy(next, a->start, sizeof next);
    for (int64_t i = 0; i < T * K; i++) {
        a->order[i] = next[a->expert[i]]++;
        memcpy(a->gathered + a->order[i] * M, a->x + i / K * M, M * sizeof(SCALAR));
    }
    for (int64_t e = 0; e < E; e++) {
        const int64_t first = a->start[e], n = a->start[e + 1] - first;
        if (!n) continue;
        const SCALAR *up = (const SCALAR *)l->gate_up + e * up_size, *down = (const SCALAR *)l->down + e * down_size;
        if (NAME(tenon_linear)(a->gathered + first * M, up, 0, n, M, 2 * F, a->gate_up)) return -1;
        NAME(tenon_swiglu)(a->gate_up, n, F, a->gate);
        if (NAME(tenon_linear)(a->gate, down, 0, n, F, M, a->parts + first * M)) return -1;
    }
#pragma omp parallel for schedule(static) if (T > 16)
    for (int64_t t = 0; t < T; t++)
        for (int64_t m = 0; m < M; m++) {
            float sum = 0;
            for (int64_t i = t * K; i < (t + 1) * K; i++) sum += a->weight[i] * TO_F(a->parts[a->order[i] * M + m]);
            a->delta[t * M + m] = FROM_F(sum);
        }
    return 0;
}

static int NAME(dense)(const stack *s, const stack_layer *l, int64_t T, const NAME(arrays) *a) {
    const int64_t M = s->hidden, F = l->width;
    if (NAME(tenon_linear)(a->x, l->gate_up, l->gate_up_bias, T, M, 2 * F, a->gate_up)) return -1;
    NAME(tenon_swiglu)(a->gate_up, T, F, a->gate);
    return NAME(tenon_linear)(a->gate, l->down, l->down_bias, T, F, M, a->delta);
}

// h [T, M] holds the embeddings and is overwritten; `out` [T, M] is the last norm's. Cosines and sines are [T, D / 2].
// Returns 0, or -1 when memory for scratch is not to be had.
int NAME(tenon_stack)(
    const stack *s, const attend_step *groups, int64_t T, const float *cosine, const float *sine, SCALAR *h, SCALAR *out,
    char *scratch) {
    NAME(arrays) a;
    NAME(lay_out)(s, T, scratch, &a);
    const int64_t M = s->hidden, H = s->n_heads, G = s->n_kv_heads, D = s->head_dim;
    const float eps = (float)s->eps;
    for (int64_t i = 0; i < s->n_layers; i++) {
        const stack_layer *l = s->layers + i;
        if (i)
            NAME(tenon_add_norm)(h, a.delta, l->attn_norm, eps, T, M, a.x);
        else
            NAME(tenon_norm)(h, l->attn_norm, eps, T, M, a.x);
        if (NAME(tenon_linear)(a.x, l->qkv, l->qkv_bias, T, M, (H + 2 * G) * D, a.qkv)) return -1;
        NAME(tenon_heads)(a.qkv, l->q_norm, l->k_norm, eps, cosine, sine, T, H, G, D, a.q, a.k, a.v);
        const attend_step *step = groups + l->group;
        if (NAME(tenon_attend)(step, (float)s->scale, a.q, a.k, a.v, l->k_cache, l->v_cache, a.o)) return -1;
        if (NAME(tenon_linear)(a.o, l->out, l->out_bias, T, H * D, M, a.delta)) return -1;
        NAME(tenon_add_norm)(h, a.delta, l->mlp_norm, eps, T, M, a.x);
        if (l->router ? NAME(sparse)(s, l, T, &a) : NAME(dense)(s, l, T, &a)) return -1;
    }
    NAME(tenon_add_norm)(h, a.delta, s->norm, eps, T, M, out);
    return 0;
}
