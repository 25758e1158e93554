"""What the HTTP process and the engine process say to each other, in one batch per step.

Typed msgspec structs over a local stream socket, length-prefixed; nothing is ever unpickled. The engine sees
ids only: text, templates and stop strings stay with the HTTP process. Every batch carries the engine's epoch, so
that words of an engine that has died are recognised and dropped.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from tenon.base.errors import ProtocolError
from tenon.engine.promises import Forecast, Ledger, Slo

MAX_FRAME_BYTES: Final = 64 * 2**20
_HEADER = struct.Struct("<I")


class Grammar(msgspec.Struct, frozen=True):
    """What the form of an output must be (:mod:`tenon.engine.grammar`)."""

    name: str
    """Of what is compiled: equal names, equal grammars."""
    compiled: str
    think: tuple[int, int] | None = None
    """Tokens that begin and end what a model thinks before it answers: between them anything may come."""
    thinking: bool = False
    """Whether the prompt has begun such a thought."""


class Embed(msgspec.Struct, frozen=True):
    """What of a prompt's last hidden states is wanted: the "last" token's or their "mean", its first ``dimensions``
    (0: all), of length one where it is to ``normalize``."""

    pooling: str
    normalize: bool = True
    dimensions: int = 0


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Serve this request. ``seed`` is always set: the HTTP process draws one where the caller did not.

    ``arrival_s`` is the sender's monotonic clock (one machine, one clock). A request that an engine was at when it died
    is sent to the next one with ``again``, for which no queue is too long, and each of its sequences that had begun as
    one of its own: ``index`` is its number among its siblings, ``outputs`` the tokens that were sent on already. Noise
    depends on both, so it goes on as if nothing had happened.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Each as its tokens, in every spelling that the tokenizer has for it."""
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    n_logprobs: int = -1
    prompt_logprobs: int = -1
    """-1: the prompt's tokens are not scored; 0: their log-probabilities; k: also the k best of each position."""
    tenant: str = ""
    slo_class: str = ""
    slo: Slo | None = None
    arrival_s: float = 0.0
    index: int = 0
    outputs: tuple[int, ...] = ()
    again: bool = False
    speculate: int = -1
    """How many tokens may be guessed ahead; 0: none, -1: as many as the engine does."""
    embed: Embed | None = None
    """Generate nothing (``max_tokens`` is 0): an ``Embedded`` comes of the prompt, and the request is over."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget this request at once, or only its sequence ``index``. Unknown ids are no error: endings race with it."""

    request_id: str
    index: int = -1


class Estimate(msgspec.Struct, frozen=True, tag="estimate"):
    """Say what might be expected of this request, and do not serve it: an ``Estimated`` comes."""

    add: Add


class LoadWeights(msgspec.Struct, frozen=True, tag="load_weights"):
    path: str
    version: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take no more requests, finish those in flight, then end."""


class Reset(msgspec.Struct, frozen=True, tag="reset"):
    """Abort everything and forget the prefix cache."""


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Forget what is cached and held by no request; nobody is aborted."""


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """A request with a grammar is about to come: start what masks are made by, which takes a moment."""


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """What to send from now on besides all else. ``kv``: ``KVEvents``, beginning with what is resident, also if they
    were sent already. ``residency``: at most one ``Residency`` a second. ``victims``: have evictions written down, so
    that ``Miss.score`` is known. ``trees``: ``Trees``, beginning with the newest, also if they were sent already."""

    kv: bool = False
    residency: bool = False
    victims: bool = False
    trees: bool = False


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """Where start-up stands; ``fraction`` in 0..1 of this phase."""

    name: str
    fraction: float
    detail: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine takes requests from now on."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    n_blocks: int
    block_tokens: int
    kv_bytes: int
    description: dict[str, str] = {}
    token_s: float = 0.0
    """What a sequence that decodes alone takes for a token, as measured at the start; 0 where it was not."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """``forecast``: of a request that is promised something."""

    request_id: str
    cached_tokens: int = 0
    forecast: Forecast | None = None


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The request was not taken, or failed alone: ``status`` is the HTTP status that fits."""

    request_id: str
    message: str
    status: int = 400
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None


