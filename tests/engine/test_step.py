"""A step's bytes: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import ProtocolError
from tenon.engine.messages import Add
from tenon.engine.step import GroupStep, Params, Step
from tests.engine.build import Run, hash_engine, step

TREE = step(
    [
        Run(3, [1, 2, 3], [4, 5, 5], [[1], [2]], [1, 2], [-1, 0, 0], [[20, 21, 22], [36, 37, 38]]),
        Run(9, [7], [0], [[5], [6]], [0]),
    ]
)


def scheduled() -> list[Step]:
    """Steps that a scheduler made: chunks, decodes, forks with their copies."""
    made, steps = hash_engine(12, max_step_tokens=25), []
    for i in range(4):
        made.add(Add(f"r{i}", tuple(range(20 + i)), 6, i, n=1 + i))
    while (now := made.scheduler.schedule(0.0)) is not None:
        steps.append(now)
        made.scheduler.commit(now, made.executor.poll(made.executor.submit(now)))
    assert any(len(group.moves) for s in steps for group in s.groups)
    return steps


def assert_equal(a: Any, b: Any) -> None:
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), f.name
            assert (x == y).all(), f.name
        elif f.name == "groups":
            for one, other in zip(x, y, strict=True):
                assert_equal(one, other)
        elif f.name == "params":
            assert_equal(x, y)
        else:
            assert x == y, f.name


def test_packed_steps_come_back_whole() -> None:
    for made in [TREE, *scheduled()]:
        back = Step.unpack(made.pack())
        assert_equal(made, back)
        assert back.pack() == made.pack()


def test_an_unpacked_step_computes_the_same() -> None:
    ours, theirs = hash_engine(12), hash_engine(12)
    ours.add(Add("r", (1, 2, 3), 5, 0))
    while (made := ours.scheduler.schedule(0.0)) is not None:
        result = ours.executor.poll(ours.executor.submit(made))
        again = theirs.executor.poll(theirs.executor.submit(Step.unpack(made.pack())))
        assert result.ids.tolist() == again.ids.tolist()
        ours.scheduler.commit(made, result)


@settings(derandomize=True, max_examples=300, database=None, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Step.unpack(data)


@settings(derandomize=True, max_examples=600, database=None, deadline=None)
@given(st.data())
def test_damaged_steps_are_refused_or_well_typed(data: st.DataObject) -> None:
    raw = bytearray(TREE.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check_typed(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))


def check_typed(raw: bytes) -> None:
    try:
        made = Step.unpack(raw)
    except ProtocolError:
        return
    for part in (made, made.params, *made.groups):
        for f in fields(part):
            assert isinstance(getattr(part, f.name), np.ndarray) == isinstance(getattr(like(part), f.name), np.ndarray)


def like(part: Step | Params | GroupStep) -> Step | Params | GroupStep:
    return TREE if isinstance(part, Step) else TREE.params if isinstance(part, Params) else TREE.groups[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tok", 5),
        ("tok", ["<i8", [4], bytes(32)]),
        ("tok", ["<i4", [2, 2], bytes(16)]),
        ("tok", ["<i4", [5], bytes(16)]),
        ("tok", ["<i4", [-3], bytes(16)]),
        ("tok", ["<i4", [2**63], bytes(16)]),
        ("tok", ["|O", [2], bytes(16)]),
        ("groups", 3),
        ("groups", [3]),
        ("params", {}),
        ("id", "one"),
        ("id", True),
        ("model", 1),
        ("surprise", 1),
    ],
)
def test_a_field_of_another_kind_is_refused(field: str, value: Any) -> None:
    raw = msgspec.msgpack.decode(TREE.pack())
    raw[field] = value
    with pytest.raises(ProtocolError, match="not a Step"):
        Step.unpack(msgspec.msgpack.encode(raw))


def test_deep_nesting_and_a_missing_field_are_refused() -> None:
    raw = msgspec.msgpack.decode(TREE.pack())
    del raw["pos"]
    for bad in (msgspec.msgpack.encode(raw), b"\x91" * 100_000, msgspec.msgpack.encode([1, 2]), b""):
        with pytest.raises(ProtocolError):
            Step.unpack(bad)
