"""Structured output: grammars are compiled before a request is admitted, and masks say what may come at each token.

    Compiler   a Structure in, a compiled grammar out, in a process that may be killed (``grammar_worker``)
    Binding    of one sequence: from which token on its grammar binds; a model that reasons thinks freely before
    Masks      of one engine: each step's bit masks, from a process that may be killed

A mask follows from the grammar and the tokens since it binds, so a sequence that is computed again, here or by another
engine, gets the same ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import IntegrityError, Overloaded, RequestError, ResourceError
from tenon.base.worker import LineWorker
from tenon.engine import grammar_worker
from tenon.engine.messages import Add, Grammar
from tenon.engine.step import I32, U32
from tenon.engine.structure import Structure

if TYPE_CHECKING:
    from tenon.engine.sequence import Seq
    from tenon.engine.speculation.tree import Tree

MASK_CPU_S: Final = 1.0
"""Of all masks that are asked for at once; of one sequence's, when it is found out who takes so long."""
SOFT_WAIT_S: Final = 0.02
"""How long a step waits for masks before it goes on without those that are late."""
IDLE_WAIT_S: Final = 0.05
_HANG_S: Final = 10.0
MAX_DEATHS: Final = 2
"""Workers that may end for no known reason before it is found out whose grammar ends them."""
MAX_WAITING: Final = 32
"""Grammars that may wait to be compiled."""
NO_MARKS: Final[frozenset[int]] = frozenset()
_MAX_REPLY: Final = 64 * 2**20


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a grammar speaks of. ``folder``: the checkpoint's; ``stop_ids`` end an output."""

    folder: str
    vocab_size: int
    stop_ids: tuple[int, ...]

    def hello(self) -> dict[str, Any]:
        return {"folder": self.folder, "vocab_size": self.vocab_size, "stop_ids": list(self.stop_ids)}


@dataclass(frozen=True)
class GrammarLimits:
    """Of compiling one grammar, and of what is kept of them."""

    cpu_s: float = 1.0
    wall_s: float = 10.0
    compiled_bytes: int = 32 * 2**20
    cache_bytes: int = 64 * 2**20
    probe: bool = True
    """Whether the first mask is part of it: what takes too long for one token is no grammar to admit."""


class Compiler:
    """For one vocabulary; from any thread. The worker starts with the first grammar. Close it at the end.

    What was compiled is kept, the least recently used go first; ``owner`` keeps callers from learning by time what
    others have used.
    """

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None, clock: Clock = SYSTEM) -> None:
        self._limits = limits or GrammarLimits()
        program, hello = grammar_worker.__file__, vocabulary.hello()
        self._worker = LineWorker("grammar worker", program, ("-1", "1"), hello=hello, clock=clock)
        self._working, self._keeping = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[tuple[str, Structure], tuple[str, str]] = OrderedDict()
        self.kept_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._n_waiting = 0

    async def compile_soon(self, structure: Structure, owner: str = "") -> tuple[str, str]:
        """``compile`` in a thread that does nothing else, and at once where it has been compiled. Raises ``Overloaded``
        where too many wait for it."""
        if (found := self._look(structure, owner)) is not None:
            return found
        if self._n_waiting >= MAX_WAITING:
            raise Overloaded(f"{self._n_waiting} grammars wait to be compiled already", retry_after_s=1.0)
        self._n_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.compile, structure, owner)
        finally:
            self._n_waiting -= 1

    def compile(self, structure: Structure, owner: str = "") -> tuple[str, str]:
        """Name and text of the compiled grammar. Raises ``RequestError`` for one that is wrong or takes too much, and
        where none can be compiled."""
        with self._working:
            if (found := self._look(structure, owner)) is not None:
                return found
            compiled = self._compile(structure)
            found = hashlib.sha256(compiled.encode()).hexdigest()[:32], compiled
            with self._keeping:
                self._kept[owner, structure] = found
                self.kept_bytes += len(compiled)
                while self.kept_bytes > self._limits.cache_bytes:
                    _, (_, dropped) = self._kept.popitem(last=False)
                    self.kept_bytes -= len(dropped)
            return found

    def forget(self) -> None:
        """Keep nothing of what was compiled: memory is short."""
        with self._keeping:
            self._kept.clear()
            self.kept_bytes = 0

    def _look(self, structure: Structure, owner: str) -> tuple[str, str] | None:
        """Whether it has been compiled; whoever asks does not wait for another's compiling."""
        with self._keeping:
            if (found := self._kept.get((owner, structure))) is not None:
                self._kept.move_to_end((owner, structure))
            return found

    def _compile(self, structure: Structure) -> str:
        limits, request = self._limits, {"compile": structure.kind, "source": structure.source}
        try:
            reply = self._worker.ask(
                request | {"cpu_s": limits.cpu_s, "probe": limits.probe, "exact": structure.exact},
                limits.wall_s,
                _MAX_REPLY,
            )
        except ResourceError as error:
            said = f"structured output is not to be had: {error}"
            raise RequestError(said, param=structure.param, code="unsupported") from error
        if reply is None or "killed" in reply:
            said = f"it took more than {limits.cpu_s:g} s or {grammar_worker.HEADROOM_BYTES >> 20} MiB to compile"
        elif "error" in reply:
            said = str(reply["error"])
        elif len(reply["compiled"]) > limits.compiled_bytes:
            said = f"compiled it has {len(reply['compiled'])} bytes, more than the limit of {limits.compiled_bytes}"
        else:
            compiled: str = reply["compiled"]
            return compiled
        raise RequestError(f"{structure.param}: {said}", param=structure.param, code="invalid_grammar")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._working:
            self._worker.kill()


