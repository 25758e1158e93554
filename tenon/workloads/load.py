"""Load over HTTP: sends a trace's requests at their times, whatever the server does, and tells what became of each.

    LoadOptions   what to send where
    find_server   asks the server for its model and vocabulary
    Load          the run: each request goes out when it is due, each ends as one ``Outcome``

Open loop: a request is sent when it is due, also if earlier ones are not answered, and its latencies count from that
time. Only a request that follows another (``after``) waits, for that one's end and its own pause. What is due and
cannot be sent in time shows as lag, never as a shorter latency.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError, ResourceError
from tenon.workloads.answers import MESSAGE_CHARS, Answer, message_of
from tenon.workloads.prompts import PATHS, Endpoint, Prompts
from tenon.workloads.report import Outcome
from tenon.workloads.streaming import Client, Failed, Patience, Target
from tenon.workloads.trace import Trace, TraceRequest

LEAD_S: Final = 0.2
"""How long before it is due a request is made ready; the load's time 0 is so long after its start."""
INLINE_TOKENS: Final = 2048
"""Bodies up to this size are made on the event loop, larger ones in a thread: what is due meanwhile goes out."""
LATE_S: Final = 0.010
"""A 99th percentile of the client's own lag above this makes its figures doubtful."""
INTERRUPTED: Final = "interrupted"
SKIPPED: Final = "skipped"


