"""Sequences that are guessed for together, mostly for many steps, and what of them never changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.calibrate import warmth
from tenon.engine.policies.forest import I32
from tenon.engine.policies.slo import Claims
from tenon.engine.promises import Slo
from tenon.engine.sequence import Seq

NOTHING: Final = Slo()


class Claimants:
    """Sequences by what they are promised. Shapes: n of them."""

    def __init__(self, seqs: Sequence[Seq]) -> None:
        self._seqs = seqs
        slos = [seq.request.add.slo or NOTHING for seq in seqs]
        self._promised = any(slo.tpot_s is not None for slo in slos)
        self._tpot_s = np.array([np.inf if slo.tpot_s is None else slo.tpot_s for slo in slos], np.float64)
        self._weight = np.array([slo.weight for slo in slos], np.float64)
        self._first_s = np.array([np.inf if seq.first_s is None else seq.first_s for seq in seqs], np.float64)
        self._first_n = np.array([seq.n_prompt + seq.first_n for seq in seqs], np.float64)

    def claims(self, now_s: float) -> Claims | None:
        """Where they stand; None where nobody is promised anything."""
        if not self._promised:
            return None
        tokens = np.array([seq.n_tokens for seq in self._seqs], np.float64) - self._first_n
        return Claims(np.maximum(0.0, now_s - self._first_s), tokens, self._tpot_s, self._weight)


def claims_of(seqs: Sequence[Seq], now_s: float) -> Claims | None:
    """What they are promised, and where they stand; None where nobody is promised anything."""
    if not any(seq.request.add.slo for seq in seqs):
        return None
    return Claimants(seqs).claims(now_s)


class Asked:
    """Sequences that want trees. Shapes: n of them."""

    def __init__(self, seqs: list[Seq], max_depth: int) -> None:
        self.seqs = seqs
        adds = [seq.request.add for seq in seqs]
        ends = [seq.n_prompt + add.max_tokens - 1 for seq, add in zip(seqs, adds, strict=True)]
        self.last_n = np.array(ends, np.int64)
        """Tokens with which one is left that no guess is needed for."""
        most = [add.speculate if 0 <= add.speculate < max_depth else max_depth for add in adds]
        self.most_n = np.array(most, np.int64)
        self.warm_n: NDArray[np.int64] = np.array([warmth(add.temperature) for add in adds], np.int64)
        self._claimants = Claimants(seqs)

    def claims(self, now_s: float) -> Claims | None:
        """What they are promised, and where they stand; None where nobody is promised anything."""
        return self._claimants.claims(now_s)

    def depths(self) -> I32:
        """(n,) how deep the trees may be: what is guessed has to leave room for a token after it."""
        n_tokens = np.array([seq.n_tokens for seq in self.seqs], np.int64)
        return np.asarray(np.minimum(self.last_n - n_tokens, self.most_n), np.int32)


class Company:
    """Sequences that decode together."""

    def __init__(self, seqs: Sequence[Seq], max_depth: int) -> None:
        self.seqs = list(seqs)
        self._willing, self._max_depth = [seq for seq in seqs if seq.request.add.speculate], max_depth
        self._asked: dict[tuple[int, int], Asked] = {}
        self.warm = frozenset(warmth(seq.request.add.temperature) for seq in self._willing)
        """Ranges of temperatures at which guesses are wanted."""
        self.n_willing = len(self._willing)

    def asked(self, one_in: int, turn: int) -> Asked:
        """Those who want trees, or of these one in so many."""
        if (one_in, turn) not in self._asked:
            seqs = [seq for seq in self._willing if seq.id % one_in == turn]
            self._asked[one_in, turn] = Asked(seqs, self._max_depth)
        return self._asked[one_in, turn]


NOBODY: Final = Company((), 0)
