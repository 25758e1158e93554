"""What crosses the socket, mangled: a typed error or a valid batch, never anything else."""

from __future__ import annotations

import contextlib
import random

import pytest

from tenon.base.errors import ProtocolError
from tenon.engine import messages as m

ADD = m.Add("r", (1, 2, 3), 8, 7, stop_ids=(2,))
FRAME = m.encode(m.EngineBatch(1, (ADD, m.Abort("r"), m.Drain())))


def test_mutated_frames_are_valid_or_refused() -> None:
    random_ = random.Random(0)
    for _ in range(20_000):
        mutated = bytearray(FRAME)
        for _ in range(random_.randint(1, 6)):
            mutated[random_.randrange(len(mutated))] = random_.randrange(256)
        if random_.random() < 0.2:
            del mutated[random_.randrange(len(mutated)) :]
        with contextlib.suppress(ProtocolError):
            for body in m.Frames().feed(bytes(mutated)):
                assert isinstance(m.decode_to_engine(body), m.EngineBatch)


def test_a_frame_over_the_limit_is_refused_before_it_is_kept() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        m.Frames().feed(b"\xff\xff\xff\xff")


def test_frames_survive_any_cut() -> None:
    for cut in range(len(FRAME)):
        frames = m.Frames()
        bodies = frames.feed(FRAME[:cut]) + frames.feed(FRAME[cut:] + FRAME)
        assert [m.decode_to_engine(body).messages[0] for body in bodies] == [ADD, ADD]
