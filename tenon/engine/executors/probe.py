"""Measures this machine for the cost model: its limits, real steps of the real executor, the engine's own time.

``python -m tenon.engine.executors.probe OPTIONS_JSON`` prints one JSON object a line: ``{"phase": ...}`` as it goes and
``{"measured": ...}`` (:class:`tenon.cost.calibration.Measured`) at the end. It needs torch, so the command line runs it
in a process of its own.

Steps are made by hand: sequences whose blocks lie scattered in a cache that is filled, in five kinds. *decode*: a row
per sequence. *prefill*: a run of rows. *mixed*: both. *tree*: rows that branch, as speculation verifies them. *hole*:
runs in the midst of a context and its last row.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch

from tenon.base import machine
from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError
from tenon.cost.calibration import HostPoint, Measured, Point
from tenon.cost.work import StepShape, step_shape
from tenon.engine.config import EngineConfig
from tenon.engine.executors.probe_limits import cpu_limits, cuda_limits, least, plain_step
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.step import GroupStep, Step
from tenon.models import shapes
from tenon.models.hf_config import parse_config
from tenon.models.spec import ModelSpec, dtype_bytes, step_work

BLOCK_TOKENS: Final = 16
FILL_ROWS: Final = 256
STEPS_LIMIT_S: Final = 32.0
"""Of calibration's minute, what steps may take."""
OnPhase = Callable[[str], None]
Numerics = Literal["fast", "invariant"]


@dataclass(frozen=True)
class SpanPlan:
    """Positions [start, start + n) of sequence ``seq``; of a tree, the rows' parents (-1: its root's context)."""

    seq: int
    start: int
    n: int
    parents: tuple[int, ...] = ()
    samples: bool = True

    @property
    def depths(self) -> list[int]:
        """How far each row stands below the span's first."""
        if not self.parents:
            return list(range(self.n))
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found


@dataclass(frozen=True)
class StepPlan:
    """One step to time."""

    name: str
    kind: str
    spans: tuple[SpanPlan, ...]

    def positions(self) -> list[int]:
        """Cache positions that each sequence of the step needs, in the order of their numbers."""
        need: dict[int, int] = {}
        for span in self.spans:
            need[span.seq] = max(need.get(span.seq, 0), span.start + span.n)
        return [need[seq] for seq in sorted(need)]

    def shape(self, windows: Sequence[int | None]) -> StepShape:
        """What of the step decides its cost, for a model with groups of these windows."""
        pos = np.concatenate([span.start + np.array(span.depths) for span in self.spans])
        outputs = sum((span.n if span.parents else 1) for span in self.spans if span.samples)
        parent = np.concatenate([span.parents or (-1,) * span.n for span in self.spans])
        return step_shape(pos, np.cumsum([0, *(span.n for span in self.spans)]), outputs, windows, parent)


def decode(batch: int, context: int) -> StepPlan:
    spans = tuple(SpanPlan(seq, context - 1, 1) for seq in range(batch))
    return StepPlan(f"decode {batch} x {context}", "decode", spans)


def prefill(n: int, start: int = 0) -> StepPlan:
    return StepPlan(f"prefill {n} at {start}", "prefill", (SpanPlan(0, start, n),))


def mixed(batch: int, context: int, n: int, start: int) -> StepPlan:
    chunk = SpanPlan(batch, start, n)
    return StepPlan(f"mixed {batch} x {context} and {n} at {start}", "mixed", (*decode(batch, context).spans, chunk))


