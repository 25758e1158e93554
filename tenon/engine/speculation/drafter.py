"""The face of a drafter: it guesses what sequences say next. Whatever it guesses, what is emitted stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tenon.engine.policies.calibrate import warmth
from tenon.engine.policies.forest import I32, Forest
from tenon.engine.policies.plan import Plan
from tenon.engine.policies.speculate import F64
from tenon.engine.sequence import Seq
from tenon.engine.speculation.tree import ROOT, Tree


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


class Planned:
    """What drafters have in common that look ahead level by level: a plan of how far, which learns from what came of
    it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.counts_n: F64 = np.ones(0)
        """What a token of each of those that are asked for next counts."""

    def verified(self, seq: Seq, tree: Tree, path: Sequence[int], kind: int) -> None:
        """What came of its own guesses, which the tree calls ``kind``: the plan learns from that."""
        warm = warmth(seq.request.add.temperature)
        for at in (ROOT, *path):
            children = [i for i, parent in enumerate(tree.parents) if parent == at and tree.features[i][0] == kind]
            ranks = [tree.features[i][2] for i in children]
            if ranks:
                right = next((tree.features[i][2] for i in children if i in path), None)
                self.plan.observe(warm, ranks, right)
