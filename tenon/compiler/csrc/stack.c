// All layers of a decoder in one call for fp32 and bf16 storage: see stack_body.h.
#include "kernels.h"
#include "stack.h"

// Bytes of scratch for T rows. Each array starts on a cache line.
static inline int64_t line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

#define SCALAR float
#define TO_F to_f
#define FROM_F to_f
#define NAME(x) x##_f32
#include "stack_body.h"
#undef SCALAR
#undef TO_F
#undef FROM_F
#undef NAME

#define SCALAR bf16
#define TO_F b_to_f
#define FROM_F f_to_b
#define NAME(x) x##_bf16
#include "stack_body.h"
