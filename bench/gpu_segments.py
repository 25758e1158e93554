"""Multi-segment attention on CUDA (AsymCache §4.1): holes in one launch, against launches per hole and prefill.

    pip install -e '.[test,bench]' && python bench/gpu_segments.py [--quick] [--out runs/gpu_segments.json]
    python bench/gpu_segments.py --dry-run     # no GPU: the cells, an estimate, every measured function once

First attention alone at Llama-3.1-8B's shape: hole count x hole size x position, FLOP/s of our kernel in one launch for
all holes, in one launch a hole, over a full prefill, and of FlashInfer's paged prefill over virtual sequences where it
is installed, else of FlexAttention with a mask of positions. Beside them stands the dense rate that
``scaled_dot_product_attention`` reached on a contiguous prefill around each cell in the same run, and the ratio of two
measurements of the same code (A/A). Ours writes the holes' K and V within its time; the others find them written.

Then the engine end to end, random weights: sessions that come back in any order, more than the cache holds, with
``reuse`` blocks or prefix and ``evict`` random or lru; seconds to the first token.

Exit status 0 when every target holds, 1 when one is missed, 2 without a CUDA device. A dry run proves that the script
runs and nothing about speed: kernels go through Triton's interpreter, on CPU tensors.

Shapes: H query heads, G key/value heads, D head size, T rows, L context.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGET, TARGET_TOKENS = 0.9, 256
"""Of the dense rate, from holes of so many tokens on."""
AA_LIMIT = 1.05
BLOCK = 16
SAMPLE_S = 0.05
GUESS_FLOPS = 3e14
"""For the estimate only."""


@dataclass(frozen=True)
class Sizes:
    """What is swept, and the shapes it is swept at."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    holes: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    model: str
    sessions: int
    turns: int
    first_tokens: int
    turn_tokens: int
    kv_tokens: int
    step_tokens: int


FULL = Sizes(
    32, 8, 128, "bfloat16", (1, 2, 4, 8, 16, 32, 64), (16, 64, 256, 1024, 2048), (8192, 32768, 131072),
    "Llama-3.1-8B", 16, 5, 12288, 1024, 196608, 8192,
)  # fmt: skip
QUICK = replace(
    FULL, holes=(1, 8, 64), tokens=(16, 256, 1024), positions=(32768,), model="Llama-3.2-1B", sessions=8, turns=3
)
TINY = Sizes(4, 2, 32, "float32", (1, 2), (16,), (96,), "tiny", 4, 3, 96, 32, 288, 64)


@dataclass(frozen=True)
class Cell:
    """``holes`` runs of ``tokens`` each, evenly spread below position ``end``, the last one ending there."""

    holes: int
    tokens: int
    end: int

    @property
    def runs(self) -> list[tuple[int, int]]:
        stride = self.end // self.holes
        return [
            (stop - self.tokens, stop) for stop in range(self.end - stride * (self.holes - 1), self.end + 1, stride)
        ]

    def flops(self, sizes: Sizes) -> float:
        """Causal: a product and a sum for each query, key and channel, twice."""
        pairs = sum((stop * (stop + 1) - start * (start + 1)) / 2 for start, stop in self.runs)
        return 4 * sizes.heads * sizes.head_dim * pairs


def cells(sizes: Sizes) -> list[Cell]:
    """Those whose holes leave at least half of the context standing."""
    made = (Cell(n, t, end) for end in sizes.positions for n in sizes.holes for t in sizes.tokens)
    return [cell for cell in made if 2 * cell.holes * cell.tokens <= cell.end]


