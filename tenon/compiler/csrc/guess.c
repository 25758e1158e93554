// What is drafted, judged and chosen from: policies/calibrate.py and the policy Pays of policies/speculate.py in C, for
// every step asks them, and most steps have little to choose from. The Python says what is meant; the two are compared.
#include "guess.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double LOW = 1e-3, HIGH = 0.99;

static double clip(double x) { return x < LOW ? LOW : x > HIGH ? HIGH : x; }

static double logit(double q)
{
    double x = clip(q);
    return log(x / (1 - x));
}

// Of a node whose parent is true.
static double probability(const weights_t *w, int64_t kind, int64_t warm, int64_t depth, double q, int64_t rank)
{
    int64_t of = kind * w->n_warmths + warm;
    int64_t deep = depth < w->n_depths ? depth : w->n_depths;
    return clip(1 / (1 + exp(-(w->a[of * w->n_depths + deep - 1] + w->b[of] * logit(q) + (rank ? w->c[of] : 0)))));
}

static double larger(double a, double b) { return a > b ? a : b; }

// Learn from all of `seen`; `error` has room for as many.
void tenon_learn(const weights_t *w, const observation_t *seen, int64_t n, double least, double *error)
{
    for (int64_t i = 0; i < n; i++) {
        const observation_t *s = seen + i;
        int64_t kind = s->kind, warm = s->warm, of = kind * w->n_warmths + warm;
        int64_t deep = of * w->n_depths + (s->depth < w->n_depths ? s->depth : w->n_depths) - 1;
        error[i] = probability(w, kind, warm, s->depth, s->q, s->rank) - s->is_true;
        w->common_seen[warm]++, w->own_seen[of]++, w->deep_seen[deep]++;
    }
    for (int64_t i = 0; i < n; i++) {
        const observation_t *s = seen + i;
        int64_t warm = s->warm, of = (int64_t)s->kind * w->n_warmths + warm;
        int64_t deep = of * w->n_depths + (s->depth < w->n_depths ? s->depth : w->n_depths) - 1;
        w->common[warm] -= error[i] * larger(least, 1 / (1 + w->common_seen[warm]));
        w->own[of] -= error[i] * larger(least, 1 / (1 + w->own_seen[of]));
        w->deep[deep] -= error[i] * larger(least, 1 / (1 + w->deep_seen[deep]));
        double step = larger(least / 2, 0.5 / (2 + w->own_seen[of]));
        w->b[of] -= error[i] * logit(s->q) * step;
        if (s->rank) w->c[of] -= error[i] * step;
    }
    for (int64_t of = 0; of < w->n_kinds * w->n_warmths; of++) {
        w->b[of] = w->b[of] < 0.05 ? 0.05 : w->b[of] > 4 ? 4 : w->b[of];
        for (int64_t d = 0; d < w->n_depths; d++)
            w->a[of * w->n_depths + d] = w->common[of % w->n_warmths] + w->own[of] + w->deep[of * w->n_depths + d];
    }
}

// f of every node: the probability of the path down to it.
void tenon_judge(const forest_t *forest, const int64_t *warm, const weights_t *w)
{
    const int64_t room = forest->room;
    for (int64_t i = 0; i < forest->n; i++) {
        const int16_t *parent = forest->parent + i * room;
        const int8_t *depth = forest->depth + i * room, *rank = forest->rank + i * room;
        const int8_t *source = forest->source + i * room;
        const float *q = forest->q + i * room;
        float *f = forest->f + i * room;
        float p[MAX_ROOM];
        double total[MAX_ROOM + 1];
        int branches = 0;
        for (int64_t j = 0; j < room; j++) {
            if (!depth[j]) continue;
            p[j] = (float)probability(w, source[j], warm[i], depth[j], q[j], rank[j]);
            branches |= rank[j] > 0;
        }
        if (branches) {
            memset(total, 0, (room + 1) * sizeof(double));
            for (int64_t j = 0; j < room; j++)
                if (depth[j]) total[parent[j] + 1] += p[j];
            for (int64_t j = 0; j < room; j++)
                if (depth[j] && total[parent[j] + 1] > HIGH) p[j] = (float)(p[j] * (HIGH / total[parent[j] + 1]));
        }
        for (int64_t j = 0; j < room; j++) f[j] = !depth[j] ? 0 : parent[j] < 0 ? p[j] : f[parent[j]] * p[j];
    }
}

typedef struct {
    float f;
    int32_t place;
} node_t;

static int likelier(const void *one, const void *other)
{
    const node_t *a = one, *b = other;
    if (a->f != b->f) return a->f > b->f ? -1 : 1;
    return a->place < b->place ? -1 : a->place > b->place;
}

// Linear between knots, as numpy's interp.
static double between(const double *knots, const double *seconds, int64_t n, double rows)
{
    if (rows <= knots[0]) return seconds[0];
    if (rows >= knots[n - 1]) return seconds[n - 1];
    int64_t k = 0;
    while (knots[k + 1] <= rows) k++;
    return seconds[k] + (seconds[k + 1] - seconds[k]) / (knots[k + 1] - knots[k]) * (rows - knots[k]);
}

// The nodes to verify are marked; returns how many they are, or -1 without memory. `n_decodes` sequences get a token
// each whatever is chosen, and no more than `most` nodes are; they have to be better than none by `margin`.
int64_t tenon_pays(const forest_t *forest, int64_t n_decodes, int64_t most, double margin, const choice_t *choice)
{
    const int64_t n_places = forest->n * forest->room;
    const float *f = forest->f;
    node_t few[MAX_ROOM], *nodes = few;
    if (n_places > MAX_ROOM && !(nodes = malloc(n_places * sizeof(node_t)))) return -1;
    int64_t n = 0;
    for (int64_t i = 0; i < n_places; i++)
        if (f[i] > 0) nodes[n++] = (node_t){f[i], (int32_t)i};
    qsort(nodes, n, sizeof(node_t), likelier);
    if (n > most) n = most;
    const double plain = between(choice->knots, choice->plain, choice->n_knots, n_decodes);
    const double measured = between(choice->knots, choice->measured, choice->n_knots, n_decodes);
    double gained = n_decodes, best = 0;
    int64_t n_best = 0;
    for (int64_t i = 0; i < n; i++) {
        gained += nodes[i].f;
        double grown = between(choice->knots, choice->measured, choice->n_knots, n_decodes + i + 1) - measured;
        double rate = gained / (plain + choice->extra[0] + choice->extra[1] * grown);
        if (rate > best) best = rate, n_best = i + 1;
    }
    if (best * plain < n_decodes * (1 + margin)) n_best = 0;
    memset(forest->chosen, 0, n_places);
    for (int64_t i = 0; i < n_best; i++) forest->chosen[nodes[i].place] = 1;
    if (nodes != few) free(nodes);
    return n_best;
}
