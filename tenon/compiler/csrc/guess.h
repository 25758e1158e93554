// What is drafted for a step: see policies/forest.py, whose arrays these are.
#pragma once
#include <stdint.h>

enum { MAX_ROOM = 256 };

// Arrays are (n, room), a row a tree, parents before children, unused places of depth 0.
typedef struct {
    int64_t n, room;
    int32_t *token;
    int16_t *parent;
    int8_t *depth, *rank, *source;
    float *q, *f;
    uint8_t *chosen;
} forest_t;

// The weights of P(node | parent) = sigmoid(a[depth] + b logit(q) + c [rank > 0]): a is (kinds, warmths, depths).
typedef struct {
    double *a, *b, *c;
    double *common, *own, *deep;                 // a's parts: (warmths,), (kinds, warmths), (kinds, warmths, depths),
    double *common_seen, *own_seen, *deep_seen;  // and how much each has seen
    int64_t n_kinds, n_warmths, n_depths;
} weights_t;

// What came of a node whose parent was true, all numbers.
typedef struct {
    double kind, warm, depth, q, rank, is_true;
} observation_t;

// Seconds of steps at so many rows without guesses, now and as measured; what guesses add, a fixed part and a slope over
// what was measured (policies/step_time.py).
typedef struct {
    const double *knots, *plain, *measured, *extra;
    int64_t n_knots;
} choice_t;

void tenon_judge(const forest_t *forest, const int64_t *warm, const weights_t *weights);
int64_t tenon_pays(const forest_t *forest, int64_t n_decodes, int64_t most, double margin, const choice_t *choice);
