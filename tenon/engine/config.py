"""``EngineConfig``: the goals of one engine. What is ``None`` is derived from model and machine and then shown."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tenon.base.errors import ConfigError
from tenon.engine.policies.chunk import CHUNKS
from tenon.engine.policies.forest import MAX_DEPTH
from tenon.engine.policies.order import ORDERS
from tenon.engine.policies.table import BUDGETED, POLICIES, SPECULATES

DRAFTERS = ("ngram", "suffix")
MAX_NODES = 256
"""Of one sequence's tree."""
BLOCK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class EngineConfig:
    """Raises ``ConfigError`` naming the field, when made.

    ``model``: a folder, a hub name, or "embedded". ``kv_bytes``: memory for keys and values; derived from free memory
    and what ``max_sequences`` of ``max_model_len`` could ever fill. ``max_step_tokens``: rows in one step, shared by
    decodes and prefill chunks. ``max_preemptions``: after so many a sequence comes back only with all blocks it can
    ever need, and keeps them. ``numerics``: "invariant" promises that a row's bits do not depend on what else is in the
    step, and is refused where that cannot be kept; "fast" takes what there is. ``reuse``: which resident blocks of a
    context a request takes over: all of them, beyond holes too, or the leading ones only, as most engines do.
    ``order``: who of those who wait comes in first: by arrival ("fifo"), by when first tokens are due ("edf"), or so
    that each tenant with requests gets as much of the device as any other ("fair"). ``pending``: whether blocks that a
    running request is computing are shared with those that come with the same tokens meanwhile, who wait for them, or
    each computes its own. ``chunk``: rows of prompts in a step with decodes: "fixed" takes what has room, "adaptive" as
    many as keep a step within ``tpot_ms``, milliseconds between two tokens of a sequence, which it requires,
    "threshold" fewer the more sequences decode; neither goes under ``min_chunk_tokens``.
    ``prompts``: computed "beside" decodes, or "first", in steps of their own, as engines did before they were chunked.
    ``speculative``: who guesses what sequences say next, separated by commas: "ngram", "suffix", and at most one draft
    model as ``model`` names one ("embedded-draft"), of the same tokenizer; nobody where it is empty. What is guessed is
    verified in the steps that ``speculative_policy`` chooses, at most ``speculative_depth`` tokens ahead and
    ``speculative_nodes`` of them a sequence; ``speculative_budget`` are all rows of a step together, where a policy
    has a fixed budget. Outputs stay the same."""

    model: str = "embedded"
    executor: Literal["torch", "hash"] = "torch"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    numerics: Literal["fast", "invariant"] = "fast"
    block_tokens: int = 16
    kv_bytes: int | None = None
    max_model_len: int | None = None
    max_step_tokens: int = 1024
    max_sequences: int = 64
    max_waiting: int = 1024
    max_preemptions: int = 3
    prefix_cache: bool = True
    reuse: Literal["blocks", "prefix"] = "blocks"
    pending: Literal["share", "private"] = "share"
    evict: str = "lru"
    order: str = "fifo"
    chunk: Literal["fixed", "adaptive", "threshold", "patient"] = "fixed"
    prompts: Literal["beside", "first"] = "beside"
    tpot_ms: float | None = None
    min_chunk_tokens: int = 64
    threads: int | None = None
    speculative: str = ""
    speculative_policy: str = "pays"
    speculative_depth: int = 8
    speculative_nodes: int = 16
    speculative_budget: int | None = None
    weights_seed: int | None = None
    """Random weights from this seed instead of the checkpoint's: for benchmarks of shapes."""
    step_ms: float | None = None
    """A step of the hash executor takes so long: for measuring queues instead of computation."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, right: str) -> None:
            if not ok:
                raise ConfigError(f"{name} must be {right}, got {getattr(self, name)!r}", subject=name)

        require(self.executor in ("torch", "hash"), "executor", "'torch' or 'hash'")
        require(self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype", "auto, float32, bfloat16 or float16")
        require(self.numerics in ("fast", "invariant"), "numerics", "'fast' or 'invariant'")
        require(self.block_tokens in BLOCK_TOKENS, "block_tokens", f"one of {BLOCK_TOKENS}")
        require(self.reuse in ("blocks", "prefix"), "reuse", "'blocks' or 'prefix'")
        require(self.pending in ("share", "private"), "pending", "'share' or 'private'")
        require(self.evict in POLICIES, "evict", f"one of {', '.join(map(repr, POLICIES))}")
        require(self.prompts in ("beside", "first"), "prompts", "'beside' or 'first'")
        require(self.order in ORDERS, "order", f"one of {', '.join(map(repr, ORDERS))}")
        require(self.chunk in CHUNKS, "chunk", f"one of {', '.join(map(repr, CHUNKS))}")
        require(self.tpot_ms is None or 0 < self.tpot_ms < math.inf, "tpot_ms", "above 0, or left out")
        require(self.step_ms is None or 0 < self.step_ms < math.inf, "step_ms", "above 0, or left out")
        require(self.step_ms is None or self.executor == "hash", "step_ms", "left out: only the hash executor has one")
        require(self.tpot_ms is not None or self.chunk != "adaptive", "tpot_ms", "given where chunk is 'adaptive'")
        names = "'ngram', 'suffix' and at most one draft model, each once, separated by commas"
        models = [name for name in self.drafters if name not in DRAFTERS]
        require("" not in self.drafters and len(models) <= 1 and _differ(self.drafters), "speculative", names)
        policies = f"one of {', '.join(map(repr, SPECULATES))}"
        require(self.speculative_policy in SPECULATES, "speculative_policy", policies)
        require(1 <= self.speculative_depth <= MAX_DEPTH, "speculative_depth", f"from 1 to {MAX_DEPTH}")
        require(1 <= self.speculative_nodes <= MAX_NODES, "speculative_nodes", f"from 1 to {MAX_NODES}")
        budgeted = f"left out, or at least 1 with one of the policies {', '.join(map(repr, BUDGETED))}"
        budget_fits = self.speculative_policy in BUDGETED and (self.speculative_budget or 0) >= 1
        require(self.speculative_budget is None or budget_fits, "speculative_budget", budgeted)
        for name in ("max_step_tokens", "max_sequences", "min_chunk_tokens"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_waiting", "max_preemptions"):
            require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("kv_bytes", "max_model_len", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1, or left out")

    @property
    def drafters(self) -> tuple[str, ...]:
        """Who guesses, in the order of the config."""
        return tuple(part.strip() for part in self.speculative.split(",")) if self.speculative else ()

    @property
    def draft_model(self) -> str | None:
        """The one among the drafters, if there is one."""
        return next((name for name in self.drafters if name not in DRAFTERS), None)

    def resolve(self, **derived: Any) -> EngineConfig:
        """A new config with what was derived filled in; checked again."""
        return replace(self, **derived)


def _differ(names: tuple[str, ...]) -> bool:
    return len(set(names)) == len(names)


def state_secret(folder: Path) -> bytes:
    """The key of all block hashes: made once in the state folder with mode 0600, so that hashes cannot be guessed.

    Of processes that start at once, one makes it and all read the same. Raises ``ConfigError`` if it is damaged.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "block-hash.key"
    if not path.exists():
        fd, made = tempfile.mkstemp(dir=folder, prefix=".block-hash.")  # mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(32))
            # A link, not a rename: it takes the name whole, and never from somebody who was first.
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
        finally:
            os.unlink(made)
    key = path.read_bytes()
    if len(key) != 32:
        raise ConfigError(f"{path} must hold 32 bytes, holds {len(key)}; delete it to make a new one")
    return key
