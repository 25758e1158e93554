"""``Step``: one pass of a model over rows of many sequences, as plain arrays without object references.

What the scheduler decides and what an executor, a compiled kernel, a recorder or a simulator reads are these
bytes (``Step.pack`` / ``Step.unpack``). Rules an executor keeps:

- ``slot`` says where a row's K and V go, ``pos`` what the rotation sees. Per layer, moves come first, then all K and
  V of the step are written, then rows attend.
- A chain row (``parent`` -1) at position p sees its sequence's positions <= p through the block table. A tree
  row sees the positions up to its tree's root (the ancestor with parent -1), its ancestors and itself. A group's
  window applies to both.
- Outputs that are only scored come after all others, and after them those whose hidden states alone are wanted.
- Of rows in one span that follow one another and are all sampled from, one after the other is a guess of what the one
  before gives: see :func:`guesses`. Where the guess is wrong, nothing need be sampled.
- Moves are made all at once, and once for a step's ``id``: a step that is computed again, or in parts, has made them.
- Padding rows write to the null block 0.

Lengths: T rows, S spans, R outputs, P rows of the parameter table, B bit masks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from tenon.base.errors import ProtocolError

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SAMPLE: Final = 1
SCORE: Final = 2
HIDDEN: Final = 4
DRAFT: Final = 8
"""What is wanted of an output: a token; log-probabilities of given ones; the hidden state; the ``n_logprobs`` best
tokens by what sampling goes by, the noise included. A step with the last has no other outputs."""

EDIT_ADD: Final = 0
EDIT_BAN: Final = 1
EDIT_REPEAT: Final = 2
"""Edits of one logit: add a value, forbid the token, or the multiplicative repetition penalty. An output's edits apply
in their order; of those of one kind that stand together, only values that are added may be of the same token."""


_Part = TypeVar("_Part", "GroupStep", "Params", "Step")


def _i32(*shape: int) -> I32:
    return np.zeros(shape, np.int32)


NO_I32, NO_I64, NO_F32 = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)


@dataclass
class GroupStep:
    """One KV group's part: where rows are written and which blocks each span reads."""

    slot: I32
    """(T,) block * block_tokens + offset."""
    table_start: I32
    """(S+1,) CSR over spans into ``table``."""
    table: I32
    """Block of each position block of the span's sequence, from position 0."""
    moves: I32 = field(default_factory=lambda: _i32(0, 2))
    """(n, 2) slots: copy K and V from the first to the second before anything is written."""
    transfers: I64 = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """(n, 3) block, tier, ticket."""


@dataclass
class Params:
    """Side table of sampling parameters; one row per sequence that samples in this step."""

    temperature: F32
    top_k: I32
    """0: off."""
    top_p: F32
    min_p: F32
    seed: U64
    sample: I32
    """Index of the sequence among its request's ``n``."""
    n_logprobs: I32
    """-1: none wanted; 0: the chosen token's; k: also the k best."""

    @cached_property
    def unfiltered(self) -> NDArray[np.bool_]:
        """Rows under which any token may be sampled. Steps in a row share the table, so that it is looked at once."""
        return np.asarray((self.temperature == 0) | ((self.top_k == 0) & (self.top_p >= 1) & (self.min_p == 0)))

    @cached_property
    def most_logprobs(self) -> int:
        """The largest of ``n_logprobs``."""
        return int(self.n_logprobs.max(initial=-1))


@dataclass
class Step:
    """See the module's docstring. ``bucket_T`` and ``bucket_S`` are the sizes that a backend may pad to."""

    id: int
    model: str
    weights_version: int
    bucket_T: int
    bucket_S: int
    n_steps: int
    seq: I64
    """(S,) sequence of each span."""
    q_start: I32
    """(S+1,) CSR over spans into the rows."""
    tok: I32
    """(T,) token ids; -1: what the previous step sampled for this sequence."""
    pos: I32
    parent: I32
    """(T,) row of the parent in a tree; -1: the row continues its sequence's context."""
    groups: tuple[GroupStep, ...]
    out_row: I32
    """(R,) row whose logits are wanted; several outputs may share one (forks)."""
    out_seq: I64
    out_position: I32
    """(R,) index of the token among the sequence's outputs, negative for the prompt's: part of the noise's key."""
    want: U8
    """(R,) SAMPLE | SCORE | HIDDEN, or DRAFT."""
    params_index: I32
    bitmask_index: I32
    """(R,) row of ``bitmask``; -1: all tokens are allowed."""
    params: Params
    bitmask: U32
    """(B, ceil(V/32)) little-endian bits; 1: allowed."""
    edit_start: I32
    """(R+1,) CSR over outputs into the edits."""
    edit_token: I32
    edit_kind: U8
    edit_value: F32
    score_start: I32
    """(R+1,) CSR over outputs into ``score_token``: tokens whose log-probabilities are wanted."""
    score_token: I32

    @property
    def n_rows(self) -> int:
        return len(self.tok)

    @property
    def n_outputs(self) -> int:
        return len(self.out_row)

    @property
    def has_moves(self) -> bool:
        return any(len(group.moves) for group in self.groups)

    def without_moves(self) -> Step:
        """The same step once its moves have been made."""
        return replace(self, groups=tuple(replace(group, moves=group.moves[:0]) for group in self.groups))

    def pack(self) -> bytes:
        """The step as bytes: equal steps give equal bytes."""
        return msgspec.msgpack.encode(_to_plain(self))

    @staticmethod
    def unpack(data: bytes) -> Step:
        """The inverse of :meth:`pack`. Raises ``ProtocolError`` for anything else."""
        try:
            raw = msgspec.msgpack.decode(data)
            raw["groups"] = tuple(_from_plain(GroupStep, g) for g in raw["groups"])
            raw["params"] = _from_plain(Params, raw["params"])
            return _from_plain(Step, raw)
        except _MALFORMED as error:
            raise ProtocolError(f"these {len(data)} bytes are not a Step: {error}") from error


