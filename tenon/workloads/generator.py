"""What a generator is handed, and making a trace of what it yields.

A generator is a function from :class:`Order` to requests by arrival, endless where the original is a service. It draws
every number from ``order.streams``, one stream per purpose, and reads every parameter through ``order.given``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from tenon.base.errors import ConfigError
from tenon.workloads.draws import Contents, Streams
from tenon.workloads.parameters import Given, families
from tenon.workloads.trace import Trace, TraceRequest


class Order:
    """A trace that is asked for: the seed's streams, fresh contents, parameters, requests per second.

    ``whole``: nobody has said where to end, so families of long sessions make a number of whole ones.
    """

    def __init__(self, name: str, seed: int, given: Given, rate: float | None, whole: bool) -> None:
        self.whole = whole
        self.name = name
        self.seed = seed
        self.given = given
        self.streams = Streams(seed, name)
        self.contents = Contents(seed, name)
        self.rate = given.number("rate", above=True) if rate is None else rate


Generate = Callable[[Order], Iterator[TraceRequest]]

# Family -> the module and function that makes it. Loaded when asked for.
GENERATORS = {
    "mooncake-conversation": ("mooncake", "conversation"),
    "mooncake-synthetic": ("mooncake", "synthetic"),
    "mooncake-toolagent": ("mooncake", "toolagent"),
    "azure-2023-code": ("azure", "hour"),
    "azure-2023-conv": ("azure", "hour"),
    "azure-2024-code": ("azure", "week"),
    "azure-2024-conv": ("azure", "week"),
    "burstgpt": ("burstgpt", "day"),
    "sharegpt": ("chat", "chat"),
    "lmsys": ("chat", "chat"),
    "longbench": ("documents", "documents"),
    "loogle": ("documents", "documents"),
    "coding-agent": ("agents", "coding"),
    "swe-agent": ("agents", "trajectories"),
    "adaserve": ("slo_mix", "mix"),
}


def make(
    name: str,
    *,
    seed: int = 0,
    requests: int | None = None,
    duration_s: float | None = None,
    rate: float | None = None,
    **overrides: Any,
) -> Trace:
    """A trace of the family ``name``: the first ``requests``, or all up to ``duration_s``, whichever ends it first.

    With neither, the family's own number of requests or sessions. ``rate`` is requests per second on average;
    ``overrides`` replace parameters of ``parameters.toml``. Raises ``ConfigError`` for an unknown family or parameter
    and for values that cannot be.
    """
    if name not in GENERATORS:
        raise ConfigError(f"there is no workload {name!r}; there are {', '.join(GENERATORS)}", subject=name)
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, got {seed}", subject="seed")
    for field, value, right in (("requests", requests, "at least 1"), ("duration_s", duration_s, "more than 0"),
                                ("rate", rate, "more than 0")):  # fmt: skip
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{field} must be {right}, got {value!r}", subject=field)
    whole = requests is None and duration_s is None
    order = Order(name, seed, Given(name, overrides), rate, whole)
    if whole and not order.given.has("sessions"):
        requests = order.given.count("requests")
    module, function = GENERATORS[name]
    generate: Generate = getattr(import_module(f"tenon.workloads.{module}"), function)
    made: list[TraceRequest] = []
    for request in generate(order):
        if (duration_s is not None and request.arrival_s > duration_s) or len(made) == requests:
            break
        made.append(request)
    if not made:
        raise ConfigError(f"workload {name} has no request within {duration_s:g} s at {order.rate:g}/s", subject=name)
    said = {"seed": seed, "requests": requests, "duration_s": duration_s, "rate": rate, **order.given.overrides}
    slos = order.given.slos()
    if slos:
        said["slo"] = slos
    source = families()[name].source
    return Trace.make(name, source, made, **{key: value for key, value in said.items() if value is not None})