@dataclass(frozen=True)
class LoadOptions:
    """What to send where. ``vocab_size`` above 0 sends token ids. ``warmup``: so many first requests do not count.
    ``extra``: fields of every body; ``fields``: of one request's, by its id in the trace."""

    target: Target
    model: str
    endpoint: Endpoint = "completions"
    vocab_size: int = 0
    rate_scale: float = 1.0
    limit: int | None = None
    warmup: int = 0
    concurrency_limit: int | None = None
    ignore_eos: bool = False
    feed_answers: bool = False
    chunk_usage: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` naming the option."""

        def wrong(name: str, right: str) -> ConfigError:
            return ConfigError(f"{name} must be {right}, got {getattr(self, name)!r}", subject=name)

        if not (math.isfinite(self.rate_scale) and self.rate_scale > 0):
            raise wrong("rate_scale", "above 0")
        if self.limit is not None and self.limit < 1:
            raise wrong("limit", "at least 1")
        if self.warmup < 0:
            raise wrong("warmup", "at least 0")
        if self.concurrency_limit is not None and self.concurrency_limit < 1:
            raise wrong("concurrency_limit", "at least 1")
        if self.feed_answers and self.vocab_size:
            raise ConfigError("feed_answers needs text prompts: answers come back as text", subject="feed_answers")


class _Meta(msgspec.Struct):
    n_vocab: int | None = None


class _Model(msgspec.Struct):
    """``vocab_size`` is Tenon's word for it, ``meta.n_vocab`` llama.cpp's; others do not say."""

    id: str
    vocab_size: int | None = None
    meta: _Meta | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True)
class ServerModel:
    """What a server serves; ``vocab_size`` is 0 where it does not say."""

    name: str
    vocab_size: int


async def find_server(target: Target, model: str = "", *, patience: Patience, clock: Clock = SYSTEM) -> ServerModel:
    """Ask ``/models``: the model named, or else the first one.

    Raises ``ResourceError`` where nobody answers, ``ConfigError`` where no model is named and the server names none.
    """
    client = Client(target, patience, clock)
    try:
        reply = await client.send("GET", "/models")
    except Failed as failed:
        raise ResourceError(f"no server answers at {target.url} ({failed})", subject=target.url) from failed
    finally:
        await client.close()
    listed: list[_Model] = []
    if reply.status == 200:
        try:
            listed = msgspec.json.decode(reply.body, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            listed = []  # a server may have another list of models, or none; it is asked for a convenience only
    if not model and not listed:
        said = f"HTTP {reply.status}, {message_of(reply.body)}" if reply.status != 200 else "no list of models"
        raise ConfigError(
            f"no model is named, and {target.url}/models answers with {_clean(said, target.key)}", subject="model"
        )
    found = next((one for one in listed if not model or one.id == model), None)
    size = (found.vocab_size or (found.meta.n_vocab if found.meta else None) or 0) if found else 0
    return ServerModel(model or listed[0].id, size if size >= 16 else 0)


class Load:
    """One run. ``receive`` gets each counted request's outcome once, as it ends; times count from the load's time 0.

    The counters may be read at any time in the same loop.
    """

    def __init__(
        self, trace: Trace, options: LoadOptions, receive: Callable[[Outcome], None], *, clock: Clock = SYSTEM
    ) -> None:
        """Raises ``ConfigError`` for a trace of which nothing would count."""
        self._requests: Sequence[TraceRequest] = trace.requests[: options.limit]
        if options.warmup >= len(self._requests):
            raise ConfigError(
                f"the trace {trace.header.name!r} has {len(self._requests)} requests to send and {options.warmup} are "
                "for warming up; none is left to count",
                subject="warmup",
            )
        self._options, self._receive, self._clock = options, receive, clock
        wanted = {segment.content for request in self._requests if request.after for segment in request.prompt}
        self._reused = {request.output for request in self._requests if request.output} & wanted
        self._prompts = Prompts(
            options.model,
            options.endpoint,
            vocab_size=options.vocab_size,
            ignore_eos=options.ignore_eos,
            chunk_usage=options.chunk_usage,
            outputs=self._reused,
            extra=options.extra,
            fields=options.fields,
        )
        self._followers: dict[str, list[int]] = {}
        self._due: list[tuple[float, int]] = []
        """A heap of (intended time, place in the trace): what can be sent once its time has come."""
        for place, request in enumerate(self._requests):
            if request.after:
                self._followers.setdefault(request.after, []).append(place)
            else:
                self._due.append((request.arrival_s / options.rate_scale, place))
        heapq.heapify(self._due)
        self._answers: dict[int, str] = {}
        self._lag_s = array("d")
        self._seen: Counter[str] = Counter()
        self._traced_prompt = self._real_prompt = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._stopping = False
        self._bug: BaseException | None = None
        self._client = Client(options.target, options.patience, clock)
        limit = options.concurrency_limit
        self._slots = asyncio.Semaphore(limit) if limit else None
        self.start_s = 0.0
        self.n_total = len(self._requests)
        self.n_sent = self.n_running = self.n_held = self.n_answered = self.n_failed = 0

    def stop(self) -> None:
        """Send no more and give up what is in flight; the run then ends as usual."""
        self._stopping = True
        self._changed.set()

    async def run(self) -> tuple[str, ...]:
        """Send everything and wait for the ends. What a reader of the outcomes must know is returned, as sentences."""
        self.start_s = self._clock.now_s() + LEAD_S
        try:
            while not self._stopping and (self._due or self._tasks):
                self._changed.clear()
                wait_s = self._due[0][0] - LEAD_S - self._now_s() if self._due else None
                if wait_s is None or wait_s > 0:
                    await self._wait(wait_s)
                    continue
                intended_s, place = heapq.heappop(self._due)
                task = asyncio.create_task(self._one(place, intended_s))
                self._tasks.add(task)
                task.add_done_callback(self._over)
        finally:
            self._stopping = True
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()
        if self._bug is not None:
            raise self._bug
        return self._notes()

    def _over(self, task: asyncio.Task[None]) -> None:
        """A request's task has ended. What no outcome stands for is a bug and ends the run."""
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug = task.exception()
            self._stopping = True
        self._changed.set()

    # One request.

    async def _one(self, place: int, intended_s: float) -> None:
        """From its preparation to its outcome. Cancelled before it was sent, it has none."""
        request = self._requests[place]
        if request.n_prompt > INLINE_TOKENS:
            body = await asyncio.to_thread(self._prompts.body, request, self._answers)
        else:
            body = self._prompts.body(request, self._answers)
        while (left_s := intended_s - self._now_s()) > 0:
            await asyncio.sleep(left_s)
        self._lag_s.append(self._now_s() - intended_s)
        if self._slots is None:
            await self._send(place, intended_s, body)
            return
        if self._slots.locked():
            self.n_held += 1
        async with self._slots:
            await self._send(place, intended_s, body)

    async def _send(self, place: int, intended_s: float, body: bytes) -> None:
        request = self._requests[place]
        answer = Answer(request.n_output, keep_text=self._options.feed_answers and request.output in self._reused)
        sent_s = self._now_s()
        self.n_sent += 1
        self.n_running += 1
        error = ""
        try:
            reply = await self._client.send("POST", PATHS[self._options.endpoint], body, answer.receive)
            error = answer.verdict(reply)
        except Failed as failed:
            error = str(failed)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            error = f"{INTERRUPTED}: the load was stopped"
        finally:
            self.n_running -= 1
        end_s = (answer.end_s - self.start_s) if answer.end_s is not None and not error else self._now_s()
        self._end(place, self._outcome(request, answer, intended_s, sent_s, end_s, error), answer)

    def _outcome(
        self, request: TraceRequest, answer: Answer, intended_s: float, sent_s: float, end_s: float, error: str
    ) -> Outcome:
        n_prompt = answer.n_prompt or request.n_prompt
        return Outcome(
            id=request.id,
            intended_s=intended_s,
            sent_s=sent_s,
            end_s=end_s,
            n_prompt=n_prompt,
            token_s=tuple(stamp - self.start_s for stamp in answer.token_stamps()),
            cached_tokens=min(answer.cached_tokens, n_prompt),
            finish_reason=answer.finish_reason,
            slo_class=request.slo_class,
            tenant=request.tenant,
            error=_clean(error, self._options.target.key),
            n_chunks=len(answer.chunk_s),
        )

    def _end(self, place: int, outcome: Outcome, answer: Answer) -> None:
        """Hand the outcome on and let follow what follows."""
        request = self._requests[place]
        if not outcome.error:
            self.n_answered += 1
            if answer.text:
                self._answers[request.output] = "".join(answer.text)
            self._count(request, outcome, answer)
        else:
            self.n_failed += 1
        self._tell(place, outcome)
        for follower in self._followers.pop(request.id, ()):
            intended_s = outcome.end_s + self._requests[follower].gap_s
            if not outcome.error:
                heapq.heappush(self._due, (intended_s, follower))
            elif not self._stopping:
                self._skip(follower, outcome)
        self._changed.set()

    def _skip(self, place: int, failed: Outcome) -> None:
        """What follows a failed request, and what follows that, is not sent and counts as failed."""
        error = _clean(f"{SKIPPED}: {failed.id}, which it follows, failed ({failed.error})")
        waiting = [(place, failed.end_s)]
        while waiting:
            place, end_s = waiting.pop()
            request = self._requests[place]
            at_s = end_s + request.gap_s
            self.n_failed += 1
            outcome = Outcome(
                id=request.id, intended_s=at_s, sent_s=at_s, end_s=at_s, n_prompt=request.n_prompt,
                slo_class=request.slo_class, tenant=request.tenant, error=error,
            )  # fmt: skip
            self._tell(place, outcome)
            waiting += [(follower, at_s) for follower in self._followers.pop(request.id, ())]

    def _tell(self, place: int, outcome: Outcome) -> None:
        if place >= self._options.warmup:
            self._receive(outcome)

    # Inside.

    def _now_s(self) -> float:
        return self._clock.now_s() - self.start_s

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _count(self, request: TraceRequest, outcome: Outcome, answer: Answer) -> None:
        self._traced_prompt += request.n_prompt
        self._real_prompt += answer.n_prompt or request.n_prompt
        self._seen["uncounted"] += answer.n_output is None
        self._seen["several"] += answer.is_spread
        self._seen["short"] += len(outcome.token_s) < request.n_output
        self._seen["fed"] += bool(request.after) and any(s.content in self._reused for s in request.prompt)

    def _notes(self) -> tuple[str, ...]:
        options, seen, notes = self._options, self._seen, []
        if len(self._lag_s) and (late_s := float(np.quantile(np.array(self._lag_s), 0.99))) > LATE_S:
            notes.append(
                f"the client could not keep up: it was ready to send {late_s * 1e3:.1f} ms late at the 99th percentile "
                f"(at most {LATE_S * 1e3:g} ms is sound); lower the rate or give it a core of its own"
            )
        if self.n_held:
            notes.append(
                f"not an open loop: the limit of {options.concurrency_limit} requests at once held back {self.n_held} "
                "that were due; their latencies count from when they were due"
            )
        unsent = self.n_total - self.n_answered - self.n_failed
        if unsent:
            notes.append(f"stopped before its end: {unsent} of {self.n_total} requests were not sent")
        if options.warmup:
            notes.append(f"the first {options.warmup} requests were sent to warm up and are not counted")
        if seen["uncounted"]:
            notes.append(f"{seen['uncounted']} answers came without usage: their chunks were counted as tokens")
        if seen["several"]:
            notes.append(
                f"in {seen['several']} answers chunks and tokens differ in number, and chunks do not say how many they "
                "hold: tokens are spread over the chunks evenly, so that gaps between tokens are approximate"
            )
        if seen["short"]:
            hint = "" if options.ignore_eos else "; --ignore-eos asks for the trace's lengths"
            notes.append(f"{seen['short']} answers are shorter than the trace asks for{hint}")
        if self._traced_prompt and abs(self._real_prompt / self._traced_prompt - 1) > 0.01:
            notes.append(
                f"the server counted {self._real_prompt} prompt tokens, the trace has {self._traced_prompt}: "
                "texts do not become one token a word here"
            )
        if seen["fed"] and not options.feed_answers:
            notes.append(
                f"{seen['fed']} prompts contain earlier answers as the trace has them, not as the server gave them: "
                "what it cached of its answers cannot be hit"
            )
        return tuple(notes)


def _clean(said: str, key: str = "") -> str:
    """One short line, without the key: servers repeat wrong keys in their messages."""
    line = " ".join((said.replace(key, "[key]") if key else said).split())
    return line if len(line) <= MESSAGE_CHARS else line[: MESSAGE_CHARS - 1] + "…"
