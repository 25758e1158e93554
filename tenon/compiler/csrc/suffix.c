// Suffix automata over token strings (Blumer et al. 1985), which guess what follows a context from what has followed
// its longest suffix before: of a request itself, and of what others have said.
//
// A state stands for all substrings that end at the same places; `count` says at how many, `link` is the state of the
// longest suffix that ends at more. Edges of a state lie in a list, and all are found by (state, token) in one table.
// speculation/suffix.py says the same in Python; the two are compared.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guess.h"

enum { ROOT = 0, NONE = -1, COUNTED_LINKS = 64, CHILDREN = 4, MOST_EDGES = 32, BUCKETS = 6 };

typedef struct {
    int32_t length, link, count, edges;
} state_t;

typedef struct {
    int32_t from, token, to, next;
} edge_t;

typedef struct {
    state_t *states;
    edge_t *edges;
    int32_t *slots;  // edge + 1, or 0
    int64_t n_states, room_states, n_edges, room_edges, n_slots;
    int32_t last;
} automaton_t;

// What is known of one sequence: its own automaton, and where its end stands in up to two others.
typedef struct {
    automaton_t *own;
    const int32_t *tokens;
    int64_t n_seen;
    automaton_t *shared[2];
    int32_t state[2], length[2];
} follower_t;

static uint64_t place_of(int32_t from, int32_t token)
{
    uint64_t x = ((uint64_t)(uint32_t)from << 32) | (uint32_t)token;
    x *= 0x9E3779B97F4A7C15ull;
    return x ^ (x >> 29);
}

static int32_t find(const automaton_t *a, int32_t from, int32_t token)
{
    uint64_t mask = a->n_slots - 1;
    for (uint64_t at = place_of(from, token) & mask; a->slots[at]; at = (at + 1) & mask) {
        const edge_t *edge = &a->edges[a->slots[at] - 1];
        if (edge->from == from && edge->token == token) return a->slots[at] - 1;
    }
    return NONE;
}

static int grow(void **memory, int64_t *room, int64_t size)
{
    void *more = realloc(*memory, *room * 2 * size);
    if (!more) return -1;
    *memory = more;
    *room *= 2;
    return 0;
}

static void enter(automaton_t *a, int32_t edge)
{
    uint64_t mask = a->n_slots - 1, at = place_of(a->edges[edge].from, a->edges[edge].token) & mask;
    while (a->slots[at]) at = (at + 1) & mask;
    a->slots[at] = edge + 1;
}

static int add_edge(automaton_t *a, int32_t from, int32_t token, int32_t to)
{
    if (a->n_edges == a->room_edges && grow((void **)&a->edges, &a->room_edges, sizeof(edge_t))) return -1;
    if (2 * (a->n_edges + 1) > a->n_slots) {
        int32_t *slots = calloc(a->n_slots * 2, sizeof(int32_t));
        if (!slots) return -1;
        free(a->slots);
        a->slots = slots;
        a->n_slots *= 2;
        for (int32_t i = 0; i < a->n_edges; i++) enter(a, i);
    }
    int32_t edge = a->n_edges++;
    a->edges[edge] = (edge_t){from, token, to, a->states[from].edges};
    a->states[from].edges = edge;
    enter(a, edge);
    return 0;
}

static int32_t add_state(automaton_t *a, int32_t length, int32_t link, int32_t count)
{
    if (a->n_states == a->room_states && grow((void **)&a->states, &a->room_states, sizeof(state_t))) return NONE;
    a->states[a->n_states] = (state_t){length, link, count, NONE};
    return a->n_states++;
}

void tenon_suffix_free(automaton_t *a)
{
    if (!a) return;
    free(a->states), free(a->edges), free(a->slots), free(a);
}

automaton_t *tenon_suffix_new(void)
{
    automaton_t *a = calloc(1, sizeof(automaton_t));
    if (!a) return NULL;
    a->room_states = a->room_edges = 64, a->n_slots = 128;
    a->states = malloc(a->room_states * sizeof(state_t));
    a->edges = malloc(a->room_edges * sizeof(edge_t));
    a->slots = calloc(a->n_slots, sizeof(int32_t));
    if (!a->states || !a->edges || !a->slots) {
        tenon_suffix_free(a);
        return NULL;
    }
    add_state(a, 0, NONE, 0);
    return a;
}

// The next string begins: what is added from now on follows nothing.
void tenon_suffix_begin(automaton_t *a) { a->last = ROOT; }

