// Paged attention on CPU for fp32 and bf16 storage: see attend_body.h.
#include <stdlib.h>

#include "attend.h"
#include "registers.h"

#define KEY(p) const SCALAR *k##p = parts[p].k, *next##p = parts[p].next_k; const int64_t stride##p = parts[p].stride;
#define KEYS_1 KEY(0)
#define KEYS_4 KEY(0) KEY(1) KEY(2) KEY(3)
#define ASK(p) __builtin_prefetch(NEXT_AT(p), 0, 2);
#define ASKS_1 ASK(0)
#define ASKS_2 ASKS_1 ASK(1)
#define ASKS_4 ASKS_2 ASK(2) ASK(3)
#define TAKE_UP(p, r) v16 s##p##_##r = load_f(flat + r * STRIDE + p * 16);
#define RESUME_2(r) TAKE_UP(0, r) TAKE_UP(1, r)
#define RESUME_4(r) RESUME_2(r) TAKE_UP(2, r) TAKE_UP(3, r)
// The first of each pair of positions: the second is past the end, and may hold anything.
#define HALF(p) const v16 w##p = (v16)((u16x)load_f((const float *)(WEIGHT_AT(p))) & 0xffff);
#define HALVES_2 HALF(0) HALF(1)
#define HALVES_4 HALVES_2 HALF(2) HALF(3)

enum { MAX_DEPTH = 4096, TILE = 64 };

#define SCALAR float
#define GROUP 1
#define DOT dot_f
#define LOAD load_f
#define STORE store_f
#define TO_F to_f
#define NAME(x) x##_f32
#include "attend_body.h"
#undef SCALAR
#undef GROUP
#undef DOT
#undef LOAD
#undef STORE
#undef TO_F
#undef NAME

#define SCALAR bf16
#define GROUP 2
#define DOT dot_b
#define LOAD load_b
#define STORE store_b
#define TO_F b_to_f
#define NAME(x) x##_bf16
#include "attend_body.h"