class Binding:
    """Of one sequence. ``start``: the index among its outputs from which on its grammar binds, ``None`` while it
    thinks; ``may_think``: its next token may be the one that begins to."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._open, self._close = grammar.think or (-1, -1)
        self.start: int | None = None if grammar.thinking else 0
        self.may_think = not grammar.thinking and self._open >= 0
        self._n_seen = 0

    @property
    def marks(self) -> frozenset[int]:
        """Tokens that may change whether the grammar binds, which nobody guesses: what may follow them is asked for
        once they are there."""
        return NO_MARKS if self.grammar.think is None else frozenset(self.grammar.think)

    def look(self, output: I32) -> None:
        """Take in what has come; outputs only ever grow."""
        for i in range(self._n_seen, len(output)):
            if self.start is None:
                self.start = i + 1 if output[i] == self._close else None
            elif i == 0 and self.may_think and output[0] == self._open:
                self.start = None
            self.may_think = False
        self._n_seen = len(output)


State = tuple[int, "Tree | None"]
"""Of a sequence: its number of tokens, and what is guessed to follow them."""


class Masks:
    """Of one engine. Not thread-safe: the engine's loop owns it.

    A mask is asked for once its sequence's tokens are known, and a sequence whose mask is late sits out steps: nobody
    waits for another one's grammar. Whoever is among those that a worker was killed at is asked for alone next, so that
    only who kills it alone is given up.
    """

    def __init__(self, vocabulary: Vocabulary, n_rows: int, clock: Clock = SYSTEM, cpu_s: float = MASK_CPU_S) -> None:
        """``n_rows``: the most masks of one asking. ``cpu_s``: what they may take together."""
        self._vocabulary, self._clock, self._cpu_s, self._n_rows = vocabulary, clock, cpu_s, n_rows
        self.n_words = -(-vocabulary.vocab_size // 32)
        self._worker: LineWorker | None = None
        self._descriptor = -1
        self._shared: U32 = np.zeros((0, self.n_words), np.uint32)
        self._ready: dict[Seq, tuple[State, U32]] = {}
        """Of sequences: the mask after so many tokens, and one after each node of what is guessed to follow."""
        self._asked: list[tuple[Seq, State]] = []
        """Who is being asked for, and with what."""
        self._asked_s = 0.0
        self._suspects: list[Seq] = []
        self._live: dict[Seq, tuple[int, int]] = {}
        """What the worker's matchers know: by what number they go there, and how many tokens each has taken."""
        self._n_named = 0
        self._sent: set[str] = set()
        """Grammars that the worker has."""
        self._told = 0
        """Which of the workers knows what is written down here."""
        self._n_deaths = 0
        """Of workers in a row, for no reason that would be known."""
        self._failed: dict[int, str] = {}
        self.n_masks, self.waited_s = 0, 0.0
        """Masks made so far, and what steps have waited for them."""

    def begin(self) -> None:
        """Have a worker started, without waiting for it. Raises ``ResourceError``."""
        self._worker_now().begin()

    def late(self, running: Sequence[Seq], waiting: Sequence[Seq]) -> frozenset[int]:
        """Those among all sequences that cannot be in the next step: it would sample a token of theirs (of their
        heirs), and its mask is not there yet. It is asked for, and waited for a moment."""
        seqs = [*running, *waiting[: self._n_rows]]
        owner = {heir.id: seq.id for seq in seqs if seq.binding is not None for heir in seq.heirs}
        bound = [heir for seq in seqs if seq.binding is not None for heir in seq.heirs if not heir.finished]
        late = self._missing(bound)
        start_s = self._clock.now_s()
        until_s = start_s + SOFT_WAIT_S
        while late:
            if not self._asked:
                self._ask(late)
            if not self._collect(max(0.0, min(until_s, self._asked_s + SOFT_WAIT_S) - self._clock.now_s())):
                break
            late = self._missing(bound)
        self.waited_s += self._clock.now_s() - start_s
        far = (seq.id for seq in waiting[self._n_rows :] if seq.binding is not None)  # their turn has not come
        return frozenset((*(owner[seq.id] for seq in late), *far))

    def wait(self) -> None:
        """For somebody who has nothing else to do: until an answer comes, but not for long."""
        self._collect(IDLE_WAIT_S)

    def rows(self, wanted: Sequence[tuple[Seq, int]]) -> U32:
        """(B, W) of each of these sequences, none of which is late, its mask and those of the first nodes of its tree,
        so many in all. Whoever has failed gets empty ones."""
        return np.concatenate([self._ready[seq][1][:n] for seq, n in wanted])

    def take_failed(self) -> dict[int, str]:
        """Sequences that cannot go on, and why; told once."""
        failed, self._failed = self._failed, {}
        return failed

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            os.close(self._descriptor)
            self._worker = None

    # -- inside -----------------------------------------------------------------------------------------------

    def _missing(self, bound: list[Seq]) -> list[Seq]:
        """Those without a mask for their present tokens; of who thinks freely it is made here."""
        missing: list[Seq] = []
        for seq in bound:
            if seq in self._ready and self._ready[seq][0] == (seq.n_tokens, seq.tree):
                continue
            binding = _binding(seq)
            binding.look(seq.tokens[seq.n_prompt : seq.n_tokens])
            if binding.start is not None:
                missing.append(seq)
                continue
            mask = np.full(self.n_words, 0xFFFFFFFF, np.uint32)
            for token in seq.request.stop_ids:
                mask[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
            self._ready[seq] = _state(seq), np.tile(mask, (_n_masks(seq.tree), 1))
        return missing

    def _ask(self, seqs: list[Seq]) -> None:
        """Send for their masks; for one of those that the worker was killed at alone."""
        worker = self._worker_now()
        try:
            worker.begin()
        except ResourceError as error:
            self._asked = [(seq, _state(seq)) for seq in seqs]
            self._lost(str(error))
            return
        if worker.n_started != self._told:
            self._told = worker.n_started
            self._forget()
        if self._suspects:
            alone = [seq for seq in seqs if seq is self._suspects[0]]
            if not alone:  # it has left
                self._suspects.pop(0)
                return
            seqs = alone
        ends = np.cumsum([_n_masks(seq.tree) for seq in seqs])
        if ends[0] > self._n_rows:
            raise IntegrityError(f"{ends[0]} masks of one sequence are wanted; there is room for {self._n_rows}")
        seqs = seqs[: int(np.searchsorted(ends, self._n_rows, side="right"))]
        wanted, grammars = [], {}
        for seq in seqs:
            binding = _binding(seq)
            name, at = binding.grammar.name, seq.n_prompt + (binding.start or 0)
            if seq not in self._live:
                self._n_named += 1
            number, n = self._live.get(seq, (self._n_named, 0))
            nodes = [] if seq.tree is None else list(zip(seq.tree.parents, seq.tree.tokens, strict=True))
            wanted.append([number, name, n, seq.tokens[at + n : seq.n_tokens].tolist(), nodes])
            self._live[seq] = number, seq.n_tokens - at
            if name not in self._sent:
                grammars[name] = binding.grammar.compiled
        gone = [seq for seq in self._live if seq.finished]
        numbers = [self._live.pop(seq)[0] for seq in gone]
        for seq in [seq for seq in self._ready if seq.finished]:
            del self._ready[seq]
        used = {_binding(seq).grammar.name for seq in self._live}
        request = {
            "fill": wanted, "grammars": grammars, "drop": numbers, "drop_grammars": sorted(self._sent - used),
            "cpu_s": self._cpu_s,
        }  # fmt: skip
        self._sent = (self._sent | grammars.keys()) & used
        self._asked, self._asked_s = [(seq, _state(seq)) for seq in seqs], self._clock.now_s()
        worker.send(request)
        if worker.n_started != self._told:  # it died just now, and another one cannot know what this builds on
            worker.kill()
            self._asked = []

    def _collect(self, wait_s: float) -> bool:
        """Whether what was asked for is settled, one way or another."""
        if not self._asked:
            return True
        worker = self._worker_now()
        try:
            reply = worker.receive(wait_s, 1 << 20)
        except ResourceError as error:
            self._lost(str(error))
            return True
        if reply is None and worker.is_alive:
            if self._clock.now_s() < self._asked_s + _HANG_S or worker.is_starting:
                return False
            worker.kill()
        if reply is None and self._n_deaths < MAX_DEATHS:  # who ended it, if not a grammar, may not do so again
            self._n_deaths += 1
            self._asked = []
            return True
        if reply is None or "killed" in reply:
            self._lost(None)
            return True
        self._n_deaths = 0
        row = 0
        for seq, state in self._asked:
            first, row = row, row + _n_masks(state[1])
            said = reply["errors"].get(str(self._live[seq][0]))
            if said is not None:
                self._fail(seq, state, f"structured output failed: {said}")
                continue
            masks, binding = self._shared[first:row].copy(), _binding(seq)
            if binding.may_think and binding.grammar.think is not None:
                token = binding.grammar.think[0]
                masks[0, token // 32] |= np.uint32(1 << token % 32)
            self._ready[seq] = state, masks
            self.n_masks += row - first
        if self._suspects:
            self._suspects.pop(0)
        self._asked = []
        return True

    def _lost(self, reason: str | None) -> None:
        """The worker has ended, and the next knows nothing. ``reason``: why there will be none; without one it was
        somebody's grammar."""
        asked, self._asked = self._asked, []
        self._forget()
        if reason is None and len(asked) > 1:
            self._suspects = [seq for seq, _ in asked]
            return
        for seq, state in asked:
            self._fail(seq, state, reason or "the grammar took too much time or memory at this token")
        if self._suspects:
            self._suspects.pop(0)

    def _forget(self) -> None:
        self._live.clear()
        self._sent.clear()

    def _fail(self, seq: Seq, state: State, said: str) -> None:
        """With an empty mask it is in the next step, in which nothing can come of it."""
        self._ready[seq] = state, np.zeros((_n_masks(state[1]), self.n_words), np.uint32)
        self._failed[seq.id] = said

    def _worker_now(self) -> LineWorker:
        if self._worker is None:
            n_bytes = 4 * self._n_rows * self.n_words
            self._descriptor = os.memfd_create("tenon-masks")
            os.ftruncate(self._descriptor, n_bytes)
            memory = mmap.mmap(self._descriptor, n_bytes)
            self._shared = np.frombuffer(memory, np.uint32).reshape(self._n_rows, self.n_words)
            self._worker = LineWorker(
                "grammar worker", grammar_worker.__file__, (str(self._descriptor), str(self._n_rows)),
                hello=self._vocabulary.hello(), clock=self._clock, keep=(self._descriptor,),
            )  # fmt: skip
        return self._worker


def _state(seq: Seq) -> State:
    return seq.n_tokens, seq.tree


def _n_masks(tree: Tree | None) -> int:
    """Of a sequence: one for its next token, and one for each that may follow what is guessed."""
    return 1 if tree is None else 1 + len(tree)


def begin(masks: Masks | None, add: Add) -> None:
    """Before a request with a grammar is queued. Raises ``RequestError``."""
    if masks is None:
        said = "structured output is not available here"
        raise RequestError(said, param="response_format", code="unsupported")
    for name, wanted in (("ignore_eos", add.ignore_eos), ("min_tokens", add.min_tokens > 0)):
        if wanted:
            said = f"{name} cannot be had with a grammar: where the grammar ends, nothing but the end may come"
            raise RequestError(said, param=name, code="invalid_value")
    try:
        masks.begin()
    except ResourceError as error:
        raise RequestError(str(error), param="response_format", code="unsupported") from error


def _binding(seq: Seq) -> Binding:
    if seq.binding is None:
        raise ValueError("a mask is asked for a sequence without a grammar")
    return seq.binding
