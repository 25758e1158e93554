"""The prompt of one session as it grows, and sessions merged into one stream of requests."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence

from tenon.workloads.draws import Contents
from tenon.workloads.trace import Segment, TraceRequest

# Arrivals are kept to the microsecond: last bits of a logarithm differ between machines, bytes must not.
DIGITS = 6


class Dialogue:
    """What has been said in a session, as segments, and the requests made of it.

    Between two requests: :meth:`say` what a person or a tool adds; :meth:`ask` makes the request out of all that was
    said and adds its answer.
    """

    def __init__(self, session: str, contents: Contents, shared: Sequence[Segment] = ()) -> None:
        self.session = session
        self.segments = list(shared)
        self.n_tokens = sum(segment.n for segment in shared)
        self.turn = 0
        self.last_id = ""
        self._contents = contents

    def say(self, n: int) -> None:
        """``n`` tokens that nobody has said before."""
        self.segments.append(Segment(self._contents.new(), n))
        self.n_tokens += n

    def keep(self, n: int) -> None:
        """Forget what follows the first ``n`` tokens."""
        kept: list[Segment] = []
        left = n
        for segment in self.segments:
            if left <= 0:
                break
            kept.append(Segment(segment.content, min(segment.n, left)))
            left -= segment.n
        self.segments, self.n_tokens = kept, min(n, self.n_tokens)

    def ask(
        self, arrival_s: float, n_output: int, *, gap_s: float | None = None, slo_class: str = "", tenant: str = ""
    ) -> TraceRequest:
        """The request for an answer of ``n_output`` tokens. With ``gap_s`` it waits for the session's last one to
        end.
        """
        content = self._contents.new()
        request = TraceRequest(
            id=f"{self.session}.{self.turn}",
            arrival_s=round(arrival_s, DIGITS),
            prompt=tuple(self.segments),
            n_output=n_output,
            output=content,
            after=self.last_id if gap_s is not None else "",
            gap_s=round(gap_s, DIGITS) if gap_s is not None and self.last_id else 0.0,
            session=self.session,
            turn=self.turn,
            slo_class=slo_class,
            tenant=tenant,
        )
        self.segments.append(Segment(content, n_output))
        self.n_tokens += n_output
        self.turn += 1
        self.last_id = request.id
        return request


def merged(sessions: Iterable[Sequence[TraceRequest]]) -> Iterator[TraceRequest]:
    """The requests of all sessions by arrival. Sessions must come by their first arrival, each in its own order.

    A session is taken when the stream has come to its first request, so that the first requests do not depend on how
    many are taken, and sessions may go on for ever.
    """
    heap: list[tuple[float, int, int, Sequence[TraceRequest]]] = []  # (arrival, session, index in it, all of it)

    def until(arrival_s: float) -> Iterator[TraceRequest]:
        while heap and heap[0][0] < arrival_s:
            _, number, i, requests = heap[0]
            yield requests[i]
            if i + 1 < len(requests):
                heapq.heapreplace(heap, (requests[i + 1].arrival_s, number, i + 1, requests))
            else:
                heapq.heappop(heap)

    for number, requests in enumerate(sessions):
        if requests:
            yield from until(requests[0].arrival_s)
            heapq.heappush(heap, (requests[0].arrival_s, number, 0, requests))
    yield from until(math.inf)
