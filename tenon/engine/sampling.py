"""From logits to a token by the one randomness rule: numpy, fp64 where it decides, torch-free.

Temperature first, then top-k, top-p, min-p (each on what the one before left, as Hugging Face orders them), then
Gumbel-max with Philox noise over what survived (see :mod:`tenon.base.philox`). Temperature 0 takes the best logit,
the smaller id where two are equal.

Shapes: R outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tenon.base import philox
from tenon.engine.step import EDIT_ADD, EDIT_BAN, F32, SAMPLE, SCORE, Params, Step, StepResult, guesses

Noise = Callable[[int, int, int, NDArray[np.int64]], NDArray[np.float64]]
Best = Callable[[NDArray[np.float32], int, float, int, int, int], tuple[NDArray[np.int32], NDArray[np.float64]]]

REFUSED, UNKNOWN, WRONG, WANTED = -1, -2, -3, -4
"""Instead of an output's token: no logit is finite or one is NaN; nobody has looked; its own token was a wrong guess,
so nobody will; somebody should. The same numbers stand in sample.c."""
IMPOSSIBLE = "no token has a finite logit"


def survivors(logits_V: NDArray[np.floating], params: Params, p: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and tempered logits of the tokens that the filters of parameter row ``p`` leave."""
    best = logits_V.max()
    if not np.isfinite(best):
        raise ValueError(IMPOSSIBLE)
    temperature = float(params.temperature[p])
    # What lies further below the best than the noise can lift is out whatever the noise is.
    reach = (philox.GUMBEL_MAX - philox.GUMBEL_MIN) * temperature
    ids = np.flatnonzero(logits_V >= best - reach)
    top_k, top_p, min_p = int(params.top_k[p]), float(params.top_p[p]), float(params.min_p[p])
    if top_p < 1.0 or min_p > 0.0:
        ids = np.flatnonzero(logits_V > -np.inf)
    x = logits_V[ids].astype(np.float64) / temperature
    if 0 < top_k < len(ids):
        keep = x >= np.partition(x, len(x) - top_k)[len(x) - top_k]
        ids, x = ids[keep], x[keep]
    if top_p < 1.0:
        order = np.argsort(-x, kind="stable")
        prob = np.exp(x[order] - x[order[0]])
        before = np.cumsum(prob) - prob
        keep = np.sort(order[before < top_p * prob.sum()])
        ids, x = ids[keep], x[keep]
    if min_p > 0.0:
        keep = x >= x.max() + np.log(min_p)
        ids, x = ids[keep], x[keep]
    return ids, x


def choose(logits_V: F32, step: Step, r: int, noise: Noise = philox.noise) -> int:
    """The token of output ``r``. Raises ``ValueError`` where no token is allowed."""
    p = int(step.params_index[r])
    if step.params.temperature[p] == 0:
        best = int(np.argmax(logits_V))
        if not np.isfinite(logits_V[best]):
            raise ValueError(IMPOSSIBLE)
        return best
    key = int(step.params.seed[p]), int(step.params.sample[p]), int(step.out_position[r])
    ids, x = survivors(logits_V, step.params, p)
    if len(ids) == 1:
        return int(ids[0])
    g = noise(*key, ids)
    return int(ids[np.argmax(x + g)])


def edited(logits_V: F32, step: Step, r: int) -> F32:
    """The row's logits after its bit mask and edits; the same array where it has none."""
    mask = int(step.bitmask_index[r])
    start, end = int(step.edit_start[r]), int(step.edit_start[r + 1])
    if mask < 0 and start == end:
        return logits_V
    out = logits_V.copy()
    if mask >= 0:
        bits = np.unpackbits(step.bitmask[mask].view(np.uint8), bitorder="little", count=len(out))
        out[bits == 0] = -np.inf
    if start == end:
        return out
    borders = start + 1 + np.flatnonzero(np.diff(step.edit_kind[start:end]))
    for at, until in pairwise((start, *borders.tolist(), end)):
        tokens, values, kind = step.edit_token[at:until], step.edit_value[at:until], step.edit_kind[at]
        if kind == EDIT_ADD:
            np.add.at(out, tokens, values)
        elif kind == EDIT_BAN:
            out[tokens] = -np.inf
        else:
            x = out[tokens]
            out[tokens] = np.where(x > 0, x / values, x * values)
    return out


