"""From an ``EngineConfig`` to a running ``Engine``: resolve the model, plan memory, load, warm up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError
from tenon.base.files import state_folder
from tenon.engine.chunks import Chunks, Predictor, predictor
from tenon.engine.config import EngineConfig, state_secret
from tenon.engine.engine import Engine, Identity
from tenon.engine.executors.base import Executor
from tenon.engine.executors.isolated import Isolated
from tenon.engine.grammar import Masks, Vocabulary
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.recompute import recompute_cost
from tenon.engine.scheduler import Scheduler
from tenon.engine.speculation.build import Draft, build_speculation, check_vocabulary
from tenon.engine.speculation.measure import LIMIT_ALONE_S, LIMIT_S, step_times
from tenon.models.generation import read_generation
from tenon.models.hf_config import read_config
from tenon.models.hub import resolve
from tenon.models.spec import DTYPE_BYTES, CostShape, KVGroup, ModelSpec

OnPhase = Callable[[str, float, str], None]
HEADROOM = 0.6
"""Of the memory that is free after loading, the part that keys and values may take."""


@dataclass(frozen=True)
class MemoryPlan:
    """How much KV there is: blocks per group (the null block among them), tokens, bytes."""

    n_blocks: int
    tokens: int
    kv_bytes: int
    max_model_len: int


def plan_memory(
    config: EngineConfig, spec: ModelSpec | CostShape, groups: tuple[KVGroup, ...], free_bytes: int
) -> MemoryPlan:
    """Blocks from ``kv_bytes``, else from what could ever be used, within ``HEADROOM`` of what is free.

    Raises ``ConfigError`` where not even one sequence fits.
    """
    size = config.block_tokens
    per_block = sum(group.block_bytes for group in groups)
    wanted_len = min(config.max_model_len or spec.max_position, spec.max_position)
    if config.kv_bytes is not None:
        usable = config.kv_bytes // per_block
        asked = f"kv_bytes of {config.kv_bytes}"
    else:
        most = config.max_sequences * -(-wanted_len // size) + 1
        usable = min(most, int(free_bytes * HEADROOM) // per_block)
        asked = f"{HEADROOM:.0%} of {free_bytes} free bytes"
    if usable < 2:
        raise ConfigError(
            f"{asked} holds {usable} blocks of {per_block} bytes; at least 2 are needed", subject="kv_bytes"
        )
    tokens = (usable - 1) * size
    if config.max_model_len is not None and wanted_len > tokens:
        raise ConfigError(
            f"max_model_len of {wanted_len} needs {-(-wanted_len // size) + 1} blocks, but {asked} holds {usable}; "
            f"lower max_model_len to {tokens} or raise kv_bytes to {(-(-wanted_len // size) + 1) * per_block}",
            subject="max_model_len",
        )
    return MemoryPlan(usable, tokens, usable * per_block, min(wanted_len, tokens))


def build_engine(config: EngineConfig, on_phase: OnPhase, clock: Clock = SYSTEM) -> Engine:
    """Everything up to the first request. ``on_phase(name, fraction, detail)`` hears about progress.

    Raises ``ConfigError``, ``CheckpointError`` or ``ResourceError``: one sentence that names what is wrong.
    """
    on_phase("config", 0.0, config.model)
    folder = resolve(config.model)
    spec = read_config(folder)
    eos_ids = read_generation(folder, spec).eos_ids
    on_phase("config", 1.0, f"{spec.family}, {spec.n_parameters() / 1e6:.1f} M parameters")
    name = Path(config.model).name or config.model
    groups = _groups(spec, name, config)
    drafting = _find_draft(config, folder, spec)
    draft_groups = () if drafting is None else _groups(drafting[1], config.draft_model or "", config)
    if config.kv_bytes is not None:
        plan_memory(config, spec, groups + draft_groups, 0)  # what cannot fit is said before the weights are loaded
    executor: Executor
    generates = True
    if config.executor == "hash":
        from tenon.engine.executors.hash import HashExecutor

        step_s = (config.step_ms or 0.0) / 1e3
        executor, free = HashExecutor(spec.vocab_size, width=spec.hidden_size, step_s=step_s), 1 << 30
    else:
        from tenon.engine.executors.torch import TorchExecutor

        torch_executor = TorchExecutor.load(folder, spec, config, on_phase, clock)
        executor, free = torch_executor, torch_executor.free_bytes()
        generates = torch_executor.has_head
    draft_executor = None if drafting is None else _load_draft(config, *drafting, on_phase, clock)
    memory = plan_memory(config, spec, groups + draft_groups, free)
    on_phase("memory", 0.0, f"{memory.kv_bytes / 2**20:.0f} MiB for {memory.tokens} tokens")
    executor.allocate(groups, memory.n_blocks)
    if draft_executor is not None:
        draft_executor.allocate(draft_groups, memory.n_blocks)
    on_phase("memory", 1.0, f"{memory.kv_bytes / 2**20:.0f} MiB for {memory.tokens} tokens")
    n_masks = config.max_sequences * (1 + config.speculative_nodes if config.drafters else 1)
    masks = Masks(Vocabulary(str(folder), spec.vocab_size, eos_ids), n_masks, clock)
    measured = {1: config.step_ms / 1e3 if config.step_ms else 1e-3}
    draft = None
    if config.executor != "hash" and generates:
        on_phase("steps", 0.0, "how long steps take")
        limit_s = LIMIT_S if config.drafters else LIMIT_ALONE_S
        measured = step_times(executor, groups, memory.n_blocks, config, clock, limit_s, memory.max_model_len)
        on_phase("steps", 1.0, f"{min(measured.values()) * 1e3:.2f} ms and more")
    if draft_executor is not None and drafting is not None:
        draft_measured = dict(measured)
        if config.executor != "hash":
            draft_len = drafting[1].max_position
            draft_measured = step_times(
                draft_executor, draft_groups, memory.n_blocks, config, clock, LIMIT_S, draft_len
            )
        draft = Draft(draft_executor, draft_groups, memory.n_blocks, drafting[1].max_position, draft_measured)
    caps, predicted = executor.caps, Predictor(None, "")
    if config.chunk == "adaptive":
        predicted = predictor(spec, caps.dtype, caps.device)
    scheduler = Scheduler(
        config,
        groups,
        memory.n_blocks,
        model=name,
        vocab_size=spec.vocab_size,
        eos_ids=eos_ids,
        max_model_len=memory.max_model_len,
        secret=state_secret(state_folder()),
        cost_of=recompute_cost(spec, config.block_tokens),
        chunks=Chunks(config, groups, predicted.step_s),
        masks=masks,
        speculation=build_speculation(config, measured, spec.vocab_size, draft, clock),
        times=StepTimes(measured),
    )
    identity = Identity(
        name=name,
        vocab_size=spec.vocab_size,
        eos_ids=eos_ids,
        max_model_len=memory.max_model_len,
        kv_bytes=memory.kv_bytes,
        n_blocks=memory.n_blocks,
        description={
            "family": spec.family,
            "parameters": str(spec.n_parameters()),
            "executor": caps.name,
            "device": caps.device,
            "dtype": caps.dtype,
            "numerics": config.numerics,
            "notes": "; ".join((*caps.notes, *([predicted.note] if predicted.note else ()))),
        },
        generates=generates,
    )
    return Engine(config, identity, scheduler, Isolated(executor), clock, on_close=masks.close)


def _groups(spec: ModelSpec, name: str, config: EngineConfig) -> tuple[KVGroup, ...]:
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    return spec.kv_groups(name, config.block_tokens, DTYPE_BYTES[dtype])


def _find_draft(config: EngineConfig, target: Path, spec: ModelSpec) -> tuple[Path, ModelSpec] | None:
    """Folder and shapes of the draft model, if there is to be one. Raises ``ConfigError`` for one that speaks another
    language than the target."""
    if config.draft_model is None:
        return None
    folder = resolve(config.draft_model)
    draft = read_config(folder)
    check_vocabulary(target, spec, folder, draft, config.draft_model)
    return folder, draft


def _load_draft(config: EngineConfig, folder: Path, spec: ModelSpec, on_phase: OnPhase, clock: Clock) -> Executor:
    """Its numbers need not be the same in any company: what is emitted does not depend on them."""
    if config.executor == "hash":
        from tenon.engine.executors.hash import HashExecutor

        return HashExecutor(spec.vocab_size, width=spec.hidden_size)
    from tenon.engine.executors.torch import TorchExecutor

    return TorchExecutor.load(folder, spec, replace(config, numerics="fast", max_model_len=None), on_phase, clock)
