"""What a request is promised, what may be expected of it, and where its time went: all that the engine's policies for
objectives and their users say to each other."""

from __future__ import annotations

from typing import Final

import msgspec

OUT_OF_REACH: Final = "slo_out_of_reach"
"""What a strict request is refused with whose promise could not be kept."""


class Slo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request is promised: seconds to its first token, mean seconds of each after it; None where nothing is.
    ``weight``: what its tokens count for beside others' (its class's). ``strict``: to be refused where it cannot be
    kept, instead of being served as well as can be."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    weight: float = 1.0
    strict: bool = False

    @property
    def promises(self) -> bool:
        """Whether it has any bound."""
        return self.ttft_s is not None or self.tpot_s is not None


class Forecast(msgspec.Struct, frozen=True):
    """What may be expected of a request: seconds to its first token and of each after it, tokens of its prompt that are
    in the cache or will be. ``confidence``: share of the newest forecasts that were right within a fifth; None as long
    as there are too few. ``meets``: whether it keeps what was asked for, if anything was; ``retry_after_s``: when it
    might, if it does not."""

    ttft_s: float
    tpot_s: float
    hit_tokens: int
    confidence: float | None = None
    meets: bool = True
    retry_after_s: float = 0.0
    ttft_factor: float = 1.0
    tpot_factor: float = 1.0
    """By what was learned of others, what the engine's state says was multiplied."""


class Behind(msgspec.Struct, frozen=True):
    """Whose prompt was computed while somebody waited for a first token, and how long that took in all."""

    request_id: str
    seconds: float


class Ledger(msgspec.Struct, frozen=True, tag="ledger"):
    """Where a sequence's seconds went, between ``received_s`` (the engine has it) and ``end_s`` (its last token), both
    by the engine's clock. All from ``queue_s`` to ``residual_s`` add up to that:

    ``queue_s`` until it came in; ``again_s`` likewise, after preemptions; of its prompt's rows ``prefill_s``,
    ``recompute_s`` of those that it had before it was preempted and ``missed_s`` of those that had been in the cache
    and were evicted; ``behind_s`` until its first token besides, steps computing others' rows; ``grammar_s`` without a
    mask; ``decode_s`` in steps between its tokens, as far as decodes alone would have taken it, ``prompts_s`` what
    others' prompts made of that, ``guesses_s`` what guesses did; ``residual_s`` is what none of them explains.

    Beside the sum: ``gained_s``, what its tokens that had been guessed would have taken one by one; ``ahead``, who ran
    or waited when it came; ``behind``, whose prompts took longest between then and its first token.
    """

    request_id: str
    index: int
    reason: str
    arrival_s: float
    received_s: float
    end_s: float
    first_s: float | None
    queue_s: float
    again_s: float
    prefill_s: float
    recompute_s: float
    missed_s: float
    behind_s: float
    grammar_s: float
    decode_s: float
    prompts_s: float
    guesses_s: float
    residual_s: float
    gained_s: float
    ahead: int
    behind: tuple[Behind, ...] = ()