class Estimated(msgspec.Struct, frozen=True, tag="estimated"):
    """What an ``Estimate`` asked for, or why it would be refused; sequences that ran and waited then."""

    request_id: str
    forecast: Forecast | None = None
    refused: Rejected | None = None
    running: int = 0
    waiting: int = 0


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one sequence. ``finish_reason``: "stop", "length", "abort", "error"; set exactly once."""

    request_id: str
    index: int
    ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_id: int | None = None
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached_tokens: int = 0
    error: str | None = None


class PromptScores(msgspec.Struct, frozen=True, tag="prompt_scores"):
    """Log-probabilities of a prompt's tokens from position ``start`` on; batches come in order, before any output.

    ``top``: of each of those positions, the best (id, log-probability), best first. ``ranks``: 1 + the number of tokens
    likelier than the prompt's own.
    """

    request_id: str
    start: int
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    ranks: tuple[int, ...] = ()


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """All that comes of a request that has ``embed``. ``vector``: float32, little-endian."""

    request_id: str
    vector: bytes


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    step: int
    deltas: tuple[Delta, ...]


class Miss(msgspec.Struct, frozen=True):
    """A run of positions [start, end) of a prompt, whole blocks, that a request did not find in the cache.

    ``kind``: "new" (never seen, or nobody remembers), "evicted", "skipped" (resident, but beyond the first miss where
    only the leading blocks are reused). ``cost`` of computing it, in FLOPs unless the engine counts another unit.
    """

    start: int
    end: int
    kind: str
    cost: float
    differs_at: int | None = None
    """Of a new run: position of its first token that is not that of a resident context with the same beginning."""
    evicted_s: float | None = None
    until_s: float | None = None
    """Of an evicted run: when its first and its last block were evicted, by the engine's clock."""
    policy: str | None = None
    score: float | None = None
    """The least of its blocks had when they were evicted, in the policy's own unit; known only if it was watched."""


class Misses(msgspec.Struct, frozen=True, tag="misses"):
    """What the cache had for a request when it came in. ``holes``: runs to compute before the last that was resident.
    ``n_runs`` were missing; ``runs`` are the costliest of them, in order."""

    request_id: str
    cached_tokens: int
    holes: int
    n_runs: int
    runs: tuple[Miss, ...]


class Guesses(msgspec.Struct, frozen=True):
    """What was guessed ahead and what came of it; counters only ever grow. By depth, the next token first: ``reached``
    are trees with a guess there below what came true, ``accepted_at`` those of which one came true there."""

    trees: int
    nodes: int
    accepted: int
    expected: float
    """Accepted tokens as they were predicted."""
    reached: tuple[int, ...]
    accepted_at: tuple[int, ...]


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """State as it is now, read when sent; counters only ever grow within an epoch."""

    now_s: float
    steps: int
    running: int
    waiting: int
    blocks_total: int
    blocks_held: int
    blocks_cached: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    started: int
    finished: dict[str, int]
    step_s: float
    """Duration of the last step."""
    bookkeeping_s: float
    """Of the last step: scheduling and commit, without the executor."""
    lookup_blocks: int = 0
    """Blocks of prompts that were looked up in the cache; of them, ``hit_blocks`` were found."""
    hit_blocks: int = 0
    holes: int = 0
    prompt_flops: float = 0.0
    """Of all prompts as if nothing had been cached; of them, ``saved_flops`` were not needed."""
    saved_flops: float = 0.0
    missed_tokens: dict[str, int] = {}
    """Looked up in vain, by ``Miss.kind``."""
    evictions: int = 0
    kv_events_dropped: int = 0
    guesses: Guesses | None = None
    """None where nobody guesses."""


