"""From a config to a ``Speculation``: the drafters by name, the policy, what steps take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError
from tenon.engine.config import EngineConfig
from tenon.engine.executors.base import Executor
from tenon.engine.executors.isolated import Isolated
from tenon.engine.policies.plan import DraftPlan, FixedPlan, Plan
from tenon.engine.policies.slo import Paper
from tenon.engine.policies.speculate import EqualSplit, Speculate, Throughput
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.policies.table import SPECULATES
from tenon.engine.speculation import native
from tenon.engine.speculation.drafter import Drafter
from tenon.engine.speculation.model import DraftModel
from tenon.engine.speculation.native import QuickPays
from tenon.engine.speculation.ngram import Ngram
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.suffix import Suffix
from tenon.models.spec import KVGroup, ModelSpec
from tenon.models.tokenizer import load_tokenizer

WITHOUT_MODEL: Final[dict[str, Callable[[], Drafter]]] = {"ngram": Ngram, "suffix": Suffix}


@dataclass(frozen=True)
class Draft:
    """A draft model that is loaded, its memory allocated: ``n_blocks`` blocks of ``groups``; ``measured`` are seconds
    of its steps by their rows."""

    executor: Executor
    groups: tuple[KVGroup, ...]
    n_blocks: int
    max_len: int
    measured: Mapping[int, float]


def build_speculation(
    config: EngineConfig,
    measured: Mapping[int, float],
    vocab_size: int = 0,
    draft: Draft | None = None,
    clock: Clock = SYSTEM,
) -> Speculation | None:
    """None where nobody is to guess. ``measured``: seconds of steps by their rows. ``vocab_size`` and ``draft`` are
    needed where a draft model is among the drafters."""
    if not config.drafters:
        return None
    times, lib = StepTimes(measured), native.load()
    is_quick = config.speculative_policy == "pays" and lib is not None
    policy = QuickPays(lib, times) if is_quick and lib else chooser(config)
    drafters: list[Drafter] = []
    for name in config.drafters:
        if name in WITHOUT_MODEL:
            drafters.append(WITHOUT_MODEL[name]())
            continue
        if draft is None:
            raise ConfigError(f"the draft model {name!r} is not loaded", subject="speculative")
        draft_times = StepTimes(draft.measured)
        plan = draft_plan(policy, times, draft_times, config.speculative_depth)
        executor = Isolated(draft.executor)
        drafters.append(
            DraftModel(executor, draft.groups, draft.n_blocks, vocab_size, draft.max_len, plan, draft_times, clock)
        )
    limits = {"max_depth": config.speculative_depth, "max_nodes": config.speculative_nodes}
    return Speculation(drafters, policy, times, clock=clock, **limits)


def chooser(config: EngineConfig) -> Speculate:
    """The config's policy."""
    policy = SPECULATES[config.speculative_policy]()
    if config.speculative_budget is not None and isinstance(policy, Paper | Throughput | EqualSplit):
        policy = replace(policy, budget=config.speculative_budget)
    return policy


def draft_plan(policy: Speculate, times: StepTimes, draft_times: StepTimes, max_depth: int) -> Plan:
    """How far a draft model looks ahead: as the policy wants, or as far as pays."""
    return DraftPlan(times, draft_times, max_depth) if policy.drafts(1) is None else FixedPlan(policy.drafts)


def check_vocabulary(target: Path, target_spec: ModelSpec, draft: Path, draft_spec: ModelSpec, name: str) -> None:
    """Both models must mean the same by every token; how far their vocabularies are padded may differ. Raises
    ``ConfigError`` naming the first token that they do not agree about."""
    ours = load_tokenizer(target, target_spec.vocab_size)
    theirs = load_tokenizer(draft, draft_spec.vocab_size)
    n = max(ours.vocab_size, theirs.vocab_size)
    for token in range(n):
        one = ours.token_bytes(token) if token < ours.vocab_size else b""
        other = theirs.token_bytes(token) if token < theirs.vocab_size else b""
        if one != other:
            raise ConfigError(
                f"the draft model {name!r} has another tokenizer: token {token} is {other!r} there and {one!r} here; "
                "give a draft model of the same family",
                subject="speculative",
            )
