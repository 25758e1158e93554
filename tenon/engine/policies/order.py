"""Who comes in first of those who wait.

    Fifo   by arrival
    Edf    by when their first tokens are due (earliest deadline first, Liu & Layland 1973)
    Fair   likewise, but a tenant's deadlines count from when its share of the device would have come to the request
           (start-time fair queueing, Goyal et al. 1996, in predicted seconds of the device)

A policy is pure: it is told what comes and gives it a time; the earlier goes first. Every time is finite and what comes
later is given a later one in the end, so that everybody has his turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

PATIENCE_S: Final = 2.0
"""In which the first token of a request is due that was promised none."""


@dataclass(frozen=True)
class Coming:
    """A request that comes at ``now_s``: what it costs in predicted seconds of the device, what its tokens count for
    beside others', when its first token is promised, counted from its arrival."""

    now_s: float
    tenant: str
    cost_s: float
    weight: float = 1.0
    ttft_s: float | None = None

    @property
    def patience_s(self) -> float:
        return PATIENCE_S if self.ttft_s is None else self.ttft_s


class Order(Protocol):
    def due_s(self, coming: Coming) -> float:
        """When its first token is due, as far as its turn goes."""
        ...

    def ended(self, tenant: str) -> None:
        """One of the tenant's requests is over."""
        ...


class Fifo:
    def due_s(self, coming: Coming) -> float:
        return coming.now_s

    def ended(self, tenant: str) -> None:
        """All the same."""


class Edf:
    def due_s(self, coming: Coming) -> float:
        return coming.now_s + coming.patience_s

    def ended(self, tenant: str) -> None:
        """All the same."""


class Fair:
    """Of tenants that have requests each gets as much of the device as any other, whatever it sends."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._until_s: dict[str, float] = {}
        """By tenant, when its share will have come to the end of all that it has sent."""

    def due_s(self, coming: Coming) -> float:
        tenant = coming.tenant
        self._open[tenant] = self._open.get(tenant, 0) + 1
        begin_s = max(coming.now_s, self._until_s.get(tenant, coming.now_s))
        self._until_s[tenant] = begin_s + coming.cost_s * len(self._open) / coming.weight
        return begin_s + coming.patience_s

    def ended(self, tenant: str) -> None:
        left = self._open.get(tenant, 0) - 1
        if left > 0:
            self._open[tenant] = left
            return
        self._open.pop(tenant, None)
        self._until_s.pop(tenant, None)  # nothing of it waits, so nothing is owed


ORDERS: Final[dict[str, Callable[[], Order]]] = {"fifo": Fifo, "edf": Edf, "fair": Fair}
"""By the word that a config names them with."""
