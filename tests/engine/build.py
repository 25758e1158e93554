"""Engines made by hand for tests: tiny checkpoints, an executor that keeps its logits, hand-made steps.

Shapes: T rows, R outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine, Identity
from tenon.engine.executors import native
from tenon.engine.executors.base import Executor
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.grammar import Masks
from tenon.engine.messages import Add, Delta
from tenon.engine.recompute import CostOf, alike
from tenon.engine.scheduler import Scheduler
from tenon.engine.sequence import Seq
from tenon.engine.speculation.build import Draft, build_speculation
from tenon.engine.step import SAMPLE, GroupStep, Params, Step
from tenon.models.checkpoint import load_decoder
from tenon.models.spec import KVGroup
from tests.models import zoo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Outputs = dict[tuple[str, int], list[int]]
LONG = 70
"""Tokens of a ``sequence``: four blocks and a part."""
SAMPLED_VOCAB = 200


class Recorder(TorchExecutor):
    """The torch executor, keeping each output's logits under its sequence and output position."""

    def logits(self, step: Step) -> Tensor:
        out_RV = super().logits(step)
        where = zip(step.out_seq.tolist(), step.out_position.tolist(), strict=True)
        self.__dict__.setdefault("rows", {}).update(zip(where, out_RV.clone(), strict=False))  # scores have none
        return out_RV