def log_softmax(logits_V: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities (V,) in fp64."""
    x = logits_V.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def is_plain(step: Step, n: int) -> NDArray[np.bool_]:
    """(n,) which of the first outputs are sampled from the logits as they are, without mask, edits or filters."""
    plain = step.params.unfiltered[step.params_index[:n]] & (step.want[:n] & SAMPLE > 0)
    if len(step.bitmask):
        plain &= step.bitmask_index[:n] < 0
    if len(step.edit_token):
        plain &= step.edit_start[1 : n + 1] == step.edit_start[:n]
    return np.asarray(plain)


def needs_logits(step: Step, found_R: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which outputs are not settled by what was found of them."""
    n = len(found_R)
    needed = found_R == UNKNOWN
    if step.params.most_logprobs >= 0:
        needed |= (step.params.n_logprobs[step.params_index[:n]] >= 0) & (found_R >= 0)
    scored = step.want[:n] & SCORE > 0
    return np.asarray(needed | (scored & (found_R >= 0)) if scored.any() else needed)


def sample_rows(
    step: Step, logits_RV: F32, noise: Noise | None = None, found_R: NDArray[np.int64] | None = None
) -> StepResult:
    """Choose a token for each output that wants one; log-probabilities are of the unprocessed logits.

    ``logits_RV`` may lack the step's last outputs: nothing is found out about those. ``noise`` is a backend's quicker
    way to the same numbers, ``found_R`` what it knows of outputs already (REFUSED, UNKNOWN, WRONG); logits of width 0
    say that no more is needed. A row that cannot be sampled is an error of its sequence alone, and one whose token
    turns out to be a wrong guess is not sampled.
    """
    result = StepResult.nothing(step, max(0, step.params.most_logprobs))
    n = len(logits_RV)
    if found_R is None:
        found_R = np.full(n, UNKNOWN)
    result.ids[:n] = np.maximum(found_R, -1)
    for r in np.flatnonzero(found_R == REFUSED).tolist():
        result.errors[int(step.out_seq[r])] = IMPOSSIBLE
    if not logits_RV.shape[1]:
        return result
    guessed = guesses(step)
    for r in np.flatnonzero(needs_logits(step, found_R)).tolist():
        if r < len(guessed) and guessed[r] >= 0 and result.ids[guessed[r]] != step.tok[step.out_row[r]]:
            continue
        n_logprobs = int(step.params.n_logprobs[step.params_index[r]])
        try:
            if step.want[r] & SAMPLE and found_R[r] == UNKNOWN:
                result.ids[r] = choose(edited(logits_RV[r], step, r), step, r, noise or philox.noise)
        except ValueError as error:
            result.errors[int(step.out_seq[r])] = str(error)
            continue
        if n_logprobs < 0 and not step.want[r] & SCORE:
            continue
        look_up(step, result, r, logits_RV[r])
    return result


def draft_rows(step: Step, logits_RV: F32, noise: Noise | None = None, fast: Best | None = None) -> StepResult:
    """The best tokens of each output of a step whose outputs want that (DRAFT); none of a row that is not finite.

    ``noise`` and ``fast`` as in ``sample_rows``.
    """
    result = StepResult.nothing(step, max(0, step.params.most_logprobs))
    for r, logits_V in enumerate(logits_RV):
        p = int(step.params_index[r])
        key = int(step.params.seed[p]), int(step.params.sample[p]), int(step.out_position[r])
        temperature, k = float(step.params.temperature[p]), int(step.params.n_logprobs[p])
        plain = step.params.top_k[p] == 0 and step.params.top_p[p] >= 1 and step.params.min_p[p] == 0
        if fast is not None and (plain or temperature == 0):
            ids, scores = fast(logits_V, k, temperature, *key)
        else:
            ids, scores = best(logits_V, step.params, p, k, key, noise or philox.noise)
        result.top_ids[r, : len(ids)] = ids
        result.top_logprobs[r, : len(ids)] = scores
    return result


def best(
    logits_V: F32, params: Params, p: int, k: int, key: tuple[int, int, int], noise: Noise = philox.noise
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """At most ``k`` tokens of parameter row ``p``, the best first by what sampling goes by; see ``StepResult.top_ids``.
    ``key``: seed, sample, output position."""
    if not np.isfinite(logits_V.max()):
        return np.zeros(0, np.int32), np.zeros(0)
    if params.temperature[p] == 0:
        ids, x = np.flatnonzero(logits_V > -np.inf), log_softmax(logits_V)
        x = x[ids]
    else:
        ids, x = survivors(logits_V, params, p)
        x = x + noise(*key, ids)
    order = np.lexsort((ids, -x))[:k]
    return ids[order].astype(np.int32), x[order]


def look_up(step: Step, result: StepResult, r: int, logits_V: NDArray[np.floating]) -> None:
    """Fill in the log-probabilities that output ``r`` wants: its token's, the best ones, those it is to score."""
    n_logprobs = int(step.params.n_logprobs[step.params_index[r]])
    logp_V = log_softmax(logits_V)
    if step.want[r] & SAMPLE:
        result.logprobs[r] = logp_V[result.ids[r]]
    if n_logprobs > 0:
        # The best by value, the smaller id where two are equal; only those that may be among them are sorted.
        bar = np.partition(logp_V, -n_logprobs)[-n_logprobs] if n_logprobs < len(logp_V) else -np.inf
        near = np.flatnonzero(logp_V >= bar)
        best = near[np.lexsort((near, -logp_V[near]))][:n_logprobs]
        result.top_ids[r, :n_logprobs] = best
        result.top_logprobs[r, :n_logprobs] = logp_V[best]
    if step.want[r] & SCORE:
        where = slice(int(step.score_start[r]), int(step.score_start[r + 1]))
        scores = logp_V[step.score_token[where]]
        result.scores[where] = scores
        result.ranks[where] = [1 + np.count_nonzero(logp_V > score) for score in scores]
