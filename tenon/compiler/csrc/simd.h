// Vectors of fp32 in GCC's vector extensions, as wide as a register: AVX-512, AVX, NEON and SSE from one source.
// A wider type than the processor's registers would live in memory: products ran at a tenth of their rate.
// Kernels know no torch; they take pointers and sizes. bf16 is stored, fp32 is computed.
#ifndef TENON_SIMD_H
#define TENON_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#define FEW_REGISTERS 0
#elif defined(__AVX__)
enum { LANES = 8 };
#define FEW_REGISTERS 1
#else
enum { LANES = 4 };
#define FEW_REGISTERS 1
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

static inline vf splat(float x) { return x - (vf){}; }
static inline vf load_f(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store_f(float *p, vf v) { memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the processor can. Written out, and contraction forbidden: left to itself, gcc fuses in
// some loops and not in others (for Zen 2 and 3, not where sums wait for each other), and a row's bits would depend on
// how many rows are computed beside it.
static inline vf muladd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline vi lane_numbers(void) {
    static const int32_t number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi v;
    memcpy(&v, number, sizeof v);
    return v;
}

static inline vf load_b(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const vu w = (vu)_mm256_cvtepu16_epi32((__m128i)h) << 16;  // gcc makes five instructions of the conversion
#else
    const vu w = __builtin_convertvector(h, vu) << 16;
#endif
    return (vf)w;
}

static inline vf select_v(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// Round to nearest even; a NaN stays one.
static inline void store_b(bf16 *p, vf v) {
    vu w = (vu)v;
    vu rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    vh h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
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

static inline v4 half4(v8 v, int hi) { v4 h; memcpy(&h, (const char *)&v + 16 * hi, sizeof h); return h; }
#if defined(__AVX512F__)
static inline v8 half8(vf v, int hi) { v8 h; memcpy(&h, (const char *)&v + 32 * hi, sizeof h); return h; }
#endif
static inline v4 max4(v4 a, v4 b) { const i4 m = a > b; return (v4)((m & (i4)a) | (~m & (i4)b)); }

static inline float sum_v(vf v) {
#if defined(__AVX512F__)
    const v8 a = half8(v, 0) + half8(v, 1);
    const v4 b = half4(a, 0) + half4(a, 1);
#elif defined(__AVX__)
    const v4 b = half4(v, 0) + half4(v, 1);
#else
    const v4 b = v;
#endif
    const v4 c = b + __builtin_shuffle(b, (i4){2, 3, 0, 1});
    return c[0] + c[1];
}

static inline float max_lanes(vf v) {
#if defined(__AVX512F__)
    const v8 lo = half8(v, 0), hi = half8(v, 1);
    const v4 a = max4(max4(half4(lo, 0), half4(lo, 1)), max4(half4(hi, 0), half4(hi, 1)));
#elif defined(__AVX__)
    const v4 a = max4(half4(v, 0), half4(v, 1));
#else
    const v4 a = v;
#endif
    const v4 b = max4(a, __builtin_shuffle(a, (i4){2, 3, 0, 1}));
    return b[0] > b[1] ? b[0] : b[1];
}

// Whether a lane of a mask is set.
static inline int any_v(vi m) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX__)
    return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
    return (m[0] | m[1] | m[2] | m[3]) != 0;
#endif
}

static inline vf max_v(vf a, vf b) { return select_v(a > b, a, b); }

// exp of x <= 88, about 2 ulp; 0 below -87.
static inline vf exp_v(vf x) {
    const vi tiny = x < splat(-87.0f);
    x = select_v(tiny, splat(-87.0f), x);
    vf shifted = muladd(x, splat(1.44269504f), splat(12582912.0f));  // adding 1.5 * 2^23 rounds to an integer
    vf n = shifted - 12582912.0f;
    vf r = muladd(n, splat(-0.693359375f), x);
    r = muladd(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = muladd(p, r, splat(1.3981999507e-3f));
    p = muladd(p, r, splat(8.3334519073e-3f));
    p = muladd(p, r, splat(4.1665795894e-2f));
    p = muladd(p, r, splat(1.6666665459e-1f));
    p = muladd(p, r, splat(5.0000001201e-1f));
    p = muladd(p, r * r, r) + 1.0f;
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    vf y = p * (vf)exponent;
    return select_v(tiny, (vf){}, y);
}

#endif
