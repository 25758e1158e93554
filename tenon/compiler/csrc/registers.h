// Blocks of sums that stay in registers: rows r against panels p, in named variables, since compilers do not keep arrays
// of this size in registers. The includer defines WEIGHT_AT(p), the next lanes of panel p, ROW_AT(r), the element (or
// pair) of row r that meets them, TAKE(p), the lanes at p, and DOT(sum, row, lanes).
//
// Where the processor has dot products of bf16 pairs, bf16 is stored in pairs and rows meet them as stored: GROUP is 2.
// Elsewhere rows are widened to fp32 once, and weights as they are read.
#ifndef TENON_REGISTERS_H
#define TENON_REGISTERS_H

#include "simd.h"

static inline vf dot_f(vf sum, const float *x, vf w) { return muladd(w, splat(*x), sum); }

#ifdef __AVX512BF16__
typedef int32_t pair __attribute__((may_alias, aligned(2)));
typedef bf16 bf16_row;
enum { BF16_GROUP = 2 };

// Two channels of sixteen lanes.
static inline vf dot_b(vf sum, const bf16 *x, vf w) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*(const pair *)x));
}
static inline vf take_b(const bf16 *p) { return load_f((const float *)p); }
static inline vf load_row(const bf16 *p) { return load_b(p); }
static inline void store_row(bf16 *p, vf v) { store_b(p, v); }
static inline bf16 to_row(bf16 x) { return x; }
#else
typedef float bf16_row;
enum { BF16_GROUP = 1 };
#define dot_b dot_f
#define take_b load_b
#define load_row load_f
#define store_row store_f
#define to_row b_to_f
#endif

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

// s<panel>_<row>, over 1, 2, 4 or 8 panels.
#define SUM(p, r) vf s##p##_##r = {};
#define SUMS_1(r) SUM(0, r)
#define SUMS_2(r) SUMS_1(r) SUM(1, r)
#define SUMS_4(r) SUMS_2(r) SUM(2, r) SUM(3, r)
#define SUMS_8(r) SUMS_4(r) SUM(4, r) SUM(5, r) SUM(6, r) SUM(7, r)
#define WEIGHT(p) const vf w##p = TAKE(WEIGHT_AT(p));
#define WEIGHTS_1 WEIGHT(0)
#define WEIGHTS_2 WEIGHTS_1 WEIGHT(1)
#define WEIGHTS_4 WEIGHTS_2 WEIGHT(2) WEIGHT(3)
#define WEIGHTS_8 WEIGHTS_4 WEIGHT(4) WEIGHT(5) WEIGHT(6) WEIGHT(7)
#define ADD(p, r) s##p##_##r = DOT(s##p##_##r, ROW_AT(r), w##p);
#define ADDS_1(r) ADD(0, r)
#define ADDS_2(r) ADDS_1(r) ADD(1, r)
#define ADDS_4(r) ADDS_2(r) ADD(2, r) ADD(3, r)
#define ADDS_8(r) ADDS_4(r) ADD(4, r) ADD(5, r) ADD(6, r) ADD(7, r)
// into `flat`, rows STRIDE apart
#define KEEP(p, r) store_f(flat + r * STRIDE + p * LANES, s##p##_##r);
#define KEEP_1(r) KEEP(0, r)
#define KEEP_2(r) KEEP_1(r) KEEP(1, r)
#define KEEP_4(r) KEEP_2(r) KEEP(2, r) KEEP(3, r)
#define KEEP_8(r) KEEP_4(r) KEEP(4, r) KEEP(5, r) KEEP(6, r) KEEP(7, r)

#endif
