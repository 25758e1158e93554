"""Where each request's seconds went: an account that adds up, at the cost of a few additions a step.

    received   waits              entered    computes its prompt        first    decodes                    last token
       |------- queue -------------|-- own rows -|-- behind others -------|-- plain | prompts | guesses --------|

Steps tile the time in which an engine has work: each lasts from the end of the one before to its own. What all that
decode share is added up once for all of them; a sequence notes where the sums stood when it began. So a step costs the
same however many decode, and only runs of prompts are looked at one by one. Whoever is preempted goes through it again.

What a step that decodes would have taken with its decodes alone is what such steps took lately; the rest of it goes to
guesses, as far as these are thought to add to it, and to prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tenon.engine.promises import Behind, Ledger
from tenon.engine.sequence import Seq, State

if TYPE_CHECKING:
    from tenon.engine.assemble import Span

RECENT_RUNS: Final = 1024
"""Runs of others' prompts that a sequence may have waited behind, the newest of all."""
MOST_BEHIND: Final = 3
"""Of those, told by name: the longest."""
MOST_DONE: Final = 4096
"""Accounts of ended sequences that are kept until somebody takes them, the newest."""
RATE: Final = 0.1
"""Of the exponential average of steps that only decode."""

Run = tuple[int, int]


@dataclass(slots=True)
class Split:
    """Seconds of steps, or of one, as those who decode have them."""

    plain_s: float = 0.0
    prompts_s: float = 0.0
    guesses_s: float = 0.0

    def add(self, other: Split, sign: float = 1.0) -> None:
        self.plain_s += sign * other.plain_s
        self.prompts_s += sign * other.prompts_s
        self.guesses_s += sign * other.guesses_s

    def copy(self) -> Split:
        return Split(self.plain_s, self.prompts_s, self.guesses_s)


@dataclass(slots=True)
class Account:
    """One sequence's. Times are the engine's clock."""

    received_s: float
    since_s: float
    """When what it is at began: waiting, its prompt, decoding."""
    ahead: int = 0
    """Sequences that ran or waited when it came."""
    queue_s: float = 0.0
    again_s: float = 0.0
    """Queued after a preemption."""
    prefill_s: float = 0.0
    recompute_s: float = 0.0
    missed_s: float = 0.0
    behind_s: float = 0.0
    grammar_s: float = 0.0
    gained_s: float = 0.0
    own_s: float = 0.0
    """Of its present prompt: its own rows and masks, so far."""
    decodes: Split = field(default_factory=Split)
    began: Split | None = None
    """The sums when it began to decode; None while it does not."""
    reached: int = 0
    """Positions that had been computed before it was preempted."""
    evicted: tuple[Run, ...] = ()
    """Runs of its prompt that had been in the cache."""
    behind: tuple[Behind, ...] = ()


Thought = Callable[[int, int, int], Split | None]
"""What is thought of a step of ``n`` decodes, so many rows of theirs and so many of prompts."""


def nothing_known(n: int, rows: int, prompt_rows: int) -> Split | None:
    """A ``Thought`` of whom only steps that were seen tell."""
    return None


