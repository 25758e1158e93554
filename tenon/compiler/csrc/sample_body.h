// Included once per storage type with SCALAR, LOAD, TO_F, NAME(x) defined.

// The largest of row[from, to); NaN where one is.
static float NAME(largest)(const SCALAR *row, int64_t from, int64_t to) {
    vf top = splat(-INFINITY);
    vi nan = {};
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        const vf v = LOAD(row + i);
        top = max_v(v, top);
        nan |= v != v;
    }
    float best = max_lanes(top);
    int bad = any_v(nan);
    for (; i < to; i++) {
        const float v = TO_F(row[i]);
        if (v > best) best = v;
        bad |= v != v;
    }
    return bad ? NAN : best;
}

static int64_t NAME(best_id)(const SCALAR *row, int64_t vocab) {
    const float best = NAME(largest)(row, 0, vocab);
    if (!isfinite(best)) return REFUSED;
    for (int64_t i = 0; i < vocab; i++)
        if (TO_F(row[i]) == best) return i;
    return REFUSED;
}

// The best of row[from, to) by logit / temperature + noise, of equals the first, where it beats `choice`, which it
// replaces. `from` is a multiple of TOGETHER, `top` the largest logit of the whole row.
static void NAME(choose)(
    const SCALAR *row, int64_t from, int64_t to, float top, const draw *d, choice *best) {
    const double t = d->temperature, inverse = 1 / t;
    const float low = (float)(top - 26.03 * t);
    for (int64_t first = from; first < to; first += TOGETHER) {
        const int64_t n = to - first < TOGETHER ? to - first : TOGETHER;
        float logit[TOGETHER];
        vf most = splat(-INFINITY);
        for (int64_t i = 0; i < TOGETHER; i += LANES) {
            vf v = splat(-INFINITY);
            if (i + LANES <= n)
                v = LOAD(row + first + i);
            else
                for (int64_t k = 0; i + k < n; k++) v[k] = TO_F(row[first + i + k]);
            store_f(logit + i, v);
            most = max_v(v, most);
        }
        const float here = max_lanes(most);
        if (here < low || here * inverse + GUMBEL_MAX <= best->score) continue;
        uint32_t word[TOGETHER];
        noise_words((uint32_t)(first / 4), d, word);
        // What is left of these is near: most need no logarithm.
        const double bar = best->score - 0.01 - 1e-6 * fabs(best->score);
        for (int64_t i = 0; i < n; i += LANES) {
            const vf most_possible = load_f(logit + i) * (float)inverse + most_noise(word + i);
            if (!any_v(~(most_possible <= splat((float)bar)))) continue;
            for (int64_t k = i; k < i + LANES && k < n; k++) {
                if (logit[k] < low || most_possible[k - i] <= (float)bar) continue;
                const double score = (double)logit[k] / t + gumbel(word[k]);
                if (score > best->score) *best = (choice){score, first + k};
            }
        }
    }
}

// One output's token. `wide`: all threads at once, each a part of the vocabulary.
static int64_t NAME(sample)(const SCALAR *row, int64_t vocab, const draw *d, int wide) {
    if (d->temperature == 0) return NAME(best_id)(row, vocab);
    choice best = {-INFINITY, REFUSED};
    const float top = NAME(largest)(row, 0, vocab);
    if (!isfinite(top)) return REFUSED;
    if (!wide) {
        NAME(choose)(row, 0, vocab, top, d, &best);
        return best.id;
    }
#pragma omp parallel
    {
        const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
        const int64_t groups = (vocab + TOGETHER - 1) / TOGETHER;
        const int64_t from = groups * i / n * TOGETHER, end = groups * (i + 1) / n * TOGETHER;
        choice mine = {-INFINITY, REFUSED};
        NAME(choose)(row, from, end < vocab ? end : vocab, top, d, &mine);
#pragma omp critical(tenon_sample)
        if (mine.score > best.score || (mine.score == best.score && mine.id < best.id)) best = mine;
    }
    return best.id;
}

// Tokens of a step's outputs. `guess_of` is the earlier output whose token `guess` guesses, -1: none; a wrong guess's
// output is not sampled (WRONG). Outputs whose `out` is not WANTED are left as they are.
void NAME(tenon_sample)(const SCALAR *logits, int64_t rows, int64_t vocab, draw *draws, int64_t *out) {
    int64_t n_families = 0, first = rows;
    for (int64_t r = rows - 1; r >= 0; r--) {
        if (draws[r].guess_of >= 0 && draws[r].guess_of < first) first = draws[r].guess_of;
        n_families += draws[r].begins = r <= first;
    }
    const int together = n_families > 1 && rows * vocab > PARALLEL;
    const int wide = !together && vocab > PARALLEL_VOCAB;
#pragma omp parallel for schedule(dynamic, 1) if (together)
    for (int64_t begin = 0; begin < rows; begin++) {
        if (!draws[begin].begins) continue;
        for (int64_t r = begin; r == begin || (r < rows && !draws[r].begins); r++) {
            if (out[r] != WANTED) continue;
            const int64_t before = draws[r].guess_of;
            if (before >= 0 && out[before] != draws[r].guess)
                out[r] = WRONG;
            else
                out[r] = NAME(sample)(logits + r * vocab, vocab, draws + r, wide);
        }
    }
}
