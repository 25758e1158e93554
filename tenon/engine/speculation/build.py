"""From a config to a ``Speculation``: the drafters by name, the policy, what steps take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tenon.engine.config import EngineConfig
from tenon.engine.policies.speculate import SPECULATES
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.speculation import native
from tenon.engine.speculation.drafter import Drafter
from tenon.engine.speculation.native import QuickPays
from tenon.engine.speculation.ngram import Ngram
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.suffix import Suffix

DRAFTERS: Final[dict[str, Callable[[], Drafter]]] = {"ngram": Ngram, "suffix": Suffix}


def build_speculation(config: EngineConfig, measured: Mapping[int, float]) -> Speculation | None:
    """None where nobody is to guess. ``measured``: seconds of steps by their rows."""
    if not config.drafters:
        return None
    times, lib = StepTimes(measured), native.load()
    is_quick = config.speculative_policy == "pays" and lib is not None
    policy = QuickPays(lib, times) if is_quick and lib else SPECULATES[config.speculative_policy]()
    drafters = [DRAFTERS[name]() for name in config.drafters]
    limits = {"max_depth": config.speculative_depth, "max_nodes": config.speculative_nodes}
    return Speculation(drafters, policy, times, **limits)
