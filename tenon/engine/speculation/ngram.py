"""Guess that what followed the last few tokens before follows them again (prompt lookup decoding).

Per sequence, over its prompt and output: the latest earlier place of its last n tokens, the longest n first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tenon.engine.policies.forest import I32, Forest
from tenon.engine.sequence import Seq

LONGEST: Final = 4
SHORTEST: Final = 2
TRUST: Final = 0.7
"""Of each guessed token, before anything is learned."""


class _Places:
    """Of one sequence: after each run of n tokens, the position that followed its latest place."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}
        self._n_entered = SHORTEST
        """Runs that end before this position are entered."""

    def enter(self, tokens: I32) -> None:
        """The runs that something follows by now."""
        first = max(0, self._n_entered - LONGEST)
        piece = tokens[first:].tolist()
        for end in range(self._n_entered - first, len(piece)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self.after[tuple(piece[end - n : end])] = first + end
        self._n_entered = max(self._n_entered, len(tokens))


class Ngram:
    name = "ngram"
    kinds = tuple(f"ngram-{n}" for n in range(SHORTEST, LONGEST + 1))
    beliefs: tuple[float, ...] = (0.0,) * len(kinds)

    def __init__(self) -> None:
        self._places: dict[int, _Places] = {}

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        forest = None
        for i, (seq, depth) in enumerate(zip(seqs, depth_n.tolist(), strict=True)):
            places = self._places.setdefault(seq.id, _Places())
            tokens = seq.tokens[: seq.n_tokens]
            places.enter(tokens)
            tail = tuple(tokens[-LONGEST:].tolist())
            for n in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
                at = places.after.get(tail[len(tail) - n :])
                if at is not None:
                    break
            else:
                continue
            guess = tokens[at : at + min(depth, room)]
            forest = forest or Forest.empty(len(seqs), room)
            k = len(guess)
            forest.token[i, :k] = guess
            forest.parent[i, :k] = range(-1, k - 1)
            forest.depth[i, :k] = range(1, k + 1)
            forest.source[i, :k] = n - SHORTEST
            forest.q[i, :k] = TRUST
        return forest

    def forget(self, seq: Seq) -> None:
        self._places.pop(seq.id, None)

    def reset(self) -> None:
        self._places.clear()

    def close(self) -> None:
        self.reset()
