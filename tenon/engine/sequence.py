"""``Seq``: one token sequence being decoded, and the ``Request`` that its siblings share.

    tokens    [ prompt ........... | outputs ...... | room ]
    computed  [ K and V resident ........ )
                                 n_computed        n_tokens

What remains to compute is [n_computed, n_tokens): one token while decoding, more while prefilling or after a
preemption. The last token's logits give the next one.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from tenon.engine.blocks import chain_digest
from tenon.engine.edits import Edits, wanted
from tenon.engine.grammar import Binding
from tenon.engine.messages import Add
from tenon.engine.promises import Forecast
from tenon.engine.speculation.tree import Tree
from tenon.engine.step import F64, I32

if TYPE_CHECKING:
    from tenon.engine.ledger import Account


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Seq:
    """One sequence of a request: its tokens, its block table per KV group, how far it is computed."""

    def __init__(
        self, seq_id: int, request: Request, index: int, n_groups: int, block_tokens: int, max_tree: int = 0
    ) -> None:
        """``max_tree``: nodes that a tree of it may have."""
        room = len(request.add.prompt) + request.add.max_tokens
        self.id = seq_id
        self.request = request
        self.index = index
        self.tokens: I32 = np.empty(room, np.int32)
        self.n_prompt = len(request.add.prompt)
        self.n_tokens = self.n_prompt + len(request.add.outputs)
        self.tokens[: self.n_tokens] = request.add.prompt + request.add.outputs
        self.n_computed = 0
        self.ahead: list[tuple[int, int]] = []
        """Runs of positions [start, end) beyond ``n_computed`` that are resident already, in order."""
        self.awaited: list[int] = []
        """Position blocks in its tables that another running sequence is going to compute, in order."""
        self.claimed: list[int] = []
        """Position blocks that it is going to compute and others may wait for, in order."""
        self.looked_up: tuple[int, int] | None = None
        """While it waits in vain: resident blocks when it was last looked up, and blocks ever published by then."""
        self.block_tokens = block_tokens
        n_entries = -(-(room + max_tree) // block_tokens)
        self.tables: list[I32] = [np.zeros(n_entries, np.int32) for _ in range(n_groups)]
        self.n_blocks = 0
        self.digests: list[bytes] = []
        self.n_published = 0
        self.n_preempted = 0
        self.turn = 1
        """Of its conversation, as far as the cache can tell."""
        self.pinned = False
        self.heirs: list[Seq] = request.seqs if request.add.embed is None else []
        """Whose next token its last row gives: all siblings' while they share the prompt's computing, then its own."""
        self.n_pooled = 0
        """Tokens of the prompt whose hidden states are in ``pooled``, their sum."""
        self.pooled: F64 | None = None
        self.n_scored = 1
        """Tokens of the prompt that need no scoring any more: nothing says how likely the first is."""
        self.to_score = index == 0 and request.add.prompt_logprobs >= 0 and self.n_prompt > 1
        self.may_share = False
        """Whether siblings may hold the block that it writes next; only then need anyone look."""
        self.first_s: float | None = None
        """When its first token came, or the first since it was sent to this engine; ``first_n`` outputs had come by
        then."""
        self.first_n = 0
        self.account: Account | None = None
        """Where its time goes."""
        self.tree: Tree | None = None
        """What was drafted to follow its tokens, until a step has verified it."""
        self.state = State.WAITING
        self.edits = Edits(request.add, request.stop_ids) if wanted(request.add) else None
        """What is done to its logits before a token is sampled from them."""
        self.binding = Binding(request.add.grammar) if request.add.grammar is not None else None
        """From where on which tokens may come depends on a grammar."""

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def n_output(self) -> int:
        return self.n_tokens - self.n_prompt

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.n_prompt + self.request.add.max_tokens - self.n_tokens

    def context(self, ahead: list[int]) -> I32:
        """Its tokens and, after them, fewer than ``room`` others, for a moment: they stand where its next ones will."""
        end = self.n_tokens + len(ahead)
        if ahead:
            self.tokens[self.n_tokens : end] = ahead
        return self.tokens[:end]

    @property
    def n_slots(self) -> int:
        """Sequences that this one stands for: its siblings wait for the prompt that it computes."""
        return 1 if self.request.forked else self.request.add.n

    @property
    def reads_cache(self) -> bool:
        """Whether what is resident need not be computed: not where every row is looked at."""
        embed = self.request.add.embed
        return not self.to_score and (embed is None or embed.pooling != "mean")

    def runs(self, budget: int, n_coming: int = 0) -> list[tuple[int, int]]:
        """(start, n) of what is to be computed next, at most ``budget`` rows: holes in order, then the tail.

        The first ``n_coming`` awaited blocks count as resident; nothing is computed beyond the one after them.
        """
        size, skipped, limit = self.block_tokens, self.ahead, self.n_tokens
        if n_coming:
            skipped = sorted((*skipped, *((i * size, (i + 1) * size) for i in self.awaited[:n_coming])))
        if n_coming < len(self.awaited):
            limit = self.awaited[n_coming] * size
        found: list[tuple[int, int]] = []
        at = self.n_computed
        for start, end in (*skipped, (limit, limit)):
            n = min(min(start, limit) - at, budget)
            if n:
                found.append((at, n))
            budget -= n
            if budget == 0 or start >= limit:
                break
            at = end
        return found

    def computed_to(self, end: int) -> None:
        """All positions below ``end`` are resident, and the run that begins there, if there is one."""
        self.n_computed = end
        while self.ahead and self.ahead[0][0] == self.n_computed:
            self.n_computed = self.ahead.pop(0)[1]

    def arrived(self, i: int) -> None:
        """Position block ``i``, which was awaited, is resident."""
        self.awaited.remove(i)
        insort(self.ahead, (i * self.block_tokens, (i + 1) * self.block_tokens))
        self.computed_to(self.n_computed)

    @property
    def is_decoding(self) -> bool:
        """All but the newest token is resident, and that one was generated."""
        return self.n_tokens - self.n_computed == 1 and self.n_tokens > self.n_prompt

    def block_content(self, i: int) -> bytes:
        """What stands for position block ``i`` besides its key: the key before it, then its tokens. Defined once it is
        full."""
        size, digests = self.block_tokens, self.digests
        parent = self.request.root if i == 0 else digests[i - 1] if i <= len(digests) else self.digest(i - 1)
        return parent + self.tokens[i * size : (i + 1) * size].tobytes()

    def digest(self, i: int) -> bytes:
        """The chained key of position block ``i``; hashed once, however often it is asked for."""
        while len(self.digests) <= i:
            self.digests.append(chain_digest(self.request.secret, self.block_content(len(self.digests))))
        return self.digests[i]

    def key_and_content(self, i: int) -> tuple[bytes, bytes]:
        """``digest`` and ``block_content`` of one block, whose bytes are made once where its turn has come."""
        content, digests = self.block_content(i), self.digests
        if len(digests) == i:
            digests.append(chain_digest(self.request.secret, content))
        return digests[i], content


@dataclass(eq=False)
class Request:
    """One ``Add`` being served: ``n`` sequences over one prompt."""

    add: Add
    order: int
    """Rank of arrival: the smaller one is never preempted for the larger."""
    secret: bytes
    root: bytes
    stop_ids: frozenset[int]
    seqs: list[Seq] = field(default_factory=list)
    due_s: float = 0.0
    """Of those who wait the one that is due first comes in first."""
    cached_tokens: int = 0
    forked: bool = False
    forecast: Forecast | None = None
    """Of one that is promised something, when it came."""

    @property
    def n_unfinished(self) -> int:
        return sum(seq.state is not State.FINISHED for seq in self.seqs)
