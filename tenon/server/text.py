"""From token ids to the text that a client sees: incremental decoding, stop strings, log-probabilities in step.

    decoded   [ released ............ | held ... ]
                                        a possible beginning of a stop string

A character is never split across pieces (the detokenizer holds incomplete ones) and no part of a stop string is ever
sent. A token's log-probability travels with the piece that completes its text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from tenon.engine.messages import Delta, PromptScores
from tenon.server.tool_text import CallPart, ToolText

LEAST_LOGPROB: Final = -9999.0
"""Of a token that cannot come: JSON has no infinities."""


class IncrementalDecoder(Protocol):
    """Turns ids into text piece by piece; what would break a character is kept back."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class StopScanner:
    """Finds the first stop string in a growing text, wherever its pieces are cut.

    The one that ends first wins; of those that end together the longest, so that as little as possible is sent.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may be sent now. Once ``found`` is set, nothing more may be pushed."""
        if not self._stops:
            return text
        window = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return window[:at]
        n_held = self._possible_beginning(window)
        self._held = window[len(window) - n_held :]
        return window[: len(window) - n_held]

    def flush(self) -> str:
        """What was held and can no longer become a stop string, for the sequence has ended."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, window: str) -> int:
        """Length of the longest suffix of ``window`` that begins some stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(window)), longest, -1):
                if window.endswith(stop[:size]):
                    longest = size
                    break
        return longest


@dataclass(frozen=True)
class TokenLogprob:
    """One token: its log-probability, none for a prompt's first, and the best alternatives as (id, log-probability)."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int
    """Characters of the output before this token's text; negative in the prompt, from its end."""


class Piece(NamedTuple):
    """What one delta adds to one choice. ``finish_reason`` is set on the last one only."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    reasoning: str = ""
    """What the model thinks before it answers."""
    calls: tuple[CallPart, ...] = ()


class Thought:
    """Where a model's thinking begins and ends: between two tokens, the first of which may stand in the prompt.

    Line breaks after either mark, and before the second, belong to neither text.
    """

    def __init__(self, marks: tuple[int, int], *, begun: bool) -> None:
        self._open, self._close = marks
        self.is_on = begun
        self._is_fresh = begun
        """Nothing but line breaks has come since the last mark."""
        self._breaks = ""

    def is_mark(self, token: int, n_before: int) -> bool:
        """Whether the token, after so many others, begins or ends the thought."""
        if self.is_on and token == self._close:
            self.is_on, self._is_fresh, self._breaks = False, True, ""
            return True
        if n_before == 0 and not self.is_on and token == self._open:
            self.is_on = self._is_fresh = True
            return True
        return False

    def trim(self, text: str) -> str:
        """What of this text, the thought's or what follows it, is to be told now."""
        if self._is_fresh:
            text = text.lstrip("\n")
            self._is_fresh = not text
        if self.is_on:
            text = self._breaks + text
            said = text.rstrip("\n")
            self._breaks = text[len(said) :]
            return said
        return text


class Echo:
    """A prompt that is shown before what follows it, and its tokens' log-probabilities where they are wanted."""

    def __init__(self, text: str, ids: Sequence[int]) -> None:
        self.text, self._ids = text, ids
        self.logprobs: tuple[TokenLogprob, ...] = ()
        self.ranks: tuple[int, ...] = ()
        """Of the tokens from the second on, which is the first that can be scored."""

    def score(self, batches: Sequence[PromptScores], decoder: IncrementalDecoder) -> None:
        """``batches`` are all there are of the prompt, in order; ``decoder`` one at the start of a text."""
        scores: list[float | None] = [None, *(x for batch in batches for x in batch.logprobs)]
        tops = [(), *(top for batch in batches for top in batch.top)]
        offset, found = -len(self.text), []
        for token, logprob, top in zip(self._ids, scores, tops, strict=True):
            found.append(_token_logprob(token, logprob, top, min(offset, 0)))
            offset += len(decoder.push([token]))
        self.logprobs = tuple(found)
        self.ranks = tuple(rank for batch in batches for rank in batch.ranks)


