"""Block tables of sequences: blocks are taken for what is written next, copied where a sibling holds them too, offered
for reuse once they are full, given back.

    table     [ published ...... | full, being published | partial | ahead of the tokens: a tree's, a pinned one's ]
                                                         n_computed  n_tokens                             n_blocks

What is copied within the cache (a partial block that siblings share, the rows of a tree that came true) is copied by
the next step, before anything is written: ``moves`` holds it until then, whoever may have left by that time.
"""

from __future__ import annotations

from tenon.engine.blocks import DIGEST_BYTES, BlockPool
from tenon.engine.sequence import Seq, State

Move = tuple[int, int, int]
"""Group, the slot that is copied, the slot it is copied to."""


class Tables:
    """Of one scheduler's sequences, over its pools. Knows no queues: who gives way is the scheduler's to say."""

    def __init__(self, pools: list[BlockPool], block_tokens: int, *, publishes: bool) -> None:
        """``publishes``: whether full blocks are offered for reuse."""
        self.pools = pools
        self._size, self._publishes = block_tokens, publishes
        self.moves: list[Move] = []
        """Not yet in a step."""

    def take_moves(self) -> list[Move]:
        moves, self.moves = self.moves, []
        return moves

    @property
    def n_available(self) -> int:
        """Blocks that could be taken in every group."""
        return min(pool.n_available for pool in self.pools)

    def shares_partial(self, seq: Seq) -> bool:
        """Whether a sibling holds the block that the sequence writes next."""
        i = seq.n_computed // self._size
        return i < seq.n_blocks and self.pools[0].ref[seq.tables[0][i]] > 1

    def n_lacking(self, seq: Seq, n_tokens: int) -> int:
        """Blocks to take so that positions up to ``n_tokens`` can be written.

        A pinned sequence holds blocks beyond ``n_tokens``: those are no credit towards the copy of a shared one.
        """
        return max(0, -(-n_tokens // self._size) - seq.n_blocks) + self.shares_partial(seq)

    def reserve(self, seq: Seq, n_tokens: int) -> None:
        """Take what ``n_lacking`` counted, which must be available; the block written next is private then."""
        if self.shares_partial(seq):
            self._copy_on_write(seq, seq.n_computed // self._size)
        n_blocks = -(-n_tokens // self._size)
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for i in range(seq.n_blocks, n_blocks):
                table[i] = pool.take()
        seq.n_blocks = max(seq.n_blocks, n_blocks)
        seq.may_share = False

    def room(self, seq: Seq, n_tokens: int) -> int:
        """Positions up to ``n_tokens`` that can be written once as many blocks are taken as there are: at least those
        of the blocks that it holds."""
        n_blocks = min(-(-n_tokens // self._size), seq.n_blocks + self.n_available)
        self.reserve(seq, n_blocks * self._size)
        return min(n_tokens, seq.n_blocks * self._size)

    def trim(self, seq: Seq) -> None:
        """Give back what is held beyond the sequence's tokens, unless it is pinned."""
        n_blocks = -(-seq.n_tokens // self._size)
        if seq.pinned or n_blocks >= seq.n_blocks:
            return
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for block in table[n_blocks : seq.n_blocks][::-1].tolist():
                pool.release(block)
        seq.n_blocks = n_blocks

    def move(self, seq: Seq, source: int, target: int) -> None:
        """What was written for position ``source`` is that of position ``target``: both by their places in the
        table."""
        size = self._size
        for group, table in enumerate(seq.tables):
            from_block, to_block = table.item(source // size), table.item(target // size)
            self.moves.append((group, from_block * size + source % size, to_block * size + target % size))

    def fork(self, first: Seq, sibling: Seq) -> None:
        """The sibling holds the blocks that ``first`` has computed; the partial one is copied by whoever writes first.

        Blocks that a pinned sequence holds in advance are its own.
        """
        n_blocks = -(-first.n_computed // self._size)
        for pool, source, table in zip(self.pools, first.tables, sibling.tables, strict=True):
            for i in range(n_blocks):
                pool.share(int(source[i]))
            table[:n_blocks] = source[:n_blocks]
        sibling.n_blocks = n_blocks
        sibling.n_computed, sibling.n_published = first.n_computed, first.n_published
        sibling.digests = first.digests[: first.n_published]
        sibling.state = State.RUNNING
        sibling.may_share = first.may_share = True

    def publish(self, seq: Seq) -> None:
        """Offer the full blocks that were not offered yet."""
        if not self._publishes:
            return
        for i in range(seq.n_published, seq.n_computed // self._size):
            digest, content = seq.key_and_content(i)
            for pool, table in zip(self.pools, seq.tables, strict=True):
                pool.publish(int(table[i]), digest, content, i * pool.block_tokens, content[:DIGEST_BYTES], seq.turn)
            seq.n_published = i + 1

    def release(self, seq: Seq) -> None:
        """Give everything back."""
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for block in table[: seq.n_blocks][::-1].tolist():
                pool.release(block, seq.n_tokens)
        seq.n_blocks = 0

    def _copy_on_write(self, seq: Seq, i: int) -> None:
        size = self._size
        for group, (pool, table) in enumerate(zip(self.pools, seq.tables, strict=True)):
            old, new = int(table[i]), pool.take()
            pool.release(old)
            table[i] = new
            self.moves.extend((group, old * size + k, new * size + k) for k in range(seq.n_computed % size))
