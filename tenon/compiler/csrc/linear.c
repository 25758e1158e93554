// Linear layers on CPU for fp32 and bf16 storage: see linear_body.h.
#include <omp.h>
#include <stdlib.h>

#include "registers.h"

enum { PARALLEL = 32768 };  // multiplications below which waking the other threads costs more than it saves
enum { ROWS_BYTES = 256 * 1024 };  // of x that stay in a core's second-level cache while all weights pass by

// Rows of a tile, and 2^LOG_PANELS panels against so many of them: what fits into 32 registers, or into 16.
#if FEW_REGISTERS
enum { MOST_ROWS = 6 };
#define LOG_PANELS(rows) ((rows) <= 1 ? 3 : (rows) <= 3 ? 2 : 1)
#else
enum { MOST_ROWS = 14 };
#define LOG_PANELS(rows) ((rows) <= 3 ? 3 : (rows) <= 6 ? 2 : 1)
#endif

#define SCALAR float
#define ROW float
#define GROUP 1
#define DOT dot_f
#define TAKE load_f
#define LOAD load_f
#define STORE store_f
#define TO_F to_f
#define FROM_F to_f
#define TO_ROW to_f
#define NAME(x) x##_f32
#include "linear_body.h"
#undef SCALAR
#undef ROW
#undef GROUP
#undef DOT
#undef TAKE
#undef LOAD
#undef STORE
#undef TO_F
#undef FROM_F
#undef TO_ROW
#undef NAME

#define SCALAR bf16
#define ROW bf16_row
#define GROUP BF16_GROUP
#define DOT dot_b
#define TAKE take_b
#define LOAD load_b
#define STORE store_b
#define TO_F b_to_f
#define FROM_F f_to_b
#define TO_ROW to_row
#define NAME(x) x##_bf16
#include "linear_body.h"

// How weights and caches lie: outputs of a panel, and bf16 elements that are multiplied as one.
void tenon_layout(int64_t *lanes, int64_t *bf16_group) { *lanes = LANES, *bf16_group = BF16_GROUP; }
