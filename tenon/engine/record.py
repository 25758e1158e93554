"""A run's steps on disk, and their replay: the same messages must give the same steps, byte for byte.

    RecordedEngine     an engine that also writes down what it was told, which steps it made, what came of them
    replay             feeds that to a fresh scheduler over a simulated executor and compares each step

A file holds frames: twelve bytes (length, checksum of the length, checksum of the body; little-endian) and a msgpack
body. The first frame is the :class:`Opening`, then one :class:`Tick` a step, at last the :class:`Closing`. A process
that dies leaves a torn last frame, which the reader drops; anything else that does not add up is damage and an error.

A record holds every prompt that was served: keep it as one keeps them. It does not hold the secret that block keys are
hashed with: no step depends on it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError, RequestError, ResourceError
from tenon.cost.work import StepShape
from tenon.engine.chunks import Chunks
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine, Identity
from tenon.engine.executors.base import Caps, Executor, Ticket
from tenon.engine.executors.simulated import SimulatedExecutor
from tenon.engine.messages import Abort, Accepted, Add, Delta, Drain, Forget, LoadWeights, Reset, ToEngine
from tenon.engine.policies.chunk import Load
from tenon.engine.recompute import alike
from tenon.engine.scheduler import Scheduler
from tenon.engine.step import I32, Step, StepResult
from tenon.models.spec import KVGroup
from tenon.sim.clock import VirtualClock

VERSION: Final = 1
DIGEST_BYTES: Final = 16
_FRAME: Final = struct.Struct("<III")


class Opening(msgspec.Struct, frozen=True, tag="opening", forbid_unknown_fields=True):
    """What was served by what: all that a scheduler is made of. ``policies`` name the rules it decided by; at a run's
    start they remember nothing. ``whole_steps`` says that ticks hold steps, not their digests."""

    version: int
    config: dict[str, Any]
    model: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_len: int
    n_blocks: int
    n_groups: int
    weights_version: int
    policies: dict[str, str]
    executor: str
    device: str
    dtype: str
    whole_steps: bool
    block_costs: tuple[float, ...] = ()
    """Of the blocks in position order, as policies weigh them; empty where all cost the same."""
    generates: bool = True


class Taken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message, and whether it was refused (which changes nothing)."""

    message: ToEngine
    refused: bool = False


class Tick(msgspec.Struct, frozen=True, tag="tick", forbid_unknown_fields=True):
    """One step. ``taken`` came before it; ``seconds`` is what the executor took; ``ids`` are little-endian int32."""

    taken: tuple[Taken, ...]
    now_s: float
    step: bytes
    seconds: float
    ids: bytes
    errors: dict[int, str]
    chunk: int = 0
    """Rows of prompts that the chunk policy chose, which goes by measured times; 0 where it was not asked."""


class Closing(msgspec.Struct, frozen=True, tag="closing", forbid_unknown_fields=True):
    """The run ended in order: ``taken`` came after its last step."""

    taken: tuple[Taken, ...]
    steps: int


class _Versioned(msgspec.Struct, frozen=True):
    """An opening of whatever version. What has none is no opening, which is seen next."""

    version: int = VERSION


Frame = Opening | Tick | Closing
_encoder = msgspec.msgpack.Encoder()
_versioned = msgspec.msgpack.Decoder(_Versioned)
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def digest(step: bytes) -> bytes:
    """What stands for a step where its bytes would be too many."""
    return blake2b(step, digest_size=DIGEST_BYTES).digest()


# -- writing ---------------------------------------------------------------------------------------------------


