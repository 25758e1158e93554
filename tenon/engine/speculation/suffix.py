"""Guess what has followed the longest suffix of a context before: in the sequence itself, or in what its tenant's other
requests have said (SuffixDecoding, arXiv 2411.04975).

A sequence's own automaton covers its prompt and output. What is shared between requests of one tenant covers their
outputs in two generations: the younger one grows until it is full, then takes the place of the older one, which is
forgotten. Nobody's words are ever looked up for another tenant: not even by how fast it is answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from tenon.engine.policies.forest import I32, Forest
from tenon.engine.sequence import Seq
from tenon.engine.speculation import native
from tenon.engine.speculation.automaton import BOUNDS, ROOT, Automaton, bucket
from tenon.engine.speculation.native import Native

AT_LEAST: Final = 1
"""Tokens that have to match."""
DOUBT: Final = 0.3
FLOOR: Final = 0.01
"""Of a path's probability before it is calibrated, the least that is proposed."""
LIMITS: Final = (AT_LEAST, DOUBT, FLOOR)
SHARED_TOKENS: Final = 50_000
"""Of one generation. A token takes about 100 bytes."""
BELIEFS: Final = (-0.5, -0.2, 0.4, 0.6, 1.5, 3.0, -1.5, -1.5, -1.0, -0.5, 0.5, 2.5)
"""In logits, of own and of shared matches, the shorter ones first: what 40,000 guesses of code that a small model
completed came to, at four temperatures, roughly."""
MAX_TENANTS: Final = 16
OF_PROMPT: Final = 8
"""Tokens of the prompt that stand before an output in what is shared, so that its beginning is found."""
LOOK_BACK: Final = 64
"""Tokens of a sequence that are looked up anew when a generation is replaced."""


