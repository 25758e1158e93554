"""Requests in flight.

Job      one HTTP request: one or more prompts and the queue of what came back for them
Flight   one prompt, as the engine has it, and what has come of it so far
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from tenon.base.errors import TenonError
from tenon.engine import messages as m
from tenon.engine.promises import Forecast, Ledger
from tenon.server.failures import Refusal
from tenon.server.keys import Caller
from tenon.server.slo import NOTHING_HEARD, Heard


class Ending(Protocol):
    """What a job tells the service (:class:`tenon.server.service.Service`)."""

    def close_sequence(self, flight: Flight, index: int, reason: str, n_tokens: int) -> None: ...

    def give_up(self, flight: Flight, reason: str) -> None: ...


@dataclass(frozen=True)
class Trace:
    """What a trace of a request is told: the route, and the client's headers that name the span above it."""

    path: str = ""
    parent: dict[str, str] = field(default_factory=dict)


NO_TRACE: Final = Trace()


@dataclass(frozen=True)
class Origin:
    """Where a request comes from: a name that no other has, when it came, whose it is."""

    request_id: str
    arrival_s: float
    caller: Caller
    trace: Trace = NO_TRACE
    heard: Heard = NOTHING_HEARD
    """What its headers say of how soon it is wanted."""


@dataclass(eq=False)
class Flight:
    """One ``Add`` in flight. ``base``: the job's index of its first choice; ``open``: sequences not yet ended."""

    add: m.Add
    job: Job
    caller: Caller
    base: int
    open: set[int]
    names: dict[int, str]
    """What the engine calls the request that each sequence is in."""
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """Tokens of each sequence that has begun."""
    n_again: int = 0
    """Engines that died under it since it was last cleared of ending them."""
    n_deaths: int = 0
    """All engines that died under it."""
    n_asked: int = 0
    """How often it was asked for again."""
    accepted: bool = False
    cached_tokens: int = 0
    n_output: int = 0
    first_s: float | None = None
    last_s: float | None = None
    """When the newest tokens of its first sequence were handed on."""
    forecast: Forecast | None = None
    """Of one that is promised something."""
    ledgers: list[Ledger] = field(default_factory=list)
    """Of its sequences that have ended, where their time went."""
    end_s: float = 0.0
    """When it ended, once it has."""
    reasons: set[str] = field(default_factory=set)
    scores: list[m.PromptScores] = field(default_factory=list)
    """Of its prompt, where they are wanted: all of them before its first output."""
    vector: bytes = b""
    """What came of an ``Add`` that embeds."""
    cache: dict[str, Any] | None = None
    """What the cache had for its prompt; None until the engine takes it up."""
    trace: Trace = NO_TRACE


class Job:
    """What one HTTP request waits for. Used by one task; ``abort`` may come from any."""

    def __init__(self, service: Ending, queued_tokens: int) -> None:
        self._service = service
        self._queued_tokens = queued_tokens
        self._waiter: asyncio.Future[None] | None = None
        self._queue: list[tuple[int, m.Delta]] = []
        self._n_queued = 0
        self._failure: TenonError | None = None
        self.flights: list[Flight] = []

    @property
    def cached_tokens(self) -> int:
        return sum(flight.cached_tokens for flight in self.flights)

    async def accepted(self) -> None:
        """Wait until the engine has taken every prompt. Raises what it refused the first one with."""
        while self._failure is None and not all(flight.accepted for flight in self.flights):
            await self._turn()
        if self._failure is not None:
            raise self._failure

    async def batch(self) -> list[tuple[int, m.Delta]]:
        """What has come since the last call, at least one (choice, delta); empty once all choices have ended.

        Raises what the request failed with, after everything that came before it was handed out.
        """
        while not self._queue and self._failure is None and any(flight.open for flight in self.flights):
            await self._turn()
        if not self._queue and self._failure is not None:
            raise self._failure
        batch, self._queue, self._n_queued = self._queue, [], 0
        return batch

    def scores(self, prompt: int) -> list[m.PromptScores]:
        """Of that prompt, as far as they have come."""
        return self.flights[prompt].scores

    def close_choice(self, choice: int, n_tokens: int) -> None:
        """This choice is over with its ``n_tokens``-th token, perhaps by a stop string: others are not wanted."""
        for flight in self.flights:
            if flight.base <= choice < flight.base + flight.add.n:
                self._service.close_sequence(flight, choice - flight.base, "stop", n_tokens)

    def abort(self, failure: TenonError | None = None) -> None:
        """Give everything up at once; the engine forgets the sequences. Does nothing after the end."""
        self.fail(failure or Refusal("the client left", status=499, code="client_closed"), "abort")

    def put(self, flight: Flight, delta: m.Delta) -> None:
        """Queue a delta; a client that lets too many wait is given up."""
        self._queue.append((flight.base + delta.index, delta))
        self._n_queued += len(delta.ids)
        self.wake()
        if self._n_queued > self._queued_tokens:
            self.abort(
                Refusal(
                    f"the client reads too slowly: {self._n_queued} tokens are waiting", status=408, code="slow_client"
                )
            )

    def fail(self, failure: TenonError, reason: str) -> None:
        """End all that is left with this failure, counted as ``reason``."""
        if self._failure is None:
            self._failure = failure
        for flight in self.flights:
            self._service.give_up(flight, reason)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _turn(self) -> None:
        """Until something happens. (An ``asyncio.Event`` takes twice as long.)"""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


def again(flight: Flight) -> list[m.Add]:
    """What to ask the next engine for: the whole request if nothing of it has begun, each open sequence by itself
    otherwise. Names are new, so that nothing is mistaken for what came of it before."""
    add = flight.add
    flight.n_asked += 1
    name = f"{add.request_id}~{flight.n_asked}"
    if not flight.outputs:
        flight.scores.clear()
        return [msgspec.structs.replace(add, request_id=name, again=True)]
    return [
        msgspec.structs.replace(
            add,
            request_id=f"{name}#{index}",
            n=1,
            index=index,
            outputs=tuple(flight.outputs.get(index, ())),
            prompt_logprobs=-1,
            again=True,
        )
        for index in sorted(flight.open)
    ]


def outcome_of(reasons: set[str]) -> str:
    """One word for several sequences: "length" if any was cut."""
    return "length" if "length" in reasons else "stop"


def cache_json(misses: m.Misses) -> dict[str, Any]:
    """The ``cache`` of an event: a run's fields that are not known are left out."""
    runs = [{name: it for name, it in msgspec.structs.asdict(run).items() if it is not None} for run in misses.runs]
    return {
        "cached_tokens": misses.cached_tokens, "holes": misses.holes, "n_misses": misses.n_runs, "misses": runs,
    }  # fmt: skip
