"""Learning rate as a function of the iteration: warm-up, stable, decay (WSD; Hu et al. 2024).

The stable phase has no end of its own, so a run may be cut or prolonged: only ``decay_at`` and ``stop``
say where it lands, and both may be moved while the decay has not begun.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenon.base.errors import ConfigError


@dataclass(frozen=True)
class Wsd:
    """Factors of the peak rate, in iterations; the decay is linear down to ``floor``."""

    warmup: int
    decay_at: int
    stop: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.warmup <= self.decay_at <= self.stop:
            raise ConfigError(
                f"a schedule needs 0 < warmup <= decay_at <= stop, not {self.warmup}, {self.decay_at}, {self.stop}.",
                subject="schedule",
            )

    def factor(self, iteration: int) -> float:
        """In (0, 1]: what iteration ``iteration`` (from 0) multiplies the peak rate with."""
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        if iteration < self.decay_at:
            return 1.0
        left = (self.stop - iteration) / (self.stop - self.decay_at + 1)
        return self.floor + (1.0 - self.floor) * max(left, 0.0)