class Shared(Protocol):
    """One generation of what a tenant's requests have said."""

    def add(self, tokens: I32) -> None:
        """One more string."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """Automata, in C or in Python."""

    def shared(self) -> Shared: ...

    def follow(self, seq: Seq) -> int:
        """A number for a sequence from now on."""
        ...

    def share(self, number: int, k: int, shared: Shared | None) -> None:
        """``k``: 0 or 1."""
        ...

    def drop(self, number: int) -> None: ...

    def guess(self, numbers: Sequence[int], seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None: ...


class Suffix:
    """``in_c`` False does without the C, which a test compares it with."""

    name = "suffix"
    kinds = tuple(
        f"{whose}-{low}" for whose in ("own", "shared") for low in (1, *(bound + 1 for bound in BOUNDS))
    )  # fmt: skip
    beliefs: tuple[float, ...] = BELIEFS

    def __init__(self, *, in_c: bool = True) -> None:
        library = native.load() if in_c else None
        self._backend: Backend = _Python() if library is None else _C(library)
        self._numbers: dict[int, int] = {}
        self._live: dict[bytes, dict[int, Seq]] = {}
        """By tenant and model: sequences that are followed."""
        self._generations: OrderedDict[bytes, list[Shared]] = OrderedDict()
        """The younger one first. Least recently used tenants go first."""
        self._n_tokens: dict[bytes, int] = {}

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        return self._backend.guess(self.numbers(seqs), seqs, depth_n, room)

    @property
    def lib(self) -> Native | None:
        """Where it works in C."""
        return self._backend.lib if isinstance(self._backend, _C) else None

    def numbers(self, seqs: Sequence[Seq]) -> list[int]:
        """Of sequences that are followed from now on: in C, the addresses of their followers."""
        numbers = self._numbers
        for seq in seqs:
            if seq.id not in numbers:
                self._follow(seq)
        return [numbers[seq.id] for seq in seqs]

    def _follow(self, seq: Seq) -> None:
        number = self._numbers[seq.id] = self._backend.follow(seq)
        root = seq.request.root
        self._live.setdefault(root, {})[number] = seq
        for k, shared in enumerate(self._generations.get(root, ())):
            self._backend.share(number, k, shared)

    def forget(self, seq: Seq) -> None:
        number = self._numbers.pop(seq.id, None)
        if number is None:
            return
        root = seq.request.root
        self._backend.drop(number)
        live = self._live[root]
        del live[number]
        if not live:
            del self._live[root]
        if seq.finished and seq.n_output > 0:
            self._learn(root, seq.tokens[max(0, seq.n_prompt - OF_PROMPT) : seq.n_tokens])

    def _learn(self, root: bytes, tokens: I32) -> None:
        n_tokens = self._n_tokens.get(root, SHARED_TOKENS)
        generations = self._generations.setdefault(root, [])
        self._generations.move_to_end(root)
        if n_tokens >= SHARED_TOKENS:
            n_tokens = 0
            generations.insert(0, self._backend.shared())
            self._tell(root, generations[:2])
            for old in generations[2:]:
                old.close()
            del generations[2:]
        generations[0].add(tokens)
        self._n_tokens[root] = n_tokens + len(tokens)
        if len(self._generations) > MAX_TENANTS:
            self._drop_tenant(next(iter(self._generations)))

    def _tell(self, root: bytes, generations: Sequence[Shared | None]) -> None:
        for number in self._live.get(root, ()):
            for k, shared in enumerate(generations):
                self._backend.share(number, k, shared)

    def _drop_tenant(self, root: bytes) -> None:
        self._tell(root, (None, None))
        for shared in self._generations.pop(root):
            shared.close()
        del self._n_tokens[root]

    def reset(self) -> None:
        for live in list(self._live.values()):
            for number in list(live):
                self._backend.drop(number)
        self._live.clear()
        self._numbers.clear()
        for root in list(self._generations):
            self._drop_tenant(root)

    def close(self) -> None:
        self.reset()


class _CShared:
    def __init__(self, lib: Native) -> None:
        self._lib, self.address = lib, lib.suffix_new()
        if not self.address:
            raise MemoryError("no memory for a suffix automaton")

    def add(self, tokens: I32) -> None:
        self._lib.suffix_begin(self.address)
        tokens = np.ascontiguousarray(tokens, np.int32)
        if self._lib.suffix_add(self.address, tokens.ctypes.data, len(tokens)):
            raise MemoryError("no memory for a suffix automaton")

    def close(self) -> None:
        self._lib.suffix_free(self.address)
        self.address = None


class _C:
    """Numbers are addresses."""

    def __init__(self, lib: Native) -> None:
        self.lib = lib
        self._who: list[int] = []
        self._room = 0
        self._addresses = np.zeros(0, np.int64)

    def shared(self) -> Shared:
        return _CShared(self.lib)

    def follow(self, seq: Seq) -> int:
        number: int | None = self.lib.follower_new(seq.tokens.ctypes.data)
        if not number:
            raise MemoryError("no memory for a suffix automaton")
        self._who = []  # an address may come again
        return number

    def share(self, number: int, k: int, shared: Shared | None) -> None:
        self.lib.follower_share(number, k, shared.address if isinstance(shared, _CShared) else None, LOOK_BACK)

    def drop(self, number: int) -> None:
        self.lib.follower_free(number)
        self._who = []

    def guess(self, numbers: Sequence[int], seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        if numbers != self._who or room != self._room:
            self._who, self._room = list(numbers), room
            self._addresses = np.array(numbers, np.int64)
            self._forest = Forest.empty(len(numbers), room)
        n_tokens = np.array([seq.n_tokens for seq in seqs], np.int64)
        found = self.lib.follower_guess(
            self._addresses.ctypes.data, n_tokens.ctypes.data, depth_n.ctypes.data, *LIMITS, native.view(self._forest)
        )
        if found < 0:
            raise MemoryError("no memory for a suffix automaton")
        return self._forest if found else None


class _PyShared:
    def __init__(self) -> None:
        self.automaton = Automaton()

    def add(self, tokens: I32) -> None:
        self.automaton.begin()
        self.automaton.add(tokens.tolist())

    def close(self) -> None:
        self.automaton = Automaton()


class _Follower:
    def __init__(self) -> None:
        self.own = Automaton()
        self.n_seen = 0
        self.shared: list[Automaton | None] = [None, None]
        self.at = [(ROOT, 0), (ROOT, 0)]
        """State and length of the match in each shared automaton."""

    def take(self, tokens: list[int]) -> None:
        self.own.add(tokens)
        self.n_seen += len(tokens)
        for k, automaton in enumerate(self.shared):
            self.look(k, automaton, tokens)

    def look(self, k: int, automaton: Automaton | None, tokens: list[int]) -> None:
        if automaton is not None:
            for token in tokens:
                self.at[k] = automaton.advance(*self.at[k], token)

    def best(self) -> tuple[Automaton, int, int, bool]:
        """Automaton, state, length of the longest match, and whether it is a shared one."""
        state = max(ROOT, self.own.link[self.own.last])
        found = self.own, state, self.own.length[state], False
        for automaton, (state, length) in zip(self.shared, self.at, strict=True):
            if automaton is not None and length > found[2]:
                found = automaton, automaton.settled(state, length), length, True
        return found


class _Python:
    def __init__(self) -> None:
        self._followers: dict[int, tuple[_Follower, Seq]] = {}
        self._n_made = 0

    def shared(self) -> Shared:
        return _PyShared()

    def follow(self, seq: Seq) -> int:
        self._n_made += 1
        self._followers[self._n_made] = _Follower(), seq
        return self._n_made

    def share(self, number: int, k: int, shared: Shared | None) -> None:
        follower, seq = self._followers[number]
        follower.shared[k] = shared.automaton if isinstance(shared, _PyShared) else None
        follower.at[k] = ROOT, 0
        first = max(0, follower.n_seen - LOOK_BACK)
        follower.look(k, follower.shared[k], seq.tokens[first : follower.n_seen].tolist())

    def drop(self, number: int) -> None:
        del self._followers[number]

    def guess(self, numbers: Sequence[int], seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        forest = None
        for i, (number, seq, depth) in enumerate(zip(numbers, seqs, depth_n.tolist(), strict=True)):
            follower, _ = self._followers[number]
            follower.take(seq.tokens[follower.n_seen : seq.n_tokens].tolist())
            automaton, state, length, is_shared = follower.best()
            if length < AT_LEAST or depth <= 0:
                continue
            nodes = automaton.guess(state, depth, room, DOUBT, FLOOR)
            if not nodes:
                continue
            forest = forest or Forest.empty(len(seqs), room)
            kind = bucket(length) + (len(BOUNDS) + 1) * is_shared
            for c, (token, parent, at_depth, rank, q) in enumerate(nodes):
                forest.token[i, c], forest.parent[i, c], forest.depth[i, c] = token, parent, at_depth
                forest.rank[i, c], forest.q[i, c], forest.source[i, c] = rank, q, kind
        return forest