def tree(batch: int, context: int, rows: int, width: int = 3) -> StepPlan:
    """Trees of ``rows`` rows whose nodes have up to ``width`` children, in breadth-first order."""
    parents = tuple(-1 if i == 0 else (i - 1) // width for i in range(rows))
    spans = tuple(SpanPlan(seq, context, rows, parents) for seq in range(batch))
    return StepPlan(f"tree {batch} x {rows} rows at {context}", "tree", spans)


def hole(batch: int, context: int, holes: int, rows: int) -> StepPlan:
    """``holes`` runs of ``rows`` positions spread over each context, and its last row."""
    spans = []
    for seq in range(batch):
        for i in range(holes):
            start = (i * 2 + 1) * context // (2 * holes + 1)
            spans.append(SpanPlan(seq, start, min(rows, context - 1 - start), samples=False))
        spans.append(SpanPlan(seq, context - 1, 1))
    return StepPlan(f"hole {batch} x {holes} of {rows} in {context}", "hole", tuple(spans))


def small_moe() -> ModelSpec:
    """A mixture small enough to calibrate with: what matters is how experts are read and multiplied."""
    return parse_config(
        {
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 8192,
            "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 64, "intermediate_size": 1024, "moe_intermediate_size": 512, "num_experts": 16,
            "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 8192, "dtype": "bfloat16",
        },
        "small mixture",
    )  # fmt: skip


def wide() -> ModelSpec:
    """Few wide layers, as larger models have: products overlap arithmetic and memory better than narrow ones."""
    return parse_config(
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16384, "hidden_size": 1280,
            "num_hidden_layers": 8, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 64,
            "intermediate_size": 4096, "max_position_embeddings": 8192, "dtype": "bfloat16",
        },
        "wide",
    )  # fmt: skip


MODELS: Final[dict[str, Callable[[], ModelSpec]]] = {
    "embedded": lambda: _decodable("embedded"),
    "SmolLM2-135M": lambda: _decodable("SmolLM2-135M"),
    "small mixture": small_moe,
    "wide": wide,
}


def _decodable(name: str) -> ModelSpec:
    spec = shapes.find(name)
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"{name} is known by its costs alone; no step of it can be timed", subject=name)
    return spec


CALIBRATION: Final[dict[str, tuple[StepPlan, ...]]] = {
    "embedded": (
        decode(1, 64), decode(1, 512), decode(1, 2000), decode(2, 1000), decode(4, 256), decode(8, 64),
        decode(8, 1500), decode(16, 512), decode(32, 128), decode(64, 64), decode(64, 1000),
        prefill(4, 64), prefill(16), prefill(64), prefill(128, 1000), prefill(256), prefill(1000),
        mixed(4, 512, 64, 0), mixed(16, 256, 256, 512), mixed(32, 1000, 32, 200),
        tree(1, 512, 8), tree(1, 1900, 32), tree(8, 300, 8), tree(16, 1000, 6),
        hole(1, 1000, 2, 64), hole(1, 2000, 6, 16), hole(4, 700, 2, 32),
    ),
    "SmolLM2-135M": (
        decode(1, 64), decode(1, 1000), decode(1, 6000), decode(2, 500), decode(4, 2000), decode(8, 128),
        decode(8, 1000), decode(16, 256), decode(32, 64), decode(32, 500),
        prefill(4, 300), prefill(16), prefill(48, 1000), prefill(128), prefill(192, 3000),
        mixed(4, 512, 64, 0), mixed(12, 300, 96, 700), tree(1, 600, 12), tree(4, 1500, 8), hole(1, 3000, 3, 32),
        hole(2, 500, 1, 48),
    ),
    "small mixture": (
        decode(1, 64), decode(2, 300), decode(4, 64), decode(8, 1000), decode(32, 64), prefill(32), prefill(128, 500),
        prefill(256), mixed(4, 300, 32, 0),
    ),
    "wide": (
        decode(1, 100), decode(1, 3000), decode(2, 300), decode(4, 1000), decode(8, 100), decode(16, 400),
        prefill(8, 100), prefill(24), prefill(96, 500), mixed(4, 500, 16, 0), tree(1, 700, 10), hole(1, 1000, 2, 16),
    ),
}  # fmt: skip


