// Paged attention on CPU for fp32 and bf16 storage: see attend_body.h.
#include <stdlib.h>

#include "attend.h"
#include "simd.h"

enum { MAX_DEPTH = 4096, TILE = 64 };

#define SCALAR float
#define LOAD load_f
#define STORE store_f
#define TO_F to_f
#define NAME(x) x##_f32
#include "attend_body.h"
#undef SCALAR
#undef LOAD
#undef STORE
#undef TO_F
#undef NAME

#define SCALAR bf16
#define LOAD load_b
#define STORE store_b
#define TO_F b_to_f
#define NAME(x) x##_bf16
#include "attend_body.h"
