// Linear layers on CPU for fp32 and bf16 storage: see linear_body.h.
#include <omp.h>
#include <stdlib.h>

#include "simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { PARALLEL = 32768 };  // multiplications below which waking the other threads costs more than it saves
enum { ROWS_BYTES = 256 * 1024 };  // of x that stay in a core's second-level cache while all weights pass by
typedef int32_t pair __attribute__((may_alias, aligned(2)));

static inline v16 dot_f(v16 sum, const float *x, v16 w) { return sum + w * *x; }

// Two channels of sixteen outputs.
static inline v16 dot_b(v16 sum, const bf16 *x, v16 w) {
#ifdef __AVX512BF16__
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*(const pair *)x));
#else
    const u16x both = (u16x)w;
    return sum + (v16)(both << 16) * b_to_f(x[0]) + (v16)(both & 0xffff0000) * b_to_f(x[1]);
#endif
}

#define EACH_1(M) M(0)
#define EACH_2(M) EACH_1(M) M(1)
#define EACH_3(M) EACH_2(M) M(2)
#define EACH_4(M) EACH_3(M) M(3)
#define EACH_5(M) EACH_4(M) M(4)
#define EACH_6(M) EACH_5(M) M(5)
#define EACH_7(M) EACH_6(M) M(6)
#define EACH_8(M) EACH_7(M) M(7)
#define EACH_9(M) EACH_8(M) M(8)
#define EACH_10(M) EACH_9(M) M(9)
#define EACH_11(M) EACH_10(M) M(10)
#define EACH_12(M) EACH_11(M) M(11)
#define EACH_13(M) EACH_12(M) M(12)
#define EACH_14(M) EACH_13(M) M(13)

// One row's sums s<panel>_<row>, over 1, 2, 4 or 8 panels.
#define SUM(p, r) v16 s##p##_##r = {};
#define SUMS_1(r) SUM(0, r)
#define SUMS_2(r) SUMS_1(r) SUM(1, r)
#define SUMS_4(r) SUMS_2(r) SUM(2, r) SUM(3, r)
#define SUMS_8(r) SUMS_4(r) SUM(4, r) SUM(5, r) SUM(6, r) SUM(7, r)
#define WEIGHT(p) const v16 w##p = load_f((const float *)(wk + p * 16 * K));
#define WEIGHTS_1 WEIGHT(0)
#define WEIGHTS_2 WEIGHTS_1 WEIGHT(1)
#define WEIGHTS_4 WEIGHTS_2 WEIGHT(2) WEIGHT(3)
#define WEIGHTS_8 WEIGHTS_4 WEIGHT(4) WEIGHT(5) WEIGHT(6) WEIGHT(7)
#define DOTP(p, r) s##p##_##r = DOT(s##p##_##r, x + r * GROUP, w##p);
#define DOTS_1(r) DOTP(0, r)
#define DOTS_2(r) DOTS_1(r) DOTP(1, r)
#define DOTS_4(r) DOTS_2(r) DOTP(2, r) DOTP(3, r)
#define DOTS_8(r) DOTS_4(r) DOTP(4, r) DOTP(5, r) DOTP(6, r) DOTP(7, r)
#define KEEP(p, P, r) store_f(flat + (r * P + p) * 16, s##p##_##r);
#define KEEP_1(r) KEEP(0, 1, r)
#define KEEP_2(r) KEEP(0, 2, r) KEEP(1, 2, r)
#define KEEP_4(r) KEEP(0, 4, r) KEEP(1, 4, r) KEEP(2, 4, r) KEEP(3, 4, r)
#define KEEP_8(r) \
    KEEP(0, 8, r) KEEP(1, 8, r) KEEP(2, 8, r) KEEP(3, 8, r) KEEP(4, 8, r) KEEP(5, 8, r) KEEP(6, 8, r) KEEP(7, 8, r)

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