class Attention:
    """One layer's cache of one sequence of L positions, its blocks scattered, and the ways to attend over it."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        import numpy as np
        import torch

        from tenon.engine.executors.triton_attention import TritonAttention
        from tenon.models.spec import ModelSpec

        H, G, D = sizes.heads, sizes.kv_heads, sizes.head_dim
        self.sizes, self.device, self.dtype = sizes, torch.device(device), getattr(torch, sizes.dtype)
        self.spec = ModelSpec("llama", 10, H * D, 1, H, G, D, 8, 2 * max(sizes.positions))
        self.ours = TritonAttention(self.spec, self.dtype, self.device)
        n_blocks = max(sizes.positions) // BLOCK
        self.ours.allocate(self.spec.kv_groups("m", BLOCK, self.dtype.itemsize), n_blocks + 1)
        self.table = np.random.default_rng(0).permutation(np.arange(1, n_blocks + 1)).astype(np.int32)
        self.cache = self.ours._layers[0]
        torch.manual_seed(0)
        self.cache.k.normal_()
        self.cache.v.normal_()
        self.scale = D**-0.5

    def rows(self, n: int, heads: int) -> Any:
        import torch

        return torch.randn(n, heads, self.sizes.head_dim, dtype=self.dtype, device=self.device)

    def step(self, runs: list[tuple[int, int]]) -> Any:
        """The arrays of a step of these spans, as the scheduler writes them."""
        import numpy as np

        from tenon.engine.step import GroupStep, Params, Step

        pos = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in runs])
        lengths = [-(-stop // BLOCK) for _, stop in runs]
        table = np.concatenate([self.table[:n] for n in lengths])
        group = GroupStep(
            (self.table[pos // BLOCK] * BLOCK + pos % BLOCK).astype(np.int32),
            np.cumsum([0, *lengths]).astype(np.int32),
            table,
        )
        T, i, f = len(pos), np.zeros(0, np.int32), np.zeros(0, np.float32)
        params = Params(f, i, f, f, np.zeros(0, np.uint64), i, i)
        return Step(
            id=1, model="m", weights_version=0, bucket_T=T, bucket_S=len(runs), n_steps=1,
            seq=np.zeros(len(runs), np.int64), q_start=np.cumsum([0, *(b - a for a, b in runs)]).astype(np.int32),
            tok=np.zeros(T, np.int32), pos=pos, parent=np.full(T, -1, np.int32), groups=(group,), out_row=i,
            out_seq=np.zeros(0, np.int64), out_position=i, want=np.zeros(0, np.uint8), params_index=i,
            bitmask_index=i, params=params, bitmask=np.zeros((0, 0), np.uint32), edit_start=np.zeros(1, np.int32),
            edit_token=i, edit_kind=np.zeros(0, np.uint8), edit_value=f, score_start=np.zeros(1, np.int32),
            score_token=i,
        )  # fmt: skip

    def launches(self, steps: list[list[tuple[int, int]]]) -> Callable[[], Any]:
        """Attend for these steps one after the other; each is planned now, outside of what is timed."""
        planned = []
        for runs in steps:
            one = copy.copy(self.ours)  # the same cache, a plan of its own
            one.begin(self.step(runs))
            n = sum(stop - start for start, stop in runs)
            planned.append((one, *(self.rows(n, heads) for heads in (self.spec.n_heads, *[self.spec.n_kv_heads] * 2))))
        return lambda: [one.attend(q, k, v, 0, self.scale, 0) for one, q, k, v in planned]

    def dense(self, length: int) -> Callable[[], Any]:
        """A contiguous causal prefill by torch."""
        import torch.nn.functional as F

        H, G = self.spec.n_heads, self.spec.n_kv_heads
        q, k, v = (self.rows(length, n).transpose(0, 1)[None].contiguous() for n in (H, G, G))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def flashinfer(self, cell: Cell) -> Callable[[], Any] | None:
        """A virtual sequence a hole: its queries at the end of a sequence whose pages are the context's up to there."""
        try:
            import flashinfer
        except ImportError:
            return None
        import numpy as np
        import torch

        runs, spec = cell.runs, self.spec
        pages = [-(-stop // BLOCK) for _, stop in runs]

        def ints(values: Any) -> Any:
            return torch.from_numpy(np.asarray(values, np.int32)).to(self.device)

        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            ints(np.cumsum([0, *(stop - start for start, stop in runs)])), ints(np.cumsum([0, *pages])),
            ints(np.concatenate([self.table[:n] for n in pages])), ints([(stop - 1) % BLOCK + 1 for _, stop in runs]),
            spec.n_heads, spec.n_kv_heads, spec.head_dim, BLOCK, causal=True, sm_scale=self.scale,
            q_data_type=self.dtype, kv_data_type=self.dtype,
        )  # fmt: skip
        q = self.rows(cell.holes * cell.tokens, spec.n_heads)
        paged = tuple(x.view(-1, BLOCK, spec.n_kv_heads, spec.head_dim) for x in (self.cache.k, self.cache.v))
        return lambda: wrapper.run(q, paged)

    def flex(self, cell: Cell) -> Callable[[], Any]:
        """Contiguous keys under a mask of positions, its block mask made outside of what is timed."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        spec = self.spec
        pos = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in cell.runs])

        def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k <= pos[q]

        cuda = self.device.type == "cuda"
        mask = create_block_mask(causal, None, None, len(pos), cell.end, device=self.device, _compile=cuda)
        if cuda:
            torch._dynamo.config.recompile_limit = 1000  # each cell may need its own; eager would fill the memory
        attend = torch.compile(flex_attention) if cuda else flex_attention
        q = self.rows(len(pos), spec.n_heads).transpose(0, 1)[None]
        k, v = (self.rows(cell.end, spec.n_kv_heads).transpose(0, 1)[None] for _ in range(2))
        return lambda: attend(q, k, v, block_mask=mask, scale=self.scale, enable_gqa=True)

    def check(self, cell: Cell) -> float:
        """Largest error of one launch against gathering, over the largest value: what is timed must be right."""
        import torch

        from tenon.engine.executors.attention import TorchAttention

        plain = TorchAttention(self.spec, self.dtype, self.device)
        plain._block_tokens, plain._layers = BLOCK, self.ours._layers
        step = self.step(cell.runs)
        n = step.n_rows
        q, k, v = (self.rows(n, heads) for heads in (self.spec.n_heads, self.spec.n_kv_heads, self.spec.n_kv_heads))
        found = []
        for one in (self.ours, plain):
            one.begin(step)
            found.append(one.attend(q, k, v, 0, self.scale, 0).float())
        return (
            float((found[0] - found[1]).abs().max() / found[1].abs().max()) if torch.isfinite(found[0]).all() else 1.0
        )


def seconds(call: Callable[[], Any], device: str, reps: int | None = None) -> float:
    """Median seconds of a call; on a GPU by events around single calls, after two calls to warm up."""
    import torch

    from tenon.base.clock import SYSTEM

    if device == "cpu":
        start_s = SYSTEM.now_s()
        call()
        return SYSTEM.now_s() - start_s
    samples: list[float] = []
    for i in itertools.count(-2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 0:
            samples.append(start.elapsed_time(end) / 1e3)
        if len(samples) >= (reps or 5) and (reps or sum(samples) >= SAMPLE_S or len(samples) >= 50):
            return statistics.median(samples)
    raise AssertionError("the loop ends by returning")


def sweep(sizes: Sizes, device: str, check: Callable[..., None]) -> list[dict[str, Any]]:
    """Every cell's rates; the dense rate is measured before and after each."""
    import torch

    rows = []
    attention = Attention(sizes, device)
    length = min(16384, max(sizes.positions))
    dense_call, dense_flops = attention.dense(length), Cell(1, length, length).flops(sizes)
    for end in sizes.positions:
        prefill = Cell(1, end, end)
        prefill_s = seconds(attention.launches([prefill.runs]), device, reps=3)
        print(f"prefill of {end}: {prefill.flops(sizes) / prefill_s / 1e12:.1f} TFLOP/s", flush=True)
        for cell in (c for c in cells(sizes) if c.end == end):
            dense = [dense_flops / seconds(dense_call, device)]
            one = attention.launches([cell.runs])
            calls: dict[str, Callable[[], Any] | None] = {
                "one launch": one, "a launch a hole": attention.launches([[run] for run in cell.runs]),
                "flashinfer": attention.flashinfer(cell) if device != "cpu" else None, "again": one,
            }  # fmt: skip
            if calls["flashinfer"] is None:
                calls["flex"] = attention.flex(cell)
            took, failed = {}, {}
            for key, call in calls.items():
                try:
                    if call is not None:
                        took[key] = seconds(call, device)
                except torch.OutOfMemoryError as memory:
                    failed[key] = str(memory).splitlines()[0]
                    print(f"{key}: {failed[key]}", file=sys.stderr)
            dense.append(dense_flops / seconds(dense_call, device))
            rate = {name: cell.flops(sizes) / s for name, s in took.items()}
            of_dense = rate["one launch"] / statistics.mean(dense)
            aa = max(took["one launch"], took["again"]) / min(took["one launch"], took["again"])
            error = attention.check(cell) if cell.end <= 32768 and cell.holes * cell.tokens <= 4096 else None
            rows.append({
                "holes": cell.holes, "tokens": cell.tokens, "end": cell.end, "seconds": took, "flops": rate,
                "dense_flops": dense, "of_dense": of_dense, "aa": aa, "prefill_s": prefill_s, "error": error,
                "failed": failed,
            })  # fmt: skip
            name = f"{cell.holes} x {cell.tokens} below {cell.end}"
            shown = ", ".join(f"{key} {value / 1e12:.1f}" for key, value in rate.items())
            print(f"{name}: {shown} TFLOP/s; {of_dense:.2f} of dense, A/A {aa:.3f}", flush=True)
            if cell.tokens >= TARGET_TOKENS:
                check(f"{name}: of the dense rate", of_dense, of_dense >= TARGET, f">= {TARGET}")
                check(f"{name}: A/A", aa, aa <= AA_LIMIT, f"<= {AA_LIMIT}")
            if error is not None:
                check(f"{name}: error", error, error <= 2.0**-6, "<= 2**-6")
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def config_of(model: str) -> dict[str, Any]:
    """A config.json of this shape."""
    from tenon.models.shapes import FILE

    if model == "tiny":
        base = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2}
        base |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
        base |= {"max_position_embeddings": 512, "torch_dtype": "float32"}
    else:
        base = tomllib.loads(FILE.read_text(encoding="utf-8"))[model]["config"] | {"torch_dtype": "bfloat16"}
    return base | {"architectures": ["LlamaForCausalLM"]}


