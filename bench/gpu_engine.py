"""The engine on a CUDA device, in one run: logits against transformers fp64, spans and trees, rates against generate.

    pip install -e '.[test,bench]' && python bench/gpu_engine.py [--quick] [--out bench/results/gpu_engine.json]

Not a bench of the harness: it needs a device that most machines lack, so it checks that first and says so. Exit status
0 when every check holds, 1 when one fails, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def logits(case: str, dtype: str) -> dict[str, float]:
    """Largest error per row of the engine on CUDA and of transformers on CUDA, both against transformers in fp64."""
    import torch

    from tenon.engine.build import build_engine
    from tenon.engine.config import EngineConfig
    from tenon.engine.messages import Add
    from tests.models import zoo

    with tempfile.TemporaryDirectory() as folder:
        kind = getattr(torch, dtype)
        zoo.checkpoint(case, Path(folder), dtype=kind)
        exact = zoo.load_reference(Path(folder), torch.float64).cuda()
        rounded = zoo.load_reference(Path(folder), kind).cuda()
        config = EngineConfig(model=folder, device="cuda", dtype=dtype, max_step_tokens=48, max_sequences=8)  # type: ignore[arg-type]
        engine = build_engine(config, lambda *_: None)
        rng = torch.Generator().manual_seed(0)
        worst = {"tenon": 0.0, "transformers": 0.0}
        rows: list[tuple[list[int], torch.Tensor]] = []
        executor = engine.executor.inner  # type: ignore[attr-defined]
        compute = executor.logits

        def record(step: Any) -> Any:
            out = compute(step)
            known = {seq.id: seq for request in engine.scheduler.requests.values() for seq in request.seqs}
            for r, seq_id in enumerate(step.out_seq.tolist()):
                seq = known[seq_id]
                rows.append((seq.tokens[: seq.n_tokens].tolist(), out[r].double().clone()))
            return out

        executor.logits = record
        for i in range(12):
            length = int(torch.randint(1, 120, (1,), generator=rng))
            prompt = torch.randint(0, engine.identity.vocab_size, (length,), generator=rng).tolist()
            engine.add(Add(f"{i}", tuple(prompt), 12, i, n=1 + i % 3, temperature=float(i % 2), ignore_eos=True))
        while engine.has_work:
            engine.tick(0.0)
            engine.check_integrity()
        with torch.inference_mode():
            for ids, got in rows[::4]:
                tokens = torch.tensor([ids], device="cuda")
                right = exact(tokens).logits[0, -1]
                scale = right.abs().max()
                worst["tenon"] = max(worst["tenon"], float((got - right).abs().max() / scale))
                theirs = rounded(tokens).logits[0, -1].double()
                worst["transformers"] = max(worst["transformers"], float((theirs - right).abs().max() / scale))
        engine.close()
    return worst


def rates(shape: str, context: int, batch: int) -> dict[str, float]:
    """Decode and prefill rates of Tenon over those of ``generate`` on the same device."""
    from bench import offline

    cell = {
        "shape": shape, "dtype": "bfloat16", "context": context, "batch": batch, "new": 64,
        "shared": False, "bookkeeping": False,
    }  # fmt: skip
    measured = []
    for contender in (offline.Tenon(device="cuda"), offline.Transformers(device="cuda")):
        contender.setup(cell)
        contender.sample()
        measured.append(contender.sample())
        contender.close()
    ours, theirs = measured
    return {name: ours[name] / value for name, value in theirs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one family, one shape")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_engine.json")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("this script needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    from tenon.base.files import write_json
    from tests.models import zoo

    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": []}

    def check(name: str, value: float, passed: bool, target: str) -> None:
        found["checks"].append({"name": name, "value": value, "target": target, "passed": passed})
        print(f"{'pass' if passed else 'FAIL'}  {name}: {value:.3g} ({target})", flush=True)

    for case in list(zoo.ONE_EACH)[: 1 if arguments.quick else None]:
        worst = logits(case, "float32")
        limit = max(1e-5, 3 * worst["transformers"])
        check(f"{case} fp32 logits", worst["tenon"], worst["tenon"] <= limit, f"<= {limit:.2g}")
        worst = logits(case, "bfloat16")
        limit = 1.25 * worst["transformers"]
        check(f"{case} bf16 logits, worst row", worst["tenon"], worst["tenon"] <= limit, f"<= {limit:.2g}")
    for shape, context, batch in (("qwen3-0.6b", 512, 1), ("qwen3-0.6b", 512, 8), ("qwen3-0.6b", 8192, 1))[
        : 1 if arguments.quick else None
    ]:
        for metric, ratio in rates(shape, context, batch).items():
            wanted = 1.0 if metric.startswith("prefill") else {1: 1.3, 8: 1.8}[batch]
            check(f"{shape} {context} x{batch} {metric} over generate", ratio, ratio >= wanted, f">= {wanted}")
    write_json(arguments.out, found)
    print(json.dumps({"written": str(arguments.out)}))
    return 0 if all(one["passed"] for one in found["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
