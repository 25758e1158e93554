"""How deep and how wide a draft model looks ahead before anything of it is known: as far as brings the most tokens a
second (AdaServe, arXiv 2501.12162, §4.3 fixes both by the load alone; here the steps' times and what came true decide).

A level's steps are all alike: they add ``width`` nodes to each tree. A chain of levels comes true down to depth j with
probability h^j, h being the chance that one of ``width`` guesses is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from tenon.engine.policies.calibrate import WARM
from tenon.engine.policies.speculate import F64, MARGIN, Seconds
from tenon.engine.policies.step_time import StepTimes

WIDTHS: Final = (1, 2, 3)
FIRST: Final = (0.5, 0.3, 0.2)
"""Chances that a guess of each rank is right where the ones before it are wrong, before anything is known."""
MEMORY: Final = 128
"""Observations that an average goes back."""
RATE: Final = 0.1
"""Of the average of tokens a second."""
KEEP: Final = 32
"""Rounds that a choice stands for, as long as the same kind of sequences decode."""
TRY_EVERY: Final = 256
"""Of rounds in which nothing is to be drafted one drafts all the same, lest a wrong judgement stand."""


class Plan(Protocol):
    """Decides how far to look ahead, and learns from what came of it."""

    def choose(self, warm: Sequence[int], n_decodes: int) -> tuple[int, int]:
        """Depth and width for sequences of these warmths, among so many that decode; (0, 0): not at all."""
        ...

    def goes_on(self, hopes_n: F64, counts_n: F64, n_nodes: int) -> bool:
        """Whether another level is worth it for n trees: each one's likeliest path so far comes true so often, as it is
        thought, a token of it counts so much, and ``n_nodes`` are at the ends of all."""
        ...

    def told(self, rate: float) -> None:
        """Steps with what was drafted bring so many tokens a second, as these count."""
        ...

    def observe(self, warm: int, ranks: Sequence[int], right: int | None) -> None:
        """Below a node that came true guesses of these ranks were verified; ``right`` is the rank of the right one."""
        ...


@dataclass(frozen=True)
class FixedPlan:
    """By the number of sequences alone, whatever comes of it: for policies that say what they want."""

    drafts: Callable[[int], tuple[int, int] | None]

    def choose(self, warm: Sequence[int], n_decodes: int) -> tuple[int, int]:
        return self.drafts(n_decodes) or (0, 0)

    def goes_on(self, hopes_n: F64, counts_n: F64, n_nodes: int) -> bool:
        """Whatever they are."""
        return True

    def told(self, rate: float) -> None:
        """Nothing depends on it."""

    def observe(self, warm: int, ranks: Sequence[int], right: int | None) -> None:
        """Nothing to learn."""


class DraftPlan:
    """``seconds`` predict the target's steps, ``draft`` a level of the draft model's by its rows."""

    def __init__(self, seconds: Seconds, draft: StepTimes, max_depth: int) -> None:
        self._seconds, self._draft, self._max_depth = seconds, draft, max_depth
        n_warm = len(WARM) + 1
        self._chance = np.tile(np.array(FIRST), (n_warm, 1))
        self._n = np.zeros((n_warm, len(FIRST)))
        self._n_idle = 0
        self._left = self._n_decodes = 0
        self._warm: list[int] = []
        self._best = (0, 0)
        self._lasting = 0.5
        """Of hopes, what is left of them a level further, in the average: what a draft says, not what came true of it,
        for only the likeliest is ever verified."""
        self._hopes = 0.0
        self._rate: float | None = None
        """Tokens a second that steps bring, as these count, drafting included."""

    def choose(self, warm: Sequence[int], n_decodes: int) -> tuple[int, int]:
        """Depth and width for sequences of these warmths; (0, 0) where it does not pay."""
        if self._left == 0 or n_decodes != self._n_decodes or warm != self._warm:
            self._left, self._n_decodes, self._warm = KEEP, n_decodes, list(warm)
            self._best = self._choose(warm, n_decodes)
        self._left -= 1
        self._hopes = 0.0
        if self._best == (0, 0):
            self._n_idle += 1
            if self._n_idle % TRY_EVERY == 0:
                return min(2, self._max_depth), 2
        return self._best

    def _choose(self, warm: Sequence[int], n_decodes: int) -> tuple[int, int]:
        n = len(warm)
        chance = self._chance[list(warm)].mean(0)
        best, best_rate = (0, 0), n_decodes / self._seconds.plain(n_decodes) * (1 + MARGIN)
        for width in WIDTHS:
            hit = 1 - float(np.prod(1 - chance[:width]))
            depth = np.arange(1, self._max_depth + 1)
            gained = n_decodes + n * np.cumsum(hit**depth)
            # The first level computes what is new of each context, later ones the trees so far.
            rows = n * np.where((depth == 1) | (width == 1), 1, 1 + width * (depth - 1))
            total_s = np.cumsum(self._draft.plain_of(rows)) + self._seconds.guessed(
                n_decodes, n_decodes + n * width * depth
            )
            rate = gained / total_s
            at = int(np.argmax(rate))
            if rate[at] > best_rate:
                best, best_rate = (at + 1, width), float(rate[at])
        return best

    def goes_on(self, hopes_n: F64, counts_n: F64, n_nodes: int) -> bool:
        """Whether what the level is expected to bring is more than steps bring in the time that it takes, verifying
        one more node included of each tree whose node would be worth that."""
        n_trees, hopes = len(hopes_n), float(hopes_n.sum())
        before, self._hopes = self._hopes or n_trees, hopes
        self._lasting += RATE * (min(1.0, hopes / before) - self._lasting)
        if self._rate is None or self._best == (0, 0):  # it is drafted to see what comes of it
            return True
        n = self._n_decodes
        verified_s, more_s = self._seconds.guessed(n, np.array([n + n_nodes, n + n_nodes + n_trees])).tolist()
        row_s, level_s = (more_s - verified_s) / n_trees, float(self._draft.plain_of(np.array([n_nodes]))[0])
        gained_n = counts_n * hopes_n * self._lasting - self._rate * row_s
        return bool(np.maximum(0.0, gained_n).sum() > self._rate * level_s)

    def told(self, rate: float) -> None:
        self._rate = rate if self._rate is None else self._rate + RATE * (rate - self._rate)

    def observe(self, warm: int, ranks: Sequence[int], right: int | None) -> None:
        for rank in sorted(ranks):
            if rank >= len(FIRST):
                return
            n = self._n[warm, rank] = min(self._n[warm, rank] + 1, MEMORY)
            self._chance[warm, rank] += ((right == rank) - self._chance[warm, rank]) / (n + 1)
            if right == rank:
                return
