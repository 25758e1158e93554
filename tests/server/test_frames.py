"""What crosses the socket, mangled: a typed error or a valid batch, never anything else."""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tenon.base.errors import ProtocolError
from tenon.engine import messages as m
from tenon.engine.promises import Behind, Forecast, Ledger, Slo

Batch = m.EngineBatch | m.ServerBatch

ADD = m.Add("r", (1, 2, 3), 8, 7, stop_ids=(2,))
FORECAST = Forecast(0.1, 0.01, 16, 0.5, False, 2.0)
LEDGER = Ledger("r", 0, "stop", *(0.5 * i for i in range(16)), 2, (Behind("s", 0.1),))
FRAME = m.encode(m.EngineBatch(1, (ADD, m.Abort("r"), m.Drain())))
GUESSES = m.Guesses(1, 5, 2, 1.5, (1, 1), (1, 0))
STATS = m.Stats(
    1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, {"stop": 1}, 0.1, 0.2, missed_tokens={"new": 3}, guesses=GUESSES,
)  # fmt: skip
SAID: list[Batch] = [
    m.EngineBatch(1, (ADD, m.Abort("r"), m.Drain())),
    m.EngineBatch(
        2, (m.Add("s", (4,), 2, 1, bad_words=((1, 2),), logit_bias=((3, 0.5),), again=True), m.Watch(True), m.Reset())
    ),
    m.EngineBatch(3, (m.LoadWeights("w", 1), m.Forget(), m.Expect())),
    m.EngineBatch(4, (m.Add("g", (4,), 2, 1, grammar=m.Grammar("n", "{}", (1, 2), True), embed=m.Embed("last")),)),
    m.EngineBatch(5, (m.Estimate(m.Add("e", (4,), 2, 1, slo_class="c", slo=Slo(0.5, 0.05, 2.0, True))),)),
    m.ServerBatch(2, (m.Estimated("e", FORECAST, None, 1, 2), m.Estimated("e", None, m.Rejected("e", "no")), LEDGER)),
    m.ServerBatch(1, (m.Phase("weights", 0.5, "x"), m.Ready("m", 9, 9, (2,), 9, 16, 99, {"a": "b"}), STATS)),
    m.ServerBatch(
        1,
        (
            m.Accepted("r", 3),
            m.Rejected("r", "no", 429, "code", "param", 1.5),
            m.Outputs(4, (m.Delta("r", 0, (5,), "stop", 5, (-0.5,), (((5, -0.5),),), 3, "said"),)),
            m.PromptScores("r", 0, (-1.0,), (((1, -1.0),),)),
            m.Embedded("r", b"0123"),
        ),
    ),
    m.ServerBatch(
        1,
        (
            m.Misses("r", 1, 2, 3, (m.Miss(0, 16, "new", 1.0, 3, 0.5, 0.6, "lru", 0.1),)),
            m.KVEvents((m.KVEvent("stored", 0, "ab", 16, "cd", "why"),), 2),
            m.Residency(1.0, 1, (m.Row("r", 0, 16, "rcth"),), 1, 2, (1.0,), (1, 2), (1,), (1, 2)),
            m.Trees((m.Verified("r", 1, "t", 9, 4, (5, 6), (-1, 0), (0.9, 0.5), (0,), 7),), 3),
            m.Fatal("over", "trace"),
        ),
    ),
]
"""Every message there is."""


def decode(body: bytes, of: Batch) -> Batch:
    read: Callable[[bytes], Batch] = m.decode_to_engine if isinstance(of, m.EngineBatch) else m.decode_from_engine
    return read(body)


def test_every_message_is_said_here() -> None:
    said = {type(message) for batch in SAID for message in batch.messages}
    assert said == set(m.ToEngine.__args__) | set(m.FromEngine.__args__)
    for batch in SAID:
        assert decode(m.encode(batch)[4:], batch) == batch


