// Norms, rotation and gating on CPU for fp32 and bf16 storage: see rows_body.h.
#include "simd.h"

enum { PARALLEL = 16384 };  // elements below which waking the other threads costs more than it saves

static inline vf clamp88(vf x) { return select_v(x > splat(88.0f), splat(88.0f), x); }

#define SCALAR float
#define LOAD load_f
#define STORE store_f
#define TO_F to_f
#define FROM_F to_f
#define NAME(x) x##_f32
#include "rows_body.h"
#undef SCALAR
#undef LOAD
#undef STORE
#undef TO_F
#undef FROM_F
#undef NAME

#define SCALAR bf16
#define LOAD load_b
#define STORE store_b
#define TO_F b_to_f
#define FROM_F f_to_b
#define NAME(x) x##_bf16
#include "rows_body.h"
