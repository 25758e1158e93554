"""The face of an executor. Scheduler, cache and sampling rules above it are one code for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, Protocol

from tenon.engine.step import Step, StepResult
from tenon.models.spec import KVGroup

Ticket = NewType("Ticket", int)


@dataclass(frozen=True)
class Caps:
    """What an executor can do, and what a person should know about how it does it."""

    name: str
    device: str
    dtype: str
    trees: bool
    holes: bool
    invariant: bool
    notes: tuple[str, ...] = ()


class Executor(Protocol):
    @property
    def caps(self) -> Caps: ...

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        """Reserve KV memory: ``n_blocks`` blocks in each group, block 0 among them. Raises ``ResourceError``."""
        ...

    def submit(self, step: Step) -> Ticket:
        """Start computing. Steps complete in order; blocks they name must not be freed before ``poll``."""
        ...

    def poll(self, ticket: Ticket) -> StepResult:
        """Wait for a step and return its result, once per ticket. A failing sequence is named in ``errors``."""
        ...

    def load_weights(self, path: str, version: int) -> None:
        """Replace the weights between steps; on failure the old ones stay. Raises ``CheckpointError``."""
        ...

    def close(self) -> None:
        """Release memory and threads; nothing may be submitted afterwards."""
        ...
