// Linear layers on CPU for fp32 and bf16 storage: see linear_body.h.
#include <omp.h>
#include <stdlib.h>

#include "registers.h"

enum { PARALLEL = 32768 };  // multiplications below which waking the other threads costs more than it saves
enum { ROWS_BYTES = 256 * 1024 };  // of x that stay in a core's second-level cache while all weights pass by

#define SCALAR float
#define GROUP 1
#define DOT dot_f
#define LOAD load_f
#define STORE store_f
#define TO_F to_f
#define FROM_F to_f
#define NAME(x) x##_f32
#include "linear_body.h"
#undef SCALAR
#undef GROUP
#undef DOT
#undef LOAD
#undef STORE
#undef TO_F
#undef FROM_F
#undef NAME

#define SCALAR bf16
#define GROUP 2
#define DOT dot_b
#define LOAD load_b
#define STORE store_b
#define TO_F b_to_f
#define FROM_F f_to_b
#define NAME(x) x##_bf16
#include "linear_body.h"
