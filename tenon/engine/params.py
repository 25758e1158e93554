"""``SamplingParams``: what a caller may ask of one request. Checked when made; torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenon.base.errors import RequestError
from tenon.engine.messages import Add, Grammar
from tenon.engine.structure import Structure

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_SEED = 2**64
MAX_BIASES = 1024
MAX_BAD_WORDS, MAX_BAD_CHARS = 128, 256


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
    None means as many as the context holds. Penalties and ``logit_bias`` (token id to what is added) are applied as
    :mod:`tenon.engine.edits` says; ``bad_words`` never come, and nothing ends the text before ``min_tokens``, stop
    strings neither. Log-probabilities are the model's own, before all that. ``speculative``: whether tokens may be
    guessed ahead where the engine does that, or how many at most; outputs are the same whichever. Raises
    ``RequestError`` naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    """What the form of the output must be; a model that reasons thinks freely before."""
    speculative: bool | int = True

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0, "a number from 0 to 100")
        _number("top_p", self.top_p, 0.0, 1.0, "a number above 0, up to 1")
        _require(self.top_p > 0, "top_p", self.top_p, "a number above 0, up to 1")
        _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _require(
            _is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "0 or -1 (off) or a positive integer"
        )
        _require(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, "a number above 0, up to 10")
        _require(
            self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a number above 0, up to 10"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0, "a number from -2 to 2")
        self._check_words()
        if self.max_tokens is not None:
            _require(
                _is_int(self.max_tokens) and 1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1"
            )
        if self.seed is not None:
            in_range = _is_int(self.seed) and -(2**63) <= self.seed < MAX_SEED
            _require(in_range, "seed", self.seed, "an integer of 64 bits")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _require(ok, name, value, f"an integer from 0 to {MAX_LOGPROBS}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        stops = all(isinstance(s, str) and s for s in self.stop) and len(self.stop) <= MAX_STOPS
        _require(stops, "stop", self.stop, f"up to {MAX_STOPS} non-empty strings")
        ids = all(_is_int(i) and 0 <= i < 2**31 for i in self.stop_token_ids)
        _require(ids, "stop_token_ids", self.stop_token_ids, "a list of token ids")
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        ahead = isinstance(self.speculative, bool) or (_is_int(self.speculative) and 1 <= self.speculative < 2**31)
        _require(ahead, "speculative", self.speculative, "true, false or an integer of at least 1")

    def _check_words(self) -> None:
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(bias))
        few = len(self.logit_bias) <= MAX_BIASES
        _require(few, "logit_bias", f"{len(self.logit_bias)} entries", f"of at most {MAX_BIASES} entries")
        for token, value in self.logit_bias:
            _require(_is_int(token) and 0 <= token < 2**31, "logit_bias", token, "a mapping from token ids")
            _number("logit_bias", value, -100.0, 100.0, "of numbers from -100 to 100")
        twice = len({token for token, _ in self.logit_bias}) < len(self.logit_bias)
        _require(not twice, "logit_bias", self.logit_bias, "of one number for each token")
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        words = all(isinstance(word, str) and 1 <= len(word) <= MAX_BAD_CHARS for word in self.bad_words)
        right = f"up to {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_CHARS} characters"
        _require(words and len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", self.bad_words, right)
        ok = _is_int(self.min_tokens) and 0 <= self.min_tokens < 2**31
        _require(ok, "min_tokens", self.min_tokens, "an integer of at least 0")

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        stop_ids: tuple[int, ...],
        bad_words: tuple[tuple[int, ...], ...],
        arrival_s: float,
        tenant: str = "",
        grammar: Grammar | None = None,
    ) -> Add:
        """The engine's message for one prompt. ``bad_words`` are this one's as tokens (see ``Tokenizer.spellings``),
        ``grammar`` its structure compiled."""
        return Add(
            request_id=request_id,
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            seed=seed % MAX_SEED,
            n=self.n,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            bad_words=bad_words,
            min_tokens=self.min_tokens,
            stop_ids=stop_ids,
            ignore_eos=self.ignore_eos,
            grammar=grammar,
            n_logprobs=-1 if self.logprobs is None else self.logprobs,
            prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
            tenant=tenant,
            arrival_s=arrival_s,
            speculate=-1 if self.speculative is True else int(self.speculative),
        )

    def with_(self, **changes: Any) -> SamplingParams:
        """A changed copy, checked again."""
        return replace(self, **changes)
