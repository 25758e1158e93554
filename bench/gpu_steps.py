"""What steps of many rows take on this CUDA device, against what the cost model says of it: the curve that budgets of
guesses are chosen on (t_step and its knee).

    pip install -e . && python bench/gpu_steps.py [--model Llama-3.1-8B] [--quick] [--out runs/gpu_steps.json]

Weights are random: time does not depend on them. Each step is measured three ways: ``submit`` as the executor serves
it, its forward pass alone, and the same pass replayed from a CUDA graph, which has no launches of its own. Kinds of
steps: decodes (a row a sequence), trees of 64 sequences as chains of so many rows, 64 decodes beside a chunk.
Exit status 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BLOCK: Final = 16
CONTEXT: Final = 512
REPEATS: Final = 7
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256)
TREES: Final = tuple((64, n) for n in (1, 2, 3, 4, 6, 8, 12, 16))
CHUNKS: Final = (128, 256, 512, 1024)


@dataclass(frozen=True)
class Kind:
    """``spans``: (first position, rows) of each; ``outputs`` of the last so many rows of each span."""

    name: str
    spans: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(n for _, n in self.spans)


def kinds(quick: bool) -> list[Kind]:
    thin = slice(None, None, 3) if quick else slice(None)
    found = [Kind("decodes", ((CONTEXT - 1, 1),) * n, (1,) * n) for n in ROWS[thin]]
    found += [Kind("trees", ((CONTEXT - 1, k),) * n, (k,) * n) for n, k in TREES[thin]]
    found += [
        Kind("chunk", (*((CONTEXT - 1, 1),) * 64, (0, chunk)), (*(1,) * 64, 1)) for chunk in CHUNKS[thin]
    ]  # fmt: skip
    return found


def n_blocks(kind: Kind) -> int:
    """As many for each span as for the longest."""
    most = max(start + rows for start, rows in kind.spans)
    return len(kind.spans) * -(-most // BLOCK)


def step_of(kind: Kind, n_groups: int) -> Any:
    """Spans over contexts of their own; what they write goes to the blocks of their own positions."""
    from tenon.engine.step import SAMPLE, GroupStep, Params, Step

    n, T = len(kind.spans), kind.rows
    per_span = n_blocks(kind) // n
    tables = 1 + np.arange(n * per_span, dtype=np.int32).reshape(n, per_span)
    counts = [rows for _, rows in kind.spans]
    q_start = np.cumsum([0, *counts]).astype(np.int32)
    pos = np.concatenate([np.arange(start, start + rows, dtype=np.int32) for start, rows in kind.spans])
    span_T = np.repeat(np.arange(n), counts)
    slot = tables[span_T, pos // BLOCK] * BLOCK + pos % BLOCK
    used = [-(-(start + rows) // BLOCK) for start, rows in kind.spans]
    table = np.concatenate([tables[i, :u] for i, u in enumerate(used)])
    group = GroupStep(slot.astype(np.int32), np.cumsum([0, *used]).astype(np.int32), table)
    out_row = np.concatenate([np.arange(q_start[i + 1] - k, q_start[i + 1]) for i, k in enumerate(kind.outputs)])
    R, no_ids = len(out_row), np.zeros(0, np.int32)
    every = np.zeros(R, np.int32)
    params = Params(
        temperature=np.zeros(R, np.float32), top_k=every, top_p=np.ones(R, np.float32),
        min_p=np.zeros(R, np.float32), seed=np.zeros(R, np.uint64), sample=every,
        n_logprobs=np.full(R, -1, np.int32),
    )  # fmt: skip
    seq = np.arange(n, dtype=np.int64)
    return Step(
        id=0, model="", weights_version=0, bucket_T=T, bucket_S=n, n_steps=1, seq=seq, q_start=q_start,
        tok=np.arange(T, dtype=np.int32) % 1000, pos=pos, parent=np.full(T, -1, np.int32),
        groups=(group,) * n_groups, out_row=out_row.astype(np.int32), out_seq=np.repeat(seq, kind.outputs),
        out_position=every, want=np.full(R, SAMPLE, np.uint8), params_index=np.arange(R, dtype=np.int32),
        bitmask_index=np.full(R, -1, np.int32), params=params, bitmask=np.zeros((0, 0), np.uint32),
        edit_start=np.zeros(R + 1, np.int32), edit_token=no_ids, edit_kind=np.zeros(0, np.uint8),
        edit_value=np.zeros(0, np.float32), score_start=np.zeros(R + 1, np.int32), score_token=no_ids,
    )  # fmt: skip


def timed(call: Callable[[], object]) -> float:
    """Median seconds of a call that is waited for."""
    import torch

    from tenon.base.clock import SYSTEM

    call()
    torch.cuda.synchronize()
    taken = []
    for _ in range(REPEATS):
        start_s = SYSTEM.now_s()
        call()
        torch.cuda.synchronize()
        taken.append(SYSTEM.now_s() - start_s)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="Llama-3.1-8B", help="of shapes.toml")
    parser.add_argument("--quick", action="store_true", help="every third step")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_steps.json")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("this script needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    from tenon.base.files import write_json
    from tenon.cost.device import find as find_device
    from tenon.cost.price import seconds
    from tenon.cost.work import step_shape
    from tenon.engine.config import EngineConfig
    from tenon.engine.executors.torch import TorchExecutor
    from tenon.models.checkpoint import empty_decoder
    from tenon.models.shapes import load
    from tenon.models.spec import ModelSpec, step_work

    spec = load(arguments.model)
    if not isinstance(spec, ModelSpec):
        print(f"{arguments.model} is known by its costs alone; give a model that the decoder runs", file=sys.stderr)
        return 2
    title = torch.cuda.get_device_name()
    device = find_device(next(name for name in ("H200", "H100", "B200", "A100-80", "L40S", "L4") if name in title))
    model = empty_decoder(spec, torch.bfloat16, "cuda")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5)
    config = EngineConfig(model=arguments.model, device="cuda", dtype="bfloat16", block_tokens=BLOCK)
    executor = TorchExecutor(model, config, on_phase=lambda *_: None)
    groups = spec.kv_groups("m", BLOCK, 2)
    executor.allocate(groups, 1 + max(n_blocks(kind) for kind in kinds(False)))
    found: dict[str, Any] = {
        "device": title, "torch": torch.__version__, "model": arguments.model, "context": CONTEXT,
        "notes": list(executor.caps.notes), "steps": [],
    }  # fmt: skip
    for kind in kinds(arguments.quick):
        step = step_of(kind, len(groups))
        shape = step_shape(step.pos, step.q_start, step.n_outputs, tuple(group.window for group in groups))
        predicted_s = seconds(step_work(spec, shape, "bfloat16"), device, host=False)
        served_s = timed(lambda step=step: executor.poll(executor.submit(step)))  # type: ignore[misc]
        forward_s = timed(lambda step=step: executor.logits(step))  # type: ignore[misc]
        graph_s = timed(captured(executor, step))
        one = {
            "kind": kind.name, "rows": kind.rows, "sequences": len(kind.spans), "outputs": step.n_outputs,
            "served_s": served_s, "forward_s": forward_s, "graph_s": graph_s, "predicted_s": predicted_s,
        }  # fmt: skip
        found["steps"].append(one)
        print(
            f"{kind.name:8} {kind.rows:5} rows  served {served_s * 1e3:7.2f} ms  forward {forward_s * 1e3:7.2f}  "
            f"graph {graph_s * 1e3:7.2f}  predicted {predicted_s * 1e3:7.2f} ({predicted_s / graph_s - 1:+.0%})",
            flush=True,
        )
        write_json(arguments.out, found)
    off = [abs(one["predicted_s"] / one["graph_s"] - 1) for one in found["steps"]]
    print(f"prediction against the graph's time: median error {statistics.median(off):.1%}, worst {max(off):.1%}")
    return 0


def captured(executor: Any, step: Any) -> Callable[[], object]:
    """The forward pass, recorded once: replaying it launches everything at once."""
    import torch

    with torch.inference_mode():
        executor._attention.begin(step)
        tok_T = torch.from_numpy(step.tok.astype(np.int64)).cuda()
        pos_T = torch.from_numpy(step.pos.astype(np.int64)).cuda()
        rows = torch.from_numpy(step.out_row.astype(np.int64)).cuda()

        def forward() -> torch.Tensor:
            hidden = executor.forward.hidden(tok_T, pos_T)
            return executor.forward.logits(hidden[rows])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
    return graph.replay


if __name__ == "__main__":
    sys.exit(main())