def _token_logprob(token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> TokenLogprob:
    finite = tuple((other, max(x, LEAST_LOGPROB)) for other, x in top)
    return TokenLogprob(token, None if logprob is None else max(logprob, LEAST_LOGPROB), finite, offset)


class OutputText:
    """The text of one sequence as it grows. ``n_tokens`` counts what was generated, stop tokens included.

    Stop strings are looked for in what follows the first ``min_tokens`` tokens, and not in a ``thought``. ``calls``
    takes the calls of tools out of the text.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stops: Sequence[str],
        min_tokens: int = 0,
        thought: Thought | None = None,
        calls: ToolText | None = None,
    ) -> None:
        self._thought, self._calls = thought, calls
        self._is_plain = thought is None and calls is None and not stops
        self.n_thought = 0
        """Tokens of the thought, its marks among them."""
        self._decoder = decoder
        self._min_tokens = min_tokens
        self._scanner = StopScanner(stops)
        self._pending: deque[tuple[int, TokenLogprob]] = deque()
        self._decoded = 0
        self._released = 0
        self.n_tokens = 0
        self.finished = False

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._scanner.found

    def push(self, delta: Delta) -> Piece:
        """Take a delta. The piece's ``finish_reason`` is "stop" where a stop string was completed, and "tool_calls"
        where it would be "stop" and calls have been made."""
        if self._is_plain and delta.finish_reason is None and delta.stop_id is None and not delta.logprobs:
            self.n_tokens += len(delta.ids)
            text = self._decoder.push(delta.ids)
            self._decoded += len(text)
            self._released += len(text)
            return Piece(text)
        piece = self._push(delta)
        if self._calls is None:
            return piece
        text, calls = self._calls.push(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            more, last = self._calls.flush()
            text, calls = text + more, [*calls, *last]
            reason = "tool_calls" if reason == "stop" and self._calls.n_calls else reason
        return piece._replace(text=text, calls=tuple(calls), finish_reason=reason)

    def _push(self, delta: Delta) -> Piece:
        """Token by token, so that nothing depends on how many a delta has."""
        text = reasoning = ""
        logprobs: list[TokenLogprob] = []
        thought = self._thought
        for i, token in enumerate(delta.ids):
            self.n_tokens += 1
            if delta.stop_id is not None and i == len(delta.ids) - 1 and token == delta.stop_id:
                break
            start = self._decoded
            is_mark = thought is not None and thought.is_mark(token, self.n_tokens - 1)
            thinks = is_mark or (thought is not None and thought.is_on)
            self.n_thought += thinks
            new = "" if is_mark else self._decoder.push([token])
            self._decoded += len(new)
            if delta.logprobs:
                top = delta.top[i] if delta.top else ()
                self._pending.append((self._decoded, _token_logprob(token, delta.logprobs[i], top, start)))
            if thinks and thought is not None:
                self._released += len(new)
                reasoning += thought.trim(new)
                logprobs += self._completed()
                continue
            if thought is not None:
                trimmed = thought.trim(new)
                self._released += len(new) - len(trimmed)
                new = trimmed
            new = self._scanner.push(new) if self.n_tokens > self._min_tokens else new
            text += new
            self._released += len(new)
            if self._scanner.found is not None:
                return self._end(text, logprobs, "stop", reasoning, cut=True)
            logprobs += self._completed()
        if delta.finish_reason is None:
            return Piece(text, tuple(logprobs), reasoning=reasoning)
        rest = self._decoder.flush()
        if thought is not None and thought.is_on:
            return self._end(text, logprobs, delta.finish_reason, reasoning + thought.trim(rest), cut=False)
        rest = self._scanner.push(rest)
        self._released += len(rest)
        if self._scanner.found is not None:
            return self._end(text + rest, logprobs, "stop", reasoning, cut=True)
        text += rest + self._scanner.flush()
        return self._end(text, logprobs, delta.finish_reason, reasoning, cut=False)

    def _end(self, text: str, logprobs: list[TokenLogprob], reason: str, reasoning: str, *, cut: bool) -> Piece:
        """``logprobs``: those whose text is told already. Of the others, where a stop string ``cut`` the text, those
        are told that have begun in what is left of it."""
        self.finished = True
        rest = (entry for _, entry in self._pending if not cut or entry.offset < self._released)
        piece = Piece(text, (*logprobs, *rest), reason, reasoning)
        self._pending.clear()
        return piece

    def _completed(self) -> tuple[TokenLogprob, ...]:
        done: list[TokenLogprob] = []
        while self._pending and self._pending[0][0] <= self._released:
            done.append(self._pending.popleft()[1])
        return tuple(done)
