"""Mooncake's three traces: conversation, synthetic (documents and questions), tool and agent.

They are published as times, lengths and hashes of 512 tokens (Qin et al., FAST'25, arXiv 2407.00079;
kvcache-ai/Mooncake, ``FAST25-release``). The conversation model is fitted to the released file by
:mod:`tenon.workloads.fit`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tenon.workloads import arrivals
from tenon.workloads.dialogue import Dialogue, merged
from tenon.workloads.draws import LogNormal, pick, turns
from tenon.workloads.generator import Order
from tenon.workloads.parameters import Quantiles
from tenon.workloads.trace import Segment, TraceRequest

BLOCK = 512


@dataclass
class _Session:
    """A conversation: its dialogue, the prompt's length when it was last asked, how that turn came about, and where in
    their distributions its last text and gap lay: people who write little and soon go on to do so."""

    dialogue: Dialogue
    asked: int = 0
    kind: str = "first"
    u_text: float = -1.0
    u_gap: float = -1.0


class _Conversations:
    """Draws what a session does next. All chances are those of ``parameters.toml``."""

    def __init__(self, order: Order) -> None:
        given, streams = order.given, order.streams
        self._order = order
        self._first, self._output = given.quantiles("first_tokens"), given.quantiles("output_tokens")
        self._text_first, self._text_later = given.quantiles("text_first"), given.quantiles("text_later")
        self._text_memory, self._gap_memory = given.share("text_memory"), given.share("gap_memory")
        self._gap_length, self._max = given.steps("gap_length"), given.count("max_tokens")
        self._kept, self._tail = given.quantiles("branch_kept"), given.quantiles("branch_tokens")
        self._gap, self._repeat_gap = given.quantiles("gap_s"), given.quantiles("repeat_gap_s")
        self._again_first, self._again_later = given.steps("again_first"), given.steps("again_later")
        self._branch = {kind: given.steps(f"branch_{kind}") for kind in ("first", "later", "again")}
        self._repeat = {kind: given.share(f"repeat_{kind}") for kind in ("first", "later", "again")}
        self._lengths, self._outputs = streams.of("lengths"), streams.of("outputs")
        self._chances, self._gaps = streams.of("chances"), streams.of("gaps")
        self._common = Segment(order.contents.new(), given.count("common_tokens"))
        self._texts, self._branchings = streams.of("texts"), streams.of("branchings")
        self._begun = 0

    def begin(self) -> _Session:
        session = _Session(Dialogue(f"s{self._begun}", self._order.contents, (self._common,)))
        self._begun += 1
        length = round(self._first.at(self._lengths.random()))
        session.dialogue.say(max(1, length - self._common.n))
        return session

    def ask(self, session: _Session, arrival_s: float) -> TraceRequest:
        session.asked = session.dialogue.n_tokens
        return session.dialogue.ask(arrival_s, max(1, round(self._output.at(self._outputs.random()))))

    def go_on(self, session: _Session) -> float | None:
        """Prepare the next prompt; seconds until it comes, None when the session is over.

        Every stream gives its number whatever happens, so that one changed chance does not shift all that follows.
        """
        u_again, u_kind = float(self._chances.random()), float(self._chances.random())
        u_text, u_gap = float(self._texts.random()), float(self._gaps.random())
        if self._texts.random() < self._text_memory and session.u_text >= 0:
            u_text = session.u_text
        if self._gaps.random() < self._gap_memory and session.u_gap >= 0:
            u_gap = session.u_gap
        session.u_text, session.u_gap = u_text, u_gap
        turn, asked = session.dialogue.turn, session.asked
        if session.dialogue.n_tokens >= self._max:
            return None
        if u_again >= (self._again_first.at(asked) if turn == 1 else self._again_later.at(turn - 1)):
            return None
        before = "first" if turn == 1 else "again" if session.kind == "branch" else "later"
        repeat = self._repeat["again" if session.kind == "repeat" else "first" if turn == 1 else "later"]
        if asked < 2 * BLOCK or u_kind >= 1 - repeat:
            return self._repeats(session, u_gap)
        if u_kind < self._branch[before].at(asked) and asked >= 4 * BLOCK:
            self._branches(session)
        else:
            session.kind = "extend"
            text = self._text_first if turn == 1 else self._text_later
            self._say(session.dialogue, round(text.at(u_text)))
        return self._gap.at(u_gap) * self._gap_length.at(asked)

    def _repeats(self, session: _Session, u_gap: float) -> float:
        session.kind = "repeat"
        session.dialogue.keep(session.asked)
        return self._repeat_gap.at(u_gap)

    def _branches(self, session: _Session) -> None:
        """Another text after the same beginning, as where many ask about one document or with one template."""
        session.kind = "branch"
        whole = session.asked // BLOCK
        kept = min(whole - 1, max(2, round(self._kept.at(float(self._branchings.random())) * whole)))
        # The texts part somewhere in the block after those that are shared.
        into = int(self._branchings.integers(BLOCK))
        session.dialogue.keep(kept * BLOCK + into)
        self._say(session.dialogue, round(self._tail.at(float(self._branchings.random()))) - into)

    def _say(self, dialogue: Dialogue, n: int) -> None:
        """As many tokens, or as many as the service's longest prompt leaves room for."""
        dialogue.say(max(1, min(n, self._max - dialogue.n_tokens)))


