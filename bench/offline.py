"""Offline decoding against transformers: prefill and decode rates over shapes, contexts and batch sizes.

Weights are random (the shapes are what costs), greedy, prompts are seeded token ids that share nothing. The type is
bf16 where the processor multiplies it and fp32 elsewhere: there torch emulates bf16, a hundred times slower than fp32,
which is nobody's choice. At context 8192 a batch of 8 shares its context: it is prefilled once in set-up by every
contender (from Tenon's prefix cache, from a repeated ``DynamicCache``) and only decoding is timed. Beside the rates
stand the step's time over that of its linear layers alone, and the engine's bookkeeping at 64 sequences.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tenon.base.clock import SYSTEM
from tenon.base.machine import describe
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

DTYPE = "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(describe().flags) else "float32"
TITLE = f"offline decoding against transformers, random weights, {DTYPE}, greedy"
BASELINE = "generate"
LIMITS = True

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 16384,
}
EMBEDDED = json.loads((ROOT / "tenon" / "models" / "embedded" / "target" / "config.json").read_text())
SIZES = (
    "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rope_theta",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {name: EMBEDDED[name] for name in SIZES},
    "smollm2-135m": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "rope_theta": 100000.0, "mlp_bias": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072, "rope_theta": 1000000.0,
    },
}  # fmt: skip


def prompts(cell: dict[str, Any], sample: int) -> list[list[int]]:
    """Token ids of one sample: the same for every contender, never the same twice within a run."""
    rng = random.Random(f"{cell['shape']} {sample}")
    vocab = SHAPES[cell["shape"]]["vocab_size"]
    return [
        [rng.randrange(vocab) for _ in range(cell["context"])] for _ in range(1 if cell["shared"] else cell["batch"])
    ]


class Tenon:
    """The engine in this process: what ``LLM`` runs, without text. Keywords are ``EngineConfig``'s."""

    def __init__(self, **config: Any) -> None:
        self._config = config

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon.engine.build import build_engine
        from tenon.engine.config import EngineConfig

        self._cell, self._sample = cell, 0
        self._folder = tempfile.TemporaryDirectory()
        config = COMMON | SHAPES[cell["shape"]] | {"dtype": cell["dtype"]}
        (Path(self._folder.name) / "config.json").write_text(json.dumps(config))
        length = cell["context"] + cell["new"] + 17
        engine_config = EngineConfig(
            model=self._folder.name,
            weights_seed=1,
            max_model_len=length,
            max_sequences=cell["batch"],
            threads=torch.get_num_threads(),
            **self._config,
        )
        self._engine = build_engine(engine_config, lambda *_: None)
        self._run(8)

    def _run(self, new: int) -> tuple[float, list[float], list[float]]:
        """Seconds of prefill, of each decode step, and of each step's bookkeeping."""
        from tenon.engine.messages import Add

        given = prompts(self._cell, 0 if self._cell["shared"] else self._sample)
        given = given * (self._cell["batch"] // len(given))
        self._sample += 1
        for i, ids in enumerate(given):
            self._engine.add(Add(f"{self._sample}-{i}", tuple(ids), new + 1, 0, temperature=0.0, ignore_eos=True))
        start_s = SYSTEM.now_s()
        scheduler = self._engine.scheduler
        while scheduler.waiting or any(not seq.is_decoding for seq in scheduler.running):
            self._engine.tick(start_s)
        prefill_s, steps, own = SYSTEM.now_s() - start_s, [], []
        while self._engine.has_work:
            step_s = SYSTEM.now_s()
            self._engine.tick(step_s)
            steps.append(SYSTEM.now_s() - step_s)
            own.append(self._engine.stats(step_s).bookkeeping_s)
        return prefill_s, steps, own

    def sample(self) -> dict[str, float]:
        cell = self._cell
        prefill_s, steps, own = self._run(cell["new"])
        if cell["bookkeeping"]:
            return {"bookkeeping_ms": 1e3 * statistics.median(own)}
        metrics = {"decode_tokens_per_s": cell["batch"] * len(steps) / sum(steps)}
        if not cell["shared"]:
            metrics["prefill_tokens_per_s"] = cell["batch"] * cell["context"] / prefill_s
        return metrics | {"step_over_linear": statistics.median(steps) / self._linear_s(len(steps))}

    def _linear_s(self, rounds: int) -> float:
        """Median seconds of one step's linear layers alone: same weights, same number of rows, same order."""
        import torch

        from tenon.engine.executors.stack import Stack

        forward, batch = self._engine.executor.inner.forward, self._cell["batch"]
        if isinstance(forward, Stack):
            device = torch.device("cpu")
            calls: list[tuple[Any, int]] = [(product, product.K) for product in forward.products]
        else:
            device = forward.model.embed.weight.device
            linear = [module for module in forward.model.modules() if isinstance(module, torch.nn.Linear)]
            calls = [(module, module.in_features) for module in linear]
        dtype = getattr(torch, self._cell["dtype"])
        inputs = [(module, torch.randn(batch, width, dtype=dtype, device=device)) for module, width in calls]
        seconds = []
        with torch.inference_mode():
            for _ in range(rounds):
                start_s = SYSTEM.now_s()
                for module, x in inputs:
                    module(x)
                seconds.append(SYSTEM.now_s() - start_s)
        return statistics.median(seconds)

    def close(self) -> None:
        self._engine.close()
        self._folder.cleanup()


class Transformers:
    """``model.generate``, timed by a stopping criterion that looks at the clock after every token."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def setup(self, cell: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._cell, self._sample = cell, 0
        shape = COMMON | SHAPES[cell["shape"]]
        dtype = getattr(torch, cell["dtype"])
        config = transformers.AutoConfig.for_model(**shape)
        torch.manual_seed(1)
        self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(self._device).eval()
        self._past = None
        if cell["shared"]:
            ids = torch.tensor(prompts(cell, 0), device=self._device)
            with torch.inference_mode():
                self._past = self._model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        self._generate(8)

    def _generate(self, new: int) -> list[float]:
        """Seconds from the start at which each new token was there."""
        import copy

        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        stamps: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                stamps.append(SYSTEM.now_s())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        given = prompts(self._cell, 0 if self._cell["shared"] else self._sample)
        ids = torch.tensor(given * (self._cell["batch"] // len(given)), device=self._device)
        self._sample += 1
        past: dict[str, Any] = {}
        if self._past is not None:
            cache = copy.deepcopy(self._past)
            cache.batch_repeat_interleave(self._cell["batch"])
            past = {"past_key_values": cache}
        config = GenerationConfig(max_new_tokens=new + 1, do_sample=False, eos_token_id=None, pad_token_id=0)
        start_s = SYSTEM.now_s()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Clock()]),
                **past,
            )
        return [stamp - start_s for stamp in stamps]

    def sample(self) -> dict[str, float]:
        cell = self._cell
        stamps = self._generate(cell["new"])
        metrics = {"decode_tokens_per_s": cell["batch"] * (len(stamps) - 1) / (stamps[-1] - stamps[0])}
        if not cell["shared"]:
            metrics["prefill_tokens_per_s"] = cell["batch"] * cell["context"] / stamps[0]
        return metrics

    def close(self) -> None:
        del self._model


class ContinuousBatching(Transformers):
    """``model.generate_batch``: transformers' own continuous batching over a paged cache."""

    def _generate(self, new: int) -> list[float]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        given = prompts(self._cell, self._sample)
        self._sample += 1
        config = GenerationConfig(max_new_tokens=new + 1, do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = 2 + self._cell["batch"] * (self._cell["context"] + self._cell["new"] + 32) // 32
        paged = ContinuousBatchingConfig(block_size=32, num_blocks=blocks, max_batch_tokens=self._cell["context"])
        start_s = SYSTEM.now_s()
        outputs = self._model.generate_batch(
            given, generation_config=config, continuous_batching_config=paged, record_timestamps=True
        )
        per_request = [[stamp - start_s for stamp in out.timestamps] for out in outputs.values()]
        # Decoding of the batch starts when the last prompt has its first token.
        first = max(stamps[0] for stamps in per_request)
        return [first, *sorted({stamp for stamps in per_request for stamp in stamps if stamp > first})]


CONTENDERS = {
    "tenon": ContenderEntry("bench.offline:Tenon", {}),
    "generate": ContenderEntry("bench.offline:Transformers", {}),
    "continuous": ContenderEntry("bench.offline:ContinuousBatching", {}),
}
BOTH = ("tenon", "generate")
DECODE_AT_LEAST = {1: 1.3, 8: 1.8}
PREFILL_AT_LEAST = 1.0
STEP_OVER_LINEAR = 1.4
BOOKKEEPING_MS = 1.0


def _cell(shape: str, context: int, batch: int, sample_s: float, rounds: int, new: int, *who: str) -> Cell:
    params = {
        "shape": shape, "dtype": DTYPE, "context": context, "batch": batch, "new": new,
        "shared": context > 4096 and batch > 1, "bookkeeping": False,
    }  # fmt: skip
    return Cell(f"{shape} {context} x{batch}", params, rounds, 1, who or BOTH, sample_s, 600)


def cells(quick: bool) -> list[Cell]:
    """At 8192 tokens the 0.6 B shape is measured at batch 1 only: eight copies of its cache, which ``generate``
    rewrites every step, do not fit beside the contenders in 24 GB."""
    book = Cell(
        "bookkeeping x64",
        {
            "shape": "embedded", "dtype": DTYPE, "context": 32, "batch": 64, "new": 60,
            "shared": False, "bookkeeping": True,
        },
        3 if quick else 7, 1, ("tenon",), 3.0, 300,
    )  # fmt: skip
    small = [
        _cell("embedded", 512, 1, 0.5, 3 if quick else 7, 256),
        _cell("embedded", 512, 8, 1.0, 3 if quick else 7, 256),
        _cell("smollm2-135m", 512, 1, 3, 3 if quick else 7, 64),
    ]
    if quick:
        return [*small, book]
    return [
        *small,
        _cell("smollm2-135m", 512, 8, 6, 5, 32, *CONTENDERS),
        _cell("qwen3-0.6b", 512, 1, 4, 5, 24),
        _cell("qwen3-0.6b", 512, 8, 28, 3, 24, *CONTENDERS),
        _cell("embedded", 8192, 1, 4, 5, 48),
        _cell("embedded", 8192, 8, 3, 5, 32),
        _cell("smollm2-135m", 8192, 1, 16, 3, 32),
        _cell("smollm2-135m", 8192, 8, 8, 5, 24),
        _cell("qwen3-0.6b", 8192, 1, 60, 2, 16),
        book,
    ]


def checks(result: Result) -> list[Check]:
    out: list[Check] = []
    by_name = {cell.name: cell for cell in cells(bool(result.settings["quick"]))}
    for name in result.cells:
        cell = by_name[name]
        if cell.params["bookkeeping"]:
            value = result.median(name, "tenon", "bookkeeping_ms")
            out.append(at_most("bookkeeping at 64 sequences, ms a step", value, BOOKKEEPING_MS))
            continue
        for rival in cell.contenders[1:]:
            wanted = DECODE_AT_LEAST[cell.params["batch"]]
            ratio = result.ratio(name, "tenon", rival, "decode_tokens_per_s")
            out.append(at_least(f"{name}: decode over {rival}", ratio, wanted))
            if not cell.params["shared"]:
                ratio = result.ratio(name, "tenon", rival, "prefill_tokens_per_s")
                out.append(at_least(f"{name}: prefill over {rival}", ratio, PREFILL_AT_LEAST))
        value = result.median(name, "tenon", "step_over_linear")
        out.append(at_most(f"{name}: step over its linear layers", value, STEP_OVER_LINEAR))
    return out
