"""What every step asks, in C: suffixes, judging guesses, choosing among them. Without a compiler the same is done in
Python, and that is said once."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np

from tenon.base.errors import ResourceError
from tenon.compiler import toolchain
from tenon.engine.policies.calibrate import LEAST, Calibrator, Ints
from tenon.engine.policies.forest import Bool, Forest
from tenon.engine.policies.speculate import Load, Pays
from tenon.engine.policies.step_time import StepTimes

log = logging.getLogger("tenon.engine")
SOURCES = ("guess.c", "suffix.c")
MOST_NODES = 512
"""Beyond which numpy sorts them faster."""
Entry = Callable[..., Any]


class Native:
    """The C entry points. Raises ``ResourceError`` where they cannot be compiled."""

    suffix_new: Entry
    suffix_free: Entry
    suffix_begin: Entry
    suffix_add: Entry
    follower_new: Entry
    follower_free: Entry
    follower_share: Entry
    follower_guess: Entry
    follower_round: Entry
    judge: Entry
    learn: Entry
    pays: Entry

    def __init__(self) -> None:
        lib = toolchain.load(toolchain.build("guess", [toolchain.CSRC / name for name in SOURCES]))
        P, I, N, D = c_void_p, c_int32, c_int64, c_double
        for name, arguments, result in (
            ("suffix_new", (), P),
            ("suffix_free", (P,), None),
            ("suffix_begin", (P,), None),
            ("suffix_add", (P, P, N), I),
            ("follower_new", (P,), P),
            ("follower_free", (P,), None),
            ("follower_share", (P, I, P, N), None),
            ("follower_guess", (P, P, P, I, D, D, P), N),
            ("follower_round", (P, N, N, D), N),
            ("judge", (P, P, P), None),
            ("learn", (P, P, N, D, P), None),
            ("pays", (P, N, N, D, P), N),
        ):
            function = lib[f"tenon_{name}"]
            function.argtypes, function.restype = arguments, result
            setattr(self, name, function)


@cache
def load() -> Native | None:
    """Compiled once a machine; None where that cannot be done."""
    try:
        return Native()
    except (ResourceError, AttributeError, OSError) as error:
        log.warning("guesses are made in Python, which is slower: %s", error)
        return None


class ForestView(ctypes.Structure):
    """Mirror of forest_t in guess.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_int64) for name in ("n", "room")),
        *((name, c_void_p) for name in ("token", "parent", "depth", "rank", "source", "q", "f", "chosen")),
    ]


class Weights(ctypes.Structure):
    """Mirror of weights_t in guess.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_void_p) for name in "abc"),
        *((name, c_void_p) for name in ("common", "own", "deep", "common_seen", "own_seen", "deep_seen")),
        *((name, c_int64) for name in ("n_kinds", "n_warmths", "n_depths")),
    ]


class Choice(ctypes.Structure):
    """Mirror of choice_t in guess.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_void_p) for name in ("knots", "plain", "measured", "extra")),
        ("n_knots", c_int64),
    ]


def view(forest: Forest) -> int:
    """The address of a forest's ``ForestView``, made once."""
    if not isinstance(forest.view, ForestView):
        names = [field[0] for field in ForestView._fields_][2:]
        forest.view = ForestView(*forest.shape, *(getattr(forest, name).ctypes.data for name in names))
    return ctypes.addressof(forest.view)


class QuickCalibrator(Calibrator):
    """``Calibrator`` that judges and learns in C."""

    def __init__(self, n_kinds: int, lib: Native, beliefs: Sequence[float] = ()) -> None:
        super().__init__(n_kinds, beliefs)
        self._judge, self._quick_learn = lib.judge, lib.learn
        arrays = *self.weights, *self._parts, *self._seen_by
        self._struct = Weights(*(array.ctypes.data for array in arrays), *self._a.shape)
        self.address = ctypes.addressof(self._struct)

    def judge(self, forest: Forest, warm_n: Ints) -> None:
        warm_n = np.ascontiguousarray(warm_n, np.int64)
        self._judge(view(forest), warm_n.ctypes.data, self.address)

    def _learn(self) -> None:
        seen, error = np.array(self._seen, np.float64), np.empty(len(self._seen))
        self._seen.clear()
        self._quick_learn(self.address, seen.ctypes.data, len(seen), LEAST, error.ctypes.data)


class QuickPays(Pays):
    """``Pays`` that chooses in C, by these times."""

    def __init__(self, lib: Native, times: StepTimes) -> None:
        super().__init__()
        self._pays, self._times = lib.pays, times
        arrays = times.arrays
        self._struct = Choice(*(array.ctypes.data for array in arrays), len(arrays[0]))
        self.address = ctypes.addressof(self._struct)

    def choose(self, forest: Forest, load: Load) -> Bool | None:
        if load.seconds is not self._times or forest.f.size > MOST_NODES or load.spent_s:
            return super().choose(forest, load)
        return forest.chosen if self._pays(view(forest), load.n, load.most, load.margin, self.address) > 0 else None
