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

enum { TOGETHER = 16 };

// The same of as many neighbouring counters side by side: lane l has first + l. out[w][l] is word w.
static void philox_many(uint32_t first, uint32_t position, uint32_t sample, uint64_t seed, uint32_t out[4][TOGETHER]) {
#ifdef __AVX2__
    // A word in the lower half of 64 bits, which is what the multiplication takes.
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53u), m1 = _mm256_set1_epi64x(0xCD9E8D57u);
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFFu);
    __m256i c0[TOGETHER / 4], c1[TOGETHER / 4], c2[TOGETHER / 4], c3[TOGETHER / 4];
    for (int v = 0; v < TOGETHER / 4; v++) {
        c0[v] = _mm256_set_epi64x(first + 4 * v + 3, first + 4 * v + 2, first + 4 * v + 1, first + 4 * v);
        c1[v] = _mm256_set1_epi64x(position), c2[v] = _mm256_set1_epi64x(sample), c3[v] = _mm256_setzero_si256();
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        for (int v = 0; v < TOGETHER / 4; v++) {
            const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
            c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[v]), key0);
            c1[v] = _mm256_and_si256(p1, low);
            c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[v]), key1);
            c3[v] = _mm256_and_si256(p0, low);
        }
    }
    for (int v = 0; v < TOGETHER / 4; v++) {
        uint64_t lanes[4][4];
        _mm256_storeu_si256((__m256i *)lanes[0], c0[v]), _mm256_storeu_si256((__m256i *)lanes[1], c1[v]);
        _mm256_storeu_si256((__m256i *)lanes[2], c2[v]), _mm256_storeu_si256((__m256i *)lanes[3], c3[v]);
        for (int w = 0; w < 4; w++)
            for (int l = 0; l < 4; l++) out[w][4 * v + l] = (uint32_t)lanes[w][l];
    }
#else
    for (int l = 0; l < TOGETHER; l++) {
        uint32_t word[4];
        philox((uint32_t[4]){first + l, position, sample, 0}, seed, word);
        for (int w = 0; w < 4; w++) out[w][l] = word[w];
    }
#endif
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
    const double t = temperature, inverse = 1 / t;
    const float low = (float)(best_logit - 26.03 * t);
    double best = -INFINITY;
    int64_t id = -1;
    for (int64_t first = 0; first < vocab; first += 4 * TOGETHER) {
        const int64_t end = first + 4 * TOGETHER < vocab ? first + 4 * TOGETHER : vocab;
        float most = logit[first];
        for (int64_t i = first + 1; i < end; i++) most = logit[i] > most ? logit[i] : most;
        if (most < low) continue;
        uint32_t word[4][TOGETHER];
        philox_many((uint32_t)(first / 4), position, sample, seed, word);
        for (int64_t i = first; i < end; i++) {
            if (logit[i] < low) continue;
            const uint32_t r = word[i & 3][(i - first) >> 2];
            const int zeros = r ? __builtin_clz(r) : 32;
            if ((double)logit[i] * inverse + (zeros + 1) * 0.6931471806 <= best - 1e-3) continue;
            const double score = (double)logit[i] / t + gumbel(r);
            if (score > best) best = score, id = i;
        }
    }
    return id;
}

enum { MOST_BEST = 64 };

static void keep(double score, int32_t token, int64_t k, int64_t *n, int32_t *ids, double *scores) {
    int64_t at = *n < k ? (*n)++ : k - 1;
    for (; at > 0 && scores[at - 1] < score; at--) scores[at] = scores[at - 1], ids[at] = ids[at - 1];
    scores[at] = score, ids[at] = token;
}

// The k best tokens by what they would be chosen by, best first, of equals the smaller: logit / temperature + noise; at
// temperature 0 log-probabilities. Returns how many there are, none where one is NaN or none is finite.
int64_t tenon_best(
    const float *logit, int64_t vocab, int64_t k, float temperature, uint64_t seed, uint32_t sample, uint32_t position,
    int32_t *ids, double *scores) {
    float top = -INFINITY;
    int nan = 0;
    for (int64_t i = 0; i < vocab; i++) {
        top = logit[i] > top ? logit[i] : top;
        nan |= logit[i] != logit[i];
    }
    if (nan || !isfinite(top) || k > MOST_BEST) return 0;
    int64_t n = 0;
    if (temperature == 0) {
        double all = 0;
        for (int64_t i = 0; i < vocab; i++) all += expf(logit[i] - top);
        for (int64_t i = 0; i < vocab; i++)
            if (logit[i] > -INFINITY && (n < k || logit[i] > scores[n - 1])) keep(logit[i], (int32_t)i, k, &n, ids, scores);
        for (int64_t j = 0; j < n; j++) scores[j] -= top + log(all);
        return n;
    }
    const double t = temperature, inverse = 1 / t;
    for (int64_t first = 0; first < vocab; first += 4 * TOGETHER) {
        const int64_t end = first + 4 * TOGETHER < vocab ? first + 4 * TOGETHER : vocab;
        uint32_t word[4][TOGETHER];
        philox_many((uint32_t)(first / 4), position, sample, seed, word);
        for (int64_t i = first; i < end; i++) {
            if (logit[i] == -INFINITY) continue;
            const uint32_t r = word[i & 3][(i - first) >> 2];
            const int zeros = r ? __builtin_clz(r) : 32;
            if (n == k && (double)logit[i] * inverse + (zeros + 1) * 0.6931471806 <= scores[n - 1] - 1e-3) continue;
            const double score = (double)logit[i] / t + gumbel(r);
            if (n < k || score > scores[n - 1]) keep(score, (int32_t)i, k, &n, ids, scores);
        }
    }
    return n;
}