def guesses(step: Step) -> I32:
    """Of each output that is sampled, the output whose sample its row's token is a guess of, or -1: that of its parent
    in the tree, or of the row before it in its span. Empty where no step has any."""
    n = int(np.count_nonzero(step.want & SAMPLE))
    if n < 2 or step.n_rows == len(step.seq):
        return NO_I32  # a span that is sampled from twice has two rows
    row = step.out_row[:n]
    before = np.where(step.parent >= 0, step.parent, np.arange(-1, step.n_rows - 1, dtype=np.int32))
    before[step.q_start[:-1]] = -1
    if n == step.n_rows and np.array_equal(row, np.arange(n)):
        return before
    output_of = np.full(step.n_rows + 1, -1, np.int32)
    output_of[row] = np.arange(n)
    found = output_of[before[row]]
    return found if (found >= 0).any() else NO_I32


_MALFORMED: Final = (
    msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        contiguous = np.ascontiguousarray(value)
        return [contiguous.dtype.str, list(contiguous.shape), contiguous.tobytes()]
    if isinstance(value, tuple):
        return [_to_plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _to_plain(getattr(value, f.name)) for f in fields(value)}
    return value


_DTYPES: Final[dict[str, type[np.generic]]] = {
    "I32": np.int32, "I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U8": np.uint8, "F32": np.float32,
}  # fmt: skip
_MATRICES: Final = frozenset({"moves", "transfers", "bitmask"})


def _from_plain(kind: type[_Part], raw: dict[str, Any]) -> _Part:
    """``kind`` from what ``_to_plain`` made of it; each field's type and number of axes as declared."""
    values: dict[str, Any] = {}
    for f in fields(kind):
        value = raw.pop(f.name)
        if f.type in _DTYPES:
            name, shape, content = value
            axes = 2 if f.name in _MATRICES else 1
            if name != np.dtype(_DTYPES[f.type]).str or len(shape) != axes or min(shape) < 0:
                raise ValueError(f"{f.name} must be {f.type}, is {name} of shape {shape}")
            value = np.frombuffer(content, dtype=name).reshape(shape)
        elif f.type in ("int", "str") and type(value).__name__ != f.type:
            raise TypeError(f"{f.name} must be {f.type}, is {type(value).__name__}")
        values[f.name] = value
    if raw:
        raise ValueError(f"unknown fields {sorted(raw)}")
    return kind(**values)


@dataclass
class StepResult:
    """What came of a step. Arrays are parallel to the step's outputs.

    ``start_s`` and ``end_s`` are the executor's clock; ``errors`` maps a sequence to what went wrong with it alone.
    """

    ids: I32
    """(R,) sampled ids; -1 where none was wanted."""
    logprobs: F32
    """(R,) log-probability of the sampled id under the unprocessed logits; NaN where not wanted."""
    top_ids: I32
    """(R, k) best ids, k the largest number asked for; -1 pads. Where DRAFT is wanted, by logit / temperature + noise,
    or at temperature 0 by log-probability: ``top_logprobs`` are these numbers."""
    top_logprobs: F32
    scores: F32
    """Log-probabilities of ``score_token``."""
    ranks: I32
    """Of ``score_token``: 1 where no token is likelier; 0 where not known."""
    hidden: F32
    """(number of HIDDEN outputs, M)."""
    transfers_done: I64
    start_s: float
    end_s: float
    errors: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def nothing(step: Step, k: int, n_hidden: int = 0, width: int = 0) -> StepResult:
        """Of a step of which nothing is known yet: ``k`` best ids, ``n_hidden`` rows of hidden states."""
        R, n_scored = step.n_outputs, len(step.score_token)
        return StepResult(
            ids=np.full(R, -1, np.int32),
            logprobs=np.full(R, np.nan, np.float32),
            top_ids=np.full((R, k), -1, np.int32) if k else np.empty((R, 0), np.int32),
            top_logprobs=np.full((R, k), np.nan, np.float32) if k else np.empty((R, 0), np.float32),
            scores=np.full(n_scored, np.nan, np.float32) if n_scored else NO_F32,
            ranks=np.zeros(n_scored, np.int32) if n_scored else NO_I32,
            hidden=np.full((n_hidden, width), np.nan, np.float32),
            transfers_done=NO_I64,
            start_s=0.0,
            end_s=0.0,
        )
