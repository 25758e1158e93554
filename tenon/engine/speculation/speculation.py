"""``Speculation``: before each step, what to guess of whom; after it, what to learn from what came of that.

    drafters      guess (:mod:`tenon.engine.speculation.drafter`), each a forest
    calibrator    says how likely each guess is
    policy        chooses the nodes that the step verifies, by how long steps take
    times         how long steps take

Nothing here touches blocks or samples: trees are handed to the scheduler, and what came true is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.base.clock import Clock
from tenon.engine.ledger import Split
from tenon.engine.messages import Guesses
from tenon.engine.policies.asking import Asking
from tenon.engine.policies.calibrate import WARM, Calibrator, Observation, warmth
from tenon.engine.policies.forest import I32, MAX_DEPTH, Bool, Forest, merged
from tenon.engine.policies.speculate import MARGIN, Load, Speculate, likeliest, margin
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.sequence import Seq
from tenon.engine.speculation import native
from tenon.engine.speculation.asked import NOBODY, Asked, Company
from tenon.engine.speculation.drafter import Drafter, Planned
from tenon.engine.speculation.kept import Kept
from tenon.engine.speculation.model import DraftModel
from tenon.engine.speculation.native import QuickCalibrator
from tenon.engine.speculation.quick import QuickRound
from tenon.engine.speculation.tree import ROOT, Tree
from tenon.engine.step import Step

_log = logging.getLogger("tenon.engine")

TRY_SHARE: Final = 0.003
TRY_SHARE_AT_FIRST: Final = 0.05
"""Of the time that steps take, what may be spent on verifying the likeliest of what was refused, lest a wrong judgement
stand, and at first (BOLD_TREES) little is known ..."""
TRY_AFTER: Final = 8
"""... after so many steps at least ..."""
TRY_NODES: Final = 4
"""... and how many at least are verified then ..."""
REST_EVERY: Final = 64
REST_EVERY_AT_FIRST: Final = 4
"""... and of so many steps with something to verify, two in a row do without, the second as long as no others have been
seen of as many sequences: all this goes for policies that weigh."""


@dataclass
class GuessCounts:
    """Only ever grow."""

    trees: int = 0
    nodes: int = 0
    accepted: int = 0
    expected: float = 0.0
    """Accepted tokens as they were predicted."""
    reached: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    """By depth - 1: trees that had a node there below what came true."""
    accepted_at: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)


class Speculation:
    """Of one engine. ``max_depth`` and ``max_nodes`` bound each tree; by ``clock`` it is known what asking for guesses
    takes: policies that weigh go by that too."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        policy: Speculate,
        times: StepTimes,
        *,
        max_depth: int = 8,
        max_nodes: int = 16,
        clock: Clock | None = None,
    ) -> None:
        self.drafters, self.policy, self.times = tuple(drafters), policy, times
        self.max_depth, self.max_nodes = max_depth, max_nodes
        self.kinds = tuple(kind for drafter in drafters for kind in drafter.kinds)
        lib = native.load()
        n, beliefs = len(self.kinds), [belief for drafter in drafters for belief in drafter.beliefs]
        self.calibrator = Calibrator(n, beliefs) if lib is None else QuickCalibrator(n, lib, beliefs)
        self.counts = GuessCounts()
        self.kept = Kept()
        self.lost: set[str] = set()
        """Drafters that have failed."""
        self.rests = False
        """While it is set nothing is guessed."""
        self.looks = False
        """Whether guesses were asked for in this step."""
        self.looks_around = False
        """Whether somebody may have been new to it, and was followed from the beginning of a prompt."""
        self.drafting_s = 0.0
        """What a draft model took in this step."""
        self._company = NOBODY
        self._warm: Set[int] = frozenset()
        """Ranges of temperatures that were guessed for last."""
        self._n_seen = [0] * (len(WARM) + 1)
        """Trees, by those ranges."""
        self._quick = QuickRound.of(drafters, self.calibrator, policy)
        self._n_chosen = self._tried_at = self._n_rests = 0
        self._asking, self._clock = Asking(), clock
        models = [drafter for drafter in drafters if isinstance(drafter, Planned)]
        self._model = (models[0], self.kinds.index(models[0].kinds[0])) if models else None

    def draft(self, seqs: Sequence[Seq], most: int, now_s: float, prompt_rows: int, *, may_have: bool) -> int:
        """Give trees to those of ``seqs``, all that decode, that have none: ``most`` nodes at most, those of older
        trees among them, if there may be any. The step begins at ``now_s`` and computes so many rows of prompts
        besides. Returns how many nodes there are."""
        self.looks = self.looks_around = False
        self.drafting_s = 0.0
        n_nodes = sum(len(seq.tree) for seq in seqs if seq.tree is not None) if may_have else 0
        if self.rests or not self._asking.due():
            return n_nodes
        if self._n_rests and not prompt_rows:  # a step with prompts says nothing of steps without guesses
            self._n_rests -= 1
            return n_nodes
        start_s = 0.0 if self._clock is None else self._clock.now_s()
        company = self._company
        if company.seqs != seqs:
            self.looks_around = True
            company = self._company = Company(seqs, self.max_depth)
            if not company.warm <= self._warm:
                self._asking.hope()
            self._warm = company.warm
        ask = company.asked(self._asking.one_in, self._asking.turn)
        if n_nodes:
            ask = Asked([seq for seq in ask.seqs if seq.tree is None], self.max_depth)
        if not ask.seqs or most <= n_nodes:
            return n_nodes
        self.looks = True
        n_seen = min(self._n_seen[warm] for warm in company.warm)
        claims = ask.claims(now_s)
        load = Load(len(seqs), most - n_nodes, self.times, margin(n_seen), claims, prompt_rows)
        forest, trees = self._trees(ask, load)
        if self._clock is not None and self.policy.weighs:
            taken_s, plain_s = self._clock.now_s() - start_s, self.times.plain(load.n)
            share = len(ask.seqs) / company.n_willing
            won_s = 0.0
            if forest is not None and share < 1:
                won_s = self._would_win_s(forest, load, share)
            elif trees:
                won_s = self._won_s(trees, load.n)
            # A draft model's levels are no cost of asking: that they pay is its plan's to see.
            asked_s = None if self.looks_around else taken_s - self.drafting_s
            self._asking.tell(won_s - self.drafting_s, asked_s, plain_s)
        n_new = 0
        for seq, tree in trees:
            seq.tree = tree
            n_new += len(tree)
        if self.drafting_s and self._model is not None:
            counts = dict(zip((seq.id for seq in ask.seqs), self._model[0].counts_n.tolist(), strict=True))
            gained = sum(counts[seq.id] * f for seq, tree in trees for _, _, _, f in tree.features)
            roots = load.n - len(counts) + sum(counts.values())
            taken_s = self.drafting_s + float(self.times.guessed(load.n, np.array([load.n + n_new]))[0])
            self._model[0].plan.told((roots + gained) / taken_s)
        return n_nodes + n_new

    def _trees(self, ask: Asked, load: Load) -> tuple[Forest | None, list[tuple[Seq, Tree]]]:
        """What is guessed, and who gets a tree of it."""
        forest, chosen = self._round(ask, load)
        if forest is None:
            return None, []
        if chosen is None or not chosen.any():
            chosen = self._tried(forest, load) if self.policy.weighs else None
            if chosen is None:
                return forest, []
        elif self.policy.weighs:
            self._n_chosen += 1
            if self._n_chosen % (REST_EVERY if self.times.known(load.n) else REST_EVERY_AT_FIRST) == 0:
                self._n_rests = 2
        found = []
        for i, tree in _trees(forest, chosen):
            seq = ask.seqs[i]
            tree = tree.without(seq.request.stop_ids)
            if seq.binding is not None:
                tree = tree.without(seq.binding.marks)
            if len(tree):
                found.append((seq, tree))
        return forest, found

    def _tried(self, forest: Forest, load: Load) -> Bool | None:
        """The likeliest nodes, where it is time to see whether it is right to refuse them."""
        if self._asking.n_steps - self._tried_at < TRY_AFTER:
            return None
        places = likeliest(forest.f)[: min(max(load.n, TRY_NODES), load.most)]
        if not len(places):
            return None
        plain_s = self.times.plain(load.n)
        costs_s = float(self.times.guessed(load.n, np.array([load.n + len(places)]))[0]) - plain_s
        share = TRY_SHARE if load.margin >= MARGIN else TRY_SHARE_AT_FIRST
        if self._asking.n_steps - self._tried_at < costs_s / (share * plain_s):
            return None
        self._tried_at = self._asking.n_steps
        chosen = np.zeros(forest.shape, np.bool_)
        chosen.ravel()[places] = True
        return chosen

    def _would_win_s(self, forest: Forest, load: Load, share: float) -> float:
        """``_won_s`` of a step in which everybody has guesses like this share of them: what trees cost whatever their
        size is shared by all then."""
        f: NDArray[np.float64] = -np.sort(-forest.f[forest.f > 0].astype(np.float64))
        n, plain_s = load.n, self.times.plain(load.n)
        rows = n + np.ceil(np.arange(1, len(f) + 1) / share).astype(np.int64)
        alone_s = (1 + np.cumsum(f) / share / n) * plain_s
        costs_s = self.times.guessed(n, rows)
        won_s = np.where(alone_s >= costs_s * (1 + load.margin), alone_s - costs_s, 0.0)
        return float(won_s.max(initial=0.0))

    def _won_s(self, trees: list[tuple[Seq, Tree]], n: int) -> float:
        """How much sooner the step is thought to come to as many tokens than plain ones would; 0 where later."""
        n_nodes = sum(len(tree) for _, tree in trees)
        gained = sum(f for _, tree in trees for _, _, _, f in tree.features)
        costs_s = float(self.times.guessed(n, np.array([n + n_nodes]))[0])
        return max(0.0, (1 + gained / n) * self.times.plain(n) - costs_s)

    def _round(self, ask: Asked, load: Load) -> tuple[Forest | None, Bool | None]:
        """What is guessed, and what of it to verify."""
        if self._quick is not None:
            try:
                return self._quick.round(ask, load, self.max_nodes)
            except Exception as error:
                self._quick = None
                self._lose(self.drafters[0], error)
                return None, None
        if self._model is not None:
            self._model[0].counts_n = self.policy.counts(load, len(ask.seqs))
        forest = self._forest(ask, ask.depths())
        if self.drafting_s:
            load = replace(load, spent_s=self.drafting_s)
        return forest, None if forest is None else self.policy.choose(forest, load)

    def _now_s(self) -> float:
        return 0.0 if self._clock is None else self._clock.now_s()

    def _lose(self, drafter: Drafter, error: Exception) -> None:
        """Nobody's answer hangs on a guess: who cannot make any is not asked again, and that is said."""
        _log.warning("%s makes no more guesses; answers stay the same, and come slower", drafter.name, exc_info=error)
        self.lost.add(drafter.name)

    def _forest(self, ask: Asked, depth_n: I32) -> Forest | None:
        """All drafters' guesses, judged, as one trie a sequence."""
        forests: list[Forest] = []
        first = 0
        for drafter in self.drafters:
            forest = None
            if drafter.name not in self.lost:
                start_s = self._now_s() if isinstance(drafter, Planned) else 0.0
                try:
                    forest = drafter.propose(ask.seqs, depth_n, self.max_nodes)
                except Exception as error:
                    self._lose(drafter, error)
                if isinstance(drafter, Planned):
                    self.drafting_s += self._now_s() - start_s
            if forest is not None:
                if first:
                    forest.source += np.int8(first)
                self.calibrator.judge(forest, ask.warm_n)
                forests.append(forest)
            first += len(drafter.kinds)
        return merged(forests, self.max_nodes) if forests else None

    def verified(self, seq: Seq, tree: Tree, path: Sequence[int]) -> None:
        """A step has computed the tree; ``path`` are the nodes that came true, which are among the sequence's tokens by
        now."""
        counts, features = self.counts, tree.features
        counts.trees += 1
        counts.nodes += len(tree)
        counts.accepted += len(path)
        true = {ROOT, *path}
        warm = warmth(seq.request.add.temperature)
        self._n_seen[warm] += 1
        seen: list[Observation] = []
        deepest = 0
        for i, parent in enumerate(tree.parents):
            source, q, rank, f = features[i]
            counts.expected += f
            if parent in true:
                depth = tree.depths[i]
                seen.append((source, warm, depth, q, rank, i in true))
                deepest = max(deepest, depth)
        for depth in range(deepest):
            counts.reached[depth] += 1
        for depth in range(len(path)):
            counts.accepted_at[depth] += 1
        self.calibrator.observe(seen)
        if self._model is not None:
            model, kind = self._model
            model.verified(seq, tree, path, kind)
        self.kept.add(seq, tree, path)

    def guesses(self) -> Guesses:
        """The counts as they are now, down to the deepest that a tree may be."""
        c, depth = self.counts, self.max_depth
        return Guesses(c.trees, c.nodes, c.accepted, c.expected, tuple(c.reached[:depth]), tuple(c.accepted_at[:depth]))

    def measured(self, step: Step, seconds: float) -> None:
        """The step took so long, from tick to tick; all its sequences decode."""
        if self.looks_around:
            return  # that belongs to a prompt
        self.times.tell(len(step.seq), step.n_rows, seconds - self.drafting_s)

    def split(self, n: int, rows: int, prompt_rows: int) -> Split:
        """A step's seconds as ``times`` predict them, by what they are for."""
        plain_s = self.times.plain(n)
        guessed_s, mixed_s = (float(self.times.mixed(n, np.array([rows]), p)[0]) for p in (0, prompt_rows))
        guesses_s = self.drafting_s + (guessed_s - plain_s if rows > n else 0.0)
        return Split(plain_s, mixed_s - guessed_s, guesses_s)

    def forget(self, seq: Seq) -> None:
        """It has ended."""
        self._company = NOBODY
        for drafter in self.drafters:
            drafter.forget(seq)

    def reset(self) -> None:
        """The model says other things from now on."""
        self._company = NOBODY
        for drafter in self.drafters:
            drafter.reset()

    def check_integrity(self) -> None:
        """Of the drafters' own blocks. Raises ``IntegrityError``."""
        for drafter in self.drafters:
            if isinstance(drafter, DraftModel):
                drafter.check_integrity()

    def close(self) -> None:
        for drafter in self.drafters:
            drafter.close()


def _trees(forest: Forest, chosen: Bool) -> list[tuple[int, Tree]]:
    """Rows that have chosen nodes, and these."""
    C = forest.shape[1]
    places = np.flatnonzero(chosen)
    rows = places // C
    order = np.zeros(chosen.size, np.int64)
    order[places] = np.arange(len(places))
    up = forest.parent.ravel()[places]
    above = np.where(up < 0, ROOT, order[rows * C + up])
    tokens, parent = forest.token.ravel()[places].tolist(), above.tolist()
    columns = (array.ravel()[places].tolist() for array in (forest.source, forest.q, forest.rank, forest.f))
    features = list(zip(*columns, strict=True))
    starts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(places)]
    trees: list[tuple[int, Tree]] = []
    for start, end in pairwise(starts):
        parents = [p - start if p >= 0 else ROOT for p in parent[start:end]]
        trees.append((int(rows[start]), Tree(tokens[start:end], parents, features[start:end])))
    return trees
