"""``SamplingParams``: what a caller may ask of one request. Checked when made; torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tenon.base.errors import RequestError

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_SEED = 2**64


def _require(ok: bool, param: str, value: object, right: str) -> None:
    if not ok:
        raise RequestError(f"{param} must be {right}, got {value!r}", param=param, code="invalid_value")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(param: str, value: object, low: float, high: float, right: str) -> None:
    ok = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )
    _require(ok, param, value, right)


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. ``temperature`` 0 is greedy; filters apply in the order top_k, top_p, min_p.

    ``seed`` None draws one when the request is accepted, so that every run can be repeated. ``max_tokens``
    None means as many as the context holds. Raises ``RequestError`` naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0, "a number from 0 to 100")
        _number("top_p", self.top_p, 0.0, 1.0, "a number above 0, up to 1")
        _require(self.top_p > 0, "top_p", self.top_p, "a number above 0, up to 1")
        _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _require(
            _is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "0 or -1 (off) or a positive integer"
        )
        _require(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        if self.max_tokens is not None:
            _require(
                _is_int(self.max_tokens) and 1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1"
            )
        if self.seed is not None:
            in_range = _is_int(self.seed) and -(2**63) <= self.seed < MAX_SEED
            _require(in_range, "seed", self.seed, "an integer of 64 bits")
        if self.logprobs is not None:
            ok = _is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS
            _require(ok, "logprobs", self.logprobs, f"an integer from 0 to {MAX_LOGPROBS}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        stops = all(isinstance(s, str) and s for s in self.stop) and len(self.stop) <= MAX_STOPS
        _require(stops, "stop", self.stop, f"up to {MAX_STOPS} non-empty strings")
        ids = all(_is_int(i) and 0 <= i < 2**31 for i in self.stop_token_ids)
        _require(ids, "stop_token_ids", self.stop_token_ids, "a list of token ids")
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")

    def with_(self, **changes: Any) -> SamplingParams:
        """A changed copy, checked again."""
        return replace(self, **changes)