// The state of the same strings as `q` up to the length of `p` and one more, taken out of `q`.
static int32_t split(automaton_t *a, int32_t p, int32_t q, int32_t token)
{
    int32_t clone = add_state(a, a->states[p].length + 1, a->states[q].link, a->states[q].count);
    if (clone == NONE) return NONE;
    int32_t n = 0;  // the list is newest first, so it is copied from its end
    for (int32_t e = a->states[q].edges; e != NONE; e = a->edges[e].next) n++;
    int32_t *order = malloc((n + 1) * sizeof(int32_t));
    if (!order) return NONE;
    int32_t at = n;
    for (int32_t e = a->states[q].edges; e != NONE; e = a->edges[e].next) order[--at] = e;
    int failed = 0;
    for (int32_t i = 0; i < n && !failed; i++) {
        edge_t edge = a->edges[order[i]];
        failed = add_edge(a, clone, edge.token, edge.to);
    }
    free(order);
    if (failed) return NONE;
    for (int32_t e; p != NONE && (e = find(a, p, token)) != NONE && a->edges[e].to == q; p = a->states[p].link)
        a->edges[e].to = clone;
    a->states[q].link = clone;
    return clone;
}

static int extend(automaton_t *a, int32_t token)
{
    int32_t p = a->last, e = find(a, p, token), now;
    if (e != NONE) {  // in an earlier string this has been here before
        int32_t q = a->edges[e].to;
        now = a->states[q].length == a->states[p].length + 1 ? q : split(a, p, q, token);
        if (now == NONE) return -1;
    } else {
        now = add_state(a, a->states[p].length + 1, ROOT, 0);
        if (now == NONE) return -1;
        while (p != NONE && find(a, p, token) == NONE) {
            if (add_edge(a, p, token, now)) return -1;
            p = a->states[p].link;
        }
        if (p != NONE) {
            int32_t q = a->edges[find(a, p, token)].to;
            int32_t link = a->states[q].length == a->states[p].length + 1 ? q : split(a, p, q, token);
            if (link == NONE) return -1;
            a->states[now].link = link;
        }
    }
    a->last = now;
    for (int32_t s = now, n = 0; s != ROOT && n < COUNTED_LINKS; s = a->states[s].link, n++) a->states[s].count++;
    return 0;
}

// 0, or -1 without memory: then the automaton is spoilt and has to be freed.
int32_t tenon_suffix_add(automaton_t *a, const int32_t *tokens, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (extend(a, tokens[i])) return -1;
    return 0;
}

follower_t *tenon_follower_new(const int32_t *tokens)
{
    follower_t *f = calloc(1, sizeof(follower_t));
    if (!f) return NULL;
    f->own = tenon_suffix_new();
    f->tokens = tokens;
    if (!f->own) {
        free(f);
        return NULL;
    }
    return f;
}

void tenon_follower_free(follower_t *f)
{
    if (!f) return;
    tenon_suffix_free(f->own);
    free(f);
}

static void advance(follower_t *f, int k, int32_t token)
{
    const automaton_t *a = f->shared[k];
    int32_t s = f->state[k], e;
    while ((e = find(a, s, token)) == NONE && s != ROOT) {
        s = a->states[s].link;
        f->length[k] = a->states[s].length;
    }
    f->state[k] = e == NONE ? ROOT : a->edges[e].to;
    f->length[k] = e == NONE ? 0 : f->length[k] + 1;
}

// `a`, or nothing, takes the place of the `k`-th automaton; the sequence's last `most` tokens are looked up in it.
void tenon_follower_share(follower_t *f, int32_t k, automaton_t *a, int64_t most)
{
    f->shared[k] = a, f->state[k] = ROOT, f->length[k] = 0;
    if (!a) return;
    for (int64_t i = f->n_seen > most ? f->n_seen - most : 0; i < f->n_seen; i++) advance(f, k, f->tokens[i]);
}

static int32_t bucket_of(int32_t length)
{
    static const int32_t bounds[BUCKETS - 1] = {1, 2, 4, 8, 16};
    int32_t b = 0;
    while (b < BUCKETS - 1 && length > bounds[b]) b++;
    return b;
}

typedef struct {
    double path, q;
    int32_t token, to, parent, depth, rank;
} candidate_t;

// The likeliest followers of a state as candidates; returns how many there are by now.
static int32_t look(const automaton_t *a, int32_t s, double path, int32_t parent, int32_t depth, double doubt,
                    candidate_t *found, int32_t n)
{
    int32_t best[CHILDREN], n_best = 0, total = 0, n_edges = 0;
    for (int32_t e = a->states[s].edges; e != NONE; e = a->edges[e].next) {
        if (++n_edges > MOST_EDGES) return n;  // what may be followed by so much says nothing
        int32_t count = a->states[a->edges[e].to].count, at = n_best;
        total += count;
        // Of equals the newest stays first, as it stands in the list.
        while (at > 0 && a->states[a->edges[best[at - 1]].to].count < count) at--;
        if (at == CHILDREN) continue;
        if (n_best < CHILDREN) n_best++;
        memmove(best + at + 1, best + at, (n_best - 1 - at) * sizeof(int32_t));
        best[at] = e;
    }
    for (int32_t i = 0; i < n_best; i++) {
        const edge_t *edge = &a->edges[best[i]];
        double q = a->states[edge->to].count / (total + doubt);
        found[n++] = (candidate_t){path * q, q, edge->token, edge->to, parent, depth, i};
    }
    return n;
}

