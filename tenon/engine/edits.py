"""What a request wants done to its logits before each token: penalties, biases, tokens that must not come.

All of it follows from the request and the tokens so far, so that a sequence that is computed once more, here or by
another engine, gets the same edits. They are applied in this order:

    repetition_penalty   of every token in prompt or output: a positive logit is divided by it, another multiplied
    frequency_penalty    of every token in the output: as often as it stands there, subtracted
    presence_penalty     of every token in the output: subtracted once
    logit_bias           added
    bad_words            the last token of each, where the tokens before it stand at the end of the context: never
    min_tokens           whatever ends the sequence: never before there are so many
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tenon.engine.messages import Add
from tenon.engine.step import EDIT_ADD, EDIT_BAN, EDIT_REPEAT, F32, I32, U8

NO_TOKENS, NO_KINDS, NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.float32)


def wanted(add: Add) -> bool:
    """Whether the request has any edits at all."""
    penalised = add.repetition_penalty != 1.0 or add.frequency_penalty != 0.0 or add.presence_penalty != 0.0
    return penalised or bool(add.logit_bias or add.bad_words or add.min_tokens)


class Edits:
    """Of one sequence. Tokens are counted as they come, so an edit costs as much as the context has unique tokens."""

    def __init__(self, add: Add, stop_ids: Collection[int]) -> None:
        self._add = add
        self._stops = np.array(sorted(stop_ids), np.int32)
        self._bias = np.array([token for token, _ in add.logit_bias], np.int32)
        self._bias_values = np.array([value for _, value in add.logit_bias], np.float32)
        self._bad = [np.array(word, np.int32) for word in add.bad_words]
        self._counts_prompt = add.repetition_penalty != 1.0
        self._counts_output = self._counts_prompt or add.frequency_penalty != 0.0 or add.presence_penalty != 0.0
        self._n_counted = self._n_of_prompt = 0
        self._place: dict[int, int] = {}
        """Of each token counted, its place in the arrays below."""
        self._seen: I32 = np.zeros(0, np.int32)
        self._count: I32 = np.zeros(0, np.int32)
        """How often it stands in the output."""

    def of(self, context: I32, n_prompt: int, n_ahead: int = 0) -> tuple[I32, U8, F32]:
        """Token, kind and value of each edit for the token after ``context``, which only ever grows, but for its last
        ``n_ahead`` tokens: a guess, of which another may be tried next.

        Tokens of neighbours of one kind differ, save where values are added.
        """
        if not (n_ahead and self._counts_output):
            return self._of(context, n_prompt)
        n_sure = len(context) - n_ahead
        self._take(context[:n_sure], n_prompt)
        try:
            return self._of(context, n_prompt)
        finally:
            self._give_back(context[n_sure:])

    def _of(self, context: I32, n_prompt: int) -> tuple[I32, U8, F32]:
        add, n_output = self._add, len(context) - n_prompt
        tokens: list[I32] = []
        kinds: list[int] = []
        values: list[F32 | float] = []

        def edit(which: I32, kind: int, value: F32 | float) -> None:
            if len(which):
                tokens.append(which)
                kinds.append(kind)
                values.append(value)

        if self._counts_output:
            self._take(context, n_prompt)
            seen, count = self._seen[: len(self._place)], self._count[: len(self._place)]
            if self._counts_prompt:
                edit(seen, EDIT_REPEAT, add.repetition_penalty)
            if add.frequency_penalty != 0.0 or add.presence_penalty != 0.0:
                output = count > 0
                penalty = add.frequency_penalty * count[output] + add.presence_penalty
                edit(seen[output], EDIT_ADD, -penalty.astype(np.float32))
        edit(self._bias, EDIT_ADD, self._bias_values)
        banned = [word[-1:] for word in self._bad if _ends_with(context, word[:-1])]
        if n_output < add.min_tokens:
            banned.append(self._stops)
        if banned:
            edit(np.unique(np.concatenate(banned)), EDIT_BAN, 0.0)
        if not tokens:
            return NO_TOKENS, NO_KINDS, NO_VALUES
        sizes = [len(which) for which in tokens]
        spread = [np.broadcast_to(np.float32(value), n) for value, n in zip(values, sizes, strict=True)]
        return np.concatenate(tokens), np.repeat(np.array(kinds, np.uint8), sizes), np.concatenate(spread)

    def _take(self, context: I32, n_prompt: int) -> None:
        """Count what has come since the last call."""
        if self._n_counted < n_prompt:
            self._n_counted = n_prompt
            if self._counts_prompt:
                self._seen = np.unique(context[:n_prompt])
                self._count = np.zeros(len(self._seen), np.int32)
                self._place = {token: i for i, token in enumerate(self._seen.tolist())}
                self._n_of_prompt = len(self._place)
        for token in context[self._n_counted :].tolist():
            at = self._place.setdefault(token, len(self._place))
            if at == len(self._seen):
                more = np.zeros(max(32, at), np.int32)
                self._seen, self._count = np.concatenate((self._seen, more)), np.concatenate((self._count, more))
            self._seen[at] = token
            self._count[at] += 1
        self._n_counted = len(context)

    def _give_back(self, tokens: I32) -> None:
        """Uncount the last ones."""
        for token in tokens[::-1].tolist():
            at = self._place[token]
            self._count[at] -= 1
            if at == len(self._place) - 1 and at >= self._n_of_prompt and self._count[at] == 0:
                del self._place[token]
        self._n_counted -= len(tokens)


def _ends_with(context: I32, tail: I32) -> bool:
    n = len(tail)
    return n == 0 or (n <= len(context) and bool((context[-n:] == tail).all()))
