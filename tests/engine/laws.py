"""Laws of outputs: what plain decoding says how often, what verifying a tree makes of it, and whether samples fit.

Shapes: V vocabulary, m rows of a tree, N combinations of what they sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from tenon.engine.edits import Edits
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.engine.sampling import edited, survivors
from tenon.engine.speculation.tree import ROOT, Tree, walk
from tenon.engine.step import Step
from tests.engine.build import step_of


def law_of(logits_V: np.ndarray, step: Step, r: int) -> np.ndarray:
    """(V,) how likely each token is to be output ``r``'s: Gumbel-max is the softmax of what the filters leave."""
    x_V, p, law = edited(logits_V, step, r), int(step.params_index[r]), np.zeros(len(logits_V))
    if step.params.temperature[p] == 0:
        law[int(np.argmax(x_V))] = 1.0
        return law
    ids, x = survivors(x_V, step.params, p)
    law[ids] = np.exp(x - x.max())
    return law / law.sum()


class Plain:
    """Plain decoding of one request: each context's law, as if its tokens were all there had ever been."""

    def __init__(self, add: Add, vocab_size: int) -> None:
        self._add, self._logits = add, HashExecutor(vocab_size).logits
        names = ("temperature", "top_k", "top_p", "min_p")
        self._params = {name: getattr(add, name) for name in names}
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def next(self, context: tuple[int, ...]) -> np.ndarray:
        """(V,) of the token after ``context``."""
        if context not in self._known:
            tokens, step = np.array(context, np.int32), step_of(1, **self._params)
            step.edit_token, step.edit_kind, step.edit_value = Edits(self._add, ()).of(tokens, len(self._add.prompt))
            step.edit_start = np.array([0, len(step.edit_token)], np.int32)
            self._known[context] = law_of(self._logits(tokens), step, 0)
        return self._known[context]

    def law(self, context: tuple[int, ...], n: int) -> np.ndarray:
        """(V,) * n of the next ``n`` tokens."""
        if n == 0:
            return np.ones(())
        first = self.next(context)
        rest = [self.law((*context, token), n - 1) if p > 0 else None for token, p in enumerate(first)]
        nothing = np.zeros((len(first),) * (n - 1))
        return np.stack([nothing if one is None else p * one for p, one in zip(first, rest, strict=True)])


@cache
def combinations(n_rows: int, vocab_size: int) -> np.ndarray:
    """(N, m) of everything that so many rows can sample."""
    return np.stack(np.unravel_index(np.arange(vocab_size**n_rows), (vocab_size,) * n_rows), 1)


@cache
def endings(tree: Tree, vocab_size: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Every output of a tree, and which of the combinations give it."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, sampled in enumerate(combinations(len(tree) + 1, vocab_size).tolist()):
        rows = [0, *(node + 1 for node in walk(tree, sampled))]
        found.setdefault(tuple(sampled[row] for row in rows), []).append(i)
    return [(output, np.array(which)) for output, which in found.items()]


def walked(tree: Tree, laws_mV: np.ndarray, plain: Plain, context: tuple[int, ...], n: int) -> np.ndarray:
    """(V,) * n of the next ``n`` tokens where a step verifies ``tree`` and plain decoding goes on from there."""
    V = laws_mV.shape[1]
    m = len(laws_mV)
    weight_N = np.prod(laws_mV[np.arange(m), combinations(m, V)], axis=1)
    total = np.zeros((V,) * n)
    for output, which in endings(tree, V):
        if (mass := float(weight_N[which].sum())) > 0:
            total[output] += mass * plain.law((*context, *output), n - len(output))
    return total


def rejected(
    tree: Tree, laws_mV: np.ndarray, q_mV: np.ndarray, plain: Plain, context: tuple[int, ...], n: int
) -> np.ndarray:
    """The same where a child is taken with probability min(1, p / q), as if it had been drawn from q."""
    V = laws_mV.shape[1]
    total = np.zeros((V,) * n)

    def visit(node: int, output: tuple[int, ...], mass: float) -> None:
        p, q = laws_mV[node + 1].copy(), q_mV[node + 1]
        for child in (i for i, parent in enumerate(tree.parents) if parent == node):
            token = tree.tokens[child]
            taken = min(1.0, p[token] / q[token]) if q[token] > 0 else 1.0
            if mass * taken > 0:
                visit(child, (*output, token), mass * taken)
            left = np.maximum(p - q, 0)
            mass, p = mass * (1 - taken), left / left.sum() if left.sum() > 0 else p
        for token in np.flatnonzero(mass * p > 0).tolist():
            said = (*output, token)
            total[said] += mass * p[token] * plain.law((*context, *said), n - len(said))

    visit(ROOT, (), 1.0)
    return total


def draw_and_reject(p_V: np.ndarray, q_V: np.ndarray, keeps: Sequence[int]) -> np.ndarray:
    """(V,) where one token is drawn from q and verified by rejection, if it is among those that are kept."""
    left = np.maximum(p_V - q_V, 0)
    left, law = left / left.sum(), np.zeros_like(p_V)
    for drawn, q in enumerate(q_V):
        taken = min(1.0, p_V[drawn] / q)
        law += q * (taken * np.eye(len(p_V))[drawn] + (1 - taken) * left if drawn in keeps else p_V)
    return law


def softmax(logits_V: np.ndarray) -> np.ndarray:
    x = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return np.asarray(x / x.sum())


# -- samples -----------------------------------------------------------------------------------------------------


def survival(x: float, degrees: int) -> float:
    """How likely a chi-square variable of so many degrees of freedom is above ``x``: Q(degrees / 2, x / 2)."""
    z = x / 2
    if z == 0:
        return 1.0
    s, q = (0.5, math.erfc(math.sqrt(z))) if degrees % 2 else (1.0, math.exp(-z))
    while s < degrees / 2:
        q += math.exp(s * math.log(z) - z - math.lgamma(s + 1))
        s += 1
    return q


def p_value(counts: np.ndarray, law: np.ndarray, least: float = 5.0) -> float:
    """Of the chi-square test that ``counts`` come from ``law``: cells expected less than ``least`` times count as one;
    what cannot come at all must not come."""
    counts, expected = counts.ravel(), counts.sum() * law.ravel()
    if counts[expected == 0].any():
        return 0.0
    large = expected >= least
    observed, right = counts[large].astype(float), expected[large]
    if expected[~large].sum() > 0:
        observed, right = np.append(observed, counts[~large].sum()), np.append(right, expected[~large].sum())
    return survival(float(((observed - right) ** 2 / right).sum()), len(right) - 1)


def refuted(p_values: Sequence[float], alpha: float = 1e-3) -> list[int]:
    """Which of these hypotheses are rejected, by Holm's rule: all together with an error of at most ``alpha``."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found = []
    for k, i in enumerate(order):
        if p_values[i] > alpha / (len(order) - k):
            break
        found.append(i)
    return sorted(found)
