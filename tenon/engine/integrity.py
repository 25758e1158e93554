"""Whether what the scheduler holds adds up: after every step of a test, and whenever somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenon.base.errors import IntegrityError
from tenon.engine.sequence import State

if TYPE_CHECKING:
    from tenon.engine.scheduler import Scheduler


def check_integrity(scheduler: Scheduler) -> None:
    """Conservation of blocks, requests and queues. Raises ``IntegrityError``."""
    running, waiting, requests = scheduler.running, scheduler.waiting, scheduler.requests
    holders = [seq for request in requests.values() for seq in request.seqs if seq.n_blocks]
    for group, pool in enumerate(scheduler.pools):
        pool.check_integrity([seq.tables[group][: seq.n_blocks] for seq in holders])
    scheduler.pending.check_integrity(running)
    if scheduler.speculation is not None:
        scheduler.speculation.check_integrity()
    if any(seq.tree is not None and not seq.is_decoding for request in requests.values() for seq in request.seqs):
        raise IntegrityError("a sequence has a tree below a token that is not its newest")
    if {s.id for s in running} != {s.id for s in holders}:
        raise IntegrityError("the sequences that run are not those that hold blocks")
    if any(seq.n_computed >= seq.n_tokens or seq.state is not State.RUNNING for seq in running):
        raise IntegrityError("a running sequence has nothing left to compute, or is not marked as running")
    if scheduler.counters.started != len(requests) + sum(scheduler.counters.finished.values()):
        raise IntegrityError("started requests are not those being served plus those finished")
    if len({s.id for s in (*running, *waiting)}) != len(running) + len(waiting):
        raise IntegrityError("a sequence stands in the queues twice")
