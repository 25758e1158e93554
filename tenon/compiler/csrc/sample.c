// The one randomness rule on CPU: Gumbel-max with Philox4x32-10 noise, fp64. Agrees with base/philox.py.
#include "simd.h"

enum { PARALLEL = 65536 };

#define SCALAR float
#define LOAD load_f
#define TO_F to_f
#define NAME(x) x##_f32
#include "argmax_body.h"
#undef SCALAR
#undef LOAD
#undef TO_F
#undef NAME

#define SCALAR bf16
#define LOAD load_b
#define TO_F b_to_f
#define NAME(x) x##_bf16
#include "argmax_body.h"

static void philox(const uint32_t counter[4], uint64_t seed, uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

static double gumbel(uint32_t r) { return -log(-log1p(-(((double)r + 0.5) * 0x1p-32))); }

// Noise of n tokens at one output position.
void tenon_noise(uint64_t seed, uint32_t sample, uint32_t position, const int64_t *token, int64_t n, double *out) {
    uint32_t word[4] = {0};
    int64_t group = -1;
    for (int64_t i = 0; i < n; i++) {
        if (token[i] >> 2 != group) {
            group = token[i] >> 2;
            philox((uint32_t[4]){(uint32_t)group, position, sample, 0}, seed, word);
        }
        out[i] = gumbel(word[token[i] & 3]);
    }
}

// argmax over the vocabulary of logit / temperature + noise; -1 if none is finite or one is NaN.
// With u >= 2^-(z+1), z the leading zeros of the word, the noise is at most (z + 1) ln 2: most tokens need no logarithm.
int64_t tenon_choose(
    const float *logit, int64_t vocab, float temperature, uint64_t seed, uint32_t sample, uint32_t position) {
    float best_logit = -INFINITY;
    int nan = 0;
    for (int64_t i = 0; i < vocab; i++) {
        best_logit = logit[i] > best_logit ? logit[i] : best_logit;
        nan |= logit[i] != logit[i];
    }
    if (nan || !isfinite(best_logit)) return -1;
    const double t = temperature;
    const float low = (float)(best_logit - 26.03 * t);
    double best = -INFINITY;
    int64_t id = -1;
    for (int64_t group = 0; group * 4 < vocab; group++) {
        uint32_t word[4];
        int drawn = 0;
        for (int64_t i = group * 4; i < vocab && i < group * 4 + 4; i++) {
            if (logit[i] < low) continue;
            if (!drawn) philox((uint32_t[4]){(uint32_t)group, position, sample, 0}, seed, word), drawn = 1;
            const uint32_t r = word[i & 3];
            const double x = (double)logit[i] / t;
            const int zeros = r ? __builtin_clz(r) : 32;
            if (x + (zeros + 1) * 0.6931471806 <= best) continue;
            const double score = x + gumbel(r);
            if (score > best) best = score, id = i;
        }
    }
    return id;
}