class _Tap:
    """An executor that remembers the last step and what came of it."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.step: Step | None = None
        self.result: StepResult | None = None

    @property
    def caps(self) -> Caps:
        return self.executor.caps

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self.executor.allocate(groups, n_blocks)

    def submit(self, step: Step) -> Ticket:
        self.step = step
        return self.executor.submit(step)

    def poll(self, ticket: Ticket) -> StepResult:
        self.result = self.executor.poll(ticket)
        return self.result

    def load_weights(self, path: str, version: int) -> None:
        self.executor.load_weights(path, version)

    def close(self) -> None:
        self.executor.close()


class RecordedEngine(Engine):
    """``engine``, whose run is written to ``path``; use this one in its stead, from the first request on.

    ``whole_steps`` keeps every step's bytes, so that a difference can be named; else 16 bytes of digest do. Raises
    ``ConfigError`` for an engine that has served before and ``ResourceError`` when the file cannot be written.
    """

    def __init__(self, engine: Engine, path: Path, *, whole_steps: bool = False, clock: Clock = SYSTEM) -> None:
        self._tap = _Tap(engine.executor)
        super().__init__(engine.config, engine.identity, engine.scheduler, self._tap, clock)
        scheduler, caps = engine.scheduler, engine.executor.caps
        if scheduler.counters.started:
            raise ConfigError(
                f"a record begins with the engine; this one has taken {scheduler.counters.started} requests already"
            )
        if engine.config.order != "fifo":
            said = f"order {engine.config.order!r} goes by times that a record does not hold; record with 'fifo'"
            raise ConfigError(said, subject="order")
        self._path, self._whole = path, whole_steps
        self._taken: list[Taken] = []
        self._n_steps = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise ResourceError(f"cannot open {path}: {error.strerror or error}", subject=str(path)) from error
        self._write(
            Opening(
                version=VERSION,
                config=asdict(engine.config),
                model=scheduler.model,
                vocab_size=scheduler.vocab_size,
                eos_ids=tuple(sorted(scheduler.eos_ids)),
                max_model_len=scheduler.max_model_len,
                n_blocks=scheduler.pools[0].n_blocks,
                n_groups=len(scheduler.pools),
                weights_version=scheduler.weights_version,
                policies={"evict": engine.config.evict, "chunk": engine.config.chunk},
                executor=caps.name,
                device=caps.device,
                dtype=caps.dtype,
                whole_steps=whole_steps,
                generates=engine.identity.generates,
                block_costs=tuple(
                    map(scheduler.cost_of, range(0, scheduler.max_model_len, engine.config.block_tokens))
                ),
            )
        )

    def add(self, add: Add) -> Accepted:
        try:
            accepted = super().add(add)
        except RequestError:
            self._taken.append(Taken(add, refused=True))
            raise
        self._taken.append(Taken(add))
        return accepted

    def abort(self, request_id: str, index: int = -1, *, reason: str = "abort") -> bool:
        self._taken.append(Taken(Abort(request_id, index)))
        return super().abort(request_id, index, reason=reason)

    def load_weights(self, path: str, version: int) -> None:
        super().load_weights(path, version)
        self._taken.append(Taken(LoadWeights(path, version)))

    def drain(self) -> None:
        self._taken.append(Taken(Drain()))
        super().drain()

    def reset(self) -> list[str]:
        self._taken.append(Taken(Reset()))
        return super().reset()

    def forget_idle(self) -> int:
        self._taken.append(Taken(Forget()))
        return super().forget_idle()

    def tick(self, now_s: float) -> list[Delta]:
        self._tap.step = self._tap.result = None
        deltas = super().tick(now_s)
        step, result = self._tap.step, self._tap.result
        if step is not None and result is not None:
            packed = step.pack()
            seconds = max(0.0, result.end_s - result.start_s)
            ids = np.ascontiguousarray(result.ids, "<i4").tobytes()
            said = packed if self._whole else digest(packed)
            chosen = self.scheduler.chunks.chosen
            self._write(Tick(tuple(self._taken), now_s, said, seconds, ids, result.errors, chosen))
            self._taken.clear()
            self._n_steps += 1
        return deltas

    def close(self) -> None:
        """End the record, then the engine."""
        try:
            self._write(Closing(tuple(self._taken), self._n_steps))
        finally:
            self._file.close()
            super().close()

    def _write(self, frame: Frame) -> None:
        body = _encoder.encode(frame)
        length = len(body).to_bytes(4, "little")
        try:
            self._file.write(_FRAME.pack(len(body), zlib.crc32(length), zlib.crc32(body)) + body)
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"cannot write {self._path}: {error.strerror or error}", subject=str(self._path)
            ) from error


# -- reading ---------------------------------------------------------------------------------------------------


def read(path: Path) -> Iterator[Frame]:
    """The whole frames of a record, an ``Opening`` first. A torn last one is dropped.

    Raises ``ConfigError`` for a file that is no record, is of another version, or is damaged, and says where.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    with file:
        first = True
        while (body := _next(file, path, first)) is not None:
            yield _decode(body, path, first)
            first = False
        if first:
            raise ConfigError(f"{path} is not a record of steps: it holds no whole frame", subject=str(path))


