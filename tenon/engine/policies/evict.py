"""Which resident block to give up when the pool is full. Blocks in question are held by nobody.

A policy sees blocks become idle and busy and names a victim. ``POLICIES`` maps a config's word to its class.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Final, Protocol


class Evict(Protocol):
    def idle(self, block: int) -> None:
        """The last holder let go of a published block; it may be evicted from now on."""
        ...

    def busy(self, block: int) -> None:
        """An idle block is held again, or gone. Raises ``KeyError`` if it was not idle."""
        ...

    def victim(self) -> int:
        """The idle block to evict; it stays idle until ``busy``. Raises ``LookupError`` if there is none."""
        ...

    def __len__(self) -> int:
        """Number of idle blocks."""
        ...


class Lru:
    """The block idle for longest. A sequence releases its last block first, so that prefixes outlive suffixes."""

    def __init__(self) -> None:
        self._idle: OrderedDict[int, None] = OrderedDict()

    def idle(self, block: int) -> None:
        self._idle[block] = None

    def busy(self, block: int) -> None:
        del self._idle[block]

    def victim(self) -> int:
        if not self._idle:
            raise LookupError("no idle block")
        return next(iter(self._idle))

    def __len__(self) -> int:
        return len(self._idle)


class Random:
    """Any idle block, each as likely: what a policy has to beat, and the quickest way to holes. Seeded, O(1)."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311  nothing here is a secret
        self._blocks: list[int] = []
        self._place: dict[int, int] = {}

    def idle(self, block: int) -> None:
        self._place[block] = len(self._blocks)
        self._blocks.append(block)

    def busy(self, block: int) -> None:
        place, last = self._place.pop(block), self._blocks.pop()
        if last != block:
            self._blocks[place] = last
            self._place[last] = place

    def victim(self) -> int:
        if not self._blocks:
            raise LookupError("no idle block")
        return self._random.choice(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


POLICIES: Final[dict[str, type[Evict]]] = {"lru": Lru, "random": Random}