def scrambled(draws: random.Random, frame: bytes) -> bytes:
    """Bytes changed, cut out, doubled, or another frame's put between."""
    mutated = bytearray(frame)
    for _ in range(draws.randint(1, 6)):
        mutated[draws.randrange(len(mutated))] = draws.choice([draws.randrange(256), 0x00, 0xC1, 0xDF, 0xDD, 0xFF])
    start = draws.randrange(len(mutated))
    match draws.randrange(6):
        case 0:
            del mutated[start:]
        case 1:
            del mutated[start : start + draws.randrange(9)]
        case 2:
            mutated[start:start] = mutated[start : start + draws.randrange(40)]
    return bytes(mutated)


VALUES: list[Any] = [None, True, -1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), "", "x" * 99, b"\xff", [], [[]], {}]


def reshaped(draws: random.Random, frame: bytes) -> bytes:
    """The same tree with values, keys and whole branches exchanged: valid MessagePack, seldom a valid batch."""
    tree: Any = msgspec.msgpack.decode(frame[4:])
    for _ in range(draws.randint(1, 3)):
        at = tree
        while True:
            key: Any = draws.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or draws.random() < 0.3:
                break
            at = at[key]
        match draws.randrange(4):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[draws.choice(["type", "again", "no_such", "ids"])] = at[key]
            case _:
                at[key] = copy.deepcopy(draws.choice([*VALUES, [at[key]] * 3]))
        if not tree:
            break
    body = msgspec.msgpack.encode(tree)
    return len(body).to_bytes(4, "little") + body


def check(n: int, seed: int) -> dict[str, int]:
    """So many mangled frames, cut at random on their way; how many were taken and how many refused."""
    draws, found = random.Random(seed), {"taken": 0, "refused": 0}
    frames = [(batch, m.encode(batch)) for batch in SAID]
    for _ in range(n):
        batch, frame = draws.choice(frames)
        mangled = (scrambled if draws.random() < 0.5 else reshaped)(draws, frame)
        cut = draws.randrange(len(mangled) + 1)
        try:
            stream = m.Frames()
            for body in stream.feed(mangled[:cut]) + stream.feed(mangled[cut:]):
                assert type(decode(body, batch)) is type(batch)
                found["taken"] += 1
        except ProtocolError:
            found["refused"] += 1
    return found


def test_mangled_frames_are_valid_or_refused() -> None:
    found = check(10_000, seed=0)
    assert found["taken"] > 500
    assert found["refused"] > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_mangled_frames() -> None:
    check(1_000_000, seed=1)


@pytest.mark.parametrize("batch", SAID[:4:3], ids=["to engine", "from engine"])
@pytest.mark.parametrize(
    "tail",
    [
        b"\x91" * 200_000, b"\x81" * 200_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["deep lists", "deep maps", "long list", "long map", "long text", "long bytes", "long extension"],
)  # fmt: skip
def test_what_claims_more_than_there_is(batch: Batch, tail: bytes) -> None:
    """However deep it nests or long it says it is: refused, without memory for what is not there."""
    tag = b"add" if isinstance(batch, m.EngineBatch) else b"fatal"
    start = b"\x92\x01\x91\x82\xa4type" + bytes([0xA0 + len(tag)]) + tag
    tracemalloc.start()
    try:
        for key in (b"\xa6prompt", b"\xa7no_such", b"\xaarequest_id"):
            with pytest.raises(ProtocolError):
                decode(start + key + tail, batch)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_over_the_limit_is_refused_before_it_is_kept() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        m.Frames().feed(b"\xff\xff\xff\xff")


def test_frames_survive_any_cut() -> None:
    for cut in range(len(FRAME)):
        frames = m.Frames()
        bodies = frames.feed(FRAME[:cut]) + frames.feed(FRAME[cut:] + FRAME)
        assert [m.decode_to_engine(body).messages[0] for body in bodies] == [ADD, ADD]
