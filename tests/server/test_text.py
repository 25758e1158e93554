"""Text as it grows: stop strings wherever pieces are cut, log-probabilities in step with their text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.messages import Delta
from tenon.server.text import OutputText, StopScanner, Thought

AB = st.text(alphabet="ab", max_size=24)


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def scanned(parts: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    out = ""
    for part in parts:
        out += scanner.push(part)
        if scanner.found is not None:
            return out, scanner.found
    return out + scanner.flush(), None


@settings(deadline=None)
@given(AB, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 24)))
def test_cuts_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    assert scanned(pieces(text, cuts), stops) == scanned(list(text), stops)


@settings(deadline=None)
@given(AB, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_the_first_stop_string_is_sent(text: str, stops: list[str]) -> None:
    out, found = scanned(list(text), stops)
    if found is None:
        assert out == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(out + found)
        assert not any(stop in (out + found)[:-1] for stop in stops)


def test_the_longest_of_those_that_end_together_wins() -> None:
    assert scanned(["xab"], ["b", "ab"]) == ("x", "ab")
    assert scanned(["abc"], ["abc", "b"]) == ("a", "b")


class Letters:
    """A decoder of one character per id that holds id 0 back until the next."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for token in ids:
            if token == 0:
                self._held += "0"
            else:
                text, self._held = text + self._held + chr(token), ""
        return text

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def delta(text: str, **fields: object) -> Delta:
    ids = tuple(0 if c == "0" else ord(c) for c in text)
    return Delta("r", 0, ids, logprobs=tuple(-float(i) for i in range(len(ids))), **fields)  # type: ignore[arg-type]


def test_logprobs_come_with_the_text_they_belong_to() -> None:
    output = OutputText(Letters(), ["xyz"])
    assert [(p.text, len(p.logprobs)) for p in map(output.push, [delta("ax"), delta("0"), delta("b")])] == [
        ("a", 1),
        ("", 0),
        ("x0b", 3),
    ]


def test_a_stop_string_cuts_text_and_logprobs() -> None:
    output = OutputText(Letters(), ["xyz"])
    first, last = output.push(delta("abxy")), output.push(delta("zcd"))
    assert (first.text, last.text, last.finish_reason) == ("ab", "", "stop")
    assert len(first.logprobs) + len(last.logprobs) == 2
    assert output.finished
    assert output.n_tokens == 5


def told(deltas: Sequence[Delta], stops: Sequence[str], min_tokens: int, thinks: bool) -> tuple[object, ...]:
    """All that is told of them, and how many tokens count."""
    output = OutputText(Letters(), stops, min_tokens, Thought((ord("<"), ord(">")), begun=False) if thinks else None)
    pieces = []
    for delta in deltas:
        if not output.finished:
            pieces.append(output.push(delta))
    text, thought = "".join(p.text for p in pieces), "".join(p.reasoning for p in pieces)
    logprobs = [entry for p in pieces for entry in p.logprobs]
    return text, thought, logprobs, pieces[-1].finish_reason if pieces else None, output.n_tokens, output.n_thought


@settings(deadline=None, max_examples=400)
@given(
    st.text(alphabet="ab0<>\n", min_size=1, max_size=24),
    st.lists(st.text(alphabet="ab0\n", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(0, 24)),
    st.integers(0, 4),
    st.sampled_from([None, "length", "stop"]),
    st.booleans(),
)
def test_it_does_not_matter_how_many_tokens_come_at_once(
    text: str, stops: list[str], cuts: list[int], min_tokens: int, reason: str | None, thinks: bool
) -> None:
    whole = delta(text)

    def cut(at: Sequence[int]) -> list[Delta]:
        ends = sorted({min(it, len(text)) for it in at} | {0, len(text)})
        made = [Delta("r", 0, whole.ids[a:b], logprobs=whole.logprobs[a:b]) for a, b in itertools.pairwise(ends)]
        stop_id = made[-1].ids[-1] if reason == "stop" else None
        return [*made[:-1], msgspec.structs.replace(made[-1], finish_reason=reason, stop_id=stop_id)]

    assert told(cut(cuts), stops, min_tokens, thinks) == told(cut(range(len(text))), stops, min_tokens, thinks)


def test_a_stop_token_is_counted_and_not_shown() -> None:
    output = OutputText(Letters(), [])
    piece = output.push(delta("ab", finish_reason="stop", stop_id=ord("b")))
    assert (piece.text, piece.finish_reason, output.n_tokens, len(piece.logprobs)) == ("a", "stop", 2, 1)


def test_what_is_held_comes_out_at_the_end() -> None:
    output = OutputText(Letters(), ["xyz"])
    assert output.push(delta("axy")).text == "a"
    assert output.push(delta("", finish_reason="length")).text == "xy"
