// Paged attention on CPU for fp32 and bf16 storage: see attend_body.h.
#include <stdlib.h>

#include "attend.h"
#include "registers.h"

#define KEY(p) const SCALAR *k##p = parts[p].k, *next##p = parts[p].next_k; const int64_t stride##p = parts[p].stride;
#define KEYS_1 KEY(0)
#define KEYS_2 KEY(0) KEY(1)
#define KEYS_4 KEY(0) KEY(1) KEY(2) KEY(3)
#define ASK(p) __builtin_prefetch(NEXT_AT(p), 0, 2);
#define ASKS_1 ASK(0)
#define ASKS_2 ASKS_1 ASK(1)
#define ASKS_4 ASKS_2 ASK(2) ASK(3)
#define RESUME(p, r) vf s##p##_##r = load_f(flat + r * STRIDE + p * LANES);
#define RESUME_2(r) RESUME(0, r) RESUME(1, r)
#define RESUME_4(r) RESUME_2(r) RESUME(2, r) RESUME(3, r)
// The first of each pair of positions: the second is past the end, and may hold anything.
#define HALF(p) const vf w##p = (vf)((vu)load_f((const float *)(WEIGHT_AT(p))) & 0xffff);
#define HALVES_2 HALF(0) HALF(1)
#define HALVES_4 HALVES_2 HALF(2) HALF(3)

enum { TILE = 64, PARTS = TILE / LANES };
enum { KEYS = 1, VALUES = 2 };

// Parts of a tile that hold positions up to its `last`.
static inline int64_t parts_to(int64_t last) { return last < 0 ? 0 : last >= TILE ? PARTS : last / LANES + 1; }

// 2^LOG_WIDE vectors are summed against so many queries at once: what fits into 32 registers, or into 16.
#if FEW_REGISTERS
#define LOG_WIDE(queries) ((queries) <= 2 ? 2 : 1)
#else
#define LOG_WIDE(queries) 2
#endif

#define SCALAR float
#define ROW float
#define GROUP 1
#define DOT dot_f
#define TAKE load_f
#define STORE store_f
#define LOAD_ROW load_f
#define STORE_ROW store_f
#define TO_ROW to_f
#define TO_F to_f
#define NAME(x) x##_f32
#include "attend_body.h"
#undef SCALAR
#undef ROW
#undef GROUP
#undef DOT
#undef TAKE
#undef STORE
#undef LOAD_ROW
#undef STORE_ROW
#undef TO_ROW
#undef TO_F
#undef NAME

#define SCALAR bf16
#define ROW bf16_row
#define GROUP BF16_GROUP
#define DOT dot_b
#define TAKE take_b
#define STORE store_b
#define LOAD_ROW load_row
#define STORE_ROW store_row
#define TO_ROW to_row
#define TO_F b_to_f
#define NAME(x) x##_bf16
#include "attend_body.h"
