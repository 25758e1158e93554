"""Requests come, and their sequences come in: one that waited, with what of its context is resident or pending and
blocks for the rest; its siblings, with what it has computed of their prompt; and who waited for blocks that another was
to compute gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenon.base.errors import Overloaded
from tenon.engine.admission import check
from tenon.engine.blocks import root_digest
from tenon.engine.messages import Add
from tenon.engine.reuse import hold, resident, runs_of, turn_of
from tenon.engine.sequence import Request, Seq, State

if TYPE_CHECKING:
    from tenon.engine.scheduler import Scheduler


def requested(scheduler: Scheduler, add: Add, order: int, seq_id: int) -> Request:
    """The request as it would be queued, its sequences' ids from ``seq_id`` on; nothing changes. Raises
    ``RequestError``, ``ContextTooLong`` or, where the queue is full, ``Overloaded``."""
    config = scheduler.config
    check(add, scheduler.vocab_size, scheduler.max_model_len, config.max_sequences)
    if len(scheduler.waiting) >= config.max_waiting and not add.again:
        message = f"{len(scheduler.waiting)} requests are waiting already, which is the limit"
        raise Overloaded(message, retry_after_s=1.0)
    root = root_digest(scheduler.secret, scheduler.model, str(scheduler.weights_version), add.tenant)
    stop_ids = frozenset(add.stop_ids) | (frozenset() if add.ignore_eos else scheduler.eos_ids)
    request = Request(add, order, scheduler.secret, root, stop_ids)
    max_tree = 0 if scheduler.speculation is None else scheduler.speculation.max_nodes
    for index in range(add.index, add.index + add.n):
        n_groups = len(scheduler.pools)
        request.seqs.append(Seq(seq_id + index - add.index, request, index, n_groups, config.block_tokens, max_tree))
    return request


def enter(scheduler: Scheduler, seq: Seq) -> bool:
    """Match what is resident or pending, take blocks for all tokens known (or ever possible, if preempted often),
    run."""
    config, size = scheduler.config, scheduler.config.block_tokens
    last = len(seq.tokens) if seq.n_preempted >= scheduler.config.max_preemptions else seq.n_tokens
    n_blocks = -(-last // size)
    if seq.looked_up is not None:
        n_hits, n_offered = seq.looked_up
        n_hits += _n_offered(scheduler) - n_offered  # all that was published or claimed since may be a hit
        if n_blocks - n_hits > min(pool.n_available for pool in scheduler.pools):
            return False
    gaps = config.reuse == "blocks"
    looks = config.prefix_cache and seq.reads_cache
    cached, awaited = resident(seq, scheduler.pools, scheduler.pending, gaps=gaps) if looks else ({}, {})
    seq.looked_up = len(cached) + len(awaited), _n_offered(scheduler)
    # Matched idle blocks count as available until they are held.
    for group, pool in enumerate(scheduler.pools):
        n_held = len(awaited) + sum(pool.ref[blocks[group]] > 0 for blocks in cached.values())
        if n_blocks - n_held > pool.n_available:
            return False
    pending = {i: [int(table[i]) for table in owner.tables] for i, owner in awaited.items()}
    scheduler.explain.admitted(seq, scheduler.pools, dict(sorted((cached | pending).items())))
    seq.turn = turn_of(cached, scheduler.pools[0])
    hold(seq, scheduler.pools, cached, awaited, n_blocks)
    seq.ahead = runs_of(cached, size)
    seq.computed_to(0)
    seq.n_published = seq.n_computed // size
    seq.may_share = False
    if config.prefix_cache and config.pending == "share":
        own = (i for i in range(seq.n_tokens // size) if i not in cached and i not in awaited)
        scheduler.pending.enter(seq, awaited, own)
    seq.pinned = seq.n_preempted >= scheduler.config.max_preemptions
    seq.state = State.RUNNING
    scheduler.leave_lane()
    scheduler.running.append(seq)
    scheduler.running.sort(key=lambda s: (s.request.order, s.index))
    if seq.n_preempted == 0:
        seq.request.cached_tokens = len(cached) * size
        scheduler.counters.prompt_tokens += seq.n_prompt
        scheduler.counters.cached_tokens += seq.request.cached_tokens
        taken = runs_of(sorted((*cached, *awaited)), size)
        scheduler.counters.holes += sum(start > 0 for start, _ in taken)
    return True


def fork(scheduler: Scheduler, first: Seq) -> None:
    """The prompt is computed: siblings share its blocks."""
    for sibling in first.request.seqs[1:]:
        scheduler.tables.fork(first, sibling)
        scheduler.ledgers.forked(first, sibling)
        sibling.turn = first.turn
        scheduler.running.append(sibling)
    scheduler.running.sort(key=lambda s: (s.request.order, s.index))
    for seq in first.request.seqs:
        seq.heirs = [seq]
    first.request.forked = True


def hand_over(scheduler: Scheduler, seq: Seq) -> None:
    """What the sequence has computed is there for those who waited for it."""
    size, counters = scheduler.config.block_tokens, scheduler.counters
    for i, waiter in scheduler.pending.computed(seq):
        for pool, table in zip(scheduler.pools, seq.tables, strict=True):
            pool.use(int(table[i]), waiter.turn)
        counters.pending_tokens += size
        if waiter.n_preempted == 0:
            waiter.request.cached_tokens += size
            counters.cached_tokens += size


def _n_offered(scheduler: Scheduler) -> int:
    return scheduler.pending.n_claimed + sum(pool.n_stored for pool in scheduler.pools)
