"""One KV group's blocks: who holds them, which are published for reuse, what gives way.

Every block but the null block 0 is in exactly one state:

    free       holds nothing worth keeping
    held       some sequence's block table names it (``ref`` counts how many)
    idle       nobody holds it, its content is published under a key and may be held again or evicted

Conservation, checked by ``check_integrity``: free + held + idle = n_blocks - 1.

A key is a keyed 256-bit hash chained over all tokens before and in the block, the tenant, the model and its weights'
version; the tokens themselves are kept and compared on every hit, so that not even a collision serves
another's content.
"""

from __future__ import annotations

from collections import deque
from hashlib import blake2b

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.engine.policies.evict import Evict

NULL_BLOCK = 0
MAX_EVENTS = 65_536
"""Of digests published or evicted, the newest so many are kept for whoever asks."""


def root_digest(secret: bytes, *parts: str) -> bytes:
    """The chain's start: everything besides tokens that decides a block's content, and the tenant."""
    h = blake2b(key=secret, digest_size=32)
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(4, "little") + raw)
    return h.digest()


def chain_digest(secret: bytes, parent: bytes, tokens: bytes) -> bytes:
    """The digest of a block from its parent's and its own tokens (int32, little-endian)."""
    return blake2b(parent + tokens, key=secret, digest_size=32).digest()


class BlockPool:
    """Blocks of one group. Methods are O(1) besides the policy's; nothing here knows sequences."""

    def __init__(self, n_blocks: int, block_tokens: int, evict: Evict) -> None:
        if n_blocks < 2:
            raise ValueError(f"a pool needs a null block and one more, got {n_blocks} blocks")
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.ref = [0] * n_blocks
        self._free = deque(range(1, n_blocks))
        self._evict = evict
        self._block_of: dict[bytes, int] = {}
        self._digest: list[bytes | None] = [None] * n_blocks
        self._tokens: list[bytes] = [b""] * n_blocks
        self.n_stored = 0
        """Blocks ever published: what is not resident now can become so only by another of these."""
        self.stored: deque[bytes] = deque(maxlen=MAX_EVENTS)
        self.evicted: deque[bytes] = deque(maxlen=MAX_EVENTS)

    @property
    def n_available(self) -> int:
        """Blocks that ``take`` could give out now."""
        return len(self._free) + len(self._evict)

    @property
    def n_idle(self) -> int:
        return len(self._evict)

    @property
    def n_held(self) -> int:
        return self.n_blocks - 1 - self.n_available

    def take(self) -> int:
        """A block for one new holder; evicts when none is free. Raises ``LookupError`` when all are held."""
        if self._free:
            block = self._free.popleft()
        else:
            block = self._evict.victim()
            self._evict.busy(block)
            self._unpublish(block)
        self.ref[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a held or idle block."""
        if self.ref[block] == 0:
            self._evict.busy(block)
        self.ref[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one leaves it idle if published, else free."""
        self.ref[block] -= 1
        if self.ref[block] == 0:
            if self._digest[block] is None:
                self._free.append(block)
            else:
                self._evict.idle(block)
        elif self.ref[block] < 0:
            raise IntegrityError(f"block {block} was released by someone who did not hold it")

    def publish(self, block: int, digest: bytes, tokens: bytes) -> None:
        """Offer a fully computed block for reuse; where the key is taken already, nothing happens."""
        if self._digest[block] is None and digest not in self._block_of:
            self._block_of[digest] = block
            self._digest[block] = digest
            self._tokens[block] = tokens
            self.stored.append(digest)
            self.n_stored += 1

    def knows(self, digest: bytes) -> bool:
        """Whether a block is resident under this key; whether it is the right one, ``lookup`` says."""
        return digest in self._block_of

    def lookup(self, digest: bytes, tokens: bytes) -> int | None:
        """The resident block of this key and these tokens, not yet held for the caller."""
        block = self._block_of.get(digest)
        if block is None or self._tokens[block] != tokens:
            return None
        return block

    def forget(self) -> None:
        """Unpublish everything: idle blocks become free, held ones stay with their holders."""
        while len(self._evict):
            block = self._evict.victim()
            self._evict.busy(block)
            self._free.append(block)
        for block in range(1, self.n_blocks):
            self._unpublish(block)

    def _unpublish(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest[block] = None
            self._tokens[block] = b""
            self.evicted.append(digest)

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
        if held + len(self._free) + len(self._evict) != self.n_blocks - 1:
            raise IntegrityError(
                f"{held} held + {len(self._free)} free + {len(self._evict)} idle != {self.n_blocks - 1}"
            )
        for block in self._free:
            if self.ref[block] or self._digest[block] is not None:
                raise IntegrityError(f"block {block} is on the free list but held or published")
        for digest, block in self._block_of.items():
            if self._digest[block] != digest:
                raise IntegrityError(f"the index names block {block} under a key that is not its own")