class Rig:
    """A model with random weights in the real executor, with a filled cache of at least ``positions`` positions."""

    def __init__(
        self,
        spec: ModelSpec,
        positions: int,
        *,
        threads: int | None = None,
        device: str = "auto",
        numerics: Numerics = "fast",
    ) -> None:
        length = min(spec.max_position, positions + BLOCK_TOKENS)
        config = EngineConfig(
            model="probe", weights_seed=1, max_model_len=length, threads=threads, device=device, numerics=numerics
        )
        self.spec = spec
        self.executor = TorchExecutor.load(Path("probe"), spec, config, lambda *_: None)
        self.dtype = self.executor.caps.dtype
        groups = spec.kv_groups("probe", BLOCK_TOKENS, dtype_bytes(self.dtype))
        self.windows = [group.window for group in groups]
        self._n_blocks = -(-positions // BLOCK_TOKENS) + 1
        self.executor.allocate(groups, self._n_blocks)
        self._random = np.random.default_rng(0)
        self._fill()

    def _fill(self) -> None:
        """Keys and values in every block: memory that was never written would be read from one page of zeros."""
        rows = min(FILL_ROWS, (self._n_blocks - 1) * BLOCK_TOKENS, self.spec.max_position)
        first = StepPlan("fill", "prefill", (SpanPlan(0, 0, rows),))
        step = self.step(first, scattered=False)
        self.executor.poll(self.executor.submit(step))
        last = self._n_blocks * BLOCK_TOKENS
        target = np.arange(BLOCK_TOKENS + rows, last, dtype=np.int32)
        source = BLOCK_TOKENS + (target - BLOCK_TOKENS) % rows
        for group in step.groups:
            group.moves = np.stack([source, target], axis=1).astype(np.int32)
        self.executor.poll(self.executor.submit(step))

    def step(self, plan: StepPlan, *, scattered: bool = True) -> Step:
        """The plan as arrays. Raises ``ConfigError`` where the cache is too small for it."""
        blocks = np.arange(1, self._n_blocks, dtype=np.int32)
        if scattered:
            blocks = np.random.default_rng(len(plan.name)).permutation(blocks)
        need = [-(-n // BLOCK_TOKENS) for n in plan.positions()]
        if sum(need) > len(blocks):
            raise ConfigError(f"step {plan.name!r} needs {sum(need)} blocks, the cache has {len(blocks)}")
        first = np.concatenate([[0], np.cumsum(need)])
        numbers = {seq: i for i, seq in enumerate(sorted({span.seq for span in plan.spans}))}
        pos, slot, parent, table, out_row = [], [], [], [], []
        q_start, table_start = [0], [0]
        for span in plan.spans:
            own = blocks[first[numbers[span.seq]] : first[numbers[span.seq] + 1]]
            at = span.start + np.arange(span.n)
            slot.append(own[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS)
            pos.append(span.start + np.array(span.depths))
            row = q_start[-1]
            parent += [p if p < 0 else row + p for p in span.parents] or [-1] * span.n
            table.append(own[: -(-(span.start + span.n) // BLOCK_TOKENS)])
            table_start.append(table_start[-1] + len(table[-1]))
            q_start.append(row + span.n)
            if span.samples:
                out_row += list(range(row, row + span.n)) if span.parents else [row + span.n - 1]
        T = q_start[-1]
        groups = tuple(
            GroupStep(
                np.concatenate(slot).astype(np.int32), np.array(table_start, np.int32),
                np.concatenate(table).astype(np.int32),
            )
            for _ in self.windows
        )  # fmt: skip
        return plain_step(
            np.concatenate(pos), np.array(q_start), np.array([span.seq for span in plan.spans]), groups,
            tok=self._random.integers(0, self.spec.vocab_size, T).astype(np.int32),
            parent=np.array(parent, np.int32), out_row=np.array(out_row, np.int32),
        )  # fmt: skip

    def run(self, step: Step) -> None:
        self.executor.poll(self.executor.submit(step))

    def close(self) -> None:
        self.executor.close()


def needed(plans: Iterable[StepPlan]) -> int:
    """Cache positions for the largest of ``plans``, each sequence in blocks of its own."""
    return max(sum(-(-n // BLOCK_TOKENS) * BLOCK_TOKENS for n in plan.positions()) for plan in plans)


def time_steps(
    rigs: Mapping[str, tuple[Rig, Sequence[StepPlan]]],
    *,
    rounds: int = 4,
    at_least: int = 2,
    budget_s: float = 0.04,
    limit_s: float = float("inf"),
    clock: Clock = SYSTEM,
) -> list[Point]:
    """Every plan's time: the median over rounds of the least of a few runs.

    What else the machine does only ever adds to a run, so the least is what the step takes; rounds go through all plans
    of all models, so that a slow moment falls on no step in more than one of them. In a round a plan runs ``at_least``
    times, and more while ``budget_s`` lasts. On a slow machine rounds end where another would pass ``limit_s``.
    """
    steps = [(model, rig, plan, rig.step(plan)) for model, (rig, plans) in rigs.items() for plan in plans]
    seen: list[list[float]] = [[] for _ in steps]
    count = [0] * len(steps)
    start_s = clock.now_s()
    for done in range(rounds):
        if done and (clock.now_s() - start_s) * (done + 1) / done > limit_s:
            break
        for i, (_, rig, _, step) in enumerate(steps):
            seconds, n = least(lambda r=rig, s=step: r.run(s), clock, at_least=at_least, budget_s=budget_s)  # type: ignore[misc]
            seen[i].append(seconds)
            count[i] += n
    return [
        Point(
            name=f"{model} {plan.name}", model=model, kind=plan.kind,
            work=step_work(rig.spec, plan.shape(rig.windows), rig.dtype), seconds=median(times), samples=n,
        )
        for (model, rig, plan, _), times, n in zip(steps, seen, count, strict=True)
    ]  # fmt: skip


HOST_SPANS: Final = (1, 4, 16, 64)
SHORT_POSITIONS: Final = 600
SHORT_MODELS: Final = ("embedded", "small mixture")


def host_points(device: str, threads: int | None, spans: Sequence[int] = HOST_SPANS) -> list[HostPoint]:
    """What the engine takes around its executor while so many sequences decode."""
    from tenon.engine.build import build_engine
    from tenon.engine.messages import Add

    config = EngineConfig(max_sequences=max(spans), max_model_len=128, device=device, threads=threads)
    engine = build_engine(config, lambda *_: None)
    found = []
    for n in spans:
        for i in range(n):
            engine.add(Add(f"{n}-{i}", (5, 6, 7, 8), 40, 0, temperature=0.0, ignore_eos=True))
        own = []
        while engine.has_work:
            engine.tick(0.0)
            own.append(engine.stats(0.0).bookkeeping_s)
        found.append(HostPoint(n, median(own[2:])))
    engine.close()
    return found


def measure(
    on_phase: OnPhase,
    *,
    threads: int | None = None,
    device: str = "auto",
    numerics: Numerics = "fast",
    scale: float = 1.0,
) -> Measured:
    """Everything; steps run with ``numerics``, as ``EngineConfig`` has it.

    ``scale`` below 1 shrinks limits and leaves only short steps: for tests, not for use.
    """
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    here = machine.describe()
    threads = threads or here.cores
    torch.set_num_threads(threads)
    on_phase("limits")
    name = "cuda" if device == "auto" else device

    def look() -> dict[str, float]:
        return cuda_limits(name, scale=scale) if cuda else cpu_limits(threads, scale=scale)

    early = look()
    on_phase("models")
    rigs: dict[str, tuple[Rig, Sequence[StepPlan]]] = {}
    for model, plans in CALIBRATION.items():
        chosen = [plan for plan in plans if scale >= 1 or sum(plan.positions()) <= SHORT_POSITIONS]
        if scale >= 1 or model in SHORT_MODELS:
            n_threads = None if cuda else threads
            rig = Rig(MODELS[model](), needed(chosen), threads=n_threads, device=device, numerics=numerics)
            rigs[model] = rig, chosen
    on_phase("steps")
    points = time_steps(rigs, rounds=4 if scale >= 1 else 1, limit_s=STEPS_LIMIT_S)
    dtype = rig.dtype
    for rig, _ in rigs.values():
        rig.close()
    on_phase("the engine around its executor")
    host = host_points(device, None if cuda else threads, HOST_SPANS if scale >= 1 else HOST_SPANS[:2])
    on_phase("limits again")
    limits = better(early, look())
    properties = torch.cuda.get_device_properties(name) if cuda else None
    title = properties.name if properties else f"{here.cpu}, {threads} threads"
    return Measured(
        title=title if numerics == "fast" else f"{title}, {numerics} numerics",
        kind="gpu" if cuda else "cpu",
        dtype=dtype,
        threads=threads,
        memory_bytes=properties.total_memory if properties else here.memory_bytes,
        cache_bytes=0 if cuda else here.last_level_cache_bytes,
        limits=limits,
        points=tuple(points),
        host=tuple(host),
        numerics=numerics,
    )


def better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The better of two looks, minutes apart: rates as high, times as short as were ever seen."""
    return {name: (max if name.endswith(("Bps", "per_s")) else min)(one[name], other[name]) for name in one}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise ConfigError(f"usage: python -m tenon.engine.executors.probe OPTIONS_JSON, got {list(arguments)}")
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(value: dict[str, Any]) -> None:
        answers.write(msgspec.json.encode(value) + b"\n")
        answers.flush()

    say({"measured": measure(lambda phase: say({"phase": phase}), **json.loads(arguments[0]))})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
