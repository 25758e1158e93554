// Sixteen lanes of fp32 in GCC's vector extensions: AVX-512, AVX2 and NEON from one source.
// Kernels know no torch; they take pointers and sizes. bf16 is stored, fp32 is computed.
#ifndef TENON_SIMD_H
#define TENON_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16x __attribute__((vector_size(64)));
typedef uint32_t u16x __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

static inline v16 splat(float x) { return (v16){} + x; }
static inline v16 load_f(const float *p) { v16 v; memcpy(&v, p, sizeof v); return v; }
static inline void store_f(float *p, v16 v) { memcpy(p, &v, sizeof v); }

static inline v16 load_b(const bf16 *p) {
    h16 h;
    memcpy(&h, p, sizeof h);
    u16x w = __builtin_convertvector(h, u16x) << 16;
    return (v16)w;
}

static inline v16 select16(i16x mask, v16 yes, v16 no) { return (v16)((mask & (i16x)yes) | (~mask & (i16x)no)); }

// Round to nearest even; a NaN stays one.
static inline void store_b(bf16 *p, v16 v) {
    u16x w = (u16x)v;
    u16x rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    u16x nan = (u16x)(v != v);
    h16 h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), h16);
    memcpy(p, &h, sizeof h);
}

static inline float to_f(float x) { return x; }
static inline float b_to_f(bf16 x) { uint32_t w = (uint32_t)x << 16; float f; memcpy(&f, &w, 4); return f; }
static inline bf16 f_to_b(float f) {
    uint32_t w;
    if (f != f) return 0x7fc0;
    memcpy(&w, &f, 4);
    return (bf16)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

// Lane sums and maxima in one fixed tree of in-register shuffles: a row's bits depend on nothing but the row.
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

static inline v8 half8(v16 v, int hi) { v8 h; memcpy(&h, (const char *)&v + 32 * hi, sizeof h); return h; }
static inline v4 half4(v8 v, int hi) { v4 h; memcpy(&h, (const char *)&v + 16 * hi, sizeof h); return h; }
static inline v4 max4(v4 a, v4 b) { const i4 m = a > b; return (v4)((m & (i4)a) | (~m & (i4)b)); }

static inline float sum16(v16 v) {
    const v8 a = half8(v, 0) + half8(v, 1);
    const v4 b = half4(a, 0) + half4(a, 1);
    const v4 c = b + __builtin_shuffle(b, (i4){2, 3, 0, 1});
    return c[0] + c[1];
}

static inline float max16(v16 v) {
    const v8 lo = half8(v, 0), hi = half8(v, 1);
    const v4 a = max4(max4(half4(lo, 0), half4(lo, 1)), max4(half4(hi, 0), half4(hi, 1)));
    const v4 b = max4(a, __builtin_shuffle(a, (i4){2, 3, 0, 1}));
    return b[0] > b[1] ? b[0] : b[1];
}

static inline v16 max_v(v16 a, v16 b) { return select16(a > b, a, b); }

// exp of x <= 88, about 2 ulp; 0 below -87.
static inline v16 exp16(v16 x) {
    const i16x tiny = x < splat(-87.0f);
    x = select16(tiny, splat(-87.0f), x);
    v16 shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    v16 n = shifted - 12582912.0f;
    v16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    v16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    i16x exponent = (__builtin_convertvector(n, i16x) + 127) << 23;
    v16 y = p * (v16)exponent;
    return select16(tiny, (v16){}, y);
}

#endif
