"""Blocks that are being computed: who comes with the same tokens meanwhile holds them too and waits, computing nothing
twice.

A block is *claimed* by the running sequence that is going to compute it, from its entry until it is computed. Others
that take it over are its *waiters*. K and V of a step are written before any of its rows attends, so a waiter's rows go
into the step that computes the block, or a later one. Where the one who claimed it leaves first, the first of the
waiters by arrival claims it: that one holds it already.

Nobody waits in a circle: to hold a block of another is to have all tokens before it in common, holes are computed in
position order, so whoever waits at a position is waited for at later ones alone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.engine.sequence import Seq


@dataclass(eq=False, slots=True)
class _Claim:
    owner: Seq
    i: int
    """Position block."""
    waiters: list[Seq] = field(default_factory=list)


class Pending:
    """The claims of one scheduler's running sequences, by key. It takes and gives back no blocks."""

    def __init__(self) -> None:
        self._claims: dict[bytes, _Claim] = {}
        self._planned: dict[int, int] = {}
        self.n_claimed = 0
        """Blocks ever claimed: what cannot be shared now can become so only by another of these."""

    def owner(self, seq: Seq, i: int) -> Seq | None:
        """Who is going to compute what position block ``i`` of ``seq`` holds; keys are not believed, but compared."""
        claim = self._claims.get(seq.digest(i))
        if claim is None or claim.i != i or claim.owner.block_content(i) != seq.block_content(i):
            return None
        return claim.owner

    def enter(self, seq: Seq, awaited: Iterable[int], own: Iterable[int]) -> None:
        """A sequence runs: it holds the ``awaited`` position blocks of others, and claims its ``own`` where nobody has
        claimed the key. Both in order."""
        seq.awaited = list(awaited)
        for i in seq.awaited:
            self._claims[seq.digest(i)].waiters.append(seq)
        for i in own:
            if seq.digest(i) not in self._claims:
                self._claims[seq.digest(i)] = _Claim(seq, i)
                seq.claimed.append(i)
        self.n_claimed += len(seq.claimed)

    def begin_step(self) -> None:
        """Nothing is planned yet."""
        self._planned.clear()

    def runs(self, seq: Seq, budget: int) -> list[tuple[int, int]]:
        """(start, n) of what the sequence computes in this step, at most ``budget`` rows: nothing of what it awaits,
        nor beyond what is not there by then. Those whom it waits for in this step are asked before it."""
        runs = seq.runs(budget, self._n_coming(seq) if seq.awaited else 0)
        if runs and seq.claimed:
            self._planned[seq.id] = sum(runs[-1])
        return runs

    def _n_coming(self, seq: Seq) -> int:
        """How many of the awaited blocks, from the first on, this step computes."""
        for n, i in enumerate(seq.awaited):
            owner = self._claims[seq.digest(i)].owner
            if self._planned.get(owner.id, 0) < (i + 1) * seq.block_tokens:
                return n
        return len(seq.awaited)

    def computed(self, seq: Seq) -> list[tuple[int, Seq]]:
        """What the sequence claimed below ``n_computed`` is there now, for its waiters too; each block with each of
        them."""
        waiters: list[tuple[int, Seq]] = []
        while seq.claimed and (seq.claimed[0] + 1) * seq.block_tokens <= seq.n_computed:
            i = seq.claimed.pop(0)
            for waiter in self._claims.pop(seq.digest(i)).waiters:
                waiter.arrived(i)
                waiters.append((i, waiter))
        return waiters

    def leave(self, seq: Seq) -> None:
        """The sequence runs no longer: it waits for nothing, and those who wait for it do so no more."""
        for i in seq.awaited:
            self._claims[seq.digest(i)].waiters.remove(seq)
        for i in seq.claimed:
            claim = self._claims[seq.digest(i)]
            if not claim.waiters:
                del self._claims[seq.digest(i)]
                continue
            heir = claim.owner = min(claim.waiters, key=lambda s: (s.request.order, s.index))
            claim.waiters.remove(heir)
            heir.awaited.remove(i)
            insort(heir.claimed, i)
        seq.awaited, seq.claimed = [], []

    def check_integrity(self, running: Sequence[Seq]) -> None:
        """Recount claims and waiters from the running sequences. Raises ``IntegrityError`` naming what is off."""
        claimed = {seq.digest(i): (seq, i) for seq in running for i in seq.claimed}
        if {key: (claim.owner, claim.i) for key, claim in self._claims.items()} != claimed:
            raise IntegrityError("the blocks that are claimed are not those that running sequences are to compute")
        n_waiters = 0
        for seq in running:
            if any((i + 1) * seq.block_tokens <= seq.n_computed for i in (*seq.claimed, *seq.awaited)):
                raise IntegrityError(f"sequence {seq.id} claims or awaits a block that is computed")
            for i in seq.awaited:
                claim = self._claims.get(seq.digest(i))
                if claim is None or seq not in claim.waiters:
                    raise IntegrityError(f"sequence {seq.id} waits for block {i}, which nobody computes for it")
                if any(not np.array_equal(a[i], b[i]) for a, b in zip(seq.tables, claim.owner.tables, strict=True)):
                    raise IntegrityError(f"sequence {seq.id} waits for block {i} in another place than it is computed")
                n_waiters += 1
        if n_waiters != sum(len(claim.waiters) for claim in self._claims.values()):
            raise IntegrityError("a block has waiters that do not wait for it")
