"""Records of steps: a real run, fed to the simulator, gives the same steps byte for byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError, Overloaded, RequestError, ResourceError
from tenon.engine.build import build_engine
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.messages import Add, Embed
from tenon.engine.promises import Slo
from tenon.engine.record import Closing, Opening, RecordedEngine, Tick, read, replay
from tenon.models.hf_config import read_config
from tenon.models.hub import resolve
from tests.engine.build import hash_engine


def requests(n: int, vocab_size: int, seed: int = 0) -> list[Add]:
    """Prompts with shared beginnings, a few forks, sampled and greedy."""
    random = np.random.default_rng(seed)
    beginnings = [tuple(random.integers(0, vocab_size, 70).tolist()) for _ in range(4)]
    made = []
    for i in range(n):
        tail = tuple(random.integers(0, vocab_size, random.integers(1, 12)).tolist())
        prompt = beginnings[random.integers(4)][: random.integers(20, 71)] + tail
        n_samples = 2 if i % 29 == 0 else 1
        if i % 6 == 4:
            made.append(Add(f"r{i}", prompt, 0, seed=i, embed=Embed("mean" if i % 4 == 0 else "last")))
            continue
        made.append(
            Add(
                f"r{i}",
                prompt,
                int(random.integers(1, 16)),
                seed=i,
                n=n_samples,
                temperature=float(i % 3 == 0),
                presence_penalty=float(i % 5 == 0),
                prompt_logprobs=1 if i % 7 == 0 else -1,
            )
        )
    return made


def serve(engine: Engine, adds: list[Add], clock: Callable[[], float], a_tick: int = 2, abort_every: int = 13) -> None:
    """Feed ``a_tick`` requests before each tick; every so often one that runs, or sits in the queue, is given up."""
    left = list(adds)
    while left or engine.has_work:
        for add in left[:a_tick]:
            try:
                engine.add(add)
            except RequestError:
                continue  # the queue is full: that is in the record, too
            if int(add.request_id[1:]) % abort_every == 5:
                engine.abort(f"r{int(add.request_id[1:]) - 3}")
        del left[:a_tick]
        engine.tick(clock())
    engine.close()


def recorded(path: Path, n: int = 60, **more: Any) -> Path:
    """A run on the hash executor."""
    made = hash_engine(14, 200, max_sequences=6, max_waiting=8, max_step_tokens=40)
    ticks = iter(range(10**9))
    serve(RecordedEngine(made, path, **more), requests(n, 200), lambda: float(next(ticks)))
    return path


@pytest.mark.parametrize("whole_steps", [False, True])
def test_a_replay_makes_the_same_steps(tmp_path: Path, whole_steps: bool) -> None:
    path = recorded(tmp_path / "run.steps", whole_steps=whole_steps)
    found = replay(path)
    frames = list(read(path))
    assert found.difference == ""
    assert found.closed
    assert found.steps == len(frames) - 2 > 50
    assert found.preemptions > 0
    assert found.cached_tokens > 0
    assert found.aborted > 0
    ticks = [f for f in frames if isinstance(f, Tick)]
    taken = [t for f in frames if not isinstance(f, Opening) for t in f.taken]
    assert any(t.refused for t in taken)
    assert any(isinstance(t.message, Add) and t.message.embed is not None and not t.refused for t in taken)
    assert found.requests == sum(isinstance(t.message, Add) and not t.refused for t in taken)
    assert found.end_s == pytest.approx(ticks[-1].now_s + ticks[-1].seconds)


@pytest.mark.parametrize("evict", ["gdsf", "pensieve", "asymcache"])
def test_policies_that_weigh_costs_meet_the_same_costs(evict: str, tmp_path: Path) -> None:
    made = hash_engine(14, 200, evict=evict, cost_of=lambda at: 1.0 + at, max_step_tokens=40)
    ticks = iter(range(10**9))
    serve(RecordedEngine(made, tmp_path / "run"), requests(60, 200), lambda: float(next(ticks)))
    assert replay(tmp_path / "run").difference == ""


@pytest.mark.parametrize("forgets", [False, True])
def test_what_was_forgotten_is_forgotten_in_the_replay(tmp_path: Path, forgets: bool) -> None:
    engine = RecordedEngine(hash_engine(40, 200), tmp_path / "run.steps")
    for name in ("a", "b"):
        engine.add(Add(name, tuple(range(60)), 2, 0))
        while engine.has_work:
            engine.tick(0.0)
        if forgets:
            assert engine.forget_idle() > 0
    engine.close()
    found = replay(tmp_path / "run.steps")
    assert (found.difference, found.cached_tokens) == ("", 0 if forgets else 48)


def small_pool(n_blocks: int) -> EngineConfig:
    spec = read_config(resolve("embedded"))
    per_block = sum(group.block_bytes for group in spec.kv_groups("m", 16, 2))
    return EngineConfig(
        kv_bytes=n_blocks * per_block, max_sequences=16, max_waiting=2000, max_step_tokens=96, threads=1
    )


def real_run(path: Path, n: int) -> None:
    engine = build_engine(small_pool(36), lambda *_: None)
    vocab_size = engine.identity.vocab_size
    serve(RecordedEngine(engine, path), requests(n, vocab_size), SYSTEM.now_s, a_tick=3)


@pytest.mark.torch
def test_a_real_models_run_is_met_step_by_step(tmp_path: Path) -> None:
    n = 520
    real_run(tmp_path / "run.steps", n)
    found = replay(tmp_path / "run.steps")
    assert found.difference == ""
    assert found.closed
    assert found.requests == n
    assert min(found.preemptions, found.cached_tokens, found.aborted) > 0
    assert found.steps > n / 4


# -- what differs ----------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[Any], Any]) -> Path:
    """The record with each frame changed, checksums right."""
    out = b""
    for frame in read(path):
        body = msgspec.msgpack.encode(change(frame))
        length = struct.pack("<I", len(body))
        out += struct.pack("<III", len(body), zlib.crc32(length), zlib.crc32(body)) + body
    path.write_bytes(out)
    return path


def test_a_step_that_differs_is_named_with_its_fields(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", whole_steps=True)
    seen = 0

    def other_token(frame: Any) -> Any:
        nonlocal seen
        seen += isinstance(frame, Tick)
        if isinstance(frame, Tick) and seen == 9:
            ids = np.frombuffer(frame.ids, "<i4").copy()
            ids[-1] = (ids[-1] + 1) % 200
            return msgspec.structs.replace(frame, ids=ids.tobytes())
        return frame

    found = replay(rewritten(path, other_token))
    assert found.difference == "step 10 differs from the record's in tok, edit_token"
    assert not found.closed


def test_messages_that_are_missing_or_went_otherwise_are_noticed(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps")
    body = path.read_bytes()
    found = replay(rewritten(path, lambda f: msgspec.structs.replace(f, taken=()) if isinstance(f, Tick) else f))
    assert found.difference == "there is nothing to do after 0 steps, the record has"
    path.write_bytes(body)

    def refuse(frame: Any) -> Any:
        if isinstance(frame, Opening) or not frame.taken:
            return frame
        return msgspec.structs.replace(
            frame, taken=tuple(msgspec.structs.replace(t, refused=not t.refused) for t in frame.taken)
        )

    assert replay(rewritten(path, refuse)).difference == ("a message was taken that the record says was refused: Add")


def test_a_smaller_pool_makes_other_steps(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps")
    found = replay(rewritten(path, lambda f: msgspec.structs.replace(f, n_blocks=13) if isinstance(f, Opening) else f))
    assert found.difference.endswith("differs from the record's")


# -- files -----------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", n=8)
    whole = path.read_bytes()
    n_frames = len(list(read(path)))
    last = len(whole)
    for cut in range(last - 1, last - 60, -1):
        path.write_bytes(whole[:cut])
        frames = list(read(path))
        assert not any(isinstance(frame, Closing) for frame in frames)
        assert len(frames) < n_frames
        found = replay(path)
        assert (found.difference, found.closed) == ("", False)


def test_damage_is_one_sentence_that_says_where(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", n=8)
    whole = path.read_bytes()
    first = struct.unpack_from("<I", whole)[0] + 12
    for at, said in ((first + 3, f"is damaged at byte {first}: there is no frame's header"),
                     (first + 13, f"is damaged at byte {first}: the frame's checksum is wrong"),
                     (0, "is not a record of steps: there is no frame's header")):  # fmt: skip
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=said):
            replay(path)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_file_without_a_frame_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a record of steps: it holds no whole frame"):
        replay(tmp_path / "x")


def test_another_version_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", n=4)
    rewritten(path, lambda f: msgspec.structs.replace(f, version=7) if isinstance(f, Opening) else f)
    with pytest.raises(ConfigError, match=r"run.steps is a record of version 7; this reader knows 1"):
        replay(path)


def test_settings_that_do_not_exist_any_more_are_named(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", n=4)

    def older(frame: Any) -> Any:
        return (
            msgspec.structs.replace(frame, config={**frame.config, "colour": 1})
            if isinstance(frame, Opening)
            else frame
        )

    with pytest.raises(ConfigError, match=r"made with other settings than there are: .*colour"):
        replay(rewritten(path, older))


def test_a_record_opens_once_and_first(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", n=4)
    whole = path.read_bytes()
    first = struct.unpack_from("<I", whole)[0] + 12
    for content in (whole[:first] + whole, whole[first:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="must open with its opening, and only there"):
            replay(path)


def test_an_engine_that_has_served_cannot_be_recorded(tmp_path: Path) -> None:
    made = hash_engine()
    made.add(Add("r", (1, 2), 2, 0))
    with pytest.raises(ConfigError, match="has taken 1 requests already"):
        RecordedEngine(made, tmp_path / "x")
    with pytest.raises(ResourceError, match="cannot open"):
        RecordedEngine(hash_engine(), tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        replay(tmp_path / "nothing")


def test_what_was_refused_for_a_forecast_is_refused_in_the_replay(tmp_path: Path) -> None:
    """Forecasts go by measured times, of which a replay has none."""
    made = RecordedEngine(hash_engine(40, 200), tmp_path / "run.steps")
    for i, slo in enumerate((Slo(1e-9, strict=True), Slo(1e9, strict=True), Slo(1e-9), Slo(1e9, 1e-9, strict=True))):
        add = Add(f"r{i}", (1, 2, 3 + i), 4, i, slo=slo)
        if slo.strict and 1e-9 in (slo.ttft_s, slo.tpot_s):
            with pytest.raises(Overloaded, match="asks strictly for"):
                made.add(add)
        else:
            made.add(add)
        made.tick(0.0)
    while made.has_work:
        made.tick(0.0)
    made.close()
    found = replay(tmp_path / "run.steps")
    assert (found.difference, found.closed, found.requests) == ("", True, 2)


@pytest.mark.parametrize("order", ["edf", "fair"])
def test_turns_by_other_times_than_arrivals_cannot_be_recorded(order: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"order '{order}' goes by times that a record does not hold") as refused:
        RecordedEngine(hash_engine(order=order), tmp_path / "run.steps")
    assert refused.value.subject == "order"
    assert not (tmp_path / "run.steps").exists()