def conversation(order: Order) -> Iterator[TraceRequest]:
    """Arrivals in batches of a Poisson number. Followers that are due come first and new sessions fill the rest, so
    that the rate is the given one from the start on, as in an hour cut out of a service's log.
    """
    model = _Conversations(order)
    every_s = order.given.number("every_s", above=True)
    due: dict[int, list[_Session]] = defaultdict(list)
    room = 0
    for tick, (now_s, n) in enumerate(arrivals.batches(order.streams.of("arrivals"), order.rate, every_s)):
        # Followers beyond a batch's number take their places from the next batches.
        sessions = due.pop(tick, [])
        room += n - len(sessions)
        sessions += [model.begin() for _ in range(room)]
        room = min(room, 0)
        for session in sessions:
            yield model.ask(session, now_s)
            gap_s = model.go_on(session)
            if gap_s is not None:
                due[tick + max(1, round(gap_s / every_s))].append(session)


def synthetic(order: Order) -> Iterator[TraceRequest]:
    """One-shot prompts beside documents that are asked about several times, some of them since before the trace
    begins."""
    given, streams = order.given, order.streams
    kinds, lengths, questions, gaps, outputs = (
        streams.of(name) for name in ("kinds", "lengths", "questions", "gaps", "outputs")
    )
    share, repeat = given.share("document_share"), given.share("repeat_share")
    once, once_output = given.quantiles("once_tokens"), given.quantiles("once_output")
    document, output = given.quantiles("document_tokens"), given.quantiles("document_output")
    question, gap = given.quantiles("question_tokens"), given.quantiles("gap_s")
    mean = given.number("questions", low=1)

    def session(number: int, start_s: float) -> list[TraceRequest]:
        dialogue = Dialogue(f"s{number}", order.contents)
        if kinds.random() >= share:
            dialogue.say(_tokens(once, lengths))
            return [dialogue.ask(start_s, _tokens(once_output, outputs))]
        length = _tokens(document, lengths)
        dialogue.say(length)
        asked = length
        requests: list[TraceRequest] = []
        for _ in range(turns(kinds, mean)):
            if requests and questions.random() < repeat:
                dialogue.keep(asked)
            else:
                # A question stands behind the document alone: what was asked before is not part of the prompt.
                dialogue.keep(length)
                dialogue.say(_tokens(question, questions))
                asked = dialogue.n_tokens
            requests.append(dialogue.ask(start_s, _tokens(output, outputs)))
            start_s += gap.at(float(gaps.random()))
        return requests

    warm_s = given.number("warm_s")
    starts = arrivals.poisson(streams.of("arrivals"), order.rate / (1 - share + share * mean))
    requests = merged(session(i, at_s - warm_s) for i, at_s in enumerate(starts))
    yield from (request for request in requests if request.arrival_s >= 0)


def _tokens(table: Quantiles, stream: np.random.Generator) -> int:
    """A length after a table: at least one."""
    return max(1, round(table.at(float(stream.random()))))


def toolagent(order: Order) -> Iterator[TraceRequest]:
    """Prompts of tools and agents: one of several long instructions, as popular as a Zipf law says, then what is
    new.
    """
    given, streams = order.given, order.streams
    lengths, choices, outputs = (streams.of(name) for name in ("lengths", "choices", "outputs"))
    templates = LogNormal.of_mean(lengths, given.number("template_tokens", low=1), given.number("template_sigma"))
    shared = [Segment(order.contents.new(), templates.tokens()) for _ in range(given.count("templates"))]
    weights = [(rank + 1) ** -given.number("zipf") for rank in range(len(shared))]
    text = LogNormal.of_mean(lengths, given.number("text_tokens", low=1), given.number("text_sigma"))
    output = LogNormal.of_mean(outputs, given.number("output_tokens", low=1), given.number("output_sigma"))
    high = given.count("max_tokens")
    times = arrivals.batched(streams.of("arrivals"), order.rate, given.number("every_s", above=True))
    for number, at_s in enumerate(times):
        dialogue = Dialogue(f"s{number}", order.contents, (shared[pick(choices, weights)],))
        dialogue.say(max(1, min(text.tokens(), high - dialogue.n_tokens)))
        yield dialogue.ask(at_s, output.tokens())
