"""People who chat: multi-turn conversations with the lengths of ShareGPT and LMSYS-Chat-1M.

Sessions come as a Poisson process; turns are geometric; each prompt is all that was said before and the new question;
the next question is sent when its writer has read the answer (``after`` and ``gap_s``).
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.workloads import arrivals
from tenon.workloads.dialogue import Dialogue, merged
from tenon.workloads.draws import LogNormal, turns
from tenon.workloads.generator import Order
from tenon.workloads.trace import Segment, TraceRequest


def chat(order: Order) -> Iterator[TraceRequest]:
    given, streams = order.given, order.streams
    mean_turns, longest = given.number("turns", low=1), given.count("max_tokens")
    counts = streams.of("turns")
    question = LogNormal.of_mean(streams.of("questions"), given.number("question_tokens", low=1),
                                 given.number("question_sigma"))  # fmt: skip
    answer = LogNormal.of_mean(
        streams.of("answers"), given.number("answer_tokens", low=1), given.number("answer_sigma")
    )
    gap = LogNormal(streams.of("gaps"), given.number("gap_s", above=True), given.number("gap_sigma"))
    token_s, system = given.number("estimate_s_per_token"), given.count("system_tokens", low=0)
    shared = (Segment(order.contents.new(), system),) if system else ()

    def session(number: int, at_s: float) -> list[TraceRequest]:
        dialogue = Dialogue(f"s{number}", order.contents, shared)
        requests: list[TraceRequest] = []
        gap_s = 0.0
        for _ in range(turns(counts, mean_turns)):
            n_question, n_answer, next_gap_s = question.tokens(), answer.tokens(), gap.draw()
            if requests and dialogue.n_tokens + n_question + n_answer > longest:
                break
            dialogue.say(min(n_question, longest))
            requests.append(dialogue.ask(at_s, n_answer, gap_s=gap_s))
            at_s, gap_s = at_s + token_s * n_answer + next_gap_s, next_gap_s
        return requests

    starts = arrivals.poisson(streams.of("arrivals"), order.rate / mean_turns)
    yield from merged(session(i, at_s) for i, at_s in enumerate(starts))