WAYS = (("blocks", "random"), ("prefix", "random"), ("blocks", "lru"), ("prefix", "lru"))


def first_tokens(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Seconds to the first token of every later turn, for each way to reuse and evict; the same requests for all."""
    import numpy as np

    from tenon.base.clock import SYSTEM
    from tenon.engine.build import build_engine
    from tenon.engine.config import EngineConfig
    from tenon.engine.engine import Engine
    from tenon.engine.messages import Add
    from tenon.engine.scheduler import Scheduler
    from tenon.models.hf_config import read_config
    from tenon.models.spec import DTYPE_BYTES

    found = []
    longest = sizes.first_tokens + sizes.turns * sizes.turn_tokens + 64
    rng = np.random.default_rng(0)
    order = rng.permutation(np.repeat(np.arange(sizes.sessions), sizes.turns)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(sizes.model)))
        spec = read_config(Path(folder))
        groups = spec.kv_groups("m", BLOCK, DTYPE_BYTES[spec.dtype])
        config = EngineConfig(
            model=folder, device=device, weights_seed=1, block_tokens=BLOCK, max_model_len=longest, max_sequences=4,
            max_step_tokens=sizes.step_tokens, kv_bytes=sizes.kv_tokens // BLOCK * sum(g.block_bytes for g in groups),
        )  # fmt: skip
        loaded = build_engine(config, lambda *_: None)
        texts = rng.integers(0, spec.vocab_size, (sizes.sessions, longest)).tolist()
        for reuse, evict in WAYS:
            settings = replace(config, reuse=reuse, evict=evict)
            # A fresh scheduler over the loaded weights: what the cache holds is known to the scheduler alone.
            scheduler = Scheduler(
                settings, groups, loaded.identity.n_blocks, model="m", vocab_size=spec.vocab_size, eos_ids=(),
                max_model_len=longest, secret=b"k" * 32,
            )  # fmt: skip
            engine = Engine(settings, loaded.identity, scheduler, loaded.executor)
            turn = dict.fromkeys(range(sizes.sessions), 0)
            times: list[float] = []
            for i, session in enumerate(order):
                length = sizes.first_tokens + turn[session] * sizes.turn_tokens
                start_s = SYSTEM.now_s()
                engine.add(Add(f"{i}", tuple(texts[session][:length]), 2, i, temperature=0.0, ignore_eos=True))
                while not engine.tick(start_s):
                    pass
                if turn[session]:
                    times.append(SYSTEM.now_s() - start_s)
                while engine.has_work:
                    engine.tick(start_s)
                turn[session] += 1
            counters = scheduler.counters
            found.append({
                "reuse": reuse, "evict": evict, "mean_s": statistics.mean(times), "median_s": statistics.median(times),
                "first_token_s": times, "cached_tokens": counters.cached_tokens, "holes": counters.holes,
                "notes": list(loaded.executor.caps.notes),
            })  # fmt: skip
            print(
                f"{reuse}, {evict}: first token {found[-1]['mean_s']:.3f} s mean, {found[-1]['median_s']:.3f} median; "
                f"{counters.cached_tokens} tokens reused, {counters.holes} holes", flush=True,
            )  # fmt: skip
        loaded.close()
    return found


def estimate_s(sizes: Sizes) -> float:
    """Seconds at a guessed rate: five calls of each contender and of the dense prefill, compiling, the engine."""
    dense = 2 * 7 * Cell(1, 16384, 16384).flops(sizes) / GUESS_FLOPS
    swept = sum(2.0 + 4 * max(SAMPLE_S, 7 * cell.flops(sizes) / GUESS_FLOPS) + dense for cell in cells(sizes))
    swept += sum(5 * Cell(1, end, end).flops(sizes) / GUESS_FLOPS for end in sizes.positions)
    tokens = sizes.sessions * sizes.turns * (sizes.first_tokens + sizes.turns * sizes.turn_tokens / 2)
    parameters = 8e9 if "8B" in sizes.model else 1.2e9
    return 60 + swept + parameters / 5e7 + len(WAYS) * tokens * 2 * parameters / GUESS_FLOPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer cells, a smaller model: at most three minutes")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: cells, estimate, everything once, tiny")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_segments.json")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print("this script needs a CUDA device, and torch sees none; --dry-run does without", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError as error:
        print(f"this script measures Triton kernels: {error}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "checks": []}

    def check(name: str, value: float, passed: bool, target: str) -> None:
        found["checks"].append({"name": name, "value": value, "target": target, "passed": passed})
        if not passed:
            print(f"FAIL  {name}: {value:.3g} ({target})", flush=True)

    if arguments.dry_run:
        for cell in cells(sizes):
            print(f"{cell.holes} x {cell.tokens} below {cell.end}: {cell.flops(sizes) / 1e12:.3g} TFLOP")
        print(f"{len(cells(sizes))} cells and {len(WAYS)} engines, about {estimate_s(sizes) / 60:.0f} min on a GPU")
        print("now everything once, tiny, on CPU; the rates below mean nothing")
        torch.set_num_threads(1)
        sweep(TINY, "cpu", check)
        first_tokens(TINY, "cpu")
        return 0 if all(one["passed"] for one in found["checks"]) else 1
    from tenon.base.files import write_json

    found |= {"device": torch.cuda.get_device_name(), "quick": arguments.quick}
    found["cells"] = sweep(sizes, "cuda", check)
    found["engine"] = first_tokens(sizes, "cuda")
    by_way = {(one["reuse"], one["evict"]): one["mean_s"] for one in found["engine"]}
    ratio = by_way["prefix", "random"] / by_way["blocks", "random"]
    check("first token under random eviction: prefix over blocks", ratio, ratio >= 1, ">= 1")
    write_json(arguments.out, found)
    print(json.dumps({"written": str(arguments.out), "failed": sum(not one["passed"] for one in found["checks"])}))
    return 0 if all(one["passed"] for one in found["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
