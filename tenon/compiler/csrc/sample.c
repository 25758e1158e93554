// The one randomness rule on CPU: Gumbel-max with Philox4x32-10 noise, fp64. Agrees with base/philox.py.
#include <omp.h>

#include "simd.h"

enum {
    PARALLEL = 8192,        // logits of a step below which waking the other threads costs more than it saves,
    PARALLEL_VOCAB = 32768  // and of a single output
};

// What is said of an output: a token from 0 on, or one of these. The same numbers stand in engine/sampling.py.
enum { REFUSED = -1, WRONG = -3, WANTED = -4 };

typedef struct {
    uint64_t seed;
    float temperature;
    uint32_t sample, position;
    int32_t guess_of, guess;
    int32_t begins;  // scratch: no output from here on guesses one before
} draw;

typedef struct {
    double score;
    int64_t id;
} choice;

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

enum { TOGETHER = 64 };  // tokens whose noise is made side by side

// A word in the lower half of 64 bits, which is what the multiplication takes.
enum { WIDE = LANES / 2, VECTORS = TOGETHER / 4 / WIDE };
typedef uint64_t wide __attribute__((vector_size(8 * WIDE)));

static inline wide product(wide a, uint64_t b) {
#if defined(__AVX512F__)
    return (wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((int64_t)b));
#elif defined(__AVX2__)
    return (wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((int64_t)b));
#else
    return a * b;
#endif
}

// The words of as many neighbouring tokens, the first of which is 4 * first.
static void noise_words(uint32_t first, const draw *d, uint32_t out[TOGETHER]) {
    wide c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        for (int l = 0; l < WIDE; l++) c0[v][l] = (uint32_t)(first + v * WIDE + l);
        c1[v] = (wide){} + d->position, c2[v] = (wide){} + d->sample, c3[v] = (wide){};
    }
    uint32_t k0 = (uint32_t)d->seed, k1 = (uint32_t)(d->seed >> 32);
    for (int i = 0; i < 10; i++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int v = 0; v < VECTORS; v++) {
            const wide p0 = product(c0[v], 0xD2511F53u), p1 = product(c2[v], 0xCD9E8D57u);
            c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
            c1[v] = p1 & 0xFFFFFFFFu;
            c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
            c3[v] = p0 & 0xFFFFFFFFu;
        }
    for (int v = 0; v < VECTORS; v++)
        for (int l = 0; l < WIDE; l++) {
            uint32_t *at = out + 4 * (v * WIDE + l);
            at[0] = (uint32_t)c0[v][l], at[1] = (uint32_t)c1[v][l], at[2] = (uint32_t)c2[v][l], at[3] = (uint32_t)c3[v][l];
        }
}

static double gumbel(uint32_t r) { return -log(-log1p(-(((double)r + 0.5) * 0x1p-32))); }

static const float GUMBEL_MAX = 22.88f;

// No less than each word's noise, and at most 0.07 more: noise is at most -log u, and between powers of two a float's
// bits rise from one logarithm to the next in a straight line that lies below the curve.
static inline vf most_noise(const uint32_t *word) {
    vu r;
    memcpy(&r, word, sizeof r);
    const vf bits = __builtin_convertvector((vi)(vf)__builtin_convertvector((vi)(r >> 1), vf), vf);
    return (splat(158.0f) - bits * 0x1p-23f) * 0.69314724f;
}

#define SCALAR float
#define LOAD load_f
#define TO_F to_f
#define NAME(x) x##_f32
#include "sample_body.h"
#undef SCALAR
#undef LOAD
#undef TO_F
#undef NAME

#define SCALAR bf16
#define LOAD load_b
#define TO_F b_to_f
#define NAME(x) x##_bf16
#include "sample_body.h"

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
    const draw d = {seed, temperature, sample, position};
    for (int64_t first = 0; first < vocab; first += TOGETHER) {
        const int64_t end = first + TOGETHER < vocab ? first + TOGETHER : vocab;
        uint32_t word[TOGETHER];
        noise_words((uint32_t)(first / 4), &d, word);
        for (int64_t i = first; i < end; i++) {
            if (logit[i] == -INFINITY) continue;
            const uint32_t r = word[i - first];
            // With u >= 2^-(z+1), z the leading zeros of the word, the noise is at most (z + 1) ln 2.
            const int zeros = r ? __builtin_clz(r) : 32;
            if (n == k && (double)logit[i] * inverse + (zeros + 1) * 0.6931471806 <= scores[n - 1] - 1e-3) continue;
            const double score = (double)logit[i] / t + gumbel(r);
            if (n < k || score > scores[n - 1]) keep(score, (int32_t)i, k, &n, ids, scores);
        }
    }
    return n;
}
