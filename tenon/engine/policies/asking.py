"""``Asking``: whether it pays to ask for guesses at all.

Looking for guesses takes time in every step, whether any is worth verifying or not. What a round of asking everybody
won, on average, in seconds of the steps that are saved, is compared with what it took. Where it is less, only one step
in so many has a round, over one sequence in so many: what the others say is not followed, which is most of the time
that asking takes. That is how it is found out when guesses pay again.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

SELDOM: Final = (4, 16)
"""One step in so many has a round, over one sequence in so many; the second after long without a guess."""
LONG: Final = 32
"""Rounds."""
TURN: Final = 256
"""Steps after which it is others who are asked."""
HOPE: Final = 1.0
"""What a round is thought to win before anything is known, in steps."""
RATE: Final = 1 / 128
"""Of the step of the average to a round's win where all are held ..."""
SELDOM_RATE: Final = 1 / 64
"""... and where few are."""
ASKING: Final = 1.5
"""What asking costs over what a round is seen to take: what is learned of it, and what the model's weights leave of the
caches to those who follow texts."""
RECENT: Final = 9
"""Rounds whose median is what one takes."""


class Asking:
    """Ask ``due`` once a step; where it is, hold a round over one in ``one_in`` sequences, those whose ``turn`` it is,
    and tell."""

    def __init__(self) -> None:
        self.one_in = 1
        self._won_s: float | None = None
        self._taken: deque[float] = deque(maxlen=RECENT)
        self._taken_s = 0.0
        self.n_steps = self._n_vain = 0

    def due(self) -> bool:
        """Whether there is a round in this step."""
        self.n_steps += 1
        return self.one_in == 1 or self.n_steps % self.one_in == 0

    @property
    def turn(self) -> int:
        """Of sequences those whose numbers leave this, divided by ``one_in``."""
        return self.n_steps // TURN % self.one_in

    def hope(self) -> None:
        """Others ask than before."""
        self.one_in, self._won_s, self._n_vain = 1, None, 0

    def tell(self, won_s: float, taken_s: float | None, step_s: float) -> None:
        """A round was held: what it wins, or would were everybody asked, 0 where nothing is worth it, less what a draft
        model took for it; and what it took besides, None where that says little: whoever is new is followed from the
        beginning of a prompt. A step takes ``step_s``."""
        held_all = self.one_in == 1
        if self._won_s is None:
            self._won_s = HOPE * step_s
        self._won_s += (won_s - self._won_s) * (RATE if held_all else SELDOM_RATE)
        self._n_vain = 0 if won_s > 0 else self._n_vain + 1
        if held_all and taken_s is not None:
            self._taken.append(ASKING * taken_s)
            if len(self._taken) > RECENT // 2:  # before that nobody can say which are outliers
                self._taken_s = median(self._taken)
        if self._won_s >= self._taken_s:
            self.one_in = 1
        else:
            self.one_in = SELDOM[self._n_vain > LONG]
