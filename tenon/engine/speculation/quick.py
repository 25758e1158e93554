"""The commonest round in one call to C: suffixes guess, and the policy "pays" chooses. Most steps end here, with
nothing worth a guess, so this is what speculation costs those who have nothing to gain."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

import numpy as np

from tenon.engine.policies.calibrate import Calibrator
from tenon.engine.policies.forest import Bool, Forest
from tenon.engine.policies.speculate import Load, Speculate
from tenon.engine.speculation.asked import Asked
from tenon.engine.speculation.drafter import Drafter
from tenon.engine.speculation.native import Native, QuickCalibrator, QuickPays, view
from tenon.engine.speculation.suffix import LIMITS, Suffix


class _Round(ctypes.Structure):
    """Mirror of round_t in suffix.c; keep the fields in its order."""

    _fields_ = [
        *((name, c_void_p) for name in ("followers", "n_tokens", "last", "deepest", "warm", "depth")),
        *((name, c_void_p) for name in ("forest", "weights", "choice")),
        *((name, c_double) for name in ("doubt", "floor")),
        *((name, c_int64) for name in ("at_least", "n_found")),
    ]


class QuickRound:
    """What drafter, calibrator and policy would do one after another."""

    def __init__(self, lib: Native, suffix: Suffix, calibrator: QuickCalibrator, policy: QuickPays) -> None:
        self._call = lib.follower_round
        self._suffix, self._calibrator, self._policy = suffix, calibrator, policy
        self._asked: Asked | None = None

    @staticmethod
    def of(drafters: Sequence[Drafter], calibrator: Calibrator, policy: Speculate) -> QuickRound | None:
        """None where it is another round."""
        if len(drafters) != 1 or not isinstance(drafters[0], Suffix) or drafters[0].lib is None:
            return None
        if not isinstance(calibrator, QuickCalibrator) or not isinstance(policy, QuickPays):
            return None
        return QuickRound(drafters[0].lib, drafters[0], calibrator, policy)

    def round(self, asked: Asked, load: Load, room: int) -> tuple[Forest | None, Bool | None]:
        """What is guessed, judged, and the nodes to verify; None for nothing."""
        if asked is not self._asked:
            self._prepare(asked, room)
        self._n_tokens[:] = [seq.n_tokens for seq in asked.seqs]
        n = self._call(self._address, load.n, load.most, load.margin)
        if n < 0:
            raise MemoryError("no memory for a suffix automaton")
        return self._forest if self._round.n_found else None, self._forest.chosen if n else None

    def _prepare(self, asked: Asked, room: int) -> None:
        n = len(asked.seqs)
        self._asked, self._forest = asked, Forest.empty(n, room)
        self._n_tokens = np.zeros(n, np.int64)
        followers = np.array(self._suffix.numbers(asked.seqs), np.int64)
        arrays = followers, self._n_tokens, asked.last_n, asked.most_n, asked.warm_n, np.zeros(n, np.int32)
        self._keep = arrays
        at_least, doubt, floor = LIMITS
        self._round = _Round(
            *(array.ctypes.data for array in arrays), view(self._forest), self._calibrator.address,
            self._policy.address, doubt, floor, at_least, 0,
        )  # fmt: skip
        self._address = ctypes.addressof(self._round)
