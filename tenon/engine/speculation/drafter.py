"""The face of a drafter: it guesses what sequences say next. Whatever it guesses, what is emitted stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tenon.engine.policies.forest import I32, Forest
from tenon.engine.sequence import Seq


class Drafter(Protocol):
    name: str
    kinds: tuple[str, ...]
    """Names of the kinds of guesses it makes: what ``Forest.source`` counts through."""
    beliefs: tuple[float, ...]
    """Of each kind, by how much such guesses are likelier than ``Forest.q`` says, in logits, as far as that is known
    beforehand."""

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        """A row for each sequence, at most ``depth_n`` deep and ``room`` nodes; None where there is nothing to guess.
        Valid until the next call. Looks at all tokens that have come since it was last asked."""
        ...

    def forget(self, seq: Seq) -> None:
        """It has ended, or its tree is not to be drafted any more."""
        ...

    def reset(self) -> None:
        """Nothing of what was said before counts: other weights say other things."""
        ...

    def close(self) -> None: ...
