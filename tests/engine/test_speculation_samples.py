"""What engines with trees sample, against the exact law of plain decoding: chi-square tests, Holm-corrected, on joints
of three tokens; and rules that are wrong, which the same test must find out.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.engine.sequence import Seq
from tenon.engine.speculation.suffix import Suffix
from tenon.engine.speculation.tree import ROOT, Tree
from tenon.engine.step import I32
from tenon.models.spec import KVGroup
from tests.engine.build import engine
from tests.engine.laws import Plain, draw_and_reject, p_value, refuted, rejected, softmax, survival
from tests.engine.trees import Scripted, random_tree, speculating

V = 5
PROMPT = (0, 1, 2, 3, 0, 1)
SIZES = [1200, pytest.param(52_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
"""Samples of each hypothesis; there are four."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 1.6, "top_k": 4, "top_p": 0.93},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_p": 0.02},
}


class Remembering(HashExecutor):
    """Contexts are few here."""

    def logits(self, context: I32) -> np.ndarray:
        known = self.__dict__.setdefault("known", {})
        if (key := context.tobytes()) not in known:
            known[key] = super().logits(context)
        return np.asarray(known[key])


def likeliest(context: tuple[int, ...], width: int = 2, depth: int = 2) -> Tree:
    """A draft model's beam: what is likely below each of its likeliest tokens, nothing of it drawn."""
    tokens: list[int] = []
    parents: list[int] = []
    front = [(ROOT, context)]
    for _ in range(depth):
        reached = []
        for parent, seen in front:
            for token in np.argsort(-drafted(seen))[:width].tolist():
                reached.append((len(tokens), (*seen, token)))
                tokens.append(token)
                parents.append(parent)
        front = reached
    return Tree(tokens, parents)


def drafted(context: tuple[int, ...]) -> np.ndarray:
    """(V,) what the draft model thinks."""
    return softmax(HashExecutor(V, seed=8).logits(np.array(context, np.int32)))


def beam(seq: Seq) -> Tree:
    return likeliest(tuple(seq.tokens[: seq.n_tokens].tolist()))


def wild(seed: int) -> Callable[[Seq], Tree]:
    rng = np.random.default_rng(seed)
    return lambda _: random_tree(rng, int(rng.integers(1, 9)), V)


def made(script: Callable[[Seq], Tree] | None) -> Engine:
    """An engine that verifies what ``script`` says; without one, what it learns from its own outputs."""
    groups = (KVGroup("m", (0,), "full", None, 16, 1),)
    plain = engine(Remembering(V), groups, 200, V, EngineConfig(executor="hash", max_sequences=64))
    return speculating(plain, [Suffix() if script is None else Scripted(script)])


def counts(it: Engine, option: str, n: int) -> np.ndarray:
    """(V, V, V) how often the three tokens after the first were which; each request has a seed of its own."""
    found = np.zeros((V,) * 4)
    for first in range(0, n, 500):
        outputs: dict[str, tuple[int, ...]] = {}
        for i in range(first, min(first + 500, n)):
            it.add(Add(f"r{i}", PROMPT, 4, 1_000_003 * i + len(option), **OPTIONS[option]))
        while it.has_work:
            for delta in it.tick(0.0):
                outputs[delta.request_id] = (*outputs.get(delta.request_id, ()), *delta.ids)
        np.add.at(found, tuple(np.array(list(outputs.values())).T), 1)
    assert found.sum() == n
    return np.asarray(found.sum(0))


def right(option: str) -> np.ndarray:
    """(V, V, V) the law that ``counts`` should have."""
    return np.asarray(Plain(Add("r", PROMPT, 4, 0, **OPTIONS[option]), V).law(PROMPT, 4).sum(0))


@pytest.mark.parametrize("n", SIZES)
def test_samples_through_trees_follow_plain_decoding_s_law(n: int) -> None:
    cases = [(wild(1), "plain"), (beam, "filtered"), (wild(2), "penalised"), (None, "plain")]
    found = []
    for script, option in cases:
        it = made(script)
        found.append(p_value(counts(it, option, n), right(option)))
        assert it.scheduler.speculation.counts.accepted > n / 20  # type: ignore[union-attr]
    assert refuted(found) == []


@pytest.mark.parametrize("n", SIZES)
def test_wrong_rules_are_found_out(n: int) -> None:
    """Rejection of a beam, and draws that are kept by what they are, among rules that are right."""
    rng, plain = np.random.default_rng(7), Plain(Add("r", PROMPT, 4, 0), V)
    law, tree = plain.law(PROMPT, 3), likeliest(PROMPT)
    seen = [(*PROMPT, *tree.path(node)) for node in range(ROOT, len(tree))]
    laws_mV, q_mV = (np.stack([of(s) for s in seen]) for of in (plain.next, drafted))
    by_rejection = rejected(tree, laws_mV, q_mV, plain, PROMPT, 3)
    p, q = np.array((0.2, 0.3, 0.5)), np.array((0.5, 0.3, 0.2))
    cases = [(law, law), (by_rejection, law), (draw_and_reject(p, q, (0, 1, 2)), p), (draw_and_reject(p, q, (0,)), p)]
    drawn = [(rng.multinomial(n, true.ravel() / true.sum()), claimed) for true, claimed in cases]
    assert refuted([p_value(seen_V, claimed) for seen_V, claimed in drawn]) == [1, 3]


@pytest.mark.parametrize(
    ("x", "degrees", "share"),
    [(3.841459, 1, 0.05), (5.991465, 2, 0.05), (16.266236, 3, 1e-3), (18.307038, 10, 0.05), (149.448528, 100, 1e-3),
     (0.0, 5, 1.0), (113.145270, 101, 0.1924)],
)  # fmt: skip
def test_survival_is_the_table_s(x: float, degrees: int, share: float) -> None:
    assert survival(x, degrees) == pytest.approx(share, rel=2e-3)


def test_what_cannot_come_refutes_at_once_and_rare_cells_are_one() -> None:
    law = np.array([0.5, 0.499, 0.0005, 0.0005, 0.0])
    assert p_value(np.array([500, 499, 1, 0, 0]), law) > 0.9
    assert p_value(np.array([500, 498, 1, 0, 1]), law) == 0.0
    assert refuted([0.5, 2e-4, 4e-4]) == [1, 2]  # the second is held to a half of alpha, the first to a third
    assert refuted([0.5, 4e-4, 4e-4]) == []