class Ledgers:
    """Of one scheduler's sequences."""

    def __init__(self, split: Thought) -> None:
        self._predict = split
        self._sums = Split()
        self._plain_s: dict[int, float] = {}
        """By the number of decodes, of steps that had nothing else."""
        self._runs: deque[tuple[float, str, float]] = deque(maxlen=RECENT_RUNS)
        """When a step ended, whose prompt it computed, how much of its time that took."""
        self._end_s: float | None = None
        self.step_plain_s = 0.0
        """Of the last step, the part of its decodes."""
        self._done: deque[Ledger] = deque(maxlen=MOST_DONE)

    # -- sequences -----------------------------------------------------------------------------------------

    def received(self, seq: Seq, now_s: float, ahead: int) -> None:
        seq.account = Account(now_s, now_s, ahead)

    def entered(self, seq: Seq, now_s: float, evicted: tuple[Run, ...]) -> None:
        """It waits no longer. ``evicted``: runs of its prompt that had been in the cache."""
        account = seq.account
        if account is None:
            return
        waited_s = max(0.0, now_s - account.since_s)
        if seq.n_preempted:
            account.again_s += waited_s
        else:
            account.queue_s += waited_s
        account.since_s, account.own_s = max(now_s, account.since_s), 0.0
        account.evicted = evicted

    def forked(self, first: Seq, sibling: Seq) -> None:
        """Siblings have the prompt's account in common."""
        mine = first.account
        if mine is not None:
            sibling.account = Account(
                mine.received_s, mine.since_s, mine.ahead, mine.queue_s, mine.again_s, mine.prefill_s,
                mine.recompute_s, mine.missed_s, mine.behind_s, mine.grammar_s, own_s=mine.own_s,
            )  # fmt: skip

    def preempted(self, seq: Seq) -> None:
        account = seq.account
        if account is not None:
            self._close(account)
            account.reached = max(account.reached, seq.n_computed)

    def gained(self, seq: Seq, n_tokens: int) -> None:
        """So many of its tokens came in a step that would have brought one."""
        if seq.account is not None:
            seq.account.gained_s += (n_tokens - 1) * self.step_plain_s

    def _close(self, account: Account) -> None:
        """What it was at ends with the last step."""
        end_s = account.since_s if self._end_s is None else max(self._end_s, account.since_s)
        if account.began is not None:
            account.decodes.add(self._sums)
            account.decodes.add(account.began, -1.0)
            account.began = None
        else:
            account.behind_s += max(0.0, end_s - account.since_s - account.own_s)
        account.since_s, account.own_s = end_s, 0.0

    def ended(self, seq: Seq, reason: str) -> Ledger | None:
        """It has got its last token, in the step that was told last, or is not served any more, waiting where it has no
        blocks."""
        account, add = seq.account, seq.request.add
        if account is None:
            return None
        end_s = account.since_s if self._end_s is None else max(self._end_s, account.since_s)
        if seq.state is State.WAITING:
            account.queue_s += end_s - account.since_s
        else:
            self._close(account)
        seq.account = None
        d = account.decodes
        told = (
            account.queue_s + account.again_s + account.prefill_s + account.recompute_s + account.missed_s
            + account.behind_s + account.grammar_s + d.plain_s + d.prompts_s + d.guesses_s
        )  # fmt: skip
        total_s = end_s - account.received_s
        ledger = Ledger(
            request_id=add.request_id, index=seq.index, reason=reason,
            arrival_s=add.arrival_s or account.received_s, received_s=account.received_s, end_s=end_s,
            first_s=seq.first_s, queue_s=account.queue_s, again_s=account.again_s, prefill_s=account.prefill_s,
            recompute_s=account.recompute_s, missed_s=account.missed_s, behind_s=account.behind_s,
            grammar_s=account.grammar_s, decode_s=d.plain_s, prompts_s=d.prompts_s, guesses_s=d.guesses_s,
            residual_s=total_s - told, gained_s=account.gained_s, ahead=account.ahead, behind=account.behind,
        )  # fmt: skip
        self._done.append(ledger)
        return ledger

    def take(self) -> list[Ledger]:
        """Of sequences that ended since this was last called."""
        done = list(self._done)
        self._done.clear()
        return done

    # -- steps ---------------------------------------------------------------------------------------------

    def stepped(self, begin_s: float, end_s: float, spans: Sequence[Span], late: Iterable[Seq]) -> None:
        """A step of ``spans`` was scheduled at ``begin_s`` and computed by ``end_s``; nothing of it has been taken over
        yet. Of ``late`` ones, who run, the masks were not there."""
        start_s = begin_s if self._end_s is None else self._end_s
        n_decodes = n_rows = n_prompt = 0
        sums = self._sums
        for span in spans:
            account = span.seq.account
            if span.seq.is_decoding:
                n_decodes += 1
                n_rows += span.n
                if account is not None and account.began is None:
                    self._begin(span.seq, account)
            else:
                n_prompt += span.n
        split = self._split(end_s - start_s, n_decodes, n_rows, n_prompt)
        if n_prompt:
            self._prompts(start_s, end_s, spans, n_rows + n_prompt)
        sums.add(split)
        for seq in late:
            if (account := seq.account) is None:
                continue
            waited_s = end_s - min(max(start_s, account.since_s), end_s)
            account.grammar_s += waited_s
            if account.began is None:
                account.own_s += waited_s
            else:
                account.began.add(split)  # what others decoded meanwhile is not its own
        self.step_plain_s = split.plain_s
        self._end_s = end_s

    def stepped_alike(self, end_s: float, n_decodes: int) -> None:
        """Another step of those who decoded in the last one, a row each."""
        seconds, known = end_s - (self._end_s or end_s), self._plain_s.get(n_decodes)
        self._plain_s[n_decodes] = seconds if known is None else known + RATE * (seconds - known)
        self._sums.plain_s += seconds
        self.step_plain_s, self._end_s = seconds, end_s

    def idle(self) -> None:
        """There is no work: what passes until the next step is nobody's."""
        self._end_s = None

    def _begin(self, seq: Seq, account: Account) -> None:
        """Its prompt was computed by the end of the step before."""
        end_s = account.since_s if self._end_s is None else self._end_s
        account.behind_s += max(0.0, end_s - account.since_s - account.own_s)
        if not account.behind:
            add = seq.request.add
            account.behind = self._behind(add.request_id, add.arrival_s or account.received_s, end_s)
        account.since_s, account.own_s, account.began = max(end_s, account.since_s), 0.0, self._sums.copy()

    def _split(self, seconds: float, n_decodes: int, n_rows: int, n_prompt: int) -> Split:
        if n_decodes == 0:
            return Split(0.0, seconds, 0.0)
        n_nodes = n_rows - n_decodes
        if not n_prompt and not n_nodes:
            known = self._plain_s.get(n_decodes)
            self._plain_s[n_decodes] = seconds if known is None else known + RATE * (seconds - known)
            return Split(seconds, 0.0, 0.0)
        thought = self._predict(n_decodes, n_rows, n_prompt)
        if thought is None:
            plain_s = self._plain_s.get(n_decodes)
            plain_s = seconds * n_decodes / (n_rows + n_prompt) if plain_s is None else min(plain_s, seconds)
            left_s = seconds - plain_s
            share = n_nodes / (n_nodes + n_prompt)
            return Split(plain_s, left_s * (1 - share), left_s * share)
        total_s = thought.plain_s + thought.prompts_s + thought.guesses_s
        if total_s <= 0:
            return Split(seconds, 0.0, 0.0)
        scale = seconds / total_s  # what all its parts are slower than thought
        return Split(thought.plain_s * scale, thought.prompts_s * scale, thought.guesses_s * scale)

    def _prompts(self, start_s: float, end_s: float, spans: Sequence[Span], n_rows: int) -> None:
        """Each run's part of the step's time is its part of the rows; it is the sequence's from when it came in."""
        for span in spans:
            seq = span.seq
            account = seq.account
            if seq.is_decoding:
                continue
            since_s = start_s if account is None else min(max(start_s, account.since_s), end_s)
            own_s = (end_s - since_s) * span.n / n_rows
            self._runs.append((end_s, seq.request.add.request_id, own_s))
            if account is None:
                continue
            account.own_s += own_s
            again = max(0, min(span.start + span.n, account.reached) - span.start)
            missed = 0
            for start, end in account.evicted:
                missed += max(0, min(span.start + span.n, end) - max(span.start, start, account.reached))
            each_s = own_s / span.n
            account.recompute_s += again * each_s
            account.missed_s += missed * each_s
            account.prefill_s += (span.n - again - missed) * each_s

    def _behind(self, request_id: str, from_s: float, to_s: float) -> tuple[Behind, ...]:
        """Whose prompts were computed meanwhile, the longest first."""
        spent: dict[str, float] = {}
        for end_s, other, seconds in self._runs:
            if from_s < end_s <= to_s and other != request_id:
                spent[other] = spent.get(other, 0.0) + seconds
        longest = sorted(spent.items(), key=lambda each: -each[1])[:MOST_BEHIND]
        return tuple(Behind(other, seconds) for other, seconds in longest)