def _next(file: BinaryIO, path: Path, first: bool) -> bytes | None:
    at = file.tell()
    header = file.read(_FRAME.size)
    if len(header) < _FRAME.size:
        return None
    length, length_sum, body_sum = _FRAME.unpack(header)
    if zlib.crc32(header[:4]) != length_sum:
        what = "is not a record of steps" if first else f"is damaged at byte {at}"
        raise ConfigError(f"{path} {what}: there is no frame's header", subject=str(path))
    body = file.read(length)
    if len(body) < length:
        return None
    if zlib.crc32(body) != body_sum:
        raise ConfigError(f"{path} is damaged at byte {at}: the frame's checksum is wrong", subject=str(path))
    return body


def _decode(body: bytes, path: Path, first: bool) -> Frame:
    try:
        if first:
            version = _versioned.decode(body).version
            if version != VERSION:
                raise ConfigError(
                    f"{path} is a record of version {version}; this reader knows {VERSION}", subject=str(path)
                )
        frame = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} holds a frame that is none of a record: {error}", subject=str(path)) from error
    if isinstance(frame, Opening) is not first:
        raise ConfigError(f"{path} must open with its opening, and only there", subject=str(path))
    return frame


# -- replaying -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """What came of a replay. ``difference`` is one sentence about the first step that is not the record's, or empty.

    ``closed`` is false for the record of a run that did not end in order: it was equal as far as it goes.
    """

    steps: int
    requests: int
    preemptions: int
    cached_tokens: int
    aborted: int
    end_s: float
    closed: bool
    difference: str = ""


class _Different(Exception):
    """The run and its record part here."""


class _Recorded:
    """The oracle, the cost and the chunk policy of a replay: the record's present tick. Compares steps before it
    answers."""

    model = None

    def __init__(self, whole_steps: bool) -> None:
        self._whole = whole_steps
        self._seconds = 0.0
        self.tick: Tick | None = None
        """What comes next; None once it was asked for."""

    def seconds(self, _: StepShape) -> float:
        return self._seconds

    def choose(self, _: Load) -> int:
        if self.tick is None or not self.tick.chunk:
            raise _Different("a chunk has to be chosen where none is in the record")
        return self.tick.chunk

    def answer(self, step: Step) -> tuple[I32, dict[int, str]]:
        tick, self.tick = self.tick, None
        if tick is None:
            raise _Different(f"step {step.id} is not in the record")
        packed = step.pack()
        if (packed if self._whole else digest(packed)) != tick.step:
            where = f" in {_differing(packed, tick.step)}" if self._whole else ""
            raise _Different(f"step {step.id} differs from the record's{where}")
        self._seconds = tick.seconds
        return np.frombuffer(tick.ids, "<i4").astype(np.int32), tick.errors


def _differing(ours: bytes, theirs: bytes) -> str:
    """Names of the fields in which two packed steps are not equal."""
    a, b = msgspec.msgpack.decode(ours), msgspec.msgpack.decode(theirs)
    return ", ".join(name for name in a if a[name] != b.get(name))


def replay(path: Path) -> Replayed:
    """Serve a record's messages again, by a fresh scheduler over a simulated executor, and compare every step.

    Raises ``ConfigError`` where the record cannot be read (see :func:`read`).
    """
    frames = read(path)
    opening = next(frames)
    if not isinstance(opening, Opening):
        raise ConfigError(f"{path} must open with its opening", subject=str(path))
    engine, clock, recorded = _fresh(opening, path)
    n_requests, closed, difference = 0, False, ""
    try:
        for frame in frames:
            if isinstance(frame, Opening):
                raise ConfigError(f"{path} opens twice", subject=str(path))
            n_requests += sum(isinstance(taken.message, Add) and not taken.refused for taken in frame.taken)
            for taken in frame.taken:
                _tell(engine, taken)
            if isinstance(frame, Closing):
                closed = True
                continue
            if frame.now_s > clock.now_s():
                clock.advance_to(frame.now_s)
            recorded.tick = frame
            engine.tick(frame.now_s)
            if recorded.tick is not None:
                raise _Different(
                    f"there is nothing to do after {engine.scheduler.counters.steps} steps, the record has"
                )
    except _Different as found:
        difference = str(found)
    counters = engine.scheduler.counters
    return Replayed(
        steps=counters.steps,
        requests=n_requests,
        preemptions=counters.preemptions,
        cached_tokens=counters.cached_tokens,
        aborted=counters.finished.get("abort", 0),
        end_s=clock.now_s(),
        closed=closed,
        difference=difference,
    )


def _fresh(opening: Opening, path: Path) -> tuple[Engine, VirtualClock, _Recorded]:
    try:
        config = EngineConfig(**opening.config)
    except TypeError as error:
        raise ConfigError(f"{path} was made with other settings than there are: {error}", subject=str(path)) from error
    clock, recorded = VirtualClock(), _Recorded(opening.whole_steps)
    executor = SimulatedExecutor(recorded.seconds, recorded, clock, device=opening.device, dtype=opening.dtype)
    group = KVGroup(opening.model, (), "full", None, config.block_tokens, 0)
    groups = (group,) * opening.n_groups
    executor.allocate(groups, opening.n_blocks)
    scheduler = Scheduler(
        config,
        groups,
        opening.n_blocks,
        model=opening.model,
        vocab_size=opening.vocab_size,
        eos_ids=opening.eos_ids,
        max_model_len=opening.max_model_len,
        secret=bytes(32),
        chunks=Chunks(config, groups, policy=recorded),
        cost_of=(lambda position: opening.block_costs[position // config.block_tokens])
        if opening.block_costs
        else alike,
    )
    scheduler.weights_version = opening.weights_version
    length, vocabulary = opening.max_model_len, opening.vocab_size
    identity = Identity(opening.model, vocabulary, opening.eos_ids, length, 0, opening.n_blocks, {}, opening.generates)
    return Engine(config, identity, scheduler, executor, clock), clock, recorded


def _as_then(add: Add, *, refused: bool) -> Add:
    """A forecast goes by measured times, which a record does not hold. So what was taken asks for nothing strictly, and
    what was refused, perhaps for a forecast, is put as what nobody takes."""
    if add.slo is None or not add.slo.strict:
        return add
    if refused:
        return msgspec.structs.replace(add, max_tokens=0)
    return msgspec.structs.replace(add, slo=msgspec.structs.replace(add.slo, strict=False))


def _tell(engine: Engine, taken: Taken) -> None:
    """Hand over one message; its refusal must be the record's."""
    refused = False
    match taken.message:
        case Add():
            try:
                engine.add(_as_then(taken.message, refused=taken.refused))
            except RequestError:
                refused = True
        case Abort():
            engine.abort(taken.message.request_id, taken.message.index)
        case Reset():
            engine.reset()
        case Forget():
            engine.forget_idle()
        case Drain():
            engine.drain()
        case LoadWeights():
            engine.load_weights(taken.message.path, taken.message.version)
    if refused is not taken.refused:
        said, meant = ("refused", "taken") if refused else ("taken", "refused")
        raise _Different(f"a message was {said} that the record says was {meant}: {type(taken.message).__name__}")