class KVEvent(msgspec.Struct, frozen=True, array_like=True):
    """A block of one group came or went, or a group's blocks all went. ``kind`` and ``reason`` as in ``kv_log.Logged``;
    ``digest`` and ``parent`` are hex."""

    kind: str
    group: int
    digest: str = ""
    position: int = 0
    parent: str = ""
    reason: str = ""


class KVEvents(msgspec.Struct, frozen=True, tag="kv_events"):
    """What came and went since the last batch, in order; to be replayed one after another, and again at will.
    ``dropped``: events lost since the engine's start; where it grows, the batch tells anew what is resident."""

    events: tuple[KVEvent, ...]
    dropped: int = 0


class Row(msgspec.Struct, frozen=True):
    """A running sequence's context in order of position, in at most 128 ``cells``, one letter each: "r" reused, "c"
    computed, "t" to compute, "h" to compute before what is resident (a hole). A cell of several blocks shows the last
    of these that is among them."""

    request_id: str
    index: int
    n_tokens: int
    cells: str


class Residency(msgspec.Struct, frozen=True, tag="residency"):
    """What is where in the cache: the first 64 of ``running`` sequences, and the blocks of all groups together.

    ``idle_by_age``: blocks held by nobody, by the time since their last use, below each of ``ages_s`` and above the
    last. ``idle_by_turn``: the same by their conversation's turn, at most each of ``turns`` and above the last.
    """

    now_s: float
    running: int
    rows: tuple[Row, ...]
    free: int
    held: int
    ages_s: tuple[float, ...]
    idle_by_age: tuple[int, ...]
    turns: tuple[int, ...]
    idle_by_turn: tuple[int, ...]


class Verified(msgspec.Struct, frozen=True):
    """A tree of guesses below a sequence's newest token, ``root``, and what came of it: nodes, parents first."""

    request_id: str
    index: int
    tenant: str
    n_tokens: int
    """Of the sequence before, its root among them."""
    root: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """Nodes, or -1 for the root."""
    probabilities: tuple[float, ...]
    """How likely each was thought, with all that is above it."""
    path: tuple[int, ...]
    """The nodes that came true, from the root down."""
    next: int
    """The token that came after them."""


class Trees(msgspec.Struct, frozen=True, tag="trees"):
    """Trees that were verified since the last batch, in order: the newest of them, and how many others there were."""

    trees: tuple[Verified, ...]
    dropped: int = 0


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on; the last thing it says. ``message`` is one sentence for a person."""

    message: str
    trace: str = ""


ToEngine = Add | Abort | Estimate | LoadWeights | Drain | Reset | Forget | Expect | Watch
FromEngine = (
    Phase
    | Ready
    | Accepted
    | Rejected
    | Estimated
    | Misses
    | PromptScores
    | Embedded
    | Outputs
    | Ledger
    | Stats
    | KVEvents
    | Residency
    | Trees
    | Fatal
)


class EngineBatch(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    messages: tuple[ToEngine, ...]


class ServerBatch(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    messages: tuple[FromEngine, ...]


_to_engine = msgspec.msgpack.Decoder(EngineBatch)
_from_engine = msgspec.msgpack.Decoder(ServerBatch)
_encoder = msgspec.msgpack.Encoder()


def encode(batch: EngineBatch | ServerBatch) -> bytes:
    """One frame: four bytes of length, little-endian, and the body."""
    body = _encoder.encode(batch)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a batch of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


class Frames:
    """Cuts a byte stream into frames; keeps what is incomplete for the next ``feed``."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies completed by ``data``. Raises ``ProtocolError`` for a frame over the limit."""
        self._buffer += data
        bodies: list[bytes] = []
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[_HEADER.size : end]))
            del self._buffer[:end]
        return bodies


def decode_to_engine(body: bytes) -> EngineBatch:
    """Raises ``ProtocolError`` where the bytes are no such batch."""
    try:
        return _to_engine.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a batch for the engine: {error}") from error


def decode_from_engine(body: bytes) -> ServerBatch:
    """Raises ``ProtocolError`` where the bytes are no such batch."""
    try:
        return _from_engine.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a batch from the engine: {error}") from error