// Trees for `n` followers whose sequences have n_tokens[i] tokens by now. Row i of the outputs (width `room`) gets at
// most `room` nodes, depth[i] deep, parents first, the likeliest first; `at_least` is the shortest match that counts,
// `floor` the least product of probabilities. Returns the rows with a tree, or -1 without memory.
int64_t tenon_follower_guess(follower_t **followers, const int64_t *n_tokens, const int32_t *depth, int32_t at_least,
                             double doubt, double floor, const forest_t *forest)
{
    int64_t n = forest->n, room = forest->room;
    int32_t *token = forest->token;
    int16_t *parent = forest->parent;
    int8_t *at_depth = forest->depth, *rank = forest->rank, *source = forest->source;
    float *q = forest->q;
    int64_t n_found = 0;
    for (int64_t i = 0; i < n; i++) {
        follower_t *f = followers[i];
        for (; f->n_seen < n_tokens[i]; f->n_seen++) {
            int32_t next = f->tokens[f->n_seen];
            if (extend(f->own, next)) return -1;
            for (int k = 0; k < 2; k++)
                if (f->shared[k]) advance(f, k, next);
        }
        int64_t row = i * room;
        memset(at_depth + row, 0, room), memset(rank + row, 0, room), memset(source + row, 0, room);
        if (depth[i] <= 0) continue;
        const automaton_t *a = f->own;
        int32_t s = a->states[a->last].link, length = s == NONE ? 0 : a->states[s].length, bucket;
        if (s == NONE) s = ROOT;
        bucket = bucket_of(length);
        for (int k = 0; k < 2; k++) {
            const automaton_t *other = f->shared[k];
            if (!other || f->length[k] <= length) continue;
            a = other, s = f->state[k], length = f->length[k];
            // Since the match was made the state may have been split: shorter strings are its suffixes' now.
            while (a->states[s].link != NONE && a->states[a->states[s].link].length >= length) s = a->states[s].link;
            bucket = BUCKETS + bucket_of(length);
        }
        if (length < at_least) continue;
        candidate_t found[CHILDREN * (MAX_ROOM + 1)];
        int32_t n_open = look(a, s, 1.0, -1, 1, doubt, found, 0), made = 0;
        while (made < room && n_open) {
            int32_t first = 0;
            for (int32_t c = 1; c < n_open; c++)
                if (found[c].path > found[first].path) first = c;
            candidate_t it = found[first];
            if (it.path < floor) break;
            memmove(found + first, found + first + 1, (--n_open - first) * sizeof(candidate_t));
            token[row + made] = it.token, parent[row + made] = it.parent, at_depth[row + made] = it.depth;
            rank[row + made] = it.rank, source[row + made] = bucket, q[row + made] = it.q;
            if (it.depth < depth[i]) n_open = look(a, it.to, it.path, made, it.depth + 1, doubt, found, n_open);
            made++;
        }
        n_found += made > 0;
    }
    return n_found;
}

// One round: are there guesses for these sequences, and is any of them worth it?
typedef struct {
    follower_t **followers;
    const int64_t *n_tokens, *last, *deepest, *warm;  // tokens there are, may be guessed up to; depths at most; warmths
    int32_t *depth;                                    // room for n
    const forest_t *forest;
    const weights_t *weights;
    const choice_t *choice;
    double doubt, floor;
    int64_t at_least, n_found;  // rows with a tree: a result
} round_t;

// Returns how many nodes are chosen, or -1 without memory.
int64_t tenon_follower_round(round_t *r, int64_t n_decodes, int64_t most, double margin)
{
    for (int64_t i = 0; i < r->forest->n; i++) {
        int64_t left = r->last[i] - r->n_tokens[i];
        r->depth[i] = left < r->deepest[i] ? left : r->deepest[i];
    }
    r->n_found = tenon_follower_guess(r->followers, r->n_tokens, r->depth, r->at_least, r->doubt, r->floor, r->forest);
    if (r->n_found <= 0) return r->n_found;
    tenon_judge(r->forest, r->warm, r->weights);
    return tenon_pays(r->forest, n_decodes, most, margin, r->choice);
}