class Lab:
    """One checkpoint as an executor and as transformers' model in fp64 and in the checkpoint's own type.

    ``head_dim`` 32 runs the C attention kernel; None keeps the zoo's smaller heads, which run in torch.
    """

    def __init__(self, name: str, dtype: str, folder: Path, head_dim: int | None, numerics: str = "fast") -> None:
        self.folder = folder
        if not (folder / "config.json").exists():
            changes = zoo.CASES[name].changes | ({} if head_dim is None else {"head_dim": head_dim})
            settings = transformers.AutoConfig.for_model(zoo.CASES[name].family, **zoo.BASE | changes)
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            zoo.scale(model, seed=0)
            model.to(DTYPES[dtype]).save_pretrained(folder)
        decoder = load_decoder(folder, DTYPES[dtype])
        self.spec, self.dtype = decoder.spec, DTYPES[dtype]
        self.executor = Recorder(decoder, EngineConfig(numerics=numerics), on_phase=lambda *_: None)  # type: ignore[arg-type]
        self.models: dict[torch.dtype, Any] = {}
        self._known: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}

    def references(self, sequences: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Logits (T, V) of transformers in ``dtype`` for each sequence, as fp64; one batch for those not yet known."""
        sequences = list(sequences)
        new = sorted({s for s in sequences if (dtype, s) not in self._known})
        if new:
            if dtype not in self.models:
                self.models[dtype] = zoo.load_reference(self.folder, dtype)
            longest = max(map(len, new))
            padded = torch.tensor([(*s, *[0] * (longest - len(s))) for s in new])  # a causal row sees no padding
            with torch.inference_mode():
                logits = self.models[dtype](padded).logits.double()
            self._known.update(((dtype, s), rows[: len(s)]) for s, rows in zip(new, logits, strict=True))
        return [self._known[dtype, s] for s in sequences]

    def groups(self, block_tokens: int = 16) -> tuple[KVGroup, ...]:
        return self.spec.kv_groups("m", block_tokens, self.dtype.itemsize)

    def engine(self, n_blocks: int = 64, **config: Any) -> Engine:
        """A fresh engine over this executor; what it recorded before is forgotten."""
        self.executor.rows = {}
        settings = EngineConfig(model="m", **config)
        return engine(self.executor, self.groups(settings.block_tokens), n_blocks, self.spec.vocab_size, settings)

    def serve(self, adds: list[Add], **config: Any) -> Served:
        """Serve ``adds`` to the end by a fresh engine."""
        made = self.engine(**config)
        outputs = run(made, adds)
        rows = {}
        by_id = made.scheduler.sequence_of  # type: ignore[attr-defined]
        prompts = {add.request_id: add.prompt for add in adds}
        for (seq, position), row in self.executor.rows.items():
            request_id, index = by_id[seq]
            rows[request_id, index, position] = row
        return Served(made, outputs, prompts, rows)


def smallest_block(dtype: torch.dtype) -> int:
    """Tokens of the smallest block that the C kernels take: 2 for bf16 where the processor multiplies it in pairs."""
    return native.load().group[dtype]


Labs = Callable[..., Lab]
"""The fixture ``lab``."""


@dataclass
class Served:
    """What came of serving some requests: tokens, and each output's logits."""

    engine: Engine
    outputs: Outputs
    prompts: dict[str, tuple[int, ...]]
    rows: dict[tuple[str, int, int], Tensor]

    def errors(self, lab: Lab) -> Tensor:
        """Of each row: largest difference to the fp64 reference over the reference's largest logit."""
        found, right = self.pairs(lab, torch.float64)
        return errors(found, right)

    def pairs(self, lab: Lab, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows (n, V) of the executor, and of transformers in ``dtype``."""
        keys = list(self.rows)
        known = lab.references([(*self.prompts[r], *self.outputs[r, i]) for r, i, _ in keys], dtype)
        right = [rows[len(self.prompts[r]) - 1 + position] for rows, (r, _, position) in zip(known, keys, strict=True)]
        return torch.stack([self.rows[key].double() for key in keys]), torch.stack(right)


def errors(found_RV: Tensor, right_RV: Tensor) -> Tensor:
    """(R,) largest difference of each row over its largest logit."""
    return (found_RV.double() - right_RV).abs().amax(-1) / right_RV.abs().amax(-1)


class NamedScheduler(Scheduler):
    """Remembers which request and sibling a sequence id belongs to, after they are gone."""

    sequence_of: dict[int, tuple[str, int]]

    def add(self, add: Add) -> Any:
        accepted = super().add(add)
        self.__dict__.setdefault("sequence_of", {})
        self.sequence_of.update((s.id, (add.request_id, s.index)) for s in self.requests[add.request_id].seqs)
        return accepted


class Chunked(NamedScheduler):
    """At most ``chunk`` rows of a step are one sequence's, so that others come in while it is at its prompt."""

    chunk: int

    def _span_runs(self, seq: Seq, budget: int) -> int:
        return super()._span_runs(seq, min(budget, self.chunk))


def chunked(made: Engine, chunk: int) -> Engine:
    """The same engine, its scheduler ``Chunked``."""
    made.scheduler.__class__, made.scheduler.chunk = Chunked, chunk  # type: ignore[attr-defined]
    return made


def engine(
    executor: Executor,
    groups: tuple[KVGroup, ...],
    n_blocks: int,
    vocab_size: int,
    config: EngineConfig,
    cost_of: CostOf = alike,
    masks: Masks | None = None,
    eos_ids: tuple[int, ...] = (),
    draft: Draft | None = None,
) -> Engine:
    executor.allocate(groups, n_blocks)
    longest = min((n_blocks - 1) * config.block_tokens, 512)
    scheduler = NamedScheduler(
        config,
        groups,
        n_blocks,
        model="m",
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        max_model_len=longest,
        secret=b"k" * 32,
        cost_of=cost_of,
        masks=masks,
        speculation=build_speculation(config, {1: 1e-3}, vocab_size, draft),
    )
    return Engine(config, Identity("m", vocab_size, eos_ids, longest, 0, n_blocks, {}), scheduler, executor)


def hash_engine(
    n_blocks: int = 40,
    vocab_size: int = 1000,
    *,
    cost_of: CostOf = alike,
    masks: Masks | None = None,
    eos_ids: tuple[int, ...] = (),
    draft_seed: int = 0,
    draft_blocks: int = 40,
    **config: Any,
) -> Engine:
    """An engine without a model, with a full and a window group. A draft model, if ``speculative`` names one, has a
    full group of ``draft_blocks``; with ``draft_seed`` 0 it knows what the target says, as far as nobody edits its
    logits."""
    settings = EngineConfig(executor="hash", **config)
    size = settings.block_tokens
    groups = (KVGroup("m", (0, 1), "full", None, size, 1), KVGroup("m", (2,), "window", 8, size, 1))
    draft = None
    if settings.draft_model is not None:
        drafting, draft_groups = HashExecutor(vocab_size, seed=draft_seed), (KVGroup("d", (0,), "full", None, size, 1),)
        drafting.allocate(draft_groups, draft_blocks)
        draft = Draft(drafting, draft_groups, draft_blocks, 512, {1: 1e-5})
    return engine(HashExecutor(vocab_size), groups, n_blocks, vocab_size, settings, cost_of, masks, eos_ids, draft)


def run(made: Engine, adds: Iterable[Add] = ()) -> Outputs:
    """Serve to the end, integrity checked after every step. Returns the tokens of each (request, sibling)."""
    for add in adds:
        made.add(add)
    outputs: Outputs = {}
    while made.has_work:
        for delta in made.tick(0.0):
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        made.check_integrity()
    return outputs


def told(made: Engine, adds: Iterable[Add]) -> dict[tuple[str, int], Told]:
    """Serve to the end, integrity checked after every step. Returns all that was told of each (request, sibling)."""
    for add in adds:
        made.add(add)
    found: dict[tuple[str, int], Told] = {}
    while made.has_work:
        for delta in made.tick(0.0):
            found.setdefault((delta.request_id, delta.index), Told()).take(delta)
        made.check_integrity()
    return found


@dataclass
class Told:
    """What deltas add up to."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    reason: str | None = None
    stop_id: int | None = None

    def take(self, delta: Delta) -> None:
        self.ids += delta.ids
        self.logprobs += delta.logprobs
        self.top += delta.top
        self.reason, self.stop_id = delta.finish_reason, delta.stop_id


@dataclass
class Run:
    """A span by hand: rows of sequence ``seq`` with its block table per group.

    ``parent`` counts within the span; ``slots`` (per group) are needed where rows of a tree share a position.
    """

    seq: int
    tok: list[int]
    pos: list[int]
    tables: list[list[int]]
    out: list[int] = field(default_factory=list)
    parent: list[int] | None = None
    slots: list[list[int]] | None = None


def step(runs: list[Run], block_tokens: int = 16) -> Step:
    """The greedy step of these spans; outputs in the order of spans and their ``out``."""
    starts = np.cumsum([0, *(len(r.tok) for r in runs)]).astype(np.int32)
    groups = []
    for g in range(len(runs[0].tables)):
        slot: list[int] = []
        for r in runs:
            here = [r.tables[g][p // block_tokens] * block_tokens + p % block_tokens for p in r.pos if r.slots is None]
            slot += here if r.slots is None else r.slots[g]
        table_start = np.cumsum([0, *(len(r.tables[g]) for r in runs)]).astype(np.int32)
        table = np.array([b for r in runs for b in r.tables[g]], np.int32)
        groups.append(GroupStep(np.array(slot, np.int32), table_start, table))
    parent = [p if p < 0 else p + s for r, s in zip(runs, starts, strict=False) for p in r.parent or [-1] * len(r.tok)]
    out = [(s + row, r.seq) for r, s in zip(runs, starts, strict=False) for row in r.out]
    T, R = int(starts[-1]), len(out)
    empty_i32, empty_f32 = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Step(
        id=1,
        model="m",
        weights_version=0,
        bucket_T=T,
        bucket_S=len(runs),
        n_steps=1,
        seq=np.array([r.seq for r in runs], np.int64),
        q_start=starts,
        tok=np.array([t for r in runs for t in r.tok], np.int32),
        pos=np.array([p for r in runs for p in r.pos], np.int32),
        parent=np.array(parent, np.int32),
        groups=tuple(groups),
        out_row=np.array([row for row, _ in out], np.int32),
        out_seq=np.array([seq for _, seq in out], np.int64),
        out_position=np.arange(R, dtype=np.int32),
        want=np.full(R, SAMPLE, np.uint8),
        params_index=np.zeros(R, np.int32),
        bitmask_index=np.full(R, -1, np.int32),
        params=sampling(temperature=0.0),
        bitmask=np.zeros((0, 0), np.uint32),
        edit_start=np.zeros(R + 1, np.int32),
        edit_token=empty_i32,
        edit_kind=np.zeros(0, np.uint8),
        edit_value=empty_f32,
        score_start=np.zeros(R + 1, np.int32),
        score_token=empty_i32,
    )


def sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, sample: int = 0,
    n_logprobs: int = -1,
) -> Params:  # fmt: skip
    """A table of one row."""
    return Params(
        temperature=np.array([temperature], np.float32),
        top_k=np.array([top_k], np.int32),
        top_p=np.array([top_p], np.float32),
        min_p=np.array([min_p], np.float32),
        seed=np.array([seed], np.uint64),
        sample=np.array([sample], np.int32),
        n_logprobs=np.array([n_logprobs], np.int32),
    )


def ids(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    return tuple(int(t) for t in rng.integers(3, zoo.VOCAB, n))


def sequence(seed: int, n: int = LONG) -> list[int]:
    return np.random.default_rng(seed).integers(3, zoo.VOCAB, n).tolist()


def tables(lab: Lab, first: int, n: int = LONG) -> list[list[int]]:
    """Block tables of one sequence in every group, its blocks in falling order from ``first + 4``."""
    return [list(range(first + 4, first + 4 - -(-n // 16), -1)) for _ in lab.groups()]


def chain(lab: Lab, seq: int, tokens: list[int], start: int, end: int, out: list[int] | None = None) -> Run:
    """Positions [start, end) of sequence ``seq``; blocks from 1 + 8 x seq on. All rows' logits unless ``out``."""
    rows = list(range(end - start)) if out is None else out
    return Run(seq, tokens[start:end], list(range(start, end)), tables(lab, 1 + 8 * seq), rows)


def fresh(lab: Lab) -> None:
    lab.executor.allocate(lab.groups(), 64)


def logit_rows(n: int, spread: float = 2.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, SAMPLED_VOCAB)) * spread).astype(np.float32)


def step_of(n: int, **params: Any) -> Step:
    """A step of ``n`` outputs of as many sequences that share one row of parameters."""
    made = step([Run(s, [1], [0], [[1]], [0]) for s in range(n)])
    made.params = sampling(**params)
    return made
