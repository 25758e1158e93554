// The row-wise kernels, attention and the linear layer, per storage type; see the *_body.h that define them.
#ifndef TENON_KERNELS_H
#define TENON_KERNELS_H

#include "attend.h"
#include "simd.h"

#define DECLARE(SCALAR, x)                                                                                           \
    void tenon_norm_##x(const SCALAR *, const SCALAR *weight, float eps, int64_t rows, int64_t n, SCALAR *out);      \
    void tenon_add_norm_##x(                                                                                         \
        SCALAR *h, const SCALAR *delta, const SCALAR *weight, float eps, int64_t rows, int64_t n, SCALAR *out);      \
    void tenon_heads_##x(                                                                                            \
        const SCALAR *qkv, const SCALAR *q_norm, const SCALAR *k_norm, float eps, const float *cosine,               \
        const float *sine, int64_t rows, int64_t H, int64_t G, int64_t D, SCALAR *q, SCALAR *k, SCALAR *v);          \
    void tenon_swiglu_##x(const SCALAR *, int64_t rows, int64_t F, SCALAR *out);                                     \
    int tenon_linear_##x(                                                                                            \
        const SCALAR *, const SCALAR *packed, const SCALAR *bias, int64_t rows, int64_t K, int64_t N, SCALAR *out);  \
    int tenon_attend_##x(                                                                                            \
        const attend_step *, float scale, const SCALAR *q, const SCALAR *k, const SCALAR *v, SCALAR *kc, SCALAR *vc, \
        SCALAR *out);
DECLARE(float, f32)
DECLARE(bf16, bf16)
#undef DECLARE

#endif
