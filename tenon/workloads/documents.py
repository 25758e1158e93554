"""Long documents that are asked about in turns: LongBench and LooGLE as AsymCache runs them (arXiv 2606.02964, section
6).

Sessions and the turns within one come with Gamma gaps of little variance; how far apart a session's turns are, against
the gaps between sessions, is the paper's *dispersion*.
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.workloads import arrivals
from tenon.workloads.dialogue import Dialogue, merged
from tenon.workloads.draws import LogNormal
from tenon.workloads.generator import Order
from tenon.workloads.trace import TraceRequest


def documents(order: Order) -> Iterator[TraceRequest]:
    """Each session is one document and a fixed number of turns; a prompt is the document and all that was said
    since.
    """
    given, streams = order.given, order.streams
    n_turns, cv = given.count("turns"), given.number("cv", above=True)
    dispersion = given.word("dispersion", ("low", "high"))
    gap_s = given.number(f"gap_{dispersion}_s", above=True)
    question = LogNormal.of_mean(streams.of("questions"), given.number("question_tokens", low=1),
                                 given.number("question_sigma"))  # fmt: skip
    answer = LogNormal.of_mean(
        streams.of("answers"), given.number("answer_tokens", low=1), given.number("answer_sigma")
    )
    # The paper gives the mean prompt; half the turns' growth is the document's share of it less.
    growth = given.number("question_tokens") + given.number("answer_tokens")
    mean = given.number("input_tokens", low=1) - given.number("question_tokens") - growth * (n_turns - 1) / 2
    document = LogNormal.of_mean(streams.of("documents"), max(1.0, mean), given.number("document_sigma"))
    gaps, shape, token_s = streams.of("gaps"), 1 / (cv * cv), given.number("estimate_s_per_token")

    def session(number: int, at_s: float) -> list[TraceRequest]:
        dialogue = Dialogue(f"s{number}", order.contents)
        dialogue.say(document.tokens())
        requests: list[TraceRequest] = []
        wait_s = 0.0
        for _ in range(n_turns):
            dialogue.say(question.tokens())
            n_answer = answer.tokens()
            requests.append(dialogue.ask(at_s, n_answer, gap_s=wait_s))
            # The cited gaps are from access to access: what the answer takes, by estimate, is no waiting.
            every_s = float(gaps.standard_gamma(shape)) / shape * gap_s
            wait_s = max(0.0, every_s - token_s * n_answer)
            at_s += every_s
        return requests

    starts = arrivals.renewal(streams.of("arrivals"), order.rate / n_turns, cv)
    yield from merged(session(i, at_s) for i, at_s in enumerate(starts))
