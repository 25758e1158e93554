"""One KV group's blocks: who holds them, which are published for reuse, what gives way.

Every block but the null block 0 is in exactly one state:

    free       holds nothing worth keeping
    held       some sequence's block table names it (``ref`` counts how many)
    idle       nobody holds it, its content is published under a key and may be held again or evicted

Conservation, checked by ``check_integrity``: free + held + idle = n_blocks - 1.

A key is a keyed 256-bit hash chained over all tokens before and in the block, the tenant, the model and its weights'
version; the key before it and the tokens themselves are kept and compared on every hit, so that not even a collision
serves another's content.

What is evicted leaves its *shadow*: what policies knew of it, under its key, as many as there are blocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from hashlib import blake2b

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.engine.kv_log import CLEARED, MAX_EVENTS, REMOVED, STORED, KVLog, Logged
from tenon.engine.policies.evict import Cached, Evict
from tenon.engine.recompute import CostOf, alike
from tenon.engine.victims import Victims

NULL_BLOCK = 0
DIGEST_BYTES = 32


def root_digest(secret: bytes, *parts: str) -> bytes:
    """The chain's start: everything besides tokens that decides a block's content, and the tenant."""
    h = blake2b(key=secret, digest_size=DIGEST_BYTES)
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(4, "little") + raw)
    return h.digest()


def chain_digest(secret: bytes, content: bytes) -> bytes:
    """The digest of a block from its content: its parent's digest and its own tokens (int32, little-endian)."""
    return blake2b(content, key=secret, digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """Blocks of one group. Methods are O(1) besides the policy's, but for publishing and evicting, which tell a block's
    resident followers: one, save where contexts part. Nothing here knows sequences.
    """

    def __init__(
        self,
        n_blocks: int,
        block_tokens: int,
        make_evict: Callable[[], Evict],
        cost_of: CostOf = alike,
    ) -> None:
        """``cost_of``: what computing the block at a position once more takes."""
        if n_blocks < 2:
            raise ValueError(f"a pool needs a null block and one more, got {n_blocks} blocks")
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.now_s = 0.0
        """Whoever drives the pool says what time it is."""
        self.ref = [0] * n_blocks
        self._free = deque(range(1, n_blocks))
        self._make_evict, self._cost_of = make_evict, cost_of
        self.evict = make_evict()
        self._entry_of: dict[bytes, Cached] = {}
        self._entry: list[Cached | None] = [None] * n_blocks
        self._content: list[bytes] = [b""] * n_blocks
        self._parent: list[bytes] = [b""] * n_blocks
        """The key before a published block's, resident or not."""
        self._after: dict[bytes, dict[bytes, Cached]] = {}
        """Resident blocks by the key before theirs and their own, in the order of their coming."""
        self.shadows: OrderedDict[bytes, Cached] = OrderedDict()
        self.n_stored = 0
        """Blocks ever published: what is not resident now can become so only by another of these."""
        self.log = KVLog(n_blocks)
        self.n_evicted = 0
        self.victims = Victims()

    @property
    def n_available(self) -> int:
        """Blocks that ``take`` could give out now."""
        return len(self._free) + len(self.evict)

    @property
    def n_idle(self) -> int:
        return len(self.evict)

    @property
    def n_held(self) -> int:
        return self.n_blocks - 1 - self.n_available

    def take(self) -> int:
        """A block for one new holder; evicts when none is free. Raises ``LookupError`` when all are held."""
        if self._free:
            block = self._free.popleft()
        else:
            entry = self.evict.victim(self.now_s)
            if self.victims.watch:
                self.victims.leaves(entry, self.evict, self.now_s)
            else:
                self.evict.evicted(entry, self.now_s)
            self.n_evicted += 1
            self._unpublish(entry, "evicted")
            self._remember(entry)
            block = entry.block
        self.ref[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a held block that need not be published: a sibling, or who waits until it is computed."""
        self.ref[block] += 1

    def take_over(self, block: int, turn: int = 1) -> None:
        """One more holder of a published block, held or idle: a request whose context it belongs to."""
        entry = self._entry[block]
        if entry is None:
            raise IntegrityError(f"block {block} is taken over but not published")
        self.use(block, turn)
        if self.ref[block] == 0:
            self.evict.busy(entry)
        self.ref[block] += 1

    def use(self, block: int, turn: int = 1) -> None:
        """Policies hear that one more request's context has this block, if it is published."""
        entry = self._entry[block]
        if entry is not None:
            self.evict.used(entry, self.now_s)
            entry.n_uses += 1
            entry.turn = turn

    def release(self, block: int, length: int = 0) -> None:
        """One holder less, whose context has ``length`` tokens; the last one leaves it idle if published, else free."""
        self.ref[block] -= 1
        if self.ref[block] == 0:
            entry = self._entry[block]
            if entry is None:
                self._free.appendleft(block)  # what was written last is in the processor's caches
            else:
                entry.last_s, entry.length = self.now_s, length
                self.evict.idle(entry, self.now_s)
        elif self.ref[block] < 0:
            raise IntegrityError(f"block {block} was released by someone who did not hold it")

    def publish(
        self, block: int, digest: bytes, content: bytes, position: int = 0, parent: bytes = b"", turn: int = 1
    ) -> None:
        """Offer a fully computed block for reuse; where the key is taken already, nothing happens. ``position`` is that
        of its first token, ``parent`` the key of the block before it."""
        if self._entry[block] is not None or digest in self._entry_of:
            return
        now_s = self.now_s
        entry = Cached(block, digest, position, self._cost_of(position), turn, 1, now_s, position + self.block_tokens)
        shadow = self.shadows.pop(digest, None)
        if shadow is not None:
            entry.n_uses = shadow.n_uses + 1
            entry.away_s, entry.away_turn = now_s - shadow.last_s, shadow.turn
        self._link(entry, parent)
        self._entry_of[digest] = entry
        self._entry[block] = entry
        self._content[block] = content
        self.log.add(STORED, digest, position, parent)
        self.n_stored += 1
        self.evict.stored(entry, now_s)

    def knows(self, digest: bytes) -> bool:
        """Whether a block is resident under this key; whether it is the right one, ``lookup`` says."""
        return digest in self._entry_of

    def lookup(self, digest: bytes, content: bytes) -> int | None:
        """The resident block of this key and this content, not yet held for the caller."""
        entry = self._entry_of.get(digest)
        if entry is None or self._content[entry.block] != content:
            return None
        return entry.block

    def entry(self, block: int) -> Cached | None:
        """What policies know of a published block."""
        return self._entry[block]

    @property
    def entries(self) -> Collection[Cached]:
        """Of all that is published, in the order of its coming."""
        return self._entry_of.values()

    def content(self, block: int) -> bytes:
        """What ``publish`` was given."""
        return self._content[block]

    def forget(self) -> None:
        """Unpublish everything: idle blocks become free, held ones stay with their holders. Policies and shadows begin
        anew."""
        for entry in list(self._entry_of.values()):
            if self.ref[entry.block] == 0:
                self._free.append(entry.block)
            self._unpublish(entry, "")
        self._begin_anew()
        self.log.add(CLEARED, reason="reset")

    def forget_idle(self) -> int:
        """Unpublish what nobody holds, which becomes free; returns how many blocks. What is held stays published.
        Policies and shadows begin anew."""
        idle = [entry for entry in self._entry_of.values() if self.ref[entry.block] == 0]
        for entry in idle:
            self._free.append(entry.block)
            self._unpublish(entry, "forgotten")
        self._begin_anew()
        for entry in self._entry_of.values():
            self.evict.stored(entry, self.now_s)
        return len(idle)

    def _begin_anew(self) -> None:
        self.shadows.clear()
        self.victims.clear()
        self.evict = self._make_evict()

    def _link(self, entry: Cached, parent: bytes) -> None:
        """Between the block before it and those after it, whichever were stored first: a hole may be filled."""
        self._parent[entry.block] = parent
        siblings = self._after.get(parent)
        if siblings is None:
            self._after[parent] = {entry.key: entry}
        else:
            siblings[entry.key] = entry
        before = self._entry_of.get(parent)
        if before is not None:
            entry.parent, before.child = before, entry
        children = self._after.get(entry.key)
        if children is not None:
            for child in children.values():
                child.parent, entry.child = entry, child

    def _unlink(self, entry: Cached) -> None:
        parent = self._parent[entry.block]
        siblings = self._after[parent]
        del siblings[entry.key]
        if entry.parent is not None:
            entry.parent.child = next(reversed(siblings.values())) if siblings else None
        if not siblings:
            del self._after[parent]
        children = self._after.get(entry.key)
        if children is not None:
            for child in children.values():
                child.parent = None
        entry.parent = entry.child = None

    def take_events(self, limit: int = MAX_EVENTS) -> tuple[list[Logged], int]:
        """What came and went since the last call, at most the oldest ``limit``, and how many events were lost: if any,
        and after a stop, what is resident is told anew."""
        n_lost = self.log.n_lost
        if n_lost or not self.log.is_kept:
            self.restart_events()
        return self.log.take(limit), n_lost

    def restart_events(self) -> None:
        """Events begin with what is resident now. O(blocks)."""
        self.log.restart(
            Logged(STORED, entry.key, entry.position, self._content[entry.block][:DIGEST_BYTES])
            for entry in self._entry_of.values()
        )

    def _unpublish(self, entry: Cached, reason: str) -> None:
        """``reason`` is what the log says; nothing if it is empty."""
        block = entry.block
        if reason:
            self.log.add(REMOVED, entry.key, entry.position, self._content[block][:DIGEST_BYTES], reason)
        del self._entry_of[entry.key]
        self._entry[block] = None
        self._content[block] = b""
        self._unlink(entry)

    def _remember(self, entry: Cached) -> None:
        entry.evicted_s = self.now_s
        self.shadows[entry.key] = entry
        if len(self.shadows) >= self.n_blocks:
            self.shadows.popitem(last=False)

    def check_integrity(self, tables: list[np.ndarray]) -> None:
        """Recount everything from the holders' block tables. Raises ``IntegrityError`` naming what is off."""
        counts = np.zeros(self.n_blocks, np.int64)
        for table in tables:
            np.add.at(counts, table, 1)
        if counts[NULL_BLOCK]:
            raise IntegrityError("a block table names the null block")
        wrong = np.flatnonzero(counts != np.asarray(self.ref))
        if len(wrong):
            b = int(wrong[0])
            raise IntegrityError(f"block {b} counts {self.ref[b]} holders but {counts[b]} tables name it")
        held = int(np.count_nonzero(counts))
        if held + len(self._free) + len(self.evict) != self.n_blocks - 1:
            raise IntegrityError(
                f"{held} held + {len(self._free)} free + {len(self.evict)} idle != {self.n_blocks - 1}"
            )
        for block in self._free:
            if self.ref[block] or self._entry[block] is not None:
                raise IntegrityError(f"block {block} is on the free list but held or published")
        for digest, entry in self._entry_of.items():
            if self._entry[entry.block] is not entry or entry.key != digest:
                raise IntegrityError(f"the index names block {entry.block} under a key that is not its own")
            if digest in self.shadows:
                raise IntegrityError(f"block {entry.block} is resident and a shadow")
            for other in (entry.parent, entry.child):
                if other is not None and self._entry[other.block] is not other:
                    raise IntegrityError(f"block {entry.block} has a neighbour that is not resident")
